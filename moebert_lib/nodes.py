"""What a task of a Ray cluster does on its node: a worker process, asked once."""

import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from moebert_lib.engines import Worker
from moebert_lib.store import MIRROR, Store, write_bytes

COPIED = 16 * 2**20  # bytes of a failed run's files that come back
IDENTITY = "cluster.id"  # a file in runs/: who reads the same content shares the folder


def serve(
    request: dict[str, Any], given: Mapping[str, str], own: Mapping[str, str], driver: str
) -> Iterator[dict[str, Any]]:
    """Make a run here.

    Args:
        request: From ``worker.request``.
        given: The driver's environment, where this node has none of its own; the mirror's
            address is the driver's in any case.
        own: The run's environment beside it.
        driver: The :func:`identity` of the driver's home.

    Yields:
        ``node`` and ``host``; then what it says, ``say``; then an outcome, with ``files`` of a
        failed run where the driver does not see this node's folder.
    """
    import ray

    host = socket.gethostname()
    yield {"node": ray.get_runtime_context().get_node_id(), "host": host}
    folder = Path(os.environ.get("MOEBERT_HOME") or given["MOEBERT_HOME"])
    seen = _read(folder) == driver
    if not seen:  # no batch tidies it
        Store(folder / "runs").tidy()
    if not seen and not given[MIRROR]:
        line = f"{host} keeps its runs in {folder / 'runs'}, which is not the folder here; "
        yield {"status": "refused", "error": line + "pass --store URL"}
        return
    environment = {**os.environ, **given, "MOEBERT_HOME": str(folder), **own}
    for item in _ask(request, environment):
        if item.get("status") == "stopped":  # here only
            item["status"] = "refused"
        if item.get("status") in ("died", "refused"):
            item["error"] = f"{host}: {item['error']}"
        if item.get("copy") and not seen:
            item["files"] = _packed(Path(item["copy"]).parent)
        yield item


def _ask(request: dict[str, Any], environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    worker, said = Worker(environment), SimpleQueue()

    def ask() -> None:
        said.put(worker.ask(request, lambda text: said.put({"say": text})))

    threading.Thread(target=ask, daemon=True).start()
    item: dict[str, Any] = {}
    try:
        while "status" not in item:
            with suppress(Empty):
                item = said.get(timeout=0.5)  # Ray's cancel does not wake a wait without end
                if "say" in item:
                    yield item
    finally:
        worker.close()
    yield item


def identity(folder: Path) -> str:
    """What tells the runs/ of this home from all others, by a file in it; made if missing."""
    if not _read(folder):
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "runs" / IDENTITY, secrets.token_hex(16).encode())
    return _read(folder)


def _read(folder: Path) -> str:
    try:
        return (folder / "runs" / IDENTITY).read_text("utf-8")
    except OSError:
        return ""


def _packed(folder: Path) -> dict[str, bytes]:
    """The content of a folder's files by name, small ones first, ``COPIED`` bytes at most."""
    files, n_bytes = {}, 0
    found = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_size):
        n_bytes += path.stat().st_size
        if n_bytes > COPIED:
            break
        files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files
