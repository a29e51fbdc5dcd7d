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
from moebert_lib.store.run_outputs import METRICS, row_of_run
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
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    cells = [cell.strip() for cell in shell.history_manager.input_hist_raw] if shell else []
    parameters, injected = _names(cells)
    under_moebert = FIGURES in os.environ and not _started
    path = None if under_moebert else _notebook(variables, cells)
    if path is None:
        settings = _settings(variables, parameters, injected)
        if not under_moebert:
            _enter(_base(variables) / f"notebook-{secrets.token_hex(8)}")
            print("· papermill --inject-paths names this notebook, so that moebert export finds it")
        return settings
    known = plan.parameters_of(path)
    given = {name: variables[name] for name in (*known, *injected) if name in variables}
    values = {
        name: _read_text(name, value, known[name].kind if name in known else None)
        for name, value in given.items()
    }
    (job,) = plan.plan([path], scale=values.pop("scale", "quick"), parameters=values)
    variables.update(job.parameters)
    folder = _enter(_base(variables) / Store().folder(job.key()).name)
    _record_at_the_end(shell, job, folder, cells[-1])
    return job.settings


def _names(cells: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names in the cell of parameters, and others in the cell that papermill added."""
    parameters: list[str] = []
    injected: list[str] = []
    for cell in cells[:-1]:
        try:
            body = ast.parse(cell).body
        except SyntaxError:
            continue
        if cell.startswith(INJECTED):
            injected = [line.targets[0].id for line in body if isinstance(line, ast.Assign)]
        elif body and not parameters and all(isinstance(line, ast.AnnAssign) for line in body):
            parameters = [line.target.id for line in body]
    others = [name for name in injected if not name.startswith("PAPERMILL_")]
    return parameters, [name for name in others if name not in parameters]


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


def _read_text(name: str, value: Any, kind: Any = None) -> Any:
    """A value; papermill passes ``[rte, cola]`` as text, which is then read as YAML."""
    field = Settings.model_fields.get(name)
    kind = kind or (field.annotation if field else str)
    takes_text = kind is str or any(part is str or isinstance(part, str) for part in get_args(kind))
    return value if takes_text or not isinstance(value, str) else file_io.parse(value, name)


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


def _record_at_the_end(shell: Any, job: Job, folder: Path, current: str) -> None:
    """Write a run's record once all cells of its notebook have run, in order and without error."""
    cells, start = _code_cells(job.notebook), time.perf_counter()
    left = cells[cells.index(current) :] if current in cells else []

    def cell_ended(result: Any) -> None:
        expected = left.pop(0) if left else None
        in_order = result.success and result.info.raw_cell.strip() == expected
        if in_order and not left:
            _write_record(job, folder, time.perf_counter() - start)
        if not (in_order and left):
            shell.events.unregister("post_run_cell", cell_ended)

    shell.events.register("post_run_cell", cell_ended)


def _write_record(job: Job, folder: Path, seconds: float) -> None:
    """Write a run's record into its folder, and a copy of it where moebert export looks."""
    write_record(folder, job.key(), row_of_run(job.name, job.chosen, folder), seconds)
    here = home() / "runs" / SESSIONS / folder.name
    if here != folder:
        here.mkdir(parents=True, exist_ok=True)
        file_io.write_bytes(here / RECORD, (folder / RECORD).read_bytes())
