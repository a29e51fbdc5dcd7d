"""The runs that a plan makes, each once, and what they take: time and memory.

Time is that of like runs which are stored, or else operations over the speed of this machine.
Counted are the matrix products of the encoder; embeddings, pooler and head are left out. Good to
a factor of about three. Nothing here imports torch, so that a plan is there at once.
"""

import functools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
    chosen,
)
from moebert_lib.method.encoder_layouts import parameters, shape
from moebert_lib.runs.plan import Job, asked, describe, text_of
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
NOUNS = {"importance": "scoring", "converted": "conversion"}


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
        """Whether it is made from the teacher: a MoEBERT, or a model of half the depth."""
        return self.stage in ("converted", "student")

    @property
    def has_experts(self) -> bool:
        """Whether it is a MoEBERT."""
        return self.converts and self.settings.student == "experts"

    @property
    def scored(self) -> bool:
        """Whether it needs the teacher's scores: all experts but those of a random ranking do."""
        ranked = self.has_experts and self.settings.ranking != "random"
        return ranked or self.stage == "importance"

    @functools.cached_property
    def choices(self) -> dict[str, Any]:
        """The settings that decide it, seeds too; sizes of experts in neurons."""
        settings, sizes = self.settings, {}
        names = ["model", "data_dir", *DATA, *TEACHER, "dense_seed"]
        names += IMPORTANCE if self.scored else ()
        if self.converts:
            names += ["student", "seed"]
        if self.has_experts:
            names += [*CONVERSION, "grouping"]
            both = settings.sizes(shape(settings.model).neurons)
            sizes = dict(zip(("expert_size", "n_shared"), both, strict=True))
            if settings.ranking == "random" or settings.grouping.startswith("kmeans"):
                names.append("split_seed")
        names += TRAINING if self.stage == "student" else ()
        return chosen(settings, names) | sizes

    @property
    def key(self) -> tuple:
        """What sets it apart from all other runs."""
        return (self.stage, *self.choices.items())

    @property
    def like(self) -> tuple:
        """Its stage and the settings that its time depends on: the same for every seed."""
        return _like(self.stage, self.choices)

    @functools.cached_property
    def cost(self) -> Cost:
        """Its estimate: operations and memory.

        A training step passes forward once and backward twice. A teacher is evaluated at its end;
        a student also before, and its teacher answers every step unless ``distill`` is none.
        Scoring passes backward to the activations only.
        """
        settings, sizes = self.settings, shape(self.settings.model)
        tokens = min(SIZES[settings.task].tokens, settings.max_length)
        n_train, n_validation = examples(settings)
        dense, dense_stored = forward_flops(sizes, tokens, sizes.neurons), parameters(sizes)[1]
        batch, neurons, trained, fixed = SCORING_BATCH, sizes.neurons, 0, dense_stored
        if self.has_experts:
            expert_size = self.choices["expert_size"]
            neurons = expert_size * settings.gate_top_k
            converted = forward_flops(sizes, tokens, neurons)
            experts = {"n_experts": settings.n_experts, "expert_size": expert_size}
            converted_stored = parameters(sizes, **experts)[1]
        elif self.converts:
            half = sizes._replace(layers=(sizes.layers + 1) // 2)
            converted, converted_stored = forward_flops(half, tokens, neurons), parameters(half)[1]
        if self.stage == "teacher":
            flops = dense * (3 * n_train * settings.teacher_epochs + n_validation)
            batch, trained, fixed = settings.teacher_batch_size, dense_stored, 0
        elif self.stage == "importance":
            flops = 2 * dense * scored_examples(settings)
        elif self.stage == "converted":
            flops, fixed = converted * n_validation, dense_stored + converted_stored
        else:
            step = 3 * converted + (settings.distill != "none") * dense
            flops = n_train * settings.epochs * step + 2 * converted * n_validation
            batch, trained = settings.batch_size, converted_stored
        longest = min(LONGEST * tokens, settings.max_length)
        weights = ADAM * trained + FP32 * fixed
        cpu, gpu = (
            weights + activation_bytes(sizes, batch, longest, neurons, bf16=bf16)
            for bf16 in (False, True)
        )
        return Cost(flops, cpu, gpu)


def runs(jobs: Sequence[Job]) -> list[list[Run]]:
    """The runs that each job asks for first, in the order of the jobs; none comes twice.

    A run is listed after the runs that it needs. A student includes its conversion; a conversion is
    listed where a notebook asks for it alone. Scores other than Eq. 4, removal curves and
    activations of neurons are left out.
    """
    seen: set[tuple] = set()
    lists = []
    for job in jobs:
        new = {}
        for stage, settings in asked(job):
            scored = Run(stage, settings).scored
            stages = ["teacher", "importance", stage] if scored else ["teacher", stage]
            for run in (Run(name, settings) for name in dict.fromkeys(stages)):
                if run.key not in seen:
                    new[run.key] = run
        seen |= new.keys()
        lists.append(list(new.values()))
    return lists


# Operations, bytes and examples.


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
    n_train, n_validation = SIZES[settings.task][:2]
    if settings.data_dir:
        counts = loading.check_files(TASKS[settings.task], settings.data_dir)
        n_train = counts.pop("train")
        n_validation = sum(counts.values())
    n_second_test = min(settings.second_test, n_train)
    n_train -= n_second_test
    n_train = min(n_train, settings.max_train_examples or n_train)
    n_validation = min(n_validation, settings.max_eval_examples or n_validation) + n_second_test
    n_held_out = round(settings.held_out * n_train)
    on_held_out = settings.evaluate_on == "held-out"
    return n_train - n_held_out, n_held_out if on_held_out else n_validation


def scored_examples(settings: Settings) -> int:
    """Examples that neurons are scored on."""
    available, n_validation = examples(settings)
    if settings.importance_split == "held-out":
        available = round(settings.held_out / (1 - settings.held_out) * available)
    if settings.importance_split == "validation":  # the first validation set, of MNLI the matched
        available = n_validation // (1 + len(TASKS[settings.task].also))
    return min(available, settings.importance_examples or available)


# Seconds.


@functools.cache
def cpu_flops() -> float:
    """Operations a second in training on this machine: those of a matrix product, times 0.4.

    Timed is the fastest of the products of 512 by 512 numbers that fit into a quarter of a second.
    """
    import numpy as np

    matrix = np.ones((512, 512), np.float32)
    started, best = time.perf_counter(), math.inf
    while time.perf_counter() - started < 0.25:
        before = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - before)
    return CPU_EFFICIENCY * 2 * 512**3 / best


def seconds(run: Run, stored: Mapping[tuple, float]) -> float:
    """Seconds of similar stored runs, else by its operations on this machine's processor."""
    return stored[run.like] if run.like in stored else run.cost.flops / cpu_flops()


def stored_seconds() -> dict[tuple, float]:
    """Median seconds of the stored runs by :attr:`Run.like`."""
    times = defaultdict(list)
    for entry in Store().entries():
        if entry.kind in STAGES:
            leaves = entry.key.flat(origin=False).items()
            values = {name.rpartition(".")[2]: value for name, value in leaves}
            values |= {"grouping": values["how"]} if "how" in values else {}
            times[_like(entry.kind, values)].append(entry.seconds)
    return {like: median(several) for like, several in times.items()}


def _like(stage: str, values: Mapping[str, Any]) -> tuple:
    """A stage with the settings that its time depends on: neither seeds nor a folder."""
    names = [name for name in Settings.model_fields if name in values and name != "data_dir"]
    pairs = [(name, values[name]) for name in names if "seed" not in name]
    hashable = [(name, tuple(v) if isinstance(v, list) else v) for name, v in pairs]
    return (stage, *hashable)


# The plan as text.


def lines(jobs: Sequence[Job], states: Sequence[str]) -> Iterator[str]:
    """The plan as text: each job's state and runs, its total, the sum, and what it rests on.

    Args:
        jobs: From ``plan.plan``.
        states: What to say of each job, such as "to run"; runs of one that is stored are not
            listed and cost nothing.
    """
    listed, stored = [], stored_seconds()
    for job, state, new in zip(jobs, states, runs(jobs), strict=True):
        yield f"{job.name}{describe(job)}: {state}"
        if state.startswith("stored"):
            continue
        if new:
            yield from _table(new, stored)
            yield f"    {_total(new, stored)}"
        else:
            yield f"    trains nothing{' that is not listed above' if asked(job) else ''}"
        listed += new
    yield from _sum(listed, stored)


def summary(jobs: Sequence[Job]) -> Iterator[str]:
    """What all runs of the jobs together cost, in a few lines; nothing where nothing trains."""
    yield from _sum([run for new in runs(jobs) for run in new], stored_seconds())


def _sum(planned: Sequence[Run], stored: Mapping) -> Iterator[str]:
    if not planned:
        return
    gpu_seconds = sum(run.cost.flops for run in planned) / GPU_FLOPS
    gpu_bytes = max(run.cost.gpu_bytes for run in planned)
    yield f"in all  {_total(planned, stored)}"
    yield (
        f"On a GPU that sustains {GPU_FLOPS / 1e12:.0f} TFLOP/s: {_time(gpu_seconds)} at "
        f"best, {gpu_bytes / 1e9:.1f} GB."
    )
    yield (
        "Time: of like runs that are stored, else operations at "
        f"{cpu_flops() / 1e9:.0f} GFLOP/s, a matrix product timed just now, times "
        f"{CPU_EFFICIENCY:g}; good to a factor of about three. Memory: weights, gradients, Adam's "
        "moments and activations at the peak, beside about 1 GB for Python and data."
    )
    yield "What runs/ holds of these is reused; a plan does not look there for single runs."


def _table(planned: Sequence[Run], stored: Mapping) -> Iterator[str]:
    """A line for runs that differ in seeds alone, and one for all conversions of a task."""
    groups = defaultdict(list)
    for run in planned:
        like = () if run.stage == "converted" else run.like
        groups[run.settings.task, run.settings.data_dir, run.stage, like].append(run)
    rows = [_row(group, stored) for group in groups.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield f"    {'  '.join(cells)}".rstrip()


def _row(group: Sequence[Run], stored: Mapping) -> tuple[str, ...]:
    """Task, stage, what differs from the scale's default, seeds, recipe, price."""
    first = group[0]
    alike = len({run.like for run in group}) == 1
    changed = _changes(first) if alike else f"{len(group)} untrained, each of its own settings"
    seed = "seed" if first.converts else "dense_seed"
    seeds = _seeds(sorted({run.choices[seed] for run in group}))
    task = first.settings.task
    return task, first.stage, changed, seeds, _recipe(first), _price(group, stored)


def _seeds(seeds: Sequence[int]) -> str:
    """``seed 0``, ``seeds 0-2`` or ``seeds 0, 4``."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    joined = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"seeds {seeds[0]}-{seeds[-1]}" if joined else f"seeds {', '.join(map(str, seeds))}"


_TRAINED = ("learning_rate", "batch_size", "epochs", "weight_decay")
#: Settings that :func:`_recipe` names.
_NAMED = {"task", "model", "max_length", "importance_examples", "distill_weight", *_TRAINED}
_NAMED |= {f"teacher_{name}" for name in _TRAINED}


def _changes(run: Run) -> str:
    """What differs from the scale's default for this task and model."""
    settings = run.settings
    default = Settings.at(settings.scale, task=settings.task, model=settings.model)
    usual = Run(run.stage, default).like
    before = Run("teacher", settings).like if run.stage in ("importance", "student") else ()
    changes = [pair for pair in run.like if pair not in (*usual, *before)]
    return text_of({n: value for n, value in changes if n not in _NAMED}).strip() or "default"


def _recipe(run: Run) -> str:
    """The settings that a reader compares with Table 7."""
    settings = run.settings
    n_train, n_validation = examples(settings)
    numbers = {"importance": scored_examples(settings), "converted": n_validation}
    words = [settings.model.rpartition("/")[2], f"{numbers.get(run.stage, n_train):,} examples"]
    words.append(f"{settings.max_length} tokens")
    if run.stage in ("teacher", "student"):
        prefix = "teacher_" if run.stage == "teacher" else ""
        rate, batch, epochs, decay = (getattr(settings, prefix + name) for name in _TRAINED)
        words += [f"lr {rate:g}", f"batch {batch}", f"epochs {epochs:g}", f"decay {decay:g}"]
    if run.stage == "student":
        words.append(f"lambda {settings.distill_weight:g}")
    return ", ".join(words)


def _total(planned: Sequence[Run], stored: Mapping) -> str:
    counts = []
    for stage in STAGES:
        n = sum(run.stage == stage for run in planned)
        counts += [f"{n} {NOUNS.get(stage, stage)}{'s' if n > 1 else ''}"] if n else []
    return f"{', '.join(counts)}: {_price(planned, stored)}"


def _price(planned: Sequence[Run], stored: Mapping) -> str:
    memory = max(run.cost.cpu_bytes for run in planned)
    return f"CPU {_time(sum(seconds(run, stored) for run in planned))}, {memory / 1e9:.1f} GB"


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
