"""Notebooks as files: found by name, and their one cell of parameters read."""

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moebert_lib.errors import UserError, home, nearest


def notebooks() -> list[Path]:
    """The workbook's notebooks, in order."""
    return sorted((home() / "notebooks").glob("[0-9]*.ipynb"))


def select(names: Sequence[str] = ()) -> list[Path]:
    """Notebooks by number ("01"), name ("01_importance", "importance") or path; all by default.

    Raises:
        UserError: no such notebook; names the nearest one.
    """
    known = {path.stem: path for path in notebooks()}
    if not names and not known:
        raise UserError(
            f"no notebooks in {home() / 'notebooks'}; run from a checkout, or set "
            "MOEBERT_HOME to one"
        )
    return list(dict.fromkeys(_find(name, known) for name in names or known))


def parameters_of(path: Path) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of the one cell tagged ``parameters``."""
    tagged = [cell for cell in _cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) > 1:
        raise UserError(f"{path.name} has {len(tagged)} cells tagged 'parameters'; keep one")
    found = {}
    try:
        for node in ast.parse("".join(tagged[0]["source"])).body if tagged else []:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            default = ast.literal_eval(node.value)
            annotation = getattr(node, "annotation", None)
            found[target.id] = (_type(annotation, default), default)
    except (SyntaxError, ValueError, AttributeError, NameError, TypeError) as error:
        raise UserError(
            f"{path.name}: its parameters cell may hold only lines such as "
            f"'seed: int = 0' ({error})"
        ) from None
    return found


def takes_settings(path: Path) -> bool:
    """Whether a notebook takes every setting by name."""
    return "overrides" in parameters_of(path)


def _find(name: str, known: dict[str, Path]) -> Path:
    if name.endswith(".ipynb"):
        path = Path(name).expanduser().resolve()
        if path.is_file():
            return path
        raise UserError(f"no notebook '{name}'; {nearest(path.stem, known)}")
    for stem, path in known.items():
        number, _, words = stem.partition("_")
        if name in (stem, number, words) or (name.isdecimal() and name.zfill(2) == number):
            return path
    hint = nearest(name, known) if known else f"{home() / 'notebooks'} has none"
    raise UserError(f"no notebook '{name}'; {hint}")


def _cells(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text("utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a notebook (nbformat 4 with a list of cells)") from None


def _type(annotation: ast.expr | None, default: Any) -> Any:
    if annotation is None:
        return Any if default is None else type(default)
    plain = {kind.__name__: kind for kind in (str, int, float, bool, list, dict)}
    names = {"__builtins__": {}, "Literal": Literal, **plain}
    return eval(ast.unparse(annotation), names)  # of the notebook, which is about to be run
