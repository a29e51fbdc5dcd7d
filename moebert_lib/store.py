"""Content-addressed results: one folder per run, made once, checked when reused.

An entry is a folder ``runs/<kind>-<digest>`` whose name is the digest of everything that
decides its content. ``entry.json``, written last, holds the row of results, the SHA-256 of
every other file, and where, when and with what it was made. A folder is built under
``runs/tmp`` and renamed when it is complete, so a half-written entry is never seen, and a
lock per digest lets processes share the store.
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
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from moebert_lib.provenance import (
    checksums,
    code_digest,
    commit,
    cores,
    digest,
    file_digest,
    machine,
    to_json,
    versions,
)
from moebert_lib.settings import home

__all__ = [
    "Entry", "Store", "code_digest", "commit", "cores", "digest", "file_digest", "machine",
    "output_dir", "versions", "write_bytes", "write_json",
]  # fmt: skip

if TYPE_CHECKING:
    from pandas import DataFrame

RECORD = "entry.json"


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
        """
        final = self.folder(kind, key)
        with self._locked(final.name):
            entry, damage = self._read(final)
            if entry and not force:
                return entry
            if damage:
                self._set_aside(final, damage)
            return self._build(kind, key, build, final)

    def find(self, kind: str, key: dict) -> Entry | None:
        """The stored entry of ``key``, or None where it is missing or damaged."""
        return self._read(self.folder(kind, key))[0]

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All complete entries (of one kind), oldest first; files are not checked."""
        found = []
        for path in self.root.glob(f"*/{RECORD}"):
            record = _parse(path)
            if record and kind in (None, record["kind"]):
                found.append((record["created"], path.parent.name, _entry(path.parent, record)))
        return [entry for _, _, entry in sorted(found, key=lambda item: item[:2])]

    def frame(self, kind: str | None = None) -> "DataFrame":
        """One row per entry: kind, key (nested names joined by a dot), row, digest, cost."""
        from pandas import DataFrame

        rows = []
        for entry in self.entries(kind):
            record = entry.record()
            about = {"digest": entry.digest, "created": record["created"], "seconds": entry.seconds}
            rows.append({"kind": entry.kind, **_flat(entry.key), **_flat(entry.row), **about})
        return DataFrame(rows)

    def _locked(self, name: str) -> FileLock:
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            print(f"· waiting for another process that is making {name}", flush=True)
            return lock.acquire()

    def _read(self, folder: Path) -> tuple[Entry | None, str]:
        """The entry, or why it cannot be used ("" where there is none)."""
        if not folder.is_dir():
            return None, ""
        record = _parse(folder / RECORD)
        if record is None:
            return None, f"{RECORD} is missing or unreadable"
        for name, expected in record["files"].items():
            path = folder / name
            if not path.is_file():
                return None, f"{name} is missing"
            if file_digest(path) != expected:
                return None, f"{name} has changed"
        return _entry(folder, record), ""

    def _set_aside(self, folder: Path, damage: str) -> None:
        aside = self.root / "damaged" / f"{folder.name}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        os.rename(folder, aside)
        print(f"moebert: {folder.name}: {damage}; moved to {aside} and made again", file=sys.stderr)

    def _build(self, kind: str, key: dict, build: Callable[[Path], dict], final: Path) -> Entry:
        tmp = self.root / "tmp" / final.name  # ours alone while we hold the lock
        shutil.rmtree(tmp, ignore_errors=True)  # what a killed process left
        tmp.mkdir(parents=True)
        start = time.perf_counter()
        try:
            row = build(tmp)
            record = {
                "kind": kind, "digest": digest({"kind": kind, "key": key}), "key": key, "row": row,
                "seconds": round(time.perf_counter() - start, 3),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": versions(), "commit": commit(), "machine": machine(),
                "files": checksums(tmp),
            }  # fmt: skip
            write_json(tmp / RECORD, record)
            if final.exists():  # force
                shutil.rmtree(final)
            os.rename(tmp, final)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        return _entry(final, json.loads(to_json(record)), reused=False)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_bytes(path, (to_json(value, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def output_dir() -> Path:
    """Where figures and tables go: the running batch's folder, else the interactive one."""
    chosen = os.environ.get("MOEBERT_FIGURES")
    folder = Path(chosen) if chosen else home() / "runs" / "interactive" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _entry(folder: Path, record: dict, *, reused: bool = True) -> Entry:
    names = ("kind", "digest", "key", "row", "seconds")
    return Entry(folder=folder, reused=reused, **{name: record[name] for name in names})


def _parse(path: Path) -> dict | None:
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    needed = {"kind", "digest", "key", "row", "seconds", "created", "files"}
    return record if isinstance(record, dict) and needed <= record.keys() else None


def _flat(mapping: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
