"""One holder at a time across machines, by a small object that the holder keeps changing.

The holder creates the object where there is none and raises a counter in it every ``BEAT``
seconds. Who waits takes it over when it has not changed for ``EXPIRY`` seconds of the waiter's
own clock, so no two clocks are compared, and reads back whose it is.
Two can still hold one lease: a holder that was stopped for longer than ``EXPIRY`` and goes on,
or a waiter that was stopped for longer than ``SETTLE`` just before it took over. Then work is
done twice, never wrongly: entries are named by what decides their content and appear whole.
"""

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, Self

from fsspec import AbstractFileSystem

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
