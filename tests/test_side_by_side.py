"""Different notebooks side by side: how many, in which order, and what runs alone."""

import json
from dataclasses import replace
from pathlib import Path

import fixture_home
import pytest

from moebert_lib.runs import cost, local_pool, plan
from moebert_lib.runs.local_pool import Local


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    folder = fixture_home.make(tmp_path / "home", {"00_the_idea": "plain", "01_slow": "settings"})
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    return folder


def declared(source: str, **metadata) -> str:
    """A notebook that says something to the library in its metadata."""
    notebook = json.loads(source)
    notebook["metadata"]["moebert"] = metadata
    return json.dumps(notebook)


def declare(path: Path, **metadata) -> None:
    path.write_text(declared(path.read_text(), **metadata))


def planned(*names, **parameters):
    return plan.plan(plan.select(names), scale="smoke", parameters=parameters)


def test_notebooks_divide_the_cores_and_one_has_them_all(monkeypatch):
    def side_by_side(n_cores, jobs=9, gigabytes=64):
        monkeypatch.setattr(local_pool, "cores", lambda: n_cores)
        monkeypatch.setattr(local_pool, "free_memory", lambda: gigabytes << 30)
        local = local_pool.side_by_side([None] * jobs)
        return local.workers, local.threads

    monkeypatch.setattr(local_pool, "gpus", list)
    monkeypatch.setattr(cost, "runs", lambda jobs: [[]])
    assert [side_by_side(n) for n in (1, 2, 4, 16)] == [(1, None), (2, 1), (2, 2), (4, 4)]
    assert side_by_side(16, jobs=1) == side_by_side(16, gigabytes=1) == (1, None)
    monkeypatch.setattr(local_pool, "gpus", lambda: ["0", "1"])
    assert side_by_side(16) == (1, None)


def test_alone_is_one_run_at_a_time_with_all_cores():
    alone = Local(2, gpus=["2", "5"]).alone()
    assert (alone.workers, alone.threads, alone.gpus) == (1, None, ("2",))
    one = Local(1, threads=3)
    assert one.alone() is one  # nothing runs beside it as it is


def test_timings_are_taken_last_and_alone(home, monkeypatch):
    declare(home / "notebooks" / "00_the_idea.ipynb", timed=True)
    said, engine = [], Local(2)
    local_pool.run(planned("00_the_idea", "01_slow"), engine=engine, echo=said.append)
    ends = [i for i, line in enumerate(said) if "01_slow done" in line]
    starts = [i for i, line in enumerate(said) if "00_the_idea running" in line]
    assert ends[0] < starts[0]


def test_what_asks_for_most_is_started_first():
    jobs = planned("02_experts", "03_distillation", "06_results")
    assert [jobs[i].name[:2] for i in local_pool._in_turn(jobs, [0, 1, 2], 2)] == ["06", "03", "02"]
    points = [planned("03", seed=seed)[0] for seed in (5, 1, 3)]
    assert local_pool._in_turn(points, [0, 1, 2], 2) == [0, 1, 2]  # a sweep keeps its order
    assert local_pool._in_turn(jobs, [0, 1, 2], 1) == [0, 1, 2]


def test_a_new_record_of_a_benchmark_makes_a_new_run_of_the_notebook_that_draws_it(home):
    def keys():
        jobs = planned("00_the_idea", "01_slow")  # without settings, and with
        timed = [replace(job, source=declared(job.source, timed=True)) for job in jobs]
        return [job.key() for job in (*timed, *jobs)]

    before = keys()
    for place in ("figures/bench/inference.json", "runs/bench-inference-1.json"):
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        (home / place).write_text("{}")
        after = keys()
        assert after[0] != before[0] and after[1] != before[1] and after[2:] == before[2:]
        before = after
