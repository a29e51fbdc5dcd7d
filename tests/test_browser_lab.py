"""Notebooks in JupyterLab, in a real browser: they run whole, and their sliders move pictures."""

import os
import re
import sys

import pytest
from browser import SLIDERS, drag, pictures, push, served, wait_for_change
from checkout import NOTEBOOKS

LAB = [
    sys.executable,
    "-m",
    "jupyterlab",
    "--no-browser",
    "--port=0",
    "--allow-root",
    "--IdentityProvider.token=",
    "--expose-app-in-browser",
]
WIDGETS = [
    p for p in NOTEBOOKS if re.search(r"\b(explorer\.explore|widgets\.\w+)\(", p.read_text())
]
CELLS = """jupyterapp.shell.currentWidget.content.model.sharedModel.cells
    .filter((cell) => cell.cell_type === 'code')"""
STOPPED = f"""() => {CELLS}.some((cell) => cell.execution_count)
    && {CELLS}.every((cell) => cell.executionState === 'idle')"""
ERRORS = f"""() => {CELLS}.flatMap((cell) => cell.outputs)
    .filter((output) => output.output_type === 'error').map((output) => output.evalue)"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab's address; copies of the notebooks, at scale smoke, in a home of their own."""
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    for path in NOTEBOOKS:
        text = path.read_text("utf-8").replace(
            'scale: str = \\"quick\\"', 'scale: str = \\"smoke\\"'
        )
        (home / "notebooks" / path.name).write_text(text, "utf-8")
    folders = {f"JUPYTER_{kind}_DIR": str(home / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    env = os.environ | folders | {"MOEBERT_HOME": str(home), "JUPYTER_PREFER_ENV_PATH": "1"}
    env.pop("MPLBACKEND", None)  # the kernel draws inline
    ready = r"(http://localhost:\d+)/lab"
    with served(LAB, ready=ready, cwd=home / "notebooks", env=env) as (address, _):
        yield address


def run_all(page, address):
    """Open a notebook, click Run All Cells, and wait until every cell has run without error."""
    page.goto(address)
    page.get_by_text(re.compile(r"Python 3 .*\| Idle")).wait_for()  # before, nothing is run
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(STOPPED, timeout=120_000)
    assert page.evaluate(ERRORS) == []


@pytest.mark.parametrize("path", WIDGETS, ids=lambda path: path.stem)
def test_a_notebook_runs_whole_and_its_sliders_answer_keys_and_a_drag(lab, page, watch, path):
    run_all(page, f"{lab}/lab/tree/{path.name}?reset")
    before, sliders = pictures(page), page.locator(SLIDERS)
    assert sliders.count()
    for slider in sliders.all():
        push(slider)
    wait_for_change(page, before)
    before = pictures(page)
    drag(page, sliders.first)
    wait_for_change(page, before)
    assert watch.problems() == []
