"""Load the dataset, the tokenizer and the pretrained model; store tables measured with them."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from moebert_lib.config.errors import UserError, home
from moebert_lib.config.presets import MINILM, TINY
from moebert_lib.config.provenance import versions
from moebert_lib.config.settings import Settings
from moebert_lib.data import batching, loading, pretrained_weights, squad, tasks
from moebert_lib.data.tasks import TASKS, Task
from moebert_lib.experiments.stage_keys import DATA, chosen, made_with, without_later
from moebert_lib.method import encoder_layouts
from moebert_lib.method.encoder_layouts import family
from moebert_lib.model.conversion import load_dense
from moebert_lib.store.committed_results import AnyStore
from moebert_lib.store.store import Entry, StageKey
from moebert_lib.training.evaluation import score

HEADS = {"span": AutoModelForQuestionAnswering}  # by kind of task; else a sentence is classified


@dataclass(frozen=True)
class Dataset:
    """A task's splits, tokenised, and how predictions are read from a model's logits.

    Attributes:
        task: The task.
        splits: ``train``, ``validation``, further sets that models are judged on, and
            ``held-out``: rows for the model, which are windows of examples where answers are
            spans.
        examples: The same splits as text.
        tokenizer: Of the model.
        settings: Those that decide a dataset.
        digest: Of the data.
    """

    task: tasks.Task
    splits: dict
    examples: dict
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    digest: str

    @property
    def train(self):
        """Rows to train on: a ``datasets.Dataset``."""
        return self.splits["train"]

    @property
    def judged(self) -> list[str]:
        """Names of the splits that models are judged on."""
        return [split for split in self.splits if split not in ("train", "held-out")]

    @property
    def validation(self):
        """Rows of the validation split."""
        return self.splits["validation"]

    def rows(self, split: str, limit: int | None = None, *, shuffle: bool = False):
        """A split's rows: all, the first ``limit``, or a fixed random choice of as many."""
        rows = self.splits[split]
        if limit is None or limit >= len(rows):
            return rows
        order = np.random.default_rng(0).permutation(len(rows)) if shuffle else np.arange(limit)
        return rows.select(order[:limit])

    def batches(
        self, split: str, *, batch_size: int = 64, limit: int | None = None, shuffle: bool = False
    ):
        """Padded batches of :meth:`rows` on the device, shortest first."""
        rows = self.rows(split, limit, shuffle=shuffle)
        return batching.batches(rows, self.tokenizer, batch_size, device=device())

    def answers(
        self, logits: np.ndarray, split: str = "validation", limit: int | None = None
    ) -> np.ndarray:
        """The prediction for each example: a class index, a value, or a text.

        Args:
            logits: Of the split's first ``limit`` rows, from ``evaluate.predict``.
            split: Name of the split.
            limit: As when the logits were made.
        """
        if self.task.kind != "span":
            return logits[:, 0] if self.task.kind == "regression" else logits.argmax(1)
        chosen = self.settings
        with_null = self.task.name == "squad_v2"
        texts = squad.texts(
            logits,
            self.rows(split, limit),
            self.examples[split]["context"][:],
            n_best=chosen.n_best,
            max_answer_length=chosen.max_answer_length,
            null_threshold=chosen.null_threshold if with_null else None,
        )
        return np.array([texts[example] for example in sorted(texts)], dtype=object)

    def truths(self, split: str = "validation", limit: int | None = None) -> list:
        """The right answers of :meth:`answers`: labels, or for spans lists of accepted texts."""
        rows = self.rows(split, limit)
        if self.task.kind != "span":
            return rows["labels"][:]
        known = self.examples[split]["answers"][:]
        return [known[example]["text"] for example in sorted(set(rows["example"][:]))]

    def guessing(self, limit: int | None = None) -> float:
        """The headline metric on validation of always giving training's most frequent answer.

        0 to 1; NaN where answers are no classes.
        """
        if self.task.kind != "classification":
            return float("nan")
        truths = np.asarray(self.truths(limit=limit))
        most_frequent = np.bincount(self.truths("train")).argmax()
        guesses = np.full_like(truths, most_frequent)
        return score(guesses, truths, [self.task.metric])[self.task.metric]

    def score(
        self, logits: np.ndarray, split: str = "validation", limit: int | None = None
    ) -> dict[str, float]:
        """The task's metrics; arguments as for :meth:`answers`."""
        answers, truths = self.answers(logits, split, limit), self.truths(split, limit)
        if self.task.kind == "span":
            return squad.score(answers, truths)
        return score(answers, np.asarray(truths), self.task.metrics)


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dataset(settings: Settings) -> Dataset:
    """The settings' task, loaded and tokenised once a process."""
    names = (*DATA, "data_dir", "model", "scale")
    needed = Settings(**{name: getattr(settings, name) for name in names})
    return _dataset(needed, home(), loading.digest(needed))


@functools.lru_cache(maxsize=4)
def _dataset(settings: Settings, _root: Path, _digest: str) -> Dataset:
    loaded = loading.load(settings)
    with_vocabulary = settings.but(model=MINILM) if settings.model == TINY else settings
    tokenizer = AutoTokenizer.from_pretrained(pretrained(with_vocabulary))
    examples = {"train": loaded.train, "validation": loaded.validation, **loaded.also}
    if loaded.held_out is not None:
        examples["held-out"] = loaded.held_out
    lengths = {"max_length": settings.max_length, "doc_stride": settings.doc_stride}
    splits = {
        name: loading.encode(rows, loaded.task, tokenizer, **lengths)
        for name, rows in examples.items()
    }
    return Dataset(loaded.task, splits, examples, tokenizer, settings, loaded.digest)


def token_frequencies(settings: Settings) -> Tensor:
    """Occurrences of each vocabulary entry in the training set, ``(vocab,)``, int64."""
    bundle = dataset(settings)
    ids = torch.cat([torch.as_tensor(row) for row in bundle.train["input_ids"]])
    return torch.bincount(ids, minlength=len(bundle.tokenizer))


def pretrained(settings: Settings) -> str:
    """What ``from_pretrained`` is given: a checked folder, or a name on the hub."""
    return pretrained_weights.find(settings.model, hub=not settings.offline)


def new_model(settings: Settings, task: tasks.Task) -> PreTrainedModel:
    """The settings' model with an untrained head for the task.

    Raises:
        ValueError: a model that cannot be converted.
    """
    auto = HEADS.get(task.kind, AutoModelForSequenceClassification)
    tiny = settings.model == TINY
    kind = "bert" if tiny else AutoConfig.from_pretrained(pretrained(settings)).model_type
    head = dict.fromkeys(family(kind).dropout, settings.dropout)
    if task.kind != "span":
        labels = dict(enumerate(task.labels)) or {0: "score"}
        names = {name: index for index, name in labels.items()}
        head |= dict(num_labels=len(labels), id2label=labels, label2id=names)
    if tiny:
        config = BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=settings.max_length,
            **head,
        )
        return auto.from_config(config)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the head is new, and meant to be
    transformers_logging.disable_progress_bar()
    model = auto.from_pretrained(pretrained(settings), dtype=torch.float32, **head)
    transformers_logging.set_verbosity(level)
    return model


def fine_tuned_model(settings: Settings) -> PreTrainedModel:
    """The settings' model with the head it was saved with; it must fit the settings' task.

    Raises:
        UserError: it has no head, one for another kind of task, other classes or another order
            of them, or takes fewer tokens than ``max_length``.
    """
    if settings.model == TINY:
        raise UserError(f"model '{TINY}' has random weights; expected teacher_epochs above 0")
    try:
        model = load_dense(pretrained(settings))
    except ValueError as error:
        raise UserError(str(error)) from None
    task, longest = TASKS[settings.task], encoder_layouts.longest(model)
    if hasattr(model, "qa_outputs") != (task.kind == "span"):
        raise UserError(
            f"task '{task.name}' is a {task.kind} task, the model is a {type(model).__name__}; "
            "expected a model fine-tuned on this task"
        )
    if task.kind != "span":
        _check_classes(model, task)
    if settings.max_length > longest:
        raise UserError(
            f"max_length={settings.max_length}: the model takes at most {longest} tokens"
        )
    return model


def _check_classes(model: PreTrainedModel, task: tasks.Task) -> None:
    """Refuse a classifier with other classes than the task's, or in another order."""
    expected = list(task.labels) or ["score"]
    if model.config.num_labels != len(expected):
        raise UserError(
            f"the model has {model.config.num_labels} outputs, task '{task.name}' needs "
            f"{len(expected)}: {', '.join(expected)}"
        )
    classes = [str(model.config.id2label[index]).lower() for index in range(len(expected))]
    if classes != expected and sorted(classes) == sorted(expected):
        raise UserError(
            f"the model's classes are {', '.join(classes)}; task '{task.name}' has them as "
            f"{', '.join(expected)}: reorder the classifier"
        )


def load(folder: Path, task: tasks.Task) -> PreTrainedModel:
    """A model saved by an experiment, dense or MoEBERT, on the device."""
    auto = HEADS.get(task.kind, AutoModelForSequenceClassification)
    return auto.from_pretrained(folder, dtype=torch.float32).to(device())


def load_stored(store: AnyStore, entry: Entry, task: str) -> PreTrainedModel:
    """The model of a stored stage, on the device and in eval mode.

    Raises:
        UserError: its weights are not kept: in committed results, or a student that was
            trained without ``keep_model=True``.
    """
    if not store.makes:
        raise UserError(
            f"'{store.source}' keeps results and no weights; run the notebook itself for what "
            "needs the model"
        )
    if not (entry.folder / "config.json").is_file():
        raise UserError(f"the {entry.kind}'s weights were not kept; ask for keep_model=True")
    return load(entry.folder, TASKS[task]).eval()


# A dataset in numbers, and tables that a notebook measures with models or data. Both are stored
# with the stages of an experiment, so that a figure can be drawn again without data and models.

TABLE = "table.parquet"


@dataclass(frozen=True)
class DatasetSummary:
    """A task's data in numbers.

    Attributes:
        task: The task.
        n_train: Training examples, as text: a long context may be several rows for the model.
        n_examples: Validation examples, likewise.
        n_answers: Validation predictions that are scored.
        guessing: The headline metric on validation of always giving training's most frequent
            answer, 0 to 1; NaN where answers are no classes.
        digest: Of the data.
    """

    task: Task
    n_train: int
    n_examples: int
    n_answers: int
    guessing: float
    digest: str

    @property
    def metric(self) -> str:
        """Name of the headline metric."""
        return self.task.metric


def summary(store: AnyStore, settings: Settings) -> DatasetSummary:
    """The settings' data in numbers, from the store or counted now."""
    row = store.make(summary_key(store, settings), functools.partial(_summarize, settings)).row
    guess = float("nan") if row["guessing"] is None else row["guessing"]
    return DatasetSummary(TASKS[settings.task], **{**row, "guessing": guess})


def summary_key(store: AnyStore, settings: Settings) -> StageKey:
    """What a dataset's summary depends on; a stage of kind ``about``."""
    choices = {**chosen(settings, DATA), "model": settings.model}
    return StageKey("about", choices, data_origin(store, settings, _summarize))


def data_origin(store: AnyStore, settings: Settings, build: Callable, **more: Any) -> dict:
    """The origin of a stage that starts from data and pretrained weights."""
    if not store.makes:
        return {}
    digests = {
        "data": loading.digest(settings),
        "weights": pretrained_weights.digest(settings.model, hub=not settings.offline),
        "versions": versions(),
    }
    return made_with(store, build, **digests, **more)


def _summarize(settings: Settings, folder: Path) -> dict:
    bundle = dataset(settings)
    guess = bundle.guessing()
    return {
        "n_train": len(bundle.examples["train"]),
        "n_examples": len(bundle.examples["validation"]),
        "n_answers": len(bundle.truths()),
        "guessing": None if math.isnan(guess) else guess,
        "digest": bundle.digest,
    }


def provenance_line(store: AnyStore, settings: Settings) -> str:
    """Scale, model, data, seed and library versions in one line, for the top of a notebook."""
    data, made = summary(store, settings), versions()
    libraries = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers"))
    where = f"{libraries}, {device()}" if store.makes else f"drawn from {store.source}"
    return (
        f"{settings.scale}: {settings.model} on {settings.task}, "
        f"{data.n_train:,} training and {data.n_examples:,} validation examples "
        f"(data {data.digest[:8]}), seed {settings.seed}, {where}"
    )


def measured_table(
    store: AnyStore, name: str, depends_on: Any, build: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """A table that a notebook measures with models or data, stored with its results.

    It is measured whenever the notebook runs. The stored table is read only where there are
    committed results and no models.

    Args:
        store: Where it is stored.
        name: Of the table, unlike any other with the same ``depends_on``.
        depends_on: Settings, or JSON values that contain some.
        build: Measures it.

    Returns:
        What ``build`` returned, as it comes back from parquet.
    """

    def keep(folder: Path) -> dict:
        table = build()
        table.to_parquet(folder / TABLE)
        return {"rows": len(table)}

    entry = store.make(_table_key(name, depends_on), keep, force=True)
    return pd.read_parquet(entry.folder / TABLE)


def stored_table(store: AnyStore, name: str, depends_on: Any) -> pd.DataFrame | None:
    """A table of :func:`measured_table` as it was stored last; None if it never was."""
    entry = store.find(_table_key(name, depends_on))
    return pd.read_parquet(entry.folder / TABLE) if entry else None


def _table_key(name: str, depends_on: Any) -> StageKey:
    return StageKey("table", {"name": name, "of": _without_places(depends_on)})


def _without_places(value: Any) -> Any:
    """A value with settings as a key has them, without where data lies."""
    if isinstance(value, Settings):
        return without_later(value.model_dump(exclude={"data_dir"}))
    if isinstance(value, dict):
        return {name: _without_places(part) for name, part in value.items()}
    return [_without_places(part) for part in value] if isinstance(value, list | tuple) else value
