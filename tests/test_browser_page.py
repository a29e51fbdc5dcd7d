"""The page of ``moebert explore`` in a real browser: it answers, asks nobody else, and ends."""

import os
import pickle
import signal
import sys

import numpy as np
import psutil
import pytest
from browser import SLIDERS, controls, drag, pictures, push, served, tabbed, wait_for_change

COMMAND = [sys.executable, "-m", "moebert_lib", "explore", "--no-browser"]
READY = r"^page +(http://localhost:\d+/)"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A pickle as the release has them: scores of 12 layers of 64 neurons."""
    path = tmp_path_factory.mktemp("release") / "importance_rte.pkl"
    scores = np.random.default_rng(0).gamma(0.5, size=(12, 64))
    order = (-scores).argsort(axis=1)
    held = {"importance": (-np.sort(-scores, axis=1)).tolist(), "idx": order.tolist()}
    path.write_bytes(pickle.dumps(held))
    return path


@pytest.fixture(scope="module")
def address(release, tmp_path_factory):
    """A page that shows the release's file beside a model scored at scale smoke."""
    home = {"MOEBERT_HOME": str(tmp_path_factory.mktemp("home"))}
    command = [*COMMAND, str(release), "--scale", "smoke"]
    with served(command, ready=READY, env=os.environ | home) as (address, _):
        yield address


@pytest.fixture
def explorer(address, page, watch):
    """The page, once its sliders and its picture are there."""
    page.goto(address, timeout=60_000)  # the first visit starts a kernel
    page.locator(SLIDERS).first.wait_for(timeout=60_000)
    return page


def test_a_key_and_a_drag_change_the_picture_and_nothing_else_is_asked(explorer, watch):
    for move in (push, lambda slider: drag(explorer, slider, 20)):
        for slider in explorer.locator(SLIDERS).all():
            before = pictures(explorer)
            move(slider)
            wait_for_change(explorer, before)
    assert watch.problems() == []


def test_every_control_is_reached_by_tab(explorer):
    wanted = controls(explorer)
    assert len(wanted) > 5 and wanted <= set(tabbed(explorer))


def test_another_source_can_be_chosen_and_no_code_is_seen(explorer, watch, release):
    column = explorer.get_by_role("combobox").first
    first, second = column.locator("option").all_inner_texts()[:2]
    assert first == release.name and second.startswith("library")
    before = pictures(explorer)
    column.select_option(second)
    wait_for_change(explorer, before)
    assert explorer.title() == explorer.get_by_role("heading", level=1).inner_text()
    assert "import " not in explorer.locator("body").inner_text()
    assert watch.problems() == []


def test_a_click_on_a_neuron_shows_the_tokens_that_excite_it(explorer, watch):
    explorer.get_by_text("Tokens that excite it most").wait_for()
    name = explorer.locator(".neuron b")  # of the model; the file has no tokens
    before, box = name.inner_text(), explorer.locator("canvas").first.bounding_box()
    explorer.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 0.2 * box["height"])
    changed = "text => document.querySelector('.neuron b').innerText !== text"
    explorer.wait_for_function(changed, arg=before)
    explorer.mouse.move(5, 5)  # what was clicked stays
    explorer.wait_for_timeout(500)
    assert name.inner_text() != before and explorer.locator("mark").first.inner_text().strip()
    assert watch.problems() == []


def test_ctrl_c_ends_it_and_leaves_no_process(release, page):
    with served([*COMMAND, str(release)], ready=READY) as (address, process):
        page.goto(address, timeout=60_000)  # the first visit starts a kernel
        page.locator(SLIDERS).first.wait_for(timeout=60_000)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert children and process.wait(timeout=30) == 0
        assert psutil.wait_procs(children, timeout=10)[1] == []
