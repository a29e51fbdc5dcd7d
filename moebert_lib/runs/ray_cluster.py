"""Run planned notebooks on a Ray cluster: a task for each run, with cores and a GPU for it alone.

Every node needs the driver's version of this library, its data and weights, and sees its home.
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
PATIENCE = 20.0  # seconds that a cancelled task has to end its kernel
#: This machine only; on Linux Ray takes 127.0.0.1 for the address that others reach it by.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


class Ray(Local):
    """Runs as tasks of a Ray cluster.

    Args:
        address: "HOST:PORT" of a cluster's head node, or "auto": the cluster of this machine.
            None: the cluster that RAY_ADDRESS names, else a new one on this machine alone.
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
        store, key = Store(), job.key()
        store.root.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=store.root, prefix="cluster-", suffix=".tmp") as file:
            marker = Path(file.name).name
            pending = task.remote(job, key.digest, home(), marker, self.environment(slot), force)
            deadline = None
            while not self._ray.wait([pending], timeout=0.5)[0]:
                if kernels.stopped.is_set():
                    deadline = deadline or time.monotonic() + PATIENCE
                    self._ray.cancel(pending, force=time.monotonic() > deadline)
            try:
                result = self._ray.get(pending)
            except RayTaskError as error:  # such as a library that the node does not have
                result = NotebookFailed(job.name, None, _line(error.cause or error), "not run")
            except RayError as error:
                result = NotebookFailed(job.name, None, f"lost: {_line(error)}", "died")
        if isinstance(result, Exception):
            raise result
        entry = store.find(key)
        if entry is None:
            raise NotebookFailed(job.name, None, "its entry cannot be read", "not run")
        return replace(entry, reused=result)


def run_on_node(
    job: Job, planned: str, home: Path, marker: str, environment: dict[str, str], force: bool
) -> bool | NotebookFailed | UserError:
    """Run a notebook on this node, if it has the planned key and sees the driver's home.

    ``marker`` is a file in the driver's ``runs/``. A MOEBERT_HOME of this node goes before it.
    Returns whether the stored run was reused, or why there is none.
    """
    before = dict(os.environ)  # Ray's processes serve one task after another
    folder = Path(before.get("MOEBERT_HOME") or home)
    os.environ |= {"MOEBERT_HOME": str(folder), **environment}
    try:
        if not (folder / "runs" / marker).is_file():
            problem = f"does not see {home}; put MOEBERT_HOME on a disk that all nodes share"
        elif job.key().digest != planned:
            problem = "has another library, data or weights than the run was planned with"
        else:
            *_, (_, result) = Local(threads=None).run([job], force=force, attempts=1)
            return result.reused if isinstance(result, Entry) else result
    finally:
        os.environ.clear()
        os.environ |= before
    return NotebookFailed(job.name, None, f"{socket.gethostname()} {problem}", "not run")


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
    if address not in ("auto", "local"):  # where nothing answers, Ray would wait a long time
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH).close()
        except (OSError, ValueError, OverflowError) as error:
            expected = "expected auto, or HOST:PORT of a head node"
            raise UserError(f"no Ray cluster at '{address}' ({error}); {expected}") from error
    options = {}
    if address == "local":
        options = {"_node_ip_address": LOOPBACK, "num_cpus": cores(), "include_dashboard": False}
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # of many kinds
        raise UserError(f"cannot join the Ray cluster '{address}': {_line(error)}") from error
    return ray


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
