"""The paper's claims as data, and the runs that test each of them.

A claim is a list of comparisons of two *arms*: ways to set the experiment up, each changing one
thing of the default. Runs of two arms are paired by task and seed, and differences are in points
of the task's headline metric (``tasks.TASKS[task].metric``: accuracy, F1 or Matthews correlation).
So a mean over tasks mixes metrics, as averages over GLUE do; MNLI counts with its matched set.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moebert_lib.config import paper_numbers
from moebert_lib.config.presets import FFN_WIDTHS, LARGE
from moebert_lib.config.settings import Settings
from moebert_lib.data.tasks import TASKS
from moebert_lib.evidence.decision_rule import MARGIN
from moebert_lib.experiments import ablations

#: What the paper says of the first arm of a comparison, and its sign.
TIES = {"better": ">", "equal": "~", "not worse": "≥"}
SPANS = {task for task in TASKS if TASKS[task].kind == "span"}


#: A gate has collapsed when the load of its busiest expert, on average over layers, has gone more
#: than half of the way from an even share to all tokens: with four experts 62 % of them, more than
#: the three others together. A hash of Figure 3c goes an eighth of the way at most.
COLLAPSED = 0.5


class Arm(NamedTuple):
    """One side of a comparison.

    Attributes:
        changes: Settings changed from the default. ``fraction`` is the FFN's width over the
            expert's, ``thirds`` the shared thirds of an expert.
        printed: The paper's value in %; for tables the mean of headline metrics over tasks.
        spans: Only tasks whose answer is a span (SQuAD), or only the others; None for all.
        teacher: The score is that of the run's own teacher.
    """

    changes: dict[str, Any]
    printed: float
    spans: bool | None = None
    teacher: bool = False


def _printed(method: str, tasks: Iterable[str]) -> float:
    values = [paper_numbers.printed(method, task, TASKS[task].metric) for task in tasks]
    return float(np.mean(values))


def _figure_arms() -> dict[str, Arm]:
    """The arms that Figures 2 and 3 compare."""
    figures, arms = paper_numbers.FIGURES, {}
    for fraction, size in {2: 1536, 4: 768, 8: 384, 24: 128}.items():
        arms[f"1/{fraction} wide"] = Arm({"fraction": fraction}, figures["figure2a"][size])
    for n, value in figures["figure2b"].items():
        arms[f"{n} expert{'s' * (n > 1)}"] = Arm({"n_experts": n}, value)
    for thirds, share in enumerate(("none", "1/3", "2/3", "all")):
        arms[f"{share} shared"] = Arm({"thirds": thirds}, figures["figure2c"][256 * thirds])
    for ranking, value in figures["figure3a"].items():
        arms[ranking] = Arm({"ranking": ranking}, value)
    names = {"all": "all layers", "skip": "every other layer", "last": "last layer"}
    for layers, name in names.items():
        arms[name] = Arm({"distill": layers}, figures["figure3b"][layers])
    for routing, value in figures["figure3c"].items():
        arms[routing] = Arm({"routing": routing}, value)
    return arms


def _table_arms() -> dict[str, Arm]:
    """The arms that Tables 1 to 4 compare."""
    glue = [task for task in paper_numbers.TABLE7 if task not in SPANS]
    squad = [task for task in paper_numbers.TABLE7 if task in SPANS]
    some, large = ablations.TABLE3_TASKS, ablations.TABLE4_TASKS
    on_large = {"model": LARGE}
    return {
        "distilled": Arm({"distill": "all"}, _printed("MoEBERT", some)),
        "not distilled": Arm({"distill": "none"}, _printed("-distill", some)),
        "MoEBERT": Arm({}, _printed("MoEBERT", glue), spans=False),
        "its BERT": Arm({}, _printed("BERT-base", glue), spans=False, teacher=True),
        "MoEBERT (spans)": Arm({}, _printed("MoEBERT", squad), spans=True),
        "its BERT (spans)": Arm({}, _printed("BERT-base", squad), spans=True, teacher=True),
        "MoEBERT-large": Arm(on_large, _printed("MoEBERT-large", large)),
        "its BERT-large": Arm(on_large, _printed("BERT-large", large), teacher=True),
    }


ARMS: dict[str, Arm] = {**_figure_arms(), **_table_arms()}
#: Controls that the paper lacks: its BERT trained for as many further steps as the student, and
#: every other layer of it, distilled in the same way at the same cost.
CONTROLS: dict[str, Arm] = {
    "dense trained on": Arm(
        {"n_experts": 1, "fraction": 1, "thirds": 0, "distill": "none"}, float("nan")
    ),
    "half depth": Arm({"student": "half-depth"}, float("nan")),
}


class Comparison(NamedTuple):
    """Two arms, and what the paper says of the first: better, equal, or not worse."""

    first: str
    second: str
    kind: str = "better"

    def __str__(self) -> str:
        return f"{self.first} {TIES[self.kind]} {self.second}"

    @property
    def printed(self) -> float:
        """The paper's difference, in points; NaN for a control, which the paper lacks."""
        arms = ARMS | CONTROLS
        return arms[self.first].printed - arms[self.second].printed


class Claim(NamedTuple):
    """A statement of the paper, in our words, and the comparisons that test it."""

    key: str
    statement: str
    shown_in: str
    comparisons: tuple[Comparison, ...]


#: Key, place in the paper, statement, and orders of arms; "a, b > c" compares both with c.
_TABLE = """
width | Figure 2a | Wider experts are better. | 1/2 wide > 1/4 wide > 1/8 wide > 1/24 wide
several | Figure 2b | Several experts beat one. | 2 experts, 4 experts, 8 experts > 1 expert
more | Figure 2b | More experts are better. | 8 experts > 4 experts > 2 experts
share none | Figure 2c | Sharing no neuron is worst. | \
    1/3 shared, 2/3 shared, all shared > none shared
share all | Figure 2c | Sharing all neurons is worse than sharing a part. | \
    1/3 shared, 2/3 shared > all shared
importance | Figure 3a | A split by importance beats a random one. | importance > random
inverse | Figure 3a | A random split beats the inverse one. | random > inverse
last | Figure 3b | Distilling the last layer alone is worse. | \
    all layers, every other layer > last layer
skip | Figure 3b | Every other layer is about as good as all. | every other layer ~ all layers
routers | Figure 3c | Routing hardly matters. | \
    hash-random ~ hash-balance; hash-random, hash-balance ~ gate-sentence
distillation | Table 3 | Layer-wise distillation helps. | distilled > not distilled
keeps up | Table 1 | MoEBERT keeps up with its BERT. | MoEBERT ≥ its BERT
beats | Table 1 | On average MoEBERT beats its BERT. | MoEBERT > its BERT
spans | Table 2 | On SQuAD MoEBERT is a little below its BERT. | its BERT (spans) > MoEBERT (spans)
large | Table 4 | MoEBERT-large keeps up with BERT-large. | MoEBERT-large ≥ its BERT-large
speed | Figure 4 | MoEBERT is much faster than BERT. |
"""


def _comparisons(orders: str) -> Iterator[Comparison]:
    kinds = {sign: kind for kind, sign in TIES.items()}
    for order in orders.split("; "):
        groups = re.split(rf" ([{''.join(kinds)}]) ", order)
        for firsts, sign, second in zip(groups[::2], groups[1::2], groups[2::2], strict=False):
            for first in firsts.split(", "):
                yield Comparison(first, second, kinds[sign])


def _claim(row: str) -> Claim:
    key, shown_in, statement, orders = (cell.strip() for cell in row.split("|"))
    return Claim(key, statement, shown_in, tuple(_comparisons(orders)))


CLAIMS = tuple(_claim(row) for row in _TABLE.strip().splitlines())


class Primary(NamedTuple):
    """A comparison that was named before the runs at scale ``base``, and its tasks.

    Attributes:
        comparison: Of arms of :data:`ARMS` or :data:`CONTROLS`.
        tasks: The estimate is the mean of their differences.
        claim: The paper's claim that it tests: a key of :data:`CLAIMS`; "" for a control.
    """

    comparison: Comparison
    tasks: tuple[str, ...]
    claim: str


#: The paper's claim, tasks, and arms. Each example of the validation set counts once and, where
#: there is a second test set, each of its examples too. Holm's correction is over these; every
#: other comparison is exploratory.
_PRIMARY = """
importance   | sst2 qnli mnli      | importance > random
inverse      | sst2                | random > inverse
several      | sst2 qnli           | 4 experts > 1 expert
distillation | sst2 qnli mnli cola | distilled > not distilled
keeps up     | sst2 qnli mnli cola | MoEBERT ≥ its BERT
             | sst2                | MoEBERT > dense trained on
             | sst2                | MoEBERT > half depth
"""


def _primary(row: str) -> Primary:
    claim, tasks, order = (cell.strip() for cell in row.split("|"))
    (comparison,) = _comparisons(order)
    return Primary(comparison, tuple(tasks.split()), claim)


PRIMARY = tuple(_primary(row) for row in _PRIMARY.strip("\n").splitlines())


def primary_table() -> pd.DataFrame:
    """The primary comparisons: one row each, with tasks, claim and margin in points."""
    statements = {claim.key: f"{claim.shown_in}: {claim.statement}" for claim in CLAIMS}
    rows = [
        {
            "comparison": str(comparison),
            "tasks": ", ".join(tasks),
            "claim": statements.get(claim, "a control that the paper lacks"),
            "margin": MARGIN,
        }
        for comparison, tasks, claim in PRIMARY
    ]
    return pd.DataFrame(rows)


def point(arm: str, base: Settings, width: int) -> Settings | None:
    """An arm's settings, or None if a layer of ``width`` neurons has too few for its experts.

    Sizes follow ``ablations.ablations``: where the width of experts varies, two thirds are shared.
    """
    changes = dict((ARMS | CONTROLS)[arm].changes)
    if "model" in changes:
        base = base.on(base.task, model=changes.pop("model"), expert_size=None)
        width = FFN_WIDTHS[base.model]
    size, shared = base.sizes(width)
    if "fraction" in changes:
        size, shared = ablations.expert_sizes(base, width, changes.pop("fraction"))
    if "thirds" in changes:
        shared = size * changes.pop("thirds") // 3
    n_experts = changes.get("n_experts", base.n_experts)
    if shared + n_experts * (size - shared) > width:
        return None
    return base.but(expert_size=size, n_shared=shared, **changes)


def collect(
    settings: Settings,
    tasks: Sequence[str],
    width: int,
    *,
    points: Sequence[Settings],
    runs: pd.DataFrame,
) -> pd.DataFrame:
    """The runs of each arm, without those that can decide nothing.

    These are runs whose teacher is no better than guessing, and those whose gate has collapsed:
    a gate that uses one expert says nothing about routing.

    Args:
        settings: The default that the arms change.
        tasks: Names of tasks.
        width: Neurons of the dense FFN.
        points: Settings of the experiments that were run.
        runs: Their rows, in the same order.

    Returns:
        One row per run and arm: ``arm`` and ``score`` (headline metric, 0 to 1), then the run's
        own row with its sizes spelled out.
    """
    results = (row for _, row in runs.iterrows())
    known = {_sized(run, width): row for run, row in zip(points, results, strict=True)}
    rows = []
    for name, arm in (ARMS | CONTROLS).items():
        for task in tasks:
            base = ablations.on_task(settings.but(distill="all"), task)
            arm_settings = point(name, base, width) if _applies(arm, base) else None
            metric = ("teacher_" if arm.teacher else "") + TASKS[task].metric
            for run in ablations.over_seeds(arm_settings) if arm_settings else ():
                row = known.get(run)
                if row is not None and _has_learned(row) and not collapsed(row):
                    sizes = {"expert_size": run.expert_size, "n_shared": run.n_shared}
                    rows.append({"arm": name, "score": row[metric], **row, **sizes})
    return pd.DataFrame(rows, columns=None if rows else ["arm", "score", "task", "seed"])


def _has_learned(row: pd.Series) -> bool:
    """Whether a run's teacher beats the most frequent answer; true if that score is unknown."""
    return not row[f"teacher_{TASKS[row['task']].metric}"] <= row.get("guessing", np.nan)


def collapse_limit(n_experts: int) -> float:
    """The load of the busiest expert over the mean load above which a gate has collapsed."""
    return 1 + COLLAPSED * (n_experts - 1)


def collapsed(row: Mapping[str, Any]) -> bool:
    """Whether a run's gate has collapsed (:data:`COLLAPSED`).

    Args:
        row: Of a student, with ``n_experts`` and ``busiest``, the load of its busiest expert over
            the mean load. Where it was not measured, as of hashes, nothing is known to collapse.
    """
    busiest = row.get("busiest", np.nan)
    return not pd.isna(busiest) and busiest > collapse_limit(row["n_experts"])


def _sized(settings: Settings, width: int) -> Settings:
    """The same settings with explicit sizes."""
    size, shared = settings.sizes(FFN_WIDTHS.get(settings.model, width))
    return settings.but(expert_size=size, n_shared=shared)


def _applies(arm: Arm, base: Settings) -> bool:
    if "model" in arm.changes and (
        base.scale != "paper" or base.task not in ablations.TABLE4_TASKS
    ):
        return False
    return arm.spans in (None, base.task in SPANS)


def differences(frame: pd.DataFrame, comparison: Comparison) -> pd.Series:
    """First minus second arm in points, by ``task`` and ``seed``, of runs that have a pair."""
    scores = frame.set_index(["task", "seed"])["score"]
    first, second = (scores[(frame["arm"] == arm).to_numpy()] for arm in comparison[:2])
    return 100 * (first - second).dropna().rename("difference")


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`differences` of every comparison: one row per pair of runs."""
    parts = []
    for claim in CLAIMS:
        for comparison in claim.comparisons:
            part = differences(frame, comparison).reset_index()
            parts.append(part.assign(claim=claim.key, comparison=str(comparison)))
    joined = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    return joined[["claim", "comparison", "task", "seed", "difference"]]
