"""Verdicts on the paper's claims by one rule (:func:`judge`), and the tables of results.

Differences are in points of each task's headline metric (see ``claims``).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from moebert_lib.config import paper_numbers
from moebert_lib.config.presets import LARGE
from moebert_lib.config.settings import Settings
from moebert_lib.data.tasks import TASKS
from moebert_lib.evidence.claims import CLAIMS, SPANS, Claim, Comparison, differences
from moebert_lib.evidence.statistics import (
    FEWEST,
    Interval,
    bca_interval,
    chance,
    holm,
    permutation_p,
    student,
    t_interval,
)

MARGIN = 0.5  #: points within which two arms count as equal; our choice, the paper names none
NEAR = 1.0  #: neurons by which a size may miss the paper's proportion through rounding
REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "not reproduced", "undecided"
TOLD = (REPRODUCED, CONTRADICTED, UNDECIDED)  #: verdicts on comparisons that have runs
NO_RUNS, ELSEWHERE = "no runs", "see notebook 7"

#: Where the interval must lie, in points, for a comparison of each kind.
CLAIMED = {
    "better": (0.0, np.inf),
    "equal": (-MARGIN, MARGIN),
    "not worse": (-MARGIN, np.inf),
}

_DEFAULT = "ranking == 'importance' and distill == 'all'"

#: Rows of :func:`methods`: the prefix of the score, and the query for its runs.
METHODS = {
    "dense teacher": ("teacher_", "distill == 'all'"),
    "converted by importance, untrained": ("converted_", _DEFAULT),
    "MoEBERT": ("", _DEFAULT),
    "MoEBERT without distillation": ("", "ranking == 'importance' and distill == 'none'"),
    "random split, distilled": ("", "ranking == 'random' and distill == 'all'"),
    "inverse split, distilled": ("", "ranking == 'inverse' and distill == 'all'"),
}


def judge(gaps: Iterable[float], kind: str) -> tuple[str, float, float]:
    """Verdict on one comparison, and the 95% interval of the mean difference that decides it.

    Pairs are the seeds of one task. If a comparison spans several tasks, each task is one pair,
    the mean over its seeds, since seeds of one task are no evidence about other tasks. Runs whose
    teacher is no better than always giving the most frequent answer do not count.

    The interval is a BCa bootstrap interval from five pairs on. For two to four pairs it is
    Student's t interval, which assumes normal differences; a permutation test is no alternative,
    since with three pairs its p cannot go below 0.25. One pair, or equal pairs, have no interval.

    * "better" is reproduced if the interval lies wholly above zero, and not reproduced if it lies
      wholly below.
    * "equal" is reproduced if it lies wholly within half a point of zero, and not reproduced if
      it lies wholly outside.
    * "not worse" is reproduced if it lies wholly above minus half a point, and not reproduced if
      it lies wholly below.
    * Anything else is undecided. Without pairs the verdict is "no runs".
    * A claim is reproduced if all its comparisons are, not reproduced if at least one of them is
      "not reproduced", and undecided otherwise; so a comparison without runs leaves it undecided
      at best.
    """
    gaps = np.asarray(list(gaps), dtype=float)
    if not len(gaps):
        return NO_RUNS, float("nan"), float("nan")
    low = high = float("nan")
    equal = np.ptp(gaps) <= 1e-9 * max(1.0, np.abs(gaps).max())  # but for rounding
    if not equal:
        low, high = bca_interval(gaps)[1:3] if len(gaps) >= FEWEST else student(gaps)
    floor, roof = CLAIMED[kind]
    if low > floor and high < roof:
        return REPRODUCED, low, high
    return CONTRADICTED if high < floor or low > roof else UNDECIDED, low, high


def interval_text(mean: float, low: float, high: float) -> str:
    """A mean difference with its interval, if it has one.

    Example:
        >>> interval_text(0.52, -0.1, 1.14), interval_text(0.5, np.nan, np.nan)
        ('+0.5 (-0.1 to +1.1)', '+0.5')
    """
    return f"{mean:+.1f}" + ("" if np.isnan(low) else f" ({low:+.1f} to {high:+.1f})")


def judged_text(gaps: pd.Series, kind: str = "better", *, named: bool = False) -> str:
    """The mean of differences with the interval of :func:`judge`, in Markdown.

    In bold if :func:`judge` decides; with ``named`` the verdict follows in bold instead.
    """
    verdict, low, high = judge(gaps, kind)
    text = interval_text(gaps.mean(), low, high)
    if verdict not in (REPRODUCED, CONTRADICTED):
        return text
    return f"{text} **{verdict}**" if named else f"**{text}**"


def compare(frame: pd.DataFrame) -> pd.DataFrame:
    """Every comparison of every claim: one row each, differences in points.

    Args:
        frame: As :func:`collect` returns it.

    Returns:
        Columns ``claim``, ``comparison``, ``kind``, ``tasks``, ``runs`` (pairs of runs), ``pairs``
        (as :func:`judge` counts them), ``mean``, ``low`` and ``high`` (of the interval that
        decides), ``lowest``, ``highest``, ``paper``, ``p`` (two-sided sign-flip test), ``p_holm``
        (over all rows) and ``verdict``.
    """
    rows = []
    for claim in CLAIMS:
        for comparison in claim.comparisons:
            rows.append({"claim": claim.key, **_compared(frame, comparison)})
    table = pd.DataFrame(rows)
    table.insert(len(table.columns) - 1, "p_holm", holm(table["p"]))
    return table


def _compared(frame: pd.DataFrame, comparison: Comparison) -> dict[str, Any]:
    """One row of :func:`compare`."""
    by_run = differences(frame, comparison)
    by_task = by_run.groupby("task").mean()
    gaps = by_task if len(by_task) > 1 else by_run
    verdict, low, high = judge(gaps, comparison.kind)
    return {
        "comparison": str(comparison),
        "kind": comparison.kind,
        "tasks": len(by_task),
        "runs": len(by_run),
        "pairs": len(gaps),
        "mean": gaps.mean(),
        "low": low,
        "high": high,
        "lowest": gaps.min(),
        "highest": gaps.max(),
        "paper": comparison.printed,
        "p": permutation_p(gaps),
        "verdict": verdict,
    }


def verdicts(compared: pd.DataFrame) -> pd.DataFrame:
    """One row per claim, from the rows of :func:`compare`; the index is the claim's key.

    Returns:
        Columns ``claim``, ``shown in``, ``comparisons``, ``tested`` (those with runs), ``pairs``
        (the fewest of a tested one) and ``verdict``.
    """
    rows = {}
    for claim in CLAIMS:
        tested = compared[(compared["claim"] == claim.key) & (compared["pairs"] > 0)]
        rows[claim.key] = {
            "claim": claim.statement,
            "shown in": claim.shown_in,
            "comparisons": len(claim.comparisons),
            "tested": len(tested),
            "pairs": 0 if tested.empty else int(tested["pairs"].min()),
            "verdict": _together(tested["verdict"], claim) if claim.comparisons else ELSEWHERE,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("key")


def _together(tested: pd.Series, claim: Claim) -> str:
    """The verdict on a claim from the verdicts on its comparisons that have runs."""
    if tested.empty:
        return NO_RUNS
    if (tested == CONTRADICTED).any():
        return CONTRADICTED
    complete = len(tested) == len(claim.comparisons)
    return REPRODUCED if complete and (tested == REPRODUCED).all() else UNDECIDED


def by_chance(compared: pd.DataFrame) -> tuple[int, int, float]:
    """How many comparisons that claim a direction are decided, and how many would be by chance.

    Returns:
        Comparisons with a verdict; those of them with ``p_holm`` of 0.05 at most; and the verdicts
        to expect if no arm differed from any other (:func:`statistics.chance`).
    """
    tested = compared[(compared["kind"] == "better") & (compared["pairs"] > 0)]
    decided = tested[tested["verdict"] != UNDECIDED]
    expected = sum(chance(int(n)) for n in tested["pairs"])
    return len(decided), int((decided["p_holm"] <= 0.05).sum()), expected


def beside_paper(runs: pd.DataFrame) -> pd.DataFrame:
    """The default runs beside Tables 1, 2 and 4: one row per task and metric, in %.

    Args:
        runs: Rows of experiments, one or several seeds for each task.

    Returns:
        Columns ``model``, ``task``, ``metric``, ``ours``, ``low``, ``high`` and ``n`` (see
        :func:`_level`), ``teacher``, ``gap`` (ours minus the teacher's), ``guessing`` (the
        headline metric of the most frequent answer), ``paper``, ``over paper`` (ours minus the
        paper's) and ``paper gap`` (MoEBERT minus BERT).
    """
    rows = []
    for model, task, metric, group in _by_metric(runs):
        methods = ("MoEBERT-large", "BERT-large") if model == LARGE else ("MoEBERT", "BERT-base")
        paper, bert = (paper_numbers.printed(method, task, metric) for method in methods)
        has_guess = metric == TASKS[task].metric and "guessing" in group
        guess = 100 * group["guessing"].mean() if has_guess else np.nan
        teacher = 100 * group[f"teacher_{metric}"].mean()
        level = _level(group[metric])
        ours = (*level, teacher, level.mean - teacher, guess)
        title = TASKS[task].metric_title(metric)
        rows.append((model, task, title, *ours, paper, level.mean - paper, paper - bert))
    names = "model task metric ours low high n teacher gap guessing paper"
    return pd.DataFrame(rows, columns=[*names.split(), "over paper", "paper gap"])


def methods(runs: pd.DataFrame) -> pd.DataFrame:
    """The headline metric of each of ``METHODS`` on each task that has runs of it, in %.

    Args:
        runs: Rows of experiments with one model; those of equal seed count once.

    Returns:
        Columns ``method``, ``task``, ``metric``, ``mean``, ``low``, ``high`` and ``n`` (see
        :func:`_level`; of runs, or of distinct teachers).
    """
    runs = runs.assign(dense=runs["seed"].where(runs["teacher_seed"].isna(), runs["teacher_seed"]))
    rows = []
    for method, (prefix, which) in METHODS.items():
        for task, group in runs.query(which).groupby("task", sort=False):
            metric = TASKS[task].metric
            once = group.drop_duplicates("dense" if prefix == "teacher_" else "seed")
            rows.append((method, task, metric, *_level(once[prefix + metric])))
    return pd.DataFrame(rows, columns=["method", "task", "metric", *Interval._fields])


def points(runs: pd.DataFrame, figure: str, metric: str, width: int) -> pd.DataFrame:
    """A figure's points beside the paper's: one row per value of the setting it varies, in %.

    Args:
        runs: Rows of the figure's experiments, several seeds for each value.
        figure: Key of ``paper_numbers.FIGURES``, ``figure2a`` to ``figure3c``.
        metric: Column to compare.
        width: Neurons of a dense FFN; sizes are matched to the paper's by proportion.

    Returns:
        Columns ``figure``, ``value``, ``ours``, ``low`` and ``high`` (95% t interval; below five
        runs the lowest and highest run), ``n``, ``over default``, ``paper``, ``paper over
        default`` and ``gap`` (ours over the default minus the paper's).
    """
    paper, default = paper_numbers.FIGURES[figure], paper_numbers.DEFAULTS[figure]
    scale = 3072 / width if figure in ("figure2a", "figure2c") else 1
    rows = []
    for value, group in runs.groupby(paper_numbers.FIGURE_SETTINGS[figure], sort=False):
        key, name = value, value
        if not isinstance(value, str):
            nearest = min(paper, key=lambda size: abs(size - value * scale))
            key = nearest if abs(nearest - value * scale) <= NEAR * scale else None
            name = f"{value:g}"
        rows.append((figure, name, *_level(group[metric]), paper.get(key, np.nan)))
    names = ["figure", "value", "ours", "low", "high", "n", "paper"]
    table = pd.DataFrame(rows, columns=names)
    base = table.loc[table["paper"] == paper[default], "ours"].mean()
    table.insert(6, "over default", table["ours"] - base)
    table["paper over default"] = table["paper"] - paper[default]
    return table.assign(gap=table["over default"] - table["paper over default"])


def beneath(n: int, beside: pd.DataFrame, *, source: str) -> pd.DataFrame:
    """Table ``n`` of the paper, its rows marked ``quoted``, followed by our teacher and student.

    Args:
        n: 1 (GLUE), 2 (SQuAD) or 4 (BERT-large).
        beside: Rows of :func:`beside_paper`. Those of another table are left out; a task that is
            not in the paper gets a column of its own, for its headline metric.
        source: The mark of our rows.
    """
    teacher, student_row = {"method": "dense teacher"}, {"method": "MoEBERT"}
    for row in beside.itertuples():
        if _table_of(row) != n:
            continue
        column = paper_numbers.column(row.task, row.metric, table=n)
        if not paper_numbers.column(row.task, row.metric):
            if row.metric.partition(",")[0] != TASKS[row.task].metric:  # on any set
                continue
        column = column or f"{row.task} {row.metric}, here only"
        teacher[column], student_row[column] = row.teacher, row.ours
    quoted = paper_numbers.table(n).reset_index().assign(source="quoted")
    ours = pd.DataFrame([row for row in (teacher, student_row) if len(row) > 1])
    return pd.concat([quoted, ours.assign(source=source)]).set_index(["source", "method"])


def _table_of(row: Any) -> int:
    """The paper's table that a row of :func:`beside_paper` belongs to."""
    if row.model == LARGE:
        return 4
    return 2 if row.task in SPANS else 1


def gaps(runs: pd.DataFrame) -> pd.DataFrame:
    """Student minus teacher, in points: the paper's (Tables 1 and 2), and every run of ours.

    Args:
        runs: Rows of experiments.

    Returns:
        Columns ``task`` (with its metric), ``gap`` and ``source`` (``here`` or ``paper``).
    """
    tables = [paper_numbers.table(1), paper_numbers.table(2).add_prefix("SQuAD ")]
    printed = pd.concat([table.loc["MoEBERT"] - table.loc["BERT-base"] for table in tables])
    frames = [printed.rename_axis("task").reset_index(name="gap").assign(source="paper")]
    for _, task, metric, group in _by_metric(runs):
        gap = 100 * (group[metric] - group[f"teacher_{metric}"])
        title = TASKS[task].metric_title(metric)
        column = paper_numbers.column(task, metric) or f"{task} {title}, here"
        prefix = "SQuAD " if paper_numbers.column(task, metric, table=2) else ""
        frames.append(pd.DataFrame({"task": prefix + column, "gap": gap, "source": "here"}))
    return pd.concat(frames, ignore_index=True)


def _level(scores: pd.Series) -> Interval:
    """Mean of runs in % with its t interval; below five runs, with the lowest and highest run."""
    level = t_interval(100 * scores)
    if level.n >= FEWEST:
        return level
    return level._replace(low=100 * scores.min(), high=100 * scores.max())


def _by_metric(runs: pd.DataFrame) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Each model, task and metric with its runs, a task's headline metric first."""
    for (model, task), group in runs.groupby(["model", "task"], sort=False):
        scores = [name for name in group if f"teacher_{name}" in group]
        metrics = set(scores) - set(Settings.model_fields)  # teacher_seed is a setting
        names = [name for name in scores if name in metrics and group[name].notna().all()]
        for metric in sorted(names, key=lambda name, task=task: name != TASKS[task].metric):
            yield model, task, metric, group
