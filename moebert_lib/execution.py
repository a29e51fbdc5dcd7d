"""Run one notebook in a kernel of its own, keep its log, and say where it failed."""

import logging
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from moebert_lib import disk
from moebert_lib.disk import Unwritable
from moebert_lib.errors import CHECKOUT, home
from moebert_lib.shared import Unreachable

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


def kernel_environment(figures: Path, *, offline: bool) -> dict[str, str]:
    """Environment of a notebook's kernel that writes figures to ``figures``."""
    library = str(CHECKOUT)  # the kernel runs the library that planned the run
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= {
        "MOEBERT_HOME": str(home()),
        "MOEBERT_FIGURES": str(figures),
        "PYTHONPATH": os.pathsep.join(filter(None, [library, env.get("PYTHONPATH")])),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    if sys.platform == "linux":  # keep large buffers: 15 % faster on big CPU batches
        env |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    if offline:
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return env


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
        Unreachable: A cell could not reach the shared store.
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
    if error.ename == "Unreachable":
        raise Unreachable(line) from None
    full = tuple(f"[Errno {number}]" for number in disk.FULL)
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
