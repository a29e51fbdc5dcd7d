"""Every notebook runs, in order, at scale smoke: the whole way from papermill to figures."""

import json
import re

import nbformat
import pytest
import smoke_runs
from checkout import NOTEBOOKS

from moebert_lib.runs import local_pool
from moebert_lib.runs import plan as notebook_files
from moebert_lib.runs import plan as planning
from moebert_lib.runs.execution import NotebookFailed

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a notebook at scale smoke, once: later ones find the earlier ones' results."""
    folder = tmp_path_factory.mktemp("notebooks")
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBERT_HOME", str(smoke_runs.home(folder / "home", tmp_path_factory)))

        def once(path):
            if path not in done:
                try:
                    (done[path],) = local_pool.run(plan(path))
                except NotebookFailed as failure:
                    done[path] = failure
            if isinstance(done[path], NotebookFailed):
                raise done[path]
            return done[path]

        yield once


def plan(path):
    return planning.plan(notebook_files.select([path.stem]), scale="smoke")


def promised(path):
    """Files that the box in the first cell says the notebook makes: its backticked names."""
    box = nbformat.read(path, as_version=4).cells[0].source
    makes = re.search(r"Makes(.*?)(\bTime\b|$)", box, re.DOTALL)[1]
    return re.findall(r"`([\w./]+)`", makes)


def errors(value):
    """Every output of type error, wherever it hides: cells, widget state."""
    if isinstance(value, dict):
        here = [value] if value.get("output_type") == "error" else []
        return here + [error for part in value.values() for error in errors(part)]
    if isinstance(value, list):
        return [error for part in value for error in errors(part)]
    return []


def test_notebook_runs_without_errors_even_in_its_widgets(path, run):
    executed = json.loads((run(path).folder / "notebook.ipynb").read_text())
    assert errors(executed) == []
    code = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    assert [cell["source"] for cell in code if cell["execution_count"] is None] == []


def test_notebook_says_nothing_on_stderr(path, run):
    executed = json.loads((run(path).folder / "notebook.ipynb").read_text())
    outputs = [out for cell in executed["cells"] for out in cell.get("outputs", [])]
    said = ["".join(out["text"]) for out in outputs if out.get("name") == "stderr"]
    assert said == []


def test_notebook_makes_what_its_first_cell_promises(path, run):
    made = {file.name for file in (run(path).folder / "figures").iterdir()}
    stems = {name.partition(".")[0] for name in made}
    names = {name.rpartition("/")[2] for name in promised(path)}
    assert {name for name in names if "." in name} <= made
    assert {name.partition(".")[0] for name in names} == stems


def test_figures_come_as_png_and_csv(path, run):
    made = {file.name for file in (run(path).folder / "figures").iterdir()}
    drawn = {name.removesuffix(".png") for name in made if name.endswith(".png")}
    assert {f"{stem}.csv" for stem in drawn} <= made
    assert not [name for name in made if name.endswith((".svg", ".pdf"))]


def test_a_second_run_reuses_the_first(path, run):
    run(path)
    (again,) = local_pool.run(plan(path))
    assert again.reused
