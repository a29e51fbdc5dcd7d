"""Figures of states join each student's state with its teacher's, in axes that do not move."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moebert_lib.plots import training as drawn
from moebert_lib.training.evaluation import planes


@pytest.fixture
def frame(rng):
    names = ("teacher", "converted", "distilled")
    return planes({name: rng.normal(size=(10, 5, 4)) for name in names})


@pytest.fixture
def distances():
    apart = pd.DataFrame({"converted": np.arange(10.0), "distilled": np.arange(10.0) / 2})
    apart = apart.rename_axis("layer").reset_index()
    return apart.melt("layer", var_name="stage", value_name="distance")


def test_a_line_joins_every_sentences_two_states(frame):
    lines, student, teacher = drawn.plane(
        frame, layer=3, stage="converted", ax=plt.subplots()[1]
    ).get_lines()
    ends = np.column_stack(lines.get_data()).reshape(5, 3, 2)  # the third breaks the line
    assert np.array_equal(ends[:, 0], np.column_stack(teacher.get_data()))
    assert np.array_equal(ends[:, 1], np.column_stack(student.get_data()))
    assert np.isnan(ends[:, 2]).all() and student.get_markerfacecolor() == "white"


def test_before_and_after_are_drawn_in_the_same_axes_and_nothing_is_cut_off(frame):
    sides = [
        drawn.plane(frame, layer=2, stage=stage, ax=plt.subplots()[1])
        for stage in ("converted", "distilled")
    ]
    assert sides[0].get_xlim() == sides[1].get_xlim() and sides[0].get_ylim() == sides[1].get_ylim()
    at = frame[frame["layer"] == 2]
    assert at["x"].between(*sides[0].get_xlim()).all()
    assert at["y"].between(*sides[0].get_ylim()).all()


def test_a_ring_marks_the_layers_distance(frame, distances):
    _, axs = plt.subplots(1, 2)
    drawn.step(frame, distances, layer=4, stage="distilled", axs=axs, title="x")
    ring = axs[1].get_lines()[-1]
    assert ([*ring.get_xdata()], [*ring.get_ydata()]) == ([4], [2.0])


def test_a_deep_model_shows_seven_layers_first_and_last_among_them(frame, distances):
    panels = drawn.steps(frame, distances, title="x").axes
    titles = [ax.get_title() for ax in panels[:7]]
    assert len(panels) == 14 and titles[0] == "embeddings" and titles[-1] == "layer 9"
    assert [ax.get_xlabel() for ax in (panels[6], panels[13])] == ["9", "4.5"]
