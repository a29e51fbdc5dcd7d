from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moebert_lib.data import squad
from moebert_lib.data.builtin_corpus import sentences
from moebert_lib.data.tasks import TASKS, TOPICS, build, swap_words
from moebert_lib.training.evaluation import METRICS

BUILT_IN = [name for name, task in TASKS.items() if task.source == "built-in"]
CLASSES = [name for name in BUILT_IN if TASKS[name].kind == "classification"]


@pytest.fixture(scope="module")
def splits():
    some = sentences(files_per_package=5)
    return {split: [s for s in some if s.split == split] for split in ("train", "validation")}


def test_every_metric_can_be_computed():
    for task in TASKS.values():
        assert set(task.metrics) <= set(squad.METRICS if task.kind == "span" else METRICS)


def test_kinds_follow_from_the_fields_and_labels():
    kinds = {name: TASKS[name].kind for name in ("squad", "squad_v2", "passage", "stsb", "mnli")}
    assert list(kinds.values()) == [*["span"] * 3, "regression", "classification"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_examples_have_the_tasks_columns_and_labels(name, splits):
    task = TASKS[name]
    examples = build(name, splits["train"])
    assert examples and all(set(example) == set(task.columns) for example in examples)
    labels = {example.get("label", "none") for example in examples}
    assert labels == (set(range(len(task.labels))) if task.labels else {"none"})


@pytest.mark.parametrize("name", CLASSES)
def test_any_prefix_has_balanced_classes(name, splits):
    labels = [example["label"] for example in build(name, splits["train"])]
    for n in (12, 30, 60):
        counts = Counter(labels[:n])
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("name", BUILT_IN)
def test_examples_do_not_depend_on_the_order_of_the_sentences(name, splits):
    assert build(name, splits["train"]) == build(name, splits["train"][::-1])


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_text_is_in_both_splits(name, splits):
    fields = [field for field in TASKS[name].fields if field != "question"]  # six in all
    train, validation = (
        {example[field] for example in build(name, splits[split]) for field in fields}
        for split in splits
    )
    assert train.isdisjoint(validation) and validation


def test_a_topics_label_is_the_library_the_sentence_is_from(splits):
    library = {s.text: s.library for s in splits["train"]}
    for example in build("library", splits["train"]):
        assert TOPICS[example["label"]] == library[example["sentence"]]


def test_a_passages_answer_is_its_one_sentence_with_the_words_asked_for(splits):
    places = Counter()
    for example in build("passage", splits["train"]):
        (answer,), (start,) = example["answers"].values()
        assert example["context"][start:].startswith(answer)
        words = example["question"].split()
        others = example["context"].replace(answer, "").lower()
        assert len(words) == 2 and all(word in answer and word not in others for word in words)
        places[start == 0, example["context"].endswith(answer)] += 1
    assert len(places) == 3 and max(places.values()) - min(places.values()) <= 1


def test_an_intact_sentence_is_in_the_corpus_and_a_swapped_one_is_not(splits):
    texts = {s.text for s in splits["train"]}
    for example in build("acceptability", splits["train"]):
        assert (example["sentence"] in texts) == bool(example["label"])


def test_a_pair_is_neighbours_if_and_only_if_the_label_says_so(splits):
    where = {s.text: s for s in splits["train"]}
    for example in build("follows", splits["train"]):
        a, b = where[example["sentence1"]], where[example["sentence2"]]
        neighbours = (a.docstring, a.position + 1) == (b.docstring, b.position)
        assert neighbours == bool(example["label"])
        assert a.library == b.library and (neighbours or a.docstring != b.docstring)


def test_a_second_sentence_never_opens_its_docstring(splits):
    where = {s.text: s for s in splits["train"]}  # or position alone would give the class away
    pairs = build("follows", splits["train"])
    assert all(where[example["sentence2"]].position > 0 for example in pairs)


@given(st.lists(st.sampled_from("a b c D e f".split()), min_size=3, max_size=9), st.text())
def test_swapping_exchanges_two_different_words_and_keeps_the_first(words, seed):
    assume(len({word.lower() for word in words[1:]}) > 1)
    swapped = swap_words(" ".join(words) + ".", seed).removesuffix(".").split()
    moved = [i for i, (old, new) in enumerate(zip(words, swapped, strict=True)) if old != new]
    assert sorted(swapped) == sorted(words) and len(moved) == 2 and moved[0] > 0
