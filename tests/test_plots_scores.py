"""Figures about other scores draw the numbers they are given."""

import numpy as np
import pandas as pd

from moebert_lib.plots import importance as drawn
from moebert_lib.plots.style import COLORS, INK, MARKERS

PAIRS = pd.DataFrame(
    {
        "score": ["importance", "importance", "taylor"],
        "other": ["taylor", "random", "random"],
        "rho": [0.9, -0.1, 0.0],
        "overlap": [0.75, 0.25, 0.3],
    }
)


def test_each_pair_stands_below_the_diagonal_by_rank_and_above_it_by_overlap():
    ax = drawn.score_agreement(PAIRS, top=2, chance=0.25)
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    texts = {(int(x), int(y)): text for (x, y), text in texts.items()}  # (column, row)
    assert texts == {
        (0, 1): "0.90",
        (0, 2): "\u22120.10",
        (1, 2): "0.00",
        (1, 0): "75%",
        (2, 0): "25%",
        (2, 1): "30%",
    }
    values = np.ma.filled(ax.collections[0].get_array(), np.nan).reshape(3, 3)
    assert values[1, 0] == 0.9 and values[0, 1] == 0.75 and values[2, 0] == -0.1
    assert ax.collections[0].get_clim() == (0, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["Eq. 4", "taylor", "random"]
    assert "25%" in ax.get_xlabel()


def test_every_other_score_has_a_panel_with_importance_and_chance():
    rows = [
        (name, 0, f, 0.9 - f * k)
        for k, name in enumerate(("importance", "weight", "wanda"), 1)
        for f in (0.0, 0.25)
    ]
    rows += [("random", draw, f, 0.5 + draw / 10) for draw in (0, 1) for f in (0.0, 0.25)]
    frame = pd.DataFrame(rows, columns=["order", "draw", "fraction", "f1"])
    figure = drawn.score_removal(frame, metric="f1")
    places = figure.axes
    assert [ax.get_title(loc="left") for ax in places] == ["weight", "wanda"]
    for k, ax in enumerate(places, 2):
        heights = {
            line.get_color() + line.get_marker(): list(line.get_ydata())
            for line in ax.get_lines()
            if line.get_marker() != "None"
        }
        np.testing.assert_allclose(heights.pop(f"{INK}D"), [90, 90 - 25 * k])
        paper = heights.pop(COLORS["importance"] + MARKERS["importance"])
        np.testing.assert_allclose(paper, [90, 65])
        np.testing.assert_allclose(heights.pop(COLORS["random"] + MARKERS["random"]), [55, 55])
        assert not heights
