"""The unit experiment: a teacher converted and distilled; each stage made once.

Each stage is an entry of the store, found by exactly the settings, data, weights, code and
library versions that it depends on. Ablations therefore share a teacher and its importance
scores, and a grid runs only what is missing.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig, PreTrainedModel, set_seed

from moebert_lib.config.presets import FFN_WIDTHS
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import expert_partitions
from moebert_lib.experiments.dataset import dataset, load_stored, pretrained, token_frequencies
from moebert_lib.experiments.stage_keys import CONVERSION, TRAINING, chosen, made_with
from moebert_lib.experiments.teacher import (
    checkpoint_folder,
    evaluate_and_save,
    importance_key,
    logits,
    saved_answers,
    teacher,
    teacher_key,
)
from moebert_lib.method import encoder_layouts
from moebert_lib.method.distillation_loss import teacher_layers
from moebert_lib.model.accelerate import accelerate_if_exact
from moebert_lib.model.conversion import half_depth, to_moebert
from moebert_lib.model.moe_layer import parameter_counts
from moebert_lib.store.committed_results import AnyStore
from moebert_lib.store.store import Entry, StageKey
from moebert_lib.training import checkpoints
from moebert_lib.training.evaluation import sentence_states, state_distances
from moebert_lib.training.routing_analysis import evenness, expert_loads, fit_gates
from moebert_lib.training.trainer import distil

QUIET = 15  # seconds between two lines of a grid's progress
GATE_EXAMPLES = 200  # training examples that a gate is fitted to (gate_start="nearest")
LOAD_EXAMPLES = 200  # validation examples that a gate's loads are counted on
POINTS = "scored"  # folder of the logits at the points of score_at
NEAR = 64  # validation examples whose states are compared, layer by layer


@dataclass(frozen=True)
class Student:
    """A distilled MoEBERT's results.

    Attributes:
        row: ``teacher_*``, ``converted_*`` and final metrics, parameter counts, and ``guessing``,
            the headline metric of always giving the most frequent answer.
        curve: Loss terms by step.
        distances: Eq. 5's term at each layer, to the teacher.
        entry: The store's entry.
        store: Where it is stored.
    """

    row: dict
    curve: pd.DataFrame
    distances: pd.Series
    entry: Entry
    store: AnyStore

    def model(self) -> PreTrainedModel:
        """The trained model, in eval mode; only if it was asked for with ``keep_model=True``.

        Raises:
            UserError: its weights are not kept.
        """
        return load_stored(self.store, self.entry, self.row["task"])


def conversion_key(store: AnyStore, settings: Settings) -> StageKey:
    """What the student depends on before it is trained."""
    if settings.student == "half-depth":  # no experts, so nothing of how they are made
        choices = {"teacher": teacher_key(store, settings), **chosen(settings, ("student", "seed"))}
        return StageKey("converted", choices, made_with(store, _convert))
    expert_size, n_shared = settings.sizes(width(settings))
    choices = {
        **chosen(settings, CONVERSION),
        "expert_size": expert_size,
        "n_shared": n_shared,
        **expert_partitions.parents(store, settings),
    }
    if settings.gate_start == "nearest":
        choices["gate_examples"] = GATE_EXAMPLES
    return StageKey("converted", choices, made_with(store, _convert))


def width(settings: Settings) -> int:
    """Neurons of a dense feed-forward layer of the experiment's model; trains nothing."""
    known = FFN_WIDTHS.get(settings.model)
    return known or encoder_layouts.width(AutoConfig.from_pretrained(pretrained(settings)))


def converted(store: AnyStore, settings: Settings) -> PreTrainedModel:
    """The teacher converted to a student as the settings say, untrained; new on every call."""
    if settings.student == "half-depth":
        return half_depth(teacher(store, settings).model)
    neurons = expert_partitions.neurons(store, settings)
    return convert(settings, teacher(store, settings).model, neurons)


def convert(settings: Settings, dense: PreTrainedModel, neurons: object) -> PreTrainedModel:
    """A dense model converted as the settings say; ``neurons`` as ``to_moebert`` takes them."""
    expert_size, n_shared = settings.sizes(encoder_layouts.width(dense.config))
    frequencies = token_frequencies(settings) if settings.routing == "hash-balance" else None
    fitted = settings.gate_start == "nearest"
    model = to_moebert(
        dense,
        neurons,
        n_experts=settings.n_experts,
        expert_size=expert_size,
        n_shared=n_shared,
        routing=settings.routing,
        seed=settings.seed,
        token_frequencies=frequencies,
        num_experts_per_tok=settings.gate_top_k,
        expert_layer_norm=settings.expert_layer_norm,
        gate_scaling=settings.gate_scaling,
        shared_neurons=settings.shared_neurons,
        padding_in_balance=settings.padding_in_loss,
        router_aux_loss_coef=settings.balance_weight,
        balance_over=settings.balance_over,
        gate_noise=settings.gate_noise,
        gate_capacity=settings.gate_capacity,
        gate_assignment=settings.gate_assignment,
        gate_start="random" if fitted else settings.gate_start,
        allow_identical=True,
    )
    if fitted:
        bundle = dataset(settings)
        fit_gates(model, dense, bundle.batches("train", limit=GATE_EXAMPLES, shuffle=True))
    return model


def conversion(store: AnyStore, settings: Settings) -> dict[str, float]:
    """Metrics right after conversion, before any training; kept in the store."""
    return conversion_entry(store, settings).row


def conversion_entry(store: AnyStore, settings: Settings) -> Entry:
    """The stored evaluation of the converted, untrained model."""
    return store.make(conversion_key(store, settings), partial(_convert, store, settings))


def _convert(store: AnyStore, settings: Settings, folder: Path) -> dict:
    return evaluate_and_save(settings, converted(store, settings), folder)


def distances(store: AnyStore, settings: Settings, model: PreTrainedModel) -> torch.Tensor:
    """Eq. 5's term at each layer, ``(L + 1,)``: a model to its teacher, validation examples."""
    models = (accelerate_if_exact(model), accelerate_if_exact(teacher(store, settings).model))
    return state_distances(*models, _near(settings))


def states(store: AnyStore, settings: Settings) -> dict[str, np.ndarray]:
    """States of teacher, converted and distilled model for the examples of :func:`distances`.

    Returns:
        Of each ``(L + 1, n, D)``: the mean state of each example's tokens, embeddings first; of
        the teacher those layers that the student's are compared with.
    """
    distilled = np.load(student(store, settings).entry.folder / "states.npy")
    models = {
        "teacher": teacher(store, settings).model,
        "converted": converted(store, settings),
    }
    found = {
        name: sentence_states(accelerate_if_exact(model), _near(settings))
        for name, model in models.items()
    }
    compared = teacher_layers(len(distilled) - 1, len(found["teacher"]) - 1)
    found["teacher"] = found["teacher"][compared]
    return found | {"distilled": distilled.astype(np.float32)}


def _near(settings: Settings):
    return dataset(settings).batches("validation", limit=NEAR)


def student_key(store: AnyStore, settings: Settings, *, keep_model: bool = False) -> StageKey:
    """What a trained student depends on, and whether its weights are kept."""
    choices = {"conversion": conversion_key(store, settings), **chosen(settings, TRAINING)}
    return StageKey("student", choices, made_with(store, _distil, keep_model=keep_model))


def student(store: AnyStore, settings: Settings, *, keep_model: bool = False) -> Student:
    """Convert, distil and evaluate; from the store or done now.

    Args:
        store: Where the stages are, or will be.
        settings: The experiment.
        keep_model: Also keep the trained weights (90 MB for MiniLM).
    """
    with_model = store.find(student_key(store, settings, keep_model=True))
    entry = with_model or store.make(
        student_key(store, settings, keep_model=keep_model),
        partial(_distil, store, settings, keep_model),
    )
    checkpoints.clear(checkpoint_folder(entry.folder))
    curve = pd.read_csv(entry.folder / "curve.csv")
    by_layer = pd.read_csv(entry.folder / "distances.csv", index_col="layer")["distance"]
    return Student(entry.row, curve, by_layer, entry, store)


def _distil(store: AnyStore, settings: Settings, keep_model: bool, folder: Path) -> dict:
    dense, bundle = teacher(store, settings), dataset(settings)
    metrics_before = conversion(store, settings)
    model = converted(store, settings)
    points = checkpoint_folder(folder) / POINTS
    set_seed(settings.seed)
    curve = distil(
        model,
        dense.model,
        bundle.train,
        bundle.tokenizer,
        settings,
        folder,
        checkpoints=checkpoint_folder(folder),
        score=partial(_score_point, settings, points) if settings.score_at else None,
    )
    curve.to_csv(folder / "curve.csv", index=False)
    by_layer = pd.Series(distances(store, settings, model), name="distance")
    by_layer.rename_axis("layer").to_csv(folder / "distances.csv")
    sentence = sentence_states(accelerate_if_exact(model), _near(settings))
    np.save(folder / "states.npy", sentence.astype(np.float16))
    if keep_model:
        model.save_pretrained(folder)
        bundle.tokenizer.save_pretrained(folder)
    counts = parameter_counts(model)
    return {
        "task": settings.task,
        "guessing": bundle.guessing(),
        **{f"teacher_{name}": value for name, value in dense.metrics.items()},
        **{f"converted_{name}": value for name, value in metrics_before.items()},
        **evaluate_and_save(settings, model, folder, _read_points(settings, points)),
        "effective_parameters": counts.effective,
        "stored_parameters": counts.stored,
        "steps": len(curve),
        **_evenness(settings, model),
    }


def _evenness(settings: Settings, model: PreTrainedModel) -> dict[str, float]:
    """``busiest`` and ``entropy`` of a gate's loads; empty for a hash, which nothing trains."""
    if settings.student != "experts" or not settings.routing.startswith("gate-"):
        return {}
    batches = dataset(settings).batches("validation", limit=LOAD_EXAMPLES)
    return evenness(expert_loads(model, batches))._asdict()


def missing(store: AnyStore, named: Mapping[str, list[Settings]]) -> list[Settings]:
    """Points whose student is not in committed results; none of a store, which makes them."""
    if store.makes:
        return []
    points = [point for points in named.values() for point in points]
    return [point for point in points if store.find(student_key(store, point)) is None]


def _score_point(settings: Settings, points: Path, epoch: float, model: PreTrainedModel) -> None:
    """Keep a model's logits beside the checkpoints, for a training that is killed and resumes."""
    points.mkdir(parents=True, exist_ok=True)
    np.savez(points / f"{epoch:g}.npz", **logits(settings, model))


def _read_points(settings: Settings, points: Path) -> dict[str, dict[str, np.ndarray]]:
    """Logits by split at each point of ``score_at``, by its name."""
    names = [f"{epoch:g}" for epoch in settings.score_at]
    return {name: dict(np.load(points / f"{name}.npz")) for name in names}


def answers(store: AnyStore, settings: Settings) -> pd.DataFrame:
    """Predictions of teacher, converted and distilled model for each validation example."""
    entries = {
        "teacher": teacher(store, settings).entry,
        "converted": conversion_entry(store, settings),
        "distilled": student(store, settings).entry,
    }
    return pd.DataFrame({name: saved_answers(entry) for name, entry in entries.items()})


def grid(store: AnyStore, points: list[Settings], *, run=student) -> pd.DataFrame:
    """One row for each point: its settings beside its results; runs only what is missing.

    Args:
        store: Where the stages are, or will be.
        points: Experiments; doubles are run once.
        run: :func:`student` or :func:`conversion`.
    """
    rows, n_run = {}, 0
    started = last_line = time.monotonic()
    for index, number in enumerate(_in_turn(store, points), start=1):
        point = points[number]
        result = conversion_entry(store, point) if run is conversion else run(store, point)
        entry = getattr(result, "entry", result)
        n_run += not entry.reused
        if not entry.reused and time.monotonic() - last_line > QUIET:
            last_line = time.monotonic()
            left = (last_line - started) / n_run * (len(points) - index) / 60
            print(
                f"· run {index}/{len(points)} took {entry.seconds:.0f} s, "
                f"at most {left:.1f} min left",
                flush=True,
            )
        rows[number] = {**point.model_dump(), **entry.row}
    n_reused = len(points) - n_run
    print(f"· grid: {len(points)} points, {n_run} run now, {n_reused} reused", flush=True)
    return pd.DataFrame([rows[number] for number in range(len(points))])


def compare(store: AnyStore, named: Mapping[str, list[Settings]], *, run=student) -> pd.DataFrame:
    """:func:`grid` of points that have names; the column ``name`` has the name of each row."""
    names = [name for name, points in named.items() for _ in points]
    points = [point for points in named.values() for point in points]
    return grid(store, points, run=run).assign(name=names)


def _in_turn(store: AnyStore, points: list[Settings]) -> Iterator[int]:
    """Numbers of the points, those of one teacher together, so that it is loaded once.

    What another process is making now is left for later.
    """
    left = sorted(range(len(points)), key=lambda number: _teacher_of(points[number]))
    keys = {number: list(_stages(store, points[number])) for number in left}
    while left:
        free = (number for number in left if not any(map(store.busy, keys[number])))
        yield left.pop(left.index(next(free, left[0])))


def _stages(store: AnyStore, settings: Settings) -> Iterator[StageKey]:
    """Keys of the entries that a student is made of."""
    yield teacher_key(store, settings)
    yield importance_key(store, settings)
    yield conversion_key(store, settings)
    yield student_key(store, settings)


def _teacher_of(settings: Settings) -> tuple:
    """What teachers differ by within a grid."""
    return settings.model, settings.task, settings.dense_seed
