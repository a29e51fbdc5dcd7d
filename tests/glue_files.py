"""A made-up GLUE and SQuAD: a few dozen examples of each task, in the hub's own field names."""

import itertools
import json
from pathlib import Path

N_TRAIN, N_VALIDATION = 64, 32

#: Task -> (text fields, number of labels; 0 is a score between 0 and 5).
SHAPES = {
    "cola": (("sentence",), 2),
    "sst2": (("sentence",), 2),
    "mrpc": (("sentence1", "sentence2"), 2),
    "rte": (("sentence1", "sentence2"), 2),
    "stsb": (("sentence1", "sentence2"), 0),
    "qqp": (("question1", "question2"), 2),
    "qnli": (("question", "sentence"), 2),
    "mnli": (("premise", "hypothesis"), 3),
}

_WORDS = (
    ("the small", "an old", "this quiet", "every green"),
    ("model", "garden", "river", "teacher"),
    ("likes", "finds", "crosses", "describes"),
    ("a heavy", "the other", "one bright", "no such"),
    ("stone", "letter", "answer", "window"),
)
_SENTENCES = [" ".join(words) + " ." for words in itertools.product(*_WORDS)]  # 1024, all distinct


def rows(task: str, *, start: int, count: int) -> list[dict]:
    """``count`` examples; labels cycle, so that each occurs."""
    fields, n_labels = SHAPES[task]
    made = []
    for idx in range(count):
        texts = {
            field: _SENTENCES[(37 * (start + idx) + 411 * place) % len(_SENTENCES)]
            for place, field in enumerate(fields)
        }
        label = idx % n_labels if n_labels else idx % 11 / 2
        made.append({**texts, "label": label, "idx": idx})
    return made


def span_rows(*, start: int, count: int, with_null: bool) -> list[dict]:
    """Who does what? The answer is in one of two sentences, or for every fifth row in none."""
    made = []
    for idx in range(count):
        first, second = (
            _SENTENCES[(37 * (start + idx) + 411 * k) % len(_SENTENCES)] for k in (0, 1)
        )
        context = f"{first} {second}"
        answer = " ".join((second if idx % 2 else first).split()[-3:-1])
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        if with_null and idx % 5 == 0:
            answers = {"text": [], "answer_start": []}
        made.append(
            {
                "id": f"q{idx}",
                "question": f"Who likes row {idx}?",
                "context": context,
                "answers": answers,
            }
        )
    return made


def nested(rows) -> dict:
    """The same in SQuAD's own layout, one article of one paragraph a row."""
    paragraphs = []
    for idx, row in enumerate(rows):
        pairs = zip(*row["answers"].values(), strict=True)
        answers = [{"text": text, "answer_start": at} for text, at in pairs]
        qa = {
            "id": str(idx),
            "question": row["question"],
            "answers": answers,
            "is_impossible": not answers,
        }
        paragraphs.append({"context": row["context"], "qas": [qa]})
    return {"version": "made up", "data": [{"title": "made up", "paragraphs": paragraphs}]}


def write(folder: Path) -> Path:
    """Write ``folder/<task>/{train,validation}.jsonl``; mnli has its two validation sets."""
    for task in ("squad", "squad_v2"):
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, count in (("train", N_TRAIN), ("validation", N_VALIDATION)):
            examples = span_rows(start=len(split), count=count, with_null=task == "squad_v2")
            _dump(folder / task / f"{split}.jsonl", examples)
    for task in SHAPES:
        (folder / task).mkdir(parents=True, exist_ok=True)
        kinds = ("_matched", "_mismatched") if task == "mnli" else ("",)
        _dump(folder / task / "train.jsonl", rows(task, start=0, count=N_TRAIN))
        for place, kind in enumerate(kinds, start=1):
            examples = rows(task, start=place * 100, count=N_VALIDATION)
            _dump(folder / task / f"validation{kind}.jsonl", examples)
    return folder


def _dump(path: Path, examples: list[dict]) -> None:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
