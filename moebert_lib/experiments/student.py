"""The unit experiment: a teacher converted and distilled; each stage made once.

Every stage is an entry of the store, addressed by exactly the settings, data, weights, code
and library versions that it depends on. Ablations therefore share a teacher and its
importance scores, and a grid runs only what is missing.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig, PreTrainedModel, set_seed

from moebert_lib.config.presets import FFN_WIDTHS
from moebert_lib.config.provenance import code_digest
from moebert_lib.config.settings import Settings
from moebert_lib.data import tasks
from moebert_lib.experiments import expert_partitions
from moebert_lib.experiments.dataset import (
    chosen,
    dataset,
    load,
    pretrained,
    token_frequencies,
)
from moebert_lib.experiments.stage_keys import CONVERSION, TRAINING, told
from moebert_lib.experiments.teacher import (
    FORWARD,
    answers,
    importance_key,
    keep_judged,
    place,
    teacher,
    teacher_key,
)
from moebert_lib.method import encoder_layouts
from moebert_lib.model.accelerate import accelerate_if_exact
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.moe_layer import parameter_counts
from moebert_lib.store import committed_results
from moebert_lib.store.store import Entry, StageKey
from moebert_lib.training import checkpoints
from moebert_lib.training.evaluation import sentence_states, state_distances
from moebert_lib.training.trainer import distil

QUIET = 15  # seconds between two lines of a grid's progress
LEARNING = (
    "method.distillation_loss",
    "training.trainer",
    "training.teacher_states",
    "training.checkpoints",
    "training.evaluation",
    "training.evaluation",
    "experiments.student",
    *FORWARD,
)  # code
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
    """

    row: dict
    curve: pd.DataFrame
    distances: pd.Series
    entry: Entry

    def model(self) -> PreTrainedModel:
        """The trained model; only if it was asked for with ``keep_model=True``."""
        return load(self.entry.folder, tasks.TASKS[self.row["task"]])


def conversion_key(settings: Settings) -> StageKey:
    """What the student depends on before it is trained."""
    sizes = settings.sizes(width(settings))
    choices = {
        **told(chosen(settings, CONVERSION)),
        "expert_size": sizes[0],
        "n_shared": sizes[1],
        **expert_partitions.order_key(settings),
        **expert_partitions.grouping_key(settings),
    }
    code = code_digest(
        "method.partition",
        "experiments.expert_partitions",
        "method.routing",
        "model.moe_layer",
        "model.modeling",
        "method.encoder_layouts",
        "model.conversion",
        "experiments.student",
        *FORWARD,
    )
    return StageKey("converted", choices, {"code": code})


def width(settings: Settings) -> int:
    """Neurons of a dense feed-forward layer of the experiment's model; trains nothing."""
    known = FFN_WIDTHS.get(settings.model)
    return known or encoder_layouts.width(AutoConfig.from_pretrained(pretrained(settings)))


def converted(settings: Settings) -> PreTrainedModel:
    """The teacher turned into a MoEBERT as the settings say, untrained; new on every call."""
    return turned(settings, teacher(settings).model, expert_partitions.neurons(settings))


def turned(settings: Settings, dense: PreTrainedModel, neurons: object) -> PreTrainedModel:
    """A dense model converted as the settings say; ``neurons`` as ``to_moebert`` takes them."""
    expert_size, n_shared = settings.sizes(encoder_layouts.width(dense.config))
    frequencies = token_frequencies(settings) if settings.routing == "hash-balance" else None
    return to_moebert(
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
        allow_identical=True,
    )


def conversion(settings: Settings) -> dict[str, float]:
    """Metrics right after conversion, before any training; kept in the store."""
    return _conversion(settings).row


def _conversion(settings: Settings) -> Entry:
    def build(folder: Path) -> dict:
        return keep_judged(settings, converted(settings), folder)

    return committed_results.open_store().make(conversion_key(settings), build)


def distances(settings: Settings, model: PreTrainedModel) -> torch.Tensor:
    """Eq. 5's term at each layer, ``(L + 1,)``: a model to its teacher, validation examples."""
    models = (accelerate_if_exact(model), accelerate_if_exact(teacher(settings).model))
    return state_distances(*models, _near(settings))


def states(settings: Settings) -> dict[str, np.ndarray]:
    """States of teacher, converted and distilled model for the examples of :func:`distances`.

    Returns:
        Of each ``(L + 1, n, D)``: the mean state of each example's tokens, embeddings first.
    """
    return {
        "teacher": sentence_states(accelerate_if_exact(teacher(settings).model), _near(settings)),
        "converted": sentence_states(accelerate_if_exact(converted(settings)), _near(settings)),
        "distilled": np.load(student(settings).entry.folder / "states.npy").astype(np.float32),
    }


def _near(settings: Settings):
    return dataset(settings).batches("validation", limit=NEAR)


def student(settings: Settings, *, keep_model: bool = False) -> Student:
    """Convert, distil and evaluate; from the store or done now.

    Args:
        settings: The experiment.
        keep_model: Also keep the trained weights (90 MB for MiniLM).
    """
    store, key = committed_results.open_store(), student_key(settings, keep_model=keep_model)

    def build(folder: Path) -> dict:
        dense, bundle = teacher(settings), dataset(settings)
        before = conversion(settings)
        model = converted(settings)
        set_seed(settings.seed)
        curve = distil(
            model,
            dense.model,
            bundle.train,
            bundle.tokenizer,
            settings,
            folder,
            checkpoints=place(store, store.folder(key)),
        )
        curve.to_csv(folder / "curve.csv", index=False)
        apart = pd.Series(distances(settings, model), name="distance").rename_axis("layer")
        apart.to_csv(folder / "distances.csv")
        states = sentence_states(accelerate_if_exact(model), _near(settings))
        np.save(folder / "states.npy", states.astype(np.float16))
        if keep_model:
            model.save_pretrained(folder)
            bundle.tokenizer.save_pretrained(folder)
        counts = parameter_counts(model)
        return {
            "task": settings.task,
            "guessing": bundle.guessing(),
            **{f"teacher_{name}": value for name, value in dense.metrics.items()},
            **{f"converted_{name}": value for name, value in before.items()},
            **keep_judged(settings, model, folder),
            "effective_parameters": counts.effective,
            "stored_parameters": counts.stored,
            "steps": len(curve),
        }

    with_model = store.find(student_key(settings, keep_model=True))
    entry = with_model or store.make(key, build)
    checkpoints.clear(place(store, entry.folder))
    curve = pd.read_csv(entry.folder / "curve.csv")
    apart = pd.read_csv(entry.folder / "distances.csv", index_col="layer")["distance"]
    return Student(entry.row, curve, apart, entry)


def said(settings: Settings) -> pd.DataFrame:
    """What teacher, converted and distilled model say to each validation example."""
    entries = {
        "teacher": teacher(settings).entry,
        "converted": _conversion(settings),
        "distilled": student(settings).entry,
    }
    return pd.DataFrame({name: answers(entry) for name, entry in entries.items()})


def student_key(settings: Settings, *, keep_model: bool = False) -> StageKey:
    """What a trained student depends on, and whether its weights are kept."""
    choices = {"conversion": conversion_key(settings), **chosen(settings, TRAINING)}
    origin = {"code": code_digest(*LEARNING), "keep_model": keep_model}
    return StageKey("student", choices, origin)


def grid(points: list[Settings], *, run=student) -> pd.DataFrame:
    """One row for each point: its settings beside its results; runs only what is missing.

    Args:
        points: Experiments; doubles are run once.
        run: :func:`student` or :func:`conversion`.
    """
    rows, done = {}, 0
    started = said = time.monotonic()
    for index, number in enumerate(_in_turn(points), start=1):
        point = points[number]
        result = _conversion(point) if run is conversion else run(point)
        entry = getattr(result, "entry", result)
        done += not entry.reused
        if not entry.reused and time.monotonic() - said > QUIET:
            said = time.monotonic()
            left = (said - started) / done * (len(points) - index) / 60
            print(
                f"· run {index}/{len(points)} took {entry.seconds:.0f} s, "
                f"at most {left:.1f} min left",
                flush=True,
            )
        rows[number] = {**point.model_dump(), **entry.row}
    print(f"· grid: {len(points)} points, {done} run now, {len(points) - done} reused", flush=True)
    return pd.DataFrame([rows[number] for number in range(len(points))])


def compare(named: Mapping[str, list[Settings]], *, run=student) -> pd.DataFrame:
    """:func:`grid` of points that have names; the column ``name`` says whose a row is."""
    names = [name for name, points in named.items() for _ in points]
    points = [point for points in named.values() for point in points]
    return grid(points, run=run).assign(name=names)


def _in_turn(points: list[Settings]) -> Iterator[int]:
    """Numbers of the points, those of one teacher together, so that it is loaded once.

    What another process here is making now is left for later.
    """
    busy = committed_results.open_store().busy
    left = sorted(range(len(points)), key=lambda i: _dense(points[i]))
    parts = {i: list(_parts(points[i])) for i in left}
    while left:
        free = (i for i in left if not any(map(busy, parts[i])))
        yield left.pop(left.index(next(free, left[0])))


def _parts(settings: Settings) -> Iterator[StageKey]:
    """Keys of the entries that a student is made of."""
    yield teacher_key(settings)
    yield importance_key(settings)
    yield conversion_key(settings)
    yield student_key(settings)


def _dense(settings: Settings) -> tuple:
    """What the teacher differs by within a grid."""
    return settings.model, settings.task, settings.dense_seed
