"""The forest of claims draws every pair, the interval only where one is due, and the paper."""

import numpy as np
import pandas as pd
import pytest

from moebert_lib import claims, verdicts
from moebert_lib.plots import COLORS
from moebert_lib.plots_claims import forest


def made(**arms):
    """Scores of arms given as points, seed by seed."""
    rows = [(name.replace("_", " "), "library", seed, score / 100)
            for name, scores in arms.items() for seed, score in enumerate(scores)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["arm", "task", "seed", "score"])
    return verdicts.compare(frame), claims.pairs(frame)


def marks(ax, marker):
    lines = [line for line in ax.get_lines() if line.get_marker() == marker]
    return np.concatenate([np.atleast_1d(line.get_xdata()) for line in lines]).tolist()


def test_every_pair_is_a_point_and_every_comparison_has_the_papers_diamond():
    compared, pairs = made(importance=[65, 62, 64], random=[60, 60, 61])
    ax = forest(compared, pairs)
    assert sorted(marks(ax, "o")) == pytest.approx([2, 3, 5])
    assert marks(ax, "D") == pytest.approx(compared["paper"].tolist())
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == compared["comparison"].tolist()


@pytest.mark.parametrize("n, drawn", [(3, 0), (6, 1)])
def test_an_interval_is_drawn_from_five_pairs_on(n, drawn):
    compared, pairs = made(importance=60 + np.arange(n) % 3, random=[59] * n)
    ax = forest(compared, pairs)
    (row,) = compared[compared["pairs"] > 0].itertuples()
    intervals = [line for line in ax.get_lines() if list(line.get_xdata()) == [row.low, row.high]]
    assert len(intervals) == drawn


def test_verdicts_are_written_in_their_colours_and_all_data_is_inside():
    compared, pairs = made(importance=[90, 91, 92], random=[60, 62, 61], inverse=[70, 71, 73])
    ax = forest(compared, pairs, title="found")
    colors = {text.get_text(): text.get_color() for text in ax.texts}
    assert colors["reproduced"] == COLORS["importance"]
    assert colors["not reproduced"] == COLORS["inverse"]
    assert {"no runs", "reproduced", "not reproduced"} == set(colors)
    assert ax.get_xlim()[0] < pairs["difference"].min() and ax.get_xlim()[1] > 32
    assert ax.get_title(loc="left").startswith("found")


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
