"""The harness: interleaving, paired ratios, records; sweeps timed with it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from moebert_lib.bench import harness, sweeps_and_widgets
from moebert_lib.bench.harness import Benchmark
from moebert_lib.cli import main
from moebert_lib.config import provenance
from moebert_lib.config.errors import UserError
from moebert_lib.store.store import Store


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
            "setting": "s",
            "variant": ["dense", "fast"] * 3,
            "repeat": [0, 0, 1, 1, 2, 2],
            "seconds": [1.0, 0.5, 10.0, 2.0, 1.0, 1.0],
        }
    )
    table = harness.summary(timings, examples=2).set_index("variant")
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
    table = harness.summary(timings, limits=limits, examples={"a": 1, "b": 32})
    rows = table.set_index(["setting", "variant"])
    assert rows.loc[("a", "moe"), "ratio"] == 2 and rows.loc[("b", "moe"), "ratio"] == 3
    assert rows.loc[("a", "moe"), "of_limit"] == 0.5 and rows.loc[("b", "moe"), "of_limit"] == 1
    assert rows.loc[("b", "moe"), "per_second"] == 16
    assert np.isnan(rows.loc[("a", "dense"), "of_limit"])


def test_rounds_fill_a_minute_within_their_bounds():
    assert harness._rounds(4, seconds=500) == 5 and harness._rounds(5, seconds=500) == 5
    assert harness._rounds(7, seconds=30) == 8 and harness._rounds(21, seconds=0.1) == 21


def test_outputs_of_the_untimed_round_are_checked_before_any_timing():
    calls, timed = {"a": lambda: 1, "b": lambda: 2}, []

    def refuse(outputs):
        timed.append(outputs)
        raise UserError("wrong")

    with pytest.raises(UserError, match="wrong"):
        harness.time_interleaved(calls, repeats=1, check=refuse)
    assert timed == [{"a": 1, "b": 2}]


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


def test_the_share_of_the_limit_is_a_median_with_quartiles():
    row = harness.summary(TIMED, limits={"x": "dense"}).set_index("variant").loc["x"]
    assert [row[name] for name in ("of_limit", "of_limit_low", "of_limit_high")] == [2.0, 1.5, 2.5]


def test_a_table_is_printed_within_120_columns(capsys):
    names = {"dense": "dense", "x": "moebert gate-sentence, accelerated, bf16"}
    timings = TIMED.assign(seconds=TIMED["seconds"] * 12.3, variant=TIMED["variant"].map(names))
    harness.show(harness.summary(timings, limits={names["x"]: "dense"}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 120
    assert "12,300 (12,300-18,450)" in lines[2]


def calls(**seconds):
    """Variants that take so long by a clock that stands still otherwise."""
    return {name: (lambda s=s: harness.time.sleep(s)) for name, s in seconds.items()}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves."""

    class Clock:
        now = 0.0
        perf_counter = staticmethod(lambda: Clock.now)

        @staticmethod
        def sleep(seconds):
            Clock.now += seconds

    monkeypatch.setattr(harness, "time", Clock)


def test_a_run_prints_tables_and_saves_all_of_it(moebert_home, clock, capsys):
    benchmark = Benchmark(
        name="x",
        title="what is timed",
        settings={"a": lambda: calls(dense=2.0, moe=1.0), "b": lambda: calls(dense=8.0, moe=2.0)},
        limits={"moe": "dense"},
        main="moe",
        repeats=2,
        facts={"shape": [1, 2]},
        finish=lambda timings, table: {"rows": [len(timings), len(table)]},
    )
    assert harness.run(benchmark) is True
    (path,) = (moebert_home / "runs").glob("bench-x-*.json")
    record = harness.read(Store(), "x")
    assert record == json.loads(path.read_text())
    assert record["complete"] and record["shape"] == [1, 2] and record["rows"] == [8, 4]
    assert [row["seconds"] for row in record["timings"]] == [2, 1, 2, 1, 8, 2, 8, 2]
    assert record["main"] == "moe"
    assert record["machine"]["cpu"] and record["machine"]["gpu"] and record["versions"]["torch"]
    printed = capsys.readouterr().out
    assert "what is timed" in printed and "a, 2 rounds" in printed
    assert "round 1, dense: 8.0 s" in printed and path.name in printed


def test_ctrl_c_keeps_the_settings_that_are_finished(moebert_home, clock, capsys):
    def stop():
        raise KeyboardInterrupt

    settings = {"a": lambda: calls(dense=1.0), "b": lambda: {"dense": stop}}
    assert harness.run(Benchmark(name="x", settings=settings, repeats=1)) is False
    (path,) = (moebert_home / "runs").glob("bench-x-*.json")
    record = json.loads(path.read_text())
    assert not record["complete"] and [row["setting"] for row in record["summary"]] == ["a"]
    assert "finished settings are kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="no record 'x'"):  # an incomplete record is not read
        harness.read(Store(), "x")
    with pytest.raises(KeyboardInterrupt):
        harness.run(Benchmark(name="y", settings={"b": lambda: {"dense": stop}}))


def test_the_newest_record_is_read_and_committed_ones_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path))
    with pytest.raises(UserError, match="make it with moebert bench inference --device cuda"):
        harness.read(Store(), "inference-cuda")
    out = tmp_path / "figures" / "bench" / "inference-cuda.json"
    harness.save({"what": "inference-cuda", "age": "committed"}, out=out)
    assert harness.read(Store(), "inference-cuda")["age"] == "committed"
    for age in ("old", "new"):
        harness.save({"what": "inference-cuda", "age": age})
    harness.save({"what": "inference", "age": "another"})
    assert harness.read(Store(), "inference-cuda")["age"] == "new"


@pytest.mark.parametrize("name", ["inference", "training", "importance", "scaling"])
def test_committed_records_are_read(name, moebert_home):
    record = harness.read(Store(), name)
    assert record["what"] == name and {"summary", "timings", "machine"} <= {*record}


def test_other_programs_are_named_and_recorded(monkeypatch, capsys):
    monkeypatch.setattr(provenance, "cores", lambda: 2)
    monkeypatch.setattr(harness.os, "getloadavg", lambda: (3.0, 0, 0))
    assert harness.prepare()["load"] == 1.5
    assert capsys.readouterr().out == "other programs are busy: load 3.0 on 2 cores\n"
    monkeypatch.setattr(harness.os, "getloadavg", lambda: (0.5, 0, 0))
    harness.prepare()
    assert capsys.readouterr().out == ""


def test_a_sweep_is_timed_in_turn_with_one_worker_and_with_two(moebert_home, monkeypatch, clock):
    asked = []

    def sweep(folder, first_seed, *, workers):
        asked.append((folder.name, first_seed, workers))
        harness.time.sleep(30.0 / workers)

    monkeypatch.setattr(sweeps_and_widgets, "sweep", sweep)
    assert main.main(["bench", "batch", "--runs", "20"]) == 0
    rounds = [[("1", seed, 1), ("2", seed, 2), ("2", 0, 2)] for seed in (0, 10, 20)]
    assert asked == [call for calls in rounds for call in calls]
    record = harness.read(Store(), "batch")
    assert [row["ratio"] for row in record["summary"]] == [1.0, 2.0, 2.0]
    assert record["summary"][1]["per_second"] == pytest.approx(10 / 15)


def test_a_sweep_that_fails_is_not_timed(moebert_home, monkeypatch, capsys):
    monkeypatch.setattr(sweeps_and_widgets.sys, "executable", "/bin/false")
    assert main.main(["bench", "batch", "--runs", "10"]) == 2
    assert "the sweep failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trainig"], "did you mean 'training'?"),
        (["widgets", "--batch", "2"], "bench widgets has no option --batch"),
        (["--device", "cud"], "did you mean 'cuda'?"),
        (["--repeats", "0"], "expected at least 1"),
        (["--length", "513"], "at most 512 tokens"),
        (["--out", "no/such/folder/x.json"], "expected a file in an existing folder"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(argv, message, capsys):
    assert main.main(["bench", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
