"""Where runs are made: on this machine, in as many processes as fit, a thread each.

An engine takes requests (``worker.request``) and yields what becomes of them as it happens.
It runs again what died, since a lost process or a full memory says nothing about the
notebook; what failed in a cell would fail again and is left.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from filelock import FileLock

from moebert_lib.config.errors import CHECKOUT, UserError, home
from moebert_lib.config.file_io import write_bytes, write_json
from moebert_lib.config.provenance import cores, digest, file_digest, versions
from moebert_lib.runs import cost, execution
from moebert_lib.runs.execution import WARNING, NotebookFailed
from moebert_lib.runs.plan import Job, asked, describe
from moebert_lib.store.committed_results import ROWS
from moebert_lib.store.store import Entry, StageKey, Store

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
            [sys.executable, "-m", "moebert_lib.runs.execution"],
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
    runs = [run for group in cost.runs(jobs) for run in group]
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


# Run planned notebooks: what is done is reused, what fails says where.
# One kernel process per notebook, one store entry per run, figures published at the end.
# The entry's key is the notebook's code, its values and settings, the library's code and
# versions, and the digests of data and weights: change any of them and it runs again.

QUIET = 30  # seconds between two progress lines where several notebooks run together


def run(
    jobs: Sequence[Job],
    *,
    engine: Engine | None = None,
    force: bool = False,
    keep_going: bool = False,
    retry_failed: bool = True,
    publishing: bool = True,
    echo: Callable[[str], Any] = print,
) -> list[Entry | NotebookFailed]:
    """Run jobs, reusing what the store has, and publish their figures.

    Args:
        jobs: From :func:`plan`.
        engine: Where what is missing is made; one run at a time on this machine by default.
        force: Execute even what is stored.
        keep_going: Return failures among the entries instead of raising the first one.
        retry_failed: Also execute what failed before, unchanged, in a cell.
        publishing: Copy figures to where people look.
        echo: Receives one line per start, finish and progress line.

    Returns:
        For each job its entry, or why there is none.

    Raises:
        NotebookFailed: with the failing cell; the executed copy is in ``runs/failed``.
        UserError: no run can be made here, whatever the notebook: the disk is full, or the
            library has changed since these were planned.
    """
    store, keys = Store(), [job.key() for job in jobs]
    store.tidy()
    progress = _Progress(jobs, engine or Local(threads=None), echo)
    results: list[Entry | NotebookFailed | None] = [None] * len(jobs)
    missing = []
    for index, job in enumerate(jobs):
        entry = None if force else store.find(keys[index])
        failure = None if entry or retry_failed or force else execution.failed_before(job)
        if entry:
            progress.reused(index, entry)
            results[index] = _published(job, entry, publishing)
        elif failure:
            progress.failed(index, f"failed before: {failure}")
            results[index] = failure
        else:
            missing.append(index)
    made = _make(
        jobs, keys, _in_turn(jobs, missing, progress.engine.workers), progress, force=force
    )
    for index, entry in made:
        if isinstance(entry, NotebookFailed) and not keep_going:
            made.close()
            raise entry
        done = isinstance(entry, Entry)
        results[index] = _published(jobs[index], entry, publishing) if done else entry
    return results


def _in_turn(jobs: Sequence[Job], missing: Sequence[int], workers: int) -> list[int]:
    """Missing jobs as they are started: side by side, those that ask for most experiments first.

    What several notebooks ask for is made by the first, and no long one is left for the end.
    """
    if workers == 1 or len({jobs[index].name for index in missing}) < 2:
        return list(missing)
    return sorted(missing, key=lambda index: -_students(jobs[index]))


def _students(job: Job) -> int:
    """How many models a job asks to train."""
    return sum(stage == "student" for stage, _ in asked(job))


def _make(jobs, keys, missing: Sequence[int], progress: "_Progress", *, force: bool):
    """Number and result of each missing job, as the engine gets them done; timings at the end."""
    engine = progress.engine
    timed = [index for index in missing if jobs[index].timed]
    parts = [(engine, [index for index in missing if index not in timed])]
    parts.append((engine.alone() if isinstance(engine, Local) else engine, timed))
    for engine, numbers in parts:
        if numbers:
            progress.engine = engine
            yield from _make_with(engine, jobs, keys, numbers, progress, force=force)


def _make_with(engine: Engine, jobs, keys, missing: Sequence[int], progress, *, force: bool):
    store = Store()
    requests = [execution.request(jobs[number], force=force) for number in missing]
    events = engine.run(requests, busy=lambda i: store.busy(keys[missing[i]]))
    try:
        for event in events:
            number = missing[event.index]
            progress.tell(number, event)
            if event.outcome is not None:
                yield number, _result(jobs[number], keys[number], event.outcome)
    finally:
        events.close()
        store.tidy()


def _result(job: Job, key: StageKey, outcome: dict[str, Any]) -> Entry | NotebookFailed:
    if outcome["status"] == "stopped":
        raise UserError(f"{job.name}{describe(job)}: {outcome['error']}")
    if outcome["status"] in ("done", "reused"):
        entry = Store().find(key)
        if entry is not None:
            return entry
        outcome = {"status": "refused", "error": f"made, but it is not in {Store().root}"}
    died = outcome["status"] != "failed"
    failure = NotebookFailed(job.name, outcome.get("cell"), outcome["error"], died=died)
    failure.copy = Path(outcome["copy"]) if outcome.get("copy") else None
    if failure.copy is None:  # its process had no time for it
        execution.remember(failure, job)
    return failure


class _Progress:
    """What a batch says while it runs: a line for each start and end, and how much is left."""

    def __init__(self, jobs: Sequence[Job], engine: Engine, echo: Callable[[str], Any]):
        self.jobs, self.engine, self.echo = jobs, engine, echo
        self.took: list[float] = []
        self.ended, self.said = 0, time.monotonic()
        self.started: dict[int, float] = {}

    def label(self, index: int) -> str:
        return f"[{index + 1}/{len(self.jobs)}] {self.jobs[index].name}"

    def reused(self, index: int, entry: Entry) -> None:
        self.ended += 1
        self.echo(f"{self.label(index)} reused, made in {entry.seconds / 60:.1f} min")

    def failed(self, index: int, why: str) -> None:
        self.ended += 1
        self.echo(f"{self.label(index)}{describe(self.jobs[index])} {why}")

    def tell(self, index: int, event: Event) -> None:
        """Say what an engine's event means."""
        if event.started:
            self.started[index] = time.monotonic()
            self.echo(f"{self.label(index)} running{describe(self.jobs[index])}")
        elif event.line is not None:
            self._line(index, event.line)
        elif event.outcome["status"] in ("done", "reused"):
            self._done(index, event.outcome)
        else:
            cell = f"cell {event.outcome['cell']}: " if event.outcome.get("cell") else ""
            self.failed(index, f"failed: {cell}{event.outcome['error']}")

    def _line(self, index: int, line: str) -> None:
        """A notebook's progress: all of it, or where several run together a line now and then."""
        if self.engine.workers == 1:
            self.echo(f"    {line}")
        elif line.startswith(WARNING):
            self.echo(f"    [{index + 1}] {line}")
        elif time.monotonic() - self.said > QUIET:
            self.said = time.monotonic()
            self.echo(f"    [{index + 1}] {line}")

    def _done(self, index: int, outcome: dict[str, Any]) -> None:
        self.ended += 1
        self.took.append(time.monotonic() - self.started[index])
        left = len(self.jobs) - self.ended
        mean = sum(self.took) / len(self.took)
        minutes = mean * left / self.engine.workers / 60
        alike = len({job.name for job in self.jobs}) == 1  # else a mean says little
        told = left and alike and self.engine.workers > 1
        ahead = f", about {minutes:.1f} min left" if told else ""
        verb = "reused, made" if outcome["status"] == "reused" else "done"
        self.echo(f"{self.label(index)} {verb} in {outcome['seconds'] / 60:.1f} min{ahead}")


def _published(job: Job, entry: Entry, publishing: bool) -> Entry:
    if publishing:
        with FileLock(Store().root / "locks" / "figures.lock"):  # another batch may publish too
            publish(entry, published(job))
    return entry


def failed_runs() -> list[dict[str, Any]]:
    """What ``runs/failed`` keeps: notebook, cell, error and the executed copy, by name."""
    folders = sorted((home() / "runs" / "failed").glob("*"))
    return [
        about | {"folder": str(folder)}
        for folder in folders
        if (about := execution.failed_in(folder))
    ]


def published(job: Job) -> Path:
    """The folder that a job's figures go to."""
    if job.place:
        return home() / "figures" / job.place
    settings = job.settings and job.settings.model_dump()
    return destination(settings, changed=job.chosen)


# Copy a run's figures and tables to where people look, with where each came from.

PROVENANCE = "provenance.json"
LONGEST = 80  # characters of a folder's name


def destination(settings: dict[str, Any] | None, *, changed: Mapping[str, Any]) -> Path:
    """``figures/`` for the quick scale as it stands, else a folder in it named by what is run.

    The name is ``<scale>-<task>`` and each further value that was changed, such as
    ``quick-library-n_experts2-seed1``; a digest stands for what a name cannot hold.

    Args:
        settings: Of the notebook, None where it takes none.
        changed: Values by name that differ from the notebook's defaults, the scale left out.
    """
    figures = home() / "figures"
    if not changed and (settings is None or settings["scale"] == "quick"):
        return figures
    head = "changed" if settings is None else f"{settings['scale']}-{settings['task']}"
    further = {name: changed[name] for name in sorted(changed) if name not in ("task", "data_dir")}
    return figures / _safe("-".join([head, *(f"{k}{_word(v)}" for k, v in further.items())]))


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


def publish(entry: Entry, folder: Path) -> list[Path]:
    """Make ``folder`` hold exactly the run's figures, among those of other notebooks.

    Files that are there already with the same bytes are left alone; missing or changed
    ones are restored; those that an earlier run of the same notebook left are removed.
    """
    notebook, record = entry.key.choices["notebook"], entry.record()
    known = read_provenance(folder)
    made = {}
    for name, sha256 in record["files"].items():
        if name.startswith("figures/"):
            made[Path(name).name] = sha256
            _copy(entry.folder / name, folder / Path(name).name, sha256)
    for name in [name for name, about in known.items() if about["notebook"] == notebook]:
        del known[name]
        if name not in made:
            (folder / Path(name).name).unlink(missing_ok=True)
    about = _about(entry, record)
    known |= {name: {**about, "sha256": sha256} for name, sha256 in made.items()}
    if known != read_provenance(folder):
        write_json(folder / PROVENANCE, known)
    return [folder / name for name in made]


def read_provenance(folder: Path) -> dict[str, dict[str, Any]]:
    """Per file: notebook, run, settings, seeds, data, versions, commit, sha256."""
    try:
        return json.loads((folder / PROVENANCE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _about(entry: Entry, record: dict[str, Any]) -> dict[str, Any]:
    """Where a run's files come from; of one drawn from results only what any machine repeats.

    There each row says with which code, versions and machine it was made (``archive``).
    """
    settings = entry.key.choices.get("settings") or {}
    about = {
        "notebook": entry.key.choices["notebook"],
        "run": run_of(entry),
        "settings": settings,
        "seeds": {name: value for name, value in settings.items() if "seed" in name},
        "inputs": entry.key.origin.get("inputs", {}),
    }
    made = () if _drawn(entry) else ("versions", "commit", "machine")
    return about | {name: record[name] for name in made}


def run_of(entry: Entry) -> str:
    """The digest by which provenance names a run: its entry's, or where it was drawn from results
    that of notebook, values and results alone."""
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
