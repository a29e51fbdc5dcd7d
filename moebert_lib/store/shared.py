"""A mirror of the store that many machines share: one object for each entry.

An entry is the object ``<url>/<kind>-<digest16>.zip``, at any address that fsspec knows. It
is seen whole or not at all: object stores show an upload when it is complete, elsewhere it
is written under ``tmp/`` and renamed. What is read is not trusted: the members must be the
files that ``entry.json`` names, as plain files below the folder, uncompressed (so that
nothing unpacks to more than was fetched), with the right SHA-256, and no pickles. That finds
damage and tricks, not lies: who may write to the mirror can publish wrong numbers.
"""

import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Self

from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.core import url_to_fs

from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.file_io import DAY, FORBIDDEN, FULL, scratch
from moebert_lib.config.provenance import digest, file_digest

RECORD, SEAL = "entry.json", "seal"
RECORD_BYTES = 2**26  # more than any row needs
NAME = re.compile(r"[\w-]+-[0-9a-f]{16}")
TYPES = {
    "kind": str,
    "digest": str,
    "key": dict,
    "row": dict,
    "seconds": int | float,
    "created": str,
    "files": dict,
}
PICKLES = {".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".joblib"}
#: File systems where an upload appears when it is complete.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"}


class Unreachable(UserError):
    """The file system of a shared store failed; another time it may not."""


class Refused(Exception):
    """Why an object of the mirror is not used."""


class Shared:
    """The entries at one address: ``file:///…``, a whole path, ``s3://…``, ``gs://…``, ….

    Raises:
        UserError: an address of unknown kind, a missing package, or (every method) a store
            that cannot be reached, read or written.

    Example:
        >>> Shared("memory://mirror").has("sum-0123456789abcdef")
        False
    """

    def __init__(self, url: str):
        self.url = re.sub(r"//[^/@]*@", "//", url)  # as shown: without a password
        _check_address(url, self.url)
        with self._reaching("reached"):
            self.fs, root = url_to_fs(os.path.expanduser(url))
        self.root = root.rstrip("/")
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else self.fs.protocol
        self._objects = not OBJECT_STORES.isdisjoint(protocols)

    def has(self, name: str) -> bool:
        """Whether the mirror holds an object for the entry ``name``; it is not read."""
        with self._reaching("reached"):
            self.fs.invalidate_cache()
            try:
                self.fs.info(self._object(name))
            except FileNotFoundError:
                return False
        return True

    def names(self) -> list[str]:
        """The names of all entries, sorted."""
        with self._reaching("read"):
            self.fs.invalidate_cache()
            try:
                paths = self.fs.ls(self.root or "/", detail=False)
            except FileNotFoundError:
                return []
        names = [PurePosixPath(path) for path in paths]
        return sorted(p.stem for p in names if p.suffix == ".zip" and NAME.fullmatch(p.stem))

    def fetch(self, name: str, folder: Path) -> bool:
        """Unpack an entry into an empty folder; False where there is none that can be used.

        One that cannot is named on stderr and moved to ``damaged/``; the folder stays empty.
        """
        with tempfile.NamedTemporaryFile(dir=folder) as packed:
            with self._reaching("read"):
                try:
                    self.fs.get_file(self._object(name), packed.name)
                except FileNotFoundError:
                    return False
            try:
                _unpack(Path(packed.name), folder, name)
                return True
            except Refused as error:
                damage = str(error)
        shutil.rmtree(folder)
        folder.mkdir()
        self._set_aside(name, damage)
        return False

    def push(self, folder: Path) -> None:
        """Publish the complete entry in ``folder``, in place of one of the same name.

        The zip is packed in a folder of its own beside it, ``tmp/<name>-<8 hex>``.
        """
        record = parse((folder / RECORD).read_bytes())
        if record is None:
            raise UserError(f"{folder} is no complete entry: {RECORD} cannot be read")
        _refuse_pickles(record, UserError)
        place = scratch(folder)
        try:
            with zipfile.ZipFile(place / "zip", "w", strict_timestamps=False) as file:
                for name in (RECORD, *record["files"]):
                    file.write(folder / name, name)
            with self._reaching("written"):
                self._publish(place / "zip", self._object(folder.name))
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def leased(self, name: str) -> bool:
        """Whether a machine holds ``name``, or held it when it died."""
        with self._reaching("reached"):
            self.fs.invalidate_cache()
            return self.fs.exists(f"{self.root}/leases/{name}.json")

    @contextmanager
    def lease(self, name: str) -> Iterator[None]:
        """Hold ``name`` against all other machines while the block runs (``leases``)."""
        with self._reaching("written"):
            lease = Lease(self.fs, f"{self._folder('leases')}/{name}.json")
            lease.acquire(create=self._objects)
        with lease:
            yield

    def _object(self, name: str) -> str:
        return f"{self.root}/{name}.zip"

    def _folder(self, name: str) -> str:
        path = f"{self.root}/{name}"
        if not self._objects:
            self.fs.makedirs(path, exist_ok=True)
        return path

    def _publish(self, packed: Path, path: str) -> None:
        if self._objects:
            self.fs.put_file(str(packed), path)
            return
        self._tidy(self._folder("tmp"))
        temporary = f"{self.root}/tmp/{path.rsplit('/', 1)[1]}.{secrets.token_hex(4)}"
        try:
            self.fs.put_file(str(packed), temporary)
            self.fs.mv(temporary, path)
        except BaseException:
            with suppress(Exception):
                self.fs.rm_file(temporary)
            raise

    def _tidy(self, folder: str) -> None:
        """Remove what pushes that were killed left, where the file system dates its files."""
        with suppress(Exception):
            for path in self.fs.ls(folder, detail=False):
                if time.time() - self.fs.modified(path).timestamp() > DAY:
                    self.fs.rm_file(path)

    def _set_aside(self, name: str, damage: str) -> None:
        with self._reaching("written"):
            aside = f"{self._folder('damaged')}/{name}-{time.time_ns()}.zip"
            with suppress(FileNotFoundError):  # another machine did
                self.fs.mv(self._object(name), aside)
        line = f"{self.url}/{name}.zip: {damage}; moved to damaged/ there and made again"
        print(f"moebert: {line}", file=sys.stderr)

    @contextmanager
    def _reaching(self, verb: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each file system has its own
            if verb == "read" and getattr(error, "errno", None) in FULL:
                raise OSError(error.errno, error.strerror) from error  # the disk here, not there
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Unreachable(f"shared store {self.url} cannot be {verb}: {reason}") from error


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


def _check_address(url: str, shown: str) -> None:
    protocol, separator, path = url.partition("://")
    if not separator or protocol in ("file", "local"):
        path = os.path.expanduser(path if separator else url)
        if not os.path.isabs(path):
            whole = os.path.abspath(path)
            raise UserError(f"shared store '{shown}': expected a whole path, as '{whole}'")
        protocol = "file"
    try:
        get_filesystem_class(protocol)
    except ImportError as error:  # says which package to install
        raise UserError(f"shared store '{shown}': {error}") from None
    except ValueError:
        known = nearest(protocol, ["file", "s3", "gs", "abfs", "sftp", "memory"])
        raise UserError(
            f"shared store '{shown}': no installed package knows '{protocol}://'; {known}, or "
            "install the fsspec package that brings it"
        ) from None


def _unpack(packed: Path, folder: Path, name: str) -> None:
    try:
        with zipfile.ZipFile(packed) as file:
            record = _checked(file, packed.stat().st_size, name)
            for member in file.infolist():
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(member) as source, target.open("xb") as to:
                    shutil.copyfileobj(source, to)
    except Refused:
        raise
    except Exception as error:  # zipfile raises many kinds on bytes that are no zip
        if getattr(error, "errno", None) in FULL | FORBIDDEN:
            raise  # the disk here
        raise Refused(f"no whole zip ({error or type(error).__name__})") from error
    for path, expected in record["files"].items():
        if file_digest(folder / path) != expected:
            raise Refused(f"{path} has changed")


def _checked(file: zipfile.ZipFile, size: int, name: str) -> dict[str, Any]:
    """The record of a zip of ``size`` bytes that holds what it should, and nothing else."""
    members = {member.filename: member for member in file.infolist()}
    if len(members) < len(file.infolist()):
        raise Refused("a member comes twice")
    for path, member in members.items():
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            raise Refused(f"{path!r} is no plain file")
        if member.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"{path!r} is compressed")
    if sum(member.file_size for member in members.values()) > size:
        raise Refused(f"its members claim more than its {size} bytes")
    if RECORD not in members or members[RECORD].file_size > RECORD_BYTES:
        raise Refused(f"{RECORD} is missing or too large")
    record = parse(file.read(RECORD))
    if record is None:
        raise Refused(f"{RECORD} is unreadable")
    full = digest({"kind": record["kind"], "key": record["key"]})
    if full != record["digest"] or name != f"{record['kind']}-{full[:16]}":
        raise Refused(f"it is the entry of another key, {record['kind']!r} {full[:16]}")
    for path in record["files"]:
        _refuse_path(path)
    unlike = {RECORD, *record["files"]} ^ members.keys()
    if unlike:
        raise Refused(f"{min(unlike)!r} is in only one of {RECORD} and the zip")
    _refuse_pickles(record, Refused)
    return record


def _refuse_path(path: str) -> None:
    plain = PurePosixPath(path)
    outside = plain.is_absolute() or ".." in plain.parts or set("\\:\0") & set(path)
    if outside or plain.as_posix() != path or path in (".", RECORD):
        raise Refused(f"{path!r} is no name of a file below the entry's folder")


def _refuse_pickles(record: dict[str, Any], error: type[Exception]) -> None:
    for path in record["files"]:
        if PurePosixPath(path).suffix.lower() in PICKLES:
            raise error(f"{path!r} is a pickle, which runs as a program; keep safetensors")


# One holder at a time across machines, by a small object that the holder keeps changing.
# The holder creates the object where there is none and raises a counter in it every ``BEAT``
# seconds. Who waits takes it over when it has not changed for ``EXPIRY`` seconds of the waiter's
# own clock, so no two clocks are compared, and reads back whose it is.
# Two can still hold one lease: a holder that was stopped for longer than ``EXPIRY`` and goes on,
# or a waiter that was stopped for longer than ``SETTLE`` just before it took over. Then work is
# done twice, never wrongly: entries are named by what decides their content and appear whole.

BEAT = 10.0  # seconds between a holder's signs of life
EXPIRY = 60.0  # seconds without one until its lease is taken over
FIRST, POLL = 0.2, 5.0  # seconds between looks: at first, and at most
SETTLE = 2.0  # seconds from taking over to reading back


class Lease:
    """The lease at ``path``; a context that beats while it is held and releases it after.

    Errors of the file system pass through :meth:`acquire`. While the lease is held they
    are left to the next beat, and a lease that could not be released expires.
    """

    def __init__(self, fs: AbstractFileSystem, path: str):
        self.fs, self.path = fs, path
        self.token, self.beats = secrets.token_hex(8), 0

    def acquire(self, *, create: bool) -> None:
        """Wait until it is ours.

        Args:
            create: Ask ``pipe_file`` for an exclusive write, as object stores have it. Else
                the mode "x" of ``open``, which disks have: their ``pipe_file`` looks first and
                then writes. A store that has neither overwrites, and the last one holds it.
        """
        seen, since, pause = None, time.monotonic(), FIRST
        while True:
            found = self._read()
            if found is None and self._create(create):
                return
            if found is None or found != seen:
                seen, since = found, time.monotonic()
            elif time.monotonic() - since > EXPIRY and self._take():
                return
            if pause == FIRST:
                name = PurePosixPath(self.path).stem
                print(f"· waiting for another machine that is making {name}", flush=True)
            time.sleep(pause)
            pause = min(1.5 * pause, POLL)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stop.set()
        self._thread.join(BEAT)
        with suppress(Exception):
            if self._mine():
                self.fs.rm_file(self.path)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(Exception):
                if not self._mine():
                    return
                self.beats += 1
                self._write()

    def _content(self) -> bytes:
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps({**owner, "token": self.token, "beat": self.beats}).encode()

    def _read(self) -> bytes | None:
        self.fs.invalidate_cache()
        try:
            return self.fs.cat_file(self.path)
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self.fs.pipe_file(self.path, self._content())

    def _mine(self) -> bool:
        return self.token.encode() in (self._read() or b"")

    def _create(self, create: bool) -> bool:
        try:
            if create:
                self.fs.pipe_file(self.path, self._content(), mode="create")
            else:
                with self.fs.open(self.path, "xb") as file:
                    file.write(self._content())
        except FileExistsError:
            return False
        except Exception:  # S3 has no word of its own for "exists"
            if self._read():
                return self._mine()
            with suppress(Exception):  # an empty one, on a disk that is full
                self.fs.rm_file(self.path)
            raise
        return self._mine()

    def _take(self) -> bool:
        self._write()
        time.sleep(SETTLE)
        return self._mine()
