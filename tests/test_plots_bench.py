"""Figures of kept benchmarks: every round is a point at its ratio, settings are panels."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from drawings import drawn_bars, drawn_points

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


def record(timings, **more):
    """As ``harness.read`` returns it."""
    return {
        "what": "inference",
        "summary": harness.summary(timings).to_dict("records"),
        "timings": timings.to_dict("records"),
        "main": MOE,
        "machine": {"cpu": "A processor", "cores": 2, "gpu": "none"},
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789",
        "created": "2026-01-02T03:04",
        **more,
    }


def rows(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_every_round_is_a_point_at_its_ratio_within_the_round(timings):
    timings.loc[0, "seconds"] = 12.0  # dense, first round, first setting
    left, right = speed.page({"inference": record(timings)}).axes
    assert drawn_points(left)[:, 0].tolist() == [1, 1, 6, 3, 4, 2]
    assert drawn_points(right)[:, 0].tolist() == [1, 1, 3, 3, 2, 2]
    assert drawn_bars(left, rows=True) == [(0, 1), (1, 4.5), (2, 3)]
    assert [text.get_text() for text in left.texts] == ["1.00", "4.50", "3.00"]


def test_settings_are_panels_and_variants_are_rows_of_all_of_them(timings):
    left, right = speed.page({"inference": record(timings)}).axes
    assert [ax.get_title() for ax in (left, right)] == ["1 × 64", "32 × 128"]
    assert rows(left) == [
        "dense BERT",
        "equal FLOPs, accelerated",
        "MoEBERT, hash-random, accelerated",
    ]


@pytest.mark.parametrize("lacks", ["1 x 64", "32 x 128"])
def test_a_variant_that_a_setting_lacks_has_an_empty_row_there(timings, lacks):
    some = timings[~((timings["setting"] == lacks) & (timings["variant"] == LIMIT))]
    axes = speed.page({"inference": record(some)}).axes
    for ax, setting in zip(axes, ["1 x 64", "32 x 128"], strict=True):
        places = {round(y) for y in drawn_points(ax)[:, 1]}
        assert places == ({0, 2} if setting == lacks else {0, 1, 2})


def test_a_page_says_of_each_benchmark_what_was_found_and_on_what(timings):
    fig = speed.page({"inference": record(timings), "other": record(timings)})
    told = "MoEBERT (hash-random, accelerated) is 2.0 times as fast as dense BERT"
    assert finding(fig) == f"Inference: {told}. Other: {told}"
    machine = "A processor, 2 cores, torch 2.13.0, commit 0123456, 2026-01-02"
    assert all(machine in part.get_supxlabel() for part in fig.subfigs) and len(fig.subfigs) == 2


def test_a_gpus_record_names_the_gpu(timings):
    gpu = record(timings, what="inference-cuda", machine={"cpu": "A", "gpu": "H"})
    assert speed.origin(gpu).startswith("H, torch")


def test_without_a_main_variant_the_fastest_is_named_and_old_records_have_targets(timings):
    title = speed.fastest_in_words("inference", record(timings, main=""))
    assert title.startswith("Inference: equal FLOPs (accelerated) is 3.0 times as fast")
    old = record(timings, main="", targets=[{"variant": MOE}])
    assert speed.fastest_in_words("inference", old).startswith("Inference: MoEBERT (hash-random")


def test_the_baseline_is_the_variant_whose_ratio_is_one(timings):
    summary = harness.summary(timings).to_dict("records")
    assert speed.baseline(record(timings)) == "dense"
    other = [{**row, "ratio": float(row["variant"] == MOE)} for row in summary]
    assert speed.baseline(record(timings, summary=other)) == MOE


@pytest.fixture
def grown():
    """Time goes with the square root of tokens, operations with tokens."""
    rows = [("tokens", n, MOE, repeat, n**0.5) for n in (4, 16, 64) for repeat in range(2)]
    timings = pd.DataFrame(rows, columns=["axis", "value", "variant", "repeat", "seconds"])
    table = timings.drop_duplicates("value").assign(flops=lambda t: 10 * t["value"])
    kept = {"timings": timings.to_dict("records"), "summary": table.to_dict("records")}
    return speed.growth({**record(timings.assign(setting="a")[:1].assign(variant="dense")), **kept})


def test_operations_are_a_line_through_the_largest_size(grown):
    (ax,) = grown.axes
    points, median, counted = ax.get_lines()
    assert list(points.get_xdata()) == [4, 4, 16, 16, 64, 64]
    np.testing.assert_allclose(median.get_ydata(), [2000, 4000, 8000])
    np.testing.assert_allclose(counted.get_ydata(), [500, 2000, 8000])
    assert list(ax.get_xticks()) == [4, 16, 64]


def test_growth_is_told_from_the_first_to_the_last_size(grown):
    assert finding(grown) == "MoEBERT takes 4.0 times as long with 16 times the tokens"


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
