"""Content-addressed results: one folder per run, made once, checked when reused.

An entry is a folder ``runs/<kind>-<digest>`` whose name is the digest of everything that
decides its content. ``entry.json``, written last, holds the row of results, the SHA-256 of
every other file, and where, when and with what it was made. A folder is built under
``runs/tmp`` and renamed when it is complete, so a half-written entry is never seen, and a
lock per digest lets processes share the store. Machines share one through a mirror
(``shared``): what is not here is fetched from it, and what is made here is sent to it.
Left out on purpose: a database. Folders merge with ``cp`` and compare with ``diff``.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moebert_lib.config import file_io
from moebert_lib.config.errors import UserError, home
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
from moebert_lib.store.shared import RECORD, Shared, parse, sealed

MIRROR = "MOEBERT_STORE"  # the environment variable that holds the mirror's address


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

    ``shared`` is the address of a mirror (:class:`shared.Shared`), "" for none. None takes the
    environment variable ``MOEBERT_STORE``, for the default folder only.

    Raises:
        UserError: (every method that asks it) the mirror's address is wrong, or it cannot be
            reached, read or written.

    Example:
        >>> import tempfile
        >>> store = Store(tempfile.mkdtemp())
        >>> store.make("sum", {"a": 1, "b": 2}, lambda folder: {"total": 3}).reused
        False
        >>> again = store.make("sum", {"a": 1, "b": 2}, lambda folder: {"total": 3})
        >>> again.reused, again.row
        (True, {'total': 3})
    """

    def __init__(self, root: Path | str | None = None, *, shared: str | None = None):
        if shared is None:
            shared = os.environ.get(MIRROR, "") if root is None else ""
        self.root = Path(root).resolve() if root is not None else home() / "runs"
        self.shared = Shared(shared) if shared else None

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
            Unreachable: the mirror cannot be read. One that cannot be written is told on
                stderr: the entry is kept here, and sent when it is next asked for.
        """
        final = self.folder(kind, key)
        with file_io.writing(self.root), file_io.lock(self.root, final.name):
            file_io.sweep(final)
            entry = self._whole(final)
            entry = None if force else entry or self._fetch(final)
            if entry:
                return self.send(entry)
            with self.shared.lease(final.name) if self.shared else nullcontext():
                entry = None if force else self._fetch(final)
                return self.send(entry or self._build(kind, key, build, final))

    def find(self, kind: str, key: dict) -> Entry | None:
        """The stored entry of ``key``, from here or the mirror; None: missing or damaged."""
        final = self.folder(kind, key)
        entry = self._read(final)[0]
        if entry or self.shared is None or not self.shared.has(final.name):
            return entry
        with file_io.writing(self.root), file_io.lock(self.root, final.name):
            return self._whole(final) or self._fetch(final)

    def send(self, entry: Entry) -> Entry:
        """The same entry, which the mirror has from now on, unless a line says why not."""
        if self.shared:
            try:
                if not (entry.reused and self.shared.has(entry.folder.name)):
                    self.shared.push(entry.folder)
            except UserError as error:
                print(
                    f"moebert: {error}; {entry.folder.name} is complete in {self.root} and sent "
                    "when next asked for",
                    file=sys.stderr,
                )
        return entry

    def pull(self) -> int:
        """Fetch all entries that the mirror has and this folder lacks; returns how many."""
        names = self.shared.names() if self.shared else []
        n_fetched = 0
        with file_io.writing(self.root):
            for final in (self.root / name for name in names):
                held = (
                    None if (final / RECORD).is_file() else file_io.try_lock(self.root, final.name)
                )
                if held is not None:  # else it is here, or another process is at it
                    with held:
                        n_fetched += not self._whole(final) and self._fetch(final) is not None
        return n_fetched

    def damage(self, kind: str, key: dict) -> str:
        """What is wrong with the entry of ``key`` here; "" where it is whole, or not there."""
        return self._read(self.folder(kind, key))[1]

    def busy(self, kind: str, key: dict, *, anywhere: bool = True) -> bool:
        """Whether a process is making the entry of ``key``, here or where the mirror is shared.

        Without ``anywhere`` the mirror is not asked, which takes time.
        """
        name = self.folder(kind, key).name
        here = file_io.is_locked(self.root, name)
        return here or (anywhere and self.shared is not None and self.shared.leased(name))

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

    def _fetch(self, final: Path) -> Entry | None:
        """The entry from the mirror, where it has one that can be used."""
        if self.shared is None or not self.shared.has(final.name):
            return None
        tmp = file_io.scratch(final)
        try:
            if not self.shared.fetch(final.name, tmp):
                return None
            os.rename(tmp, final)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        return self._read(final)[0]

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


def _entry(folder: Path, record: dict, *, reused: bool = True) -> Entry:
    names = ("kind", "digest", "key", "row", "seconds")
    return Entry(folder=folder, reused=reused, **{name: record[name] for name in names})


def _parse(path: Path) -> dict | None:
    try:
        return parse(path.read_bytes())
    except OSError:
        return None
