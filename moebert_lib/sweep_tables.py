"""The tables of a sweep: one row a point, and the means over seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_lib import inventory
from moebert_lib.execution import NotebookFailed
from moebert_lib.planning import Job
from moebert_lib.store import Entry, write_bytes

if TYPE_CHECKING:
    from pandas import DataFrame


def write(jobs: Sequence[Job], results: Sequence[Entry | NotebookFailed], folder: Path) -> None:
    """Write ``table.csv``, and ``means.csv`` where numbers were recorded, into a folder."""
    frame = table(jobs, results)
    _write(frame, folder / inventory.TABLE)
    _write(means(frame), folder / inventory.MEANS)


def table(jobs: Sequence[Job], results: Sequence[Entry | NotebookFailed]) -> "DataFrame":
    """One row a point in the order of jobs: its values, its state, what it recorded.

    Returns:
        Columns ``notebook`` where there are several, ``scale``, ``task``, ``seed`` and what else
        the grid varies; ``state``, "done" or "failed"; ``run``, the name of its folder in
        ``runs/``; then what notebooks recorded.
    """
    from pandas import DataFrame

    varied = dict.fromkeys(name for job in jobs for name in job.values)
    named = [name for name in varied if name not in ("scale", "task", "seed", "data_dir")]
    several, rows = len({job.name for job in jobs}) > 1, []
    for job, result in zip(jobs, results, strict=True):
        known = {**job.parameters, **(job.settings.model_dump() if job.settings else {})}
        first = [name for name in ("scale", "task", "seed") if name in known]
        row = {"notebook": job.name} if several else {}
        row |= {name: known.get(name) for name in [*first, *named]}
        done = isinstance(result, Entry)
        row |= {"state": "done" if done else "failed", "run": result.folder.name if done else ""}
        told = result.row.get("metrics", {}) if done else {}
        rows.append(row | {f"metric.{name}" if name in row else name: told[name] for name in told})
    return DataFrame(rows)


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

    from moebert_lib.intervals import student
    from moebert_lib.tasks import TASKS

    n_values = frame.columns.get_loc("state")
    values = [name for name in frame.columns[:n_values] if name != "seed"]
    recorded = list(frame.columns[n_values + 2 :])  # after state and run
    alike = [repr(row) for row in frame[values].to_dict("records")]
    rows = []
    for _, group in frame.groupby(alike, sort=False):
        first = group.iloc[0]
        headline = TASKS[first["task"]].metric if first.get("task") in TASKS else ""
        for metric in [headline] if headline in recorded else recorded:
            found = [value for value in group[metric] if _is_number(value)]
            if found:
                low, high = student(found)
                about = {"metric": metric, "n": len(found), "mean": sum(found) / len(found)}
                rows.append({**first[values], **about, "low": low, "high": high})
    return DataFrame(rows)


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and not math.isnan(value)


def _write(frame: "DataFrame", path: Path) -> None:
    if len(frame):
        write_bytes(path, frame.to_csv(index=False, lineterminator="\n").encode())
