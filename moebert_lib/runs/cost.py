"""The runs that a plan makes, each once, and what they take: time and memory.

Time is that of like runs which are stored, or else operations over the speed of this machine.
Counted are the matrix products of the encoder; embeddings, pooler and head are left out. Good to
a factor of about three. Nothing here imports torch, so that a plan is there at once.
"""

import functools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from moebert_lib.config.presets import Shape
from moebert_lib.config.settings import Settings
from moebert_lib.data import loading
from moebert_lib.data.tasks import TASKS
from moebert_lib.experiments.stage_keys import (
    CONVERSION,
    DATA,
    IMPORTANCE,
    TEACHER,
    TRAINING,
    without_later,
)
from moebert_lib.method.encoder_layouts import parameters, shape
from moebert_lib.runs.plan import Job, asked, describe
from moebert_lib.store.store import Store


class Size(NamedTuple):
    """Of a task: examples to train on, to validate on, and tokens of a mean example."""

    train: int
    validation: int
    tokens: int


#: GLUE as on the hub (``nyu-mll/glue``); MNLI validates on both of its sets. Tokens are counted
#: with BERT's uncased vocabulary for CoLA, SST-2, MRPC, RTE and the built-in tasks, and assumed
#: for the others; of a window where answers are spans.
SIZES = {
    "cola": Size(8_551, 1_043, 11),
    "sst2": Size(67_349, 872, 13),
    "mrpc": Size(3_668, 408, 53),
    "stsb": Size(5_749, 1_500, 30),
    "qqp": Size(363_846, 40_430, 30),
    "mnli": Size(392_702, 19_647, 40),
    "qnli": Size(104_743, 5_463, 50),
    "rte": Size(2_490, 277, 70),
    "squad": Size(87_599, 10_570, 170),
    "squad_v2": Size(130_319, 11_873, 170),
    "library": Size(17_790, 4_188, 19),
    "acceptability": Size(33_982, 7_840, 17),
    "follows": Size(5_414, 1_208, 33),
    "passage": Size(3_866, 904, 51),
}
LONGEST = 5  # times the mean: the longest example of a batch, which decides its memory

CPU_EFFICIENCY = 0.4  # of a large matrix product's speed, in training; measured on two cores
GPU_FLOPS = 40e12  # assumed: what a GPU of a data centre sustains in bf16 on large batches
SCORING_BATCH = 32  # examples at once when neurons are scored
FP32 = 4  # bytes
ADAM = 4 * FP32  # bytes a trained parameter: weight, gradient, two moments

STAGES = ("teacher", "importance", "converted", "student")
NOUNS = {"teacher": "teacher", "importance": "scoring", "converted": "conversion"}


class Cost(NamedTuple):
    """Of one run: operations, and bytes of memory at its peak on a CPU and on a GPU."""

    flops: float
    cpu_bytes: float
    gpu_bytes: float


@dataclass(frozen=True)
class Run:
    """One teacher, scoring of its neurons, untrained conversion, or student."""

    stage: str
    settings: Settings

    @property
    def converts(self) -> bool:
        """Whether it is no longer the teacher."""
        return self.stage in ("converted", "student")

    @property
    def has_experts(self) -> bool:
        """Whether it is a MoEBERT, and not a teacher of half the depth."""
        return self.converts and self.settings.student == "experts"

    @property
    def scored(self) -> bool:
        """Whether it needs the teacher's scores: all but a random ranking do."""
        return self.stage == "importance" or (
            self.has_experts and self.settings.ranking != "random"
        )

    @functools.cached_property
    def choices(self) -> dict[str, Any]:
        """The settings that decide it, without seeds and without where data lies."""
        names = ["model", *DATA, *TEACHER, *(IMPORTANCE if self.scored else ())]
        names += [*CONVERSION, "grouping"] if self.has_experts else ["student"] * self.converts
        names += TRAINING if self.stage == "student" else ()
        values = {name: getattr(self.settings, name) for name in names if name != "seed"}
        return without_later(values | (sizes(self.settings) if self.has_experts else {}))

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Seeds of the teacher, of the conversion, and of what is drawn to build experts."""
        settings = self.settings
        drawn = settings.ranking == "random" or settings.grouping.startswith("kmeans")
        if not self.converts:
            return settings.dense_seed, None, None
        drawn = drawn and self.has_experts
        return settings.dense_seed, settings.seed, settings.split_seed if drawn else None

    def key(self) -> tuple:
        """What sets it apart from all other runs."""
        return (self.stage, self.settings.data_dir, *self.choices.items(), self.seeds)

    @functools.cached_property
    def cost(self) -> Cost:
        """Its estimate."""
        return estimate(self)


def sizes(settings: Settings) -> dict[str, int]:
    """The sizes of experts in neurons."""
    both = settings.sizes(shape(settings.model).neurons)
    return dict(zip(("expert_size", "n_shared"), both, strict=True))


# Operations and bytes.


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
    train, validation = SIZES[settings.task][:2]
    if settings.data_dir:
        counts = loading.check_files(TASKS[settings.task], settings.data_dir)
        train = counts.pop("train")
        validation = sum(counts.values())
    second_test = min(settings.second_test, train)
    train -= second_test
    train = min(train, settings.max_train_examples or train)
    validation = min(validation, settings.max_eval_examples or validation) + second_test
    held_out = round(settings.held_out * train)
    return train - held_out, held_out if settings.evaluate_on == "held-out" else validation


def estimate(run: Run) -> Cost:
    """Operations and memory of a run.

    A training step passes forward once and backward twice. A teacher is evaluated at its end; a
    student also before, and its teacher answers every step unless ``distill`` is none. Scoring
    passes backward to the activations only.
    """
    settings = run.settings
    of, tokens = shape(settings.model), min(SIZES[settings.task].tokens, settings.max_length)
    train, validation = examples(settings)
    dense = forward_flops(of, tokens, of.neurons)
    batch, met = SCORING_BATCH, of.neurons
    trained, fixed = 0, parameters(of)[1]
    if run.has_experts:
        size = sizes(settings)["expert_size"]
        met = size * settings.gate_top_k
        moe = forward_flops(of, tokens, met)
        experts = parameters(of, n_experts=settings.n_experts, expert_size=size)[1]
    elif run.converts:
        half = of._replace(layers=(of.layers + 1) // 2)
        moe, experts = forward_flops(half, tokens, met), parameters(half)[1]
    if run.stage == "teacher":
        batch, trained, fixed = settings.teacher_batch_size, fixed, 0
        flops = dense * (3 * train * settings.teacher_epochs + validation)
    elif run.stage == "importance":
        flops = 2 * dense * scored_examples(settings)
    elif run.stage == "converted":
        flops, fixed = moe * validation, fixed + experts
    else:
        batch, trained = settings.batch_size, experts
        step = 3 * moe + (settings.distill != "none") * dense
        flops = train * settings.epochs * step + 2 * moe * validation
    longest = min(LONGEST * tokens, settings.max_length)
    kept = [activation_bytes(of, batch, longest, met, bf16=bf16) for bf16 in (False, True)]
    weights = ADAM * trained + FP32 * fixed
    return Cost(flops, weights + kept[0], weights + kept[1])


def scored_examples(settings: Settings) -> int:
    """Examples that neurons are scored on."""
    available, validation = examples(settings)
    if settings.importance_split == "held-out":
        available = round(settings.held_out / (1 - settings.held_out) * available)
    if settings.importance_split == "validation":  # the first validation set, of MNLI the matched
        available = validation // (1 + len(TASKS[settings.task].also))
    return min(available, settings.importance_examples or available)


# Seconds.


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


def seconds(run: Run, stored: dict[tuple, float]) -> float:
    """Of like runs that are stored, or by its operations on this machine's processor."""
    known = stored.get((run.stage, *sorted(run.choices.items())))
    return run.cost.flops / cpu_flops() if known is None else known


def stored_seconds() -> dict[tuple, float]:
    """Median seconds of the stored runs, by what they depend on but seeds."""
    found = defaultdict(list)
    for entry in Store().entries():
        if entry.kind in STAGES:
            flat = entry.key.flat(origin=False)
            values = {_setting(name): value for name, value in flat.items()}
            choices = {name: values[name] for name in values.keys() & Settings.model_fields.keys()}
            plain = sorted(
                (name, tuple(value) if isinstance(value, list) else value)
                for name, value in choices.items()
                if "seed" not in name
            )
            found[(entry.kind, *plain)].append(entry.seconds)
    return {choices: median(several) for choices, several in found.items()}


def _setting(dotted_name: str) -> str:
    """The setting that stands in a stage's key: ``teacher.task`` is ``task``."""
    name = dotted_name.rpartition(".")[2]
    return "grouping" if name == "how" else name


# The plan as text.


def runs(jobs: Sequence[Job]) -> list[list[Run]]:
    """The runs that each job asks for first, in the order of the jobs; none comes twice.

    Left out is what trains and evaluates nothing of its own: other scores, removal curves, what
    excites neurons. A student's conversion is part of it.
    """
    seen: set[tuple] = set()
    found = []
    for job in jobs:
        new = {}
        for run in _stages(job):
            if run.key() not in seen:
                new[run.key()] = run
                seen.add(run.key())
        found.append(list(new.values()))
    return found


def _stages(job: Job) -> Iterator[Run]:
    """The runs of a job's experiments, what they need first; conversions of students last.

    So the conversion of a student is listed only where no student makes it.
    """
    for stage, settings in asked(job):
        yield Run("teacher", settings)
        if Run(stage, settings).scored:
            yield Run("importance", settings)
        if stage != "importance":
            yield Run(stage, settings)


def lines(jobs: Sequence[Job], states: Sequence[str]) -> Iterator[str]:
    """The plan as text: each job's state and runs, its total, the sum, and what it rests on.

    Args:
        jobs: From ``plan.plan``.
        states: What to say of each job, such as "to run"; runs of one that is stored are not
            listed and cost nothing.
    """
    totals, stored = [], stored_seconds()
    for job, state, new in zip(jobs, states, runs(jobs), strict=True):
        yield f"{job.name}{describe(job)}: {state}"
        if state.startswith("stored"):
            continue
        if not new:
            listed = " that is not listed above" if asked(job) else ""
            yield f"    trains nothing{listed}"
            continue
        yield from _table(new, stored)
        totals += new
        yield f"    {_total(new, stored)}"
    if totals:
        yield f"in all  {_total(totals, stored)}"
        yield from _basis(totals)


def summary(jobs: Sequence[Job]) -> Iterator[str]:
    """What all runs of the jobs together cost, in a line or two; nothing where nothing trains."""
    found = [run for group in runs(jobs) for run in group]
    if found:
        yield f"in all  {_total(found, stored_seconds())}"
        yield from _basis(found)


def _basis(found: Sequence[Run]) -> Iterator[str]:
    flops, memory = sum(run.cost.flops for run in found), max(run.cost.gpu_bytes for run in found)
    yield (
        f"On a GPU that sustains {GPU_FLOPS / 1e12:.0f} TFLOP/s: {_time(flops / GPU_FLOPS)} at "
        f"best, {memory / 1e9:.1f} GB."
    )
    yield (
        "Time: of like runs that are stored, else operations at "
        f"{cpu_flops() / 1e9:.0f} GFLOP/s, a matrix product timed just now, times "
        f"{CPU_EFFICIENCY:g}; good to a factor of about three. Memory: weights, gradients, Adam's "
        "moments and activations at the peak, beside about 1 GB for Python and data."
    )
    yield "What runs/ holds of these is reused; a plan does not look there for single runs."


def _table(found: Sequence[Run], stored: dict) -> Iterator[str]:
    """A line for runs that differ in seeds alone, and one for all conversions of a task."""
    groups = defaultdict(list)
    for run in found:
        choices = () if run.stage == "converted" else run.choices.items()
        groups[(run.settings.task, run.settings.data_dir, run.stage, *choices)].append(run)
    rows = [_row(group, stored) for group in groups.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield f"    {'  '.join(cells)}".rstrip()


def _row(group: Sequence[Run], stored: dict) -> tuple[str, ...]:
    first = group[0]
    alike = all(run.choices == first.choices for run in group)
    changed = _changes(first) if alike else f"{len(group)} untrained, each of its own settings"
    seeds = sorted({run.seeds[first.converts] for run in group})
    return (
        first.settings.task,
        first.stage,
        changed,
        _seeds(seeds),
        _recipe(first),
        _price(group, stored),
    )


#: Settings that :func:`_recipe` names.
_NAMED = "task model max_length importance_examples distill_weight".split()
_TRAINED = "learning_rate batch_size epochs weight_decay".split()
_NAMED += [prefix + name for prefix in ("", "teacher_") for name in _TRAINED]


def _changes(run: Run) -> str:
    """What differs from the scale's default for this task and model."""
    settings = run.settings
    usual = Run(run.stage, Settings.at(settings.scale, task=settings.task, model=settings.model))
    before = {"importance": "teacher", "student": "teacher"}.get(run.stage)
    earlier = Run(before, settings).choices if before else {}
    changed = [
        f"{name}={value}"
        for name, value in run.choices.items()
        if name not in (*_NAMED, *earlier) and value != usual.choices.get(name)
    ]
    return " ".join(changed) or "default"


def _recipe(run: Run) -> str:
    """The settings that a reader compares with Table 7."""
    settings = run.settings
    train, validation = examples(settings)
    numbers = {"importance": scored_examples(settings), "converted": validation}
    words = [settings.model.rpartition("/")[2], f"{numbers.get(run.stage, train):,} examples"]
    words.append(f"{settings.max_length} tokens")
    if run.stage in ("teacher", "student"):
        prefix = "teacher_" if run.stage == "teacher" else ""
        rate, batch, epochs, decay = (getattr(settings, prefix + name) for name in _TRAINED)
        words += [f"lr {rate:g}", f"batch {batch}", f"epochs {epochs:g}", f"decay {decay:g}"]
    if run.stage == "student":
        words.append(f"lambda {settings.distill_weight:g}")
    return ", ".join(words)


def _seeds(seeds: Sequence[int]) -> str:
    """``seed 0``, ``seeds 0-2`` or ``seeds 0, 4``."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    joined = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"seeds {seeds[0]}-{seeds[-1]}" if joined else f"seeds {', '.join(map(str, seeds))}"


def _total(found: Sequence[Run], stored: dict) -> str:
    counts = [
        f"{n} {NOUNS.get(stage, stage)}{'s' if n > 1 else ''}"
        for stage in STAGES
        if (n := sum(run.stage == stage for run in found))
    ]
    return f"{', '.join(counts)}: {_price(found, stored)}"


def _price(found: Sequence[Run], stored: dict) -> str:
    memory = max(run.cost.cpu_bytes for run in found)
    return f"CPU {_time(sum(seconds(run, stored) for run in found))}, {memory / 1e9:.1f} GB"


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
