"""Colours that meet in one figure stay apart for every eye, or something else tells them apart."""

import itertools

import numpy as np
import pandas as pd
import pytest
from colour_vision import SIGHTS, distance, lab
from matplotlib.colors import to_hex
from matplotlib.markers import MarkerStyle

from moebert_lib.plots import experts, importance, results, routing
from moebert_lib.plots.style import COLORS, DIAMOND, EXPERTS, MARKERS, depth_colors

APART = 12  # in CIELAB, where about 2 can just be seen
NUMBERED = {f"expert {n}": color for n, color in enumerate(EXPERTS, start=1)}

#: Names of the colours that meet in one figure.
TOGETHER = {
    "ways to split": ["importance", "random", "inverse", "dense"],
    "fates of a neuron": ["shared", "own", "dropped", "dense"],
    "models": ["moebert", "dense", "other"],
    "verdicts": ["moebert", "inverse", "random", "dense"],
    "ours and the paper's": ["moebert", "dense", "random", "paper"],
    "the paper's four experts": ["shared", "dropped", *list(NUMBERED)[:4]],
    "eight experts": ["shared", "dropped", *NUMBERED],
}

#: Pairs that grey print brings together; the tests below say what tells them apart then.
BACKED = {
    frozenset({"importance", "inverse"}),  # by their marks
    frozenset({"moebert", "inverse"}),  # verdicts: by their words
    frozenset({"moebert", "paper"}),  # by the hollow diamond
}


def near(names, sight, palette=COLORS | NUMBERED):
    """Pairs of names whose colours are closer than ``APART`` as a sight has them."""
    pairs = itertools.combinations(names, 2)
    return {frozenset(p) for p in pairs if distance(*(palette[n] for n in p), sight) < APART}


def shape(marker):
    """A marker's outline."""
    style = MarkerStyle(marker)
    return tuple(style.get_path().transformed(style.get_transform()).vertices.round(3).ravel())


def numbered(pair):
    """Whether an expert is in a pair: experts are told apart by their number."""
    return any(name in NUMBERED for name in pair)


@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
@pytest.mark.parametrize("sight", [sight for sight in SIGHTS if sight != "grey print"])
def test_no_eye_takes_two_colours_of_one_figure_for_each_other(names, sight):
    assert near(names, sight) == set()


@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
def test_grey_print_brings_together_only_what_something_else_tells_apart(names):
    left = {pair for pair in near(names, "grey print") if not numbered(pair)}
    assert left <= BACKED


def test_every_exception_is_needed():
    found = set().union(*(near(names, "grey print") for names in TOGETHER.values()))
    assert found >= BACKED


def test_a_pink_and_a_green_that_only_full_sight_tells_apart_would_be_found():
    palette = {"pink": "#D98BA3", "green": "#8FD3B6"}
    assert near(palette, "full sight", palette) == set()
    assert near(palette, "deuteranopia", palette) == {frozenset(palette)}


@pytest.mark.parametrize("sight", SIGHTS)
def test_black_white_and_grey_look_the_same_to_every_eye(sight):
    assert distance("black", "white", sight) == pytest.approx(100, abs=0.1)
    np.testing.assert_allclose(lab("#777777", sight), lab("#777777"), atol=0.1)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("n_layers", [6, 12])
def test_layers_get_darker_for_every_eye(n_layers, sight):
    lightness = [lab(color, sight)[0] for color in depth_colors(n_layers)]
    assert max(np.diff(lightness)) < -4


@pytest.mark.parametrize("draw", ["after_conversion", "by_shared", "removal_curves"])
def test_ways_to_split_have_marks_of_their_own(draw):
    module = importance if draw == "removal_curves" else results
    orders = dict(zip(MARKERS, importance.REMOVAL_LOOKS, strict=True))
    frame = pd.DataFrame({"ranking": [*MARKERS], "accuracy": 0.5, "n_shared": 0, "fraction": 0.5})
    frame = frame.assign(order=frame["ranking"].map(orders), draw=0)
    ax = getattr(module, draw)(frame, **({"dense": 0.6} if draw == "after_conversion" else {}))
    lines = [line for line in ax.get_lines() if line.get_marker() in MARKERS.values()]
    marks = {line.get_color(): shape(line.get_marker()) for line in lines}
    for points in ax.collections:
        paths = itertools.cycle(points.get_paths())  # one for all points, or one for each
        for color, path in zip(points.get_facecolors(), paths, strict=False):
            marks[to_hex(color).upper()] = tuple(path.vertices.round(3).ravel())
    assert marks == {COLORS[name]: shape(mark) for name, mark in MARKERS.items()}


def test_the_papers_values_are_the_only_hollow_marks():
    frame = pd.DataFrame({"expert_size": [2, 8], "accuracy": [0.5, 0.6]})
    figure = results.beside_paper(frame, "figure2a", dense=0.7)
    marked = [line for ax in figure.axes for line in ax.get_lines() if line.get_marker() == "D"]
    assert {line.get_markerfacecolor() for line in marked} == {"white"} == {DIAMOND["mfc"]}
    runs = [points for points in figure.axes[0].collections if len(points.get_offsets())]
    assert {to_hex(points.get_facecolor()[0]).upper() for points in runs} == {COLORS["moebert"]}


def test_every_verdict_is_written_in_its_row():
    words = list(results.VERDICTS)
    rows = pd.DataFrame({"claim": words, "comparison": words, "kind": "better", "verdict": words})
    rows = rows.assign(mean=1.0, low=0.5, high=2.0, paper=1.0, pairs=3)
    pairs = pd.DataFrame({"comparison": words, "difference": 1.0})
    ax = results.forest(rows, pairs)
    written = {text.get_text(): text.xy[1] for text in ax.texts}
    assert [written[word] for word in words] == list(ax.get_yticks())


def test_every_expert_has_its_number_wherever_it_has_its_colour():
    hands = np.arange(8)[:, None]
    numbers = [f"expert {n}" for n in range(1, 9)]
    cards = experts.deal(hands, np.arange(8))
    assert set(numbers) <= {text.get_text() for text in cards.texts}
    strips = experts.who_keeps_what(hands, np.arange(8))
    assert [label.get_text() for label in strips.get_yticklabels()] == numbers
    tiles = routing.token_map(["a"] * 8, hands)
    assert [text.get_text() for text in tiles.texts] == [n[-1] for n in numbers]
