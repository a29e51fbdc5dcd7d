"""What a run will cost, reckoned before anything is loaded: operations, seconds, bytes.

Counted are the matrix products of the encoder; embeddings, pooler and head are left out, and so
are a gate's few. Good to a factor of about three: the speed of a device is not one number.
Nothing here imports torch, so that a plan is there at once.
"""

import functools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moebert_lib.config.paper_numbers import TABLE5
from moebert_lib.config.presets import Shape
from moebert_lib.config.settings import Settings
from moebert_lib.data import loading
from moebert_lib.data.tasks import TASKS
from moebert_lib.experiments.stage_keys import CONVERSION, DATA, IMPORTANCE, TEACHER, TRAINING
from moebert_lib.method.encoder_layouts import parameters, shape
from moebert_lib.runs.plan import Job, asked, describe

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


class Cost(NamedTuple):
    """Of one run: operations, passes of one batch through a model, bytes at its peak."""

    flops: float
    passes: float
    cpu_bytes: float
    gpu_bytes: float


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
        use: sum(1 for path in loading.files(task, data_dir, split) for _ in loading.rows(path))
        for use, split in loading.splits(task).items()
    }
    return counts["train"], sum(counts.values()) - counts["train"]


# What a plan would run, each run once, with what it will cost: text before anything starts.
# Two notebooks that ask for one run share it, as the store does. Left out: untrained conversions,
# removal curves, what excites neurons, and other scores than importance, which train nothing.

#: The settings that each stage depends on; a student's seed is a column of its own.
OWN = {
    "teacher": ("data_dir", "model", *DATA, *TEACHER),
    "importance": IMPORTANCE,
    "student": tuple(name for name in (*CONVERSION, *TRAINING) if name != "seed"),
}
_COST = {
    "teacher": teacher,
    "importance": importance,
    "student": student,
}
#: Settings that a line names in words of its own, or that are its first column.
_IN_WORDS = {
    "task",
    "data_dir",
    "model",
    "max_length",
    "distill_weight",
    "epochs",
    "learning_rate",
    "batch_size",
    "weight_decay",
    "teacher_epochs",
    "teacher_learning_rate",
    "teacher_batch_size",
    "teacher_weight_decay",
    "importance_examples",
}


@dataclass(frozen=True)
class Run:
    """One teacher, one scoring of its neurons, or one student."""

    stage: str
    settings: Settings

    @property
    def cost(self) -> Cost:
        """Its estimate."""
        return _COST[self.stage](self.settings)

    @property
    def seed(self) -> int:
        """The student's seed, else that of its teacher."""
        return self.settings.seed if self.stage == "student" else self.settings.dense_seed

    @property
    def scored(self) -> bool:
        """Whether it needs the teacher's scores: all but a random deal do."""
        return self.stage == "importance" or (
            self.stage == "student" and self.settings.ranking != "random"
        )

    def group(self) -> tuple:
        """What it depends on but seeds: runs of one group are one line."""
        uses = ["teacher", *(["importance"] if self.scored else [])]
        uses += ["student"] if self.stage == "student" else []
        values = [getattr(self.settings, name) for stage in uses for name in OWN[stage]]
        return (self.stage, *values, *(_sizes(self.settings) if self.stage == "student" else ()))

    def key(self) -> tuple:
        """What sets it apart from all other runs."""
        drawn = self.stage == "student" and not self.scored
        split_seed = self.settings.split_seed if drawn else None
        return (*self.group(), self.settings.dense_seed, self.seed, split_seed)


def runs(jobs: Sequence[Job]) -> list[list[Run]]:
    """The runs that each job asks for first, in the order of the jobs; none comes twice."""
    seen: set[tuple] = set()
    found = []
    for job in jobs:
        new = {}
        for run in _asked(job):
            if run.key() not in seen:
                new[run.key()] = run
                seen.add(run.key())
        found.append(list(new.values()))
    return found


def lines(jobs: Sequence[Job], states: Sequence[str]) -> Iterator[str]:
    """The plan as text: each job's state and runs, its total, the sum, and what it rests on.

    Args:
        jobs: From ``batch.plan``.
        states: What to say of each job, such as "to run"; runs of one that is stored are not
            listed and cost nothing.
    """
    totals = []
    for job, state, new in zip(jobs, states, runs(jobs), strict=True):
        yield f"{job.name}{describe(job)}: {state}"
        if state.startswith("stored"):
            continue
        if not new:
            listed = " that is not listed above" if any(asked(job)) else ""
            yield f"    trains nothing{listed}"
            continue
        yield from _table(new)
        totals += new
        yield f"    {_total(new)}"
    if totals:
        yield f"in all  {_total(totals)}"
        yield from _small_print()


def summary(jobs: Sequence[Job]) -> Iterator[str]:
    """What all runs of the jobs together cost, in a line or two; nothing where nothing trains."""
    found = [run for group in runs(jobs) for run in group]
    if found:
        yield f"in all  {_total(found)}"
        yield from _small_print()


def _small_print() -> Iterator[str]:
    cpu, gpu = cpu_flops() / 1e9, GPU_FLOPS / 1e12
    yield (
        f"Estimates, good to a factor of about three. CPU: this machine, {cpu:.0f} GFLOP/s, "
        f"a matrix product timed just now, times {CPU_EFFICIENCY:g}. GPU: assumed to "
        f"sustain {gpu:.0f} TFLOP/s in bf16, and {1000 * GPU_PASS:.0f} ms at least "
        "for a pass."
    )
    yield (
        "Memory: weights, gradients, Adam's moments and activations at the peak, beside about "
        "1 GB for Python and data."
    )
    yield "What runs/ holds of these is reused; a plan does not look there for single runs."


def _asked(job: Job) -> Iterator[Run]:
    scored, students = asked(job)
    for settings in scored:
        yield from (Run("teacher", settings), Run("importance", settings))
    for settings in students:
        yield Run("teacher", settings)
        if settings.ranking != "random":
            yield Run("importance", settings)
        yield Run("student", settings)


def _table(found: Sequence[Run]) -> Iterator[str]:
    """One line for each group, in columns."""
    groups = defaultdict(list)
    for run in found:
        groups[run.group()].append(run)
    rows = [_row(group) for group in groups.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield f"    {'  '.join(cells)}".rstrip()


def _row(group: Sequence[Run]) -> tuple[str, ...]:
    first = group[0]
    costs = [run.cost for run in group]
    return (
        first.settings.task,
        first.stage,
        _changes(first),
        _seeds([run.seed for run in group]),
        _words(first),
        *_price(costs),
    )


def _changes(run: Run) -> str:
    """What differs from the scale's default for this task and model."""
    mine = run.settings
    usual = Settings.at(mine.scale, task=mine.task, model=mine.model)
    uses = ["importance"] if run.scored else []
    names = [
        n for stage in dict.fromkeys([*uses, run.stage]) for n in OWN[stage] if n not in _IN_WORDS
    ]
    changed = {
        name: getattr(mine, name) for name in names if getattr(mine, name) != getattr(usual, name)
    }
    if run.stage == "student":
        both = zip(("expert_size", "n_shared"), _sizes(mine), _sizes(usual), strict=True)
        changed |= {name: size for name, size, known in both if size != known}
    return " ".join(f"{name}={value}" for name, value in changed.items()) or "default"


def _words(run: Run) -> str:
    """The settings that a reader compares with Table 7."""
    s = run.settings
    model = s.model.rpartition("/")[2]
    train, validation = examples(s)
    if run.stage == "importance":
        available = validation if s.importance_split == "validation" else train
        n = min(available, s.importance_examples or available)
        return f"{model}, {n:,} examples, {s.max_length} tokens"
    prefix = "teacher_" if run.stage == "teacher" else ""
    names = ("learning_rate", "batch_size", "epochs", "weight_decay")
    rate, batch, epochs, decay = (getattr(s, prefix + name) for name in names)
    weight = "" if run.stage == "teacher" else f", lambda {s.distill_weight:g}"
    return (
        f"{model}, {train:,} examples, lr {rate:g}, batch {batch}, epochs {epochs:g}, "
        f"{s.max_length} tokens, decay {decay:g}{weight}"
    )


def _sizes(settings: Settings) -> tuple[int, int]:
    return settings.sizes(shape(settings.model).neurons)


def _seeds(seeds: Sequence[int]) -> str:
    """``seed 0``, ``seeds 0-2`` or ``seeds 0, 4``."""
    low, high = min(seeds), max(seeds)
    if low == high:
        return f"seed {low}"
    joined = sorted(set(seeds)) == list(range(low, high + 1))
    return f"seeds {low}-{high}" if joined else f"seeds {', '.join(map(str, sorted(set(seeds))))}"


def _total(found: Sequence[Run]) -> str:
    names = {"teacher": "teachers", "importance": "scorings", "student": "students"}
    counts = [
        f"{n} {names[stage]}".removesuffix("s" if n == 1 else "")
        for stage in OWN
        if (n := sum(run.stage == stage for run in found))
    ]
    return f"{', '.join(counts)}: {', '.join(_price([run.cost for run in found]))}"


def _price(costs: Sequence[Cost]) -> tuple[str, str]:
    cpu = sum(map(cpu_seconds, costs)), max(cost.cpu_bytes for cost in costs)
    gpu = sum(map(gpu_seconds, costs)), max(cost.gpu_bytes for cost in costs)
    return (
        f"CPU {_time(cpu[0])}, {cpu[1] / 1e9:.1f} GB",
        f"GPU {_time(gpu[0])}, {gpu[1] / 1e9:.1f} GB",
    )


def _time(seconds: float) -> str:
    """In two digits, or whole.

    Example:
        >>> _time(7.26), _time(3600), _time(1e7)
        ('7.3 s', '60 min', '116 days')
    """
    units = (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48), ("days", 86_400, math.inf))
    unit, size = next((unit, size) for unit, size, most in units if seconds < most * size)
    value = seconds / size
    return f"{value:.2g} {unit}" if value < 10 else f"{value:,.0f} {unit}"
