"""Figures about speed draw every timing, and name the models at their lines."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from drawings import drawn_points

from moebert_lib.plots import speed as drawn


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def timed(*rows):
    return pd.DataFrame(rows, columns=["variant", "seconds"])


def dashed(ax):
    """Values of the dashed vertical lines."""
    return [line.get_xdata()[0] for line in ax.get_lines() if line.get_linestyle() == "--"]


def rows(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_speed_draws_every_timing_from_zero_with_the_limit_as_a_line():
    frame = timed(
        ("dense", 0.5), ("dense", 0.25), ("equal FLOPs", 0.125), ("moebert gate-sentence", 0.2)
    )
    (ax,) = drawn.speed(frame, ratios={"moebert gate-sentence": 2.0}).axes
    assert drawn_points(ax)[:, 0].tolist() == [2, 4, 5]
    assert [line.get_xdata() for line in ax.get_lines() if line.get_marker() == "D"] == [[6]]
    assert dashed(ax) == [8]
    assert ax.get_xlim()[0] == 0 and ax.get_xlim()[1] > 8


def test_each_code_has_a_panel_with_a_limit_of_its_own():
    frame = timed(
        ("dense", 1.0),
        ("equal FLOPs", 0.5),
        ("dense, accelerated", 0.5),
        ("equal FLOPs, accelerated", 0.25),
        ("half depth", 0.5),
    )
    left, right = drawn.speed(frame).axes
    titles = [ax.get_title(loc="left") for ax in (left, right)]
    assert titles == ["as transformers runs them", "accelerated"]
    assert (rows(left), rows(right)) == (
        ["dense BERT   1.00", "half depth   2.00"],
        ["dense BERT   2.00"],
    )
    assert (dashed(left), dashed(right)) == ([2], [4])
    assert left.get_xlim() == right.get_xlim()


@pytest.mark.parametrize(
    "variant, parts",
    [
        ("dense", ("dense", "ordinary")),
        ("dense, bf16", ("dense", "bf16")),
        ("half depth, accelerated, bf16", ("half depth", "accelerated, bf16")),
        ("one backward, padded", ("one backward, padded", "ordinary")),
    ],
)
def test_only_known_codes_are_split_off_a_variant(variant, parts):
    assert drawn.model_and_code(variant) == parts


def test_latency_draws_milliseconds_and_joins_medians():
    frame = pd.DataFrame(
        [("dense", t, s) for t in (8, 64) for s in (0.001, 0.002, 0.009)],
        columns=["variant", "tokens", "seconds"],
    )
    (ax,) = drawn.latency(frame).axes
    points, median = ax.get_lines()
    assert list(points.get_ydata()) == pytest.approx([1, 2, 9, 1, 2, 9])
    assert list(median.get_ydata()) == pytest.approx([2, 2])


def test_latency_has_a_panel_for_each_code_on_one_scale():
    frame = timed(("dense", 0.01), ("dense, accelerated", 0.002)).assign(tokens=8)
    left, right = drawn.latency(frame).axes
    assert [ax.get_title(loc="left") for ax in (left, right)] == [
        "as transformers runs them",
        "accelerated",
    ]
    assert left.get_ylim() == right.get_ylim()
    assert [list(ax.get_lines()[0].get_ydata()) for ax in (left, right)] == [[10], [2]]


@pytest.mark.parametrize("seconds, said", [(0.152, "6.58"), (1 / 13, "13.0"), (1 / 2421, "2,421")])
def test_speed_prints_medians_with_three_digits(seconds, said):
    (ax,) = drawn.speed(pd.DataFrame({"variant": ["dense"], "seconds": [seconds]})).axes
    assert rows(ax) == [f"dense BERT   {said}"]


def test_latency_names_each_model_beside_its_line_in_the_lines_colour():
    rows = [("dense", 0.004), ("moebert hash-random", 0.002), ("half depth", 0.001)]
    (ax,) = drawn.latency(timed(*rows).assign(tokens=8)).axes
    texts = ax.texts
    assert [t.get_text() for t in texts] == ["half depth", "MoEBERT, hash-random", "dense BERT"]
    assert texts[1].get_color() == drawn.variant_color("moebert hash-random")


@pytest.fixture
def roofed():
    """100 operations a second, 10 bytes a second: the bend is at 10 operations a byte."""
    rows = [
        ("dense", 16, 1.0, 40.0, 20.0),
        ("dense", 16, 2.0, 40.0, 20.0),
        ("dense", 64, 2.0, 160.0, 8.0),
        ("moebert hash-random", 16, 4.0, 40.0, 40.0),
    ]
    frame = pd.DataFrame(rows, columns=["variant", "tokens", "seconds", "flops", "bytes"])
    return drawn.roof(frame, flops=100.0, bandwidth=10.0)


def test_the_roof_is_bandwidth_times_intensity_up_to_the_measured_rate(roofed):
    (roof,) = [line for line in roofed.get_lines() if line.get_linestyle() == "--"][:1]
    x, y = roof.get_data()
    np.testing.assert_allclose(y, np.minimum(10 * np.array(x), 100) / 1e9)
    assert x[1] == 10 and x[0] < 1 < 20 < x[2]


def test_every_timing_stands_under_the_roof_at_its_own_intensity(roofed):
    lines = [line for line in roofed.get_lines() if line.get_marker() != "None"]
    dense, medians, moe, _ = lines
    np.testing.assert_allclose(dense.get_xdata(), [2, 2, 20])
    np.testing.assert_allclose(dense.get_ydata(), np.array([40, 20, 80]) / 1e9)
    np.testing.assert_allclose(medians.get_ydata(), np.array([30, 80]) / 1e9)
    np.testing.assert_allclose(moe.get_xydata(), [[1, 10 / 1e9]])


def test_the_roofs_ceilings_are_named_with_their_values(roofed):
    said = {text.get_text() for text in roofed.texts}
    assert {"16", "memory, 0 GB/s", "arithmetic, 0 billion/s"} <= said
