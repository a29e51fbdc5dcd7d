"""Spans: windows against the text they came from, answers and scores against hand-worked cases."""

import collections
import re
import string

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moebert_lib.config.presets import MINILM
from moebert_lib.data import pretrained_weights, squad

CONTEXT = "The river Nile flows north. Ada Lovelace wrote the first program in 1843, they say."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pretrained_weights.find(MINILM))


def example(answer, question="Who wrote it?", context=CONTEXT):
    starts = [context.index(answer)] if answer else []
    answers = {"text": [answer] if answer else [], "answer_start": starts}
    return {"question": question, "context": context, "answers": answers}


def encode(tokenizer, *examples, max_length=24, doc_stride=6):
    rows = Dataset.from_list(list(examples))
    return squad.encode(rows, tokenizer, max_length=max_length, doc_stride=doc_stride)


def logits(windows, wanted, at=(), null=0.0):
    """Logits that favour token spans: ``wanted`` maps a window to (first, last, score)."""
    made = np.full((len(windows), 2, max(windows["length"][:])), -5.0, np.float32)
    made[:, :, 0] = null / 2
    for window, (first, last, value) in wanted.items():
        made[window, 0, first] = made[window, 1, last] = value / 2
    return made


@pytest.mark.parametrize("answer", ["Nile", "Ada Lovelace", "1843", "The river", "they say."])
def test_positions_cut_the_answer_out_of_the_text(tokenizer, answer):
    windows = encode(tokenizer, example(answer))
    assert len(windows) > 1
    inside = [row for row in windows if row["end_positions"]]
    assert inside
    for row in inside:
        first, last = row["first"][row["start_positions"]], row["last"][row["end_positions"]]
        assert CONTEXT[first:last] == answer
    for row in windows:
        if not row["end_positions"]:  # the [CLS], where the answer is not whole in the window
            shown = [(a, b) for a, b in zip(row["first"], row["last"], strict=True) if a >= 0]
            at = CONTEXT.index(answer)
            assert row["start_positions"] == 0
            assert shown[0][0] > at or shown[-1][1] < at + len(answer)


def test_windows_cover_the_context_and_overlap_by_the_stride(tokenizer):
    windows = encode(tokenizer, example("Nile"))
    places = [[a for a in row["first"] if a >= 0] for row in windows]
    whole = tokenizer(CONTEXT, add_special_tokens=False, return_offsets_mapping=True)
    assert sorted({a for window in places for a in window}) == [a for a, _ in whole.offset_mapping]
    for one, other in zip(places, places[1:], strict=False):
        assert len(set(one) & set(other)) == 6
    assert max(windows["length"]) <= 24


def test_an_unanswerable_question_points_at_the_first_token(tokenizer):
    windows = encode(tokenizer, example(""))
    assert set(windows["start_positions"]) == set(windows["end_positions"]) == {0}


def test_a_question_longer_than_the_window_is_cut(tokenizer):
    windows = encode(tokenizer, example("Nile", question="who " * 300))
    assert max(windows["length"]) <= 24 and any(windows["end_positions"])


def test_lengths_that_cannot_be_had_are_named():
    assert squad.problem(384, 128) == ""
    assert "the largest that fits is 36" in squad.problem(48, 40)


def test_the_best_window_gives_the_answer(tokenizer):
    windows = encode(tokenizer, example("1843"))
    right = next(i for i, end in enumerate(windows["end_positions"]) if end)
    row = windows[right]
    wanted = {right: (row["start_positions"], row["end_positions"], 9.0)}
    other = (right + 1) % len(windows)
    opens = next(i for i, a in enumerate(windows[other]["first"]) if a >= 0)
    wanted[other] = (opens, opens, 7.0)
    assert squad.texts(logits(windows, wanted), windows, [CONTEXT]) == {0: "1843"}


def test_a_span_never_ends_before_it_starts_leaves_the_context_or_is_too_long(tokenizer):
    windows = encode(tokenizer, example("Nile"), max_length=48)
    row = windows[0]
    inside = [i for i, a in enumerate(row["first"]) if a >= 0]
    made = logits(windows, {})
    made[0, 0, inside[5]] = made[0, 1, inside[2]] = 50.0  # the best pair is the wrong way round
    made[0, :, 2] = 90.0  # in the question
    answer = squad.texts(made, windows, [CONTEXT], max_answer_length=3)[0]
    assert answer in CONTEXT and answer
    assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) <= 3


def test_no_answer_is_given_where_the_null_score_wins_by_the_threshold(tokenizer):
    windows = encode(tokenizer, example("Nile"), max_length=48)
    row = windows[0]
    right = {0: (row["start_positions"], row["end_positions"], 6.0)}
    scored = {null: logits(windows, right, null=null) for null in (5.0, 7.0)}
    said = {
        (null, threshold): squad.texts(made, windows, [CONTEXT], null_threshold=threshold)[0]
        for null, made in scored.items()
        for threshold in (None, 0.0, 2.0)
    }
    assert said == {
        (5.0, None): "Nile",
        (5.0, 0.0): "Nile",
        (5.0, 2.0): "Nile",
        (7.0, None): "Nile",
        (7.0, 0.0): "",
        (7.0, 2.0): "Nile",
    }


def test_the_null_score_is_the_lowest_of_a_questions_windows(tokenizer):
    windows = encode(tokenizer, example("Nile"))
    made = logits(windows, {})
    made[:, :, 0] = 10.0
    assert squad.texts(made, windows, [CONTEXT], null_threshold=0.0)[0] == ""
    made[-1, :, 0] = -20.0
    assert squad.texts(made, windows, [CONTEXT], null_threshold=0.0)[0] != ""


def test_scores_by_hand():
    # "the cat sat" against "a cat": words cat sat / cat: precision 1/2, recall 1
    assert squad.f1("the cat sat", "a cat") == pytest.approx(2 / 3)
    assert squad.exact("The Nile!", "nile") == 1.0
    both = squad.score(["cat sat", "no", ""], [["dog", "cat"], [], ["yes"]])
    assert both == {"f1": pytest.approx((2 / 3 + 0 + 0) / 3), "exact_match": 0.0}


def slow_f1(answer, truth):
    """SQuAD's F1 from its definition, with lists and no library of ours."""

    def words(text):
        text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return [word for word in re.split(r"\s+", text) if word not in ("a", "an", "the", "")]

    own, other = words(answer), words(truth)
    if not own or not other:
        return float(own == other)
    counts = collections.Counter(other)
    hits = 0
    for word in own:
        if counts[word] > 0:
            counts[word] -= 1
            hits += 1
    precision, recall = hits / len(own), hits / len(other)
    return 0.0 if not hits else 2 * precision * recall / (precision + recall)


@given(*[st.lists(st.sampled_from("a The cat, Cat sat on mat. an".split()), max_size=6)] * 2)
def test_f1_is_squads_definition(one, other):
    left, right = " ".join(one), " ".join(other)
    assert squad.f1(left, right) == pytest.approx(slow_f1(left, right))
    assert squad.f1(left, right) == squad.f1(right, left)
    assert squad.exact(left, right) <= squad.f1(left, right)
