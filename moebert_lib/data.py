"""From a task's name to padded batches: built-in text, local files, or the hub.

All three sources end in the same :class:`TaskData`; the validation split is never trained on.
Left out on purpose: GLUE's test sets, whose labels are not public.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moebert_lib import corpus, files, provenance, spans
from moebert_lib.batching import batches
from moebert_lib.errors import UserError, nearest
from moebert_lib.settings import Settings
from moebert_lib.tasks import TASKS, Task, build

# datasets and torch take seconds to import; a refusal should not wait for them.
if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["TASKS", "Task", "TaskData", "batches", "check", "digest", "encode", "load"]

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
            task; a folder, file, column, example or label that is not as it should be; windows
            of a span task that do not fit, or its teacher's states kept.
    """
    if settings.task not in TASKS:
        raise UserError(f"unknown task '{settings.task}'; {nearest(settings.task, TASKS)}")
    task = TASKS[settings.task]
    wrong = spans.problem(settings.max_length, settings.doc_stride) if task.kind == "span" else ""
    if wrong:
        raise UserError(f"task '{task.name}': {wrong}")
    if settings.cache_teacher and task.kind == "span":
        raise UserError(
            f"task '{task.name}': cache_teacher=True keeps a teacher that classifies "
            "sentences; expected cache_teacher=False"
        )
    if settings.data_dir:
        files.check(task, settings.data_dir)
    elif task.source != "built-in" and settings.offline:
        own = ", ".join(name for name, task in TASKS.items() if task.source == "built-in")
        raise UserError(
            f"task '{task.name}' needs --data-dir DIR with DIR/{task.name}/train.jsonl at scale "
            f"{settings.scale}, which is offline; built in are {own}"
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
    found = {use: read(task, settings, use) for use in files.splits(task)}
    train, validation = found.pop("train"), found.pop("validation")
    return TaskData(task, train, validation, found, digest(settings))


def digest(settings: Settings) -> str:
    """SHA-256 of what decides the data: task, caps, and the text's or files' own digests."""
    task = TASKS[settings.task]
    if task.source == "built-in":
        source: Any = corpus.digest(files_per_package=_limit(settings))
    elif settings.data_dir:
        names = files.splits(task).values()
        paths = [path for name in names for path in files.files(task, settings.data_dir, name)]
        source = {path.name: provenance.input_digest(path) for path in paths}
    else:
        source = _hub(task)
    caps = [settings.max_train_examples, settings.max_eval_examples]
    code = provenance.code_digest("data", "files", "tasks")
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
        for a span task those of :func:`spans.encode`.
    """
    if task.kind == "span":
        with _no_progress_bars():
            return spans.encode(dataset, tokenizer, max_length=max_length, doc_stride=doc_stride)

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

    sentences = corpus.sentences(files_per_package=_limit(settings))
    examples = build(task.name, [s for s in sentences if s.split == use])[: _cap(settings, use)]
    return Dataset.from_list([{**example, "idx": i} for i, example in enumerate(examples)])


def _read(task: Task, settings: Settings, use: str) -> "Dataset":
    """One split of a GLUE or SQuAD task from local files or the hub, capped."""
    split = files.splits(task)[use]
    with _no_progress_bars():
        dataset = (
            _local(task, settings.data_dir, split)
            if settings.data_dir
            else (_downloaded(task, split))
        )
    dataset = dataset.select_columns([*task.columns])
    dataset = dataset.add_column("idx", list(range(len(dataset))))
    return _subsample(dataset, _cap(settings, use))


def _local(task: Task, data_dir: str, split: str) -> "Dataset":
    from datasets import Dataset, load_dataset

    paths = files.files(task, data_dir, split)
    if paths[0].suffix == ".json":
        return Dataset.from_list([row for path in paths for _, row in files.rows(path)])
    kind = "json" if paths[0].suffix == ".jsonl" else "parquet"
    names = [str(path) for path in paths]
    return load_dataset(kind, data_files=names, split="train", keep_in_memory=True)


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
