"""Run planned notebooks on this machine, several at a time; reuse stored runs; publish figures."""

import copy
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from filelock import FileLock

from moebert_lib.config.errors import UserError, home
from moebert_lib.config.file_io import Unwritable, write_bytes, write_json
from moebert_lib.config.provenance import cores, digest, file_digest, versions
from moebert_lib.runs import cost, execution
from moebert_lib.runs.execution import WARNING, ChangedLibrary, Kernels, NotebookFailed
from moebert_lib.runs.plan import Job, asked, describe
from moebert_lib.store.committed_results import ROWS
from moebert_lib.store.store import Entry, Store

#: What becomes of a run: its entry, why there is none, or an error that ends the whole batch.
Result = Entry | NotebookFailed | UserError

#: Threads that spin while they wait starve the other runs.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
KERNEL_BYTES = 1 << 30  # Python, libraries and data of one notebook, beside its models
QUIET = 30  # seconds between two progress lines where several notebooks run together


class Local:
    """Runs on this machine, each in a kernel process of its own, with a GPU each if there are any.

    Args:
        workers: Runs at the same time.
        threads: Threads of each run, unless OMP_NUM_THREADS is set; None: as many as torch
            chooses. The last digits of a result depend on it, so a sweep leaves it at 1.
        gpus: Names of GPUs as in CUDA_VISIBLE_DEVICES; a run has one of them to itself.
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
        self,
        jobs: Sequence[Job],
        *,
        started: Callable[[int], Any] = lambda index: None,
        say: Callable[[int, str], Any] = lambda index, line: None,
        force: bool = False,
        attempts: int = 2,
    ) -> Iterator[tuple[int, Result]]:
        """Number and result of each job, in the order in which they end.

        Closing the iterator stops what runs and waits until its processes are gone.

        Args:
            jobs: What to run.
            started: Called with a job's number when it starts, in the caller's thread.
            say: Called with a job's number and a line of its progress, in the caller's thread.
            force: Execute even what is stored.
            attempts: How often a run is tried whose process dies.
        """
        execution.load_papermill()
        kernels, queue, since = Kernels(), _Queue(jobs), time.time()
        messages: SimpleQueue[Callable[[], Any] | tuple[int, Result]] = SimpleQueue()
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.workers):
            slots.put(slot)

        def run_next() -> None:
            slot, index = slots.get(), queue.take()
            messages.put(partial(started, index))
            make = partial(self.make, jobs[index], slot=slot, since=since, force=force)
            messages_of_job = partial(_post, messages, say, index)
            result = _attempt(jobs[index], make, attempts, say=messages_of_job, kernels=kernels)
            slots.put(slot)
            messages.put((index, result))

        pool = ThreadPoolExecutor(self.workers)
        futures = [pool.submit(run_next) for _ in jobs]
        try:
            n_left = len(jobs)
            while n_left:
                message = _next_message(messages)
                if callable(message):
                    message()
                else:
                    n_left -= 1
                    yield message
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
    """The numbers of jobs in order; those that another process is making now come last."""

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
    """What becomes of a run: its entry, or any error at all, returned and not raised."""
    for left in reversed(range(attempts)):
        try:
            return make(say=say, kernels=kernels)
        except NotebookFailed as failure:
            if failure.state != "died" or not left or kernels.stopped.is_set():
                return failure
            say(f"{WARNING}{failure.error}; once more")
        except (Unwritable, ChangedLibrary) as error:  # no other run can succeed either
            return UserError(f"{job.name}{describe(job)}: {error}")
        except (UserError, OSError) as error:
            line = " ".join(str(error).split())
            return NotebookFailed(job.name, None, line, "not run")
        except BaseException as error:  # noqa: BLE001  whatever it is, the run has a result
            line = " ".join(f"{type(error).__name__}: {error}".split())
            return NotebookFailed(job.name, None, line)
    raise AssertionError("unreachable")


def _post(messages: SimpleQueue, say: Callable[[int, str], Any], index: int, line: str) -> None:
    messages.put(partial(say, index, line))


def _next_message(messages: SimpleQueue) -> Any:
    """The next message; a wait without an end cannot be interrupted in a Ray task."""
    while True:
        try:
            return messages.get(timeout=0.5)
        except Empty:
            continue


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
    """Bytes that new processes may take here: of the machine, or of this control group."""
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


# A batch: what is stored is reused, what is missing is run, on this machine or a cluster.


def run(
    jobs: Sequence[Job], *, keep_going: bool = False, **how: Any
) -> list[Entry | NotebookFailed]:
    """Run jobs, reusing what the store has, and publish their figures.

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
    results = {}
    ended = completed(jobs, **how)
    for index, result in ended:
        if isinstance(result, NotebookFailed) and not keep_going:
            ended.close()
            raise result
        results[index] = result
    return [results[index] for index in range(len(jobs))]


def completed(
    jobs: Sequence[Job],
    *,
    engine: Local | None = None,
    force: bool = False,
    retry_failed: bool = True,
    publishing: bool = True,
    echo: Callable[[str], Any] = print,
) -> Iterator[tuple[int, Entry | NotebookFailed]]:
    """Number and result of each job: first what is stored, then the others as they end.

    Args:
        jobs: From :func:`plan.plan`.
        engine: Where what is missing is run; one run at a time on this machine by default.
        force: Execute even what is stored.
        retry_failed: Also execute what failed before, unchanged.
        publishing: Copy figures to ``runs/figures``.
        echo: Receives one line per start, end and progress line.

    Raises:
        UserError: as :func:`run`.
    """
    engine = engine or Local(threads=None)
    store, progress = Store(), _Progress(jobs, engine.workers, echo)
    store.tidy()
    missing = []
    for index, job in enumerate(jobs):
        entry = None if force else store.find(job.key())
        failure = None if entry or retry_failed or force else execution.failed_before(job)
        if entry:
            progress.reused(index, entry)
            yield index, _published(job, entry, publishing)
        elif failure:
            progress.failed(index, f"{failure.state} before: {failure}")
            yield index, failure
        else:
            missing.append(index)
    timed = [index for index in missing if jobs[index].timed]
    untimed = [index for index in missing if index not in timed]
    in_turn = _in_turn(jobs, untimed, engine.workers)
    parts = [(engine, in_turn), (engine.alone(), timed)]
    for where, numbers in parts:
        progress.workers = where.workers
        for index, result in _run_missing(where, jobs, numbers, progress, force=force):
            if isinstance(result, Entry):
                _published(jobs[index], result, publishing)
            yield index, result


def _run_missing(
    engine: Local,
    jobs: Sequence[Job],
    numbers: Sequence[int],
    progress: "_Progress",
    *,
    force: bool,
) -> Iterator[tuple[int, Entry | NotebookFailed]]:
    """Number and result of the jobs with these numbers."""
    ended = engine.run(
        [jobs[number] for number in numbers],
        started=lambda i: progress.started(numbers[i]),
        say=lambda i, line: progress.line(numbers[i], line),
        force=force,
    )
    try:
        for i, result in ended:
            if isinstance(result, UserError):
                raise result
            progress.ended(numbers[i], result)
            yield numbers[i], result
    finally:
        ended.close()
        Store().tidy()


def _in_turn(jobs: Sequence[Job], missing: Sequence[int], workers: int) -> list[int]:
    """The order in which missing jobs start: different notebooks with most experiments first.

    What several notebooks ask for is made by the first, and no long one is left for the end.
    """
    if workers == 1 or len({jobs[index].name for index in missing}) < 2:
        return list(missing)
    return sorted(missing, key=lambda index: -_students(jobs[index]))


def _students(job: Job) -> int:
    """How many models a job asks to train."""
    return sum(stage == "student" for stage, _ in asked(job))


class _Progress:
    """What a batch prints while it runs: a line for each start and end, and how much is left."""

    def __init__(self, jobs: Sequence[Job], workers: int, echo: Callable[[str], Any]):
        self.jobs, self.workers, self.echo = jobs, workers, echo
        self.durations: list[float] = []
        self.start: dict[int, float] = {}
        self.n_ended, self.last_line = 0, time.monotonic()

    def label(self, index: int) -> str:
        return f"[{index + 1}/{len(self.jobs)}] {self.jobs[index].name}"

    def started(self, index: int) -> None:
        self.start[index] = time.monotonic()
        self.echo(f"{self.label(index)} running{describe(self.jobs[index])}")

    def reused(self, index: int, entry: Entry) -> None:
        self.n_ended += 1
        self.echo(f"{self.label(index)} reused, made in {entry.seconds / 60:.1f} min")

    def failed(self, index: int, reason: str) -> None:
        self.n_ended += 1
        self.echo(f"{self.label(index)}{describe(self.jobs[index])} {reason}")

    def ended(self, index: int, result: Entry | NotebookFailed) -> None:
        if isinstance(result, NotebookFailed):
            cell = f"cell {result.cell}: " if result.cell else ""
            self.failed(index, f"{result.state}: {cell}{result.error}")
            return
        self.n_ended += 1
        self.durations.append(time.monotonic() - self.start[index])
        verb = "reused, made" if result.reused else "done"
        minutes = result.seconds / 60
        self.echo(f"{self.label(index)} {verb} in {minutes:.1f} min{self._remaining()}")

    def line(self, index: int, line: str) -> None:
        """A notebook's progress: all of it, or where several run together a line now and then."""
        if self.workers == 1:
            self.echo(f"    {line}")
        elif line.startswith(WARNING) or time.monotonic() - self.last_line > QUIET:
            self.last_line = time.monotonic()
            self.echo(f"    [{index + 1}] {line}")

    def _remaining(self) -> str:
        """The time that is left, where all runs are of one notebook, so that a mean means much."""
        n_left = len(self.jobs) - self.n_ended
        alike = len({job.name for job in self.jobs}) == 1
        if not (n_left and alike and self.workers > 1):
            return ""
        mean = sum(self.durations) / len(self.durations)
        return f", about {mean * n_left / self.workers / 60:.1f} min left"


# Figures and tables of runs, copied to runs/figures with a note of where each comes from.

PROVENANCE = "provenance.json"
LONGEST = 80  # characters of a folder's name


def published(job: Job) -> Path:
    """The folder that a job's figures are copied to."""
    if job.place:
        return home() / "runs" / "figures" / job.place
    settings = job.settings and job.settings.model_dump()
    return destination(settings, changed=job.chosen)


def destination(settings: dict[str, Any] | None, *, changed: Mapping[str, Any]) -> Path:
    """``runs/figures/`` for scale quick unchanged, else a folder in it named by what is run.

    The name is ``<scale>-<task>`` and each further value that was changed, such as
    ``quick-library-n_experts2-seed1``; a digest stands for what a name cannot hold.

    Args:
        settings: Of the notebook, None where it takes none.
        changed: Values by name that differ from the notebook's defaults, the scale left out.
    """
    figures = home() / "runs" / "figures"
    if not changed and (settings is None or settings["scale"] == "quick"):
        return figures
    head = "changed" if settings is None else f"{settings['scale']}-{settings['task']}"
    further = {name: changed[name] for name in sorted(changed) if name not in ("task", "data_dir")}
    words = [f"{name}{_word(value)}" for name, value in further.items()]
    return figures / _safe("-".join([head, *words]))


def _word(value: Any) -> str:
    """A value as text for a name: ``[1, 2]`` is ``1_2``."""
    return "_".join(map(str, value)) if isinstance(value, list) else str(value)


def _safe(name: str) -> str:
    """A name of short, plain characters; with a digest where that loses anything."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
    if plain == name and len(name) <= LONGEST:
        return name
    short = digest(name)[:8]
    return f"{plain[: LONGEST - len(short) - 1]}-{short}"


def _published(job: Job, entry: Entry, publishing: bool) -> Entry:
    if publishing:
        with FileLock(Store().root / "locks" / "figures.lock"):  # another batch may publish too
            publish(entry, published(job))
    return entry


def publish(entry: Entry, folder: Path) -> list[Path]:
    """Make ``folder`` hold exactly the run's figures, among those of other notebooks.

    Files that are there already with the same bytes are left alone; missing or changed
    ones are restored; those that an earlier run of the same notebook left are removed.
    """
    notebook, record = entry.key.choices["notebook"], entry.record()
    known = read_provenance(folder)
    made = {
        Path(name).name: sha256
        for name, sha256 in record["files"].items()
        if name.startswith("figures/")
    }
    for name, sha256 in made.items():
        _copy(entry.folder / "figures" / name, folder / name, sha256)
    kept = {name: about for name, about in known.items() if about["notebook"] != notebook}
    for name in known.keys() - kept.keys() - made.keys():
        (folder / name).unlink(missing_ok=True)
    about = _about(entry, record)
    kept |= {name: {**about, "sha256": sha256} for name, sha256 in made.items()}
    if kept != known:
        write_json(folder / PROVENANCE, kept)
    return [folder / name for name in made]


def read_provenance(folder: Path) -> dict[str, dict[str, Any]]:
    """Per file: notebook, run, settings, seeds, data, versions, commit, sha256."""
    try:
        return json.loads((folder / PROVENANCE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _about(entry: Entry, record: dict[str, Any]) -> dict[str, Any]:
    """Where a run's files come from; drawn from committed results, what any machine repeats."""
    settings = entry.key.choices.get("settings") or {}
    about = {
        "notebook": entry.key.choices["notebook"],
        "run": run_of(entry),
        "settings": settings,
        "seeds": {name: value for name, value in settings.items() if "seed" in name},
        "inputs": entry.key.origin.get("inputs", {}),
    }
    made_with = () if _drawn(entry) else ("versions", "commit", "machine")
    return about | {name: record[name] for name in made_with}


def run_of(entry: Entry) -> str:
    """The digest that names a run in a provenance file.

    It is the entry's, or that of notebook, values and results where it was drawn from results.
    """
    if not _drawn(entry):
        return entry.digest
    return digest({**entry.key.choices, "inputs": entry.key.origin["inputs"]})


def _drawn(entry: Entry) -> bool:
    return ROWS in entry.key.origin.get("inputs", {})


def _copy(source: Path, target: Path, sha256: str) -> None:
    if target.is_file() and file_digest(target) == sha256:
        return
    os.makedirs(target.parent, exist_ok=True)
    write_bytes(target, source.read_bytes())
