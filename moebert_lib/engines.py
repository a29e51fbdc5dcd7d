"""Where runs are made: on this machine, in as many processes as fit, a thread each.

An engine takes requests (``worker.request``) and yields what becomes of them as it happens.
It runs again what died, since a lost process or a full memory says nothing about the
notebook; what failed in a cell would fail again and is left.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from moebert_lib import forecast
from moebert_lib.errors import CHECKOUT, UserError
from moebert_lib.planning import Job
from moebert_lib.provenance import cores, versions

RETRIES = 2  # of a run whose process died
PATIENCE = 10.0  # seconds that a process has to leave by itself
#: Threads that spin while they wait starve the other workers.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
KERNEL_BYTES = 1 << 30  # Python, libraries and data of one notebook, beside its models


class Event(NamedTuple):
    """Of the request ``index``: it started, said a line, or ended with an outcome."""

    index: int
    started: bool = False
    line: str | None = None
    outcome: dict[str, Any] | None = None


class Engine(Protocol):
    """What ``batch.run`` needs of an engine."""

    workers: int

    def run(self, requests: Sequence[dict], *, busy: Callable[[int], bool]) -> Iterator[Event]:
        """Events of all requests. Closing the iterator stops what is running and waits for it.

        Args:
            requests: From ``worker.request``.
            busy: Whether another batch is making this request now, so that others go first.
        """


class Worker:
    """A child process that answers requests; it leaves when this process does."""

    def __init__(self, environment: Mapping[str, str]):
        library = str(CHECKOUT)
        path = os.pathsep.join(filter(None, [library, environment.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moebert_lib.worker"],
            env={**environment, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is ours to handle
        )

    def ask(self, request: dict, say: Callable[[str], Any]) -> dict[str, Any]:
        """The outcome of a request; ``died`` where the process ended before it had one."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                event = json.loads(line)
                if "outcome" in event:
                    return event["outcome"]
                say(event["say"])
        except (OSError, ValueError, LookupError):  # the pipe broke, or holds what is no event
            self.process.kill()
        status = self.process.wait()
        return {"status": "died", "error": f"the worker process died ({_signal(status)})"}

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self.process.poll() is None

    def close(self) -> None:
        """End the process, and the kernel it runs."""
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Local:
    """Runs on this machine, each in a process of its own, GPUs divided among them.

    Args:
        workers: Runs at once.
        threads: Of each run, unless OMP_NUM_THREADS says otherwise; None: what torch takes
            by itself. The last digits of a result depend on it, so a sweep leaves it at 1.
        gpus: Names of GPUs as CUDA_VISIBLE_DEVICES has them, dealt out in turn.
    """

    def __init__(self, workers: int = 1, *, threads: int | None = 1, gpus: Sequence[str] = ()):
        if workers < 1:
            raise UserError(f"{workers} workers: expected at least 1")
        if gpus and workers > len(gpus):
            raise UserError(
                f"{workers} workers: each run has a GPU to itself, and here are {len(gpus)}"
            )
        self.workers, self.threads, self.gpus = workers, threads, tuple(gpus)

    def run(self, requests: Sequence[dict], *, busy: Callable[[int], bool]) -> Iterator[Event]:
        """Events of all requests, as :class:`Engine` says."""
        batch = _Batch(requests, busy)
        slots = [
            threading.Thread(target=batch.serve, args=(self.environment(slot),), daemon=True)
            for slot in range(min(self.workers, len(requests)))
        ]
        for slot in slots:
            slot.start()
        try:
            for _ in slots:
                while (event := batch.events.get()) is not None:
                    yield event
        finally:
            batch.stop()
            for slot in slots:
                slot.join()

    def alone(self) -> "Local":
        """The same machine for one run at a time, with all cores."""
        return Local(threads=None, gpus=self.gpus[:1]) if self.workers > 1 else self

    def environment(self, slot: int) -> dict[str, str]:
        """The environment of a worker: its threads and its GPU."""
        own = dict(os.environ)
        if self.threads:
            own.setdefault("OMP_NUM_THREADS", str(self.threads))
        if self.workers > 1:
            own |= PASSIVE
        if self.gpus:
            own["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return own


class _Batch:
    """The requests of one call, shared by the slots that serve them."""

    def __init__(self, requests: Sequence[dict], busy: Callable[[int], bool]):
        self.requests, self.busy = requests, busy
        self.left = list(range(len(requests)))
        self.events: SimpleQueue[Event | None] = SimpleQueue()
        self.lock, self.stopped = threading.Lock(), False
        self.workers: set[Worker] = set()

    def serve(self, environment: Mapping[str, str]) -> None:
        """Answer requests until none is left; None is the last event."""
        worker = None
        try:
            while (index := self._take()) is not None:
                self.events.put(Event(index, started=True))
                for left in reversed(range(1 + RETRIES)):
                    try:
                        if worker is None or not worker.alive:
                            worker = self._start(environment)
                    except OSError as error:  # no memory, no more processes
                        outcome = {"status": "died", "error": f"no process can start: {error}"}
                    else:
                        if worker is None:  # stopped
                            return
                        outcome = worker.ask(self.requests[index], partial(self._say, index))
                    if outcome["status"] != "died" or not left:
                        break
                    self._say(index, f"· {outcome['error']}; once more")
                self.events.put(Event(index, outcome=outcome))
        finally:
            if worker:
                worker.close()
            self.events.put(None)

    def stop(self) -> None:
        """Take nothing more, and end what is running."""
        with self.lock:
            self.stopped, self.left = True, []
            running = list(self.workers)
        for worker in running:
            worker.close()

    def _take(self) -> int | None:
        with self.lock:
            free = (index for index in self.left if not self.busy(index))
            index = next(free, self.left[0] if self.left else None)
            if index is not None:
                self.left.remove(index)
            return index

    def _start(self, environment: Mapping[str, str]) -> Worker | None:
        with self.lock:
            if self.stopped:
                return None
            worker = Worker(environment)
            self.workers.add(worker)
            return worker

    def _say(self, index: int, line: str) -> None:
        self.events.put(Event(index, line=line))


def _signal(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def fitting(jobs: Sequence[Job]) -> Local:
    """The local engine with as many workers as cores, free memory and GPUs take."""
    found = gpus()
    if found:
        return Local(min(len(found), len(jobs)) or 1, gpus=found)
    return Local(max(min(cores(), _in_memory(jobs), len(jobs)), 1))


def side_by_side(jobs: Sequence[Job], workers: int | None = None) -> Local:
    """The local engine for different notebooks: two at a time, four from eight cores on.

    The cores are divided among them, since few of a notebook's steps keep all of them busy. On a
    GPU, and where there is one job, nothing is divided.

    Args:
        jobs: What is to run.
        workers: How many at a time instead.
    """
    found, n_cores = gpus(), cores()
    if found:
        return Local(workers or 1, threads=None, gpus=found if workers else found[:1])
    if workers is None:
        workers = min(1 if n_cores < 2 else 2 if n_cores < 8 else 4, _in_memory(jobs), len(jobs))
    each = max(n_cores // workers, 1) if workers > 1 else None
    return Local(max(workers, 1), threads=each)


def _in_memory(jobs: Sequence[Job]) -> int:
    """How many of the runs fit into free memory at a time."""
    runs = [run for group in forecast.runs(jobs) for run in group]
    each = KERNEL_BYTES + max((run.cost.cpu_bytes for run in runs), default=0)
    return int(free_memory() // each)


def gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if versions().get("torch", "").endswith("+cpu"):
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:  # -1 and what follows it are none
        names = [name.strip() for name in chosen.split(",")]
        return [name for name in itertools.takewhile(lambda name: name != "-1", names) if name]
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return said.stdout.split()


def free_memory() -> int:
    """Bytes that new processes may take here: of the machine, or of this control group."""
    import psutil

    group = Path("/sys/fs/cgroup")
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((group / f"memory.{of}").read_text()) for of in ("max", "current"))
        told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or without a limit
        return free
    return min(free, limit - used + int(told.get("inactive_file", 0)))  # that cache can go
