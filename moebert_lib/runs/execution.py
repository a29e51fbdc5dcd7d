"""Run one notebook in a kernel of its own, keep its log, and say where it failed."""

import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from moebert_lib.config import file_io
from moebert_lib.config.errors import UserError
from moebert_lib.config.file_io import Unwritable, read_json, write_json
from moebert_lib.config.provenance import digest
from moebert_lib.config.settings import Settings
from moebert_lib.runs.plan import Job
from moebert_lib.store import committed_results, run_outputs
from moebert_lib.store.run_outputs import kernel_environment
from moebert_lib.store.store import Entry, Store

WARNING = "moebert: "  # of the library, such as a damaged file that is made again
SHOWN = ("· ", WARNING)  # lines of a notebook's output that start so are shown while it runs
KEYS = "kernel.json"  # of the connection to a kernel, while it lives
WIDGETS = "application/vnd.jupyter.widget-state+json"


class NotebookFailed(RuntimeError):
    """A notebook stopped. One line: notebook, cell as numbered in the executed copy, error.

    ``died``: the kernel went, which need not be the notebook's doing.
    """

    def __init__(self, notebook: str, cell: int | None, error: str, *, died: bool = False):
        self.notebook, self.cell, self.error, self.died = notebook, cell, error, died
        self.copy: Path | None = None  # the executed copy, once it is kept
        where = f"notebook {notebook}" + (f", cell {cell}" if cell else "")
        super().__init__(f"{where}: {error}")


class Tee:
    """A text sink: everything to a log, each whole line that is shown to ``echo``."""

    def __init__(self, log: TextIO, echo: Callable[[str], Any]):
        self.log, self.echo, self.rest = log, echo, ""

    def write(self, text: str) -> None:
        """Log the text and pass on the lines it completes."""
        self.log.write(text)
        *lines, self.rest = re.split(r"[\r\n]", self.rest + text)
        for line in lines:
            if line.startswith(SHOWN):
                self.echo(line)

    def flush(self) -> None:
        """Bring the log on disk up to date."""
        self.log.flush()


def execute(
    name: str,
    source: str,
    folder: Path,
    *,
    parameters: dict[str, Any],
    environment: Mapping[str, str],
    echo: Callable[[str], Any] = print,
) -> None:
    """Execute a notebook into ``folder/notebook.ipynb`` and ``folder/log.txt``.

    Args:
        name: What to call it in a failure.
        source: The notebook's JSON text.
        folder: An existing folder; on failure the copy up to the failing cell stays in it.
        parameters: JSON values, injected as literals after the ``parameters`` cell.
        environment: The kernel's whole environment.
        echo: Receives the progress lines.

    Raises:
        NotebookFailed: A cell or a widget callback raised, or the kernel died.
        Unwritable: A cell found the disk full, or the store forbidden.
    """
    import papermill

    output = folder / "notebook.ipynb"
    output.write_text(source, "utf-8")
    log_file = (folder / "log.txt").open("w", encoding="utf-8")
    with log_file as log, _environment(environment), _papermill_logs_to(log):
        out, err = Tee(log, echo), Tee(log, echo)
        with _failures(name, output):
            notebook = papermill.execute_notebook(
                _literal(output),
                _literal(output),
                parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                start_timeout=300,
                config=_private(folder),
                iopub_timeout=120,  # a busy machine may be slow to deliver a cell's last output
                stdout_file=out,
                stderr_file=err,
                extra_arguments=["--log-level=50"],
            )
    broken = widget_error(notebook)
    if broken:
        raise NotebookFailed(name, None, f"a widget's callback raised {broken}")


@contextmanager
def _failures(name: str, output: Path) -> Iterator[None]:
    """What papermill raises, as :func:`execute` says it; the kernel's keys are removed."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        yield
    except PapermillExecutionError as error:
        _of_the_store(error)
        raise NotebookFailed(name, error.exec_count, _message(error)) from None
    except DeadKernelError:
        said = "the kernel died, often for want of memory"
        raise NotebookFailed(name, _last_cell(output), said, died=True) from None
    except (CellTimeoutError, RuntimeError) as error:  # it does not start, or not answer
        said = str(error).splitlines()[0]
        died = isinstance(error, RuntimeError)  # not the notebook's doing
        raise NotebookFailed(name, _last_cell(output), said, died=died) from None
    finally:
        (output.parent / KEYS).unlink(missing_ok=True)


def widget_error(notebook: Mapping) -> str:
    """The first error hidden in a notebook's widget state ("" where there is none).

    An exception in a widget callback shows inside the widget and fails no cell.
    """
    state = notebook["metadata"].get("widgets", {}).get(WIDGETS, {}).get("state", {})
    for widget in state.values():
        for output in widget.get("state", {}).get("outputs", []):
            if output.get("output_type") == "error":
                return f"{output['ename']}: {output['evalue']}"
    return ""


def _private(folder: Path) -> Any:
    """Kernel settings that keep others on this machine from reading code and results.

    The file with the kernel's keys lies in the run's folder while the kernel lives. On Linux
    its sockets have names of their own and no file: a port that is free now may be taken by a
    kernel that starts at the same moment.
    """
    import zmq
    from traitlets.config import Config

    manager = {"connection_file": str(folder / KEYS)}
    manager |= {"transport_encryption": "auto"} if zmq.has("curve") else {}
    if sys.platform == "linux" and zmq.has("ipc"):
        manager |= {"transport": "ipc", "ip": f"@moebert-{uuid.uuid4().hex}"}
    return Config({"KernelManager": manager})


def _of_the_store(error: Any) -> None:
    """Raise a cell's error that is no fault of the notebook as what it was."""
    line = " ".join(str(error.evalue).split())
    full = tuple(f"[Errno {number}]" for number in file_io.FULL)
    if error.ename == "Unwritable" or line.startswith(full):
        raise Unwritable(line) from None


def _message(error: Any) -> str:
    lines = str(error.evalue).strip().splitlines() or [""]
    return f"{error.ename}: {lines[0]}"


def _last_cell(path: Path) -> int | None:
    """Number of the code cell that was running; a dead kernel does not tell it."""
    import nbformat

    try:
        cells = nbformat.read(path, as_version=4).cells
    except (OSError, ValueError):
        return None
    started = [cell for cell in cells if cell.metadata.get("papermill", {}).get("start_time")]
    return sum(cell.cell_type == "code" for cell in started) or None


def _literal(path: Path) -> str:
    """A path as papermill wants it: it formats braces away."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


@contextmanager
def _papermill_logs_to(log: TextIO) -> Iterator[None]:
    """What papermill has to say goes to the run's log inside the block, not to the screen."""
    logger, handler = logging.getLogger("papermill"), logging.StreamHandler(log)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """This process's environment replaced inside the block: the kernel inherits it."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(wanted)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# A process that makes notebook runs for an engine: requests in, events out, a line each.
# Run as ``python -m moebert_lib.worker``. It lives while its standard input is open: when the
# engine goes, however that happens, the pipe closes, and the worker kills its kernel and leaves.
# What it was making is not in the store then, and will be made anew.

FAILED = "failed.json"  # beside a failed run's executed copy


def request(job: Job, *, force: bool = False) -> dict[str, Any]:
    """A job as JSON values, with the notebook's text: another machine needs no more than it."""
    return {
        "name": job.name,
        "source": job.source,
        "given": job.given,
        "parameters": job.parameters,
        "settings": job.settings and job.settings.model_dump(),
        "digest": job.key().digest,
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
        if job.key().digest != asked["digest"]:
            line = "library, data or weights are not what the run was planned with; run it again"
            return {"status": "stopped", "error": line}
        entry = make(job, force=asked["force"], since=time.time(), say=say)
    except NotebookFailed as failure:
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
        from moebert_lib.publish.report import write_page

        failure = failed_before(job, since=since) if since else None
        if failure:
            raise failure
        figures = folder / "figures"
        figures.mkdir()
        offline = job.settings.offline if job.settings and not committed_results.named() else True
        environment = kernel_environment(figures, offline=offline)
        try:
            execute(
                job.name,
                job.runs(),
                folder,
                parameters=job.given,
                environment=environment,
                echo=say,
            )
        except NotebookFailed as failure:
            remember(failure, job, folder)
            raise
        write_page(folder / "notebook.ipynb", folder / "notebook.html")
        made = sorted(path.name for path in figures.iterdir())
        told = {name: value for name, value in job.chosen.items() if name != "data_dir"}
        return {"notebook": job.name, "figures": made, "changed": told, "metrics": _metrics(folder)}

    entry = store.make(key, build, force=force)
    shutil.rmtree(kept(job), ignore_errors=True)
    return entry


def kept(job: Job) -> Path:
    """Where a failed run's executed copy is kept: one for each choice of values."""
    return Store().root / "failed" / f"{job.name}-{digest([job.origin, job.parameters])[:16]}"


def remember(failure: NotebookFailed, job: Job, folder: Path | None = None) -> None:
    """Keep how a run failed, and the folder with its executed copy where there is one."""
    target = kept(job)
    made = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(target, ignore_errors=True)
    about = {"notebook": failure.notebook, "cell": failure.cell, "error": failure.error}
    about |= {"died": failure.died, "given": job.values, "run": job.key().digest}
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


def failed_before(job: Job, *, since: float = 0.0) -> NotebookFailed | None:
    """How this very run failed in a cell before; None if it did not, or its process died."""
    folder = kept(job)
    about = failed_in(folder)
    if about is None or about["died"] or about["run"] != job.key().digest:
        return None
    if (folder / FAILED).stat().st_mtime < since:
        return None
    failure = NotebookFailed(about["notebook"], about["cell"], about["error"])
    failure.copy = folder / "notebook.ipynb"
    return failure


def failed_in(folder: Path) -> dict[str, Any] | None:
    """What :func:`remember` kept in a folder of ``runs/failed``; None where there is nothing."""
    types = {"notebook": str, "error": str, "run": str, "died": bool, "given": dict}
    return read_json(folder / FAILED, types)


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / run_outputs.FILE
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
