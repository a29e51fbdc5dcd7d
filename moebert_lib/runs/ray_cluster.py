"""Where runs are made: on the nodes of a Ray cluster, each a task with its own cores and GPU.

A task starts a ``worker`` process on its node and streams what it says to the driver. It is
never run again by Ray itself: what died is asked for anew here, elsewhere if it can be, up to
``RETRIES`` times. When the driver goes, Ray ends its tasks, and with them their workers and
kernels.

Every node needs this library in the driver's version, the same data and weights, and a file
system that shows it the driver's ``MOEBERT_HOME``.
"""

import logging
import math
import os
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from moebert_lib.config.errors import UserError, home
from moebert_lib.config.file_io import write_bytes
from moebert_lib.config.provenance import cores
from moebert_lib.runs.execution import kept
from moebert_lib.runs.local_pool import PASSIVE, PATIENCE, RETRIES, Event, Worker
from moebert_lib.runs.plan import Job

REACH = 10.0  # seconds until a head node that does not answer is given up
OBJECTS = 2**27  # bytes of a local instance's object store; what it holds are lines of text
#: This machine only; on Linux Ray takes 127.0.0.1 for the address that others reach it by.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


class Ray:
    """Runs as tasks of a Ray cluster; an :class:`engines.Engine`.

    Args:
        address: None: the cluster that the variable ``RAY_ADDRESS`` names, else a Ray instance
            of this process's own, on all cores and GPUs here, which ends with it. "auto": the
            cluster that this machine is a node of. "HOST:PORT": the same, by its head node.
        gpus_per_run: By default 1 where the cluster has GPUs, else 0; below 1 runs share one.
        cpus_per_run: Cores kept for a run, and its threads.

    Raises:
        UserError: ray is not installed, or there is no such cluster.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        gpus_per_run: float | None = None,
        cpus_per_run: float = 1,
    ):
        _check(gpus_per_run, cpus_per_run)
        named = os.environ.get("RAY_ADDRESS") if address in (None, "auto") else None
        where = named or address or "local"
        self._ray = _package(where)
        self._joined = not self._ray.is_initialized()
        if self._joined:
            _connect(self._ray, where)
        elif address:
            raise UserError(f"this process is connected to Ray already; leave out '{address}'")
        some = 1 if self._ray.cluster_resources().get("GPU") else 0
        self.gpus = some if gpus_per_run is None else gpus_per_run
        self.cpus = cpus_per_run

    @property
    def workers(self) -> int:
        """How many runs the cluster's nodes hold now, at least 1."""
        return max(self._room(), 1)

    def run(self, requests: Sequence[dict], *, busy: Callable[[int], bool]) -> Iterator[Event]:
        """Events of all requests, as :class:`engines.Engine` says."""
        order = sorted(range(len(requests)), key=busy)
        tasks: dict[Any, _Task] = {}  # by their streams
        try:
            if order and not self._room():
                yield Event(order[0], line=f"· waiting for a node with {self._needs()}")
            for index in order:
                self._submit(_Task(index, requests[index]), tasks)
            while tasks:
                (stream,), _ = self._ray.wait(list(tasks), num_returns=1)
                yield from self._events(stream, tasks)
        finally:
            self._stop(list(tasks))

    def close(self) -> None:
        """Leave the cluster; it ends if it was started here. At exit this happens by itself."""
        if self._joined:
            self._ray.shutdown()

    def _room(self) -> int:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        needs = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return sum(min(int(node.get(name, 0) / n) for name, n in needs.items()) for node in nodes)

    def _needs(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.cpus:g} CPUs{gpus}"

    def _submit(self, task: "_Task", tasks: "dict[Any, _Task]") -> None:
        from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

        options: dict[str, Any] = {
            "name": task.request["name"],
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "num_returns": "streaming",
            "max_retries": 0,
        }
        if task.left_behind:
            soft = {"ray.io/node-id": NotIn(*task.left_behind)}
            options["scheduling_strategy"] = NodeLabelSchedulingStrategy({}, soft=soft)
        given = {"MOEBERT_HOME": str(home())}
        threads = os.environ.get("OMP_NUM_THREADS") or max(math.floor(self.cpus), 1)
        own = {"OMP_NUM_THREADS": str(threads), **PASSIVE}
        own |= {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        remote = self._ray.remote(serve).options(**options)
        tasks[remote.remote(task.request, given, own, identity(home()))] = task

    def _events(self, stream: Any, tasks: "dict[Any, _Task]") -> Iterator[Event]:
        """What the next item of a stream means."""
        task = tasks[stream]
        item = self._next(stream, task.host)
        if "node" in item:
            task.node, task.host = item["node"], item["host"]
            if not task.started:
                yield Event(task.index, started=True)
            task.started = True
        elif "say" in item:
            yield Event(task.index, line=item["say"])
        elif item["status"] == "died" and len(task.left_behind) < RETRIES:
            del tasks[stream]
            task.left_behind.append(task.node)
            yield Event(task.index, line=f"· {item['error']}; once more")
            self._submit(task, tasks)
        else:
            del tasks[stream]
            _receive(task.request, item)
            yield Event(task.index, outcome=item)

    def _next(self, stream: Any, host: str) -> dict[str, Any]:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._ray.get(next(stream))
        except RayTaskError as error:  # ours, such as a library that the node does not have
            return {"status": "refused", "error": f"{host}: {_line(error.cause or error)}"}
        except (RayError, StopIteration) as error:
            return {"status": "died", "error": f"{host}: {_why(error)}"}

    def _stop(self, streams: list) -> None:
        """End tasks that run or wait, and wait until their processes are gone."""
        if not streams or not self._ray.is_initialized():
            return
        for stream in streams:
            self._ray.cancel(stream)
        ends = [stream.completed() for stream in streams]
        _, left = self._ray.wait(ends, num_returns=len(ends), timeout=2 * PATIENCE)
        for stream, end in zip(streams, ends, strict=True):
            if end in left:
                self._ray.cancel(stream, force=True)


@dataclass
class _Task:
    """A request, and where it is made."""

    index: int
    request: dict[str, Any]
    started: bool = False
    node: str = "none"
    host: str = "a node"
    left_behind: list[str] = field(default_factory=list)  # nodes on which it died


def _package(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address != "local":  # else a port that is not Ray's is asked for a quarter of an hour
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed; pip install 'moebert[cluster]'") from None
    return ray


def _check(gpus: float | None, cpus: float) -> None:
    if not cpus > 0:
        raise UserError(f"{cpus:g} CPUs for a run: expected more than 0")
    if gpus is not None and (gpus < 0 or (gpus > 1 and gpus % 1)):
        raise UserError(f"{gpus:g} GPUs for a run: expected a part of one, or a whole number")


def _connect(ray: Any, address: str) -> None:
    if address == "local":
        own = {
            "_node_ip_address": LOOPBACK,
            "num_cpus": cores(),
            "include_dashboard": False,
            "object_store_memory": OBJECTS,
        }
    else:
        own = {}
        _reach(address)
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **own)
    except Exception as error:  # of many kinds
        there = {"local": "Ray does not start here", "auto": "no Ray cluster has this machine"}
        what = there.get(address, f"Ray cluster {address} cannot be joined")
        raise UserError(f"{what}: {_line(error)}") from error


def _reach(address: str) -> None:
    """Refuse what is no address, and a head node that does not answer."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise UserError(
            f"Ray cluster '{address}': expected auto or HOST:PORT, from a machine "
            "that `ray start --address=HOST:PORT` made a node"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"Ray cluster {address} cannot be reached: {error}") from error


def _receive(request: dict[str, Any], outcome: dict[str, Any]) -> None:
    """Keep a failed run's files here as ``worker`` keeps its own, and drop those of older ones."""
    about = (request[name] for name in ("name", "source", "given", "parameters"))
    job = Job(*about, settings=None, origin=request["origin"])
    files, folder = outcome.pop("files", None), kept(job)
    if outcome["status"] in ("done", "reused") or files:
        shutil.rmtree(folder, ignore_errors=True)
    if files:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        copy = folder / "notebook.ipynb"
        outcome["copy"] = str(copy) if copy.is_file() else None


def _why(error: Exception) -> str:
    from ray import exceptions

    known = {
        exceptions.NodeDiedError: "the node died",
        exceptions.WorkerCrashedError: "the Ray worker died",
        exceptions.OutOfMemoryError: "the node's memory was full",
        exceptions.ObjectLostError: "the node died with the result",
        StopIteration: "the task ended early",
    }
    return next((why for kind, why in known.items() if isinstance(error, kind)), _line(error))


def _line(error: BaseException) -> str:
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


# What a task of a Ray cluster does on its node: a worker process, asked once.

COPIED = 16 * 2**20  # bytes of a failed run's files that come back
IDENTITY = "cluster.id"  # a file in runs/: who reads the same content shares the folder


def serve(
    request: dict[str, Any], given: Mapping[str, str], own: Mapping[str, str], driver: str
) -> Iterator[dict[str, Any]]:
    """Make a run here.

    Args:
        request: From ``worker.request``.
        given: The driver's environment, where this node has none of its own.
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
    if not seen:
        line = f"{host} keeps its runs in {folder / 'runs'}, which is not the folder here; "
        yield {"status": "refused", "error": line + "put MOEBERT_HOME on a disk that all nodes see"}
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
