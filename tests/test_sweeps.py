"""Grids are refused or planned whole; a sweep leaves one table, in the grid's order."""

import shutil

import fixture_home
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.cli import main
from moebert_lib.config.errors import UserError
from moebert_lib.runs import execution, plan, status, sweep
from moebert_lib.runs.execution import NotebookFailed
from moebert_lib.runs.local_pool import Local
from moebert_lib.store.store import Entry, StageKey

SMOKE = {"notebook": "01", "scale": "smoke"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    names = {"01_importance": "settings", "02_fails": "fails", "03_distillation": "settings"}
    folder = fixture_home.make(tmp_path / "home", names)
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    return folder


def values(grid, *names):
    jobs = sweep.plan({**SMOKE, **grid}).jobs
    return [
        tuple({**job.parameters, **job.settings.model_dump()}[n] for n in names) for job in jobs
    ]


def test_the_grid_is_a_product_and_its_last_axis_is_fastest():
    grid = {"tasks": ["library", "follows"], "seeds": [1, 0], "settings": {"n_experts": [2, 4]}}
    assert values(grid, "task", "seed", "n_experts") == [
        ("library", 1, 2),
        ("library", 1, 4),
        ("library", 0, 2),
        ("library", 0, 4),
        ("follows", 1, 2),
        ("follows", 1, 4),
        ("follows", 0, 2),
        ("follows", 0, 4),
    ]


def test_points_are_sets_of_values_that_go_together():
    sets = [{"n_experts": 2, "n_shared": 8}, {"n_experts": 4, "n_shared": 4}]
    found = values({"seeds": [0, 1], "points": sets}, "seed", "n_experts", "n_shared")
    assert found == [(0, 2, 8), (1, 2, 8), (0, 4, 4), (1, 4, 4)]


def test_a_point_may_name_a_notebook_of_its_own(home):
    (home / "notebooks" / "00_the_idea.ipynb").write_bytes(
        (fixture_home.FIXTURES / "plain.ipynb").read_bytes()
    )
    grid = {
        "scale": "smoke",
        "data_dir": "",
        "settings": {"n_shared": 11},
        "points": [
            {"notebook": "00"},
            {"notebook": "01", "seed": 2},
            {"notebook": "01", "seed": 2},
            {},
        ],
    }
    plain, one, usual = sweep.plan(grid).jobs
    assert [job.name for job in (plain, one, usual)] == [
        "00_the_idea",
        "01_importance",
        "03_distillation",
    ]
    assert plain.given == {} and (one.settings.seed, one.settings.n_shared) == (2, 11)
    with pytest.raises(UserError, match="unknown parameter 'seed' of 00_the_idea"):
        sweep.plan({"points": [{"notebook": "00", "seed": 1}]})
    assert list(sweep.table([plain, one], [None, None])["notebook"]) == [
        "00_the_idea",
        "01_importance",
    ]


def test_a_point_of_listed_seeds_is_one_seed_unless_the_grid_says_otherwise():
    assert values({"seeds": [0]}, "n_seeds") == [(1,)]
    assert values({"seeds": [0], "settings": {"n_seeds": 2}}, "n_seeds") == [(2,)]
    assert values({}, "n_seeds") == [
        (plan.plan(plan.select(["01"]), scale="smoke")[0].settings.n_seeds,)
    ]


def test_one_value_needs_no_list_and_lists_are_values_of_list_parameters():
    grid = {"tasks": "library", "settings": {"n_experts": 2, "layers": [[0], [1]]}}
    assert values(grid, "task", "n_experts", "layers") == [("library", 2, [0]), ("library", 2, [1])]


def test_a_grid_of_tasks_from_files_needs_no_task_of_the_scales_own(tiny_glue):
    grid = {"data_dir": str(tiny_glue), "tasks": ["rte", "cola"], "seeds": [0]}
    assert values(grid, "task") == [("rte",), ("cola",)]


def test_notebooks_of_one_name_in_two_folders_are_told_apart(tmp_path):
    jobs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        path = tmp_path / name / "same.ipynb"
        path.write_bytes((fixture_home.FIXTURES / "settings.ipynb").read_bytes())
        jobs.append(sweep.plan({"notebook": str(path), "scale": "smoke"}))
    assert jobs[0].folder != jobs[1].folder
    assert execution.failure_folder(jobs[0].jobs[0]) != execution.failure_folder(jobs[1].jobs[0])
    assert jobs[0].jobs[0].key() == jobs[1].jobs[0].key()  # the same code and values: one run


def test_doubles_are_one_point():
    assert values({"seeds": [0, 0, 1]}, "seed") == [(0,), (1,)]
    assert values({"settings": {"n_experts": [4, 4]}}, "n_experts") == [(4,)]


@pytest.mark.parametrize(
    "grid, said",
    [
        ([], "expected names and values"),
        ({"sedes": [1]}, "did you mean 'seeds'"),
        ({"settings": ["n_shared"]}, "settings must hold names"),
        ({"points": {"n_experts": 2}}, "points must be a list"),
        ({"seeds": []}, "'seeds' has no values"),
        ({"seeds": 3}, "seeds: 3: list them, such as [0, 1, 2]"),
        ({"settings": {"n_shared": []}}, "'n_shared' has no values"),
        ({"settings": {"n_shard": [1]}}, "did you mean 'n_shared'"),
        ({"settings": {"n_experts": [2, 99]}}, "point n_experts=99: "),
        ({"seeds": [1], "settings": {"seed": [2]}}, "'seed' stands in the grid's own line"),
        ({"settings": {"scale": ["quick"]}}, "'scale' stands in the grid's own line"),
        ({"settings": {"n_shared": [8]}, "points": [{"n_shared": 4}]}, "in settings and in points"),
        ({"tasks": ["librari"]}, "did you mean 'library'"),
        ({"scale": "quik"}, "did you mean 'quick'"),
        ({"notebook": "1o"}, "no notebook '1o'"),
        ({"seeds": ["0-4"]}, "seed='0-4'"),
        ({"seeds": [2**31]}, "less than or equal to"),
        ({"seeds": list(range(101)), "settings": {"n_experts": [2] * 100}}, "10,100 points"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line_and_writes_nothing(home, grid, said):
    with pytest.raises(UserError) as error:
        sweep.plan({**SMOKE, **grid} if isinstance(grid, dict) else grid)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in home.iterdir()) == ["notebooks"]


def test_a_file_names_itself_and_what_it_gives_twice(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("seeds: [1]\nscale: smoke\nseeds: [2]\n")
    with pytest.raises(UserError, match=r"twice.yaml: 'seeds' is given twice"):
        sweep.read(path)
    path.write_text("a: &x [1]\nseeds: *x\n")
    with pytest.raises(UserError, match="aliases"):
        sweep.read(path)
    path.write_text("notebook: 01\nscale: smoke\nseeds: [2]\n")  # 01 is the number 1 in YAML
    assert [job.name for job in sweep.read(path).jobs] == ["01_importance"]
    assert sweep.read(path).name == "twice"


def test_a_sweep_runs_leaves_its_table_and_is_reused(home):
    grid = {**SMOKE, "seeds": [1, 0], "settings": {"label": ["a", "<b>"]}}
    lines: list[str] = []
    frame = sweep.sweep(grid, echo=lines.append)
    assert frame["seed"].tolist() == [1, 1, 0, 0] and set(frame["state"]) == {"done"}, lines
    assert frame["label"].tolist() == ["a", "<b>", "a", "<b>"]
    (folder,) = (home / "runs" / "sweeps").iterdir()
    table = (folder / "table.csv").read_bytes()
    assert pd.read_csv(folder / "table.csv")["run"].tolist() == frame["run"].tolist()
    assert all((home / "runs" / run / "notebook.ipynb").is_file() for run in frame["run"])
    assert not (home / "figures").exists()  # a sweep's figures stay with its runs
    n_lines = len(lines)
    again = sweep.sweep(grid, echo=lines.append)
    assert again.equals(frame) and (folder / "table.csv").read_bytes() == table
    assert not any("running" in line for line in lines[n_lines:])


def failing():
    return {"notebook": "02", "scale": "smoke", "seeds": [0, 1]}


def test_what_failed_is_told_remembered_and_run_again_only_when_asked(home):
    lines: list[str] = []
    planned = sweep.plan(failing())
    failure, entry = sweep.run(planned, echo=lines.append)
    assert isinstance(failure, NotebookFailed) and isinstance(entry, Entry)
    (record,) = status.recorded()
    told = [(state, error.partition(";")[0]) for _, state, error in status.states(record)]
    assert told == [("failed", "cell 3: ValueError: seed 0"), ("done", "")]
    n_lines = len(lines)
    sweep.run(planned, echo=lines.append)
    assert not any("running" in line for line in lines[n_lines:])
    assert any("failed before" in line for line in lines[n_lines:])
    (again,) = sweep.with_failures()
    sweep.run(again, retry_failed=True, echo=lines.append)
    assert sum("running" in line for line in lines[n_lines:]) == 1


def test_every_point_has_one_state_in_the_sweep_in_its_table_and_in_status(
    home, tmp_path, monkeypatch, capsys
):
    """Seed 0 fails in a cell, 1 dies on a lost node, 2 cannot start, 3 breaks the pool's slot."""
    make = Local.make
    errors = {
        1: NotebookFailed("02_fails", None, "lost: a node", "died"),
        2: OSError(12, "Cannot allocate memory"),
        3: ZeroDivisionError("in a slot"),
    }

    def make_or_break(self, job, **how):
        if error := errors.get(job.parameters["seed"]):
            raise error
        return make(self, job, **how)

    def ends_with(*words, counts):
        assert main.main(["sweep", str(grid), *words]) == (0 if "failed" not in counts else 1)
        assert counts in capsys.readouterr().out.splitlines()
        assert main.main(["status"]) == 0
        assert f": {counts}" in capsys.readouterr().out
        (table,) = (home / "runs" / "sweeps").glob("*/table.csv")
        assert status.count_states(pd.read_csv(table)["state"]) == counts

    grid = tmp_path / "grid.yaml"
    grid.write_text("notebook: 02\nseeds: [0, 1, 2, 3, 4]\n")
    monkeypatch.setattr(Local, "make", make_or_break)
    ends_with(counts="1 of 5 done, 2 failed, 1 died, 1 not run")
    errors.clear()
    ends_with(counts="2 of 5 done, 2 failed, 1 died")
    ends_with("--retry-failed", counts="4 of 5 done, 1 failed")
    path = home / "notebooks" / "02_fails.ipynb"
    path.write_text(path.read_text().replace("seed == 0", "seed == 9"))
    shutil.rmtree(home / "runs" / "sweeps")
    ends_with(counts="5 of 5 done")


def test_a_preview_says_what_would_happen_and_why(home):
    planned = sweep.plan(failing())
    assert [does for _, does, _ in sweep.preview(planned.jobs)] == ["run", "run"]
    sweep.run(planned, echo=lambda line: None)
    (_, one, why), (_, other, _) = sweep.preview(planned.jobs)
    assert (one, other) == ("skip", "reuse") and "cell 3" in why
    path = home / "notebooks" / "02_fails.ipynb"
    path.write_text(path.read_text().replace("seed == 0", "seed == 9"))
    seen = [(does, why) for _, does, why in sweep.preview(sweep.plan(failing()).jobs)]
    assert [does for does, _ in seen] == ["run", "run"]
    assert all("code cell" in why or "never" in why for _, why in seen)


@pytest.mark.parametrize("how", [{}, {"retry_failed": True}, {"force": True}])
def test_what_is_run_is_what_was_previewed(how):
    planned = sweep.plan(failing())
    sweep.run(planned, echo=lambda line: None)
    expected = [does for _, does, _ in sweep.preview(planned.jobs, **how)]
    lines: list[str] = []
    sweep.run(planned, echo=lines.append, **how)
    assert sum("running" in line for line in lines) == expected.count("run")
    assert sum("reused" in line for line in lines) == expected.count("reuse")
    assert sum("failed before" in line for line in lines) == expected.count("skip")


def test_no_failed_sweep_is_no_sweep_to_retry():
    with pytest.raises(UserError, match="no sweep here has failed runs"):
        sweep.with_failures()


@given(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=2, max_size=6))
def test_means_are_those_of_the_runs_with_students_interval(accuracies):
    rows = [
        {
            "scale": "smoke",
            "task": "library",
            "seed": seed,
            "n_experts": n,
            "state": "done",
            "run": "",
            "accuracy": accuracy + n,
        }
        for n in (2, 4)
        for seed, accuracy in enumerate(accuracies)
    ]
    frame = sweep.means(pd.DataFrame(rows))
    assert frame["n_experts"].tolist() == [2, 4] and set(frame["n"]) == {len(accuracies)}
    assert frame["mean"].tolist() == pytest.approx([np.mean(accuracies) + n for n in (2, 4)])
    assert (frame["low"] <= frame["mean"]).all() and (frame["mean"] <= frame["high"]).all()
    assert "seed" not in frame


def test_means_leave_out_what_failed_and_what_recorded_nothing():
    row = {"scale": "smoke", "task": "library", "seed": 0, "state": "failed", "run": ""}
    assert sweep.means(pd.DataFrame([row])).empty
    rows = [row, {**row, "seed": 1, "state": "done", "accuracy": 0.5}]
    (one,) = sweep.means(pd.DataFrame(rows)).to_dict("records")
    assert (one["n"], one["mean"]) == (1, 0.5) and np.isnan(one["low"])


def test_what_a_notebook_records_overwrites_no_column_of_the_table(home):
    told = {"seed": 9, "state": "x", "run": "y", "accuracy": "high"}
    job = sweep.plan({**SMOKE, "seeds": [1]})
    entry = Entry(StageKey("notebook", {}), home, {"metrics": told}, 1.0, True)
    frame = sweep.table(job.jobs, [entry])
    assert frame.loc[0, ["seed", "state", "run"]].tolist() == [1, "done", "home"]
    assert {f"metric.{name}" for name in ("seed", "state", "run")} <= set(frame)
    assert sweep.means(frame).empty  # "high" is no number


def test_without_the_headline_metric_every_recorded_number_has_a_mean():
    row = {"scale": "smoke", "task": "library", "seed": 0, "state": "done", "run": ""}
    rows = [row | {"loss": 1.0, "fair": True}, row | {"seed": 1, "loss": 2.0, "fair": False}]
    (one,) = sweep.means(pd.DataFrame(rows)).to_dict("records")
    assert (one["metric"], one["n"], one["mean"]) == ("loss", 2, 1.5)


def test_a_record_that_is_not_whole_is_named_and_passed_over(home, capsys):
    folder = home / "runs" / "sweeps" / "x-0"
    folder.mkdir(parents=True)
    (folder / status.SWEEP).write_text("{")
    assert status.recorded() == []
    assert "sweep.json is not whole" in capsys.readouterr().err
