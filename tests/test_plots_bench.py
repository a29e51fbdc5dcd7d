"""Figures of kept benchmarks: every round a point, limits and targets where they belong."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moebert_lib.bench import harness, inference, roofline
from moebert_lib.plots import speed
from moebert_lib.store.run_outputs import finding
from moebert_lib.store.store import Store

MOE = "moebert hash-random, accelerated"
LIMIT = "equal FLOPs, accelerated"


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def timings():
    """Two rounds in two settings; the second round is twice as slow for all."""
    seconds = {"dense": 6.0, LIMIT: 2.0, MOE: 3.0}
    rows = [
        (setting, name, repeat, length * (1 + repeat) * s)
        for setting, length in (("1 x 64", 1), ("32 x 128", 10))
        for repeat in range(2)
        for name, s in seconds.items()
    ]
    return pd.DataFrame(rows, columns=["setting", "variant", "repeat", "seconds"])


def judged(timings):
    """Two targets in the first setting: one against the baseline, one against the limit."""
    rows = []
    for other, wanted in (("dense", 1.5), (LIMIT, 0.8)):
        limits = {MOE: other}
        bench = harness.Benchmark(settings={}, limits=limits, targets={MOE: wanted})
        rows += harness.judge(harness.summary(timings, limits=limits), bench)
    return [row for row in rows if row["setting"] == "1 x 64"]


def record(timings, gpu="none", **more):
    return {
        "what": "inference" if gpu == "none" else "inference-cuda",
        "summary": harness.summary(timings, limits={MOE: LIMIT}).to_dict("records"),
        "timings": timings.to_dict("records"),
        "targets": judged(timings),
        "machine": {"cpu": "A processor", "cores": 2, "gpu": gpu},
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789",
        "created": "2026-01-02T03:04",
        **more,
    }


def dots(ax):
    """Points of each row from top to bottom."""
    found = [line for line in ax.get_lines() if line.get_marker() not in ("None", "|")]
    return {round(line.get_ydata()[0], 2): list(line.get_xdata()) for line in found}


def strokes(ax, color):
    return [line.get_xdata()[0] for line in ax.get_lines() if line.get_color() == color]


def test_every_round_is_a_point_at_its_ratio_within_the_round(timings):
    timings.loc[0, "seconds"] = 12.0  # dense, first round, first setting
    left, right = speed.ratios(timings, against="dense").axes
    assert sorted(dots(left).values()) == [[1, 1], [4, 2], [6, 3]]
    assert sorted(dots(right).values()) == [[1, 1], [2, 2], [3, 3]]


def test_settings_are_panels_and_codes_are_headings(timings):
    left, right = speed.ratios(timings, against="dense").axes
    assert [ax.get_title(loc="left") for ax in (left, right)] == ["1 × 64", "32 × 128"]
    rows = [label.get_text() for label in left.get_yticklabels()]
    assert rows == [
        "as transformers runs them",
        "dense BERT",
        "accelerated",
        "equal FLOPs",
        "MoEBERT, hash-random",
    ]


def test_the_limit_is_a_line_across_the_rows_of_its_code_alone(timings):
    left, _ = speed.ratios(timings, against="dense").axes
    (line,) = [line for line in left.get_lines() if line.get_linestyle() == "--"]
    assert list(line.get_xdata()) == [3, 3]
    dense, limit, moe = sorted(dots(left))
    assert dense < line.get_ydata()[0] < limit < moe < line.get_ydata()[1]


def test_what_is_wanted_stands_where_it_would_be_reached(timings):
    targets = judged(timings)
    left, right = speed.ratios(timings, against="dense", targets=targets).axes
    assert strokes(left, speed.TARGET) == pytest.approx([1.5, 0.8 * 3])
    assert strokes(right, speed.TARGET) == []


def test_a_variant_that_a_setting_lacks_leaves_its_row_empty(timings):
    some = timings[~((timings["setting"] == "32 x 128") & (timings["variant"] == MOE))]
    left, right = speed.ratios(some, against="dense").axes
    assert len(dots(left)) == 3 and len(dots(right)) == 2


def test_a_page_says_of_each_benchmark_what_was_found_and_on_what(timings):
    fig = speed.page({"inference": record(timings), "other": record(timings)})
    said = (
        "MoEBERT, hash-random, accelerated, is 2.00 (1 × 64) and 2.00 (32 × 128) times as "
        "fast as dense BERT; 1 of 2 targets met"
    )
    assert finding(fig) == f"Inference: {said}. Other: {said}"
    below = [part.get_supxlabel() for part in fig.subfigs]
    assert (
        below
        == [
            "times as fast as dense BERT\nA processor, 2 cores, torch 2.13.0, commit "
            "0123456, 2026-01-02, no GPU was measured yet"
        ]
        * 2
    )


def test_with_a_gpus_record_nothing_is_missing(timings):
    fig = speed.page({"inference": record(timings), "inference-cuda": record(timings, "H")})
    first, second = (part.get_supxlabel() for part in fig.subfigs)
    assert "no GPU" not in first + second and "\nH, 2 cores" in second


def test_without_targets_the_fastest_variant_is_told(timings):
    kept = record(timings) | {"targets": []}
    told = speed.found("inference", kept)
    assert told.startswith("Inference: equal FLOPs, accelerated, is 3.00")


def test_the_baseline_is_the_variant_whose_ratio_is_one(timings):
    kept = record(timings)
    assert speed.baseline(kept) == "dense"
    kept["summary"] = harness.summary(timings, baseline=MOE).to_dict("records")
    assert speed.baseline(kept) == MOE


@pytest.fixture
def grown():
    """Time goes with the square root of tokens, operations with tokens."""
    rows = [("tokens", n, MOE, repeat, n**0.5) for n in (4, 16, 64) for repeat in range(2)]
    timings = pd.DataFrame(rows, columns=["axis", "value", "variant", "repeat", "seconds"])
    table = timings.drop_duplicates("value").assign(flops=lambda t: 10 * t["value"])
    return timings, table


def test_operations_are_a_line_through_the_largest_size(grown):
    (ax,) = speed.scaling(*grown).axes
    points, median, counted = ax.get_lines()
    assert list(points.get_xdata()) == [4, 4, 16, 16, 64, 64]
    np.testing.assert_allclose(median.get_ydata(), [2000, 4000, 8000])
    np.testing.assert_allclose(counted.get_ydata(), [500, 2000, 8000])
    assert list(ax.get_xticks()) == [4, 16, 64]


def test_growth_is_told_from_the_first_to_the_last_size(grown):
    timings, table = grown
    kept = record(
        pd.DataFrame({"setting": ["a"], "variant": ["dense"], "repeat": [0], "seconds": [1.0]})
    )
    kept |= {"timings": timings.to_dict("records"), "summary": table.to_dict("records")}
    said = "MoEBERT takes 4.0 times as long for 16 times the tokens"
    assert finding(speed.growth(kept)) == said


def test_records_of_the_benchmarks_themselves_can_be_drawn(moebert_home, monkeypatch):
    rates = roofline.Ceilings(1e9, 2e9, 1e9)
    monkeypatch.setattr(roofline, "measure_ceilings", lambda: rates)
    tiny = inference.TINY
    harness.run(inference.inference(shape=tiny, batch=2, length=8, repeats=2))
    harness.run(inference.scaling(shape=tiny, repeats=2))
    fig = speed.page({"inference": harness.read(Store(), "inference")})
    assert "times as fast as dense BERT" in finding(fig)
    scaled = json.loads(json.dumps(harness.read(Store(), "scaling")))
    assert len(speed.growth(scaled).axes) == len({row["axis"] for row in scaled["summary"]}) == 6
