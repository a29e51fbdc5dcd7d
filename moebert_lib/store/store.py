"""Content-addressed results: one folder per run, made once, checked when reused.

An entry is a folder ``runs/<kind>-<digest>`` whose name is the digest of everything that
decides its content. ``entry.json``, written last, holds the row of results, the SHA-256 of
every other file, and where, when and with what it was made. A folder is built under
``runs/tmp`` and renamed when it is complete, so a half-written entry is never seen, and a
lock per digest lets processes share the store, and machines too where the folder lies on a
file system that they all mount.
Left out on purpose: a database. Folders merge with ``cp`` and compare with ``diff``.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moebert_lib.config import file_io
from moebert_lib.config.errors import home
from moebert_lib.config.file_io import write_json
from moebert_lib.config.provenance import (
    checksums,
    commit,
    digest,
    file_digest,
    machine,
    to_json,
    versions,
)

RECORD, SEAL = "entry.json", "seal"
#: What a record must hold, by name.
TYPES = {
    "kind": str,
    "digest": str,
    "key": dict,
    "row": dict,
    "seconds": int | float,
    "created": str,
    "files": dict,
}


@dataclass(frozen=True)
class Entry:
    """One stored run. ``row`` is its result, ``folder`` its files, ``seconds`` its cost."""

    kind: str
    digest: str
    folder: Path
    key: dict[str, Any]
    row: dict[str, Any]
    seconds: float
    reused: bool

    @property
    def origin(self) -> str:
        """Whether it was there already or made now, in words."""
        return (
            f"reused, runs/{self.folder.name}" if self.reused else f"made in {self.seconds:.0f} s"
        )

    def record(self) -> dict[str, Any]:
        """All of ``entry.json``: also files, versions, commit, machine and created (UTC)."""
        return json.loads((self.folder / RECORD).read_text("utf-8"))


class Store:
    """The entries under one folder, ``home()/runs`` unless told otherwise.

    Example:
        >>> import tempfile
        >>> store = Store(tempfile.mkdtemp())
        >>> store.make("sum", {"a": 1, "b": 2}, lambda folder: {"total": 3}).reused
        False
        >>> again = store.make("sum", {"a": 1, "b": 2}, lambda folder: {"total": 3})
        >>> again.reused, again.row
        (True, {'total': 3})
    """

    def __init__(self, root: Path | str | None = None):
        self.root = Path(root).resolve() if root is not None else home() / "runs"

    def folder(self, kind: str, key: dict) -> Path:
        """Where the entry of this key lies, or would lie."""
        return self.root / f"{kind}-{digest({'kind': kind, 'key': key})[:16]}"

    def make(
        self, kind: str, key: dict, build: Callable[[Path], dict], *, force: bool = False
    ) -> Entry:
        """The stored entry of ``key``, built first where it is missing or damaged.

        Args:
            kind: A short word; the first part of the folder's name.
            key: Everything that decides the content, as JSON values.
            build: Writes its files into the folder it is given and returns the row.
                Whatever it raises passes through, and leaves no trace in the store.
            force: Build again, and replace a stored entry once that has succeeded.

        Raises:
            Unwritable: the disk is full or the folder forbidden; no half entry is left.
        """
        final = self.folder(kind, key)
        with file_io.writing(self.root), file_io.lock(self.root, final.name):
            file_io.sweep(final)
            entry = self._whole(final)
            if entry and not force:
                return entry
            return self._build(kind, key, build, final)

    def find(self, kind: str, key: dict) -> Entry | None:
        """The stored entry of ``key``; None where it is missing or damaged."""
        return self._read(self.folder(kind, key))[0]

    def damage(self, kind: str, key: dict) -> str:
        """What is wrong with the entry of ``key`` here; "" where it is whole, or not there."""
        return self._read(self.folder(kind, key))[1]

    def busy(self, kind: str, key: dict) -> bool:
        """Whether a process is making the entry of ``key`` now."""
        return file_io.is_locked(self.root, self.folder(kind, key).name)

    def tidy(self) -> int:
        """Remove what killed processes left in this folder; returns how many things."""
        return file_io.tidy(self.root)

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All complete entries (of one kind), oldest first; files are not checked."""
        found = []
        for path in self.root.glob(f"*/{RECORD}"):
            record = _parse(path)
            if record and kind in (None, record["kind"]):
                found.append((record["created"], path.parent.name, _entry(path.parent, record)))
        return [entry for _, _, entry in sorted(found, key=lambda item: item[:2])]

    def _read(self, folder: Path) -> tuple[Entry | None, str]:
        """The entry, or why it cannot be used ("" where there is none)."""
        if not folder.is_dir():
            return None, ""
        record = _parse(folder / RECORD)
        if record is None:
            return None, f"{RECORD} is missing, cut short or has changed"
        if folder.name != f"{record['kind']}-{record['digest'][:16]}":
            return None, f"{RECORD} is that of another run"
        for name, expected in record["files"].items():
            path = folder / name
            if not path.is_file():
                return None, f"{name} is missing"
            if file_digest(path) != expected:
                return None, f"{name} has changed"
        return _entry(folder, record), ""

    def _whole(self, folder: Path) -> Entry | None:
        """The entry where it is here and whole; a damaged one is moved away."""
        entry, damage = self._read(folder)
        if damage:
            self._set_aside(folder, damage)
        return entry

    def _set_aside(self, folder: Path, damage: str) -> None:
        aside = self.root / "damaged" / f"{folder.name}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        os.rename(folder, aside)
        print(f"moebert: {folder.name}: {damage}; moved to {aside} and made again", file=sys.stderr)

    def _build(self, kind: str, key: dict, build: Callable[[Path], dict], final: Path) -> Entry:
        tmp = file_io.scratch(final)
        start = time.perf_counter()
        try:
            row = build(tmp)
            record = {
                "kind": kind,
                "digest": digest({"kind": kind, "key": key}),
                "key": key,
                "row": row,
                "seconds": round(time.perf_counter() - start, 3),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": versions(),
                "commit": commit(),
                "machine": machine(),
                "files": checksums(tmp),
            }
            record = sealed(json.loads(to_json(record)))
            write_json(tmp / RECORD, record)
            file_io.sync(tmp / RECORD)  # after a power cut the checksums find what else was lost
            old = file_io.scratch(final) if final.exists() else None  # force
            if old:
                os.rename(final, old / "old")
            os.rename(tmp, final)
            if old:
                shutil.rmtree(old, ignore_errors=True)
            file_io.sync(self.root)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        return _entry(final, record, reused=False)


def output_dir() -> Path:
    """Where figures and tables go: the running batch's folder, else the interactive one."""
    chosen = os.environ.get("MOEBERT_FIGURES")
    folder = Path(chosen) if chosen else home() / "runs" / "interactive" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def parse(content: bytes) -> dict[str, Any] | None:
    """The record in the bytes of an ``entry.json``; None: not whole, or altered since."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and all(
        isinstance(record.get(name), kind) for name, kind in TYPES.items()
    )
    try:
        return record if whole and record == sealed(record) else None
    except UnicodeEncodeError:  # half a character, which no file can hold
        return None


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record of JSON values with the digest of everything else in it."""
    rest = {name: value for name, value in record.items() if name != SEAL}
    return {**rest, SEAL: digest(rest)}


def _entry(folder: Path, record: dict, *, reused: bool = True) -> Entry:
    names = ("kind", "digest", "key", "row", "seconds")
    return Entry(folder=folder, reused=reused, **{name: record[name] for name in names})


def _parse(path: Path) -> dict | None:
    try:
        return parse(path.read_bytes())
    except OSError:
        return None
