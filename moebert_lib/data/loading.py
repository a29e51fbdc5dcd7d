"""Load and check the examples of a task: built-in text, local files, or the hub.

Local files have the layout ``DIR/<task>/train.jsonl`` and ``validation.jsonl`` with the hub's
column names; MNLI has ``validation_matched`` and ``validation_mismatched``. Parquet works as well,
also in the hub's shards, and for SQuAD the official nested ``train.json``. One parser reads them,
both for the check and for the run. GLUE's test sets are left out: their labels are not public.
"""

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_lib.config import provenance
from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.settings import Settings
from moebert_lib.data import builtin_corpus, squad
from moebert_lib.data.tasks import TASKS, Task, build

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# datasets takes seconds to import; a refusal should not wait for it.

#: Dataset and revision on the hub, by a task's source and, for SQuAD, its name.
HUB = {
    "glue": ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"),
    "squad": ("rajpurkar/squad", "7b6d24c440a36b6815f21b70d25016731768db1f"),
    "squad_v2": ("rajpurkar/squad_v2", "3ffb306f725f7d2ce8394bc1873b24868140c412"),
}
SMOKE_FILES = 5  # of each package: a second to read, enough for every built-in task
SUBSAMPLE_SEED = 0  # fixed, so that every run at a scale sees the same examples


@dataclass(frozen=True)
class TaskData:
    """A task's splits: columns are the task's own (``Task.columns``) and ``idx``.

    ``also`` holds further validation sets by the suffix of their metrics.
    """

    task: Task
    train: "Dataset"
    validation: "Dataset"
    also: "dict[str, Dataset]"
    digest: str


def check(settings: Settings) -> None:
    """Refuse whatever can be refused without compute or network.

    Raises:
        UserError: an unknown task; a task without files at an offline scale; files for a built-in
            task; a folder, file, column, example or label that is wrong; windows of a
            span task that do not fit, or ``cache_teacher`` with a span task.
    """
    if settings.task not in TASKS:
        raise UserError(f"unknown task '{settings.task}'; {nearest(settings.task, TASKS)}")
    task = TASKS[settings.task]
    wrong = squad.problem(settings.max_length, settings.doc_stride) if task.kind == "span" else ""
    if wrong:
        raise UserError(f"task '{task.name}': {wrong}")
    if settings.cache_teacher and task.kind == "span":
        raise UserError(
            f"task '{task.name}': cache_teacher=True keeps a teacher that classifies "
            "sentences; expected cache_teacher=False"
        )
    if settings.data_dir:
        check_files(task, settings.data_dir)
    elif task.source != "built-in" and settings.offline:
        own = ", ".join(name for name, task in TASKS.items() if task.source == "built-in")
        raise UserError(
            f"task '{task.name}' needs a data_dir DIR with DIR/{task.name}/train.jsonl at scale "
            f"{settings.scale}, which is offline (--data-dir DIR, or papermill -p data_dir DIR); "
            f"built in are {own}"
        )


def load(settings: Settings) -> TaskData:
    """The task's splits, capped as the settings say.

    A cap takes a fixed random subsample, whatever the seeds, in which built-in tasks keep their
    balance of classes.

    Raises:
        UserError: as :func:`check`, or the hub cannot be reached.
    """
    check(settings)
    task = TASKS[settings.task]
    read = _built_in if task.source == "built-in" else _read
    parts = {use: read(task, settings, use) for use in splits(task)}
    train, validation = parts.pop("train"), parts.pop("validation")
    return TaskData(task, train, validation, parts, digest(settings))


def digest(settings: Settings) -> str:
    """SHA-256 of what decides the data: task, caps, and the text's or files' own digests."""
    task = TASKS[settings.task]
    if task.source == "built-in":
        source: Any = builtin_corpus.digest(files_per_package=_limit(settings))
    elif settings.data_dir:
        names = splits(task).values()
        paths = [path for name in names for path in files(task, settings.data_dir, name)]
        source = {path.name: provenance.input_digest(path) for path in paths}
    else:
        source = _hub(task)
    caps = [settings.max_train_examples, settings.max_eval_examples]
    code = provenance.code_of(load)
    return provenance.digest({"task": task.name, "caps": caps, "source": source, "code": code})


def encode(
    dataset: "Dataset",
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    doc_stride: int = 128,
) -> "Dataset":
    """Token ids of every example, or of every window of a span task, not padded.

    Returns:
        Columns ``input_ids``, ``attention_mask``, ``token_type_ids`` (lists of at most
        ``max_length`` tokens), ``length`` in tokens, and ``labels`` where there is a ``label``;
        for a span task those of :func:`squad.encode`.
    """
    if task.kind == "span":
        with _no_progress_bars():
            return squad.encode(dataset, tokenizer, max_length=max_length, doc_stride=doc_stride)

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        texts = [rows[field] for field in task.fields]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length, padding=False))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        if "label" in rows:
            kind = int if task.labels else float
            encoded["labels"] = [kind(label) for label in rows["label"]]
        return encoded

    with _no_progress_bars():
        return dataset.map(
            tokenize,
            batched=True,
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
        )


def _limit(settings: Settings) -> int | None:
    return SMOKE_FILES if settings.scale == "smoke" else None


def _cap(settings: Settings, use: str) -> int | None:
    return settings.max_train_examples if use == "train" else settings.max_eval_examples


def _built_in(task: Task, settings: Settings, use: str) -> "Dataset":
    from datasets import Dataset

    sentences = builtin_corpus.sentences(files_per_package=_limit(settings))
    examples = build(task.name, [s for s in sentences if s.split == use])[: _cap(settings, use)]
    return Dataset.from_list([{**example, "idx": i} for i, example in enumerate(examples)])


def _read(task: Task, settings: Settings, use: str) -> "Dataset":
    """One split of a GLUE or SQuAD task from local files or the hub, capped."""
    split = splits(task)[use]
    with _no_progress_bars():
        if settings.data_dir:
            dataset = _local(task, settings.data_dir, split)
        else:
            dataset = _downloaded(task, split).select_columns([*task.columns])
    dataset = dataset.add_column("idx", list(range(len(dataset))))
    return _subsample(dataset, _cap(settings, use))


def _local(task: Task, data_dir: str, split: str) -> "Dataset":
    from datasets import Dataset

    examples = []
    for path in files(task, data_dir, split):
        for _, row in rows(path):
            examples.append({name: row[name] for name in task.columns})
    return Dataset.from_list(examples)


def _hub(task: Task) -> dict[str, str]:
    name, revision = HUB["glue" if task.source == "glue" else task.name]
    return {"hub": name, "revision": revision}


def _downloaded(task: Task, split: str) -> "Dataset":
    from datasets import load_dataset

    name, revision = _hub(task).values()
    part = [task.name] if task.source == "glue" else []
    try:
        return load_dataset(name, *part, split=split, revision=revision)
    except (OSError, ValueError) as error:  # offline, unreachable, or not in the cache
        raise UserError(
            f"{name} cannot be loaded ({type(error).__name__}); give --data-dir DIR with "
            f"DIR/{task.name}/train.jsonl, or try again online"
        ) from None


def _subsample(dataset: "Dataset", cap: int | None) -> "Dataset":
    import numpy as np

    if cap is None or cap >= len(dataset):
        return dataset
    order = np.random.default_rng(SUBSAMPLE_SEED).permutation(len(dataset))
    return dataset.select(order[:cap], keep_in_memory=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


EXPECTED = "sst2/train.jsonl or similar"


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


def check_files(task: Task, data_dir: str) -> None:
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
