"""Figures about distillation draw losses, distances and scores as they are."""

import numpy as np
import pandas as pd
import pytest
import torch
from drawings import drawn_points
from transformers.trainer_pt_utils import get_length_grouped_indices

from moebert_lib.config.settings import Settings
from moebert_lib.plots import training as drawn


def test_hidden_distance_joins_the_mean_of_each_stage_hollow_before_filled_after():
    rows = [(n, d * n, s) for s, d in (("converted", 2.0), ("distilled", 1.0)) for n in (0, 1, 2)]
    frame = pd.DataFrame(rows, columns=["layer", "distance", "stage"])
    before, after = (x for x in drawn.hidden_distance(frame).get_lines() if len(x.get_xdata()))
    assert list(before.get_ydata()) == [0, 2, 4] and list(after.get_ydata()) == [0, 1, 2]
    assert before.get_markerfacecolor() == "white" != after.get_markerfacecolor()


def test_hidden_distance_draws_every_seed_when_there_are_several():
    frame = pd.DataFrame({"layer": [0, 0], "distance": [1.0, 3.0], "stage": "distilled"})
    ax = drawn.hidden_distance(frame)
    assert list(ax.get_lines()[0].get_ydata()) == [2]
    assert drawn_points(ax)[:, 1].tolist() == [1, 3]


def test_learning_curve_draws_every_step_and_leaves_out_terms_that_are_zero():
    frame = pd.DataFrame({"step": [1, 2, 3], "task": [3.0, 2.0, 1.0], "hidden": 0.0, "total": 4.0})
    ax = drawn.learning_curve(frame)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["total", "task"]
    assert list(ax.get_lines()[2].get_ydata()) == [3, 2, 1]


def test_the_strong_line_is_the_running_mean():
    frame = pd.DataFrame({"step": range(1, 41), "total": np.tile([1.0, 3.0], 20)})
    smooth = drawn.learning_curve(frame).get_lines()[1].get_ydata()
    assert (smooth[1:] == 2).all()  # 40 steps: windows of two


@pytest.mark.parametrize(("n_train", "epochs", "whole"), [(8000, 1, 5), (2500, 2, 8)])
def test_rounds_of_lengths_are_those_that_trainer_deals(n_train, epochs, whole):
    """A loss that is the length alone: whole rounds are equal, tenths of the steps are not."""
    lengths = np.random.default_rng(0).integers(5, 60, n_train)
    loss = []
    for seed in range(epochs):
        random = torch.Generator().manual_seed(seed)
        order = get_length_grouped_indices(lengths.tolist(), 32, generator=random)
        loss += [lengths[order[n : n + 32]].mean() for n in range(0, n_train, 32)]
    curve = pd.DataFrame({"step": range(1, len(loss) + 1), "total": loss})
    means = drawn.rounds(curve, Settings(batch_size=32), n_train)["total"]
    assert len(means) == whole and means.max() / means.min() < 1.1
    tenth = len(loss) // 10
    assert np.mean(loss[:tenth]) > 1.3 * np.mean(loss[-tenth:])


def test_a_run_of_less_than_two_rounds_has_at_most_one():
    curve = pd.DataFrame({"step": range(1, 9), "total": 1.0})
    assert len(drawn.rounds(curve, Settings(batch_size=32), 4000)) == 0
    assert len(drawn.rounds(curve, Settings(tokens_per_batch=512), 4000)) == 8


def test_ladder_joins_the_runs_of_each_seed_in_the_order_of_stages():
    rows = [(s, k, a + k / 4) for k in (0, 1) for s, a in (("dense", 0.5), ("converted", 0.25))]
    frame = pd.DataFrame(rows, columns=["stage", "seed", "accuracy"])
    ax = drawn.ladder(frame)
    lines = [list(line.get_ydata()) for line in ax.get_lines()]
    assert lines == [[50, 25], [75, 50], [62.5, 37.5]]  # two seeds, and the means
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["dense\n62.5", "converted\n37.5"]
