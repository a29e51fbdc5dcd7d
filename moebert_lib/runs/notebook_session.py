"""Begin a notebook's run, whoever executes it: its settings, checked, and a folder for its files.

``moebert run`` has checked and named everything before. With the plain ``papermill`` command, in
JupyterLab or with nbconvert this is done here, so that the same values give the same run.
"""

import ast
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from moebert_lib.config import file_io
from moebert_lib.config.errors import CHECKOUT, UserError, home, nearest
from moebert_lib.config.settings import Settings
from moebert_lib.runs import plan
from moebert_lib.runs.plan import Job
from moebert_lib.store.run_outputs import METRICS, read_metrics
from moebert_lib.store.store import RECORD, Store, write_record

SESSIONS = "sessions"  # the folder in runs/ of what is executed without the moebert command
FIGURES = "MOEBERT_FIGURES"  # the variable that names the folder of a run's figures
INJECTED = "# Parameters"  # first line of the cell that papermill adds

_started: list[Path] = []  # folders of runs that this process began itself


def start_run(variables: dict[str, Any]) -> Settings | None:
    """Begin the run of the notebook whose set-up cell calls this.

    In a notebook: ``settings = start_run(globals())``, after the cell of parameters. A value that
    was given by a setting's name counts as one of ``overrides``, also where the notebook has no
    such parameter. Figures, tables and recorded numbers go to a folder named by what decides the
    run, as with ``moebert run``: in ``runs/sessions``, or beside the output notebook where
    papermill is called with ``--inject-paths``. Once all cells have run in order, the folder has a
    record, and ``moebert export`` has a row of it.

    Args:
        variables: The notebook's variables; its parameters are set as they were understood.

    Returns:
        The notebook's settings; None where it has no parameter ``scale``.

    Raises:
        UserError: a name that is neither a parameter nor a setting, a value of the wrong type or
            outside its range, or data that is not there.
    """
    shell = _shell()
    cells = [] if shell is None else [cell.strip() for cell in shell.history_manager.input_hist_raw]
    parameters, injected = _names(cells)
    under_moebert = FIGURES in os.environ and not _started
    path = None if under_moebert else _notebook(variables, cells)
    if path is None:
        settings = _settings(variables, parameters, injected)
        if not under_moebert:
            _enter(_base(variables) / f"notebook-{secrets.token_hex(8)}")
            print("· papermill --inject-paths names this notebook, so that moebert export finds it")
        return settings
    job = _job(path, variables, [*parameters, *injected])
    variables.update(job.parameters)
    folder = _enter(_base(variables) / Store().folder(job.key()).name)
    _Completion(shell, job, folder, cells[-1])
    return job.settings


def _shell() -> Any:
    """IPython's shell; None outside it."""
    ipython = sys.modules.get("IPython")
    return ipython and ipython.get_ipython()


def _names(cells: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names in the cell of parameters, and others in the cell that papermill added."""
    parameters: dict[str, None] = {}
    injected: dict[str, None] = {}
    for cell in cells[:-1]:
        try:
            body = ast.parse(cell).body
        except SyntaxError:
            continue
        annotated = [line for line in body if isinstance(line, ast.AnnAssign)]
        if body and len(annotated) == len(body) and not parameters:
            parameters = dict.fromkeys(line.target.id for line in annotated)
        elif cell.startswith(INJECTED):
            names = [line.targets[0].id for line in body if isinstance(line, ast.Assign)]
            injected = dict.fromkeys(names)
    others = [name for name in injected if name not in parameters]
    return list(parameters), [name for name in others if not name.startswith("PAPERMILL_")]


def _notebook(variables: dict[str, Any], cells: Sequence[str]) -> Path | None:
    """The file of this notebook: as it was named, or the one whose cells were executed."""
    named = (
        variables.get("PAPERMILL_INPUT_PATH"),
        os.environ.get("JPY_SESSION_NAME"),
        variables.get("__vsc_ipynb_file__"),
    )
    for name in named:
        if name and Path(name).is_file():
            return Path(name).resolve()
    executed = [cell for cell in cells if cell and not cell.startswith(INJECTED)]
    for folder in (home() / "notebooks", CHECKOUT / "notebooks"):
        for path in sorted(folder.glob("*.ipynb")):
            if executed and executed == _code_cells(plan.read(path))[: len(executed)]:
                return path
    return None


def _code_cells(notebook: dict[str, Any]) -> list[str]:
    """The sources of a notebook's code cells; empty ones are not executed."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]).strip() for cell in cells]
    return [source for source in sources if source]


def _settings(
    variables: dict[str, Any], parameters: Sequence[str], injected: Sequence[str]
) -> Settings | None:
    """The settings that a notebook's variables name."""
    known = [*parameters, *Settings.model_fields]
    for name in injected:
        if name not in known:
            raise UserError(f"unknown parameter '{name}'; {nearest(name, known)}")
    if "scale" not in parameters:
        return None
    values = {name: variables[name] for name in parameters if name in Settings.model_fields}
    others = {name: _read_text(name, variables[name]) for name in injected}
    return Settings.at(**values, **{**variables.get("overrides", {}), **others})


def _job(path: Path, variables: dict[str, Any], names: Sequence[str]) -> Job:
    """The run as ``moebert run`` would plan it."""
    known = plan.parameters_of(path)
    values = {}
    for name in names:
        if name in variables:
            kind = known[name].kind if name in known else None
            values[name] = _read_text(name, variables[name], kind)
    scale = values.pop("scale", "quick")
    (job,) = plan.plan([path], scale=scale, parameters=values)
    return job


def _read_text(name: str, value: Any, kind: Any = None) -> Any:
    """A value; YAML where papermill passes on as text what is no text, such as ``[rte, cola]``."""
    field = Settings.model_fields.get(name)
    kind = kind or (field.annotation if field else str)
    is_text = isinstance(value, str) and kind is not str and str not in get_args(kind)
    literal = any(isinstance(choice, str) for choice in get_args(kind))
    return file_io.parse(value, name) if is_text and not literal else value


def _base(variables: dict[str, Any]) -> Path:
    """The folder that a run's own folder is made in."""
    output = str(variables.get("PAPERMILL_OUTPUT_PATH") or "")
    if output and "://" not in output:
        return Path(output).resolve().parent
    return home() / "runs" / SESSIONS


def _enter(folder: Path) -> Path:
    """Make a run's folder, print it, and send figures and recorded numbers there."""
    for name in (RECORD, METRICS):
        (folder / name).unlink(missing_ok=True)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    os.environ[FIGURES] = str(folder / "figures")
    _started.append(folder)
    print(f"· this run's folder: {folder}", flush=True)
    return folder


class _Completion:
    """Writes a run's record once all cells of its notebook have run, in order and without error."""

    def __init__(self, shell: Any, job: Job, folder: Path, current: str):
        self.shell, self.job, self.folder = shell, job, folder
        cells = _code_cells(job.notebook)
        self.left = cells[cells.index(current) :] if current in cells else []
        self.start = time.perf_counter()
        shell.events.register("post_run_cell", self.ended)

    def ended(self, result: Any) -> None:
        """Called by IPython after each cell."""
        expected = self.left.pop(0) if self.left else None
        in_order = result.success and result.info.raw_cell.strip() == expected
        if in_order and not self.left:
            self.write()
        if not (in_order and self.left):
            self.shell.events.unregister("post_run_cell", self.ended)

    def write(self) -> None:
        figures = sorted(path.name for path in (self.folder / "figures").iterdir())
        changed = {name: value for name, value in self.job.chosen.items() if name != "data_dir"}
        row = {"notebook": self.job.name, "figures": figures, "changed": changed}
        row["metrics"] = read_metrics(self.folder)
        write_record(self.folder, self.job.key(), row, time.perf_counter() - self.start)
        here = home() / "runs" / SESSIONS / self.folder.name
        if here != self.folder:  # a copy for moebert export
            here.mkdir(parents=True, exist_ok=True)
            file_io.write_bytes(here / RECORD, (self.folder / RECORD).read_bytes())
