"""Run planned notebooks on this machine, several at a time; reuse what is stored."""

import copy
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from moebert_lib.config.errors import UserError, home
from moebert_lib.config.file_io import Unwritable
from moebert_lib.config.provenance import cores, versions
from moebert_lib.runs import cost, execution
from moebert_lib.runs.execution import WARNING, ChangedLibrary, Kernels, NotebookFailed
from moebert_lib.runs.plan import Job, asked, describe
from moebert_lib.store import run_outputs
from moebert_lib.store.store import Entry, Store

#: The result of a run: its entry, its failure, or an error that ends the whole batch.
Result = Entry | NotebookFailed | UserError
#: What happens to a run: it starts (None), prints a line of progress, or ends with a result.
Event = None | str | Result

#: Threads that wait in a busy loop would slow down the other runs.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
KERNEL_BYTES = 1 << 30  # memory of Python, libraries and data in one kernel, without models
QUIET = 30  # seconds between two progress lines where several notebooks run together


class Local:
    """Runs on this machine, each in a separate kernel process, and with a GPU if there are any.

    Args:
        workers: Runs at the same time.
        threads: Threads of each run, unless OMP_NUM_THREADS is set; None: as many as torch
            chooses. The last digits of a result depend on it, so a sweep leaves it at 1.
        gpus: Names of GPUs as in CUDA_VISIBLE_DEVICES; two runs never share one.
    """

    def __init__(self, workers: int = 1, *, threads: int | None = 1, gpus: Sequence[str] = ()):
        if workers < 1:
            raise UserError(f"{workers} workers: expected at least 1")
        if gpus and workers > len(gpus):
            raise UserError(
                f"{workers} workers: each run has a GPU to itself, and here are {len(gpus)}"
            )
        self.workers, self.threads, self.gpus = workers, threads, tuple(gpus)

    def run(
        self, jobs: Sequence[Job], *, force: bool = False, attempts: int = 2
    ) -> Iterator[tuple[int, Event]]:
        """A job's number and what happened: ``None`` when it starts, lines of progress, its result.

        Every job that starts has one result, whatever is raised. Closing the iterator stops what
        runs and waits until its processes are gone.

        Args:
            jobs: What to run.
            force: Execute even what is stored.
            attempts: How often a run is tried whose process dies.
        """
        execution.load_papermill()
        kernels, queue, since = Kernels(), _Queue(jobs), time.time()
        events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.workers):
            slots.put(slot)

        def run_next() -> None:
            index = queue.take()
            events.put((index, None))

            def say(line: str) -> None:
                events.put((index, line))

            slot = slots.get()
            make = partial(self.make, jobs[index], slot=slot, since=since, force=force)
            result = _attempt(jobs[index], make, attempts, say=say, kernels=kernels)
            slots.put(slot)
            events.put((index, result))

        pool = ThreadPoolExecutor(self.workers)
        futures = [pool.submit(run_next) for _ in jobs]
        try:
            n_left = len(jobs)
            while n_left:
                try:  # a wait without an end cannot be interrupted in a Ray task
                    index, event = events.get(timeout=0.5)
                except Empty:
                    for future in futures:
                        if future.done():
                            future.result()  # raises what a slot itself has died of
                    continue
                n_left -= isinstance(event, Result)
                yield index, event
        finally:
            for future in futures:
                future.cancel()
            kernels.kill()
            while wait(futures, timeout=0.2).not_done:
                kernels.kill()
            pool.shutdown()

    def make(self, job: Job, *, slot: int, **how: Any) -> Entry:
        """The stored run of a job: :func:`execution.make` with the slot's threads and GPU."""
        return execution.make(job, environment=self.environment(slot), **how)

    def alone(self) -> "Local":
        """The same machine for one run at a time, with all cores."""
        if self.workers == 1:
            return self
        alone = copy.copy(self)
        alone.workers, alone.threads, alone.gpus = 1, None, self.gpus[:1]
        return alone

    def environment(self, slot: int) -> dict[str, str]:
        """Variables of a run's kernel: its threads and its GPU."""
        changes = {}
        if self.threads and "OMP_NUM_THREADS" not in os.environ:
            changes["OMP_NUM_THREADS"] = str(self.threads)
        if self.workers > 1:
            changes |= PASSIVE
        if self.gpus:
            changes["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return changes


class _Queue:
    """Indices of jobs in order; those that another process is running now come last."""

    def __init__(self, jobs: Sequence[Job]):
        self._keys = [job.key() for job in jobs]
        self._left = list(range(len(jobs)))
        self._store, self._lock = Store(), Lock()

    def take(self) -> int:
        with self._lock:
            free = (index for index in self._left if not self._store.busy(self._keys[index]))
            index = next(free, self._left[0])
            self._left.remove(index)
            return index


def _attempt(
    job: Job,
    make: Callable[..., Entry],
    attempts: int,
    *,
    say: Callable[[str], Any],
    kernels: Kernels,
) -> Result:
    """The entry of a run, or its error, whatever it is; errors are returned, not raised."""
    for left in reversed(range(attempts)):
        try:
            return make(say=say, kernels=kernels)
        except NotebookFailed as failure:
            if failure.state != "died" or not left or kernels.stopped.is_set():
                return failure
            say(f"{WARNING}{failure.error}; once more")
        except (Unwritable, ChangedLibrary) as error:  # every other run would fail too
            return UserError(f"{job.name}{describe(job)}: {error}")
        except BaseException as error:  # noqa: BLE001  whatever it is, the run has a result
            expected = isinstance(error, UserError | OSError)
            text = str(error) if expected else f"{type(error).__name__}: {error}"
            state = "not run" if expected else "failed"
            return NotebookFailed(job.name, None, " ".join(text.split()), state)
    raise AssertionError("unreachable")


def fitting(jobs: Sequence[Job]) -> Local:
    """As many runs at a time as cores, free memory and GPUs allow."""
    available = gpus()
    if available:
        return Local(min(len(available), len(jobs)) or 1, gpus=available)
    return Local(max(min(cores(), _in_memory(jobs), len(jobs)), 1))


def side_by_side(jobs: Sequence[Job], workers: int | None = None) -> Local:
    """For different notebooks: two at a time, four from eight cores on.

    The cores are divided among them, since few of a notebook's steps keep all of them busy. On a
    GPU, and where there is one job, nothing is divided.

    Args:
        jobs: What is to run.
        workers: How many at a time instead.
    """
    available, n_cores = gpus(), cores()
    if available:
        used = available if workers else available[:1]
        return Local(workers or 1, threads=None, gpus=used)
    if workers is None:
        usual = 1 if n_cores < 2 else 2 if n_cores < 8 else 4
        workers = min(usual, _in_memory(jobs), len(jobs))
    threads = max(n_cores // workers, 1) if workers > 1 else None
    return Local(max(workers, 1), threads=threads)


def _in_memory(jobs: Sequence[Job]) -> int:
    """How many of the runs fit into free memory at a time."""
    runs = [run for group in cost.runs(jobs) for run in group]
    largest = max((run.cost.cpu_bytes for run in runs), default=0)
    return int(free_memory() // (KERNEL_BYTES + largest))


def gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if versions().get("torch", "").endswith("+cpu"):
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:  # CUDA ignores -1 and what follows it
        names = [name.strip() for name in chosen.split(",")]
        return [name for name in itertools.takewhile(lambda name: name != "-1", names) if name]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def free_memory() -> int:
    """Bytes of memory that new processes can use, within the limit of this control group."""
    import psutil

    group = Path("/sys/fs/cgroup")
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((group / f"memory.{of}").read_text()) for of in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or without a limit
        return free
    cache = int(counts.get("inactive_file", 0))
    return min(free, limit - used + cache)


# A batch: reuse what is stored, run what is missing, on this machine or on a cluster.


def run(
    jobs: Sequence[Job], *, keep_going: bool = False, **how: Any
) -> list[Entry | NotebookFailed]:
    """Run jobs, reusing what the store has, and copy their figures to ``runs/figures``.

    Args:
        jobs: From :func:`plan.plan`.
        keep_going: Return failures among the entries instead of raising the first one.
        how: As of :func:`completed`.

    Returns:
        For each job its entry, or why there is none.

    Raises:
        NotebookFailed: with the failing cell; the executed copy is in ``runs/failed``.
        UserError: no run can be made here, whatever the notebook: the disk is full, or the
            library has changed since these were planned.
    """
    results: dict[int, Entry | NotebookFailed] = {}
    with closing(completed(jobs, **how)) as ended:
        for index, result in ended:
            if isinstance(result, Entry):
                run_outputs.publish(result, published(jobs[index]))
            elif not keep_going:
                raise result
            results[index] = result
    return [results[index] for index in range(len(jobs))]


def published(job: Job) -> Path:
    """The folder that a job's figures are copied to."""
    if job.place:
        return home() / "runs" / "figures" / job.place
    settings = job.settings and job.settings.model_dump()
    return run_outputs.destination(settings, changed=job.chosen)


def completed(
    jobs: Sequence[Job],
    *,
    engine: Local | None = None,
    force: bool = False,
    retry_failed: bool = True,
    echo: Callable[[str], Any] = print,
) -> Iterator[tuple[int, Entry | NotebookFailed]]:
    """Number and result of each job: first what is stored, then the others as they end.

    Args:
        jobs: From :func:`plan.plan`.
        engine: Runs what is missing; by default one run at a time on this machine.
        force: Execute even what is stored.
        retry_failed: Also execute what failed before, unchanged.
        echo: Receives one line per start, end and progress line.

    Raises:
        UserError: as :func:`run`.
    """
    engine = engine or Local(threads=None)
    store, progress = Store(), _Progress(jobs, echo)
    store.tidy()
    missing = []
    for index, job in enumerate(jobs):
        result = None if force else store.find(job.key())
        if not (result or force or retry_failed):
            result = execution.failed_before(job)
        if result:
            progress.ended(index, result, before=" before")
            yield index, result
        else:
            missing.append(index)
    timed = [index for index in missing if jobs[index].timed]
    others = [index for index in missing if index not in timed]
    try:
        for where, indices in ((engine, others), (engine.alone(), timed)):
            yield from _run_missing(where, jobs, indices, progress, force=force)
    finally:
        store.tidy()


def _run_missing(
    engine: Local, jobs: Sequence[Job], indices: list[int], progress: "_Progress", *, force: bool
) -> Iterator[tuple[int, Entry | NotebookFailed]]:
    """Index and result of the jobs with these indices, as they end."""
    in_turn = _in_turn(jobs, indices, engine.workers)
    progress.workers = engine.workers
    with closing(engine.run([jobs[index] for index in in_turn], force=force)) as events:
        for number, event in events:
            index = in_turn[number]
            if event is None:
                progress.started(index)
            elif isinstance(event, str):
                progress.line(index, event)
            elif isinstance(event, UserError):
                raise event
            else:
                progress.ended(index, event)
                yield index, event


def _in_turn(jobs: Sequence[Job], missing: Sequence[int], workers: int) -> list[int]:
    """The order in which missing jobs start: different notebooks with most experiments first.

    Teachers and scores that several notebooks need are made by the first; short ones come last.
    """
    if workers == 1 or len({jobs[index].name for index in missing}) < 2:
        return list(missing)

    def n_students(index: int) -> int:
        return sum(stage == "student" for stage, _ in asked(jobs[index]))

    return sorted(missing, key=n_students, reverse=True)


class _Progress:
    """Prints the progress of a batch: a line for each start and end, and the time left."""

    def __init__(self, jobs: Sequence[Job], echo: Callable[[str], Any]):
        self.jobs, self.echo, self.workers = jobs, echo, 1
        self.durations: list[float] = []
        self.n_ended, self.last_line = 0, time.monotonic()

    def label(self, index: int) -> str:
        return f"[{index + 1}/{len(self.jobs)}] {self.jobs[index].name}"

    def started(self, index: int) -> None:
        self.echo(f"{self.label(index)} running{describe(self.jobs[index])}")

    def line(self, index: int, line: str) -> None:
        """A line of a notebook's progress; where several run together, only now and then."""
        if self.workers == 1:
            self.echo(f"    {line}")
        elif line.startswith(WARNING) or time.monotonic() - self.last_line > QUIET:
            self.last_line = time.monotonic()
            self.echo(f"    [{index + 1}] {line}")

    def ended(self, index: int, result: Entry | NotebookFailed, *, before: str = "") -> None:
        """A run has ended; ``before`` follows the state of one that failed in an earlier batch."""
        self.n_ended += 1
        label = self.label(index)
        if isinstance(result, NotebookFailed):
            cell = f"cell {result.cell}: " if result.cell else ""
            reason = f"{result.state}{before}: {cell}{result.error}"
            self.echo(f"{label}{describe(self.jobs[index])} {reason}")
        elif result.reused:
            self.echo(f"{label} reused, made in {result.seconds / 60:.1f} min")
        else:
            self.durations.append(result.seconds)
            self.echo(f"{label} done in {result.seconds / 60:.1f} min{self._remaining()}")

    def _remaining(self) -> str:
        """About how much time is left, by the mean so far, if all runs are of one notebook."""
        n_left = len(self.jobs) - self.n_ended
        alike = len({job.name for job in self.jobs}) == 1
        if not (n_left and alike and self.workers > 1):
            return ""
        mean = sum(self.durations) / len(self.durations)
        return f", about {mean * n_left / self.workers / 60:.1f} min left"
