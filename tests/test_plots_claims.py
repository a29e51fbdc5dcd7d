"""The forest of claims draws every pair, the interval that decides, and the paper."""

import numpy as np
import pandas as pd
import pytest
from drawings import drawn_points
from matplotlib.collections import LineCollection

from moebert_lib.evidence import claims, verdicts
from moebert_lib.plots.results import forest
from moebert_lib.plots.style import COLORS


def made(**arms):
    """Scores of arms given as points, seed by seed."""
    rows = [
        (name.replace("_", " "), "library", seed, score / 100)
        for name, scores in arms.items()
        for seed, score in enumerate(scores)
    ]
    frame = pd.DataFrame(rows, columns=["arm", "task", "seed", "score"])
    return verdicts.compare(frame), claims.pairs(frame)


def marks(ax, marker):
    lines = [line for line in ax.get_lines() if line.get_marker() == marker]
    return np.concatenate([np.atleast_1d(line.get_xdata()) for line in lines]).tolist()


def test_every_pair_is_a_point_and_every_comparison_has_the_papers_diamond():
    compared, pairs = made(importance=[65, 62, 64], random=[60, 60, 61])
    ax = forest(compared, pairs)
    assert sorted(drawn_points(ax)[:, 0]) == pytest.approx([2, 3, 5])
    assert marks(ax, "D") == pytest.approx(compared["paper"].tolist())
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == compared["comparison"].tolist()


def bars(ax):
    """Ends of the horizontal lines that are drawn."""
    lines = [drawn for drawn in ax.collections if isinstance(drawn, LineCollection)]
    ends = [segment for line in lines for segment in line.get_segments()]
    ends = [list(end[:, 0]) for end in ends if end[0, 1] == end[1, 1]]
    return [end for end in ends if np.isfinite(end).all()]


def test_the_mean_is_that_of_the_comparison():
    compared, pairs = made(importance=[65, 62, 64], random=[60, 60, 61])
    ax = forest(compared, pairs)
    (row,) = compared[compared["pairs"] > 0].itertuples()
    lines = [drawn for drawn in ax.collections if isinstance(drawn, LineCollection)]
    ends = [segment for line in lines for segment in line.get_segments()]
    assert [end[0, 0] for end in ends if end[0, 0] == end[1, 0]] == [row.mean]


@pytest.mark.parametrize("n", [2, 3, 6])
def test_the_interval_that_decides_is_drawn_whole(n):
    compared, pairs = made(importance=60 + np.arange(n) % 3, random=[59] * n)
    ax = forest(compared, pairs)
    (row,) = compared[compared["pairs"] > 0].itertuples()
    assert bars(ax) == [[row.low, row.high]]
    assert ax.get_xlim()[0] < row.low and row.high < ax.get_xlim()[1]
    told = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "mean, and the 95% interval that decides" in told


def test_one_pair_and_equal_pairs_have_no_interval():
    for scores in ([60], [60, 60, 60]):
        compared, pairs = made(importance=scores, random=[59] * len(scores))
        assert bars(forest(compared, pairs)) == []


def test_verdicts_are_written_in_their_colours_and_all_data_is_inside():
    compared, pairs = made(importance=[90, 91, 92], random=[60, 62, 61], inverse=[70, 71, 73])
    ax = forest(compared, pairs, title="found")
    colors = {text.get_text(): text.get_color() for text in ax.texts}
    assert colors["reproduced"] == COLORS["importance"]
    assert colors["not reproduced"] == COLORS["inverse"]
    assert {"no runs", "reproduced", "not reproduced"} == set(colors)
    assert ax.get_xlim()[0] < pairs["difference"].min() and ax.get_xlim()[1] > 32
    assert ax.get_figure().get_suptitle().startswith("found")


def test_without_runs_the_paper_is_drawn_alone():
    compared, pairs = made()
    assert marks(forest(compared, pairs), "D") == pytest.approx(compared["paper"].tolist())


def test_the_shade_is_where_the_claim_lies():
    compared, pairs = made()
    ax = forest(compared, pairs)
    bars = dict(zip(compared["comparison"], ax.patches, strict=True))
    assert bars["importance > random"].get_x() == 0
    equal = bars["every other layer ~ all layers"]
    assert (equal.get_x(), equal.get_width()) == (-0.5, 1.0)
    assert bars["MoEBERT ≥ its BERT"].get_x() == -0.5
