import json
import random

import datasets
import glue_files
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.data import loading
from moebert_lib.data.subsample import CAP, HELD_OUT, SECOND_TEST, draw, normalised, text_hashes
from moebert_lib.data.tasks import TASKS

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
