"""The dense model: fine-tuned on the task, evaluated, and its neurons scored; each made once.

Each stage is an entry of the store, found by exactly the settings, data, weights, code and
library versions that it depends on, so that all ablations share it.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from moebert_lib.config.file_io import WORK
from moebert_lib.config.settings import Settings
from moebert_lib.data import squad
from moebert_lib.data.loading import digest, load
from moebert_lib.data.tasks import TASKS
from moebert_lib.experiments.dataset import (
    data_origin,
    dataset,
    device,
    fine_tuned_model,
    load_stored,
    new_model,
)
from moebert_lib.experiments.stage_keys import DATA, IMPORTANCE, TEACHER, chosen, made_with
from moebert_lib.method.importance import Importance, ffn_importance
from moebert_lib.method.other_scores import SCORES, every_score
from moebert_lib.model.accelerate import accelerate_if_exact, accelerate_if_possible
from moebert_lib.store.committed_results import AnyStore
from moebert_lib.store.store import Entry, StageKey
from moebert_lib.training import checkpoints
from moebert_lib.training.evaluation import predict
from moebert_lib.training.trainer import fine_tune

ANSWERS = "answers.csv"
PREDICTIONS, RIGHT = "predictions.safetensors", "right.safetensors"
IMPORTANCE_FILE, SCORES_FILE = "importance.safetensors", "scores.safetensors"


@dataclass(frozen=True)
class Teacher:
    """The fine-tuned dense model, its validation metrics, and where they are stored."""

    task: str
    metrics: dict[str, float]
    entry: Entry
    store: AnyStore

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model, read when it is first asked for; in eval mode.

        Raises:
            UserError: the store has results and no weights.
        """
        return load_stored(self.store, self.entry, self.task)


def only_teachers(settings: Settings, *more: str) -> Settings:
    """The settings with all at its default but what the teacher (and ``more``) depends on."""
    names = {*DATA, *TEACHER, *more, "scale", "data_dir", "model"}
    values = {name: getattr(settings, name) for name in names}
    return Settings(**values, teacher_seed=settings.dense_seed)


def teacher_key(store: AnyStore, settings: Settings) -> StageKey:
    """What the teacher depends on."""
    choices = {
        **chosen(settings, DATA + TEACHER),
        "teacher_seed": settings.dense_seed,
        "model": settings.model,
    }
    build = _fine_tune if settings.teacher_epochs else _take_fine_tuned
    # a GPU trains in bfloat16
    origin = data_origin(store, settings, build, device=device().type)
    return StageKey("teacher", choices, origin)


def teacher(store: AnyStore, settings: Settings) -> Teacher:
    """The dense model fine-tuned on the task, from the store or trained now.

    With ``teacher_epochs=0`` it is the settings' model as it was saved.
    """
    return _teacher(store, only_teachers(settings))


@functools.lru_cache(maxsize=2)  # read and verified once a process
def _teacher(store: AnyStore, settings: Settings) -> Teacher:
    transformers_logging.disable_progress_bar()
    build = partial(_fine_tune if settings.teacher_epochs else _take_fine_tuned, settings)
    entry = store.make(teacher_key(store, settings), build)
    checkpoints.clear(checkpoint_folder(entry.folder))
    if store.makes and TASKS[settings.task].kind != "span":
        right_answers(store, settings)  # with these the answers of all its students can be judged
    print(f"· teacher for {settings.task}: {entry.origin}", flush=True)
    return Teacher(settings.task, entry.row, entry, store)


def _fine_tune(settings: Settings, folder: Path) -> dict:
    bundle = dataset(settings)
    transformers_logging.disable_progress_bar()
    set_seed(settings.dense_seed)
    model = new_model(settings, bundle.task).to(device())
    fine_tune(
        model,
        bundle.train,
        bundle.tokenizer,
        settings,
        folder,
        checkpoints=checkpoint_folder(folder),
    )
    return _save(settings, model, folder)


def _take_fine_tuned(settings: Settings, folder: Path) -> dict:
    return _save(settings, fine_tuned_model(settings).to(device()), folder)


def _save(settings: Settings, model: PreTrainedModel, folder: Path) -> dict[str, float]:
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    dataset(settings).tokenizer.save_pretrained(folder)
    return evaluate_and_save(settings, model, folder)


def importance_key(store: AnyStore, settings: Settings) -> StageKey:
    """What the scores of Eq. 4 depend on."""
    choices = {"teacher": teacher_key(store, settings), **chosen(settings, IMPORTANCE)}
    return StageKey("importance", choices, made_with(store, _score_importance))


def importance(store: AnyStore, settings: Settings) -> Importance:
    """Eq. 4's scores of the teacher's neurons, from the store or computed now."""
    return _importance(store, only_teachers(settings, *IMPORTANCE))


@functools.lru_cache(maxsize=4)
def _importance(store: AnyStore, settings: Settings) -> Importance:
    build = partial(_score_importance, store, settings)
    entry = store.make(importance_key(store, settings), build)
    print(f"· importance for {settings.task}: {entry.origin}", flush=True)
    return Importance.load(entry.folder / IMPORTANCE_FILE)


def _score_importance(store: AnyStore, settings: Settings, folder: Path) -> dict:
    dense, bundle = teacher(store, settings), dataset(settings)
    meta = {
        "task": settings.task,
        "split": settings.importance_split,
        "model": settings.model,
        "teacher": dense.entry.digest,
        "data": bundle.digest,
    }
    scores = ffn_importance(
        accelerate_if_possible(dense.model), scored_batches(settings), meta=meta
    )
    scores.save(folder / IMPORTANCE_FILE)
    return {"n_examples": scores.n_examples}


def scored_batches(settings: Settings):
    """Batches of the examples that neurons are scored on."""
    return dataset(settings).batches(
        settings.importance_split,
        batch_size=32,
        limit=settings.importance_examples,
        shuffle=True,
    )


def scores_key(store: AnyStore, settings: Settings) -> StageKey:
    """What :func:`all_scores` depends on."""
    choices = {"importance": importance_key(store, settings), "kinds": list(SCORES)}
    return StageKey("scores", choices, made_with(store, _score_all))


def all_scores(store: AnyStore, settings: Settings) -> dict[str, Tensor]:
    """Every score of the teacher's neurons (``other_scores.SCORES``), stored or computed now.

    The examples are those that Eq. 4 is scored on; ``random`` has seed 0.

    Returns:
        Name to scores ``(L, F)``, float64, in the order of ``SCORES``.
    """
    entry = store.make(scores_key(store, settings), partial(_score_all, store, settings))
    print(f"· scores for {settings.task}: {entry.origin}", flush=True)
    scores = load_file(entry.folder / SCORES_FILE)
    return {kind: scores[kind] for kind in SCORES}


def _score_all(store: AnyStore, settings: Settings, folder: Path) -> dict:
    model = accelerate_if_possible(teacher(store, settings).model)
    scores = every_score(model, scored_batches(settings))
    save_file({kind: each.scores for kind, each in scores.items()}, folder / SCORES_FILE)
    return {"n_examples": scores["importance"].n_examples}


def evaluate(settings: Settings, model: PreTrainedModel) -> dict[str, float]:
    """The task's metrics of a model on the validation split, and on further ones by suffix."""
    return metrics(settings, logits(settings, model))


def evaluate_with_answers(
    settings: Settings, model: PreTrainedModel
) -> tuple[dict[str, float], np.ndarray]:
    """:func:`evaluate`, and the prediction for each validation example.

    A prediction is a class index, a value, or a text.
    """
    by_split = logits(settings, model)
    return metrics(settings, by_split), dataset(settings).answers(by_split["validation"])


def logits(settings: Settings, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """A model's logits by split, as ``evaluation.predict`` gives them."""
    bundle, model = dataset(settings), accelerate_if_exact(model)
    return {
        split: predict(model, bundle.batches(split, batch_size=settings.eval_batch_size))
        for split in bundle.judged
    }


def metrics(settings: Settings, by_split: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The task's metrics of :func:`logits`; those of further splits have the split's name."""
    scores: dict[str, float] = {}
    for split, rows in by_split.items():
        suffix = "" if split == "validation" else f"_{split}"
        of_split = dataset(settings).score(rows, split)
        scores |= {f"{name}{suffix}": value for name, value in of_split.items()}
    return scores


def evaluate_and_save(
    settings: Settings,
    model: PreTrainedModel,
    folder: Path,
    points: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> dict[str, float]:
    """:func:`evaluate`; answers and logits are saved for the readers below.

    Args:
        settings: The experiment.
        model: Dense or MoEBERT.
        folder: Of the entry.
        points: :func:`logits` of the model before, by name, to be scored and saved with it.
    """
    bundle, by_split = dataset(settings), logits(settings, model)
    answers = pd.DataFrame({"answer": bundle.answers(by_split["validation"])})
    answers.to_csv(folder / ANSWERS, index=False)
    scores, kept = metrics(settings, by_split), _kept(settings, by_split)
    for point, before in (points or {}).items():
        earlier = metrics(settings, before)
        scores |= {f"{name}_at_{point}": value for name, value in earlier.items()}
        tensors = _kept(settings, before)
        kept |= {f"{name}.at_{point}": value for name, value in tensors.items()}
    save_arrays(kept, folder / PREDICTIONS)
    return scores


def _kept(settings: Settings, by_split: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is saved of logits; see :func:`predictions`."""
    bundle = dataset(settings)
    kept = {}
    for split, rows in by_split.items():
        if bundle.task.kind == "span":  # answers are texts, and logits are of all tokens
            scores = squad.scores(bundle.answers(rows, split), bundle.truths(split))
            kept |= {f"{split}.{name}": values for name, values in scores.items()}
        else:
            answers = bundle.answers(rows, split)
            small = np.int8 if bundle.task.kind == "classification" else answers.dtype
            kept |= {f"{split}.answers": answers.astype(small), f"{split}.logits": np.float16(rows)}
    return kept


def saved_answers(entry: Entry) -> pd.Series:
    """A stored model's prediction for each validation example."""
    return pd.read_csv(entry.folder / ANSWERS, keep_default_na=False)["answer"]


def predictions(entry: Entry) -> dict[str, np.ndarray]:
    """What is kept of a stored model's predictions, by name; older entries have none.

    ``SPLIT.logits``, ``(n, C)``, float16, and ``SPLIT.answers``, ``(n,)``: class indices, or
    values. Where answers are spans, ``SPLIT.f1`` and ``SPLIT.exact_match`` of each question, 0 to
    1. A name that ends in ``.at_EPOCH`` is of an earlier point of the training (``score_at``).
    """
    path = entry.folder / PREDICTIONS
    return load_arrays(path) if path.is_file() else {}


def right_key(store: AnyStore, settings: Settings) -> StageKey:
    """What :func:`right_answers` depends on."""
    origin = made_with(store, _keep_right, data=digest(settings)) if store.makes else {}
    return StageKey("right", chosen(settings, DATA), origin)


def right_answers(store: AnyStore, settings: Settings) -> dict[str, np.ndarray]:
    """The right class or value of every example that models are judged on, by split.

    From the store or read now. With :func:`saved_answers` or :func:`predictions` they give every
    stored metric again, without data. A span task has none: its right answers are texts.
    """
    entry = store.make(right_key(store, settings), partial(_keep_right, settings))
    return load_arrays(entry.folder / RIGHT)


def _keep_right(settings: Settings, folder: Path) -> dict:
    loaded = load(settings)
    splits = {"validation": loaded.validation, **loaded.also}
    kind = np.int8 if loaded.task.labels else np.float64
    labels = {split: np.array(rows["label"][:], dtype=kind) for split, rows in splits.items()}
    save_arrays(labels, folder / RIGHT)
    return {"n_examples": sum(map(len, labels.values()))}


def checkpoint_folder(folder: Path) -> Path:
    """Where the training of an entry writes its checkpoints until the entry is complete.

    Args:
        folder: The entry's own folder, or the temporary one that it is built in.
    """
    built = WORK.fullmatch(folder.name)
    root, name = (folder.parents[1], built[1]) if built else (folder.parent, folder.name)
    return root / "checkpoints" / name
