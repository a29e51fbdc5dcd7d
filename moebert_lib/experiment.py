"""The unit experiment: teacher, importance, conversion, student; each made once.

Every stage is an entry of the store, addressed by exactly the settings, data, weights, code
and library versions that it depends on. Ablations therefore share a teacher and its
importance scores, and a grid runs only what is missing.
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from moebert_lib import data, weights
from moebert_lib.convert import to_moebert
from moebert_lib.evaluate import predict, score, state_distances
from moebert_lib.experts import choose_ranking
from moebert_lib.importance import Importance, ffn_importance
from moebert_lib.inputs import (
    DATA,
    chosen,
    dataset,
    describe,
    device,
    new_model,
    pretrained,
    token_frequencies,
)
from moebert_lib.moe_layer import parameter_counts
from moebert_lib.scales import FFN_WIDTHS
from moebert_lib.settings import Settings, home
from moebert_lib.store import Entry, Store, code_digest, versions
from moebert_lib.train import distil, fine_tune

__all__ = [
    "Student", "Teacher", "conversion", "converted", "dataset", "describe", "device", "evaluate",
    "grid", "importance", "student", "teacher",
]  # fmt: skip

TEACHER = ("teacher_epochs", "teacher_learning_rate", "teacher_batch_size",
           "teacher_weight_decay", "max_grad_norm", "dropout")  # fmt: skip
IMPORTANCE = ("importance_examples", "importance_split")
CONVERSION = ("n_experts", "routing", "ranking", "seed", "shared_neurons", "expert_layer_norm",
              "gate_scaling")  # fmt: skip
TRAINING = ("distill", "distill_weight", "epochs", "learning_rate", "batch_size", "weight_decay",
            "max_grad_norm", "padding_in_loss", "teacher_dropout", "balance_weight")  # fmt: skip
QUIET = 15  # seconds between two lines of a grid's progress
DISTANCE_EXAMPLES = 100  # validation examples for the layer-by-layer distances


@dataclass(frozen=True)
class Teacher:
    """The fine-tuned dense model, its validation metrics, and where they are kept."""

    model: PreTrainedModel
    metrics: dict[str, float]
    entry: Entry


@dataclass(frozen=True)
class Student:
    """A distilled MoEBERT's results.

    Attributes:
        row: ``teacher_*``, ``converted_*`` and final metrics, parameter counts, and
            ``distances_before`` / ``distances_after``, ``L + 1`` values each.
        curve: Loss terms by step.
        entry: The store's entry.
    """

    row: dict
    curve: pd.DataFrame
    entry: Entry

    def model(self) -> PreTrainedModel:
        """The trained model; only if it was asked for with ``keep_model=True``."""
        return AutoModelForSequenceClassification.from_pretrained(self.entry.folder).to(device())


def _fixed(settings: Settings, *also: str) -> Settings:
    """Settings with everything at its default but what the teacher (and ``also``) depends on."""
    names = {*DATA, *TEACHER, *also, "scale", "data_dir", "model"}
    seed = settings.seed if settings.teacher_seed is None else settings.teacher_seed
    return Settings(**chosen(settings, tuple(names)), teacher_seed=seed)


def teacher_key(settings: Settings) -> dict:
    """What the teacher depends on."""
    seed = settings.seed if settings.teacher_seed is None else settings.teacher_seed
    return {
        **chosen(settings, DATA + TEACHER), "teacher_seed": seed, "model": settings.model,
        "weights": weights.digest(settings.model, hub=not settings.offline),
        "data": data.digest(settings),
        "code": code_digest(
            "data", "corpus", "weights", "inputs", "train", "evaluate", "experiment"
        ),
        "versions": versions(),
    }  # fmt: skip


def teacher(settings: Settings) -> Teacher:
    """The dense model fine-tuned on the task, from the store or trained now."""
    return _teacher(_fixed(settings), home())


@functools.lru_cache(maxsize=2)  # read and verified once a process
def _teacher(settings: Settings, _root: Path) -> Teacher:
    transformers_logging.disable_progress_bar()

    def build(folder: Path) -> dict:
        bundle = dataset(settings)
        transformers_logging.disable_progress_bar()
        set_seed(teacher_key(settings)["teacher_seed"])
        model = new_model(settings, bundle.task).to(device())
        fine_tune(model, bundle.train, bundle.tokenizer, settings, folder)
        model.save_pretrained(folder)
        bundle.tokenizer.save_pretrained(folder)
        return evaluate(settings, model)

    entry = Store().make("teacher", teacher_key(settings), build)
    _say(entry, f"teacher for {settings.task}")
    model = AutoModelForSequenceClassification.from_pretrained(entry.folder)
    return Teacher(model.to(device()).eval(), entry.row, entry)


def importance(settings: Settings) -> Importance:
    """Eq. 4's scores of the teacher's neurons, from the store or computed now."""
    return _importance(_fixed(settings, *IMPORTANCE), home())


@functools.lru_cache(maxsize=4)
def _importance(settings: Settings, _root: Path) -> Importance:
    def build(folder: Path) -> dict:
        dense, bundle = teacher(settings), dataset(settings)
        batches = bundle.batches(
            settings.importance_split, batch_size=32, limit=settings.importance_examples
        )
        meta = {
            "task": settings.task, "split": settings.importance_split, "model": settings.model,
            "teacher": dense.entry.digest, "data": bundle.digest,
        }  # fmt: skip
        scores = ffn_importance(dense.model, batches, meta=meta)
        scores.save(folder / "importance.safetensors")
        return {"n_examples": scores.n_examples}

    entry = Store().make("importance", importance_key(settings), build)
    _say(entry, f"importance for {settings.task}")
    return Importance.load(entry.folder / "importance.safetensors")


def importance_key(settings: Settings) -> dict:
    """What the scores depend on."""
    code = code_digest("importance")
    return {"teacher": teacher_key(settings), **chosen(settings, IMPORTANCE), "code": code}


def conversion_key(settings: Settings) -> dict:
    """What the student depends on before it is trained."""
    sizes = settings.sizes(_width(settings))
    ranking = {"importance": importance_key(settings)}
    if settings.ranking == "random":
        ranking = {"teacher": teacher_key(settings), "split_seed": settings.split_seed}
    return {
        **chosen(settings, CONVERSION), "expert_size": sizes[0], "n_shared": sizes[1], **ranking,
        "code": code_digest("experts", "routing", "moe_layer", "modeling", "convert"),
    }  # fmt: skip


def _width(settings: Settings) -> int:
    known = FFN_WIDTHS.get(settings.model)
    return known or AutoConfig.from_pretrained(pretrained(settings)).intermediate_size


def converted(settings: Settings) -> PreTrainedModel:
    """The teacher turned into a MoEBERT as the settings say, untrained; new on every call."""
    dense = teacher(settings).model
    expert_size, n_shared = settings.sizes(dense.config.intermediate_size)
    shape = (dense.config.num_hidden_layers, dense.config.intermediate_size)
    known = torch.arange(shape[1]).expand(shape)  # a random split asks for no scores
    ranking = known if settings.ranking == "random" else importance(settings).ranking
    frequencies = token_frequencies(settings) if settings.routing == "hash-balance" else None
    return to_moebert(
        dense, choose_ranking(ranking, settings.ranking, seed=settings.split_seed),
        n_experts=settings.n_experts, expert_size=expert_size, n_shared=n_shared,
        routing=settings.routing, seed=settings.seed, token_frequencies=frequencies,
        expert_layer_norm=settings.expert_layer_norm, gate_scaling=settings.gate_scaling,
        router_aux_loss_coef=settings.balance_weight, allow_identical=True,
    )  # fmt: skip


def evaluate(settings: Settings, model: PreTrainedModel) -> dict[str, float]:
    """The task's metrics of a model on the validation split."""
    bundle = dataset(settings)
    logits = predict(model, bundle.batches("validation", batch_size=settings.eval_batch_size))
    return score(logits, bundle.validation["labels"], bundle.task.metrics)


def conversion(settings: Settings) -> dict[str, float]:
    """Metrics right after conversion, before any training; kept in the store."""
    return _conversion(settings).row


def _conversion(settings: Settings) -> Entry:
    def build(folder: Path) -> dict:
        return evaluate(settings, converted(settings))

    return Store().make("converted", conversion_key(settings), build)


def student(settings: Settings, *, keep_model: bool = False) -> Student:
    """Convert, distil and evaluate; from the store or done now.

    Args:
        settings: The experiment.
        keep_model: Also keep the trained weights (90 MB for MiniLM).
    """
    key = {"conversion": conversion_key(settings), **chosen(settings, TRAINING)}
    key["code"] = code_digest("distill", "train", "evaluate", "experiment")

    def build(folder: Path) -> dict:
        dense, bundle = teacher(settings), dataset(settings)
        before = conversion(settings)
        model = converted(settings)
        near = functools.partial(bundle.batches, "validation", limit=DISTANCE_EXAMPLES)
        distances = [state_distances(model, dense.model, near())]
        set_seed(settings.seed)
        curve = distil(model, dense.model, bundle.train, bundle.tokenizer, settings, folder)
        distances.append(state_distances(model, dense.model, near()))
        curve.to_csv(folder / "curve.csv", index=False)
        if keep_model:
            model.save_pretrained(folder)
            bundle.tokenizer.save_pretrained(folder)
        counts = parameter_counts(model)
        return {
            **{f"teacher_{name}": value for name, value in dense.metrics.items()},
            **{f"converted_{name}": value for name, value in before.items()},
            **evaluate(settings, model),
            "effective_parameters": counts.effective, "stored_parameters": counts.stored,
            "distances_before": distances[0].tolist(), "distances_after": distances[1].tolist(),
            "steps": len(curve),
        }  # fmt: skip

    store = Store()
    with_model = store.find("student", {**key, "keep_model": True})
    entry = with_model or store.make("student", {**key, "keep_model": keep_model}, build)
    return Student(entry.row, pd.read_csv(entry.folder / "curve.csv"), entry)


def grid(points: list[Settings], *, run=student) -> pd.DataFrame:
    """One row for each point: its settings beside its results; runs only what is missing.

    Args:
        points: Experiments; doubles are run once.
        run: :func:`student` or :func:`conversion`.
    """
    rows, done = [], 0
    started = said = time.monotonic()
    for index, point in enumerate(points, start=1):
        result = _conversion(point) if run is conversion else run(point)
        entry = getattr(result, "entry", result)
        done += not entry.reused
        if not entry.reused and time.monotonic() - said > QUIET:
            said = time.monotonic()
            left = (said - started) / done * (len(points) - index) / 60
            print(f"· run {index}/{len(points)} took {entry.seconds:.0f} s, "
                  f"at most {left:.1f} min left", flush=True)  # fmt: skip
        rows.append({**point.model_dump(), **entry.row})
    print(f"· grid: {len(points)} points, {done} run now, {len(points) - done} reused", flush=True)
    return pd.DataFrame(rows)


def _say(entry: Entry, what: str) -> None:
    how = f"reused, runs/{entry.folder.name}" if entry.reused else f"made in {entry.seconds:.0f} s"
    print(f"· {what}: {how}", flush=True)
