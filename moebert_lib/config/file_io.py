"""File-system helpers: locks, temporary folders, atomic writes, readable I/O errors, YAML."""

import errno
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Event
from typing import Any

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from moebert_lib.config.errors import UserError
from moebert_lib.config.provenance import to_json

WORK = re.compile(r"(.+-[0-9a-f]{16})-[0-9a-f]{8}")  # a folder in tmp/, and its entry
FULL = {errno.ENOSPC, errno.EDQUOT}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
DAY = 86_400  # seconds
POLL = 0.1  # seconds between two looks at a lock that another process has
HOST = re.sub(r"\W", "_", socket.gethostname())
TEMPORARY = re.compile(r".+\.(\w+)-(\d+)\.tmp")  # host and process of an unfinished file


class Cancelled(UserError):
    """A wait for a lock was cancelled."""


class Unwritable(UserError):
    """The store's disk is full, or its folder must not be written."""


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk below ``root`` into one clear line; others pass.

    Raises:
        Unwritable: from an error about a file below ``root``, or of a full disk about none.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _unwritable(error, root)
        if not reason:
            raise
        raise Unwritable(f"{root} cannot be written: {reason}") from error


def try_lock(root: Path, name: str) -> AbstractContextManager | None:
    """The lock of an entry, held until its context ends; None where another has it."""
    path = _lock_file(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        return None


def lock(root: Path, name: str, cancelled: Event | None = None) -> AbstractContextManager:
    """The lock of an entry, waited for until ``cancelled`` is set.

    Raises:
        Cancelled: it was set while another process had the lock.
    """
    held = try_lock(root, name)
    if held is None:
        print(f"· waiting for another process that is making {name}", flush=True)
    cancelled = cancelled or Event()
    while held is None:
        if cancelled.wait(POLL):
            raise Cancelled(f"stopped while another process was making {name}")
        held = try_lock(root, name)
    return held


def is_locked(root: Path, name: str) -> bool:
    """Whether a process has the lock now; does not create a lock file."""
    if not _lock_file(root, name).exists():
        return False
    try:
        held = try_lock(root, name)
    except OSError:  # a store that is only read
        return False
    with held or nullcontext():
        return held is None


def scratch(folder: Path) -> Path:
    """A new temporary folder for the entry ``folder``: ``tmp/<name>-<8 hex>`` beside it."""
    place = folder.parent / "tmp" / f"{folder.name}-{secrets.token_hex(4)}"
    place.mkdir(parents=True)
    return place


def sweep(folder: Path) -> None:
    """Remove older work folders of an entry. Its lock must be held."""
    for left in (folder.parent / "tmp").glob(f"{folder.name}*"):
        shutil.rmtree(left, ignore_errors=True)


def tidy(root: Path) -> int:
    """Remove work folders and temporary files of killed processes; returns how many.

    Lock files stay. They are empty and nobody holds them, but to delete one is safe only
    where who waits for it notices. filelock 4 looks whether the file that it has locked still
    has a name; older ones do not look, and on NFS a deleted file that is open keeps a name.
    """
    n_removed = 0
    with suppress(OSError):  # a store that is only read
        for path in (root / "tmp").glob("*"):
            work = WORK.fullmatch(path.name)
            held = try_lock(root, work[1]) if work else None
            if held is not None:
                with held:
                    shutil.rmtree(path, ignore_errors=True)
                n_removed += not path.exists()
        below = ("*.tmp", "sweeps/*/*.tmp", "failed/*.tmp")
        for path in [path for pattern in below for path in root.glob(pattern)]:
            if _abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                n_removed += 1
    return n_removed


def read_json(path: Path, types: Mapping[str, type]) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none with names of these types, and a line
    on stderr where the file is there."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if all(isinstance(found[name], kind) for name, kind in types.items()):
            return found
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        pass
    print(f"moebert: {path} is not whole, and is passed over", file=sys.stderr)
    return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: whole or not at all."""
    write_bytes(path, (to_json(value, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; the file or folder made there then takes the place of ``path``.

    Where the block raises, ``path`` stays as it was and nothing is left beside it.
    """
    temporary = unfinished(path)
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()
        raise


def unfinished(path: Path) -> Path:
    """A name beside ``path`` for this process to write to; :func:`tidy` removes what is left."""
    return path.with_name(f"{path.name}.{HOST}-{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock_file(root: Path, name: str) -> Path:
    return root / "locks" / f"{name}.lock"


def _unwritable(error: Exception, root: Path) -> str:
    """What an error says about writing below ``root``, "" where it is about something else."""
    if isinstance(error, OSError):
        number, place = error.errno, error.filename
    else:  # safetensors' error has the words only
        full = os.strerror(errno.ENOSPC) in str(error)
        number, place = errno.ENOSPC if full else None, None
    named = isinstance(place, str | Path)
    path = Path(place).absolute() if named else root
    near = path.is_relative_to(root) or (root.is_relative_to(path) and not os.path.exists(path))
    if number in FULL and near:
        return f"{os.strerror(number).lower()}; make room, finished runs are kept"
    if number in FORBIDDEN and near and named:
        return f"{os.strerror(number).lower()}; MOEBERT_HOME names another place"
    return ""


def _abandoned(path: Path) -> bool:
    """Whether nobody will finish a file: its process here ended, or it is older than a day."""
    owner = TEMPORARY.fullmatch(path.name)
    ended = owner and owner[1] == HOST and not psutil.pid_exists(int(owner[2]))
    return bool(ended) or time.time() - path.stat().st_mtime > DAY


# YAML as people write it by hand: plain values only, and no name twice.


def parse(text: str, where: str) -> Any:
    """The values of a YAML text; tags that would build objects are refused.

    Args:
        text: YAML.
        where: What to call it in an error.

    Raises:
        UserError: not YAML, or a mapping names something twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few of them can stand for billions of values
                raise UserError(f"{where}: aliases (*name) are not read; write the value again")
            return super().compose_node(parent, index)

    def mapping(loader: Loader, node: Any) -> dict:
        names = [loader.construct_object(name, deep=True) for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{where}: '{name}' is given twice; keep one")
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{where}: not YAML: {problem}") from None
