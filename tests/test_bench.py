"""The stopwatch: interleaving, paired ratios, what is compared."""

import json

import pandas as pd

from moebert_lib import bench, bench_batch, cli
from moebert_lib.moe_layer import parameter_counts


def test_calls_take_turns_after_one_untimed_round():
    order = []
    calls = {name: (lambda n=name: order.append(n)) for name in "ab"}
    timings = bench.time_interleaved(calls, repeats=3)
    assert order == list("ab" * 4)
    assert timings["variant"].tolist() == list("ab" * 3)
    assert timings["repeat"].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_ratio_is_the_median_of_paired_ratios():
    timings = pd.DataFrame({
        "variant": ["dense", "fast"] * 3, "repeat": [0, 0, 1, 1, 2, 2],
        "seconds": [1.0, 0.5, 10.0, 2.0, 1.0, 1.0],
    })  # fmt: skip
    table = bench.summary(timings, units=2).set_index("variant")
    assert table.loc["fast", "ratio"] == 2.0  # of 2, 5, 1
    assert table.loc["dense", "ratio"] == 1.0
    assert table.loc["fast", "per_second"] == 2.0 and table.loc["fast", "median_ms"] == 1000


def test_the_variants_have_the_sizes_they_claim():
    built = bench.models(bench.TINY_SHAPE)
    limit = parameter_counts(built["equal FLOPs"]).effective
    moe = parameter_counts(built["moebert hash-random"]).effective
    assert moe == limit < parameter_counts(built["dense"]).effective
    assert len(built["half depth"].bert.encoder.layer) == 1


def test_inference_times_every_variant():
    timings = bench.inference(bench.TINY_SHAPE, batch=2, length=8, repeats=2)
    assert len(timings) == 2 * 5 and (timings["seconds"] > 0).all()


def test_models_that_are_there_are_not_built_again(monkeypatch):
    built = {"dense": bench.models(bench.TINY_SHAPE)["dense"]}
    monkeypatch.setattr(bench, "models", None)
    timings = bench.inference(bench.TINY_SHAPE, length=8, repeats=2, built=built)
    assert timings["variant"].tolist() == ["dense", "dense"]


def test_the_command_keeps_its_numbers(moebert_home, monkeypatch, capsys):
    monkeypatch.setattr(bench, "inference", lambda **k: bench_timings())
    bench.main(repeats=1)
    (kept,) = (moebert_home / "runs").glob("bench-inference-*.json")
    record = json.loads(kept.read_text())
    assert record["summary"][1]["ratio"] == 2.0 and "cpu" in record["machine"]
    assert kept.name in capsys.readouterr().out


def bench_timings():
    return pd.DataFrame({"variant": ["dense", "x"], "repeat": [0, 0], "seconds": [1.0, 0.5]})


def test_a_sweep_is_timed_in_turn_with_one_worker_and_with_two(moebert_home, monkeypatch, capsys):
    asked = []

    def sweep(where, seeds, *, workers):
        asked.append((where.name, list(seeds), workers))
        return 30.0 / workers

    monkeypatch.setattr(bench_batch, "_sweep", sweep)
    assert cli.main(["bench", "batch", "--runs", "20"]) == 0
    first, second = list(range(10)), list(range(10, 20))
    assert asked == [("1", first, 1), ("2", first, 2), ("1", second, 1), ("2", second, 2),
                     ("2", first + second, 2)]  # fmt: skip
    (kept,) = (moebert_home / "runs").glob("bench-batch-*.json")
    record = json.loads(kept.read_text())
    assert [row["ratio"] for row in record["summary"]] == [1.0, 2.0]
    assert record["reused_seconds"] == 15.0 and "20 runs, all reused" in capsys.readouterr().out


def test_a_sweep_that_fails_is_no_timing(moebert_home, monkeypatch, capsys):
    monkeypatch.setattr(bench_batch.sys, "executable", "/bin/false")
    assert cli.main(["bench", "batch", "--runs", "10"]) == 2
    assert "the sweep failed" in capsys.readouterr().err
