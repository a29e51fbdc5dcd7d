"""The stopwatch: interleaving, paired ratios, targets, records."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from moebert_lib.bench import harness, workflow
from moebert_lib.cli import main
from moebert_lib.config import provenance
from moebert_lib.config.errors import UserError


def test_calls_take_turns_after_one_untimed_round():
    order = []
    calls = {name: (lambda n=name: order.append(n)) for name in "ab"}
    timings = harness.time_interleaved(calls, repeats=3)
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
    table = harness.summary(timings, units=2).set_index("variant")
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
    table = harness.summary(timings, limits=limits, units={"a": 1, "b": 32})
    found = table.set_index(["setting", "variant"])
    assert found.loc[("a", "moe"), "ratio"] == 2 and found.loc[("b", "moe"), "ratio"] == 3
    assert found.loc[("a", "moe"), "of_limit"] == 0.5 and found.loc[("b", "moe"), "of_limit"] == 1
    assert found.loc[("b", "moe"), "per_second"] == 16
    assert np.isnan(found.loc[("a", "dense"), "of_limit"])


def test_rounds_fill_a_minute_within_their_bounds():
    assert harness._rounds(4, seconds=500) == 5 and harness._rounds(5, seconds=500) == 5
    assert harness._rounds(7, seconds=30) == 8 and harness._rounds(21, seconds=0.1) == 21


def test_results_of_the_untimed_round_are_looked_at():
    looked = []
    calls = {"a": lambda: 1, "b": lambda: 2}
    harness.time_interleaved(calls, repeats=1, look=looked.append)
    assert looked == [{"a": 1, "b": 2}]


def test_gradients_are_as_the_calls_have_them():
    seen = []
    harness.time_interleaved(
        {"a": lambda: seen.append(torch.is_inference_mode_enabled())}, repeats=1
    )
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
    judged = harness.judge(TIMED, wishes)
    assert [row["met"] for row in judged] == [True, False, None]
    assert {(row["reached"], row["low"], row["high"]) for row in judged} == {(2.0, 1.5, 2.5)}


def test_targets_are_said_in_words(capsys):
    harness.say(harness.judge(TIMED, [("s", "x", "dense", 2.5), ("s", "x", "dense", None)]))
    missed, plain = capsys.readouterr().out.splitlines()
    assert missed == "s: x is 2.00 times as fast as dense (1.50 to 2.50); wanted 2.5: NOT met"
    assert plain.endswith("(1.50 to 2.50)")


def test_a_table_is_printed_within_120_columns(capsys):
    names = {"dense": "dense", "x": "moebert gate-sentence, accelerated, bf16"}
    timings = TIMED.assign(seconds=TIMED["seconds"] * 12.3, variant=TIMED["variant"].map(names))
    harness.show(harness.summary(timings.assign(setting="GLUE-like"), limits={names["x"]: "dense"}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 120 and "12,300-18,450" in lines[2]


def test_what_is_kept_is_read_again_and_the_newest_first(moebert_home, capsys):
    table = harness.summary(TIMED)
    for age in ("old", "new"):
        harness.keep(
            "x", TIMED, table, targets=harness.judge(TIMED, [("s", "x", "dense", 2)]), age=age
        )
    harness.keep("x-cuda", TIMED, table, age="another")
    record = harness.read("x")
    assert record["age"] == "new" and "cpu" in record["machine"] and record["machine"]["gpu"]
    pd.testing.assert_frame_equal(harness.frame(record, "timings"), TIMED, check_dtype=False)
    pd.testing.assert_frame_equal(harness.frame(record, "summary"), table, check_dtype=False)
    assert harness.frame(record, "targets")["met"].tolist() == [True]
    assert "bench-x-" in capsys.readouterr().out


def test_a_record_can_go_to_a_file_and_committed_ones_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path))
    with pytest.raises(UserError, match="make it with moebert bench inference --device cuda"):
        harness.read("inference-cuda")
    out = tmp_path / "figures" / "bench" / "inference-cuda.json"
    assert harness.keep("inference-cuda", TIMED, harness.summary(TIMED), out=out) == out
    assert harness.read("inference-cuda")["what"] == "inference-cuda"
    assert [path.name for path in tmp_path.rglob("*.*")] == [out.name]


def test_ctrl_c_keeps_what_is_finished():
    def measured(n):
        yield from [TIMED] * n
        raise KeyboardInterrupt

    timings, complete = harness.gather(measured(2))
    assert len(timings) == 2 * len(TIMED) and not complete
    assert harness.gather([TIMED])[1]
    with pytest.raises(KeyboardInterrupt):
        harness.gather(measured(0))


def test_other_work_is_told_and_recorded(monkeypatch, capsys):
    monkeypatch.setattr(provenance, "cores", lambda: 2)
    monkeypatch.setattr(harness.os, "getloadavg", lambda: (3.0, 0, 0))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    found = harness.prepare()
    assert found["load"] == 1.5 and found["malloc"]["MALLOC_ARENA_MAX"] == "1"
    assert capsys.readouterr().out == "timed beside other work: load 3.0 on 2 cores\n"
    monkeypatch.setattr(harness.os, "getloadavg", lambda: (0.5, 0, 0))
    harness.prepare()
    assert capsys.readouterr().out == ""


def test_the_machine_is_described_in_json_values():
    found = harness.machine()
    assert json.loads(json.dumps(found)) == found and {"instructions", "gpu", "ram_gb"} <= {*found}


def test_a_sweep_is_timed_in_turn_with_one_worker_and_with_two(moebert_home, monkeypatch, capsys):
    asked = []

    def sweep(where, seeds, *, workers):
        asked.append((where.name, list(seeds), workers))
        return 30.0 / workers

    monkeypatch.setattr(workflow, "_sweep", sweep)
    assert main.main(["bench", "batch", "--runs", "20"]) == 0
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
    monkeypatch.setattr(workflow.sys, "executable", "/bin/false")
    assert main.main(["bench", "batch", "--runs", "10"]) == 2
    assert "the sweep failed" in capsys.readouterr().err
