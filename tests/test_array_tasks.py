"""Points of a grid as tasks of an array job: two at a time over one home, then one table."""

import subprocess
import sys
from pathlib import Path

import fixture_home
import pandas as pd
import pytest

from moebert_lib.cli import main
from moebert_lib.config.errors import UserError
from moebert_lib.runs.sweep import chosen_points

MOEBERT = [sys.executable, "-m", "moebert_lib"]


@pytest.fixture
def grid(tmp_path, monkeypatch) -> Path:
    folder = fixture_home.make(tmp_path / "home", {"03_distillation": "recorded"})
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    monkeypatch.chdir(folder)
    path = folder / "grid.yaml"
    path.write_text("scale: smoke\nseeds: [0, 1, 2]\n")
    return path


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1", [1]), ("0-2", [0, 1, 2]), ("0,2", [0, 2]), ("2,0-1", [0, 1, 2])],
)
def test_numbers_and_ranges_choose_points(text, numbers):
    assert sorted(chosen_points(text, 3)) == numbers


@pytest.mark.parametrize("text", ["3", "0-3", "x", "2-1", "", "-1", "1,"])
def test_what_chooses_no_point_is_refused_in_one_line(text):
    with pytest.raises(UserError) as refusal:
        chosen_points(text, 3)
    assert "\n" not in str(refusal.value)


def test_the_number_of_points_is_printed_and_nothing_runs(grid, capsys):
    assert main.main(["sweep", str(grid), "--count"]) == 0
    assert capsys.readouterr().out.strip() == "3"
    assert not list((grid.parent / "runs").glob("notebook-*"))


def test_two_array_tasks_at_once_share_a_home_and_are_gathered(grid, capsys):
    commands = [[*MOEBERT, "sweep", "grid.yaml", "--only", only] for only in ("0-1", "2")]
    tasks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for task in tasks:
        _, err = task.communicate(timeout=300)
        assert task.returncode == 0, err
    assert len(list((grid.parent / "runs").glob("notebook-*"))) == 3
    assert main.main(["sweep", str(grid)]) == 0
    assert "3 of 3 done" in capsys.readouterr().out
    assert len(list((grid.parent / "runs").glob("notebook-*"))) == 3
    assert main.main(["export", "all.parquet"]) == 0
    assert sorted(pd.read_parquet("all.parquet")["seed"]) == [0, 1, 2]
