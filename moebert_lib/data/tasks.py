"""The tasks: text columns, labels and metrics, and the examples of the built-in tasks.

GLUE's eight tasks and SQuAD 1.1 and 2.0 have the hub's field names. The four built-in tasks are
made from the sentences of ``builtin_corpus``, and each has the form of a known task: ``library``
asks for the topic (like SST-2: one sentence, one class), ``acceptability`` whether a sentence is
intact (CoLA), ``follows`` whether two sentences belong together (MRPC), and ``passage`` for the
sentence that mentions two words (SQuAD: the answer is a span). WNLI is left out, as in the paper.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from moebert_lib.data.builtin_corpus import Sentence

Example = dict[str, Any]

#: The six with most sentences of at least eight words, here and in the label's order.
TOPICS = ("networkx", "pandas", "scipy", "sympy", "torch", "transformers")


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: As on the command line and the hub.
        fields: One or two text columns.
        labels: Class names in the order of their indices; empty for regression and spans.
        metrics: Names known to ``evaluation`` or ``squad``, the headline metric first.
        question: The task in one sentence.
        source: ``built-in``, ``glue`` or ``squad``.
        also: Further validation sets: the suffix of their metrics, and the name of their file.
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    question: str
    source: str = "glue"
    also: tuple[tuple[str, str], ...] = ()

    @property
    def metric(self) -> str:
        """The headline metric: the first."""
        return self.metrics[0]

    @property
    def kind(self) -> str:
        """``classification``, ``regression``, or ``span`` for an answer cut from a text."""
        if self.fields == _SPAN:
            return "span"
        return "classification" if self.labels else "regression"

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of its data: the fields, and ``label``, or ``answers`` for a span."""
        return (*self.fields, "answers" if self.kind == "span" else "label")

    def metric_title(self, column: str) -> str:
        """A metric's name in tables; the second test set of SST-2 has phrases, not sentences.

        Example:
            >>> TASKS["sst2"].metric_title("accuracy_second_test")
            'accuracy, second test set (phrases)'
        """
        metric, suffix, _ = column.partition("_second_test")
        phrases = " (phrases)" if self.name == "sst2" else ""
        return f"{metric}, second test set{phrases}" if suffix else column


_SPAN = ("question", "context")

#: One task a line: name, source, text columns, class names, metrics, question.
_TABLE = """
library       | built-in | sentence              |                               | accuracy
              | Which of six libraries is this sentence about?
acceptability | built-in | sentence              | swapped intact                | matthews accuracy
              | Is the sentence intact, or were two of its words swapped?
follows       | built-in | sentence1 sentence2   | elsewhere follows             | f1 accuracy
              | Does the second sentence follow the first, or is it from elsewhere?
passage       | built-in | question context      |                               | f1 exact_match
              | Which sentence of the passage mentions these two words?
cola          | glue     | sentence              | unacceptable acceptable       | matthews accuracy
              | Is the sentence acceptable English?
sst2          | glue     | sentence              | negative positive             | accuracy
              | Is the film review positive?
mrpc          | glue     | sentence1 sentence2   | not_equivalent equivalent     | f1 accuracy
              | Do the two sentences say the same?
stsb          | glue     | sentence1 sentence2   |                               | pearson spearman
              | How similar are the two sentences, from 0 to 5?
qqp           | glue     | question1 question2   | not_duplicate duplicate       | f1 accuracy
              | Do the two questions ask the same?
mnli          | glue     | premise hypothesis    | entailment neutral contradiction  | accuracy
              | Does the premise entail or contradict the hypothesis, or neither?
qnli          | glue     | question sentence     | entailment not_entailment     | accuracy
              | Does the sentence answer the question?
rte           | glue     | sentence1 sentence2   | entailment not_entailment     | accuracy
              | Does the first sentence entail the second?
squad         | squad    | question context      |                               | f1 exact_match
              | Which words of the text answer the question?
squad_v2      | squad    | question context      |                               | f1 exact_match
              | Which words of the text answer the question, if any?
"""


def _tasks() -> dict[str, Task]:
    lines = _TABLE.strip().splitlines()
    tasks = {}
    for head, tail in zip(lines[::2], lines[1::2], strict=True):
        name, source, *lists = (cell.strip() for cell in head.split("|"))
        fields, labels, metrics = (tuple(cell.split()) for cell in lists)
        if name == "library":
            labels = TOPICS
        also = (("mismatched", "validation_mismatched"),) if name == "mnli" else ()
        question = tail.partition("|")[2].strip()
        tasks[name] = Task(name, fields, labels, metrics, question, source, also)
    return tasks


TASKS = _tasks()


def build(name: str, sentences: Sequence[Sentence]) -> list[Example]:
    """Examples of a built-in task in a fixed mixed order; any prefix has balanced classes.

    Args:
        name: A built-in task.
        sentences: Of one split.

    Returns:
        Dicts of the task's columns; the same for the same sentences.
    """
    shuffled = sorted(sentences, key=lambda s: _digest(s.docstring, str(s.position)))
    make = {
        "library": _library,
        "acceptability": _acceptability,
        "follows": _follows,
        "passage": _passage,
    }
    return make[name](shuffled)


def swap_words(text: str, seed: str) -> str:
    """Exchange two different words of a sentence, never the first, whose capital would show it.

    Sometimes the result is as correct as the original ("rows and columns").

    Example:
        >>> swap_words("Return the sorted copy.", "any seed")
        'Return the copy sorted.'
    """
    words = text.removesuffix(".").split()
    later = range(1, len(words))
    pairs = [(i, j) for i in later for j in later if i < j and words[i].lower() != words[j].lower()]
    i, j = random.Random(seed).choice(pairs)
    words[i], words[j] = words[j], words[i]
    return " ".join(words) + "."


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _n_words(sentence: Sentence) -> int:
    return len(sentence.text.split())


def _library(shuffled: list[Sentence]) -> list[Example]:
    """Sentences of at least eight words; shorter ones do not show their topic."""
    longer = [s for s in shuffled if _n_words(s) >= 8]
    classes = [[s.text for s in longer if s.library == name] for name in TOPICS]
    rounds = zip(*classes, strict=False)  # ends with the rarest class
    return [{"sentence": text, "label": i} for texts in rounds for i, text in enumerate(texts)]


def _acceptability(shuffled: list[Sentence]) -> list[Example]:
    """Every other sentence has two words swapped; no sentence occurs in both forms."""
    short = [s.text for s in shuffled if _n_words(s) <= 20]
    return [
        {"sentence": text if i % 2 else swap_words(text, text), "label": i % 2}
        for i, text in enumerate(short)
    ]


def _follows(shuffled: list[Sentence]) -> list[Example]:
    """Half of the neighbours stay together; the others swap second sentences within a library.

    So each kind of sentence is equally frequent in both classes, and only the pair decides.
    """
    at = {(s.docstring, s.position): s for s in shuffled if _n_words(s) <= 18}
    after = [(s, at.get((s.docstring, s.position + 1))) for s in at.values()]
    together: list[tuple[Sentence, Sentence]] = []
    apart: list[tuple[Sentence, Sentence]] = []
    for library in sorted({s.library for s in shuffled}):
        pairs = [(a, b) for a, b in after if b and a.library == library]
        together += pairs[::2]
        other = pairs[1::2]
        moved = zip(other, other[1:] + other[:1], strict=True)
        apart += [(a, b) for (a, _), (_, b) in moved if a.docstring != b.docstring]
    for pairs in (together, apart):
        pairs.sort(key=lambda pair: _digest(pair[0].text))  # mixes the libraries
    mixed = chain.from_iterable(zip(apart, together, strict=False))
    return [
        {"sentence1": a.text, "sentence2": b.text, "label": i % 2} for i, (a, b) in enumerate(mixed)
    ]


def _passage(shuffled: list[Sentence]) -> list[Example]:
    """Three sentences; two words of one are named, and that sentence is the answer.

    The words are in no other sentence of the passage; the answer stands first, second or third in
    turn.
    """
    fitting = [s.text for s in shuffled if _n_words(s) <= 11]
    made: list[Example] = []
    for texts in zip(fitting[::3], fitting[1::3], fitting[2::3], strict=False):
        place = len(made) % 3
        answer, others = texts[place], " ".join(texts[:place] + texts[place + 1 :]).lower()
        own = {word for word in re.findall(r"[a-z]{5,}", answer) if word not in others}
        chosen = sorted(own, key=_digest)[:2]
        if len(chosen) == 2:
            start = sum(len(text) + 1 for text in texts[:place])
            made.append(
                {
                    "question": " ".join(chosen),
                    "context": " ".join(texts),
                    "answers": {"text": [answer], "answer_start": [start]},
                }
            )
    return made
