"""What a run will cost, reckoned before anything is loaded: operations, seconds, bytes.

Counted are the matrix products of the encoder; embeddings, pooler and head are left out, and so
are a gate's few. Good to a factor of about three: the speed of a device is not one number.
Nothing here imports torch, so that a plan is there at once.
"""

import functools
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

from moebert_lib import files
from moebert_lib.adapters import family
from moebert_lib.paper import TABLE5
from moebert_lib.scales import BASE, LARGE, MINILM, TINY
from moebert_lib.settings import Settings
from moebert_lib.tasks import TASKS

#: Examples to train on and to validate on. GLUE as on the hub now (``nyu-mll/glue``); Table 6
#: rounds them, and has QNLI's first release. MNLI validates on both of its sets. Built-in
#: tasks: from the pinned libraries.
SIZES = {
    "cola": (8_551, 1_043),
    "sst2": (67_349, 872),
    "mrpc": (3_668, 408),
    "stsb": (5_749, 1_500),
    "qqp": (363_846, 40_430),
    "mnli": (392_702, 19_647),
    "qnli": (104_743, 5_463),
    "rte": (2_490, 277),
    **TABLE5,
    "library": (17_790, 4_188),
    "acceptability": (33_982, 7_840),
    "follows": (5_414, 1_208),
    "passage": (3_866, 904),
}

#: Tokens of a mean example, a window where answers are spans. Counted with BERT's uncased
#: vocabulary for CoLA, SST-2, MRPC, RTE and the built-in tasks, assumed for the others.
MEAN_TOKENS = {
    "cola": 11,
    "sst2": 13,
    "mrpc": 53,
    "stsb": 30,
    "qqp": 30,
    "mnli": 40,
    "qnli": 50,
    "rte": 70,
    "squad": 170,
    "squad_v2": 170,
    "library": 19,
    "acceptability": 17,
    "follows": 33,
    "passage": 51,
}
LONGEST = 5  # times the mean: the longest example of a batch, which decides its memory

CPU_EFFICIENCY = 0.4  # training over a large matrix product; measured with MiniLM on two cores
GPU_FLOPS = 40e12  # assumed: what a GPU of a data centre sustains in bf16 on large batches
GPU_PASS = 0.02  # assumed: seconds to launch the kernels of one pass, however small the batch
RUN_SECONDS = 2.0  # loading, converting and saving of one run
SCORING_BATCH = 32  # examples at once when neurons are scored
FP32 = 4  # bytes
ADAM = 4 * FP32  # bytes a trained parameter: weight, gradient, two moments


class Shape(NamedTuple):
    """Sizes of a BERT: ``L``, ``D``, ``F``, attention heads, and two tables of embeddings."""

    layers: int
    hidden: int
    neurons: int
    heads: int
    vocabulary: int = 30_522
    positions: int = 512


SHAPES = {
    TINY: Shape(2, 32, 64, 4),
    MINILM: Shape(6, 384, 1536, 12),
    BASE: Shape(12, 768, 3072, 12),
    LARGE: Shape(24, 1024, 4096, 16),
}


class Cost(NamedTuple):
    """Of one run: operations, passes of one batch through a model, bytes at its peak."""

    flops: float
    passes: float
    cpu_bytes: float
    gpu_bytes: float


def shape(model: str) -> Shape:
    """Sizes of a model the scales name, or of a saved encoder; BERT-base's for any other name."""
    names = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    try:
        config = json.loads((Path(model).expanduser() / "config.json").read_text("utf-8"))
        row = family(config["model_type"])
        return Shape(*(config[row.key(name)] for name in names))
    except (OSError, ValueError, KeyError, TypeError):  # no folder, or no such model
        return SHAPES.get(model, SHAPES[BASE])


def forward_flops(of: Shape, tokens: int, neurons: int) -> int:
    """Operations to pass one sequence of ``tokens`` through the encoder.

    A layer multiplies and adds ``4 D^2`` times a token for the projections of attention,
    ``2 T D`` for its scores and their use, and ``2 D`` for each neuron a token meets.

    Args:
        of: The model's sizes.
        tokens: ``T``.
        neurons: ``F`` if dense, ``K`` for each expert that a token visits.
    """
    products = 4 * of.hidden**2 + 2 * tokens * of.hidden + 2 * of.hidden * neurons
    return 2 * tokens * of.layers * products


def parameters(of: Shape, *, n_experts: int = 0, expert_size: int = 0) -> tuple[int, int]:
    """Parameters that a token uses, and those stored, without a head.

    Args:
        of: The model's sizes.
        n_experts: 0 for a dense model.
        expert_size: Neurons of an expert, whose LayerNorm is its own.
    """
    D, n = of.hidden, expert_size if n_experts else of.neurons
    rest = (of.vocabulary + of.positions + 2) * D + 2 * D + D * D + D  # embeddings, pooler
    rest += of.layers * (4 * (D * D + D) + 2 * D)  # attention
    expert = 2 * D * n + n + D + 2 * D  # with LayerNorm
    return rest + of.layers * expert, rest + of.layers * expert * max(n_experts, 1)


def activation_bytes(of: Shape, batch: int, tokens: int, neurons: int, *, bf16: bool) -> int:
    """What a training step keeps for its backward pass.

    ``B T L (18 D + 4 n + 5 heads T)`` bytes in bf16, twice that in fp32: the usual count for a
    transformer, 34 D where ``n`` is ``4 D``. With weights and moments it came within 15% of
    what a training step of BERT-base took in fp32.
    """
    each = 18 * of.hidden + 4 * neurons + 5 * of.heads * tokens
    return batch * tokens * of.layers * each * (1 if bf16 else 2)


def examples(settings: Settings) -> tuple[int, int]:
    """Examples to train on and to validate on: counted in its files, or known; then capped."""
    if settings.data_dir:
        found = _counted(settings.task, settings.data_dir)
    else:
        found = SIZES[settings.task]
    caps = (settings.max_train_examples, settings.max_eval_examples)
    train, validation = (
        n if cap is None else min(n, cap) for n, cap in zip(found, caps, strict=True)
    )
    return train, validation


def teacher(settings: Settings) -> Cost:
    """Fine-tune the dense model, and evaluate it."""
    train, validation = examples(settings)
    of, batch = shape(settings.model), settings.teacher_batch_size
    once = forward_flops(of, _tokens(settings), of.neurons)
    seen = train * settings.teacher_epochs
    passes = 3 * math.ceil(seen / batch) + math.ceil(validation / settings.eval_batch_size)
    memory = _memory(settings, batch, of.neurons, ADAM * parameters(of)[1])
    return Cost(once * (3 * seen + validation), passes, *memory)


def importance(settings: Settings) -> Cost:
    """Score the teacher's neurons: forward, and backward to the activations only."""
    of = shape(settings.model)
    available = examples(settings)[0]
    if settings.importance_split == "validation":  # the first validation set, of MNLI the matched
        available = examples(settings)[1] // (1 + len(TASKS[settings.task].also))
    n = min(available, settings.importance_examples or available)
    once = forward_flops(of, _tokens(settings), of.neurons)
    memory = _memory(settings, SCORING_BATCH, of.neurons, FP32 * parameters(of)[1])
    return Cost(2 * once * n, 2 * math.ceil(n / SCORING_BATCH), *memory)


def student(settings: Settings) -> Cost:
    """Convert, evaluate, distil, evaluate; the teacher goes along unless ``distill`` is none."""
    train, validation = examples(settings)
    of = shape(settings.model)
    size, _ = settings.sizes(of.neurons)
    met = size * settings.gate_top_k
    dense, moe = (forward_flops(of, _tokens(settings), n) for n in (of.neurons, met))
    follows = settings.distill != "none"
    seen = train * settings.epochs
    flops = seen * (3 * moe + follows * dense) + 2 * validation * moe
    passes = (3 + follows) * math.ceil(seen / settings.batch_size)
    passes += 2 * math.ceil(validation / settings.eval_batch_size)
    stored = parameters(of, n_experts=settings.n_experts, expert_size=size)[1]
    weights = ADAM * stored + FP32 * parameters(of)[1]
    return Cost(flops, passes, *_memory(settings, settings.batch_size, met, weights))


@functools.cache
def cpu_flops() -> float:
    """Operations a second that training reaches here: a matrix product, times what is left of it.

    The best of a quarter of a second of products of 512 by 512 numbers.
    """
    import numpy as np

    matrix = np.ones((512, 512), np.float32)
    started, best = time.perf_counter(), math.inf
    while time.perf_counter() - started < 0.25:
        before = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - before)
    return CPU_EFFICIENCY * 2 * 512**3 / best


def cpu_seconds(cost: Cost) -> float:
    """On this machine's processor."""
    return RUN_SECONDS + cost.flops / cpu_flops()


def gpu_seconds(cost: Cost) -> float:
    """On a GPU of :data:`GPU_FLOPS`, which small batches do not fill."""
    return RUN_SECONDS + max(cost.flops / GPU_FLOPS, cost.passes * GPU_PASS)


def _tokens(settings: Settings) -> int:
    return min(MEAN_TOKENS[settings.task], settings.max_length)


def _memory(settings: Settings, batch: int, neurons: int, weights: int) -> tuple[int, int]:
    """Peak bytes on a CPU, in fp32, and on a GPU, whose activations are bf16."""
    of, longest = shape(settings.model), min(LONGEST * _tokens(settings), settings.max_length)
    kept = [activation_bytes(of, batch, longest, neurons, bf16=bf16) for bf16 in (False, True)]
    return weights + kept[0], weights + kept[1]


@functools.cache
def _counted(name: str, data_dir: str) -> tuple[int, int]:
    """Examples in a task's files, to train on and, over all its sets, to validate on."""
    task = TASKS[name]
    counts = {
        use: sum(1 for path in files.files(task, data_dir, split) for _ in files.rows(path))
        for use, split in files.splits(task).items()
    }
    return counts["train"], sum(counts.values()) - counts["train"]
