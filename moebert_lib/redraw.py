"""Committed figures and tables drawn again from committed results: nothing is trained.

A folder of results (``archive``) also holds ``workbook.yaml``: the grid of ``moebert sweep`` whose
points are all notebook runs that figures and tables come from. Each is executed here without the
cells that need a model. The first run of a notebook goes to ``figures/``, a further one to the
folder there that is named after its task.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moebert_lib import archive, batch, findings, results, sweeps
from moebert_lib.engines import side_by_side
from moebert_lib.errors import UserError, home
from moebert_lib.planning import Job
from moebert_lib.provenance import file_digest

WORKBOOK = "workbook.yaml"
#: Folders of ``figures/`` whose files no notebook draws.
GIVEN = {"runs", "bench"}


def draw(folder: Path, *, into: Path | None = None, echo: Callable[[str], Any] = print) -> Path:
    """Draw everything that a folder of results holds; returns where it lies.

    Args:
        folder: Results, and the grid of notebook runs.
        into: Where figures go; ``figures/`` of this home by default.
        echo: Receives a line for each start and end.

    Raises:
        UserError: the folder holds no results, or they lack what a notebook asks for.
        NotebookFailed: a notebook does not run on them.
    """
    into = into or home() / "figures"
    with _from(folder):
        results.verify(folder)  # refused here, once, and not in each kernel
        jobs = plan(folder, into)
        batch.run(jobs, engine=side_by_side(jobs), echo=echo)
        if findings.NOTEBOOK in {job.name for job in jobs}:
            findings.write(into)
    return into


def plan(folder: Path, into: Path) -> list[Job]:
    """The notebook runs of a folder of results, each with its place below ``into``."""
    grid = folder / WORKBOOK
    if not grid.is_file():
        raise UserError(f"no {WORKBOOK} in '{folder}'; expected the grid of its notebook runs")
    jobs, seen = [], set()
    for job in sweeps.read(grid).jobs:
        further = job.settings.task if job.name in seen and job.settings else ""
        jobs.append(dataclasses.replace(job, place=str((into / further).resolve())))
        seen.add(job.name)
    return jobs


def check(folder: Path, *, echo: Callable[[str], Any] = print) -> list[str]:
    """Draw everything into a folder of its own; returns what differs from ``figures/``.

    Each line names a file and says how: it has other bytes, is missing, or nothing draws it.
    """
    with tempfile.TemporaryDirectory(prefix="moebert-") as place:
        drawn = digests(draw(folder, into=Path(place), echo=echo))
    there = digests(home() / "figures")
    told = {
        **{name: "other bytes" for name in drawn if there.get(name, drawn[name]) != drawn[name]},
        **{name: "missing from figures/" for name in drawn.keys() - there.keys()},
        **{name: "nothing draws it" for name in there.keys() - drawn.keys()},
    }
    return [f"{name}: {told[name]}" for name in sorted(told)]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that runs drew below a folder of figures, by relative path."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        path.as_posix(): file_digest(folder / path)
        for path in sorted(found)
        if path.parts[0] not in GIVEN
    }


@contextmanager
def _from(folder: Path) -> Iterator[None]:
    """Results instead of the store, here and in the kernels that are started in the block."""
    before = os.environ.get(archive.FROM)
    os.environ[archive.FROM] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ[archive.FROM]
        if before is not None:
            os.environ[archive.FROM] = before
