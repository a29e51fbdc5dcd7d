"""From a task's name to padded batches: built-in text, local GLUE-format files, or the hub.

All three sources end in the same :class:`TaskData`; the validation split is never trained on.
Left out on purpose: GLUE's test sets, whose labels are not public.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moebert_lib import corpus, glue, provenance
from moebert_lib.settings import Settings, UserError, nearest
from moebert_lib.tasks import TASKS, Task, build

# datasets and torch take seconds to import; a refusal should not wait for them.
if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["TASKS", "Task", "TaskData", "batches", "check", "digest", "encode", "load"]

HUB = "nyu-mll/glue"
REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
SMOKE_FILES = 5  # of each package: a second to read, enough for every built-in task
SUBSAMPLE_SEED = 0  # fixed, so that every run at a scale sees the same examples


@dataclass(frozen=True)
class TaskData:
    """A task's two splits: columns are the task's fields, ``label`` and ``idx``."""

    task: Task
    train: "Dataset"
    validation: "Dataset"
    digest: str


def check(settings: Settings) -> None:
    """Refuse whatever can be refused without compute or network.

    Raises:
        UserError: an unknown task; a GLUE task without files at an offline scale; files for
            a built-in task; a folder, file, column, example or label that is not as it should be.
    """
    if settings.task not in TASKS:
        raise UserError(f"unknown task '{settings.task}'; {nearest(settings.task, TASKS)}")
    task = TASKS[settings.task]
    if settings.data_dir:
        glue.check(task, settings.data_dir)
    elif task.source == "glue" and settings.offline:
        own = ", ".join(name for name, task in TASKS.items() if task.source == "built-in")
        raise UserError(
            f"task '{task.name}' needs --data-dir DIR with DIR/{task.name}/train.jsonl at scale "
            f"{settings.scale}, which is offline; built in are {own}"
        )


def load(settings: Settings) -> TaskData:
    """The task's train and validation split, capped as the settings say.

    A cap takes a fixed random subsample, whatever the seeds, in which built-in tasks keep their
    balance of classes.

    Raises:
        UserError: as :func:`check`, or the hub cannot be reached.
    """
    check(settings)
    task = TASKS[settings.task]
    caps = (settings.max_train_examples, settings.max_eval_examples)
    if task.source == "built-in":
        train, validation = _built_in(task, settings, caps)
    else:
        train, validation = (
            _subsample(_read(task, settings.data_dir, split), cap)
            for split, cap in zip(glue.splits(task), caps, strict=True)
        )
    return TaskData(task, train, validation, digest(settings))


def digest(settings: Settings) -> str:
    """SHA-256 of what decides the data: task, caps, and the text's or files' own digests."""
    task = TASKS[settings.task]
    if task.source == "built-in":
        source: Any = corpus.digest(files_per_package=_limit(settings))
    elif settings.data_dir:
        paths = [
            p for split in glue.splits(task) for p in glue.files(task, settings.data_dir, split)
        ]
        source = {path.name: provenance.file_digest(path) for path in paths}
    else:
        source = {"hub": HUB, "revision": REVISION}
    caps = [settings.max_train_examples, settings.max_eval_examples]
    code = provenance.code_digest("data", "glue", "tasks")
    return provenance.digest({"task": task.name, "caps": caps, "source": source, "code": code})


def encode(
    dataset: "Dataset", task: Task, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> "Dataset":
    """Token ids of every example, not padded.

    Returns:
        Columns ``input_ids``, ``attention_mask``, ``token_type_ids`` (lists of at most
        ``max_length`` tokens), ``length`` in tokens, and ``labels`` where there is a ``label``.
    """

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
            tokenize, batched=True, remove_columns=dataset.column_names,
            keep_in_memory=True, load_from_cache_file=False,
        )  # fmt: skip


def batches(
    encoded: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    *,
    device: Any = "cpu",
    sort: bool = True,
) -> "Iterator[dict[str, Tensor]]":
    """Batches padded to their longest example, each example once.

    Args:
        encoded: From :func:`encode`.
        tokenizer: Gives the padding token.
        batch_size: The last batch may be smaller.
        device: Where the tensors go.
        sort: Shortest first, which spares padding; else in the dataset's order.

    Yields:
        ``input_ids``, ``attention_mask``, ``token_type_ids`` of shape ``(B, T)``, ``labels``
        ``(B,)`` where the dataset has them, and ``index`` ``(B,)``, the positions in ``encoded``.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    padding = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    order = list(range(len(encoded)))
    if sort:
        lengths = encoded["length"][:]
        order.sort(key=lengths.__getitem__)  # stable: equal lengths keep their order
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        rows = encoded[index]
        batch = {
            name: pad_sequence([torch.tensor(row) for row in rows[name]], True, value)
            for name, value in padding.items()
            if name in rows
        }
        if "labels" in rows:
            batch["labels"] = torch.tensor(rows["labels"])
        batch["index"] = torch.tensor(index)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _limit(settings: Settings) -> int | None:
    return SMOKE_FILES if settings.scale == "smoke" else None


def _built_in(task: Task, settings: Settings, caps: tuple) -> "Iterator[Dataset]":
    from datasets import Dataset

    sentences = corpus.sentences(files_per_package=_limit(settings))
    for split, cap in zip(glue.splits(task), caps, strict=True):
        examples = build(task.name, [s for s in sentences if s.split == split])[:cap]
        yield Dataset.from_list([{**example, "idx": i} for i, example in enumerate(examples)])


def _read(task: Task, data_dir: str, split: str) -> "Dataset":
    """One split of a GLUE task from local files or the hub."""
    from datasets import load_dataset

    with _no_progress_bars():
        if data_dir:
            paths = glue.files(task, data_dir, split)
            kind = "json" if paths[0].suffix == ".jsonl" else "parquet"
            files = [str(path) for path in paths]
            dataset = load_dataset(kind, data_files=files, split="train", keep_in_memory=True)
        else:
            try:
                dataset = load_dataset(HUB, task.name, split=split, revision=REVISION)
            except (OSError, ValueError) as error:  # offline, unreachable, or not in the cache
                raise UserError(
                    f"{HUB} cannot be loaded ({type(error).__name__}); give --data-dir DIR with "
                    f"DIR/{task.name}/train.jsonl, or try again online"
                ) from None
    dataset = dataset.select_columns([*task.fields, "label"])
    return dataset.add_column("idx", list(range(len(dataset))))


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
