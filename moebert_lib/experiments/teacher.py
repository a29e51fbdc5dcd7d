"""The dense model: fine-tuned on the task, judged, and its neurons scored; each made once.

Both stages are entries of the store, addressed by exactly the settings, data, weights, code
and library versions that they depend on, so that all ablations share them.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from moebert_lib.config.errors import UserError, home
from moebert_lib.config.provenance import code_digest, versions
from moebert_lib.config.settings import Settings
from moebert_lib.data import loading, pretrained_weights, tasks
from moebert_lib.experiments.dataset import (
    chosen,
    dataset,
    device,
    fine_tuned_model,
    load,
    new_model,
)
from moebert_lib.experiments.stage_keys import DATA, IMPORTANCE, TEACHER
from moebert_lib.method.importance import Importance, ffn_importance
from moebert_lib.method.other_scores import SCORES, every_score
from moebert_lib.model.accelerate import accelerate_if_exact, accelerate_if_possible
from moebert_lib.store import committed_results
from moebert_lib.store.store import Entry, StageKey, Store
from moebert_lib.training import checkpoints
from moebert_lib.training.evaluation import predict
from moebert_lib.training.trainer import fine_tune

ANSWERS = "answers.csv"
#: Code that the numbers of every model go through.
FORWARD = ("model.accelerate", "model.cpu_kernels", "data.batching", "model.cpu_kernels")


@dataclass(frozen=True)
class Teacher:
    """The fine-tuned dense model, its validation metrics, and where they are kept."""

    task: str
    metrics: dict[str, float]
    entry: Entry

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model, read when it is first asked for; in eval mode.

        Raises:
            UserError: its weights are not kept, as in a folder of results.
        """
        if committed_results.named():
            raise UserError(
                f"'{committed_results.named()}' keeps results and no weights; run the notebook "
                "itself for what needs the model"
            )
        return load(self.entry.folder, tasks.TASKS[self.task]).eval()


def reduced(settings: Settings, *also: str) -> Settings:
    """The settings with all at its default but what the teacher (and ``also``) depends on."""
    names = {*DATA, *TEACHER, *also, "scale", "data_dir", "model"}
    return Settings(**chosen(settings, tuple(names)), teacher_seed=settings.dense_seed)


def teacher_key(settings: Settings) -> StageKey:
    """What the teacher depends on."""
    choices = {
        **chosen(settings, DATA + TEACHER),
        "teacher_seed": settings.dense_seed,
        "model": settings.model,
    }
    return StageKey("teacher", choices, _origin(settings))


def _origin(settings: Settings) -> dict:
    """What a teacher is made with; nothing where it is read and not made."""
    if committed_results.named():
        return {}
    return {
        "weights": pretrained_weights.digest(settings.model, hub=not settings.offline),
        "data": loading.digest(settings),
        "device": device().type,  # bf16 on a GPU
        "code": code_digest(
            "data.loading",
            "data.batching",
            "data.builtin_corpus",
            "data.squad",
            "data.pretrained_weights",
            "experiments.dataset",
            "training.trainer",
            "training.checkpoints",
            "training.evaluation",
            "experiments.teacher",
            *FORWARD,
        ),
        "versions": versions(),
    }


def teacher(settings: Settings) -> Teacher:
    """The dense model fine-tuned on the task, from the store or trained now.

    With ``teacher_epochs=0`` it is the settings' model as it was saved.
    """
    return _teacher(reduced(settings), home())


@functools.lru_cache(maxsize=2)  # read and verified once a process
def _teacher(settings: Settings, _root: Path) -> Teacher:
    transformers_logging.disable_progress_bar()

    def build(folder: Path) -> dict:
        model = None if settings.teacher_epochs else fine_tuned_model(settings).to(device())
        bundle = dataset(settings)
        transformers_logging.disable_progress_bar()
        if model is None:
            set_seed(settings.dense_seed)
            model = new_model(settings, bundle.task).to(device())
            fine_tune(
                model,
                bundle.train,
                bundle.tokenizer,
                settings,
                folder,
                checkpoints=place(store, store.folder(key)),
            )
        model.save_pretrained(folder)
        bundle.tokenizer.save_pretrained(folder)
        return keep_judged(settings, model, folder)

    store, key = committed_results.open_store(), teacher_key(settings)
    entry = store.make(key, build)
    checkpoints.clear(place(store, entry.folder))
    _say(entry, f"teacher for {settings.task}")
    return Teacher(settings.task, entry.row, entry)


def importance(settings: Settings) -> Importance:
    """Eq. 4's scores of the teacher's neurons, from the store or computed now."""
    return _importance(reduced(settings, *IMPORTANCE), home())


@functools.lru_cache(maxsize=4)
def _importance(settings: Settings, _root: Path) -> Importance:
    def build(folder: Path) -> dict:
        dense, bundle = teacher(settings), dataset(settings)
        batches = bundle.batches(
            settings.importance_split,
            batch_size=32,
            limit=settings.importance_examples,
            shuffle=True,
        )
        meta = {
            "task": settings.task,
            "split": settings.importance_split,
            "model": settings.model,
            "teacher": dense.entry.digest,
            "data": bundle.digest,
        }
        scores = ffn_importance(accelerate_if_possible(dense.model), batches, meta=meta)
        scores.save(folder / "importance.safetensors")
        return {"n_examples": scores.n_examples}

    entry = committed_results.open_store().make(importance_key(settings), build)
    _say(entry, f"importance for {settings.task}")
    return Importance.load(entry.folder / "importance.safetensors")


def importance_key(settings: Settings) -> StageKey:
    """What the scores depend on."""
    code = code_digest("method.importance", "method.encoder_layouts", *FORWARD)
    choices = {"teacher": teacher_key(settings), **chosen(settings, IMPORTANCE)}
    return StageKey("importance", choices, {"code": code})


def evaluate(settings: Settings, model: PreTrainedModel) -> dict[str, float]:
    """The task's metrics of a model on the validation split, and on further ones by suffix."""
    return judge(settings, model)[0]


def judge(settings: Settings, model: PreTrainedModel) -> tuple[dict[str, float], np.ndarray]:
    """:func:`evaluate`, and what the model says to each validation example.

    An answer is a class index, a value, or a text.
    """
    bundle, found, said, model = dataset(settings), {}, {}, accelerate_if_exact(model)
    for split in [split for split in bundle.splits if split != "train"]:
        logits = predict(model, bundle.batches(split, batch_size=settings.eval_batch_size))
        suffix = "" if split == "validation" else f"_{split}"
        scores = bundle.score(logits, split)
        found |= {f"{name}{suffix}": value for name, value in scores.items()}
        said[split] = bundle.answers(logits, split)
    return found, said["validation"]


def keep_judged(settings: Settings, model: PreTrainedModel, folder: Path) -> dict[str, float]:
    """:func:`evaluate`, with the answers kept in a folder for :func:`answers`."""
    metrics, said = judge(settings, model)
    pd.DataFrame({"answer": said}).to_csv(folder / ANSWERS, index=False)
    return metrics


def answers(entry: Entry) -> pd.Series:
    """What a stored model said to each validation example."""
    return pd.read_csv(entry.folder / ANSWERS, keep_default_na=False)["answer"]


def truths(settings: Settings) -> list:
    """The right answers to the validation examples; for spans lists of accepted texts."""
    return dataset(settings).truths()


def place(store: Store, folder: Path) -> Path:
    """Where the checkpoints of an entry's training lie until its folder is complete."""
    return store.root / "checkpoints" / folder.name


def _say(entry: Entry, what: str) -> None:
    print(f"· {what}: {entry.origin}", flush=True)


# Every score of a teacher's neurons (``scores``), made once and kept.


def scorings_key(settings: Settings) -> StageKey:
    """What the scores depend on, given what importance depends on."""
    choices = {"importance": importance_key(settings), "kinds": list(SCORES)}
    code = code_digest("method.other_scores", "method.partition")
    return StageKey("scores", choices, {"code": code})


def scorings(settings: Settings) -> dict[str, Tensor]:
    """All of :data:`scores.SCORES` for the teacher, from the store or computed now.

    The examples are those that Eq. 4 is scored on; ``random`` has seed 0.

    Returns:
        Name to scores ``(L, F)``, float64, in the order of ``SCORES``.
    """

    def build(folder: Path) -> dict:
        model, bundle = teacher(settings).model, dataset(settings)
        batches = bundle.batches(
            settings.importance_split,
            batch_size=32,
            limit=settings.importance_examples,
            shuffle=True,
        )
        found = every_score(accelerate_if_possible(model), batches)
        save_file({kind: one.scores for kind, one in found.items()}, folder / "scores.safetensors")
        return {"n_examples": found["importance"].n_examples}

    entry = committed_results.open_store().make(scorings_key(settings), build)
    print(f"· scores for {settings.task}: {entry.origin}", flush=True)
    kept = load_file(entry.folder / "scores.safetensors")
    return {kind: kept[kind] for kind in SCORES}
