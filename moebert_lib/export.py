"""Every stored run as a row of one table, merged from any number of stores.

Of a run only its record is read. Nothing in a store is executed or unpickled, and the table is
the same in whatever order its stores are named.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import ZipFile

from moebert_lib import columns
from moebert_lib.errors import UserError, home, nearest
from moebert_lib.provenance import digest
from moebert_lib.shared import RECORD, RECORD_BYTES, Shared, parse
from moebert_lib.store import write_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

A_STORE = "a MOEBERT_HOME, its runs/ folder, or a mirror's address such as file:///…"


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
        stores: Each a MOEBERT_HOME, its ``runs/``, or a mirror's address (:mod:`shared`); this
            home by default.
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
    return columns.table([columns.row(record) for record in _merged(records)])


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
    if "://" in store or any(_kind(found.stem) for found in path.glob("*.zip")):
        return _mirror(Shared(store if "://" in store else str(path.resolve())))
    if not path.is_dir():
        raise UserError(f"no folder '{store}'; expected {A_STORE}")
    root = path / "runs" if (path / "runs").is_dir() else path
    names = sorted(found.parent.name for found in root.glob(f"*/{RECORD}"))
    return Source(store, names, lambda name: (root / name / RECORD).read_bytes())


def _mirror(shared: Shared) -> Source:
    """Of an object only the record is read: models may be beside it."""

    def read(name: str) -> bytes:
        try:
            with shared.fs.open(f"{shared.root}/{name}.zip") as file, ZipFile(file) as packed:
                if packed.getinfo(RECORD).file_size > RECORD_BYTES:
                    raise ValueError("too long")
                return packed.read(RECORD)
        except OSError as error:
            raise UserError(f"shared store {shared.url} cannot be read: {error}") from None
        except Exception as error:  # a damaged zip makes zipfile raise many
            raise ValueError(f"no zip with {RECORD} ({error})") from None

    return Source(shared.url, shared.names(), read)


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
        differ = _differences([columns.metrics(record) for record in copies])
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
