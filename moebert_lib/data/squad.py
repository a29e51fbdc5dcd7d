"""Answers that are spans of a text (SQuAD): windows in, text out, EM and F1.

A context longer than the model's input is cut into windows that overlap by ``doc_stride``
tokens. Each window gives its best spans; the best over all windows of a question is the answer.
Question answering is start and end token prediction (as in the paper); the rest is the usual
procedure for BERT, and the metrics are SQuAD's definition.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

METRICS = ("f1", "exact_match")
LONGEST_QUESTION = 64  # tokens; the rest is cut off
_ROOM = 12  # tokens a window must have beyond what it shares with the one before


def problem(max_length: int, doc_stride: int) -> str:
    """Why windows of these lengths, in tokens, cannot be made; "" if they can."""
    if doc_stride <= max_length - _ROOM:
        return ""
    return (
        f"doc_stride={doc_stride} leaves no room in max_length={max_length}; "
        f"the largest that fits is {max_length - _ROOM}"
    )


def encode(
    examples: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    doc_stride: int,
) -> "Dataset":
    """Windows of all examples, not padded.

    Args:
        examples: ``question``, ``context`` and ``answers`` (``text``, ``answer_start``).
        tokenizer: A fast one, which knows where in the text a token stands.
        max_length: Tokens of a window, question included.
        doc_stride: Tokens that neighbouring windows of a context share.

    Returns:
        One row a window: ``input_ids``, ``attention_mask``, ``length``, ``token_type_ids`` if the
        tokenizer has them; ``start_positions`` and ``end_positions``, the tokens of the first
        answer, both 0 (the ``[CLS]``) where it is not whole in the window; ``example``, its row in
        ``examples``; and
        ``first``, ``last``: the characters of the context that each token covers, -1 outside it.
    """
    longest = min(LONGEST_QUESTION, max_length - doc_stride - 4)

    def tokenize(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        questions = [_cut(question.strip(), tokenizer, longest) for question in rows["question"]]
        encoded = tokenizer(
            questions,
            rows["context"],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        made: dict[str, list] = {name: [] for name in ("first", "last", "example")}
        made |= {"start_positions": [], "end_positions": []}
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            inside = [part == 1 for part in encoded.sequence_ids(window)]
            pairs = zip(encoded["offset_mapping"][window], inside, strict=True)
            places = np.array([pair if context else (-1, -1) for pair, context in pairs])
            start, end = _positions(places, rows["answers"][row])
            made["first"].append(places[:, 0].tolist())
            made["last"].append(places[:, 1].tolist())
            made["example"].append(indices[row])
            made["start_positions"].append(start)
            made["end_positions"].append(end)
        kept = ("input_ids", "attention_mask", "token_type_ids")
        made |= {name: encoded[name] for name in kept if name in encoded}
        return {**made, "length": [len(ids) for ids in encoded["input_ids"]]}

    return examples.map(
        tokenize,
        batched=True,
        with_indices=True,
        remove_columns=examples.column_names,
        keep_in_memory=True,
        load_from_cache_file=False,
    )


def texts(
    logits: np.ndarray,
    windows: "Dataset",
    contexts: Sequence[str],
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    null_threshold: float | None = None,
) -> dict[int, str]:
    """The best answer to each question, as text.

    Args:
        logits: ``(windows, 2, T)``: start and end.
        windows: From :func:`encode`, in the same order.
        contexts: By example.
        n_best: Starts and ends of each window that are tried with each other.
        max_answer_length: In tokens.
        null_threshold: For SQuAD 2.0: the answer is "" where the score of ``[CLS]`` (the lowest of
            the question's windows) exceeds the best span's by more than this. None: every
            question has an answer.

    Returns:
        Example to answer; "" also where no span is possible at all.
    """
    best: dict[int, tuple[float, str]] = {}
    null: dict[int, float] = {}
    columns = (windows["example"][:], windows["first"][:], windows["last"][:])
    for (start, end), example, first, last in zip(logits, *columns, strict=True):
        score, i, j = _best_span(start, end, np.array(first), n_best, max_answer_length)
        if score > best.get(example, (-np.inf, ""))[0]:
            best[example] = (score, contexts[example][first[i] : last[j]])
        empty = float(start[0] + end[0])
        null[example] = min(empty, null.get(example, empty))
    answers = {}
    for example, empty in null.items():
        score, text = best.get(example, (-np.inf, ""))
        unanswered = null_threshold is not None and empty - score > null_threshold
        answers[example] = "" if unanswered else text
    return answers


def score(answers: Sequence[str], truths: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 and exact match of :func:`scores`, 0 to 1.

    Example:
        >>> score(["the Nile", ""], [["Nile", "river Nile"], []])
        {'f1': 1.0, 'exact_match': 1.0}
    """
    return {name: float(np.mean(values)) for name, values in scores(answers, truths).items()}


def scores(answers: Sequence[str], truths: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """F1 and exact match of each question, ``(n,)``, each against the best accepted answer.

    Args:
        answers: One a question.
        truths: Accepted answers of each; none means that the question has no answer.
    """
    best = {name: [] for name in METRICS}
    for answer, accepted in zip(answers, truths, strict=True):
        known = [text for text in accepted if normalised(text)] or [""]
        for name, measure in zip(METRICS, (f1, exact), strict=True):
            best[name].append(max(measure(answer, text) for text in known))
    return {name: np.array(values) for name, values in best.items()}


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and doubled spaces: how SQuAD compares."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def exact(answer: str, truth: str) -> float:
    """1.0 where both are the same once normalised."""
    return float(normalised(answer) == normalised(truth))


def f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall over normalised words; 0 or 1 where one is empty.

    Example:
        >>> round(f1("a red car", "the red bicycle"), 2)
        0.5
    """
    own, other = normalised(answer).split(), normalised(truth).split()
    if not own or not other:
        return float(own == other)
    common = sum((Counter(own) & Counter(other)).values())
    return 2 * common / (len(own) + len(other))


def _cut(question: str, tokenizer: "PreTrainedTokenizerBase", longest: int) -> str:
    """The question's beginning, at most ``longest`` tokens."""
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    places = encoded["offset_mapping"]
    return question if len(places) <= longest else question[: places[longest - 1][1]]


def _positions(places: np.ndarray, answers: dict[str, list]) -> tuple[int, int]:
    """First and last token of the first answer; ``(0, 0)`` where it is not whole in the window."""
    if not answers["text"]:
        return 0, 0
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    context = np.flatnonzero(places[:, 0] >= 0)
    if not len(context) or places[context[0], 0] > start or places[context[-1], 1] < end:
        return 0, 0
    opens = context[places[context, 0] <= start][-1]
    closes = context[places[context, 1] >= end][0]
    return int(opens), int(closes)


def _best_span(
    start: np.ndarray, end: np.ndarray, first: np.ndarray, n_best: int, longest: int
) -> tuple[float, int, int]:
    """Score, first and last token of a window's best span within the context."""
    context = np.flatnonzero(first >= 0)
    if not len(context):
        return -np.inf, 0, 0
    opens = context[np.argsort(-start[context], kind="stable")[:n_best]][:, None]
    closes = context[np.argsort(-end[context], kind="stable")[:n_best]][None, :]
    possible = (opens <= closes) & (closes < opens + longest)
    scores = np.where(possible, start[opens] + end[closes], -np.inf)
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[i, j]), int(opens[i, 0]), int(closes[0, j])
