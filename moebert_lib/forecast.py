"""What a plan would run, each run once, with what it will cost: text before anything starts.

Two notebooks that ask for one run share it, as the store does. Left out: untrained conversions,
removal curves, what excites neurons, and other scores than importance, which train nothing.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moebert_lib import estimate
from moebert_lib.estimate import Cost
from moebert_lib.planning import Job, asked, describe
from moebert_lib.settings import Settings
from moebert_lib.stages import CONVERSION, DATA, IMPORTANCE, TEACHER, TRAINING

#: The settings that each stage depends on; a student's seed is a column of its own.
OWN = {
    "teacher": ("data_dir", "model", *DATA, *TEACHER),
    "importance": IMPORTANCE,
    "student": tuple(name for name in (*CONVERSION, *TRAINING) if name != "seed"),
}
_COST = {
    "teacher": estimate.teacher,
    "importance": estimate.importance,
    "student": estimate.student,
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
    cpu, gpu = estimate.cpu_flops() / 1e9, estimate.GPU_FLOPS / 1e12
    yield (
        f"Estimates, good to a factor of about three. CPU: this machine, {cpu:.0f} GFLOP/s, "
        f"a matrix product timed just now, times {estimate.CPU_EFFICIENCY:g}. GPU: assumed to "
        f"sustain {gpu:.0f} TFLOP/s in bf16, and {1000 * estimate.GPU_PASS:.0f} ms at least "
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
    train, validation = estimate.examples(s)
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
    return settings.sizes(estimate.shape(settings.model).neurons)


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
    cpu = sum(map(estimate.cpu_seconds, costs)), max(cost.cpu_bytes for cost in costs)
    gpu = sum(map(estimate.gpu_seconds, costs)), max(cost.gpu_bytes for cost in costs)
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
