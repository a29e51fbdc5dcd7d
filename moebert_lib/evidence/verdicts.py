"""Verdicts on the paper's claims, by a stated rule, and the tables that go with them.

Differences are in points of each task's headline metric, as ``claims`` says.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from moebert_lib.config import paper_numbers
from moebert_lib.config.presets import LARGE
from moebert_lib.config.settings import Settings
from moebert_lib.data.tasks import TASKS
from moebert_lib.evidence.claims import CLAIMS, SPANS, Claim, differences
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

MARGIN = 0.5  #: points within which two arms count as equal; ours, the paper names none
NEAR = 1.0  #: neurons by which a size may miss the paper's proportion through rounding
REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "not reproduced", "undecided"
TOLD = (REPRODUCED, CONTRADICTED, UNDECIDED)  #: what runs can say
NO_RUNS, ELSEWHERE = "no runs", "see notebook 7"

#: Where the interval must lie, in points, for a comparison of each kind.
CLAIMED = {
    "better": (0.0, np.inf),
    "equal": (-MARGIN, MARGIN),
    "not worse": (-MARGIN, np.inf),
}

#: Rows of :func:`methods`: the prefix of the score, and which runs have it.
METHODS = {
    "dense teacher": ("teacher_", "distill == 'all'"),
    "converted by importance, untrained": (
        "converted_",
        "ranking == 'importance' and distill == 'all'",
    ),
    "MoEBERT": ("", "ranking == 'importance' and distill == 'all'"),
    "MoEBERT without distillation": ("", "ranking == 'importance' and distill == 'none'"),
    "random split, distilled": ("", "ranking == 'random' and distill == 'all'"),
    "inverse split, distilled": ("", "ranking == 'inverse' and distill == 'all'"),
}


def judge(gaps: Iterable[float], kind: str) -> tuple[str, float, float]:
    """Verdict on one comparison, and the 95% interval of the mean difference that decides it.

    Pairs are the seeds of one task; where a comparison spans several tasks, each task is one
    pair, the mean over its seeds, since seeds of one task are no evidence about other tasks. Runs
    whose teacher is no better than always giving the most frequent answer do not count.

    The interval: BCa bootstrap from five pairs on. For two to four, Student's t, which takes
    differences for normal; there is no better choice, since a permutation test of three pairs
    cannot go below p = 0.25. One pair, or pairs that are all equal, have no interval.

    * "better" is reproduced if the interval lies wholly above zero, and not reproduced if
      wholly below.
    * "equal" is reproduced if it lies wholly within half a point of zero, and not reproduced if
      wholly outside.
    * "not worse" is reproduced if it lies wholly above minus half a point, and not reproduced if
      wholly below.
    * Anything else is undecided. Without pairs there are no runs.
    * A claim is reproduced if all its comparisons are, not reproduced if any of them is "not
      reproduced", and else undecided; so a comparison without runs leaves it undecided at best.
    """
    gaps = np.asarray(list(gaps), dtype=float)
    low = high = float("nan")
    # equal but for rounding is equal
    if len(gaps) and np.ptp(gaps) > 1e-9 * max(1.0, np.abs(gaps).max()):
        low, high = bca_interval(gaps)[1:3] if len(gaps) >= FEWEST else student(gaps)
    floor, roof = CLAIMED[kind]
    inside = low > floor and high < roof
    outside = high < floor or low > roof
    told = REPRODUCED if inside else CONTRADICTED if outside else UNDECIDED
    return told if len(gaps) else NO_RUNS, low, high


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
        (as :func:`judge` counts them), ``mean``, ``low`` and
        ``high`` (the interval that decides, see :func:`judge`), ``lowest``, ``highest``,
        ``paper``, ``p`` (two-sided sign-flip test), ``p_holm`` (over all rows) and ``verdict``.
    """
    rows = []
    for claim in CLAIMS:
        for one in claim.comparisons:
            every = differences(frame, one)
            by_task = every.groupby("task").mean()
            gaps = by_task if len(by_task) > 1 else every
            verdict, low, high = judge(gaps, one.kind)
            rows.append(
                {
                    "claim": claim.key,
                    "comparison": str(one),
                    "kind": one.kind,
                    "tasks": len(by_task),
                    "runs": len(every),
                    "pairs": len(gaps),
                    "mean": gaps.mean(),
                    "low": low,
                    "high": high,
                    "lowest": gaps.min(),
                    "highest": gaps.max(),
                    "paper": one.printed,
                    "p": permutation_p(gaps),
                    "verdict": verdict,
                }
            )
    table = pd.DataFrame(rows)
    table.insert(len(table.columns) - 1, "p_holm", holm(table["p"]))
    return table


def verdicts(compared: pd.DataFrame) -> pd.DataFrame:
    """One row per claim, from the rows of :func:`compare`; the index is the claim's key.

    Returns:
        Columns ``claim``, ``shown in``, ``comparisons``, ``tested`` (those with runs), ``pairs``
        (the fewest of a tested one) and ``verdict``.
    """
    rows = {}
    for claim in CLAIMS:
        mine = compared[(compared["claim"] == claim.key) & (compared["pairs"] > 0)]
        rows[claim.key] = {
            "claim": claim.statement,
            "shown in": claim.shown_in,
            "comparisons": len(claim.comparisons),
            "tested": len(mine),
            "pairs": 0 if mine.empty else int(mine["pairs"].min()),
            "verdict": _together(mine["verdict"], claim) if claim.comparisons else ELSEWHERE,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("key")


def _together(told: pd.Series, claim: Claim) -> str:
    if told.empty:
        return NO_RUNS
    if (told == CONTRADICTED).any():
        return CONTRADICTED
    whole = len(told) == len(claim.comparisons) and (told == REPRODUCED).all()
    return REPRODUCED if whole else UNDECIDED


def by_chance(compared: pd.DataFrame) -> tuple[int, int, float]:
    """Of the comparisons that claim a direction and have runs: decided, still so after Holm, luck.

    Returns:
        How many have a verdict, how many of these have ``p_holm`` of 0.05 at most, and how many
        verdicts to expect if no arm differed from any other (:func:`intervals.chance`).
    """
    told = compared[(compared["kind"] == "better") & (compared["pairs"] > 0)]
    decided = told[told["verdict"] != UNDECIDED]
    luck = sum(chance(int(n)) for n in told["pairs"])
    return len(decided), int((decided["p_holm"] <= 0.05).sum()), luck


def beside_paper(runs: pd.DataFrame) -> pd.DataFrame:
    """The default runs beside Tables 1, 2 and 4: one row per task and metric, in %.

    Args:
        runs: Rows of ``experiment.grid``, one or several seeds for each task.

    Returns:
        Columns ``model``, ``task``, ``metric``, ``ours`` (mean), ``low`` and ``high`` (95% t
        interval; below five runs the lowest and highest run), ``n``, ``teacher`` and ``gap``
        (ours minus it), ``guessing`` (always the most frequent answer, for a headline metric),
        ``paper``, ``over paper`` (ours minus it) and ``paper gap`` (MoEBERT
        minus BERT).
    """
    rows = []
    for model, task, metric, group in _by_metric(runs):
        methods = ("MoEBERT-large", "BERT-large") if model == LARGE else ("MoEBERT", "BERT-base")
        mean, low, high, n = _level(group[metric])
        theirs, bert = (paper_numbers.printed(method, task, metric) for method in methods)
        teacher = 100 * group[f"teacher_{metric}"].mean()
        headline = metric == TASKS[task].metric and "guessing" in group
        guess = 100 * group["guessing"].mean() if headline else np.nan
        rows.append(
            (
                model,
                task,
                metric,
                mean,
                low,
                high,
                n,
                teacher,
                mean - teacher,
                guess,
                theirs,
                mean - theirs,
                theirs - bert,
            )
        )
    names = "model task metric ours low high n teacher gap guessing paper"
    return pd.DataFrame(rows, columns=[*names.split(), "over paper", "paper gap"])


def methods(runs: pd.DataFrame) -> pd.DataFrame:
    """The headline metric of each of ``METHODS`` on each task, in %; without runs it has no row.

    Args:
        runs: Rows of ``experiment.grid``, of one model; those of equal seed count once.

    Returns:
        Columns ``method``, ``task``, ``metric``, ``mean``, ``low`` and ``high`` (95% t interval;
        below five runs the lowest and highest run) and ``n`` (runs; of teachers, teachers).
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
        runs: Rows of ``experiment.grid`` for the figure, several seeds for each value.
        figure: Key of ``paper.FIGURES``, ``figure2a`` to ``figure3c``.
        metric: Column to judge.
        width: Neurons of a dense FFN; sizes are matched to the paper's by proportion.

    Returns:
        Columns ``figure``, ``value``, ``ours``, ``low`` and ``high`` (95% t interval; below five
        runs the lowest and highest run), ``n``, ``over default``, ``paper``, ``paper over
        default`` and ``gap`` (ours over the default minus the paper's).
    """
    theirs, default = paper_numbers.FIGURES[figure], paper_numbers.DEFAULTS[figure]
    scale = 3072 / width if figure in ("figure2a", "figure2c") else 1
    rows = []
    for value, group in runs.groupby(paper_numbers.FIGURE_SETTINGS[figure], sort=False):
        mean, low, high, n = _level(group[metric])
        numeric = not isinstance(value, str)
        key = min(theirs, key=lambda k: abs(k - value * scale)) if numeric else value
        near = abs(key - value * scale) <= NEAR * scale if numeric else key in theirs
        name = f"{value:g}" if numeric else value
        rows.append((figure, name, mean, low, high, n, theirs[key] if near else np.nan))
    names = ["figure", "value", "ours", "low", "high", "n", "paper"]
    table = pd.DataFrame(rows, columns=names)
    base = table.loc[table["paper"] == theirs[default], "ours"].mean()
    table.insert(6, "over default", table["ours"] - base)
    table["paper over default"] = table["paper"] - theirs[default]
    return table.assign(gap=table["over default"] - table["paper over default"])


def beneath(n: int, beside: pd.DataFrame, *, source: str) -> pd.DataFrame:
    """Table ``n`` of the paper, its rows ``quoted``, with ours beneath: teacher and student.

    Args:
        n: 1 (GLUE), 2 (SQuAD) or 4 (BERT-large).
        beside: Rows of :func:`beside_paper`. Those that belong to another table are left out;
            a task that the paper has not gets a column of its own, for its headline metric.
        source: What our rows are marked with.
    """
    ours: list[dict] = [{"method": "dense teacher"}, {"method": "MoEBERT"}]
    for row in beside.itertuples():
        spans, own = row.task in SPANS, not paper_numbers.column(row.task, row.metric)
        if (row.model == LARGE) != (n == 4) or (n != 4 and spans != (n == 2)):
            continue
        if own and row.metric != TASKS[row.task].metric:
            continue
        place = (
            paper_numbers.column(row.task, row.metric, table=n)
            or f"{row.task} {row.metric}, here only"
        )
        ours[0][place], ours[1][place] = row.teacher, row.ours
    quoted = paper_numbers.table(n).reset_index().assign(source="quoted")
    mine = pd.DataFrame([row for row in ours if len(row) > 1]).assign(source=source)
    return pd.concat([quoted, mine], ignore_index=True).set_index(["source", "method"])


def gaps(runs: pd.DataFrame) -> pd.DataFrame:
    """Student minus teacher, in points: the paper's (Tables 1 and 2), and every run of ours.

    Args:
        runs: Rows of ``experiment.grid``.

    Returns:
        Columns ``task`` (with its metric), ``gap`` and ``source``, as ``plots_learning.gaps``
        draws them.
    """
    tables = [paper_numbers.table(1), paper_numbers.table(2).add_prefix("SQuAD ")]
    printed = pd.concat([table.loc["MoEBERT"] - table.loc["BERT-base"] for table in tables])
    theirs = printed.rename_axis("task").reset_index(name="gap")
    frames = [theirs.assign(source="paper")]
    for _, task, metric, group in _by_metric(runs):
        gap = 100 * (group[metric] - group[f"teacher_{metric}"])
        place = paper_numbers.column(task, metric) or f"{task} {metric}, here"
        place = f"SQuAD {place}" if paper_numbers.column(task, metric, table=2) else place
        frames.append(pd.DataFrame({"task": place, "gap": gap, "source": "here"}))
    return pd.concat(frames, ignore_index=True)


def _level(scores: pd.Series) -> Interval:
    """Mean of runs in % with its t interval; below five runs with the lowest and highest."""
    level = t_interval(100 * scores)
    if level.n >= FEWEST:
        return level
    return level._replace(low=100 * scores.min(), high=100 * scores.max())


def _by_metric(runs: pd.DataFrame) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Model, task, metric and runs of each, the headline metric of a task first."""
    for (model, task), group in runs.groupby(["model", "task"], sort=False):
        scores = [name for name in group if f"teacher_{name}" in group]
        metrics = set(scores) - set(Settings.model_fields)  # teacher_seed is a setting
        names = [name for name in scores if name in metrics and group[name].notna().all()]
        for metric in sorted(names, key=lambda name, task=task: name != TASKS[task].metric):
            yield model, task, metric, group
