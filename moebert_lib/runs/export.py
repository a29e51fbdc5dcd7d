"""Every stored run as a row of one table, merged from any number of stores.

Of a run only its record is read. Nothing in a store is executed or unpickled, and the table is
the same in whatever order its stores are named.
"""

import io
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from moebert_lib.config.errors import UserError, home, nearest
from moebert_lib.config.file_io import write_bytes
from moebert_lib.config.provenance import digest, to_json
from moebert_lib.config.settings import Settings
from moebert_lib.runs.status import UNSEEN
from moebert_lib.store.committed_results import FILES, ROWS, CommittedResults, key_of
from moebert_lib.store.store import RECORD, Store, flat, parse

if TYPE_CHECKING:
    from pandas import DataFrame, Series

A_STORE = "a MOEBERT_HOME or its runs/ folder"


class Source(NamedTuple):
    """A store: what it is called, its runs' names, and how the record of one is read."""

    label: str
    names: list[str]
    read: Callable[[str], bytes]


def frame(stores: Sequence[str | Path] = (), *, kind: str = "notebook") -> "DataFrame":
    """One row for each stored run of a kind, ordered by its choices and its digest.

    Columns: kind, notebook, scale, task, seed; every other setting in the order of
    :class:`Settings`, older ones after; parameters of notebooks that are no settings, by name;
    metrics by name; digest, created (UTC), superseded, seconds, commit, the machine's cpu,
    versions of torch and transformers, the data's digest, store. Where a name comes twice, the
    later column is called ``setting.``, ``parameter.`` or ``metric.NAME``. Of a stage's nested
    key a name means the outermost value. A run is superseded where a newer one has the same
    values, which then differs in code, data or versions. Lists and dicts are JSON text; numbers
    that are not finite, or wider than 64 bits, are missing.

    A run found in several stores is one row: the oldest. Records that cannot be used, and
    runs whose copies differ in a metric, are told on stderr, one line each.

    Args:
        stores: Each a MOEBERT_HOME or its ``runs/``; this home by default.
        kind: ``notebook``, a stage such as ``student`` or ``teacher``, or ``all``.

    Raises:
        UserError: no such store, one that cannot be read, no run of that kind.
    """
    sources = [_source(store) for store in sorted({str(store) for store in stores or [home()]})]
    kinds = sorted({_kind(name) for source in sources for name in source.names} - {""})
    where = ", ".join(source.label for source in sources)
    if not kinds:
        raise UserError(f"no runs in {where}; expected {A_STORE}")
    if kind not in (*kinds, "all"):
        raise UserError(f"no run of kind '{kind}' in {where}; {nearest(kind, [*kinds, 'all'])}")
    records = [record for source in sources for record in _read(source, kind)]
    if not records:
        raise UserError(f"no usable run of kind '{kind}' in {where}; each was left out")
    return table([row(record) for record in _merged(records)])


def write(frame: "DataFrame", path: str | Path) -> None:
    """Write a table whole or not at all, as its suffix says: .parquet, .csv or .json.

    Equal tables give equal bytes.

    Raises:
        UserError: another suffix, a folder, or no folder to write into.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it, such as {path / 'runs.parquet'}")
    suffix = path.suffix.lower()
    if suffix not in WRITERS:
        raise UserError(f"{path.name}: unknown kind of file; {nearest(suffix, WRITERS)}")
    if not path.parent.is_dir():
        raise UserError(f"no folder '{path.parent}' to write {path.name} into; make it first")
    write_bytes(path, WRITERS[suffix](frame))


def _source(store: str) -> Source:
    path = Path(store).expanduser()
    if not path.is_dir():
        raise UserError(f"no folder '{store}'; expected {A_STORE}")
    root = path / "runs" if (path / "runs").is_dir() else path
    names = sorted(found.parent.name for found in root.glob(f"*/{RECORD}"))
    return Source(store, names, lambda name: (root / name / RECORD).read_bytes())


def _kind(name: str) -> str:
    """The kind in an entry's name; "" where the name is no entry's."""
    match = re.fullmatch(r"(.+)-[0-9a-f]{16}", name)
    return match[1] if match else ""


def _read(source: Source, kind: str) -> Iterator[dict[str, Any]]:
    """The usable records of a kind, each with the store it was found in."""
    for name in source.names:
        if _kind(name) and kind not in (_kind(name), "all"):
            continue
        try:
            yield _record(source.read(name), name) | {"store": source.label}
        except UserError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            print(f"moebert: {source.label}: {name} is left out: {error}", file=sys.stderr)


def _record(content: bytes, name: str) -> dict[str, Any]:
    record = parse(content)
    if record is None:
        raise ValueError(f"{RECORD} is no complete record")
    whole = digest({"kind": record["kind"], "key": record["key"]})
    right = f"{record['kind']}-{whole[:16]}"
    if (record["digest"], name) != (whole, right):
        raise ValueError(f"{RECORD} is the record of {right}")
    return record


def _merged(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each run once, as it was made first."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        runs[record["digest"]].append(record)
    for name, copies in sorted(runs.items()):
        copies.sort(key=lambda record: (record["created"], record["store"]))
        differ = _differences([metrics(record) for record in copies])
        if differ:
            kept, *others = (record["store"] for record in copies)
            print(
                f"moebert: run {name[:16]} of {kept}, the oldest, is kept; copies differ "
                f"({', '.join(others)}): {differ}",
                file=sys.stderr,
            )
        yield copies[0]


def _differences(copies: Sequence[dict[str, float | None]]) -> str:
    """Metrics in which copies of a run differ, and by how much; "" where they agree."""
    told = []
    for name in sorted({name for metrics in copies for name in metrics}):
        values = {metrics.get(name) for metrics in copies}
        if len(values) > 1:
            numbers = all(type(value) in (int, float) for value in values)
            how = f"by {max(values) - min(values):.2g}" if numbers else "in more than digits"
            told.append(f"{name} {'not in all' if None in values else how}")
    return ", ".join(told)


def _json(table: "DataFrame") -> bytes:
    values = table.astype(object)
    rows = values.where(values.notna(), None).to_dict("records")
    return (json.dumps(rows, ensure_ascii=False, indent=2) + "\n").encode()


WRITERS = {
    ".parquet": lambda table: table.to_parquet(index=False),
    ".csv": lambda table: table.to_csv(index=False, lineterminator="\r\n").encode(),
    ".json": _json,
}


# A stored run's record as the row of a table, and the types of the table's columns.

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


# Write a folder of results (``archive``): the stages of many runs, all but their models.

#: Files of a stage that figures are drawn from; models, tokenizers and states are left behind.
KEPT = {
    "teacher": ("config.json", "answers.csv"),
    "importance": ("importance.safetensors",),
    "excitation": ("excitation.safetensors", "tokens.json"),
    "removal": ("curves.csv",),
    "scores": ("scores.safetensors",),
    "score_removal": ("curves.csv",),
    "converted": ("answers.csv",),
    "student": ("answers.csv", "curve.csv", "distances.csv"),
    "about": (),
    "table": ("table.parquet",),
}
#: Columns without use here: ``of`` is what a table was measured of, whole, as its record has it.
LEFT = ["store", "superseded", "notebook", "of"]
PACKED = {"compression": "zstd", "compression_level": 19, "index": False}


def write_results(folder: Path, stores: Sequence[str | Path] = ()) -> tuple[int, int]:
    """Add the stages of stores to a folder of results; returns its numbers of rows and files.

    Of a stage that is there twice the newer stays. Equal results give equal bytes.

    Args:
        folder: Made where it is missing.
        stores: Each a MOEBERT_HOME or its ``runs/``; this home by default.

    Raises:
        UserError: no such store, or no stage anywhere.
    """
    from pandas import DataFrame

    found: dict[str, tuple[dict[str, Any], dict[str, bytes]]] = {}
    for record, files in [*_there(folder), *_new(stores)]:
        where = key_of(record).choices_digest
        if where not in found or found[where][0]["created"] <= record["created"]:
            found[where] = record, files
    if not found:
        raise UserError(
            "no stage of an experiment in the stores; expected a MOEBERT_HOME or its runs/ folder"
        )
    kept = sorted(found.values(), key=lambda one: (one[0]["kind"], one[0]["digest"]))
    files = [
        (record["digest"], name, content)
        for record, files in kept
        for name, content in sorted(files.items())
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _write(_rows([record for record, _ in kept]), folder / ROWS)
    _write(DataFrame(files, columns=["digest", "name", "content"]), folder / FILES)
    return len(kept), len(files)


def verify(folder: Path) -> None:
    """Every column of the rows says what the row's own record, which is sealed, says.

    Raises:
        UserError: naming the row and the column that do not; as :class:`CommittedResults`.
    """
    from pandas import read_parquet

    records = CommittedResults(folder).records.values()
    packed = io.BytesIO()
    _rows(list(records)).to_parquet(packed, **PACKED)
    told, table = read_parquet(packed), read_parquet(folder / ROWS)
    for name in dict.fromkeys([*told, *table]):
        sides = [side.get(name) for side in (told, table)]
        if any(side is None for side in sides):
            raise UserError(f"{folder / ROWS}: column '{name}' is new or missing; restore the file")
        apart = ~((sides[0] == sides[1]) | (sides[0].isna() & sides[1].isna()))
        if apart.any():
            row = int(apart.argmax())
            raise UserError(
                f"{folder / ROWS}: row {row} says {name} {sides[1][row]}, its record "
                f"{sides[0][row]}; restore the file"
            )


def _there(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """What a folder of results holds already."""
    if (folder / ROWS).is_file():
        results = CommittedResults(folder)
        for record in results.records.values():
            yield record, dict(results.files_of(record))


def _new(stores: Sequence[str | Path]) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """The stages in stores, with their small files."""
    for store in [Path(store).expanduser() for store in stores] or [home()]:
        root = store / "runs" if (store / "runs").is_dir() else store
        if not root.is_dir():
            raise UserError(f"no folder '{store}'; expected a MOEBERT_HOME or its runs/ folder")
        for entry in Store(root).entries():
            names = [name for name in KEPT.get(entry.kind, ()) if (entry.folder / name).is_file()]
            if entry.kind in KEPT:
                yield entry.record(), {name: (entry.folder / name).read_bytes() for name in names}


def _rows(records: Sequence[dict[str, Any]]) -> "DataFrame":
    """One row a stage: its settings and metrics as columns, and its whole record as JSON."""
    rows = table([row(record) for record in records])
    whole = {record["digest"]: to_json(record) for record in records}
    rows = rows.drop(columns=LEFT, errors="ignore")
    return rows.assign(record=rows["digest"].map(whole))


def _write(table: "DataFrame", path: Path) -> None:
    """Whole or not at all, as small as it goes."""
    packed = io.BytesIO()
    table.to_parquet(packed, **PACKED)
    write_bytes(path, packed.getvalue())
