"""Figures that compare runs: splits, constructions, ablations beside the paper, claims, switches.

Every run is drawn as a point, with the mean over seeds; the paper's values are hollow diamonds.
The functions ``..._in_words`` write titles.
"""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from moebert_lib.config.paper_numbers import FIGURE_AXES, FIGURE_SETTINGS, FIGURES
from moebert_lib.evidence.verdicts import CLAIMED, CONTRADICTED, NO_RUNS, REPRODUCED, UNDECIDED
from moebert_lib.plots import style
from moebert_lib.plots.style import COLORS, DIAMOND, INK, MARKERS, SINGLE, WIDE

#: Colour of a way of splitting; other settings are drawn as MoEBERT.
_BY_NAME = {name: COLORS[name] for name in MARKERS}
_DASHED = {"color": INK, "lw": 1, "ls": (0, (4, 3)), "zorder": 1}


def _sorted(frame: pd.DataFrame, column: str, order: list) -> pd.DataFrame:
    """The rows in the order of a column's values; the rows of one value keep theirs."""
    return frame.sort_values(column, key=lambda values: values.map(order.index), kind="stable")


def after_conversion(
    frame: pd.DataFrame,
    *,
    dense: float,
    chance: float | None = None,
    metric: str = "accuracy",
    title: str = "",
) -> Axes:
    """Score of each way of splitting the neurons; every split is a point.

    Args:
        frame: Columns ``ranking`` (``importance``, ``random`` or ``inverse``) and the metric
            (0 to 1), one row per split. Optional ``low`` and ``high`` are an interval of
            the mean (95%), the same in every row of a ranking.
        dense: The metric before conversion, drawn as a line.
        chance: The metric of guessing, drawn as a line unless it is NaN.
        metric: Column to draw.
        title: What the figure shows.
    """
    ax = style.axes()
    points = _sorted(frame.assign(value=100 * frame[metric]), "ranking", [*MARKERS])
    names = style.strip(ax, points, "ranking", "value", colors=_BY_NAME, markers=MARKERS)
    of = points.groupby("ranking", sort=False)
    if {"low", "high"} <= set(frame):
        for place, (name, (low, high)) in enumerate((100 * of[["low", "high"]].first()).iterrows()):
            label = "95% interval of the mean" if place == 0 else None
            across = [place - 0.4, place + 0.4]
            ax.fill_between(across, low, high, color=_BY_NAME[name], alpha=0.2, lw=0, label=label)
    style.reference(ax, 100 * dense, "before conversion", color=COLORS["dense"])
    if chance is not None and not np.isnan(chance):
        style.reference(ax, 100 * chance, "guessing", color=COLORS["random"])
    levels = of["value"].agg(["mean", "size"]).itertuples()
    labels = [f"{name}\nmean {mean:.1f} (n = {n})" for name, mean, n in levels]
    ax.set_xticks(range(len(names)), labels)
    ax.set(xlabel="", ylabel=f"{metric}, %")
    ax.margins(y=0.12)
    style.legend_above(ax, 1)
    style.headline(ax, title)
    return ax


def constructions(
    frame: pd.DataFrame, *, dense: float, metric: str = "accuracy", title: str = ""
) -> Axes:
    """Score of each way to build experts, a row each: every run, their mean, and where it began.

    Args:
        frame: Columns ``name`` and the metric (0 to 1), one row per run, and for trained models
            ``converted_<metric>``; names that end in ", none shared" are drawn hollow.
        dense: The metric before conversion, drawn as a line.
        metric: Column to draw.
        title: What the figure shows.
    """
    names = list(dict.fromkeys(frame["name"]))
    ax = style.axes((WIDE[0], 1.1 + 0.3 * len(names)))
    points = frame.assign(value=100 * frame[metric])
    colors = {name: _BY_NAME.get(name.partition(",")[0], COLORS["moebert"]) for name in names}
    hollow = [name for name in names if name.endswith("none shared")]
    style.strip(ax, points, "name", "value", colors=colors, hollow=hollow, rows=True)
    means = points.groupby("name", sort=False)["value"].mean()
    if (before := f"converted_{metric}") in frame:
        start = 100 * frame.groupby("name", sort=False)[before].mean()
        ax.hlines(range(len(names)), start, means, color=COLORS["dropped"], lw=1.6, zorder=1)
        ax.plot(start, range(len(names)), "|", color=COLORS["paper"], ms=9, mew=1.4, zorder=2)
    ax.axvline(100 * dense, label="before conversion", **_DASHED)
    ax.set_yticks(range(len(names)), [f"{name}   {mean:.1f}" for name, mean in means.items()])
    ax.set(xlabel=f"{metric}, % (beside the names: mean)", ylabel="")
    ax.margins(x=0.08)
    style.legend_above(ax, 1)
    style.headline(ax, title)
    return ax


def by_shared(
    frame: pd.DataFrame, *, dense: float | None = None, metric: str = "accuracy", title: str = ""
) -> Axes:
    """Score against the number of shared neurons, one line per way of splitting.

    Args:
        frame: Columns ``n_shared``, ``ranking`` and the metric (0 to 1); several rows of
            one pair are splits or seeds, and each is a point.
        dense: The metric before conversion, drawn as a line.
        metric: Column to draw.
        title: What the figure shows.
    """
    ax, points = style.axes(), frame.assign(value=100 * frame[metric])
    both = {"x": "n_shared", "y": "value", "hue": "ranking", "palette": _BY_NAME, "ax": ax}
    both["legend"] = False
    sns.scatterplot(points, style="ranking", markers=MARKERS, s=22, alpha=0.6, linewidth=0, **both)
    sns.lineplot(points, errorbar=None, **both)
    if dense is not None:
        style.reference(ax, 100 * dense, "before conversion", color=COLORS["dense"])
    shared = sorted(set(frame["n_shared"]))
    ax.set(xlabel="shared neurons", ylabel=f"{metric}, %", xticks=shared)
    last = points[points["n_shared"] == shared[-1]].groupby("ranking")["value"].mean()
    style.label_ends(ax, {name: (shared[-1], y, _BY_NAME[name]) for name, y in last.items()})
    style.headline(ax, title)
    return ax


def sharing_in_words(frame: pd.DataFrame, metric: str) -> str:
    """For :func:`by_shared`: importance against random, with the fewest and the most shared."""
    means = 100 * frame.pivot_table(index="n_shared", columns="ranking", values=metric)
    lead = (means["importance"] - means["random"]).sort_index()
    few, many = (f"{style.above_or_below(gap)} random" for gap in (lead.iloc[0], lead.iloc[-1]))
    start = f"With {lead.index[0]} shared neurons, importance scores {few}"
    return f"{start}; with {lead.index[-1]}, {many}"


def beside_paper(
    frame: pd.DataFrame,
    figure: str,
    *,
    metric: str = "accuracy",
    dense: float | None = None,
    title: str = "",
) -> Figure:
    """An ablation here (left) and in the paper (right): another task, so another axis.

    Both vertical axes span the same number of points, so equal slopes are equal effects. Places
    are evenly spaced, as in the paper. Means of numbers are joined by a line, of names are not.

    Args:
        frame: The setting that the figure varies (``paper_numbers.FIGURE_SETTINGS``) and the
            metric (0 to 1) as columns, one row per run.
        figure: Key of ``paper_numbers.FIGURES``, ``"figure2a"`` to ``"figure3c"``.
        metric: Column to draw.
        dense: The metric before conversion, drawn as a line on the left.
        title: What the figure shows.
    """
    paper, setting = FIGURES[figure], FIGURE_SETTINGS[figure]
    fig, (here, there) = style.panels(2, per_row=2, height=2.6)
    is_number = pd.api.types.is_numeric_dtype(frame[setting])
    order = sorted(set(frame[setting])) if is_number else [*paper, *frame[setting]]
    points = _sorted(frame.assign(value=100 * frame[metric]), setting, order)
    style.strip(here, points, setting, "value", colors=_BY_NAME, markers=MARKERS)
    means = points.groupby(setting, sort=False)["value"].mean()
    if is_number:
        here.plot(range(len(means)), means, color=COLORS["moebert"], lw=1)
    there.plot(range(len(paper)), [*paper.values()], ls="-" if is_number else "", lw=1, **DIAMOND)
    if dense is not None:
        here.axhline(100 * dense, **_DASHED)
    for ax, values, digits in ((here, means, 1), (there, pd.Series(paper), 2)):
        names = style.broken(values.index) if max(len(means), len(paper)) > 3 else values.index
        pairs = zip(names, values, strict=True)
        labels = [f"{name}\n{value:.{digits}f}" for name, value in pairs]
        ax.set_xticks(range(len(labels)), labels)
        ax.set(xlabel=f"{FIGURE_AXES[figure]} (below: mean)", xlim=(-0.5, len(labels) - 0.5))
    n_runs = points[setting].value_counts().max()
    here.set_ylabel(f"{metric}, %")
    runs = "here, one run" if n_runs == 1 else f"here, {n_runs} runs and mean"
    here.set_title(runs + "; dashed: before conversion" * (dense is not None), fontsize=10)
    there.set_ylabel("accuracy on MNLI, both sets, %")
    there.set_title(f"{figure.replace('figure', 'Figure ')}, mean of three runs", fontsize=10)
    _same_span(here, there)
    style.headline(fig, title)
    return fig


def _same_span(*both: Axes) -> None:
    """Give the axes the same span in points, each around its own data."""
    for ax in both:
        ax.margins(y=0.14)
    limits = [ax.get_ylim() for ax in both]
    span = max(1.2, *(high - low for low, high in limits))
    for ax, (low, high) in zip(both, limits, strict=True):
        ax.set_ylim((low + high - span) / 2, (low + high + span) / 2)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def gaps(frame: pd.DataFrame, *, title: str = "") -> Axes:
    """Student minus teacher on each task: runs as points, the paper's values as diamonds.

    ``frame`` is that of ``verdicts.gaps``: ``task`` (rows of the figure, in this order), ``gap``
    in points, and ``source``: ``here`` (one row per run) or ``paper``.
    """
    names = list(dict.fromkeys(frame["task"]))
    ax = style.axes((SINGLE[0] + 1.0, 1.2 + 0.27 * len(names)))
    ax.axvline(0, **_DASHED)
    ours = {"color": COLORS["moebert"], "marker": "o", "alpha": 0.75, "label": "here, every run"}
    looks = {"paper": {"label": "the paper", **DIAMOND}, "here": ours}
    for source, rows in frame.groupby("source", sort=False):
        ax.plot(rows["gap"], rows["task"].map(names.index), ls="", **looks[source])
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="student minus teacher, points", ylim=(len(names) - 0.5, -0.5))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y")
    style.legend_above(ax, 2)
    style.headline(ax, title)
    return ax


def gaps_in_words(frame: pd.DataFrame) -> str:
    """For :func:`gaps`: in how many results the student is below its teacher."""
    below = frame.groupby(["source", "task"])["gap"].mean() < 0
    counts = {source: f"{rows.sum()} of {len(rows)}" for source, rows in below.groupby("source")}
    here, paper = counts.get("here", "0 of 0"), counts["paper"]
    return f"The student is below its teacher in {here} results here, in {paper} in the paper"


def switches(differences: pd.DataFrame, *, unit: str = "points", title: str = "") -> Axes:
    """What a switch changes: every seed's paired difference a point, their mean a bar.

    ``differences`` has the columns ``switch`` and ``difference``, one row per pair of runs;
    ``unit`` is the label of the horizontal axis.
    """
    ax = style.axes((WIDE[0] - 1, 1.3 + 0.4 * differences["switch"].nunique()))
    ax.axvline(0, **_DASHED)
    style.strip(ax, differences, "switch", "difference", rows=True)
    widest = max(1.0, 1.15 * float(differences["difference"].abs().max()))
    ax.set(xlabel=unit, ylabel="", xlim=(-widest, widest))
    ax.tick_params(axis="y", length=0)
    style.headline(ax, title)
    return ax


#: Verdicts as colours: the method's own, its opposite's, and chance's.
VERDICTS = {
    REPRODUCED: COLORS["moebert"],
    CONTRADICTED: COLORS["inverse"],
    UNDECIDED: COLORS["random"],
    NO_RUNS: COLORS["random"],
}
_SHADE = "#EEF0F9"  # COLORS["own"], paler, so that points are seen on it


def forest(compared: pd.DataFrame, pairs: pd.DataFrame, *, title: str = "") -> Axes:
    """Differences of every comparison in points: each pair, the mean, the interval, the paper.

    The interval is that of ``verdicts.judge``. The horizontal axis is linear up to one point and
    logarithmic beyond, since the paper's differences are tenths of a point and those of a short
    training can be tens.

    Args:
        compared: From ``verdicts.compare``.
        pairs: Columns ``comparison`` and ``difference``, one row per pair of runs.
        title: What the figure shows.
    """
    ax = style.axes((WIDE[0], 1.5 + 0.25 * len(compared)))
    ax.set_xscale("symlog", linthresh=1, linscale=0.9)
    drawn = [*pairs["difference"].abs(), *compared[["paper", "low", "high"]].abs().max(), 1.0]
    reach = 1.35 * np.nanmax(drawn)
    colors = dict(zip(compared["comparison"], compared["verdict"].map(VERDICTS), strict=True))
    rows = compared[["comparison"]].merge(pairs, how="left")
    style.strip(ax, rows, "comparison", "difference", colors=colors, rows=True, middle=None)
    for place, row in enumerate(compared.itertuples()):
        low, high = np.clip(CLAIMED[row.kind], -reach, reach)
        ax.barh(place, high - low, left=low, height=0.9, color=_SHADE, lw=0, zorder=0)
        if np.isfinite(row.low):
            ax.hlines(place, row.low, row.high, color=colors[row.comparison], lw=2)
        if row.pairs > 1:
            ax.vlines(row.mean, place - 0.34, place + 0.34, color=colors[row.comparison], lw=2)
        text = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9}
        pale = row.verdict in (UNDECIDED, NO_RUNS)
        text["color"] = COLORS["paper"] if pale else VERDICTS[row.verdict]
        ax.annotate(row.verdict, (1.01, place), annotation_clip=False, **text)
    ax.plot(compared["paper"], range(len(compared)), zorder=4, ls="", **{**DIAMOND, "ms": 5})
    ax.axvline(0, color=INK, lw=0.9, zorder=1)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if tick < reach]
    ax.set_xticks([*(-tick for tick in ticks[::-1]), 0, *ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(_signed))
    ax.set(xlim=(-reach, reach), ylim=(len(compared) - 0.4, -0.6), ylabel="")
    ax.set_xlabel("first minus second, points (linear up to 1, logarithmic beyond)")
    color = {"color": COLORS["moebert"]}
    handles = [
        Line2D([], [], ls="", marker="o", ms=4, alpha=0.75, label="a pair of runs", **color),
        Line2D([], [], lw=2, label="mean, and the 95% interval that decides", **color),
        Line2D([], [], ls="", label="the paper", **{**DIAMOND, "ms": 5}),
        Patch(color=_SHADE, lw=0, label="as claimed (~: within half a point)"),
    ]
    style.legend_above(ax, 2, handles)
    style.headline(ax, title)
    return ax


def _signed(value: float, _: object) -> str:
    return f"{value:+g}".replace("-", "−") if value else "0"
