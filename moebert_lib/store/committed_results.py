"""Rows and small files of many runs, in a folder that can be committed: all but the models.

``rows.parquet`` has a row for each stage that was made (``teacher``, ``student``, ...), with its
settings and metrics as columns and its whole record, and ``files.parquet`` the small files that
figures are drawn from. Where the environment variable ``MOEBERT_FROM`` names such a folder, the
experiment's stages are read from it: nothing is trained, and neither data nor weights are needed.

What a stage was made with (code, versions, data and weights by their digests) says where a row
comes from and not which one is meant: a stage is found by its settings alone.
"""

import atexit
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.provenance import digest, input_digest, to_json
from moebert_lib.store.store import RECORD, Entry, Store, parse

FROM = "MOEBERT_FROM"  # the environment variable that names the folder
ROWS, FILES = "rows.parquet", "files.parquet"
#: Of a stage's key: what it was made with and what was kept, which is no choice of an experiment.
ORIGIN = {"weights", "data", "device", "code", "versions", "keep_model"}


def named() -> str:
    """The folder that ``MOEBERT_FROM`` names; "" where stages are made and kept in the store."""
    return os.environ.get(FROM, "")


def store() -> "Store | Archive":
    """Where the stages of an experiment are: the store, or the folder of committed results."""
    return opened(named()) if named() else Store()


def inputs() -> dict[str, str]:
    """Digests of the files that ``MOEBERT_FROM`` names, by name."""
    return {name: input_digest(Path(named()) / name) for name in (ROWS, FILES)}


@functools.lru_cache(maxsize=2)
def opened(folder: str) -> "Archive":
    """The archive in a folder, read once a process."""
    return Archive(Path(folder))


def choices(key: Any) -> Any:
    """A stage's key, at any depth without what it was made with.

    Example:
        >>> choices({"seed": 1, "code": "3f", "teacher": {"task": "rte", "data": "a0"}})
        {'seed': 1, 'teacher': {'task': 'rte'}}
    """
    if isinstance(key, Mapping):
        return {name: choices(value) for name, value in key.items() if name not in ORIGIN}
    return [choices(value) for value in key] if isinstance(key, list | tuple) else key


def place(kind: str, key: dict) -> str:
    """What a stage is found by."""
    return digest({"kind": kind, "key": choices(json.loads(to_json(key)))})


class Archive:
    """A folder of results that answers as a :class:`store.Store` does, and makes nothing.

    Raises:
        UserError: no such folder, or its files cannot be read.
    """

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
            records = pd.read_parquet(folder / ROWS, columns=["record"])["record"]
            self.files = pd.read_parquet(folder / FILES).set_index(["digest", "name"])["content"]
        except (OSError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"'{folder}' holds no results: {said}") from None
        parsed = [parse(text.encode()) for text in records]
        if None in parsed:
            raise UserError(
                f"{folder / ROWS}: row {parsed.index(None)} has changed since it was "
                "made; restore the file"
            )
        self.records = {place(record["kind"], record["key"]): record for record in parsed}
        self.root = Path(tempfile.mkdtemp(prefix="moebert-"))
        atexit.register(shutil.rmtree, self.root, ignore_errors=True)

    def make(
        self, kind: str, key: dict, build: Callable[[Path], dict] | None = None, *, force=False
    ) -> Entry:
        """The stage of ``key``; ``build`` and ``force`` are a store's, and not asked.

        Raises:
            UserError: it is not here, with the nearest stage that is.
        """
        entry = self.find(kind, key)
        if entry is None:
            raise UserError(self._missing(kind, key))
        return entry

    def find(self, kind: str, key: dict) -> Entry | None:
        """The stage of ``key``, or None."""
        record = self.records.get(place(kind, key))
        return record and self._entry(record)

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All stages (of one kind), oldest first."""
        found = [record for record in self.records.values() if kind in (None, record["kind"])]
        found.sort(key=lambda record: (record["created"], record["digest"]))
        return [self._entry(record) for record in found]

    def busy(self, kind: str, key: dict) -> bool:
        """No process makes anything here."""
        return False

    def folder(self, kind: str, key: dict) -> Path:
        """Where the files of a stage are unpacked."""
        return self.root / place(kind, key)[:32]

    def _entry(self, record: dict[str, Any]) -> Entry:
        folder = self.folder(record["kind"], record["key"])
        if not folder.is_dir():
            folder.mkdir()
            (folder / RECORD).write_text(to_json(record), "utf-8")
            for name, content in self.files_of(record):
                (folder / name).write_bytes(content)
        names = ("kind", "digest", "key", "row", "seconds")
        return Entry(folder=folder, reused=True, **{name: record[name] for name in names})

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

    def _missing(self, kind: str, key: dict) -> str:
        there = [record["key"] for record in self.records.values() if record["kind"] == kind]
        asked = flat(choices(json.loads(to_json(key))))
        apart = [differences(asked, flat(choices(one))) for one in there]
        least = min(apart, key=len, default={})
        told = ", ".join(f"{name}={mine} (there: {other})" for name, (mine, other) in least.items())
        kinds = sorted({record["kind"] for record in self.records.values()})
        hint = f"the nearest differs in {told}" if told else nearest(kind, kinds)
        return f"'{self.source}' has no such {kind}; {hint}"


def flat(key: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested key's leaves by dotted name.

    Example:
        >>> flat({"seed": 1, "teacher": {"task": "rte"}})
        {'seed': 1, 'teacher.task': 'rte'}
    """
    leaves: dict[str, Any] = {}
    for name, value in key.items():
        deeper = isinstance(value, Mapping)
        leaves |= flat(value, f"{prefix}{name}.") if deeper else {f"{prefix}{name}": value}
    return leaves


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple]:
    """Names whose values differ, with both values."""
    names = dict.fromkeys([*mine, *other])
    pairs = {name: (mine.get(name), other.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
