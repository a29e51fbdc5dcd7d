"""Results of many runs in a folder that can be committed: rows and small files, no models.

``rows.parquet`` has a row for each stage that was made (``teacher``, ``student``, ...), with its
settings and metrics as columns and its whole record; ``files.parquet`` has the small files that
figures are drawn from. Such a folder takes the place of a store: the stages of an experiment are
read from it, nothing is trained, and neither data nor weights are needed.

A stage is looked up by its choices alone. What it was made with (code, versions, digests of data
and weights) says where a row comes from.
"""

import atexit
import functools
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.file_io import write_bytes
from moebert_lib.config.provenance import input_digest, to_json
from moebert_lib.store.store import RECORD, Entry, StageKey, Store, entry_of, parse

if TYPE_CHECKING:
    from pandas import DataFrame

Record = dict[str, Any]
#: The table of stages that has a column for each setting and metric, one of them ``digest``.
Tabulate = Callable[[Sequence[Record]], "DataFrame"]

FROM = "MOEBERT_FROM"  # the environment variable that names the folder
ROWS, FILES = "rows.parquet", "files.parquet"
PACKED = {"compression": "zstd", "compression_level": 19, "index": False}
#: Files of a stage that figures are drawn from; models, tokenizers and states are left out.
KEPT = {
    "teacher": ("config.json", "answers.csv", "predictions.safetensors"),
    "right": ("right.safetensors",),
    "importance": ("importance.safetensors",),
    "excitation": ("excitation.safetensors", "tokens.json"),
    "removal": ("curves.csv",),
    "scores": ("scores.safetensors",),
    "score_removal": ("curves.csv",),
    "converted": ("answers.csv", "predictions.safetensors"),
    "student": ("answers.csv", "predictions.safetensors", "curve.csv", "distances.csv"),
    "about": (),
    "table": ("table.parquet",),
}


def open_store() -> "AnyStore":
    """The committed results that ``MOEBERT_FROM`` names, else the store of this home."""
    folder = os.environ.get(FROM, "")
    return committed_results(folder) if folder else Store()


@functools.lru_cache(maxsize=2)
def committed_results(folder: str) -> "CommittedResults":
    """The results in a folder, read once a process."""
    return CommittedResults(Path(folder))


class CommittedResults:
    """A folder of results with the methods of a :class:`store.Store`; it makes nothing.

    Raises:
        UserError: no such folder, or its files cannot be read.
    """

    makes = False  # what is missing cannot be made here

    def __init__(self, folder: Path):
        import pandas as pd

        self.source = folder
        for name in (ROWS, FILES):
            if not (folder / name).is_file():
                raise UserError(
                    f"no {name} in '{folder}'; expected a folder that "
                    "moebert export --results wrote, such as figures/runs"
                )
        try:
            texts = pd.read_parquet(folder / ROWS, columns=["record"])["record"]
            self.files = pd.read_parquet(folder / FILES).set_index(["digest", "name"])["content"]
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"'{folder}' holds no results: {reason}") from None
        records = [parse(text.encode()) for text in texts]
        if None in records:
            raise UserError(
                f"{folder / ROWS}: row {records.index(None)} has changed since it was "
                "made; restore the file"
            )
        self.records = {key_of(record).choices_digest: record for record in records}
        self.root = Path(tempfile.mkdtemp(prefix="moebert-"))
        atexit.register(shutil.rmtree, self.root, ignore_errors=True)

    def inputs(self) -> dict[str, str]:
        """Digests of the two files, by name."""
        return {name: input_digest(self.source / name) for name in (ROWS, FILES)}

    def make(
        self, key: StageKey, build: Callable[[Path], dict] | None = None, *, force: bool = False
    ) -> Entry:
        """The stage of ``key``; ``build`` and ``force`` are a store's, and not used.

        Raises:
            UserError: it is not here, with the nearest stage that is.
        """
        entry = self.find(key)
        if entry is None:
            raise UserError(self._missing(key))
        return entry

    def find(self, key: StageKey) -> Entry | None:
        """The stage with the choices of ``key``, or None."""
        record = self.records.get(key.choices_digest)
        return record and self.entry(record)

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All stages (of one kind), oldest first."""
        records = [record for record in self.records.values() if kind in (None, record["kind"])]
        records.sort(key=lambda record: (record["created"], record["digest"]))
        return [self.entry(record) for record in records]

    def busy(self, key: StageKey) -> bool:
        """No process makes anything here."""
        return False

    def folder(self, key: StageKey) -> Path:
        """Where the files of a stage are unpacked."""
        return self.root / key.choices_digest[:32]

    def entry(self, record: dict[str, Any]) -> Entry:
        """The stage of one of :attr:`records`, its files unpacked."""
        folder = self.folder(key_of(record))
        if not folder.is_dir():
            folder.mkdir()
            (folder / RECORD).write_text(to_json(record), "utf-8")
            for name, content in self.files_of(record):
                (folder / name).write_bytes(content)
        return entry_of(record, folder)

    def files_of(self, record: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        """Names and bytes of a stage's small files.

        Raises:
            UserError: a file is not the one that the stage made.
        """
        digest = record["digest"]
        if digest not in self.files.index.get_level_values("digest"):
            return
        for name, content in self.files.loc[digest].items():
            if hashlib.sha256(content).hexdigest() != record["files"].get(name):
                raise UserError(
                    f"{self.source / FILES}: {name} of {record['kind']} {digest[:8]} "
                    "has changed since it was made; restore the file"
                )
            yield name, content

    def _missing(self, key: StageKey) -> str:
        there = [key_of(record) for record in self.records.values()]
        same_kind = [other for other in there if other.kind == key.kind]
        differences = [key.difference(other, origin=False) for other in same_kind]
        closest = min(differences, key=len, default={})
        apart = ", ".join(
            f"{name}={value} (there: {other})" for name, (value, other) in closest.items()
        )
        kinds = sorted({other.kind for other in there})
        hint = f"the nearest differs in {apart}" if apart else nearest(key.kind, kinds)
        return f"'{self.source}' has no such {key.kind}; {hint}"


#: What functions of an experiment take as their first argument.
AnyStore = Store | CommittedResults


def key_of(record: Mapping[str, Any]) -> StageKey:
    """The key in a stored record."""
    return StageKey.read(record["kind"], record["key"])


# Writing such a folder, and checking one.


def add(folder: Path, stores: Sequence[Store], tabulate: Tabulate) -> tuple[int, int]:
    """Add the stages of stores to a folder of results; returns its numbers of rows and files.

    Of a stage that is there twice the newer stays. Equal results give equal bytes.

    Raises:
        UserError: no stage anywhere.
    """
    from pandas import DataFrame

    stages: dict[str, tuple[Record, dict[str, bytes]]] = {}
    for record, contents in [*_committed(folder), *_stored(stores)]:
        choices = key_of(record).choices_digest
        if choices not in stages or stages[choices][0]["created"] <= record["created"]:
            stages[choices] = record, contents
    if not stages:
        roots = ", ".join(str(store.root) for store in stores)
        raise UserError(f"no stage of an experiment in {roots}; run moebert run first")
    kept = sorted(stages.values(), key=lambda stage: (stage[0]["kind"], stage[0]["digest"]))
    files = [
        (record["digest"], name, content)
        for record, contents in kept
        for name, content in sorted(contents.items())
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / ROWS, _packed_rows([record for record, _ in kept], tabulate))
    table = DataFrame(files, columns=["digest", "name", "content"])
    write_bytes(folder / FILES, table.to_parquet(**PACKED))
    return len(kept), len(files)


def _committed(folder: Path) -> Iterator[tuple[Record, dict[str, bytes]]]:
    """What a folder of results has already."""
    if (folder / ROWS).is_file():
        results = CommittedResults(folder)
        for record in results.records.values():
            yield record, dict(results.files_of(record))


def _stored(stores: Sequence[Store]) -> Iterator[tuple[Record, dict[str, bytes]]]:
    """The stages in stores, with their small files."""
    for entry in [entry for store in stores for entry in store.entries()]:
        if entry.kind in KEPT:
            paths = [entry.folder / name for name in KEPT[entry.kind]]
            yield entry.record(), {path.name: path.read_bytes() for path in paths if path.is_file()}


def _packed_rows(records: Sequence[Record], tabulate: Tabulate) -> bytes:
    """The bytes of ``rows.parquet``: the table of stages, with each record as JSON."""
    rows = tabulate(records)
    texts = {record["digest"]: to_json(record) for record in records}
    return rows.assign(record=rows["digest"].map(texts)).to_parquet(**PACKED)


def verify(folder: Path, tabulate: Tabulate) -> None:
    """Check that every column of the rows agrees with the row's own record, which is sealed.

    Raises:
        UserError: naming the row and the column that do not; as :class:`CommittedResults`.
    """
    from pandas import read_parquet

    records = list(CommittedResults(folder).records.values())
    expected = read_parquet(io.BytesIO(_packed_rows(records, tabulate)))
    rows, path = read_parquet(folder / ROWS), folder / ROWS
    for name in dict.fromkeys([*expected, *rows]):
        if name not in expected or name not in rows:
            raise UserError(f"{path}: column '{name}' is new or missing; restore the file")
        missing = expected[name].isna() & rows[name].isna()
        different = ~((expected[name] == rows[name]) | missing)
        if different.any():
            number = int(different.argmax())
            raise UserError(
                f"{path}: row {number} says {name} {rows[name][number]}, its record "
                f"{expected[name][number]}; restore the file"
            )
