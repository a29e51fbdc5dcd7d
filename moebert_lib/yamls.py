"""YAML as people write it by hand: plain values only, and no name twice."""

from typing import Any

from moebert_lib.errors import UserError


def parse(text: str, where: str) -> Any:
    """The values of a YAML text; tags that would build objects are refused.

    Args:
        text: YAML.
        where: What to call it in an error.

    Raises:
        UserError: not YAML, or a mapping names something twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few of them can stand for billions of values
                raise UserError(f"{where}: aliases (*name) are not read; write the value again")
            return super().compose_node(parent, index)

    def mapping(loader: Loader, node: Any) -> dict:
        names = [loader.construct_object(name, deep=True) for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{where}: '{name}' is given twice; keep one")
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{where}: not YAML: {problem}") from None
