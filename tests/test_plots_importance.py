"""Figures about importance draw the numbers they are given."""

import numpy as np
import pandas as pd
import pytest

from moebert_lib.plots import importance as drawn

SCORES = np.array([[1.0, 8.0, 4.0, 2.0], [1.0, 1.0, 1.0, 5.0]])


def test_a_layers_curve_is_its_scores_sorted_down():
    ax = drawn.score_curve(SCORES[0], n_shared=1, n_kept=3)
    assert list(ax.get_lines()[0].get_ydata()) == [8, 4, 2, 1]
    assert ax.get_yscale() == "log"


def test_the_parts_of_a_curve_say_what_share_of_importance_they_hold():
    ax = drawn.score_curve(SCORES[0], n_shared=1, n_kept=3)
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["shared\n53%", "own\n40%", "dropped\n7%"]


def test_a_part_without_neurons_is_not_drawn():
    ax = drawn.score_curve(SCORES[0], n_shared=0, n_kept=4)
    assert [text.get_text() for text in ax.texts] == ["own\n100%"]


def test_a_dead_neuron_leaves_a_gap_instead_of_breaking_the_log_axis():
    ax = drawn.score_curve([0.0, 3.0], n_shared=1, n_kept=2)
    assert np.isnan(ax.get_lines()[0].get_ydata()[1])


@pytest.mark.parametrize("n_layers", [1, 2, 6, 12])
def test_every_layer_has_its_panel(n_layers):
    figure = drawn.sorted_scores(np.ones((n_layers, 8)), n_shared=1, n_kept=4)
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes if ax.axison]
    assert titles == [f"layer {n}" for n in range(1, n_layers + 1)]


def test_mass_held_is_the_running_share_of_the_sorted_scores():
    ax = drawn.mass_held(SCORES, marks={"shared": 1})
    layers = [line for line in ax.get_lines() if line.get_label().startswith("layer")]
    np.testing.assert_allclose(layers[0].get_ydata(), 100 * np.array([0, 8, 12, 14, 15]) / 15)
    np.testing.assert_allclose(layers[1].get_ydata(), 100 * np.array([0, 5, 6, 7, 8]) / 8)


def test_removal_draws_every_random_draw_and_their_mean():
    rows = [(f, a, "random", d) for d, a in enumerate((0.4, 0.6)) for f in (0.0, 0.5)]
    rows += [(f, 0.7, "least important first", 0) for f in (0.0, 0.5)]
    frame = pd.DataFrame(rows, columns=["fraction", "accuracy", "order", "draw"])
    ax = drawn.removal_curves(frame, chance=0.25)
    heights = [list(line.get_ydata()) for line in ax.get_lines()]
    assert heights == [[70, 70], [40, 40], [60, 60], [50, 50], [25, 25]]
    assert list(ax.get_lines()[0].get_xdata()) == [0, 50]


def test_removal_draws_the_metric_that_is_asked_for():
    rows = [(0.0, 0.5, "random", 0), (0.5, 0.1, "random", 0)]
    frame = pd.DataFrame(rows, columns=["fraction", "matthews", "order", "draw"])
    ax = drawn.removal_curves(frame, metric="matthews")
    assert list(ax.get_lines()[0].get_ydata()) == [50, 10]
    assert ax.get_ylabel() == "matthews, %"


def test_rank_agreement_draws_every_draw_and_the_mean_of_each_layer():
    frame = pd.DataFrame(
        [(n, layer, 0.1 * layer + d / 10, d) for n in (8, 64) for layer in (1, 2) for d in (0, 2)],
        columns=["n_examples", "layer", "agreement", "draw"],
    )
    draws, mean, *_ = drawn.rank_agreement(frame).get_lines()
    np.testing.assert_allclose(draws.get_ydata(), [0.1, 0.3, 0.1, 0.3])
    np.testing.assert_allclose(mean.get_ydata(), [0.2, 0.2])
    assert list(mean.get_xdata()) == [8, 64]


def test_topk_overlap_draws_each_interval_and_the_chance_level():
    frame = pd.DataFrame({"layer": [1, 2], "overlap": [0.8, 0.9], "low": [0.7, 0.85], "high": 1.0})
    ax = drawn.topk_overlap(frame, chance=0.1)
    intervals = [segment[:, 1].tolist() for segment in ax.collections[0].get_segments()]
    np.testing.assert_allclose(intervals, [[70, 100], [85, 100]])
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [80, 90])
    assert ax.get_lines()[1].get_ydata()[0] == 10


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
    assert ax.get_images()[0].get_clim() == (0, 0.8)
