"""Stored results: one folder per run, named by its key, made once and verified when reused.

An entry is a folder ``runs/<kind>-<digest>``, whose name is the digest of everything that
decides its content. ``entry.json``, written last, has the row of results, the SHA-256 of every
other file, and where, when and with what it was made. A folder is built under ``runs/tmp`` and
renamed when it is complete, so nobody sees a half-written entry. A lock per digest lets processes
share the store, and machines too where the folder is on a file system that they all mount.
There is no database: folders merge with ``cp`` and compare with ``diff``.
"""

import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, Self

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
#: What a record must have, by name.
TYPES = {
    "kind": str,
    "digest": str,
    "key": dict,
    "row": dict,
    "seconds": int | float,
    "created": str,
    "files": dict,
}
#: Names in a key that say what a result was made with, or what was kept of it.
ORIGIN = frozenset(
    {"weights", "data", "device", "code", "versions", "inputs", "formats", "keep_model"}
)
#: Names in a key under which the key of an earlier stage stands, and the kind of that stage.
PARENTS = {
    "teacher": "teacher",
    "importance": "importance",
    "scores": "scores",
    "grouping": "grouping",
    "conversion": "converted",
}


@dataclass(frozen=True)
class StageKey:
    """What a stored result depends on.

    Attributes:
        kind: A short word such as ``student``; the first part of the entry's folder name.
        choices: What was chosen: settings as JSON values, and keys of the stages before it.
        origin: What it was made with, as JSON values: weights, data, device, code, versions.

    Raises:
        ValueError: a name of :data:`ORIGIN` among the choices, or another one in the origin.

    Example:
        >>> dense = StageKey("teacher", {"task": "rte"}, {"code": "3f"})
        >>> key = StageKey("student", {"teacher": dense, "seed": 0}, {"code": "a0"})
        >>> key.flat()
        {'teacher.task': 'rte', 'teacher.code': '3f', 'seed': 0, 'code': 'a0'}
        >>> key.difference(StageKey("student", {"teacher": dense, "seed": 1}), origin=False)
        {'seed': (0, 1)}
    """

    kind: str
    choices: Mapping[str, Any]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        misplaced = (ORIGIN & {*self.choices}) | ({*self.origin} - ORIGIN)
        if misplaced:
            raise ValueError(
                f"{min(misplaced)!r} is in the wrong part of a {self.kind} key; "
                f"the origin has only {', '.join(sorted(ORIGIN))}"
            )
        choices = {
            name: value if isinstance(value, StageKey) else _json_value(value)
            for name, value in self.choices.items()
        }
        object.__setattr__(self, "choices", choices)
        object.__setattr__(self, "origin", _json_value(self.origin))

    @classmethod
    def read(cls, kind: str, values: Mapping[str, Any]) -> Self:
        """The key in a record, as :meth:`values` wrote it."""
        choices, origin = {}, {}
        for name, value in values.items():
            if name in ORIGIN:
                origin[name] = value
            elif name in PARENTS and isinstance(value, Mapping):
                choices[name] = cls.read(PARENTS[name], value)
            else:
                choices[name] = value
        return cls(kind, choices, origin)

    def values(self, *, origin: bool = True) -> dict[str, Any]:
        """Choices and origin in one dictionary of JSON values, as a record has them.

        Args:
            origin: False for the choices alone, of earlier stages too.
        """
        choices = {
            name: value.values(origin=origin) if isinstance(value, StageKey) else value
            for name, value in self.choices.items()
        }
        return choices | dict(self.origin) if origin else choices

    def flat(self, *, origin: bool = True) -> dict[str, Any]:
        """Values by dotted name, those of earlier stages too; ``origin``: also the origin."""
        return flat(self.values(origin=origin))

    def difference(self, other: "StageKey", *, origin: bool = True) -> dict[str, tuple]:
        """Dotted names whose values differ, with both values; None where a key has no value."""
        these, others = self.flat(origin=origin), other.flat(origin=origin)
        pairs = {
            name: (these.get(name), others.get(name)) for name in dict.fromkeys([*these, *others])
        }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the whole key; it names the entry's folder."""
        return digest({"kind": self.kind, "key": self.values()})

    @functools.cached_property
    def choices_digest(self) -> str:
        """SHA-256 of the choices alone, of earlier stages too: which experiment it is."""
        return digest({"kind": self.kind, "key": self.values(origin=False)})


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by dotted name.

    Example:
        >>> flat({"seed": 1, "teacher": {"task": "rte"}})
        {'seed': 1, 'teacher.task': 'rte'}
    """
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        leaves |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return leaves


@dataclass(frozen=True)
class Entry:
    """One stored run: key, folder of files, row of results, seconds it took, whether reused."""

    key: StageKey
    folder: Path
    row: dict[str, Any]
    seconds: float
    reused: bool

    @property
    def kind(self) -> str:
        """The kind of its key."""
        return self.key.kind

    @property
    def digest(self) -> str:
        """The digest of its key."""
        return self.key.digest

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
    """The entries under one folder, ``home()/runs`` by default.

    Args:
        root: The folder.
        cancelled: When it is set, nobody waits any longer for an entry that another process is
            making: :class:`file_io.Cancelled` is raised.

    Example:
        >>> import tempfile
        >>> store, key = Store(tempfile.mkdtemp()), StageKey("sum", {"a": 1, "b": 2})
        >>> store.make(key, lambda folder: {"total": 3}).reused
        False
        >>> again = store.make(key, lambda folder: {"total": 3})
        >>> again.reused, again.row
        (True, {'total': 3})
    """

    makes = True  # what is missing is made here; committed results are only read

    def __init__(self, root: Path | str | None = None, *, cancelled: Event | None = None):
        self.root = Path(root).resolve() if root is not None else home() / "runs"
        self.cancelled = cancelled or Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def folder(self, key: StageKey) -> Path:
        """Where the entry of this key is, or would be."""
        return self.root / f"{key.kind}-{key.digest[:16]}"

    def make(self, key: StageKey, build: Callable[[Path], dict], *, force: bool = False) -> Entry:
        """The stored entry of ``key``, built first where it is missing or damaged.

        Args:
            key: Everything that decides the content.
            build: Writes its files into the folder it is given and returns the row.
                Whatever it raises passes through, and leaves no trace in the store.
            force: Build again, and replace a stored entry once that has succeeded.

        Raises:
            Unwritable: the disk is full or the folder forbidden; no half entry is left.
        """
        final = self.folder(key)
        with file_io.writing(self.root), file_io.lock(self.root, final.name, self.cancelled):
            file_io.sweep(final)
            entry, damage = self._read(final)
            if damage:
                self._set_aside(final, damage)
            if entry and not force:
                return entry
            return self._build(key, build, final)

    def find(self, key: StageKey) -> Entry | None:
        """The stored entry of ``key``; None where it is missing or damaged."""
        return self._read(self.folder(key))[0]

    def damage(self, key: StageKey) -> str:
        """What is wrong with the entry of ``key``; "" where it is whole, or not there."""
        return self._read(self.folder(key))[1]

    def busy(self, key: StageKey) -> bool:
        """Whether a process is making the entry of ``key`` now."""
        return file_io.is_locked(self.root, self.folder(key).name)

    def tidy(self) -> int:
        """Remove what killed processes left in this folder; returns how many things."""
        return file_io.tidy(self.root)

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All complete entries (of one kind), oldest first; files are not checked."""
        read = [(_parsed_file(path), path.parent) for path in self.root.glob(f"*/{RECORD}")]
        kept = [(record, folder) for record, folder in read if record]
        kept.sort(key=lambda pair: (pair[0]["created"], pair[1].name))
        return [entry_of(*pair) for pair in kept if kind in (None, pair[0]["kind"])]

    def _read(self, folder: Path) -> tuple[Entry | None, str]:
        """The entry, or why it cannot be used ("" where there is none)."""
        if not folder.is_dir():
            return None, ""
        record = _parsed_file(folder / RECORD)
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
        return entry_of(record, folder), ""

    def _set_aside(self, folder: Path, damage: str) -> None:
        aside = self.root / "damaged" / f"{folder.name}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        os.rename(folder, aside)
        print(f"moebert: {folder.name}: {damage}; moved to {aside} and made again", file=sys.stderr)

    def _build(self, key: StageKey, build: Callable[[Path], dict], final: Path) -> Entry:
        tmp = file_io.scratch(final)
        start = time.perf_counter()
        try:
            row = build(tmp)
            record = write_record(tmp, key, row, time.perf_counter() - start)
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
        return entry_of(record, final, reused=False)


def output_dir() -> Path:
    """Where figures and tables go: the running batch's folder, else the interactive one."""
    chosen = os.environ.get("MOEBERT_FIGURES")
    folder = Path(chosen) if chosen else home() / "runs" / "interactive" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_record(
    folder: Path, key: StageKey, row: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Write the record of a folder's files, and of what made them; return it."""
    record = {
        "kind": key.kind,
        "digest": key.digest,
        "key": key.values(),
        "row": row,
        "seconds": round(seconds, 3),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "files": checksums(folder),
    }
    record = sealed(_json_value(record))
    write_json(folder / RECORD, record)
    return record


def entry_of(record: Mapping[str, Any], folder: Path, *, reused: bool = True) -> Entry:
    """The entry that a record describes."""
    key = StageKey.read(record["kind"], record["key"])
    return Entry(key, folder, record["row"], record["seconds"], reused)


def parse(content: bytes) -> dict[str, Any] | None:
    """The record in the bytes of an ``entry.json``; None: not whole, or altered since."""
    try:
        record = json.loads(content)
        has_all = isinstance(record, dict) and all(
            isinstance(record.get(name), kind) for name, kind in TYPES.items()
        )
        return record if has_all and record == sealed(record) else None
    except (ValueError, RecursionError):  # also half a character, which no file can hold
        return None


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record of JSON values with the digest of everything else in it."""
    rest = {name: value for name, value in record.items() if name != SEAL}
    return {**rest, SEAL: digest(rest)}


def _parsed_file(path: Path) -> dict | None:
    try:
        return parse(path.read_bytes())
    except OSError:
        return None


def _json_value(value: Any) -> Any:
    """A value as it comes back from JSON: tuples are lists, numpy's numbers plain ones."""
    return json.loads(to_json(value, sort_keys=False))
