"""A stored run's record as the row of a table, and the types of the table's columns."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from moebert_lib.archive import flat
from moebert_lib.inventory import UNSEEN
from moebert_lib.provenance import to_json
from moebert_lib.settings import Settings

if TYPE_CHECKING:
    from pandas import DataFrame, Series

#: The first columns and the last; settings, parameters and metrics lie between, in that order.
FIRST = ("kind", "notebook", "scale", "task", "seed")
LAST = (
    "digest",
    "created",
    "superseded",
    "seconds",
    "commit",
    "cpu",
    "torch_threads",
    "torch",
    "transformers",
    "data",
    "store",
)
GROUPS = ("first", "setting", "parameter", "metric", "last")


def metrics(record: dict[str, Any]) -> dict[str, Any]:
    """What a notebook recorded of its run, or the numbers of another run's row."""
    notebook = record["kind"] == "notebook"
    named = _mapping(record["row"].get("metrics")) if notebook else record["row"]
    types = (int, float, bool, str) if notebook else (int, float)
    return {name: _plain(value) for name, value in named.items() if type(value) in types}


def row(record: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """A run's values by group and name."""
    key = record["key"]
    settings, parameters, data = _choices(key) if record["kind"] != "notebook" else _given(key)
    about = _mapping(record.get("machine")) | _mapping(record.get("versions")) | record
    about |= {"notebook": key.get("notebook"), "data": data}
    first = {name: settings.pop(name, None) for name in ("scale", "task", "seed")}
    first |= {name: about[name] for name in ("kind", "notebook")}
    last = {name: about.get(name) for name in LAST}
    parts = zip(GROUPS, (first, settings, parameters, metrics(record), last), strict=True)
    return {(group, name): value for group, part in parts for name, value in part.items()}


def _given(key: dict[str, Any]) -> tuple[dict, dict, Any]:
    """Settings, further parameters and the data's digest, of a notebook's key."""
    settings, given = _mapping(key.get("settings")), _mapping(key.get("parameters"))
    known = Settings.model_fields.keys() | settings.keys()
    own = {name: value for name, value in given.items() if name in known}
    more = {name: given[name] for name in given if name not in known and name != "overrides"}
    return own | settings, more, _mapping(key.get("inputs")).get("data")


def _choices(key: dict[str, Any]) -> tuple[dict, dict, Any]:
    """The same of a stage's key, which holds the keys of the stages before it."""
    leaves = _leaves(key)
    return {name: leaves[name] for name in leaves if name not in UNSEEN}, {}, leaves.get("data")


def _leaves(key: dict[str, Any]) -> dict[str, Any]:
    """Names and values at any depth, lists too; the outer one where a name comes twice."""
    inner_first = sorted(flat(key).items(), key=lambda leaf: -leaf[0].count("."))
    parts = ((name.split("."), value) for name, value in inner_first)
    return {path[-1]: value for path, value in parts if not set(path[:-1]) & set(UNSEEN)}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def table(rows: Sequence[dict[tuple[str, str], Any]]) -> "DataFrame":
    """Rows of :func:`row` as one table, in the order of their choices."""
    from pandas import DataFrame

    _supersede(rows)
    names = _columns({key for row in rows for key in row})
    table = DataFrame({name: _column(key, [row.get(key) for row in rows]) for key, name in names})
    choices = [name for (group, _), name in names if group in ("first", "setting")]
    return table.sort_values([*choices, "digest"], na_position="first", ignore_index=True)


def _supersede(rows: Sequence[dict[tuple[str, str], Any]]) -> None:
    """Mark each row that a newer one of the same values stands for."""
    newest: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: (row["last", "created"], row["last", "digest"])):
        choices = [(key, value) for key, value in row.items() if key[0] not in ("metric", "last")]
        older = newest.get(repr(sorted(choices, key=repr)))
        if older:
            older["last", "superseded"] = True
        row["last", "superseded"] = False
        newest[repr(sorted(choices, key=repr))] = row


def _columns(present: set[tuple[str, str]]) -> list[tuple[tuple[str, str], str]]:
    """Each value's group and name with the name of its column, in order."""
    usual = {"first": FIRST, "setting": tuple(Settings.model_fields), "last": LAST}

    def place(key: tuple[str, str]) -> tuple[int, int, str]:
        group, name = key
        return GROUPS.index(group), (*usual.get(group, ()), name).index(name), name

    named, taken = [], {*FIRST, *LAST}
    for group, name in sorted(present, key=place):
        column = name
        while group not in ("first", "last") and column in taken:
            column = f"{group}.{column}"
        taken.add(column)
        named.append(((group, name), column))
    return named


def _column(key: tuple[str, str], values: Sequence[Any]) -> "Series":
    """Values as one nullable type; as text where they have no type in common."""
    from pandas import Series

    plain = [_plain(value) for value in values]
    types = {type(value) for value in plain if value is not None}
    if not types:
        return Series(plain, dtype=_usual_type(*key))
    for same, dtype in (({bool}, "boolean"), ({int}, "Int64"), ({int, float}, "Float64")):
        if types <= same:
            return Series(plain, dtype=dtype)
    texts = [value if isinstance(value, str | None) else to_json(value) for value in plain]
    return Series(texts, dtype="string")


def _plain(value: Any) -> Any:
    """A value as a column holds it."""
    if isinstance(value, list | dict):
        return to_json(value)
    missing = isinstance(value, float) and not math.isfinite(value)
    wide = isinstance(value, int) and not -(2**63) <= value < 2**63
    return None if missing or wide else value


def _usual_type(group: str, name: str) -> str:
    """The type of a column without values: as :class:`Settings` declares it."""
    if group == "metric":
        return "Float64"
    annotation = Settings.model_fields[name].annotation if name in Settings.model_fields else str
    for type_, dtype in ((bool, "boolean"), (int, "Int64"), (float, "Float64")):
        if type_ in (annotation, *get_args(annotation)):
            return dtype
    return "string"
