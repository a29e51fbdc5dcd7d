"""Figures that compare runs draw every run, the mean, and the paper's own values."""

import numpy as np
import pandas as pd
import pytest

from moebert_lib.config import paper_numbers
from moebert_lib.config.paper_numbers import FIGURES
from moebert_lib.plots import results as drawn


def heights(ax, marker):
    """Vertical positions of all marks of one kind."""
    lines = [line for line in ax.get_lines() if line.get_marker() == marker]
    return np.concatenate([np.atleast_1d(line.get_ydata()) for line in lines]).tolist()


def runs(column, scores):
    return pd.DataFrame(
        [(key, value) for key, values in scores.items() for value in values],
        columns=[column, "accuracy"],
    )


def test_after_conversion_draws_every_split_and_the_dense_line():
    frame = runs("ranking", {"inverse": [0.25], "random": [0.5, 0.375], "importance": [0.75]})
    ax = drawn.after_conversion(frame, dense=0.875, chance=0.125)
    assert [heights(ax, mark) for mark in "os^"] == [[75], [50, 37.5], [25]]
    assert {87.5, 12.5} <= set(heights(ax, "None"))
    words = [label.get_text() for label in ax.get_xticklabels()]
    assert words == ["importance", "random\n(2 runs)", "inverse"]


def test_a_guess_that_is_no_number_is_not_drawn():
    frame = runs("ranking", {"importance": [0.75]})
    bare, blank = (drawn.after_conversion(frame, dense=0.875, chance=c) for c in (None, np.nan))
    assert len(bare.get_lines()) == len(blank.get_lines())


def test_after_conversion_shades_the_interval_it_is_given():
    frame = runs("ranking", {"random": [0.5, 0.25]}).assign(low=0.25, high=0.5)
    ax = drawn.after_conversion(frame, dense=0.75)
    edges = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (25, 50)


def test_constructions_draw_every_run_its_mean_and_where_training_began():
    scores = {"deal": [0.5, 0.75], "random": [0.25, 0.5], "deal, none shared": [0.25, 0.25]}
    frame = runs("name", scores).assign(converted_accuracy=0.125)
    ax = drawn.constructions(frame, dense=0.875)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(scores)
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert [line.get_xdata().tolist() for line in dots] == [[50, 75], [25, 50], [25, 25]]
    assert [line.get_markerfacecolor() == "white" for line in dots] == [False, False, True]
    starts = [line.get_xdata() for line in ax.get_lines() if line.get_marker() == "|"]
    assert np.ravel(starts).tolist() == [12.5] * 3
    means = [text.get_text() for text in ax.texts]
    assert means == ["62.5", "37.5", "25.0", "before conversion"]
    assert ax.yaxis_inverted()  # the first on top


def test_without_training_no_start_is_drawn():
    ax = drawn.constructions(runs("name", {"deal": [0.5]}), dense=0.75)
    assert not [line for line in ax.get_lines() if line.get_marker() == "|"]


def test_by_shared_draws_every_run_and_joins_the_means():
    frame = runs("n_shared", {0: [0.25, 0.5], 256: [0.75]}).assign(ranking="random")
    ax = drawn.by_shared(frame)
    points, mean = ax.get_lines()
    assert [text.get_text() for text in ax.texts] == ["random"]
    assert list(points.get_ydata()) == [25, 50, 75]
    assert list(mean.get_ydata()) == [37.5, 75]


@pytest.mark.parametrize("figure", ["figure2a", "figure2b", "figure2c"])
def test_a_sweep_stands_beside_the_papers_values_as_hollow_diamonds(figure):
    setting = paper_numbers.FIGURE_SETTINGS[figure]
    here, there = drawn.beside_paper(runs(setting, {8: [0.5, 0.75], 2: [0.25]}), figure).axes
    assert heights(here, "o") == [25, 50, 75]
    assert heights(there, "D") == list(FIGURES[figure].values())
    assert {line.get_markerfacecolor() for line in there.get_lines()} == {"white"}
    assert [label.get_text() for label in here.get_xticklabels()] == ["2", "8"]


def test_names_follow_the_papers_order_with_others_after_them():
    scores = {"gate-token": [0.5], "hash-balance": [0.5], "hash-random": [0.25]}
    here, there = drawn.beside_paper(runs("routing", scores), "figure3c").axes
    words = [label.get_text().replace("\n", "") for label in here.get_xticklabels()]
    assert words == ["hash-random", "hash-balance", "gate-token"]
    assert all(line.get_linestyle() == "None" for line in there.get_lines())


def test_both_panels_span_the_same_number_of_points_and_hold_all_data():
    frame = runs("ranking", {"importance": [0.8, 0.7], "random": [0.3]})
    here, there = drawn.beside_paper(frame, "figure3a", dense=0.9).axes
    spans = [np.ptp(ax.get_ylim()) for ax in (here, there)]
    assert spans[0] == pytest.approx(spans[1])
    assert here.get_ylim()[0] < 30 and here.get_ylim()[1] > 90


@pytest.mark.parametrize("scores, side", [([0.2, 0.5], "right"), ([0.6, 0.3], "left")])
def test_words_on_the_line_stand_where_the_points_leave_room(scores, side):
    frame = pd.DataFrame({"expert_size": [2, 8], "accuracy": scores})
    here, _ = drawn.beside_paper(frame, "figure2a", dense=0.25).axes
    words = next(text for text in here.texts if text.get_text() == "before conversion")
    assert words.get_ha() == side
