"""Run planned notebooks: what is done is reused, what fails says where.

One kernel process per notebook, one store entry per run, figures published at the end.
The entry's key is the notebook's source, its values and settings, the library's code and
versions, and the digests of data and weights: change any of them and it runs again.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from moebert_lib import execution, publish
from moebert_lib.planning import FOLDERS, Job, notebooks, plan, select
from moebert_lib.settings import home
from moebert_lib.store import Entry, Store, digest, write_json

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


def run(
    jobs: Sequence[Job],
    *,
    force: bool = False,
    keep_going: bool = False,
    echo: Callable[[str], Any] = print,
) -> list[Entry]:
    """Run jobs, reusing what the store has, and publish their figures.

    Args:
        jobs: From :func:`plan`.
        force: Execute even what is stored.
        keep_going: After a failure run the others first, then raise the first failure.
        echo: Receives one line per start, finish and progress line.

    Raises:
        NotebookFailed: with the failing cell; the executed copy is in ``runs/failed``.
    """
    entries, failures = [], []
    for number, job in enumerate(jobs, start=1):
        label = f"[{number}/{len(jobs)}] {job.name}"
        try:
            entries.append(_run(job, label, force=force, echo=echo))
        except execution.NotebookFailed as failure:
            if not keep_going:
                raise
            failures.append(failure)
            echo(f"{label} failed: {failure}")
    if failures:
        raise failures[0]
    return entries


def failed_runs() -> list[dict[str, Any]]:
    """What ``runs/failed`` keeps: notebook, cell, error and the executed copy, by name."""
    found = sorted((home() / "runs" / "failed").glob("*/failed.json"))
    return [json.loads(path.read_text("utf-8")) | {"folder": str(path.parent)} for path in found]


def changed(job: Job) -> dict[str, Any]:
    """The values that make a job more than its scale, by name; also what a folder's name holds.

    Of folders the last part of the name only: where they lie is one machine's affair.
    """
    given = {name: value for name, value in _given(job).items() if name != "scale"}
    return {name: Path(value).name if name in FOLDERS else value for name, value in given.items()}


def published(job: Job) -> Path:
    """The folder that a job's figures go to."""
    settings = job.settings and job.settings.model_dump()
    return publish.destination(settings, changed=changed(job))


def _run(job: Job, label: str, *, force: bool, echo: Callable[[str], Any]) -> Entry:
    key, store = job.key(), Store()
    kept = store.root / "failed" / f"{job.name}-{digest(job.parameters)[:16]}"

    def build(folder: Path) -> dict[str, Any]:
        from moebert_lib.pages import write_page

        echo(f"{label} running{describe(job)}")
        figures = folder / "figures"
        figures.mkdir()
        offline = job.settings.offline if job.settings else True
        environment = execution.kernel_environment(figures, offline=offline)
        try:
            execution.execute(
                job.notebook, folder, parameters=job.given, environment=environment, echo=echo
            )
        except execution.NotebookFailed as failure:
            _keep(failure, folder, kept, given=_given(job))
            raise
        write_page(folder / "notebook.ipynb", folder / "notebook.html")
        made = sorted(path.name for path in figures.iterdir())
        told = {name: value for name, value in changed(job).items() if name != "data_dir"}
        return {"notebook": job.name, "figures": made, "changed": told}

    entry = store.make("notebook", key, build, force=force)
    shutil.rmtree(kept, ignore_errors=True)
    with FileLock(store.root / "locks" / "figures.lock"):  # another batch may publish too
        publish.publish(entry, published(job))
    verb = "reused, made" if entry.reused else "done"
    echo(f"{label} {verb} in {entry.seconds / 60:.1f} min")
    return entry


def _keep(
    failure: execution.NotebookFailed, folder: Path, kept: Path, *, given: dict[str, Any]
) -> None:
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(exist_ok=True)
    shutil.copytree(folder, kept)
    about = {"notebook": failure.notebook, "cell": failure.cell, "error": failure.error}
    write_json(kept / "failed.json", {**about, "given": given})
    failure.copy = kept / "notebook.ipynb"


def describe(job: Job) -> str:
    """The values a job was given, for a line of text; "" where there are none."""
    return "".join(f" {name}={value}" for name, value in _given(job).items())


def _given(job: Job) -> dict[str, Any]:
    """The values a job was given, overrides among them."""
    own = {name: value for name, value in job.given.items() if name != "overrides"}
    return own | job.given.get("overrides", {})
