"""Rows that say what sets a run apart, and a listing that stays short."""

import shlex

import fixture_home
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.cli import main
from moebert_lib.config.presets import SCALES
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import student
from moebert_lib.experiments.teacher import importance_key, teacher_key
from moebert_lib.runs import local_pool, plan, status
from moebert_lib.runs.execution import NotebookFailed
from moebert_lib.store.store import Entry, StageKey, Store

CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2),
        "n_experts": st.sampled_from([1, 2, 4]),
        "expert_size": st.sampled_from([9, 12, 16]),
        "n_shared": st.integers(6, 9),
        "gate_scaling": st.sampled_from(["inside", "outside"]),
        "routing": st.sampled_from(["hash-random", "gate-token"]),
        "distill": st.sampled_from(["all", "none"]),
        "epochs": st.sampled_from([0.5, 1.0]),
        "max_length": st.sampled_from([16, 32]),
        "teacher_dropout": st.booleans(),
        "importance_split": st.sampled_from(["train", "validation"]),
        "shared_neurons": st.sampled_from(["copied", "tied"]),
    },
)


def entry(kind, key, row=None) -> Entry:
    return Entry(StageKey.read(kind, key), None, row or {}, 60.0, True)


@pytest.mark.parametrize("scale", ["smoke", "quick"])
@pytest.mark.parametrize("make", [teacher_key, importance_key, student.student_key])
def test_what_a_scale_decides_is_not_named(scale, make):
    assert (
        status.summary(entry("x", make(Store(), Settings.at(scale)).values())) == f"{scale} library"
    )


@given(one=CHANGES, other=CHANGES)
@pytest.mark.parametrize("make", [teacher_key, student.conversion_key, student.student_key])
def test_two_experiments_read_alike_only_if_they_are_one(make, one, other):
    keys = [make(Store(), Settings.at("smoke", **changes)) for changes in (one, other)]
    rows = [status.summary(entry("x", key.values())) for key in keys]
    assert (rows[0] == rows[1]) == (keys[0] == keys[1])


def test_a_row_names_each_choice():
    settings = Settings.at("smoke", n_experts=2, gate_scaling="outside", epochs=0.5)
    row = status.summary(entry("student", student.student_key(Store(), settings).values()))
    assert row.split() == ["smoke", "library", "n_experts=2", "gate_scaling=outside", "epochs=0.5"]


def test_a_notebooks_row_has_its_own_parameters_too():
    settings = Settings.at("quick", seed=3).model_dump()
    key = {"notebook": "01_importance", "settings": settings}
    assert status.summary(entry("notebook", key)) == "01_importance quick library seed=3"
    row = {"changed": {"n_resamples": 9, "seed": 3}}
    told = "01_importance quick library n_resamples=9 seed=3"
    assert status.summary(entry("notebook", key, row)) == told
    assert status.summary(entry("notebook", {"notebook": "00_the_idea"})) == "00_the_idea"


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = fixture_home.make(
        tmp_path / "home", {"01_importance": "settings", "02_fails": "fails"}
    )
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    return folder


@pytest.mark.parametrize("n", [3, 12])
def test_status_counts_by_kind_and_lists_the_newest_or_all(home, n, capsys):
    for seed in range(n):
        Store().make(StageKey("student", {"task": "library", "seed": seed}), lambda folder: {})
    assert main.main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["student", str(n), "stored"]
    assert sum("library" in line for line in lines) == min(n, 10)
    assert any("--all" in line for line in lines) == (n > 10)
    assert main.main(["status", "--all"]) == 0
    out = capsys.readouterr().out
    assert sum("library" in line for line in out.splitlines()) == n and "seed=2" in out


def test_status_of_nothing_is_one_line(home, capsys):
    assert main.main(["status"]) == 0
    assert capsys.readouterr().out.startswith("0 stored") and not (home / "runs").exists()


def test_a_failed_run_is_listed_with_its_values(home):
    path = home / "notebooks" / "02_fails.ipynb"
    path.write_text(path.read_text().replace("seed == 0", "seed == 4"))
    (job,) = plan.plan(plan.select(["02"]), parameters={"seed": 4})
    with pytest.raises(NotebookFailed):
        local_pool.run([job])
    failed = next(line for line in status.lines() if line.startswith("failed"))
    assert failed.startswith("failed      02_fails seed=4, cell 4: ValueError")


def test_every_scale_can_be_told_from_the_others():
    rows = {status.summary(entry("x", teacher_key_of(scale))) for scale in SCALES}
    assert len(rows) == len(SCALES) and all(len(shlex.split(row)) == 2 for row in rows)


def teacher_key_of(scale):
    """As a teacher's key, without reading the scale's data."""
    from moebert_lib.experiments.stage_keys import DATA, TEACHER, chosen

    settings = Settings.at(scale)
    return {**chosen(settings, DATA + TEACHER), "teacher_seed": 0, "model": settings.model}
