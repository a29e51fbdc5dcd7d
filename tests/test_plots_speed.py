"""Figures about speed draw every timing, and name the models at their lines."""

import pandas as pd
import pytest

from moebert_lib import plots_speed as drawn


def test_speed_draws_every_timing_from_zero_with_the_limit_as_a_line():
    frame = pd.DataFrame(
        [("dense", 0.5), ("dense", 0.25), ("equal FLOPs", 0.125), ("moebert gate-sentence", 0.2)],
        columns=["variant", "seconds"],
    )
    ax = drawn.speed(frame, ratios={"moebert gate-sentence": 2.0})
    points = [list(line.get_xdata()) for line in ax.get_lines() if line.get_marker() == "o"]
    assert points == [[2, 4], [5]]
    assert [line.get_xdata() for line in ax.get_lines() if line.get_marker() == "D"] == [[6]]
    assert [8, 8] in [list(line.get_xdata()) for line in ax.get_lines()]
    assert ax.get_xlim()[0] == 0


def test_latency_draws_milliseconds_and_joins_medians():
    frame = pd.DataFrame(
        [("dense", t, s) for t in (8, 64) for s in (0.001, 0.002, 0.009)],
        columns=["variant", "tokens", "seconds"],
    )
    points, median = drawn.latency(frame).get_lines()
    assert list(points.get_ydata()) == pytest.approx([1, 2, 9, 1, 2, 9])
    assert list(median.get_ydata()) == pytest.approx([2, 2])


@pytest.mark.parametrize("seconds, said", [(0.152, "6.58"), (1 / 13, "13.0"), (1 / 2421, "2,421")])
def test_speed_prints_medians_with_three_digits(seconds, said):
    ax = drawn.speed(pd.DataFrame({"variant": ["dense"], "seconds": [seconds]}))
    assert [text.get_text() for text in ax.texts] == [said]


def test_latency_names_each_model_beside_its_line_in_the_lines_colour():
    rows = [("dense", 0.004), ("moebert hash-random", 0.002), ("half depth", 0.001)]
    frame = pd.DataFrame(rows, columns=["variant", "seconds"]).assign(tokens=8)
    texts = drawn.latency(frame).texts
    assert [t.get_text() for t in texts] == ["half depth", "MoEBERT, hash-random", "dense BERT"]
    assert texts[1].get_color() == drawn.variant_color("moebert hash-random")
