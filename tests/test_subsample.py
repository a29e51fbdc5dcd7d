import json
import random

import datasets
import glue_files
import pandas as pd
import pytest
from checkout import ROOT
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.data import loading
from moebert_lib.data.subsample import CAP, HELD_OUT, SECOND_TEST, draw, normalised, text_hashes
from moebert_lib.data.tasks import TASKS
from moebert_lib.experiments import dataset, teacher

RESULTS = ROOT / "figures" / "runs"
FROM_FILES = [name for name, task in TASKS.items() if task.source != "built-in"]


def settings(task, folder, **changes):
    return Settings.at("small", task=task, data_dir=str(folder), max_train_examples=None, **changes)


def changed_copy(task, folder, to):
    """The task's files in another order, with another idx; but for spans, without full stops."""
    (to / task).mkdir(parents=True)
    for path in (folder / task).iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        random.Random(0).shuffle(rows)
        for idx, row in enumerate(rows):
            row["idx"] = 1000 + idx
            for name in TASKS[task].fields if TASKS[task].kind != "span" else ():
                row[name] = row[name].replace(".", "")
        (to / task / path.name).write_text("\n".join(map(json.dumps, rows)))
    return to


def contents(dataset, task):
    rows = dataset.to_list()
    texts = [[normalised(row[name]) for name in TASKS[task].fields] for row in rows]
    return [(text, row[TASKS[task].columns[-1]]) for text, row in zip(texts, rows, strict=True)]


def sentences(texts, labels=None):
    return datasets.Dataset.from_dict({"sentence": texts, "label": labels or [0] * len(texts)})


@pytest.mark.parametrize("task", FROM_FILES)
@pytest.mark.parametrize("limit", [None, 20])
def test_a_shuffled_copy_gives_the_same_examples_in_the_same_order(
    task, limit, tiny_glue, tmp_path
):
    changes = dict(max_eval_examples=limit, second_test=8)
    first = loading.load(settings(task, tiny_glue, **changes))
    copy = changed_copy(task, tiny_glue, tmp_path)
    again = loading.load(settings(task, copy, **changes))
    assert first.also.keys() == again.also.keys() >= {"second_test"}
    for a, b in (
        (first.train, again.train),
        (first.validation, again.validation),
        *((first.also[name], again.also[name]) for name in first.also),
    ):
        assert contents(a, task) == contents(b, task)


def test_by_position_a_shuffled_copy_gives_other_examples(tiny_glue, tmp_path):
    copy = changed_copy("cola", tiny_glue, tmp_path)
    loaded = [
        loading.load(settings("cola", folder, max_eval_examples=16, subsample="position"))
        for folder in (tiny_glue, copy)
    ]
    assert contents(loaded[0].validation, "cola") != contents(loaded[1].validation, "cola")


def test_a_smaller_draw_is_the_beginning_of_a_larger_one(tiny_glue):
    loaded = [
        loading.load(settings("cola", tiny_glue).but(max_train_examples=n)) for n in (20, 40, None)
    ]
    few, more, whole = (part.train["sentence"][:] for part in loaded)
    assert more[:20] == few and whole[:40] == more and len(set(whole)) == 64


def test_the_second_test_set_shares_no_text_with_training_and_is_not_limited(tiny_glue):
    asked = settings("sst2", tiny_glue, second_test=24, max_eval_examples=8)
    loaded = loading.load(asked)
    second = loaded.also["second_test"]
    assert len(second) == 24 and len(loaded.train) == 40 and len(loaded.validation) == 8
    assert not {*second["sentence"]} & {*loaded.train["sentence"]}
    with_limit = loading.load(asked.but(max_train_examples=30))
    assert with_limit.also["second_test"]["sentence"][:] == second["sentence"][:]
    assert loading.load(asked.but(second_test=0)).also == {}


def test_a_second_test_set_works_for_built_in_tasks_too():
    loaded = loading.load(Settings.at("smoke", task="library", second_test=10))
    assert len(loaded.also["second_test"]) == 10 and len(loaded.train) == 64


def test_models_are_judged_on_the_second_test_set_too():
    asked = Settings.at("smoke", task="library", second_test=10)
    metrics = teacher.evaluate(asked, dataset.new_model(asked, TASKS["library"]))
    assert {*metrics} == {"accuracy", "accuracy_second_test"}


def test_a_second_test_set_that_takes_most_of_training_is_refused_by_the_check(tiny_glue):
    with pytest.raises(UserError, match="second_test=33.* 64 training examples; expected at most"):
        loading.check(settings("sst2", tiny_glue, second_test=33))


def test_an_independent_draw_takes_the_same_examples(tiny_glue):
    """Sort by the digest of salt and letters, in a slow obvious loop."""
    import hashlib

    rows = [json.loads(line) for line in (tiny_glue / "qqp" / "train.jsonl").open()]

    def value(row):
        kept = ["".join(c for c in row[f].lower() if c.isalnum()) for f in TASKS["qqp"].fields]
        return hashlib.sha256(f"subsample\n{kept[0]}\n{kept[1]}".encode()).digest()[:8]

    expected = [row["question1"] for row in sorted(rows, key=value)[:16]]
    loaded = loading.load(settings("qqp", tiny_glue).but(max_train_examples=16))
    assert loaded.train["question1"][:] == expected


def test_salts_give_draws_that_do_not_depend_on_each_other():
    many = sentences([f"sentence {i}" for i in range(4000)])
    drawn = [{*draw(many, 1000, salt, TASKS["sst2"])[0]["sentence"]} for salt in (CAP, HELD_OUT)]
    assert 180 < len(drawn[0] & drawn[1]) < 320  # 250 expected, 5 standard deviations are 59


def test_copies_of_a_drawn_text_are_not_in_the_rest_whatever_their_label():
    texts = ["a film", "A film!", "a  film.", "another", "a third", "fourth"]
    examples = sentences(texts, [1, 0, 1, 0, 1, 0])
    for n in range(7):
        drawn, rest = draw(examples, n, SECOND_TEST, TASKS["sst2"])
        assert len(drawn) == n
        seen = {*map(normalised, drawn["sentence"])}
        assert not seen & {*map(normalised, rest["sentence"])}
        assert {*drawn["sentence"], *rest["sentence"]} | {"a film", "A film!", "a  film."} == {
            *texts
        }


@given(st.lists(st.tuples(st.sampled_from(["a", "A.", "b", "c d", "cd"]), st.integers(0, 1))))
def test_copies_and_their_labels_come_in_one_order(rows):
    def ordered(rows):
        texts, labels = [text for text, _ in rows], [label for _, label in rows]
        drawn, rest = draw(sentences(texts, labels), len(rows), CAP, TASKS["sst2"])
        assert len(rest) == 0
        return drawn.to_list()

    if rows:
        assert ordered(rows) == ordered(rows[::-1])


@pytest.mark.parametrize(
    "a, b",
    [
        ("It's a U.S. film.", "its a us FILM"),
        ("Café", "Cafe\u0301"),
        ("straße 5", "STRASSE5"),
        ("snake_case", "snake case"),
    ],
)
def test_letters_and_digits_alone_count(a, b):
    assert normalised(a) == normalised(b) != ""


def test_a_word_that_moves_to_the_other_column_changes_the_hash():
    def pair(a, b):
        return datasets.Dataset.from_list([{"sentence1": a, "sentence2": b, "label": 0}])

    hashes = [text_hashes(pair(*texts), TASKS["rte"], CAP) for texts in (("ab", "c"), ("a", "bc"))]
    assert hashes[0] != hashes[1]


def test_a_validation_file_of_a_further_set_may_be_missing(tiny_glue, tmp_path, capsys):
    copy = changed_copy("mnli", tiny_glue, tmp_path)
    whole = loading.digest(settings("mnli", copy))
    (copy / "mnli" / "validation_mismatched.jsonl").unlink()
    loaded = loading.load(settings("mnli", copy))
    assert loaded.also == {} and len(loaded.validation) == glue_files.N_VALIDATION
    assert "no validation_mismatched of mnli: left out" in capsys.readouterr().out
    assert loading.digest(settings("mnli", copy)) not in (whole, "")
    (copy / "mnli" / "validation_matched.jsonl").unlink()
    with pytest.raises(UserError, match="no validation_matched.jsonl or"):
        loading.check(settings("mnli", copy))


@pytest.mark.parametrize("task", ["sst2", "stsb", "squad", "library"])
def test_what_is_held_out_is_a_share_of_the_training_examples_and_none_of_them(task, tiny_glue):
    if TASKS[task].source == "built-in":
        chosen = Settings.at("smoke", task=task)
    else:
        chosen = settings(task, tiny_glue, second_test=8)
    whole, split = loading.load(chosen), loading.load(chosen.but(held_out=0.1))
    assert whole.held_out is None and len(split.held_out) == round(0.1 * len(whole.train))
    train, held_out, before = (
        {json.dumps(row) for row in contents(part, task)}
        for part in (split.train, split.held_out, whole.train)
    )
    assert not train & held_out and train | held_out == before
    assert split.validation.to_list() == whole.validation.to_list()
    assert [*split.also] == [*whole.also] and split.digest != whole.digest
    judged = loading.load(chosen.but(held_out=0.1, evaluate_on="held-out"))
    assert judged.validation.to_list() == split.held_out.to_list() and judged.also == {}
    assert judged.train.to_list() == split.train.to_list()


@pytest.mark.parametrize(
    "changes", [dict(evaluate_on="held-out"), dict(importance_split="held-out")]
)
def test_a_held_out_part_that_is_not_there_is_refused(changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"^{name}='held-out' .*; expected held_out above 0"):
        Settings.at("smoke", **changes)


# Manifests: the part that results were made from, out of the hub's dataset.


def hub(monkeypatch, folder, *, lost=0):
    """A stand-in for the hub: the files of a folder, without the first ``lost`` examples."""

    def load_dataset(name, *part, split, revision):
        task = part[0] if part else name.rpartition("/")[2]
        rows = [json.loads(line) for line in (folder / task / f"{split}.jsonl").open()]
        return datasets.Dataset.from_list(rows[lost:])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("task", FROM_FILES)
@pytest.mark.parametrize(
    "part",
    [
        dict(subsample="position", second_test=0),
        dict(subsample="hash", second_test=16),
        dict(subsample="hash", second_test=16, held_out=0.1, importance_split="held-out"),
    ],
)
def test_a_part_is_rebuilt_out_of_the_hubs_dataset(task, part, tiny_glue, tmp_path, monkeypatch):
    """The results were made from a shuffled copy whose rows differ from the hub's."""
    copy = changed_copy(task, tiny_glue, tmp_path / "copy")
    made_from = settings(task, copy, max_eval_examples=20, **part).but(max_train_examples=30)
    path = loading.add_to_manifest(made_from, tmp_path)
    hub(monkeypatch, tiny_glue)
    written = loading.rebuild(tmp_path, made_from, tmp_path / "again")
    assert {p.name for p in written} == {p.name for p in (copy / task).iterdir()}
    again = loading.load(made_from.but(data_dir=str(tmp_path / "again")))
    before = loading.load(made_from)
    assert again.train.to_dict() == before.train.to_dict()
    assert len(again.train) == (27 if "held_out" in part else 30)
    if before.held_out:
        assert again.held_out.to_dict() == before.held_out.to_dict()
    assert again.validation.to_dict() == before.validation.to_dict()
    assert again.also.keys() == before.also.keys()
    for name in again.also:
        assert again.also[name].to_dict() == before.also[name].to_dict()
    assert b"the small" not in path.read_bytes()  # hashes, no text


def test_the_number_of_missing_examples_is_named(tiny_glue, tmp_path, monkeypatch):
    made_from = settings("rte", tiny_glue)
    loading.add_to_manifest(made_from, tmp_path)
    hub(monkeypatch, tiny_glue, lost=3)
    with pytest.raises(UserError, match="^3 of 64 examples of rte are not in the 61 of nyu-mll/gl"):
        loading.rebuild(tmp_path, made_from, tmp_path / "again")
    assert not (tmp_path / "again" / "rte" / "train.jsonl").exists()


def test_a_part_that_is_not_listed_is_refused_with_those_that_are(tiny_glue, tmp_path):
    asked = settings("rte", tiny_glue)
    with pytest.raises(UserError, match="no examples.parquet in"):
        loading.rebuild(tmp_path, asked, tmp_path)
    for changes in (dict(), dict(max_eval_examples=9)):
        loading.add_to_manifest(asked.but(**changes), tmp_path)
        loading.add_to_manifest(asked.but(**changes), tmp_path)  # replaces, does not double
    with pytest.raises(UserError, match="subsample=hash; subsample=hash, max_eval_examples=9$"):
        loading.rebuild(tmp_path, asked.but(subsample="position"), tmp_path)
    with pytest.raises(UserError, match="none of task 'sst2'"):
        loading.rebuild(tmp_path, asked.but(task="sst2"), tmp_path)
    rows = pd.read_parquet(tmp_path / "examples.parquet")
    assert len(rows) == 2 * 64 + 32 + 9
    with pytest.raises(UserError, match="'library' is built in"):
        loading.add_to_manifest(Settings.at("smoke"), tmp_path)


def test_copies_in_the_dataset_are_told_apart_by_their_labels(tmp_path, monkeypatch):
    rows = [{"sentence": text, "label": k} for text in ("A film.", "a film", "b") for k in (0, 1)]
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "sst2" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows * 2)))
    part = settings("sst2", tmp_path, subsample="position").but(max_train_examples=8)
    loading.add_to_manifest(part, tmp_path)
    hub(monkeypatch, tmp_path)
    loading.rebuild(tmp_path, part, tmp_path / "again")
    first = loading.load(part).train
    again = loading.load(part.but(data_dir=str(tmp_path / "again"))).train
    assert contents(first, "sst2") == contents(again, "sst2")


def test_the_data_of_every_committed_result_is_listed():
    """A committed summary of a dataset says how many examples it had."""
    committed = pd.read_parquet(RESULTS / "rows.parquet").query("kind == 'teacher'")
    rows = pd.read_parquet(RESULTS / "examples.parquet")
    counts = rows.groupby(["task", "part", "use"]).size()
    for row in committed.itertuples():
        limits = {"max_train_examples": row.max_train_examples}
        limits = {name: int(n) for name, n in limits.items() if pd.notna(n)}
        part = loading.part_name(
            Settings.at("small", task=row.task, subsample="position").but(
                **{"max_train_examples": None, **limits}
            )
        )
        assert counts[row.task, part, "train"] > 1000
        assert counts[row.task, part, "validation"] > 200
    assert {len(value) for value in rows["hash"]} == {8}
