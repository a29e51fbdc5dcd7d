"""The paper's claims as data, and the runs that bear on each.

A claim is a list of comparisons of two *arms*: ways to set the experiment up, each changing
one thing of the default. Runs of two arms are paired by task and seed, and differences are in
points of the task's headline metric (``tasks.TASKS[task].metric``: accuracy, F1 or Matthews).
So a mean over tasks mixes metrics, as averages over GLUE do; of MNLI only the matched set counts.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moebert_lib.config import paper_numbers
from moebert_lib.config.presets import FFN_WIDTHS, LARGE
from moebert_lib.config.settings import Settings
from moebert_lib.data.tasks import TASKS
from moebert_lib.experiments import ablations

TIES = {"better": ">", "equal": "~", "not worse": "≥"}
SPANS = {task for task in TASKS if TASKS[task].kind == "span"}


class Arm(NamedTuple):
    """One side of a comparison.

    Attributes:
        changes: Settings changed from the default. ``fraction``: the FFN's width over the
            expert's; ``thirds``: shared thirds of an expert.
        printed: The paper's value in %; of tables the mean of headline metrics over tasks.
        spans: Only tasks whose answer is a span (SQuAD), or only the others; None: all.
        teacher: The score is that of the run's own teacher.
    """

    changes: dict[str, Any]
    printed: float
    spans: bool | None = None
    teacher: bool = False


def _printed(method: str, tasks: Iterable[str]) -> float:
    return float(
        np.mean([paper_numbers.printed(method, task, TASKS[task].metric) for task in tasks])
    )


_GLUE = [task for task in paper_numbers.TABLE7 if task not in SPANS]
_SQUAD = [task for task in paper_numbers.TABLE7 if task in SPANS]

ARMS: dict[str, Arm] = {
    **{
        f"1/{f} wide": Arm({"fraction": f}, paper_numbers.FIGURES["figure2a"][size])
        for f, size in {2: 1536, 4: 768, 8: 384, 24: 128}.items()
    },
    **{
        f"{n} expert{'s' * (n > 1)}": Arm({"n_experts": n}, paper_numbers.FIGURES["figure2b"][n])
        for n in (1, 2, 4, 8)
    },
    **{
        f"{share} shared": Arm({"thirds": thirds}, paper_numbers.FIGURES["figure2c"][256 * thirds])
        for thirds, share in enumerate(("none", "1/3", "2/3", "all"))
    },
    **{
        deal: Arm({"ranking": deal}, paper_numbers.FIGURES["figure3a"][deal])
        for deal in ("importance", "random", "inverse")
    },
    **{
        name: Arm({"distill": layers}, paper_numbers.FIGURES["figure3b"][layers])
        for name, layers in {
            "all layers": "all",
            "every other layer": "skip",
            "last layer": "last",
        }.items()
    },
    **{
        router: Arm({"routing": router}, value)
        for router, value in paper_numbers.FIGURES["figure3c"].items()
    },
    "distilled": Arm({"distill": "all"}, _printed("MoEBERT", ablations.TABLE3_TASKS)),
    "not distilled": Arm({"distill": "none"}, _printed("-distill", ablations.TABLE3_TASKS)),
    "MoEBERT": Arm({}, _printed("MoEBERT", _GLUE), spans=False),
    "its BERT": Arm({}, _printed("BERT-base", _GLUE), spans=False, teacher=True),
    "MoEBERT (spans)": Arm({}, _printed("MoEBERT", _SQUAD), spans=True),
    "its BERT (spans)": Arm({}, _printed("BERT-base", _SQUAD), spans=True, teacher=True),
    "MoEBERT-large": Arm({"model": LARGE}, _printed("MoEBERT-large", ablations.TABLE4_TASKS)),
    "its BERT-large": Arm(
        {"model": LARGE}, _printed("BERT-large", ablations.TABLE4_TASKS), teacher=True
    ),
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
        """The paper's difference, in points."""
        return ARMS[self.first].printed - ARMS[self.second].printed


class Claim(NamedTuple):
    """A statement of the paper, in our words, and the comparisons that it comes to."""

    key: str
    statement: str
    shown_in: str
    comparisons: tuple[Comparison, ...]


def _chain(*arms: str) -> tuple[Comparison, ...]:
    return tuple(Comparison(*pair) for pair in zip(arms, arms[1:], strict=False))


def _over(worse: str, *better: str) -> tuple[Comparison, ...]:
    return tuple(Comparison(arm, worse) for arm in better)


_ROUTERS = ("hash-random", "hash-balance", "gate-sentence")
CLAIMS = (
    Claim(
        "width",
        "Wider experts are better.",
        "Figure 2a",
        _chain("1/2 wide", "1/4 wide", "1/8 wide", "1/24 wide"),
    ),
    Claim(
        "several",
        "Several experts beat one.",
        "Figure 2b",
        _over("1 expert", "2 experts", "4 experts", "8 experts"),
    ),
    Claim(
        "more",
        "More experts are better.",
        "Figure 2b",
        _chain("8 experts", "4 experts", "2 experts"),
    ),
    Claim(
        "share none",
        "Sharing no neuron is worst.",
        "Figure 2c",
        _over("none shared", "1/3 shared", "2/3 shared", "all shared"),
    ),
    Claim(
        "share all",
        "Sharing all neurons is worse than sharing a part.",
        "Figure 2c",
        _over("all shared", "1/3 shared", "2/3 shared"),
    ),
    Claim(
        "importance",
        "A split by importance beats a random one.",
        "Figure 3a",
        _chain("importance", "random"),
    ),
    Claim(
        "inverse", "A random split beats the inverse one.", "Figure 3a", _chain("random", "inverse")
    ),
    Claim(
        "last",
        "Distilling the last layer alone is worse.",
        "Figure 3b",
        _over("last layer", "all layers", "every other layer"),
    ),
    Claim(
        "skip",
        "Every other layer is about as good as all.",
        "Figure 3b",
        (Comparison("every other layer", "all layers", "equal"),),
    ),
    Claim(
        "routers",
        "Routing hardly matters.",
        "Figure 3c",
        tuple(Comparison(a, b, "equal") for i, a in enumerate(_ROUTERS) for b in _ROUTERS[i + 1 :]),
    ),
    Claim(
        "distillation",
        "Layer-wise distillation helps.",
        "Table 3",
        _chain("distilled", "not distilled"),
    ),
    Claim(
        "keeps up",
        "MoEBERT keeps up with its BERT.",
        "Table 1",
        (Comparison("MoEBERT", "its BERT", "not worse"),),
    ),
    Claim("beats", "On average MoEBERT beats its BERT.", "Table 1", _chain("MoEBERT", "its BERT")),
    Claim(
        "spans",
        "On SQuAD MoEBERT is a little below its BERT.",
        "Table 2",
        _chain("its BERT (spans)", "MoEBERT (spans)"),
    ),
    Claim(
        "large",
        "MoEBERT-large keeps up with BERT-large.",
        "Table 4",
        (Comparison("MoEBERT-large", "its BERT-large", "not worse"),),
    ),
    Claim("speed", "MoEBERT is much faster than BERT.", "Figure 4", ()),
)


def point(arm: str, base: Settings, width: int) -> Settings | None:
    """An arm's experiment; None where a layer of ``width`` neurons cannot hold it.

    Sizes follow ``grids.ablations``: where the width of experts varies, two thirds are shared.
    """
    changes = dict(ARMS[arm].changes)
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
    """The runs of each arm, but those whose teacher is no better than guessing.

    Args:
        settings: The notebook's, whose default the arms change.
        tasks: Names.
        width: Neurons of the dense FFN.
        points: Experiments that were run, such as those of ``grids.claims``.
        runs: Their rows, of ``experiment.grid``.

    Returns:
        One row per run and arm: ``arm`` and ``score`` (headline metric, 0 to 1), then the run's
        own row with its sizes spelled out.
    """
    rows_of = (row for _, row in runs.iterrows())
    known = {_sized(run, width): row for run, row in zip(points, rows_of, strict=True)}
    rows = []
    for name, arm in ARMS.items():
        for task in tasks:
            base = ablations.on_task(settings.but(distill="all"), task)
            one = point(name, base, width) if _applies(arm, base) else None
            metric = ("teacher_" if arm.teacher else "") + TASKS[task].metric
            for run in ablations.over_seeds(one) if one else ():
                row = known.get(run)
                if row is not None and _has_learned(row):
                    sizes = {"expert_size": run.expert_size, "n_shared": run.n_shared}
                    rows.append({"arm": name, "score": row[metric], **row, **sizes})
    return pd.DataFrame(rows, columns=None if rows else ["arm", "score", "task", "seed"])


def _has_learned(row: pd.Series) -> bool:
    """Whether a run's teacher beats always giving the most frequent answer, where one can tell."""
    return not row[f"teacher_{TASKS[row['task']].metric}"] <= row.get("guessing", np.nan)


def _sized(settings: Settings, width: int) -> Settings:
    """The same experiment with its sizes spelled out."""
    size, shared = settings.sizes(FFN_WIDTHS.get(settings.model, width))
    return settings.but(expert_size=size, n_shared=shared)


def _applies(arm: Arm, base: Settings) -> bool:
    if "model" in arm.changes and (
        base.scale != "paper" or base.task not in ablations.TABLE4_TASKS
    ):
        return False
    return arm.spans in (None, base.task in SPANS)


def differences(frame: pd.DataFrame, comparison: Comparison) -> pd.Series:
    """First minus second arm in points, by ``task`` and ``seed``; runs without a pair drop out."""
    one, other = (
        frame[frame["arm"] == arm].set_index(["task", "seed"])["score"] for arm in comparison[:2]
    )
    return 100 * (one - other).dropna().rename("difference")


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`differences` of every comparison: one row per pair of runs."""
    found = [
        differences(frame, one).reset_index().assign(claim=claim.key, comparison=str(one))
        for claim in CLAIMS
        for one in claim.comparisons
    ]
    columns = ["claim", "comparison", "task", "seed", "difference"]
    return pd.concat([part for part in found if len(part)] or found[:1])[columns].reset_index(
        drop=True
    )
