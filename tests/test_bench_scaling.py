"""The scaling bench: one size at a time, exponents of known laws, what is kept."""

import numpy as np
import pandas as pd
import pytest

from moebert_lib.bench import harness, inference, roofline
from moebert_lib.bench.inference import MOE, Point
from moebert_lib.cli import main
from moebert_lib.model.moe_layer import moe_layers

SHAPE = {**harness.TINY_SHAPE, "intermediate_size": 256}


def test_an_axis_varies_one_size_and_leaves_the_others():
    rest = Point("", 0)
    for point in inference.points():
        sizes = Point._fields[2:]
        changed = {name for name in sizes if getattr(point, name) != getattr(rest, name)}
        allowed = {
            "experts": {"n_experts"},
            "experts of one size": {"n_experts", "expert_size"},
            "tokens": {"n", "length"},
            "sentences": {"n"},
            "length": {"length"},
            "layers": {"n_layers"},
        }
        assert changed <= allowed[point.axis]
        assert point.axis != "tokens" or point.value == point.n * point.length
    assert {point.value for point in inference.points() if point.axis == "experts"} == {
        1,
        2,
        4,
        8,
        16,
        32,
        64,
    }


def test_a_points_models_have_its_sizes():
    built = inference.models(Point("experts", 8, n_experts=8, n_layers=3), SHAPE)
    layers = moe_layers(built[MOE])
    assert len(layers) == 3 and layers[0].experts.up_proj.shape == (8, 32, 32)
    assert built["equal FLOPs, accelerated"].config.intermediate_size == 32
    wide = inference.models(Point("", 8, n_experts=8, expert_size=64), SHAPE)
    assert moe_layers(wide[MOE])[0].experts.up_proj.shape == (8, 64, 32)


def test_points_are_timed_and_their_work_is_counted():
    works, chosen = {}, [Point("length", T, n=2, length=T) for T in (4, 8)]
    frames = [*inference.measured_bench_scaling(chosen, SHAPE, repeats=2, works=works)]
    assert [frame["value"].unique().tolist() for frame in frames] == [[4], [8]]
    assert len(works) == 2 * 3 and (pd.concat(frames)["seconds"] > 0).all()
    moe, limit = works["length = 8", MOE], works["length = 8", "equal FLOPs, accelerated"]
    assert moe.flops == limit.flops and moe.bytes > limit.bytes


def test_an_exponent_is_that_of_the_law_that_made_the_times():
    values = [1, 2, 4, 8]
    table = pd.DataFrame(
        {
            "axis": "sentences",
            "variant": MOE,
            "value": values,
            "flops": [10 * v for v in values],
            "bytes": 100,
            "median_ms": [3.0 * v**2 for v in values],
            "in_turn_ms": np.sqrt(values),
        }
    )
    (row,) = inference.slopes(table).itertuples()
    assert np.allclose([row.exponent, row.flops, row.bytes, row.in_turn], [2, 1, 0, 0.5])
    assert row.low == pytest.approx(2) and row.high == pytest.approx(2)
    assert "power 2.00" in row.words and "weights are read once" in row.words


def test_an_interval_covers_what_two_points_more_would_change():
    """Times 1, 2, 8 at 1, 2, 4: slope 3/2, residuals 1/6, -1/3, 1/6 of a doubling."""
    table = pd.DataFrame(
        {
            "axis": "layers",
            "variant": MOE,
            "value": [1, 2, 4],
            "flops": 1,
            "bytes": 1,
            "in_turn_ms": 1.0,
            "median_ms": [1.0, 2.0, 8.0],
        }
    )
    (row,) = inference.slopes(table).itertuples()
    error = np.sqrt((2 / 36 + 1 / 9) / 1 / 2)  # residual variance over the spread of log2(value)
    assert row.exponent == pytest.approx(1.5)
    assert row.high - row.low == pytest.approx(2 * 12.7062 * error, rel=1e-4)


def test_every_axis_has_its_reason():
    assert {point.axis for point in inference.points()} == {*inference.REASONS}


def test_the_command_keeps_points_and_exponents(moebert_home, monkeypatch, capsys):
    usual = inference.points
    few = [point for point in usual(256) if point.axis == "sentences" and point.value < 8]
    monkeypatch.setattr(inference, "points", lambda width: few)
    monkeypatch.setattr(roofline, "ceilings", lambda: roofline.Ceilings(1e9, 2e9, 1e9))
    monkeypatch.setattr(
        inference.main_bench_scaling,
        "__kwdefaults__",
        {**inference.main_bench_scaling.__kwdefaults__, "shape": SHAPE},
    )
    assert main.main(["bench", "scaling", "--repeats", "2"]) == 0
    record = harness.read("scaling")
    values = harness.frame(record, "summary").groupby("variant")["value"]
    assert [sorted(found) for _, found in values] == [[1, 2, 4]] * 3
    assert {"flops", "in_turn_ms", "share"} <= {*record["summary"][0]}
    (words,) = (row["words"] for row in record["slopes"] if row["variant"] == MOE)
    assert words in capsys.readouterr().out
