"""What an experiment starts from: tokenised data, a fresh dense model, the device."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from moebert_lib import data, weights
from moebert_lib.scales import MINILM, TINY
from moebert_lib.settings import Settings, home
from moebert_lib.store import versions

#: The settings that decide a dataset.
DATA = ("task", "max_length", "max_train_examples", "max_eval_examples")


@dataclass(frozen=True)
class Dataset:
    """A task's two splits, tokenised. ``train`` and ``validation`` are ``datasets.Dataset``."""

    task: data.Task
    train: object
    validation: object
    tokenizer: PreTrainedTokenizerBase
    digest: str

    def batches(self, split: str, *, batch_size: int = 64, limit: int | None = None):
        """Padded batches of ``train`` or ``validation`` on the device, shortest first."""
        rows = getattr(self, split)
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        return data.batches(rows, self.tokenizer, batch_size, device=device())


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen(settings: Settings, names: tuple[str, ...]) -> dict:
    """Those settings, by name."""
    return {name: getattr(settings, name) for name in names}


def describe(settings: Settings) -> str:
    """One line of provenance for the top of a notebook."""
    bundle, known = dataset(settings), versions()
    libraries = ", ".join(f"{name} {known[name]}" for name in ("torch", "transformers"))
    return (
        f"{settings.scale}: {settings.model} on {settings.task}, "
        f"{len(bundle.train):,} training and {len(bundle.validation):,} validation examples "
        f"(data {bundle.digest[:8]}), "
        f"seed {settings.seed}, {libraries}, {device()}"
    )


def dataset(settings: Settings) -> Dataset:
    """The settings' task, loaded and tokenised once a process."""
    names = (*DATA, "data_dir", "model", "scale")
    return _dataset(Settings(**chosen(settings, names)), home())


@functools.lru_cache(maxsize=4)
def _dataset(settings: Settings, _root: Path) -> Dataset:
    loaded = data.load(settings)
    with_vocabulary = settings.but(model=MINILM) if settings.model == TINY else settings
    tokenizer = AutoTokenizer.from_pretrained(pretrained(with_vocabulary))
    train, validation = (
        data.encode(split, loaded.task, tokenizer, settings.max_length)
        for split in (loaded.train, loaded.validation)
    )
    return Dataset(loaded.task, train, validation, tokenizer, loaded.digest)


def token_frequencies(settings: Settings) -> Tensor:
    """Occurrences of each vocabulary entry in the training set, ``(vocab,)``, int64."""
    bundle = dataset(settings)
    ids = torch.cat([torch.as_tensor(row) for row in bundle.train["input_ids"]])
    return torch.bincount(ids, minlength=len(bundle.tokenizer))


def pretrained(settings: Settings) -> str:
    """What ``from_pretrained`` is given: a checked folder, or a name on the hub."""
    return weights.find(settings.model, hub=not settings.offline)


def new_model(settings: Settings, task: data.Task) -> PreTrainedModel:
    """The settings' model with an untrained head for the task."""
    labels = dict(enumerate(task.labels)) or {0: "score"}
    head = dict(
        num_labels=len(labels), id2label=labels, label2id={v: k for k, v in labels.items()},
        hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout,
    )  # fmt: skip
    if settings.model == TINY:
        config = BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=settings.max_length, **head,
        )  # fmt: skip
        return AutoModelForSequenceClassification.from_config(config)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the head is new, and meant to be
    transformers_logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(pretrained(settings), **head)
    transformers_logging.set_verbosity(level)
    return model
