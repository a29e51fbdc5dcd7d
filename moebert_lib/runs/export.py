"""Tables of stored runs: a row for each run, from any number of homes; and committed results.

Of a run only its record is read. Nothing in a home is executed or unpickled, and the table is the
same in whatever order the homes are named.
"""

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

from moebert_lib.config.errors import UserError, home, nearest
from moebert_lib.config.file_io import write_bytes
from moebert_lib.config.provenance import to_json
from moebert_lib.config.settings import Settings
from moebert_lib.data.tasks import TASKS
from moebert_lib.store import committed_results
from moebert_lib.store.committed_results import CommittedResults, Record, key_of
from moebert_lib.store.store import ORIGIN, RECORD, Store, flat, parse

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame, Series

SESSIONS = "sessions"  # in runs/: notebooks that were run without the moebert command
EXPECTED = "a MOEBERT_HOME or its runs/ folder"

#: The first columns and the last; settings, parameters and metrics are between them.
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
JUDGED = ("teacher", "converted", "student")  # stages with answers
#: What a column is about: the first part of its key, in the order of the columns.
GROUPS = ("first", "setting", "parameter", "metric", "last")
#: Names in a key that stand for digests or machinery, which nobody chooses.
UNSEEN = ORIGIN - {"keep_model"} | {"cells"}
Key = tuple[str, str]  # a column's group, and the name of its value


def frame(homes: Sequence[str | Path] = (), *, kind: str = "notebook") -> "DataFrame":
    """One row for each stored run of a kind, ordered by its choices and its digest.

    Columns: kind, notebook, scale, task, seed; every other setting in the order of
    :class:`Settings`, older ones after; parameters of notebooks that are not settings; metrics;
    digest, created (UTC), superseded, seconds, commit, the machine's cpu, versions of torch and
    transformers, the data's digest, store. :func:`column_names` says what becomes of a name that
    comes twice. Of a stage's nested key a name means the outermost value. A run is superseded
    where a newer one has the same values, which then differs in code, data or versions. Lists and
    dicts are JSON text. Numbers of a stage that are not finite, and whole numbers wider than 64
    bits, are missing; what ``record`` was given as NaN or infinite is text.

    A run that is in several homes is one row: the oldest. Records that cannot be used, and
    runs whose copies differ in a metric, are named on stderr, one line each.

    Args:
        homes: Each a MOEBERT_HOME or its ``runs/``; this home by default.
        kind: ``notebook``, a stage such as ``student`` or ``teacher``, or ``all``.

    Raises:
        UserError: no such home, or no run of that kind.
    """
    labels = sorted({str(folder) for folder in homes or [home()]})
    paths = [(label, path) for label in labels for path in _records(Path(label).expanduser())]
    kinds = sorted({_kind(path.parent.name) for _, path in paths} - {""})
    where = ", ".join(labels)
    if not kinds:
        raise UserError(f"no runs in {where}; expected {EXPECTED}")
    if kind not in (*kinds, "all"):
        raise UserError(f"no run of kind '{kind}' in {where}; {nearest(kind, [*kinds, 'all'])}")
    chosen = [(label, path) for label, path in paths if _kind(path.parent.name) in (kind, "")]
    records = list(_read(paths if kind == "all" else chosen))
    if not records:
        raise UserError(f"no usable run of kind '{kind}' in {where}; each was left out")
    return table([row(record) for record in _merged(records)])


def _root(folder: Path) -> Path:
    """The runs/ of a home, or the folder itself."""
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'; expected {EXPECTED}")
    return folder / "runs" if (folder / "runs").is_dir() else folder


def _records(folder: Path) -> list[Path]:
    """The record files of a home, by their names."""
    root = _root(folder)
    paths = [*root.glob(f"*/{RECORD}"), *root.glob(f"{SESSIONS}/*/{RECORD}")]
    return sorted(paths)


def _kind(name: str) -> str:
    """The kind in an entry's name; "" where it is not the name of an entry."""
    match = re.fullmatch(r"(.+)-[0-9a-f]{16}", name)
    return match[1] if match else ""


def _read(paths: Iterable[tuple[str, Path]]) -> Iterator[Record]:
    """The usable records, each with its home."""
    for label, path in paths:
        name = path.parent.name
        try:
            record = parse(path.read_bytes())
            if record is None:
                raise ValueError(f"{RECORD} is no complete record")
            key = key_of(record)
            right = f"{key.kind}-{key.digest[:16]}"
            if (record["digest"], name) != (key.digest, right):
                raise ValueError(f"{RECORD} is the record of {right}")
        except (OSError, ValueError) as error:
            print(f"moebert: {label}: {name} is left out: {error}", file=sys.stderr)
        else:
            yield record | {"store": label}


def _merged(records: Iterable[Record]) -> Iterator[Record]:
    """Each run once, as it was made first."""
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        runs[record["digest"]].append(record)
    for digest, copies in sorted(runs.items()):
        copies.sort(key=lambda record: (record["created"], record["store"]))
        differences = _differences([metrics(record) for record in copies])
        if differences:
            kept, *others = (record["store"] for record in copies)
            print(
                f"moebert: run {digest[:16]} of {kept}, the oldest, is kept; copies differ "
                f"({', '.join(others)}): {differences}",
                file=sys.stderr,
            )
        yield copies[0]


def _differences(copies: Sequence[Mapping[str, Any]]) -> str:
    """Metrics in which copies of a run differ, and by how much; "" where they agree."""
    words = []
    for name in sorted({name for values in copies for name in values}):
        values = {copy.get(name) for copy in copies}
        if len(values) > 1:
            numbers = all(type(value) in (int, float) for value in values)
            how = f"by {max(values) - min(values):.2g}" if numbers else "in more than digits"
            words.append(f"{name} {'not in all' if None in values else how}")
    return ", ".join(words)


# A record as a row, and rows as a table.


def metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook recorded of its run, or the numbers of another stage's row."""
    is_notebook = record["kind"] == "notebook"
    values = _mapping(record["row"].get("metrics")) if is_notebook else record["row"]
    types = (int, float, bool, str) if is_notebook else (int, float)
    return {name: _plain(value) for name, value in values.items() if type(value) in types}


def row(record: Mapping[str, Any]) -> dict[Key, Any]:
    """A run's values by group and name."""
    key = record["key"]
    is_notebook = record["kind"] == "notebook"
    if is_notebook:
        settings, parameters = _notebook_values(key)
        data = _mapping(key.get("inputs")).get("data")
    else:
        settings, parameters, data = stage_choices(key), {}, _stage_data(key)
    about = _mapping(record.get("machine")) | _mapping(record.get("versions")) | dict(record)
    about |= {"notebook": key.get("notebook"), "data": data}
    first = {name: settings.pop(name, None) for name in ("scale", "task", "seed")}
    first |= {name: about[name] for name in ("kind", "notebook")}
    last = {name: about.get(name) for name in LAST}
    parts = (first, settings, parameters, metrics(record), last)
    return {
        (group, name): value
        for group, part in zip(GROUPS, parts, strict=True)
        for name, value in part.items()
    }


def _notebook_values(key: Mapping[str, Any]) -> tuple[dict, dict]:
    """Settings and further parameters in a notebook's key."""
    settings, given = _mapping(key.get("settings")), _mapping(key.get("parameters"))
    known = Settings.model_fields.keys() | settings.keys()
    named = {name: value for name, value in given.items() if name in known}
    more = {name: given[name] for name in given if name not in known and name != "overrides"}
    return named | settings, more


def stage_choices(key: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen in a stage's key and in the keys of the stages before it, by name.

    Where a name comes twice the outer value counts.
    """
    inner_first = sorted(flat(key).items(), key=lambda leaf: -leaf[0].count("."))
    leaves = [(name.split("."), value) for name, value in inner_first]
    values = {path[-1]: value for path, value in leaves if not set(path[:-1]) & UNSEEN}
    return {name: value for name, value in values.items() if name not in UNSEEN}


def _stage_data(key: Mapping[str, Any]) -> Any:
    """The data's digest in a stage's key; the outermost where there are several."""
    leaves = [
        (name.count("."), value)
        for name, value in flat(key).items()
        if name.split(".")[-1] == "data"
    ]
    return min(leaves, default=(0, None), key=lambda leaf: leaf[0])[1]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def table(rows: Sequence[dict[Key, Any]]) -> "DataFrame":
    """Rows of :func:`row` as one table, in the order of their choices."""
    from pandas import DataFrame

    _mark_superseded(rows)
    usual = {"first": FIRST, "setting": tuple(Settings.model_fields), "last": LAST}

    def place(key: Key) -> tuple[int, int, str]:
        group, name = key
        return GROUPS.index(group), (*usual.get(group, ()), name).index(name), name

    keys = sorted({key for row in rows for key in row}, key=place)
    names = column_names(keys, reserved=(*FIRST, *LAST))
    columns = {names[key]: _column(key, [row.get(key) for row in rows]) for key in keys}
    choices = [names[key] for key in keys if key[0] in ("first", "setting")]
    order = [*choices, "digest"]
    return DataFrame(columns).sort_values(order, na_position="first", ignore_index=True)


def column_names(keys: Sequence[Key], *, reserved: Iterable[str] = ()) -> dict[Key, str]:
    """The names of columns: that of the value, after its group where the name is taken.

    Args:
        keys: Group and name of each column, in order.
        reserved: Names that only the groups "first" and "last" may have.

    Example:
        >>> column_names([("setting", "epochs"), ("metric", "epochs")])
        {('setting', 'epochs'): 'epochs', ('metric', 'epochs'): 'metric.epochs'}
    """
    names: dict[Key, str] = {}
    taken = set(reserved)
    for group, name in keys:
        column = name
        while group not in ("first", "last") and column in taken:
            column = f"{group}.{column}"
        taken.add(column)
        names[group, name] = column
    return names


def _mark_superseded(rows: Sequence[dict[Key, Any]]) -> None:
    """Mark each row for which there is a newer one with the same values."""
    newest: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: (row["last", "created"], row["last", "digest"])):
        choices = [(key, value) for key, value in row.items() if key[0] not in ("metric", "last")]
        identity = repr(sorted(choices, key=repr))
        if identity in newest:
            newest[identity]["last", "superseded"] = True
        row["last", "superseded"] = False
        newest[identity] = row


def _column(key: Key, values: Sequence[Any]) -> "Series":
    """Values as one nullable type; as text where they have no type in common."""
    from pandas import Series

    plain = [_plain(value) for value in values]
    types = {type(value) for value in plain if value is not None}
    if not types:
        return Series(plain, dtype=_declared_type(*key))
    for same, dtype in (({bool}, "boolean"), ({int}, "Int64"), ({int, float}, "Float64")):
        if types <= same:
            return Series(plain, dtype=dtype)
    texts = [value if isinstance(value, str | None) else to_json(value) for value in plain]
    return Series(texts, dtype="string")


def _plain(value: Any) -> Any:
    """A value that a column can have."""
    if isinstance(value, list | dict):
        return to_json(value)
    missing = isinstance(value, float) and not math.isfinite(value)
    wide = isinstance(value, int) and not -(2**63) <= value < 2**63
    return None if missing or wide else value


def _declared_type(group: str, name: str) -> str:
    """The type of a column without values: as :class:`Settings` declares it."""
    if group == "metric":
        return "Float64"
    annotation = Settings.model_fields[name].annotation if name in Settings.model_fields else str
    for type_, dtype in ((bool, "boolean"), (int, "Int64"), (float, "Float64")):
        if type_ in (annotation, *get_args(annotation)):
            return dtype
    return "string"


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


def _json(table: "DataFrame") -> bytes:
    values = table.astype(object)
    rows = values.where(values.notna(), None).to_dict("records")
    return (json.dumps(rows, ensure_ascii=False, indent=2) + "\n").encode()


WRITERS = {
    ".parquet": lambda table: table.to_parquet(index=False),
    ".csv": lambda table: table.to_csv(index=False, lineterminator="\r\n").encode(),
    ".json": _json,
}


# The same columns for committed results.


def write_results(folder: Path, homes: Sequence[str | Path] = ()) -> tuple[int, int]:
    """Add the stages of homes to a folder of results; returns its numbers of rows and files.

    Args:
        folder: Made where it is missing.
        homes: Each a MOEBERT_HOME or its ``runs/``; this home by default.

    Raises:
        UserError: no such home, or no stage anywhere.
    """
    stores = [Store(_root(Path(folder).expanduser())) for folder in homes or [home()]]
    return committed_results.add(folder, stores, stage_table)


def add_right_answers(folder: Path, data_dir: str) -> int:
    """Add the right classes or values of the examples that stored models were judged on.

    Only where they are missing; rows made since they are kept have them. Returns how many
    datasets they were added for.

    Args:
        folder: Of results.
        data_dir: The data that the models were made from, as for ``moebert run``.

    Raises:
        UserError: the data gives another score than a stored one; as ``loading.load``.
    """
    from moebert_lib.experiments.stage_keys import dataset_settings
    from moebert_lib.experiments.teacher import right_answers, right_key

    results, added = CommittedResults(folder), set()
    with TemporaryDirectory() as root:
        store = Store(root)
        for record in results.records.values():
            if record["kind"] not in JUDGED:
                continue
            settings = dataset_settings(stage_choices(record["key"]), data_dir)
            if TASKS[settings.task].kind == "span" or results.find(right_key(results, settings)):
                continue
            _check_scores(results, record, right_answers(store, settings)["validation"])
            added.add(right_key(results, settings).digest)
        if added:
            write_results(folder, [root])
    return len(added)


def _check_scores(results: CommittedResults, record: Record, right: "np.ndarray") -> None:
    """Refuse right answers that give other scores than a record has."""
    from moebert_lib.experiments.teacher import saved_answers
    from moebert_lib.training.evaluation import score

    task = TASKS[stage_choices(record["key"])["task"]]
    answers = saved_answers(results.entry(record))
    for name, value in score(answers, right, task.metrics).items():
        if value != record["row"][name]:
            raise UserError(
                f"{record['kind']} {record['digest'][:8]} on {task.name} has {name} "
                f"{record['row'][name]}, this data gives {value}; "
                "expected the data it was made from"
            )


def stage_table(records: Sequence[Record]) -> "DataFrame":
    """One row a stage: its settings and its metrics as columns."""
    rows = table([row(record) for record in records])
    return rows.drop(columns=["store", "superseded", "notebook", "of"], errors="ignore")
