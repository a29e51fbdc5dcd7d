"""Execute one notebook with papermill in a separate kernel; keep its results or its failure."""

import functools
import logging
import re
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from moebert_lib.config import file_io
from moebert_lib.config.errors import UserError, home
from moebert_lib.config.file_io import Unwritable, read_json, write_json
from moebert_lib.config.provenance import code_digests, digest, library_modules
from moebert_lib.runs.plan import Job
from moebert_lib.store import committed_results, run_outputs
from moebert_lib.store.store import Entry, StageKey, Store

WARNING = "moebert: "  # begins a line of the library, such as a damaged file that is made again
SHOWN = ("· ", WARNING)  # lines of a notebook's output that are printed while it runs
FAILED = "failed.json"  # beside a failed run's executed copy
CONNECTION = "kernel.json"  # ports and secret of a running kernel
WIDGETS = "application/vnd.jupyter.widget-state+json"


class NotebookFailed(RuntimeError):
    """A notebook did not finish. One line: notebook, cell as numbered in the executed copy, error.

    Attributes:
        state: "failed" (a cell raised), "died" (the kernel process ended, for example out of
            memory) or "not run" (it could not be started, for a reason outside the notebook).
        copy: The executed copy; None where none was kept.
    """

    def __init__(self, notebook: str, cell: int | None, error: str, state: str = "failed"):
        self.notebook, self.cell, self.error, self.state = notebook, cell, error, state
        self.copy: Path | None = None
        super().__init__(notebook, cell, error, state)  # as a pickle needs them

    def __str__(self) -> str:
        where = f", cell {self.cell}" if self.cell else ""
        return f"notebook {self.notebook}{where}: {self.error}"


class ChangedLibrary(UserError):
    """The library is not the one that the runs were planned with."""


class OutputLog:
    """A text stream that writes to a log and passes each whole progress line to ``say``."""

    def __init__(self, log: TextIO, say: Callable[[str], Any]):
        self.log, self.say, self.rest = log, say, ""

    def write(self, text: str) -> None:
        """Log the text and pass on the lines it completes."""
        self.log.write(text)
        *lines, self.rest = re.split(r"[\r\n]", self.rest + text)
        for line in lines:
            if line.startswith(SHOWN):
                self.say(line)

    def flush(self) -> None:
        """Bring the log on disk up to date."""
        self.log.flush()


class Kernels:
    """The kernels that this process runs now, so that all of them can be stopped."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._clients: set[Any] = set()

    @contextmanager
    def running(self, client: Any) -> Iterator[None]:
        """Count an nbclient client's kernel as running inside the block."""
        self._clients.add(client)
        try:
            yield
        finally:
            self._clients.discard(client)

    def kill(self) -> None:
        """Start no further run, and kill the kernels that run and the processes they started."""
        import psutil

        self.stopped.set()
        for client in list(self._clients):
            process = getattr(getattr(client.km, "provisioner", None), "process", None)
            if process is None:
                continue
            with suppress(psutil.NoSuchProcess):
                kernel = psutil.Process(process.pid)
                for child in [*kernel.children(recursive=True), kernel]:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()


def execute(
    name: str,
    source: str,
    folder: Path,
    *,
    parameters: dict[str, Any],
    environment: Mapping[str, str],
    say: Callable[[str], Any] = print,
    kernels: Kernels | None = None,
) -> None:
    """Execute a notebook into ``folder/notebook.ipynb`` and ``folder/log.txt``.

    Args:
        name: What to call it in a failure.
        source: The notebook's JSON text.
        folder: An existing folder; on failure the copy up to the failing cell stays in it.
        parameters: JSON values, injected as literals after the ``parameters`` cell.
        environment: The kernel's whole environment.
        say: Receives the progress lines.
        kernels: Where the kernel is registered while it runs.

    Raises:
        NotebookFailed: A cell or a widget callback raised, a cell ended the notebook early, or
            the kernel died.
        Unwritable: A cell could not write, because the disk is full or read-only.
    """
    load_papermill()
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    output = folder / "notebook.ipynb"
    output.write_text(source, "utf-8")
    literal = str(output.resolve()).replace("{", "{{").replace("}", "}}")  # papermill formats it
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        try:
            notebook = papermill.execute_notebook(
                literal,
                literal,
                parameters,
                engine_name="moebert",
                kernel_name="python3",
                language="python",
                progress_bar=False,
                start_timeout=300,
                stdout_file=OutputLog(log, say),
                stderr_file=OutputLog(log, say),
                environment=dict(environment),
                kernels=kernels or Kernels(),
                config=_private(folder),
            )
        except PapermillExecutionError as error:
            _raise_store_error(error)
            first_line = (str(error.evalue).strip().splitlines() or [""])[0]
            line = f"{error.ename}: {first_line}"
            raise NotebookFailed(name, error.exec_count, line) from None
        except (DeadKernelError, CellTimeoutError, RuntimeError) as error:
            line = str(error).splitlines()[0]
            state = "failed" if isinstance(error, CellTimeoutError) else "died"
            raise NotebookFailed(name, _last_cell(output), line, state=state) from None
        finally:
            (folder / CONNECTION).unlink(missing_ok=True)
    _check_complete(name, notebook)


@functools.cache
def load_papermill() -> None:
    """Import papermill and register the engine ``moebert``, which sets the kernel's environment.

    Call it before threads start: a thread can see a module that is only partly imported.
    """
    import nbformat  # noqa: F401  needed later, in threads
    import papermill.exceptions  # noqa: F401
    import psutil  # noqa: F401
    import zmq  # noqa: F401
    from nbclient.exceptions import DeadKernelError
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, papermill_engines

    class Client(PapermillNotebookClient):
        def papermill_execute_cells(self) -> None:
            process = self.km.provisioner.process
            try:
                super().papermill_execute_cells()
            except DeadKernelError:
                raise DeadKernelError(f"the kernel died: {ending(process.poll())}") from None

    class KernelEngine(Engine):
        @classmethod
        def execute_managed_notebook(
            cls,
            nb_man: Any,
            kernel_name: str,
            *,
            environment: dict[str, str],
            kernels: Kernels,
            start_timeout: int,
            input_path: str,
            **options: Any,
        ) -> None:
            client = Client(
                nb_man,
                kernel_name=kernel_name,
                startup_timeout=start_timeout,
                iopub_timeout=120,  # a busy machine may be slow to deliver a cell's last output
                log=logger,
                extra_arguments=["--log-level=50"],
                **options,
            )
            with kernels.running(client):
                client.execute(env=environment)

    logger = logging.getLogger("papermill")
    logger.addHandler(logging.NullHandler())  # errors are reported by the run itself
    logger.propagate = False
    # nbclient leaves its watch over the kernel behind where a run ends by an error of ours
    left = "Task was destroyed"
    logging.getLogger("asyncio").addFilter(lambda record: left not in record.getMessage())
    papermill_engines.register("moebert", KernelEngine)


def ending(status: int | None) -> str:
    """How a process ended, by its return code as in :class:`subprocess.Popen`.

    Example:
        >>> ending(-9), ending(3)
        ('SIGKILL, often for want of memory', 'exit status 3')
    """
    if status is None:
        return "no reply"
    if status >= 0:
        return f"exit status {status}"
    known = {number.value: number.name for number in signal.Signals}
    name = known.get(-status, f"signal {-status}")
    return f"{name}, often for want of memory" if name == "SIGKILL" else name


def _check_complete(name: str, notebook: Mapping) -> None:
    """Refuse a notebook in which a widget's callback raised, or that a cell ended early.

    papermill counts ``sys.exit(0)`` as success, and executes no cell after it.
    """
    error = widget_error(notebook)
    if error:
        raise NotebookFailed(name, None, f"a widget's callback raised {error}")
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for index, cell in enumerate(cells):
        if cell["metadata"]["papermill"]["status"] != "completed":
            n_left = len(cells) - index - 1
            line = f"SystemExit: the cell ended the notebook; code cells not run after it: {n_left}"
            raise NotebookFailed(name, cell["execution_count"] or index + 1, line)


def widget_error(notebook: Mapping) -> str:
    """The first error hidden in a notebook's widget state ("" where there is none).

    An exception in a widget's callback is shown inside the widget and fails no cell.
    """
    state = notebook["metadata"].get("widgets", {}).get(WIDGETS, {}).get("state", {})
    for widget in state.values():
        for output in widget.get("state", {}).get("outputs", []):
            if output.get("output_type") == "error":
                return f"{output['ename']}: {output['evalue']}"
    return ""


def _private(folder: Path) -> Any:
    """Kernel settings that prevent other users of this machine from reading code and results.

    The file with the kernel's secret is in the run's folder while the kernel lives. On Linux the
    sockets have unique names and no file: a free port may be taken by a kernel that starts at the
    same moment.
    """
    import zmq
    from traitlets.config import Config

    manager = {"connection_file": str(folder / CONNECTION)}
    if zmq.has("curve"):
        manager["transport_encryption"] = "auto"
    if sys.platform == "linux" and zmq.has("ipc"):
        manager |= {"transport": "ipc", "ip": f"@moebert-{uuid.uuid4().hex}"}
    return Config({"KernelManager": manager})


def _raise_store_error(error: Any) -> None:
    """Raise a cell's error as Unwritable where the disk is full or forbidden."""
    line = " ".join(str(error.evalue).split())
    full = tuple(f"[Errno {number}]" for number in file_io.FULL)
    if error.ename == "Unwritable" or line.startswith(full):
        raise Unwritable(line) from None


def _last_cell(path: Path) -> int | None:
    """Number of the code cell that was started last; a dead kernel does not report it."""
    import nbformat

    try:
        cells = nbformat.read(path, as_version=4).cells
    except (OSError, ValueError):
        return None
    started = [cell for cell in cells if cell.metadata.get("papermill", {}).get("start_time")]
    return sum(cell.cell_type == "code" for cell in started) or None


# A planned run: executed once, then reused from the store; failures are remembered.


def make(
    job: Job,
    *,
    force: bool = False,
    since: float | None = None,
    environment: Mapping[str, str] | None = None,
    say: Callable[[str], Any] = print,
    kernels: Kernels | None = None,
) -> Entry:
    """The stored run of a job, executed first where it is missing.

    The entry has the executed notebook, its log, its figures, and in its row the numbers that the
    notebook gave to ``record``.

    Args:
        job: What to run.
        force: Execute it even if it is stored.
        since: Seconds as of ``time.time`` when the batch began. If another process has failed at
            the same run since then, that failure is raised and the notebook is not executed.
        environment: Further variables of the kernel, beside those of this process.
        say: Receives the notebook's progress lines.
        kernels: Where the kernel is registered while it runs.

    Raises:
        NotebookFailed: the executed copy is kept in ``runs/failed``.
        ChangedLibrary: the library's code has changed since the run was planned.
    """
    key, kernels = job.key(), kernels or Kernels()
    store = Store(cancelled=kernels.stopped)

    def build(folder: Path) -> dict[str, Any]:
        failure = failed_before(job, since=since) if since else None
        if failure and failure.state == "failed":
            raise failure
        figures = folder / "figures"
        figures.mkdir()
        offline = job.settings.offline if job.settings and not job.results else True
        try:
            changes = {**(environment or {}), **_sources(job)}
            whole = run_outputs.kernel_environment(figures, offline=offline, changes=changes)
            how = {"parameters": job.given, "environment": whole}
            execute(job.name, job.runs(), folder, **how, say=say, kernels=kernels)
        except NotebookFailed as failure:
            if not kernels.stopped.is_set():
                remember(failure, job, folder)
            raise
        if since and _library_changed(key, since):
            raise ChangedLibrary("the library has changed since this was planned; run it again")
        return run_outputs.row_of_run(job.name, job.chosen, folder)

    entry = store.make(key, build, force=force)
    shutil.rmtree(failure_folder(job), ignore_errors=True)
    return entry


def _sources(job: Job) -> dict[str, str]:
    """Variables that name the results a job is drawn from, and the formats of its figures."""
    values = {committed_results.FROM: job.results, run_outputs.FORMATS: job.formats}
    return {name: value for name, value in values.items() if value}


def _library_changed(key: StageKey, since: float) -> bool:
    """Whether the code in a key is no longer the code on disk; unchanged files are not read."""
    planned = key.origin["code"]
    newer = any(path.stat().st_mtime > since for path in library_modules().values())
    return newer and code_digests.__wrapped__(*planned) != planned


def failure_folder(job: Job) -> Path:
    """Where a failed run's executed copy is kept: one folder for each choice of values."""
    return Store().root / "failed" / f"{job.name}-{digest([job.origin, job.parameters])[:16]}"


def remember(failure: NotebookFailed, job: Job, folder: Path | None = None) -> None:
    """Keep how a run failed, with the folder of its executed copy; sets ``failure.copy``."""
    target = failure_folder(job)
    about = {
        "notebook": failure.notebook,
        "cell": failure.cell,
        "error": failure.error,
        "died": failure.state == "died",
        "given": job.values,
        "run": job.key().digest,
    }
    with suppress(OSError):  # no room: the run will be tried again
        with file_io.replacing(target) as temporary:
            if folder is None:
                temporary.mkdir(parents=True)
            else:
                shutil.copytree(folder, temporary)
            write_json(temporary / FAILED, about)
        failure.copy = target / "notebook.ipynb"


def failed_before(job: Job, *, since: float = 0.0) -> NotebookFailed | None:
    """How this run failed or died before, unchanged in code and values; None if it did not."""
    folder = failure_folder(job)
    about = read_failure(folder)
    if about is None or about["run"] != job.key().digest:
        return None
    if (folder / FAILED).stat().st_mtime < since:
        return None
    state = "died" if about["died"] else "failed"
    failure = NotebookFailed(about["notebook"], about["cell"], about["error"], state=state)
    failure.copy = folder / "notebook.ipynb"
    return failure


def read_failure(folder: Path) -> dict[str, Any] | None:
    """What :func:`remember` kept in a folder of ``runs/failed``; None where there is nothing."""
    types = {"notebook": str, "error": str, "run": str, "died": bool, "given": dict}
    return read_json(folder / FAILED, types)


def failed_runs() -> list[dict[str, Any]]:
    """All remembered failures by name: notebook, cell, error, given values, and the folder."""
    folders = sorted((home() / "runs" / "failed").glob("*"))
    failures = [(folder, read_failure(folder)) for folder in folders]
    return [about | {"folder": str(folder)} for folder, about in failures if about]
