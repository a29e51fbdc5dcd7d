"""The scaling bench: one size at a time, exponents of known laws, what is kept."""

import numpy as np
import pandas as pd
import pytest

from moebert_lib.bench import harness, inference, roofline
from moebert_lib.cli import main
from moebert_lib.model.moe_layer import moe_layers
from moebert_lib.store.store import Store

MOE = "moebert hash-random, accelerated"
SHAPE = {**inference.TINY, "intermediate_size": 256}


AXES = {
    "experts": {"n_experts"},
    "experts of one size": {"n_experts", "expert_size"},
    "tokens": {"n", "length"},
    "sentences": {"n"},
    "length": {"length"},
    "layers": {"n_layers"},
}


def test_an_axis_varies_one_size_and_leaves_the_others():
    axes = {}
    for name, changed in inference.scaling_points(3072).items():
        axis, _, value = name.partition(" = ")
        axes.setdefault(axis, []).append(int(value))
        assert {*changed} == AXES[axis]
        assert axis != "tokens" or int(value) == changed["n"] * changed["length"]
    assert {*axes} == {*AXES} and axes["experts"] == [1, 2, 4, 8, 16, 32, 64]


def test_a_points_models_have_its_sizes():
    built = inference.scaling_models(SHAPE, n_experts=8, n_layers=3)
    layers = moe_layers(built[MOE])
    assert len(layers) == 3 and layers[0].experts.up_proj.shape == (8, 32, 32)
    assert built["equal FLOPs, accelerated"].config.intermediate_size == 32
    wide = inference.scaling_models(SHAPE, n_experts=8, expert_size=64)
    assert moe_layers(wide[MOE])[0].experts.up_proj.shape == (8, 64, 32)


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
    assert "power 2.00" in row.words


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


def test_the_command_keeps_points_and_exponents(moebert_home, monkeypatch, capsys):
    usual = inference.scaling_points
    monkeypatch.setattr(
        inference,
        "scaling_points",
        lambda width: {n: p for n, p in usual(width).items() if n[-2:] in (" 1", " 2", " 4")},
    )
    rates = roofline.Ceilings(1e9, 2e9, 1e9)
    monkeypatch.setattr(roofline, "measure_ceilings", lambda: rates)
    monkeypatch.setitem(inference.scaling.__kwdefaults__, "shape", SHAPE)
    assert main.main(["bench", "scaling", "--repeats", "2"]) == 0
    record = harness.read(Store(), "scaling")
    table = pd.DataFrame(record["summary"])
    values = table[table["axis"] == "sentences"].groupby("variant")["value"]
    assert [sorted(points) for _, points in values] == [[1, 2, 4]] * 3
    rows = table.set_index(["setting", "variant"])
    moe, limit = (rows.loc[("sentences = 4", v)] for v in (MOE, "equal FLOPs, accelerated"))
    assert moe["flops"] == limit["flops"] and moe["bytes"] > limit["bytes"]
    assert {"axis", "value", "seconds"} <= {*record["timings"][0]}
    words = [row["words"] for row in record["slopes"] if row["variant"] == MOE]
    printed = capsys.readouterr().out
    assert words and all(line in printed for line in words)
