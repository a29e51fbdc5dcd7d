"""One table of all runs: the same whatever the order of stores, and the same read back."""

import csv
import itertools
import json
import shutil
import sys

import pandas as pd
import pytest
from checkout import ROOT
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from stored import put

from moebert_lib.cli import main
from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.data.tasks import TASKS
from moebert_lib.experiments import dataset, student, teacher
from moebert_lib.experiments.stage_keys import dataset_settings
from moebert_lib.runs import export, plan
from moebert_lib.store.committed_results import CommittedResults
from moebert_lib.store.store import Store, sealed
from moebert_lib.training.evaluation import score

FIRST = "kind notebook scale task seed".split()
LAST = "digest created superseded seconds commit cpu torch_threads".split()
LAST += "torch transformers data store".split()
OPENED: list[str] = []  # files, from the moment a test clears it
sys.addaudithook(lambda event, args: event == "open" and OPENED.append(str(args[0])))


def notebook(name="03_x", *, parameters=None, **settings):
    """A notebook's key by hand."""
    given = {"overrides": {}} | (parameters or {})
    return {"notebook": name, "parameters": given, "settings": settings or None, "inputs": {}}


def only(table):
    assert len(table) == 1
    return table.iloc[0]


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def test_a_stored_student_has_each_of_its_settings_and_results(runs):
    settings = Settings.at("smoke", seed=3, epochs=0.5, n_experts=2)
    odd = {"guessing": float("nan"), "loss": float("inf"), "wide": 2**70, "fair": True, "all": [1]}
    row = {"task": "library", "accuracy": 0.5, "steps": 0} | odd
    entry = Store(runs).make(student.student_key(Store(), settings), lambda folder: row)
    one = only(export.frame([runs], kind="student"))
    known = settings.model_dump() | {"expert_size": 32, "n_shared": 21, "teacher_seed": 0}
    told = {name for name in Settings.model_fields if name in one} - {"scale"}
    there = {name: one[name] for name in told if pd.notna(one[name])}
    assert len(told) > 30 and there == {
        name: known[name] for name in told if known[name] is not None
    }
    assert (one["accuracy"], one["steps"], one["digest"]) == (0.5, 0, entry.digest)
    assert one[["guessing", "loss", "wide", "notebook", "scale"]].isna().all()
    assert not {"fair", "all"} & set(one.index)
    assert one["data"] == entry.key.values()["conversion"]["importance"]["teacher"]["data"]
    assert one["created"] == entry.record()["created"] and one["seconds"] == entry.seconds
    assert one["torch"] == entry.record()["versions"]["torch"] and one["store"] == str(runs)


def test_a_stored_notebook_has_its_settings_parameters_and_metrics(runs):
    values = {"seed": 2, "n_resamples": 9, "n_shared": 11}
    (job,) = plan.plan(plan.select(["01"]), scale="smoke", parameters=values)
    row = {"notebook": job.name, "figures": ["a.png"], "metrics": {"spread": 0.25, "best": 3}}
    Store(runs).make(job.key(), lambda folder: row)
    one = only(export.frame([runs.parent]))
    assert [one[name] for name in FIRST] == ["notebook", "01_importance", "smoke", "library", 2]
    assert (one["n_shared"], one["n_resamples"], one["other_tasks"]) == (11, 9, "[]")
    assert (one["spread"], one["best"]) == (0.25, 3) and one["data"] == job.key().origin["inputs"][
        "data"
    ]
    assert "overrides" not in one and "figures" not in one


def test_columns_come_in_the_documented_order(runs):
    settings = {"zeal": 1, "epochs": 1.0, "model": "m", "task": "t", "seed": 0, "scale": "smoke"}
    key = notebook(parameters={"layers": [1], "depth": 2, "task": "", "seed": 0}, **settings)
    put(runs, "notebook", key, {"metrics": {"best": 1.0, "area": 2.0}})
    between = ["model", "epochs", "zeal", "depth", "layers", "area", "best"]
    assert list(export.frame([runs])) == FIRST + between + LAST


def test_of_a_nested_key_the_outer_value_is_told_and_no_machinery(runs):
    inner = {"weight_decay": 0.5, "task": "t", "data": "d", "code": "c", "versions": {"torch": "1"}}
    conversion = {"teacher": inner, "sizes": [1, 2]}
    put(runs, "student", {"conversion": conversion, "weight_decay": 0.0, "code": "c"})
    one = only(export.frame([runs], kind="student"))
    assert list(one.index) == FIRST + ["weight_decay", "sizes"] + LAST
    assert one["weight_decay"] == 0.0 and one["sizes"] == "[1, 2]"


def test_a_name_that_comes_twice_says_what_it_is_the_second_time(runs):
    key = notebook(parameters={"layer": 1, "store": "p"}, epochs=2.0, digest="s")
    put(runs, "notebook", key, {"metrics": {"epochs": 0.5, "layer": 3.0, "new": 1}})
    one = only(export.frame([runs]))
    twice = ["epochs", "metric.epochs", "layer", "metric.layer"]
    assert one[[*twice, "setting.digest", "parameter.store"]].tolist() == [2, 0.5, 1, 3, "s", "p"]
    assert len(one["digest"]) == 64 and one["store"] == str(runs)


def test_a_column_has_one_type_whichever_rows_have_a_value(runs):
    for seed, limit in enumerate([None, 8, None]):
        settings = dict(
            seed=seed,
            max_train_examples=limit,
            max_eval_examples=None,
            epochs=None,
            teacher_dropout=bool(seed),
            model="m",
        )
        put(runs, "notebook", notebook(parameters={"any": [1, "x", True][seed]}, **settings))
    table = export.frame([runs])
    types = table.dtypes.astype(str)
    names = ["seed", "max_train_examples", "max_eval_examples", "teacher_dropout", "epochs"]
    assert list(types[names]) == ["Int64", "Int64", "Int64", "boolean", "Float64"]
    assert types["model"] == types["any"] == types["commit"] == types["scale"] == "string"
    assert [*table["any"], *table["max_train_examples"].fillna(-1)] == ["1", "x", "true", -1, 8, -1]


def test_rows_are_ordered_by_what_was_chosen(runs):
    chosen = list(itertools.product(["02_b", "10_a"], ["cola", "rte"], [0, 2, 10], [0.5, 1.0]))
    for name, task, seed, epochs in reversed(chosen):
        put(runs, "notebook", notebook(name, scale="smoke", task=task, seed=seed, epochs=epochs))
    table = export.frame([runs])[["notebook", "task", "seed", "epochs"]]
    assert list(table.itertuples(index=False, name=None)) == chosen


@given(placed=st.lists(st.sets(st.sampled_from("abc"), min_size=1), min_size=1, max_size=6))
def test_the_order_of_stores_changes_nothing(tmp_path_factory, capsys, placed):
    root = tmp_path_factory.mktemp("stores")
    for name in "abc":
        (root / name).mkdir()
    for index, names in enumerate(placed):
        for name in names:
            when = f"2026-01-0{1 + (index + ord(name)) % 3}T00:00:00+00:00"
            row = {"accuracy": 0.5, "guessing": float("nan")}
            put(root / name, "student", {"seed": index}, row, created=when)
    first, *others = itertools.permutations(root / name for name in "abc")
    table = export.frame(first, kind="student")
    assert list(table["seed"]) == list(range(len(placed)))
    for order in others:
        assert_frame_equal(export.frame(order, kind="student"), table)
    assert capsys.readouterr().err == ""


def test_where_copies_differ_the_oldest_is_kept_and_one_line_says_how_much(tmp_path, capsys):
    days = {"new": "2026-03-01", "old": "2026-01-01", "mid": "2026-02-01"}
    for name, day in days.items():
        late = {"accuracy": 0.5625, "late": 1} if name == "new" else {}
        row = {"f1": 0.25, "accuracy": 0.5} | late
        put(tmp_path / name, "student", {"seed": 0}, row, created=f"{day}T00:00:00+00:00")
    one = only(export.frame([tmp_path / name for name in days], kind="student"))
    assert (one["accuracy"], one["store"]) == (0.5, str(tmp_path / "old")) and "late" not in one
    (line,) = capsys.readouterr().err.splitlines()
    assert one["digest"][:16] in line and "accuracy by 0.062" in line and "late not in all" in line
    assert all(str(tmp_path / name) in line for name in days) and "f1" not in line


def edited(folder, seal=sealed, **fields):
    record = json.loads((folder / "entry.json").read_text())
    (folder / "entry.json").write_text(json.dumps(seal(record | fields)))


DAMAGE = {
    "cut": lambda folder: (folder / "entry.json").write_text('{"kind": "stu'),
    "no text": lambda folder: (folder / "entry.json").write_bytes(b"\xff\xfe{}"),
    "too deep": lambda folder: (folder / "entry.json").write_text("[" * 99_999),
    "no row": lambda folder: edited(folder, row=None),
    "half a character": lambda folder: edited(folder, dict, row={"\ud800": 1}),
    "a better number": lambda folder: edited(folder, dict, row={"accuracy": 1.0}),
    "another key": lambda folder: edited(folder, key={"seed": 9}),
    "a folder": lambda folder: (folder / "entry.json").unlink() or (folder / "entry.json").mkdir(),
    "renamed": lambda folder: folder.rename(folder.with_name("student-" + "0" * 16)),
    "no name": lambda folder: folder.rename(folder.with_name("student (copy)")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_record_that_cannot_be_used_is_left_out_and_named(runs, capsys, damage):
    put(runs, "student", {"seed": 0})
    before = set(runs.iterdir())
    DAMAGE[damage](put(runs, "student", {"seed": 1}))
    (broken,) = set(runs.iterdir()) - before
    assert only(export.frame([runs], kind="student"))["seed"] == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert broken.name in line and str(runs) in line
    shutil.rmtree(before.pop())
    with pytest.raises(UserError, match="no"):
        export.frame([runs], kind="student")


def test_of_each_run_of_the_kind_one_file_is_opened_once(runs):
    for seed in range(300):
        folder = put(runs, "student", {"seed": seed}, {"accuracy": 0.5})
        (folder / "weights.pkl").write_bytes(b"cos\nsystem\n")
    put(runs, "teacher", {})
    export.frame([runs], kind="teacher")  # what is imported late is opened here
    OPENED.clear()
    assert len(export.frame([runs], kind="student")) == 300
    opened = [path for path in OPENED if path.startswith(f"{runs}/")]
    assert sorted(opened) == sorted(map(str, runs.glob("student-*/entry.json")))


def test_all_kinds_of_this_homes_store_share_a_table(moebert_home):
    put(moebert_home / "runs", "student", {"seed": 1}, {"accuracy": 0.5})
    put(moebert_home / "runs", "notebook", notebook("00_x", parameters={"seed": 4, "n_experts": 2}))
    table = export.frame(kind="all")
    assert list(table["kind"]) == ["notebook", "student"] and pd.isna(table["accuracy"][0])
    assert only(export.frame())[["seed", "n_experts"]].tolist() == [4, 2]


REFUSED = [
    ("runs", "studnet", "did you mean 'student'"),
    ("runs", "notebook", "choose from student, all"),
    ("gone", "student", "no folder '.*gone'"),
    ("empty", "student", "no runs in .*empty;"),
]


@pytest.mark.parametrize("store, kind, said", REFUSED)
def test_what_cannot_be_had_is_refused_in_a_line_that_helps(tmp_path, store, kind, said):
    (tmp_path / "empty").mkdir()
    put(tmp_path / "runs", "student", {"seed": 0})
    with pytest.raises(UserError, match=f"^[^\n]*{said}[^\n]*$"):
        export.frame([tmp_path / store], kind=kind)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = PLAIN | st.lists(PLAIN, max_size=2) | st.dictionaries(st.text(), PLAIN, max_size=2)
NAMES = st.sampled_from(["epochs", "model", "layer", "seed", "task", "a"]) | st.text(max_size=4)
MAPS = st.dictionaries(NAMES, VALUES, max_size=4)


@given(keys=st.lists(st.tuples(MAPS, MAPS, MAPS), min_size=1, max_size=4))
def test_a_table_read_back_is_the_table_and_equal_tables_are_equal_files(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("any")
    for index, (settings, parameters, metrics) in enumerate(keys):
        key = notebook(f"0{index}", parameters=parameters, **settings)
        put(folder / "runs", "notebook", key, {"metrics": metrics | {"third": 1 / 3 + index}})
    table, again = (export.frame([root]) for root in (folder, folder / "runs"))
    assert len(table) == len(keys) and table.columns.is_unique
    for suffix in ("parquet", "csv", "json"):
        one, other = (folder / f"{name}.{suffix}" for name in "xy")
        export.write(table, one)
        export.write(again.assign(store=table["store"]), other)
        assert one.read_bytes() == other.read_bytes()
    assert_frame_equal(pd.read_parquet(folder / "x.parquet"), table)
    values = table.astype(object).where(table.notna(), None)
    assert json.loads((folder / "x.json").read_text("utf-8")) == values.to_dict("records")
    with (folder / "x.csv").open(encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    assert columns == list(table)
    assert rows == [["" if value is None else str(value) for value in row] for row in values.values]


def test_a_file_is_replaced_whole_and_other_places_are_refused(tmp_path):
    put(tmp_path / "runs", "teacher", {"seed": 1})
    table, target = export.frame([tmp_path], kind="teacher"), tmp_path / "out" / "runs.CSV"
    target.parent.mkdir()
    target.touch()
    export.write(table, target)
    assert target.read_text().startswith("kind,") and list(target.parent.iterdir()) == [target]
    said = {
        "out": "is a folder",
        "x.parqet": "did you mean '.parquet'",
        "x": "choose from",
        "gone/x.csv": "no folder",
    }
    for path, words in said.items():
        with pytest.raises(UserError, match=words):
            export.write(table, tmp_path / path)


# Right answers beside the committed ones.


@pytest.fixture(scope="module")
def committed():
    return CommittedResults(ROOT / "figures" / "runs")


@pytest.mark.parametrize("kind", export.JUDGED)
def test_committed_answers_and_right_classes_give_every_stored_metric(committed, kind):
    entries = committed.entries(kind)
    for entry in entries:
        settings = dataset_settings(export.stage_choices(entry.key.values()), "")
        right = teacher.right_answers(committed, settings)["validation"]
        metrics = TASKS[settings.task].metrics
        again = score(teacher.saved_answers(entry), right, metrics)
        assert again == {name: entry.row[name] for name in metrics}
    assert len(entries) == {"teacher": 4, "converted": 192, "student": 201}[kind]


def test_right_classes_are_added_to_results_that_have_none(moebert_home, tiny_glue, tmp_path):
    settings = Settings.at("smoke", task="mrpc", data_dir=str(tiny_glue))
    student.conversion(Store(), settings)
    for path in (moebert_home / "runs").glob("right-*"):
        shutil.rmtree(path)
    export.write_results(tmp_path / "results")
    argv = ["export", "--results", str(tmp_path / "results"), "--data-dir", str(tiny_glue)]
    assert main.main(argv) == 0
    results = CommittedResults(tmp_path / "results")
    expected = dataset.dataset(settings).truths()
    assert teacher.right_answers(results, settings)["validation"].tolist() == expected
    assert export.add_right_answers(tmp_path / "results", str(tiny_glue)) == 0


def test_right_classes_of_other_data_are_refused(moebert_home, tiny_glue, tmp_path, monkeypatch):
    settings = Settings.at("smoke", task="mrpc", data_dir=str(tiny_glue))
    student.conversion(Store(), settings)
    shutil.rmtree(next((moebert_home / "runs").glob("right-*")))
    export.write_results(tmp_path / "results")
    shutil.copytree(tiny_glue / "mrpc", tmp_path / "other" / "mrpc")
    path = tmp_path / "other" / "mrpc" / "validation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row | {"label": 0}) for row in rows))
    with pytest.raises(UserError, match="expected the data it was made from"):
        export.add_right_answers(tmp_path / "results", str(tmp_path / "other"))


def test_data_for_a_table_is_refused(capsys):
    assert main.main(["export", "runs.csv", "--data-dir", "glue"]) == 2
    assert "expected --results beside it" in capsys.readouterr().err
