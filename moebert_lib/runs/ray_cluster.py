"""Run planned notebooks on a Ray cluster: a task for each run, with its own cores and GPU.

Every node needs this library in the driver's version, the same data and weights, and a disk on
which it sees the driver's MOEBERT_HOME. When the driver ends, Ray ends the tasks and their kernels.
"""

import logging
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from moebert_lib.config.errors import UserError, home
from moebert_lib.config.provenance import cores
from moebert_lib.runs.execution import Kernels, NotebookFailed
from moebert_lib.runs.local_pool import PASSIVE, Local
from moebert_lib.runs.plan import Job
from moebert_lib.store.store import Entry, Store

REACH = 10.0  # seconds until a head node that does not answer is given up
PATIENCE = 20.0  # seconds in which a cancelled task must have ended its kernel
#: This machine only; on Linux Ray takes 127.0.0.1 for the address that others reach it by.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


class Ray(Local):
    """Runs as tasks of a Ray cluster.

    Args:
        address: None: the cluster that RAY_ADDRESS names, else a Ray instance of this process
            alone, on all cores and GPUs here. "auto": the cluster that this machine is a node of.
            "HOST:PORT": the same, by its head node.
        workers: Tasks at the same time; by default as many as the nodes that are there now hold.
        gpus_per_run: By default 1 where the cluster has GPUs, else 0; below 1 runs share one.
        cpus_per_run: Cores reserved for a run, and its threads.

    Raises:
        UserError: ray is not installed, or there is no such cluster.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        gpus_per_run: float | None = None,
        cpus_per_run: float = 1,
    ):
        self._ray = _connect(address)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if gpus_per_run is None:
            gpus_per_run = 1 if any(node.get("GPU") for node in nodes) else 0
        self.needs = {"CPU": cpus_per_run} | ({"GPU": gpus_per_run} if gpus_per_run else {})
        room = [min(node.get(name, 0) // n for name, n in self.needs.items()) for node in nodes]
        super().__init__(workers or max(int(sum(room)), 1))

    def environment(self, slot: int) -> dict[str, str]:
        """Variables of a run's kernel; Ray itself names its GPUs."""
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(int(self.needs["CPU"]), 1))
        hidden = {} if "GPU" in self.needs else {"CUDA_VISIBLE_DEVICES": ""}
        return {"OMP_NUM_THREADS": threads, **PASSIVE, **hidden}

    def make(self, job: Job, *, slot: int, kernels: Kernels, force: bool, **how: Any) -> Entry:
        """The stored run of a job, executed on a node; a lost node counts as a run that died."""
        from ray.exceptions import RayError, RayTaskError

        options = {"num_cpus": self.needs["CPU"], "num_gpus": self.needs.get("GPU", 0)}
        task = self._ray.remote(run_on_node).options(name=job.name, max_retries=0, **options)
        runs = home() / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=runs, prefix="cluster-", suffix=".tmp") as marker:
            name = Path(marker.name).name
            digest = job.key().digest
            pending = task.remote(job, digest, home(), name, self.environment(slot), force)
            self._wait(pending, kernels)
            try:
                result = self._ray.get(pending)
            except RayTaskError as error:  # such as a library that the node does not have
                result = NotebookFailed(job.name, None, _line(error.cause or error), "not run")
            except RayError as error:
                result = NotebookFailed(job.name, None, f"lost: {_line(error)}", "died")
        if isinstance(result, NotebookFailed):
            raise result
        entry = Store().find(job.key())
        if entry is None:
            raise NotebookFailed(job.name, None, "its entry cannot be read", "not run")
        return replace(entry, reused=result)

    def _wait(self, pending: Any, kernels: Kernels) -> None:
        """Wait for a task's end; cancel it when this batch is stopped."""
        deadline = None
        while not self._ray.wait([pending], timeout=0.5)[0]:
            if kernels.stopped.is_set():
                deadline = deadline or time.monotonic() + PATIENCE
                self._ray.cancel(pending, force=time.monotonic() > deadline)


def run_on_node(
    job: Job, planned: str, home: Path, marker: str, environment: dict[str, str], force: bool
) -> NotebookFailed | bool:
    """Run a notebook on this node, if it has the planned key and sees the driver's home.

    Returns whether its stored run was reused, or why there is none.

    ``marker`` is a file in the driver's ``runs/``; a MOEBERT_HOME of this node's own goes first.
    """
    folder = Path(os.environ.get("MOEBERT_HOME") or home)
    host = socket.gethostname()
    before = dict(os.environ)  # Ray's processes serve one task after another
    os.environ |= {"MOEBERT_HOME": str(folder), **environment}
    try:
        if not (folder / "runs" / marker).is_file():
            problem = f"does not see {home}; put MOEBERT_HOME on a disk that all nodes share"
        elif job.key().digest != planned:
            problem = "has another library, data or weights than the run was planned with"
        else:
            ((_, result),) = Local(threads=None).run([job], force=force, attempts=1)
            return result.reused if isinstance(result, Entry) else result
    finally:
        os.environ.clear()
        os.environ.update(before)
    return NotebookFailed(job.name, None, f"{host} {problem}", "not run")


def _connect(address: str | None) -> Any:
    """The module ray, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed; pip install 'moebert[cluster]'") from None
    if ray.is_initialized():
        return ray
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address or "local"
    options = {}
    if address == "local":
        options = {"_node_ip_address": LOOPBACK, "num_cpus": cores(), "include_dashboard": False}
    elif address != "auto":
        _check_reachable(address)
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # of many kinds
        raise UserError(f"cannot join the Ray cluster '{address}': {_line(error)}") from error
    return ray


def _check_reachable(address: str) -> None:
    """Refuse an address at which nothing answers, for which Ray would wait a long time."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster at '{address}' ({error}); expected auto, or HOST:PORT of a head node"
        ) from error


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
