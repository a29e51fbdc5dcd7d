"""A process that makes notebook runs for an engine: requests in, events out, a line each.

Run as ``python -m moebert_lib.worker``. It lives while its standard input is open: when the
engine goes, however that happens, the pipe closes, and the worker kills its kernel and leaves.
What it was making is not in the store then, and will be made anew.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from moebert_lib import archive, execution, records
from moebert_lib.disk import Unwritable, read_json
from moebert_lib.errors import UserError
from moebert_lib.planning import Job
from moebert_lib.settings import Settings
from moebert_lib.store import Entry, Store, digest, write_json

FAILED = "failed.json"  # beside a failed run's executed copy


def request(job: Job, *, force: bool = False) -> dict[str, Any]:
    """A job as JSON values, with the notebook's text: another machine needs no more than it."""
    return {
        "name": job.name,
        "source": job.source,
        "given": job.given,
        "parameters": job.parameters,
        "settings": job.settings and job.settings.model_dump(),
        "digest": digest(job.key()),
        "force": force,
        "origin": job.origin,
    }


def answer(asked: dict[str, Any], say: Callable[[str], Any]) -> dict[str, Any]:
    """Make the run that a :func:`request` asks for; never raises but for a stop.

    Returns:
        ``status`` "done" or "reused"; or "failed" (the notebook), "died" (its kernel), "refused"
        (it could not be made, which is not the notebook's doing) or "stopped" (nor can any
        other), with ``error``, and ``cell`` and ``copy`` where a notebook has them.
    """
    settings = asked["settings"] and Settings(**asked["settings"])
    job = Job(
        asked["name"],
        asked["source"],
        asked["given"],
        asked["parameters"],
        settings,
        asked["origin"],
    )
    try:
        if digest(job.key()) != asked["digest"]:
            line = "library, data or weights are not what the run was planned with; run it again"
            return {"status": "stopped", "error": line}
        entry = make(job, force=asked["force"], since=time.time(), say=say)
    except execution.NotebookFailed as failure:
        status = "died" if failure.died else "failed"
        copy = str(failure.copy) if failure.copy else None
        return {"status": status, "error": failure.error, "cell": failure.cell, "copy": copy}
    except (UserError, OSError) as error:
        status = "stopped" if isinstance(error, Unwritable) else "refused"
        return {"status": status, "error": " ".join(str(error).split())}
    except Exception as error:  # papermill cannot read the notebook, or a page not be written
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return {"status": "failed", "error": line, "cell": None, "copy": None}
    return {"status": "reused" if entry.reused else "done", "seconds": entry.seconds}


def make(
    job: Job, *, force: bool = False, since: float | None = None, say: Callable[[str], Any] = print
) -> Entry:
    """A job's entry of the store, executed first where it is missing.

    The entry keeps the executed notebook, its page and log, its figures, and in its row the
    numbers that the notebook gave to ``record``.

    Args:
        job: What to run.
        force: Execute even what is stored.
        since: Seconds as of ``time.time``: a failure that another process met later is not met
            again but told.
        say: Receives the notebook's progress lines.

    Raises:
        NotebookFailed: the executed copy is kept in ``runs/failed``.
    """
    store, key = Store(), job.key()

    def build(folder: Path) -> dict[str, Any]:
        from moebert_lib.pages import write_page

        failure = failed_before(job, since=since) if since else None
        if failure:
            raise failure
        figures = folder / "figures"
        figures.mkdir()
        offline = job.settings.offline if job.settings and not archive.named() else True
        environment = execution.kernel_environment(figures, offline=offline)
        try:
            execution.execute(
                job.name,
                job.runs(),
                folder,
                parameters=job.given,
                environment=environment,
                echo=say,
            )
        except execution.NotebookFailed as failure:
            remember(failure, job, folder)
            raise
        write_page(folder / "notebook.ipynb", folder / "notebook.html")
        made = sorted(path.name for path in figures.iterdir())
        told = {name: value for name, value in job.chosen.items() if name != "data_dir"}
        return {"notebook": job.name, "figures": made, "changed": told, "metrics": _metrics(folder)}

    entry = store.make("notebook", key, build, force=force)
    shutil.rmtree(kept(job), ignore_errors=True)
    return entry


def kept(job: Job) -> Path:
    """Where a failed run's executed copy is kept: one for each choice of values."""
    return Store().root / "failed" / f"{job.name}-{digest([job.origin, job.parameters])[:16]}"


def remember(failure: execution.NotebookFailed, job: Job, folder: Path | None = None) -> None:
    """Keep how a run failed, and the folder with its executed copy where there is one."""
    target = kept(job)
    made = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(target, ignore_errors=True)
    about = {"notebook": failure.notebook, "cell": failure.cell, "error": failure.error}
    about |= {"died": failure.died, "given": job.values, "run": digest(job.key())}
    try:
        made.mkdir(parents=True)
        if folder:
            shutil.copytree(folder, made, dirs_exist_ok=True)
            failure.copy = target / "notebook.ipynb"
        write_json(made / FAILED, about)
        os.rename(made, target)
    except OSError:  # no room: not to know of a failure costs one more run
        failure.copy = None
        shutil.rmtree(made, ignore_errors=True)


def failed_before(job: Job, *, since: float = 0.0) -> execution.NotebookFailed | None:
    """How this very run failed in a cell before; None if it did not, or its process died."""
    folder = kept(job)
    about = failed_in(folder)
    if about is None or about["died"] or about["run"] != digest(job.key()):
        return None
    if (folder / FAILED).stat().st_mtime < since:
        return None
    failure = execution.NotebookFailed(about["notebook"], about["cell"], about["error"])
    failure.copy = folder / "notebook.ipynb"
    return failure


def failed_in(folder: Path) -> dict[str, Any] | None:
    """What :func:`remember` kept in a folder of ``runs/failed``; None where there is nothing."""
    types = {"notebook": str, "error": str, "run": str, "died": bool, "given": dict}
    return read_json(folder / FAILED, types)


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / records.FILE
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def main() -> None:
    """Answer requests from standard input until it closes."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries, kernels and their children print is no event
    requests: SimpleQueue[str | None] = SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin, requests), daemon=True).start()
    while (line := requests.get()) is not None:
        outcome = answer(json.loads(line), lambda text: _send(events, {"say": text}))
        _send(events, {"outcome": outcome})


def _read(source: TextIO, requests: "SimpleQueue[str | None]") -> None:
    for line in source:
        requests.put(line)
    import psutil

    children = psutil.Process().children(recursive=True)  # the kernel, and what it started
    for process in children:
        process.kill()
    psutil.wait_procs(children, timeout=5)  # what they locked is free once they are gone
    os._exit(0)


def _send(events: TextIO, event: dict[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


if __name__ == "__main__":
    main()
