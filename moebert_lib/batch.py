"""Run planned notebooks: what is done is reused, what fails says where.

One kernel process per notebook, one store entry per run, figures published at the end.
The entry's key is the notebook's code, its values and settings, the library's code and
versions, and the digests of data and weights: change any of them and it runs again.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from moebert_lib import publish, worker
from moebert_lib.engines import Engine, Event, Local
from moebert_lib.errors import UserError, home
from moebert_lib.execution import WARNING, NotebookFailed
from moebert_lib.notebook_files import notebooks, select
from moebert_lib.planning import TIMED, Job, asked, describe, plan
from moebert_lib.store import Entry, Store

__all__ = [
    "Job",
    "describe",
    "failed_runs",
    "notebooks",
    "plan",
    "published",
    "run",
    "select",
]


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
        entry = None if force else store.find("notebook", keys[index])
        failure = None if entry or retry_failed or force else worker.failed_before(job)
        if entry:
            progress.reused(index, store.send(entry))
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
    return sorted(missing, key=lambda index: -sum(map(len, asked(jobs[index]))))


def _make(jobs, keys, missing: Sequence[int], progress: "_Progress", *, force: bool):
    """Number and result of each missing job, as the engine gets them done; timings at the end."""
    engine = progress.engine
    timed = [index for index in missing if jobs[index].name in TIMED]
    parts = [(engine, [index for index in missing if index not in timed])]
    parts.append((engine.alone() if isinstance(engine, Local) else engine, timed))
    for engine, numbers in parts:
        if numbers:
            progress.engine = engine
            yield from _make_with(engine, jobs, keys, numbers, progress, force=force)


def _make_with(engine: Engine, jobs, keys, missing: Sequence[int], progress, *, force: bool):
    store = Store()
    requests = [worker.request(jobs[number], force=force) for number in missing]
    events = engine.run(requests, busy=lambda i: store.busy("notebook", keys[missing[i]]))
    try:
        for event in events:
            number = missing[event.index]
            progress.tell(number, event)
            if event.outcome is not None:
                yield number, _result(jobs[number], keys[number], event.outcome)
    finally:
        events.close()
        store.tidy()


def _result(job: Job, key: dict[str, Any], outcome: dict[str, Any]) -> Entry | NotebookFailed:
    if outcome["status"] == "stopped":
        raise UserError(f"{job.name}{describe(job)}: {outcome['error']}")
    if outcome["status"] in ("done", "reused"):
        entry = Store().find("notebook", key)
        if entry is not None:
            return entry
        outcome = {"status": "refused", "error": f"made, but it is not in {Store().root}"}
    died = outcome["status"] != "failed"
    failure = NotebookFailed(job.name, outcome.get("cell"), outcome["error"], died=died)
    failure.copy = Path(outcome["copy"]) if outcome.get("copy") else None
    if failure.copy is None:  # its process had no time for it
        worker.remember(failure, job)
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
            publish.publish(entry, published(job))
    return entry


def failed_runs() -> list[dict[str, Any]]:
    """What ``runs/failed`` keeps: notebook, cell, error and the executed copy, by name."""
    folders = sorted((home() / "runs" / "failed").glob("*"))
    return [
        about | {"folder": str(folder)} for folder in folders if (about := worker.failed_in(folder))
    ]


def published(job: Job) -> Path:
    """The folder that a job's figures go to."""
    if job.place:
        return home() / "figures" / job.place
    settings = job.settings and job.settings.model_dump()
    return publish.destination(settings, changed=job.chosen)
