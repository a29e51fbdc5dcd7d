"""A grid of runs of a notebook, or of several: validated, run on any engine, gathered in one table.

A grid is a mapping, in Python or in a YAML file::

    notebook: 03_distillation    # the unit experiment, which is the default
    scale: small
    data_dir: data/glue
    tasks: [rte, cola]
    seeds: [0, 1, 2]
    settings:                    # every combination of these
      ranking: [importance, random]
      keep_model: true
    points:                      # and of each of these sets
      - {n_experts: 4, expert_size: 384}
      - {n_experts: 8, expert_size: 192}

A set may name a notebook of its own, so that a grid can hold a whole workbook. Paths are found
from the current folder, as on the command line.
Where seeds are listed a point is one seed: ``n_seeds`` is 1 unless the grid says otherwise.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_lib.config import file_io
from moebert_lib.config.errors import UserError, home, nearest
from moebert_lib.config.file_io import write_bytes, write_json
from moebert_lib.config.provenance import digest
from moebert_lib.runs import execution, export, local_pool, status
from moebert_lib.runs import plan as planning
from moebert_lib.runs.execution import NotebookFailed
from moebert_lib.runs.local_pool import Local
from moebert_lib.runs.plan import Job
from moebert_lib.store.committed_results import AnyStore
from moebert_lib.store.store import Entry, Store

if TYPE_CHECKING:
    from pandas import DataFrame

NAMES = ("notebook", "scale", "data_dir", "tasks", "seeds", "settings", "points")
MOST = 10_000  # points of a grid
PLURAL = {"task": "tasks", "seed": "seeds"}


@dataclass(frozen=True)
class Sweep:
    """A validated grid: its name, itself as it was given, and a job for each point."""

    name: str
    grid: dict[str, Any]
    jobs: list[Job]

    @property
    def folder(self) -> Path:
        """Where its record and its table lie: one folder for one set of points."""
        points = [(job.name, job.origin, job.parameters) for job in self.jobs]
        return home() / "runs" / "sweeps" / f"{self.name}-{digest(points)[:8]}"


def sweep(grid: Mapping[str, Any] | str | Path, *, name: str = "sweep", **how: Any) -> "DataFrame":
    """Run every point of a grid, reusing what is stored, and return the table of all.

    Such as ``sweep({"seeds": [0, 1, 2], "settings": {"n_experts": [2, 4]}})``.

    Args:
        grid: A mapping, or the path of a YAML file.
        name: Of a mapping's sweep, in status and report; a file has its own.
        how: As of :func:`run`: engine, retry_failed, force, echo.

    Returns:
        One row a point, as :func:`table`.

    Raises:
        UserError: the grid is refused, before anything is run.
    """
    planned = plan(grid, name=name) if isinstance(grid, Mapping) else read(Path(grid))
    return table(planned.jobs, run(planned, **how))


# From a grid to its points.


def read(path: Path, *, data_dir: str = "", store: AnyStore | None = None) -> Sweep:
    """The sweep that a YAML file describes, named after the file; its data may lie elsewhere.

    Raises:
        UserError: as :func:`plan`, or the file cannot be read.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; expected a YAML grid (see moebert sweep --help)")
    grid = file_io.parse(path.read_text("utf-8", errors="replace"), str(path))
    if data_dir and isinstance(grid, Mapping):
        grid = {**grid, "data_dir": data_dir}
    return plan(grid, name=path.stem, where=f"{path}: ", store=store)


def plan(
    grid: Any, *, name: str = "sweep", where: str = "", store: AnyStore | None = None
) -> Sweep:
    """A grid's jobs, each validated, doubles left out; computes and writes nothing.

    ``store`` is where the experiments are, as for :func:`plan.plan`.

    Raises:
        UserError: an unknown name, a point whose values do not fit, data not there.
    """
    try:
        points = list(_points(grid))
        several = any("notebook" in values for values in points)
        jobs: dict[str, Job] = {}
        for values in points:
            job = _job(grid, values, several=several, store=store)
            jobs.setdefault(digest([job.name, job.origin, job.parameters]), job)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    paths = {name: grid.get(name) for name in ("data_dir", "notebook")}
    absolute = {  # to be found again from anywhere
        name: str(Path(path).expanduser().resolve())
        for name, path in paths.items()
        if isinstance(path, str) and path and (name == "data_dir" or path.endswith(".ipynb"))
    }
    return Sweep(name, dict(grid) | absolute, list(jobs.values()))


def _job(
    grid: Mapping[str, Any], values: dict[str, Any], *, several: bool, store: AnyStore | None
) -> Job:
    """The job of a point."""
    notebook = values.pop("notebook", grid.get("notebook") or "03_distillation")
    paths = planning.select([str(notebook)])
    takes_settings = "overrides" in planning.parameters_of(paths[0])
    scale, data_dir = grid.get("scale") or "quick", str(grid.get("data_dir") or "")
    if several and not takes_settings:  # the grid's settings are for the other notebooks
        settings, data_dir = grid.get("settings") or {}, ""
        values = {name: value for name, value in values.items() if name not in settings}
    elif takes_settings and grid.get("seeds") is not None:
        values = {"n_seeds": 1, **values}
    try:
        (job,) = planning.plan(
            paths, scale=scale, data_dir=data_dir, parameters=values, store=store
        )
    except UserError as error:
        point = f"point{planning.text_of(values)}: " if values else ""
        raise UserError(f"{point}{error}") from None
    return job


def _points(grid: Any) -> Iterator[dict[str, Any]]:
    """The values of each point, the last axis fastest."""
    if not isinstance(grid, Mapping):
        raise UserError("expected names and values, such as 'seeds: [0, 1, 2]'")
    for name in grid:
        if name not in NAMES:
            raise UserError(f"unknown name '{name}'; {nearest(str(name), NAMES)}")
    settings, sets = grid.get("settings") or {}, grid.get("points") or [{}]
    if not isinstance(settings, Mapping):
        raise UserError(
            "settings must hold names with lists of values, such as 'n_shared: [0, 256]'"
        )
    if not isinstance(sets, list) or not all(isinstance(values, Mapping) for values in sets):
        raise UserError(
            "points must be a list of names with values, such as '- {n_experts: 2, n_shared: 512}'"
        )
    if not isinstance(grid.get("seeds") or [], list):  # seeds: 3 may mean three seeds or seed 3
        raise UserError(f"seeds: {grid['seeds']!r}: list them, such as [0, 1, 2]")
    axes = {name: grid[many] for name, many in PLURAL.items() if grid.get(many) is not None}
    in_sets = dict.fromkeys(name for values in sets for name in values)
    for name in (*settings, *in_sets):
        if name in axes or name in ("scale", "data_dir"):
            raise UserError(f"'{name}' stands in the grid's own line; leave it out here")
        if name in settings and name in in_sets:
            raise UserError(f"'{name}' stands in settings and in points; keep one")
    axes |= {str(name): value for name, value in settings.items()}
    axes = {name: value if isinstance(value, list) else [value] for name, value in axes.items()}
    for name, values in axes.items():
        if not values:
            raise UserError(f"'{PLURAL.get(name, name)}' has no values; give at least one")
    n_points = len(sets) * math.prod(map(len, axes.values()))
    if n_points > MOST:
        raise UserError(f"{n_points:,} points: expected at most {MOST:,}; split the grid")
    for values, *chosen in itertools.product(sets, *axes.values()):
        yield dict(zip(axes, chosen, strict=True)) | dict(values)


def chosen_points(text: str, n_points: int) -> list[int]:
    """The numbers that a text such as ``0,3,5-7`` lists, counted from 0.

    Raises:
        UserError: it is no such list, or a number is not one of the grid's points.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"'{text}': expected numbers of points, such as 7, 0-9 or 0,3,5-7")
        start, stop = int(first), int(last or first)
        if not start <= stop < n_points:
            raise UserError(f"'{part.strip()}': this grid has the points 0 to {n_points - 1}")
        numbers |= {*range(start, stop + 1)}
    return sorted(numbers)


# Running the points.


def run(
    planned: Sweep,
    *,
    only: Sequence[int] | None = None,
    engine: Local | None = None,
    retry_failed: bool = False,
    force: bool = False,
    echo: Callable[[str], Any] = print,
) -> list[Entry | NotebookFailed | None]:
    """Run what is missing; write the sweep's record, and its table where all points were asked for.

    Args:
        planned: A validated grid.
        only: Numbers of the points to run, counted from 0; all by default.
        engine: ``local_pool.Local(2)`` or ``ray_cluster.Ray()``; by default as many local
            processes as cores and memory allow.
        retry_failed: Also run what failed or died before and has not changed.
        force: Run even what is stored.
        echo: Receives a line for each start and end.

    Returns:
        For each point that was asked for its entry, or why it failed.

    Raises:
        UserError: no run can be made here: the disk is full, or the library has changed. The
            table then has the state "not run" for the points that are left.
    """
    jobs = planned.jobs if only is None else [planned.jobs[number] for number in only]
    planned.folder.mkdir(parents=True, exist_ok=True)
    points = [_point(job) for job in planned.jobs]
    record = {"grid": planned.grid, "name": planned.name, "points": points}
    write_json(planned.folder / status.SWEEP, record)
    results: list[Entry | NotebookFailed | None] = [None] * len(jobs)
    ended = local_pool.completed(
        jobs,
        engine=engine or local_pool.fitting(jobs),
        force=force,
        retry_failed=retry_failed,
        echo=echo,
    )
    folder = planned.folder if only is None else None
    try:
        for index, result in ended:
            results[index] = result
            if state(result) in ("failed", "died") and not result.copy:
                execution.remember(result, jobs[index])  # as of a lost node, for status
    except BaseException:  # Ctrl-C too
        ended.close()
        with suppress(OSError):
            write_tables(jobs, results, folder)
        raise
    write_tables(jobs, results, folder)
    return results


def _point(job: Job) -> dict[str, Any]:
    """What a sweep's record says of a point, so that status finds its run."""
    key = job.key()
    return {
        "name": job.name,
        "values": job.values,
        "key": key.digest,
        "entry": Store().folder(key).name,
        "failed": execution.failure_folder(job).name,
    }


def preview(
    jobs: Sequence[Job], *, retry_failed: bool = False, force: bool = False, whole: bool = False
) -> Iterator[tuple[Job, str, str]]:
    """For each job what would be done with it, "run", "reuse" or "skip", and why.

    ``whole``: all the reasons, none shortened.
    """
    store = Store()
    entries = store.entries("notebook")
    for job in jobs:
        key = job.key()
        entry, failure = store.find(key), execution.failed_before(job)
        if entry and not force:
            yield job, "reuse", f"stored, {entry.seconds / 60:.1f} min"
        elif failure and not (retry_failed or force):
            yield job, "skip", f"{failure.state} before, --retry-failed runs it: {failure}"
        elif failure:
            yield job, "run", f"{failure.state} before: {failure}"
        elif force:
            yield job, "run", "--force"
        else:
            reasons = status.why(key, entries, damaged=store.damage(key), whole=whole)
            yield job, "run", "; ".join(reasons)


def with_failures() -> list[Sweep]:
    """The recorded sweeps that have failed points, planned again from their grids.

    Raises:
        UserError: there is none.
    """
    planned, n_failed = [], 0
    for record in status.recorded():
        if {"failed", "died"} & {state for _, state, _ in status.states(record)}:
            n_failed += 1
            try:
                planned.append(plan(record["grid"], name=record["name"]))
            except UserError as error:  # the others can be run all the same
                print(f"moebert: {record['folder'].name} is left out: {error}", file=sys.stderr)
    if not n_failed:
        raise UserError("no sweep here has failed runs (see moebert status)")
    return planned


# The tables of a sweep: one row a point, and the means over seeds.


def state(result: Entry | NotebookFailed | None) -> str:
    """A point's state: "done", "failed", "died" or "not run"."""
    if result is None:
        return "not run"
    return result.state if isinstance(result, NotebookFailed) else "done"


def table(jobs: Sequence[Job], results: Sequence[Entry | NotebookFailed | None]) -> "DataFrame":
    """One row a point in the order of jobs: its values, its state, what it recorded.

    Returns:
        Columns ``notebook`` where there are several, ``scale``, ``task``, ``seed`` and what else
        the grid varies; ``state``; ``run``, the name of its folder in ``runs/``; then what
        notebooks recorded, named as :func:`export.column_names` names them.
    """
    from pandas import DataFrame

    first = ("scale", "task", "seed")
    varied = dict.fromkeys(name for job in jobs for name in job.values)
    varied = [name for name in varied if name not in (*first, "data_dir")]
    several = len({job.name for job in jobs}) > 1
    rows: list[dict[export.Key, Any]] = []
    for job, result in zip(jobs, results, strict=True):
        known = job.parameters | (job.settings.model_dump() if job.settings else {})
        values = {"notebook": job.name} if several else {}
        values |= {name: known[name] for name in first if name in known}
        values |= {name: known.get(name) for name in varied}
        done = isinstance(result, Entry)
        values |= {"state": state(result), "run": result.folder.name if done else ""}
        recorded = result.row.get("metrics", {}) if done else {}
        row = {("first", name): value for name, value in values.items()}
        rows.append(row | {("metric", name): value for name, value in recorded.items()})
    keys = dict.fromkeys(key for row in rows for key in row)
    names = export.column_names(sorted(keys, key=lambda key: key[0]))
    return DataFrame([{names[key]: value for key, value in row.items()} for row in rows])


def means(frame: "DataFrame") -> "DataFrame":
    """Results over the seeds: a row for each combination of what else varies, and metric.

    The metric is the task's headline where that was recorded, else each recorded number.

    Args:
        frame: From :func:`table`.

    Returns:
        Those values, then ``metric``, ``n`` runs, ``mean``, and ``low`` and ``high``, the ends of
        Student's 95 % interval, NaN for one run. Empty where no metric was recorded.
    """
    from pandas import DataFrame

    from moebert_lib.data.tasks import TASKS
    from moebert_lib.evidence.statistics import student

    n_values = frame.columns.get_loc("state")
    values = [name for name in frame.columns[:n_values] if name != "seed"]
    recorded = list(frame.columns[n_values + 2 :])  # after state and run
    alike = [repr(row) for row in frame[values].to_dict("records")]
    rows = []
    for _, group in frame.groupby(alike, sort=False):
        first = group.iloc[0]
        headline = TASKS[first["task"]].metric if first.get("task") in TASKS else ""
        for metric in [headline] if headline in recorded else recorded:
            numbers = [value for value in group[metric] if _is_number(value)]
            if numbers:
                low, high = student(numbers)
                about = {"metric": metric, "n": len(numbers), "mean": sum(numbers) / len(numbers)}
                rows.append({**first[values], **about, "low": low, "high": high})
    return DataFrame(rows)


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and not math.isnan(value)


def write_tables(
    jobs: Sequence[Job], results: Sequence[Entry | NotebookFailed | None], folder: Path | None
) -> None:
    """Write ``table.csv``, and ``means.csv`` where numbers were recorded; None: write nothing."""
    points = table(jobs, results)
    for frame, name in ((points, status.TABLE), (means(points), status.MEANS)):
        if folder and len(frame):
            content = frame.to_csv(index=False, lineterminator="\n")
            write_bytes(folder / name, content.encode())
