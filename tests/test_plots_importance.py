"""Figures about importance draw the numbers they are given."""

import numpy as np
import pandas as pd
import pytest
from drawings import drawn_points

from moebert_lib.plots import importance as drawn

SCORES = np.array([[1.0, 8.0, 4.0, 2.0], [1.0, 1.0, 1.0, 5.0]])


def curve(scores, **sizes):
    """The panel of a single layer."""
    (ax,) = drawn.sorted_scores([scores], **sizes).axes
    return ax


def test_a_layers_curve_is_its_scores_sorted_down():
    ax = curve(SCORES[0], n_shared=1, n_kept=3)
    assert list(ax.get_lines()[0].get_ydata()) == [8, 4, 2, 1]
    assert ax.get_yscale() == "log"


def test_the_parts_of_a_curve_say_what_share_of_importance_they_hold():
    ax = curve(SCORES[0], n_shared=1, n_kept=3)
    assert [text.get_text() for text in ax.texts] == ["53%", "40%", "7%"]


def test_a_part_without_neurons_is_not_drawn():
    ax = curve(SCORES[0], n_shared=0, n_kept=4)
    assert [text.get_text() for text in ax.texts] == ["100%"]


def test_a_dead_neuron_leaves_a_gap_instead_of_breaking_the_log_axis():
    ax = curve([0.0, 3.0], n_shared=1, n_kept=2)
    assert np.isnan(ax.get_lines()[0].get_ydata()[1])


@pytest.mark.parametrize("n_layers", [1, 2, 6, 12])
def test_every_layer_has_its_panel(n_layers):
    figure = drawn.sorted_scores(np.ones((n_layers, 8)), n_shared=1, n_kept=4)
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes if ax.axison]
    assert titles == [f"layer {n}" for n in range(1, n_layers + 1)]


def test_mass_held_is_the_running_share_of_the_sorted_scores():
    ax = drawn.mass_held(SCORES, marks={"shared": 1})
    curves = [line.get_ydata() for line in ax.get_lines() if len(line.get_xdata()) == 5]
    expected = 100 * np.array([[0, 8, 12, 14, 15], [0, 5, 6, 7, 8]]) / [[15], [8]]
    np.testing.assert_allclose(sorted(map(list, curves)), sorted(map(list, expected)))


def test_removal_draws_every_random_draw_and_their_mean():
    rows = [(f, a, "random", d) for d, a in enumerate((0.4, 0.6)) for f in (0.0, 0.5)]
    rows += [(f, 0.7, "least important first", 0) for f in (0.0, 0.5)]
    frame = pd.DataFrame(rows, columns=["fraction", "accuracy", "order", "draw"])
    ax = drawn.removal_curves(frame, chance=0.25)
    heights = [list(line.get_ydata()) for line in ax.get_lines()]
    assert heights == [[40, 40], [60, 60], [70, 70], [50, 50], [], [25, 25]]
    assert list(ax.get_lines()[0].get_xdata()) == [0, 50]


def test_removal_draws_the_metric_that_is_asked_for():
    rows = [(0.0, 0.5, "random", 0), (0.5, 0.1, "random", 0)]
    frame = pd.DataFrame(rows, columns=["fraction", "matthews", "order", "draw"])
    ax = drawn.removal_curves(frame, metric="matthews")
    (line,) = [line for line in ax.get_lines() if len(line.get_xdata())]
    assert list(line.get_ydata()) == [50, 10]
    assert ax.get_ylabel() == "matthews, %"


@pytest.fixture
def stable():
    """Both panels: two draws for each of two layers and numbers of examples; two intervals."""
    agreement = pd.DataFrame(
        [(n, layer, 0.1 * layer + d / 10, d) for n in (8, 64) for layer in (1, 2) for d in (0, 2)],
        columns=["n_examples", "layer", "agreement", "draw"],
    )
    overlap = pd.DataFrame({"layer": [1, 2], "overlap": [0.8, 0.9], "low": [0.7, 0.85], "high": 1})
    return drawn.stability(agreement, overlap, chance=0.1).axes


def test_stability_draws_every_draw_and_the_mean_of_each_layer(stable):
    left, _ = stable
    np.testing.assert_allclose(drawn_points(left)[:4, 1], [0.1, 0.3, 0.2, 0.4])
    means = [line.get_xydata().tolist() for line in left.get_lines() if len(line.get_xdata())]
    np.testing.assert_allclose(means, [[[8, 0.2], [64, 0.2]], [[8, 0.3], [64, 0.3]]])


def test_stability_draws_each_interval_and_the_chance_level(stable):
    _, right = stable
    intervals = [segment[:, 1].tolist() for segment in right.collections[0].get_segments()]
    np.testing.assert_allclose(intervals, [[70, 100], [85, 100]])
    np.testing.assert_allclose(right.get_lines()[0].get_ydata(), [80, 90])
    assert right.get_lines()[1].get_ydata()[0] == 10


def test_task_overlap_prints_each_pair_once():
    names = ["a", "b", "c"]
    table = pd.DataFrame([[1, 0.2, 0.3], [0.2, 1, 0.4], [0.3, 0.4, 1]], names, names)
    ax = drawn.task_overlap(table, chance=0.1)
    assert [text.get_text() for text in ax.texts] == ["0.20", "0.30", "0.40"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "c"]


def test_halves_of_one_task_set_the_top_of_the_scale():
    table = pd.DataFrame([[1, 0.2], [0.2, 1]], ["a", "b"], ["a", "b"])
    ax = drawn.task_overlap(table, chance=0.1, halves=0.8)
    assert ax.collections[0].get_clim() == (0, 0.8)
    assert "0.80" in ax.get_xlabel() and "0.10" in ax.get_xlabel()
