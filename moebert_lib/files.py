"""GLUE- and SQuAD-format files on disk: found, and checked line by line before any compute.

The layout is ``DIR/<task>/train.jsonl`` and ``validation.jsonl`` with the hub's field names;
MNLI has ``validation_matched`` and ``validation_mismatched``. Parquet will do as well, also in
the hub's shards, and for SQuAD the official nested ``train.json``.
"""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moebert_lib.errors import UserError, nearest
from moebert_lib.tasks import TASKS, Task

EXPECTED = "sst2/train.jsonl or the like"


def splits(task: Task) -> dict[str, str]:
    """Names of the files by what they are for: train, validation, further validation sets."""
    validation = "validation_matched" if task.name == "mnli" else "validation"
    return {"train": "train", "validation": validation, **dict(task.also)}


def files(task: Task, data_dir: str, split: str) -> list[Path]:
    """The files of one split of a task: one, or the shards of one.

    Raises:
        UserError: a folder or file is missing, or the task is built in and reads no files.
    """
    folder = _task_folder(task, Path(data_dir).expanduser())
    nested = [f"{split}.json"] if task.kind == "span" else []
    single = [f"{split}.jsonl", *nested, f"{split}.parquet"]
    for pattern in (*single, f"{split}-*-of-*.parquet"):
        if paths := sorted(folder.glob(pattern)):
            return paths
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise UserError(f"no {' or '.join(single)} in {folder}; there is {there}")


def check(task: Task, data_dir: str) -> None:
    """Read every example that a run would read.

    Raises:
        UserError: as :func:`files`; or a file is empty, unreadable, or has an example without
            a column, with something else than text, or with a label that the task has not.
    """
    for split in splits(task).values():
        for path in files(task, data_dir, split):
            stat = path.stat()
            _check_file(path, task, (stat.st_size, stat.st_mtime_ns))


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Every example of a file, with its place in it.

    Raises:
        UserError: the file cannot be read as what its ending says.
    """
    kinds = {".jsonl": _lines, ".json": _nested, ".parquet": _table}
    yield from kinds[path.suffix](path)


def _task_folder(task: Task, folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}; expected one with {EXPECTED}")
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    known = [name for name in there if name in TASKS]
    if task.source == "built-in":
        choice = f"choose one that is in {folder}: {', '.join(known)}"
        if not known:
            choice = f"{folder} holds no task's folder, expected {EXPECTED}"
        raise UserError(f"task '{task.name}' is built in and reads no files; {choice}")
    if task.name not in there:
        found = f"there are {', '.join(there)}" if there else "it holds no folders"
        if any((folder / f"train.{ending}").exists() for ending in ("jsonl", "json", "parquet")):
            found = "it holds one task's files itself: give the folder above it"
        raise UserError(f"no folder '{task.name}' in {folder}; {found}")
    return folder / task.name


@functools.lru_cache(maxsize=64)  # a sweep checks the same files for each of its runs
def _check_file(path: Path, task: Task, _stamp: tuple[int, int]) -> None:
    empty = True
    for place, row in rows(path):
        empty = False
        problem = _problem(row, task)
        if problem:
            raise UserError(f"{path}, {place}: {problem}")
    if empty:
        raise UserError(f"{path} is empty; expected one example a line")


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield f"line {number}", json.loads(line)
            except ValueError:
                raise UserError(f"{path}, line {number}: not a JSON object") from None


def _nested(path: Path) -> Iterator[tuple[str, Any]]:
    """SQuAD's own layout: articles, paragraphs, questions. Unanswerable ones get no answer."""
    try:
        articles = json.loads(path.read_bytes())["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        asked = [(paragraph["context"], qa) for paragraph in paragraphs for qa in paragraph["qas"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not SQuAD's JSON ('data', 'paragraphs', 'qas'): "
            f"{type(error).__name__} {error}"
        ) from None
    for number, (context, qa) in enumerate(asked, start=1):
        place = f"question {qa.get('id', number) if isinstance(qa, dict) else number}"
        try:
            impossible, found = qa.get("is_impossible", not qa["answers"]), qa["answers"]
            answers = {key: [a[key] for a in found] for key in ("text", "answer_start")}
            row = {"question": qa["question"], "context": context, "answers": answers}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, {place}: expected 'question' and a list of 'answers' with "
                f"'text' and 'answer_start' ({error})"
            ) from None
        if bool(impossible) == bool(found):
            said = "has answers" if found else "has no answer"
            raise UserError(f"{path}, {place}: is_impossible={impossible}, but it {said}")
        yield place, row


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
    yield from ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1))


def _problem(row: Any, task: Task) -> str:
    """What is wrong with one example, or nothing."""
    if not isinstance(row, dict):
        return "not a JSON object"
    for name in task.columns:
        if name not in row:
            return f"no column '{name}'; {nearest(name, row)}"
    for name in task.fields:
        if not isinstance(row[name], str):
            return f"column '{name}' is {row[name]!r}; expected text"
    if task.kind == "span":
        return _answers_problem(row, task)
    return _label_problem(row["label"], task)


def _label_problem(label: Any, task: Task) -> str:
    number = isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label)
    if not task.labels:
        return "" if number and 0 <= label <= 5 else f"label {label!r}; expected 0 to 5"
    if number and label in range(len(task.labels)):
        return ""
    return f"label {label!r}; expected {', '.join(f'{i} {n}' for i, n in enumerate(task.labels))}"


def _answers_problem(row: dict[str, Any], task: Task) -> str:
    """Each answer must stand in the context where its ``answer_start`` says."""
    answers = row["answers"]
    try:
        pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
        wrong = [t for t, at in pairs if row["context"][at : at + len(t)] != t or at < 0]
    except (TypeError, KeyError, ValueError):
        return (
            f"answers {str(answers)[:60]}; expected lists 'text' and 'answer_start' of equal length"
        )
    if not row["question"].strip():
        return "the question is empty"
    if not all(text for text, _ in pairs):
        return "an answer is empty; a question without an answer has empty lists"
    if not pairs and task.name != "squad_v2":
        return f"no answer; only squad_v2 has questions without one, not {task.name}"
    return f"answer {wrong[0]!r} is not at its answer_start in the context" if wrong else ""
