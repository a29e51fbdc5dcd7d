"""Figures that compare runs draw every run, the mean, and the paper's own values."""

import numpy as np
import pandas as pd
import pytest
from drawings import drawn_bars, drawn_points
from matplotlib.collections import PolyCollection

from moebert_lib.config import paper_numbers
from moebert_lib.config.paper_numbers import FIGURES
from moebert_lib.plots import results as drawn


def heights(ax, marker):
    """Vertical positions of all marks of one kind that are lines."""
    lines = [line for line in ax.get_lines() if line.get_marker() == marker]
    return np.concatenate([np.atleast_1d(line.get_ydata()) for line in lines]).tolist()


def points(ax):
    """The values of all runs, by the number of their category."""
    return [(round(x), y) for x, y in drawn_points(ax).tolist()]


def runs(column, scores):
    return pd.DataFrame(
        [(key, value) for key, values in scores.items() for value in values],
        columns=[column, "accuracy"],
    )


def test_after_conversion_draws_every_split_and_the_dense_line():
    frame = runs("ranking", {"inverse": [0.25], "random": [0.5, 0.375], "importance": [0.75]})
    ax = drawn.after_conversion(frame, dense=0.875, chance=0.125)
    assert points(ax) == [(0, 75), (1, 50), (1, 37.5), (2, 25)]
    assert drawn_bars(ax, rows=False) == [(1, 43.75)]
    assert {87.5, 12.5} <= set(heights(ax, "None"))
    words = [label.get_text().partition("\n") for label in ax.get_xticklabels()]
    assert [name for name, *_ in words] == ["importance", "random", "inverse"]
    assert words[1][2] == "mean 43.8 (n = 2)"


def test_a_guess_that_is_no_number_is_not_drawn():
    frame = runs("ranking", {"importance": [0.75]})
    bare, blank = (drawn.after_conversion(frame, dense=0.875, chance=c) for c in (None, np.nan))
    assert len(bare.get_lines()) == len(blank.get_lines())


def test_after_conversion_shades_the_interval_it_is_given():
    frame = runs("ranking", {"random": [0.5, 0.25]}).assign(low=0.25, high=0.5)
    ax = drawn.after_conversion(frame, dense=0.75)
    (shade,) = [drawn for drawn in ax.collections if isinstance(drawn, PolyCollection)]
    edges = shade.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (25, 50)


def test_constructions_draw_every_run_its_mean_and_where_training_began():
    scores = {"deal": [0.5, 0.75], "random": [0.25, 0.5], "deal, none shared": [0.25, 0.25]}
    frame = runs("name", scores).assign(converted_accuracy=0.125)
    ax = drawn.constructions(frame, dense=0.875)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["deal   62.5", "random   37.5", "deal, none shared   25.0"]
    assert drawn_points(ax)[:, 0].tolist() == [50, 75, 25, 50, 25, 25]
    bars = drawn_bars(ax, rows=True)
    assert bars[:3] == [(0, 62.5), (1, 37.5), (2, 25)]
    assert bars[3:] == [(0, 12.5), (1, 12.5), (2, 12.5)]  # where training began
    assert ax.yaxis_inverted()  # the first on top


def test_without_training_no_start_is_drawn():
    ax = drawn.constructions(runs("name", {"deal": [0.5]}), dense=0.75)
    assert drawn_bars(ax, rows=True) == []


def test_by_shared_draws_every_run_and_joins_the_means():
    frame = runs("n_shared", {0: [0.25, 0.5], 256: [0.75]}).assign(ranking="random")
    ax = drawn.by_shared(frame)
    assert [text.get_text() for text in ax.texts] == ["random"]
    assert drawn_points(ax)[:, 1].tolist() == [25, 50, 75]
    assert list(ax.get_lines()[0].get_ydata()) == [37.5, 75]


def test_sharing_is_told_with_the_fewest_and_the_most_shared():
    both = {"importance": {0: [0.5], 8: [0.75]}, "random": {0: [0.6], 8: [0.5]}}
    frame = pd.concat([runs("n_shared", s).assign(ranking=name) for name, s in both.items()])
    told = drawn.sharing_in_words(frame, "accuracy")
    assert "0 shared neurons, importance scores 10.0 points below random" in told
    assert told.endswith("with 8, 25.0 points above random")


@pytest.mark.parametrize("figure", ["figure2a", "figure2b", "figure2c"])
def test_a_sweep_stands_beside_the_papers_values_as_hollow_diamonds(figure):
    setting = paper_numbers.FIGURE_SETTINGS[figure]
    here, there = drawn.beside_paper(runs(setting, {8: [0.5, 0.75], 2: [0.25]}), figure).axes
    assert points(here) == [(0, 25), (1, 50), (1, 75)]
    assert heights(there, "D") == list(FIGURES[figure].values())
    assert {line.get_markerfacecolor() for line in there.get_lines()} == {"white"}
    labels = [label.get_text() for label in here.get_xticklabels()]
    assert labels == ["2\n25.0", "8\n62.5"]


def test_names_follow_the_papers_order_with_others_after_them():
    scores = {"gate-token": [0.5], "hash-balance": [0.5], "hash-random": [0.25]}
    here, there = drawn.beside_paper(runs("routing", scores), "figure3c").axes
    words = [label.get_text().replace("\n", "") for label in here.get_xticklabels()]
    assert words == ["hash-random25.0", "hash-balance50.0", "gate-token50.0"]
    assert all(line.get_linestyle() == "None" for line in there.get_lines())


def test_both_panels_span_the_same_number_of_points_and_hold_all_data():
    frame = runs("ranking", {"importance": [0.8, 0.7], "random": [0.3]})
    here, there = drawn.beside_paper(frame, "figure3a", dense=0.9).axes
    spans = [np.ptp(ax.get_ylim()) for ax in (here, there)]
    assert spans[0] == pytest.approx(spans[1])
    assert here.get_ylim()[0] < 30 and here.get_ylim()[1] > 90


def test_gaps_draw_the_paper_hollow_and_every_run_of_ours():
    rows = [
        ("RTE", 10.5, "paper"),
        ("SST-2", 0.1, "paper"),
        ("SST-2", -1.0, "here"),
        ("SST-2", 2.0, "here"),
    ]
    frame = pd.DataFrame(rows, columns=["task", "gap", "source"])
    ax = drawn.gaps(frame)
    _, paper, here = ax.get_lines()
    assert list(paper.get_xdata()) == [10.5, 0.1] and paper.get_markerfacecolor() == "white"
    assert list(here.get_xdata()) == [-1, 2] and list(here.get_ydata()) == [1, 1]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["RTE", "SST-2"]
    told = drawn.gaps_in_words(frame)
    assert "0 of 1 results here" in told and "0 of 2 in the paper" in told


def test_switches_draw_every_pair_and_its_mean_on_both_sides_of_zero():
    frame = pd.DataFrame({"switch": [*"aab"], "difference": [-1.0, -2.0, 0.5]})
    ax = drawn.switches(frame)
    assert drawn_points(ax)[:, 0].tolist() == [-1, -2, 0.5]
    assert drawn_bars(ax, rows=True) == [(0, -1.5)]
    low, high = ax.get_xlim()
    assert low == -high < -2
