"""The stopwatch: interleaving, paired ratios, targets, records."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from moebert_lib import bench, bench_batch, bench_machine, cli
from moebert_lib.errors import UserError


def test_calls_take_turns_after_one_untimed_round():
    order = []
    calls = {name: (lambda n=name: order.append(n)) for name in "ab"}
    timings = bench.time_interleaved(calls, repeats=3)
    assert order == list("ab" * 4)
    assert timings["variant"].tolist() == list("ab" * 3)
    assert timings["repeat"].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_ratio_is_the_median_of_paired_ratios():
    timings = pd.DataFrame(
        {
            "variant": ["dense", "fast"] * 3,
            "repeat": [0, 0, 1, 1, 2, 2],
            "seconds": [1.0, 0.5, 10.0, 2.0, 1.0, 1.0],
        }
    )
    table = bench.summary(timings, units=2).set_index("variant")
    assert table.loc["fast", "ratio"] == 2.0  # of 2, 5, 1
    assert table.loc["dense", "ratio"] == 1.0
    assert table.loc["fast", "per_second"] == 2.0 and table.loc["fast", "median_ms"] == 1000


def test_ratios_and_limits_are_of_each_setting_by_itself():
    timings = pd.DataFrame(
        {
            "setting": ["a"] * 3 + ["b"] * 3,
            "variant": ["dense", "equal FLOPs", "moe"] * 2,
            "repeat": 0,
            "seconds": [4.0, 1.0, 2.0, 6.0, 2.0, 2.0],
        }
    )
    limits = {"moe": "equal FLOPs"}
    table = bench.summary(timings, limits=limits, units={"a": 1, "b": 32})
    found = table.set_index(["setting", "variant"])
    assert found.loc[("a", "moe"), "ratio"] == 2 and found.loc[("b", "moe"), "ratio"] == 3
    assert found.loc[("a", "moe"), "of_limit"] == 0.5 and found.loc[("b", "moe"), "of_limit"] == 1
    assert found.loc[("b", "moe"), "per_second"] == 16
    assert np.isnan(found.loc[("a", "dense"), "of_limit"])


def test_rounds_fill_a_minute_within_their_bounds():
    assert bench._rounds(4, seconds=500) == 5 and bench._rounds(5, seconds=500) == 5
    assert bench._rounds(7, seconds=30) == 8 and bench._rounds(21, seconds=0.1) == 21


def test_results_of_the_untimed_round_are_looked_at():
    looked = []
    calls = {"a": lambda: 1, "b": lambda: 2}
    bench.time_interleaved(calls, repeats=1, look=looked.append)
    assert looked == [{"a": 1, "b": 2}]


def test_gradients_are_as_the_calls_have_them():
    seen = []
    bench.time_interleaved({"a": lambda: seen.append(torch.is_inference_mode_enabled())}, repeats=1)
    assert seen == [False, False]


TIMED = pd.DataFrame(
    {
        "setting": "s",
        "variant": ["dense", "x"] * 3,
        "repeat": [0, 0, 1, 1, 2, 2],
        "seconds": [3.0, 1.0, 4.0, 2.0, 1.0, 1.0],
    }
)


def test_a_target_is_judged_by_the_median_where_it_was_timed():
    wishes = [
        ("s", "x", "dense", 2.0),
        ("s", "x", "dense", 2.1),
        ("s", "x", "dense", None),
        ("t", "x", "dense", 1.0),
        ("s", "y", "dense", 1.0),
    ]
    judged = bench.judge(TIMED, wishes)
    assert [row["met"] for row in judged] == [True, False, None]
    assert {(row["reached"], row["low"], row["high"]) for row in judged} == {(2.0, 1.5, 2.5)}


def test_targets_are_said_in_words(capsys):
    bench.say(bench.judge(TIMED, [("s", "x", "dense", 2.5), ("s", "x", "dense", None)]))
    missed, plain = capsys.readouterr().out.splitlines()
    assert missed == "s: x is 2.00 times as fast as dense (1.50 to 2.50); wanted 2.5: NOT met"
    assert plain.endswith("(1.50 to 2.50)")


def test_a_table_is_printed_within_120_columns(capsys):
    names = {"dense": "dense", "x": "moebert gate-sentence, accelerated, bf16"}
    timings = TIMED.assign(seconds=TIMED["seconds"] * 12.3, variant=TIMED["variant"].map(names))
    bench.show(bench.summary(timings.assign(setting="GLUE-like"), limits={names["x"]: "dense"}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 120 and "12,300-18,450" in lines[2]


def test_what_is_kept_is_read_again_and_the_newest_first(moebert_home, capsys):
    table = bench.summary(TIMED)
    for age in ("old", "new"):
        bench.keep("x", TIMED, table, targets=bench.judge(TIMED, [("s", "x", "dense", 2)]), age=age)
    bench.keep("x-cuda", TIMED, table, age="another")
    record = bench.read("x")
    assert record["age"] == "new" and "cpu" in record["machine"] and record["machine"]["gpu"]
    pd.testing.assert_frame_equal(bench.frame(record, "timings"), TIMED, check_dtype=False)
    pd.testing.assert_frame_equal(bench.frame(record, "summary"), table, check_dtype=False)
    assert bench.frame(record, "targets")["met"].tolist() == [True]
    assert "bench-x-" in capsys.readouterr().out


def test_a_record_can_go_to_a_file_and_committed_ones_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path))
    with pytest.raises(UserError, match="make it with moebert bench inference --device cuda"):
        bench.read("inference-cuda")
    out = tmp_path / "figures" / "bench" / "inference-cuda.json"
    assert bench.keep("inference-cuda", TIMED, bench.summary(TIMED), out=out) == out
    assert bench.read("inference-cuda")["what"] == "inference-cuda"
    assert [path.name for path in tmp_path.rglob("*.*")] == [out.name]


def test_ctrl_c_keeps_what_is_finished():
    def measured(n):
        yield from [TIMED] * n
        raise KeyboardInterrupt

    timings, complete = bench.gather(measured(2))
    assert len(timings) == 2 * len(TIMED) and not complete
    assert bench.gather([TIMED])[1]
    with pytest.raises(KeyboardInterrupt):
        bench.gather(measured(0))


def test_other_work_is_told_and_recorded(monkeypatch, capsys):
    monkeypatch.setattr(bench_machine.provenance, "cores", lambda: 2)
    monkeypatch.setattr(bench_machine.os, "getloadavg", lambda: (3.0, 0, 0))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    found = bench.prepare()
    assert found["load"] == 1.5 and found["malloc"]["MALLOC_ARENA_MAX"] == "1"
    assert capsys.readouterr().out == "timed beside other work: load 3.0 on 2 cores\n"
    monkeypatch.setattr(bench_machine.os, "getloadavg", lambda: (0.5, 0, 0))
    bench.prepare()
    assert capsys.readouterr().out == ""


def test_the_machine_is_described_in_json_values():
    found = bench.machine()
    assert json.loads(json.dumps(found)) == found and {"instructions", "gpu", "ram_gb"} <= {*found}


def test_a_sweep_is_timed_in_turn_with_one_worker_and_with_two(moebert_home, monkeypatch, capsys):
    asked = []

    def sweep(where, seeds, *, workers):
        asked.append((where.name, list(seeds), workers))
        return 30.0 / workers

    monkeypatch.setattr(bench_batch, "_sweep", sweep)
    assert cli.main(["bench", "batch", "--runs", "20"]) == 0
    first, second = list(range(10)), list(range(10, 20))
    assert asked == [
        ("1", first, 1),
        ("2", first, 2),
        ("1", second, 1),
        ("2", second, 2),
        ("2", first + second, 2),
    ]
    (kept,) = (moebert_home / "runs").glob("bench-batch-*.json")
    record = json.loads(kept.read_text())
    assert [row["ratio"] for row in record["summary"]] == [1.0, 2.0]
    assert record["reused_seconds"] == 15.0 and "20 runs, all reused" in capsys.readouterr().out


def test_a_sweep_that_fails_is_no_timing(moebert_home, monkeypatch, capsys):
    monkeypatch.setattr(bench_batch.sys, "executable", "/bin/false")
    assert cli.main(["bench", "batch", "--runs", "10"]) == 2
    assert "the sweep failed" in capsys.readouterr().err
