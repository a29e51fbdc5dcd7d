"""The plain papermill command gives what ``moebert run`` gives, also two at a time."""

import os
import subprocess
import sys
from pathlib import Path

import fixture_home
import pytest

from moebert_lib.runs import export, local_pool, plan

PAPERMILL = [sys.executable, "-m", "papermill", "--no-progress-bar"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    folder = fixture_home.make(tmp_path / "home", {"03_distillation": "recorded"})
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


def start(output: str, *words: str) -> subprocess.Popen:
    """The real command, as a user types it."""
    command = [*PAPERMILL, "notebooks/03_distillation.ipynb", output, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def papermill(output: str, *words: str) -> str:
    """The same, waited for; what it said on stderr where it failed."""
    process = start(output, *words)
    _, err = process.communicate(timeout=300)
    return err if process.returncode else ""


def smoke(seed: int, *more: str) -> list[str]:
    return ["-p", "scale", "smoke", "-p", "n_experts", "2", "-p", "seed", str(seed), *more]


COLUMNS = ["notebook", "scale", "task", "seed", "n_experts", "steps", "experts", "total", "digest"]


def test_two_at_a_time_give_the_rows_that_moebert_run_gives(home):
    both = [start(f"out{seed}.ipynb", *smoke(seed)) for seed in (1, 2)]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    alone = export.frame()[COLUMNS]
    assert alone["seed"].tolist() == [1, 2] and alone["total"].tolist() == [4, 5]
    assert alone["experts"].tolist() == alone["n_experts"].tolist() == [2, 2]
    folders = sorted((home / "runs" / "sessions").iterdir())
    assert len(folders) == 2
    assert all(
        str(folder) in "".join(map(Path.read_text, home.glob("*.ipynb"))) for folder in folders
    )
    values = [{"n_experts": 2, "seed": seed} for seed in (1, 2)]
    paths = plan.select(["03"])
    jobs = [plan.plan(paths, scale="smoke", parameters=one)[0] for one in values]
    entries = local_pool.run(jobs, engine=local_pool.Local(2))
    assert {entry.folder.name for entry in entries} == {folder.name for folder in folders}
    for entry in entries:
        copy = home / "runs" / "sessions" / entry.folder.name
        for name in ("figures/figure1.csv", "metrics.json"):
            assert (entry.folder / name).read_bytes() == (copy / name).read_bytes()
    assert export.frame()[COLUMNS].equals(alone)  # the same runs: still one row each


def test_with_inject_paths_the_folder_lies_beside_the_output(home):
    (home / "results").mkdir()
    steps = ["-p", "steps", "[3, 4]"]
    assert not papermill("results/a.ipynb", "--inject-paths", *smoke(0, *steps))
    (folder,) = (home / "results").glob("notebook-*")
    assert (folder / "figures" / "figure1.csv").is_file()
    (row,) = export.frame().to_dict("records")
    assert (row["total"], row["steps"], row["notebook"]) == (7, "[3, 4]", "03_distillation")
    assert export.frame([home / "results"])["digest"].tolist() == [row["digest"]]


@pytest.mark.parametrize(
    "words, said",
    [
        (["-p", "n_expert", "2"], "did you mean 'n_experts'"),
        (["-p", "routing", "hash-randon"], "did you mean 'hash-random'"),
        (["-p", "steps", "many"], "steps"),
        (["-p", "task", "rte"], "data_dir"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_before_anything_is_made(home, words, said):
    err = papermill("out.ipynb", "-p", "scale", "smoke", *words)
    last = [line for line in err.splitlines() if "UserError" in line][-1]
    assert said in last, err
    assert not (home / "runs").exists()


def test_a_task_of_files_needs_no_quotes(home, tiny_glue):
    assert not papermill(
        "out.ipynb", *smoke(0), "-p", "task", "rte", "-p", "data_dir", str(tiny_glue)
    )
    (row,) = export.frame().to_dict("records")
    assert (row["task"], row["task_name"]) == ("rte", "rte")


def test_a_run_that_stops_half_way_is_in_no_table(home):
    path = home / "notebooks" / "03_distillation.ipynb"
    path.write_text(path.read_text().replace("record(experts", "1 / 0; record(experts"))
    assert "ZeroDivisionError" in papermill("out.ipynb", *smoke(0))
    assert not list((home / "runs").rglob("entry.json"))
    assert os.listdir(home / "runs" / "sessions")
