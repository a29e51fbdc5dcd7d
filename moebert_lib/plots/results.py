"""Figures that compare runs: splits, and ablations beside the paper (Figs. 2 and 3).

Every run is drawn as a point, with the mean over seeds; the paper's values are hollow
diamonds. Scores come in as 0 to 1 and are drawn in %.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from moebert_lib.config.paper_numbers import FIGURE_AXES, FIGURE_SETTINGS, FIGURES
from moebert_lib.evidence.verdicts import CLAIMED, CONTRADICTED, NO_RUNS, REPRODUCED, UNDECIDED
from moebert_lib.plots.style import (
    COLORS,
    DIAMOND,
    INK,
    MARKERS,
    WIDE,
    axes,
    dots,
    headline,
    label_ends,
    legend_above,
    panels,
    reference,
    spread,
)

#: Colour of a way of splitting; other settings are drawn as MoEBERT.
_BY_NAME = {name: COLORS[name] for name in ("importance", "random", "inverse")}


def after_conversion(
    frame: pd.DataFrame,
    *,
    dense: float,
    chance: float | None = None,
    metric: str = "accuracy",
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Score of each way of splitting the neurons; every split is a point.

    Args:
        frame: Columns ``ranking`` (``importance``, ``random`` or ``inverse``) and the metric
            (0 to 1), one row per split. Optional ``low`` and ``high`` hold an interval of
            the mean (95%), the same in every row of a ranking.
        dense: The metric before conversion, drawn as a line.
        chance: The metric of guessing, drawn as a line unless it is NaN.
        metric: Column to draw.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax)
    order = [name for name in ("importance", "random", "inverse") if name in set(frame["ranking"])]
    for place, name in enumerate(order):
        rows = frame[frame["ranking"] == name]
        color = _BY_NAME[name]
        if {"low", "high"} <= set(rows) and rows["low"].notna().all():
            low, high = 100 * rows["low"].iloc[0], 100 * rows["high"].iloc[0]
            ax.fill_between(
                [place - 0.24, place + 0.24],
                low,
                high,
                color=color,
                alpha=0.2,
                lw=0,
                label="95% interval of the mean",
            )
        dots(ax, place, 100 * rows[metric], color=color, marker=MARKERS[name])
        mean_beside(ax, place + (0.25 if len(rows) > 1 else 0.06), 100 * rows[metric].mean())
    reference(ax, 100 * dense, "before conversion", color=COLORS["dense"])
    if chance is not None and chance == chance:
        reference(ax, 100 * chance, "guessing", color=COLORS["random"])
    counts = frame["ranking"].value_counts()
    ax.set_xticks(range(len(order)), [_counted(name, counts[name]) for name in order])
    ax.set(xlim=(-0.5, len(order) - 0.3), ylabel=f"{metric}, %")
    ax.margins(y=0.12)
    headline(ax, title, legend_rows=legend_above(ax, 1, ax.get_legend_handles_labels()[0][:1]))
    return ax


def constructions(
    frame: pd.DataFrame,
    *,
    dense: float,
    metric: str = "accuracy",
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Score of each way to build experts, a row each: every run, their mean, and where it began.

    Args:
        frame: Columns ``name`` and the metric (0 to 1), one row per run, and of trained models
            ``converted_<metric>``; names that end in ", none shared" are drawn hollow.
        dense: The metric before conversion, drawn as a line.
        metric: Column to draw.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    names = list(dict.fromkeys(frame["name"]))
    ax = axes(ax, (WIDE[0], 1.1 + 0.3 * len(names)))
    for place, name in enumerate(names):
        rows = frame[frame["name"] == name]
        color = _BY_NAME.get(name.partition(",")[0], COLORS["moebert"])
        face = "white" if name.endswith("none shared") else color
        points, y = 100 * rows[metric].to_numpy(), place + spread(len(rows))
        ax.plot(points, y, "o", ms=5, mfc=face, mec=color, ls="", zorder=3)
        ax.plot([points.mean()] * 2, [place - 0.32, place + 0.32], color=color, lw=2.2, zorder=4)
        ax.annotate(
            f"{points.mean():.1f}",
            (points.max(), place),
            xytext=(7, 0),
            fontsize=9,
            textcoords="offset points",
            va="center",
            zorder=5,
            bbox=dict(fc="white", ec="none", pad=0.4, alpha=0.85),
        )
        if (before := f"converted_{metric}") in rows:
            start = 100 * rows[before].mean()
            ax.plot(start, place, "|", color=COLORS["paper"], ms=9, mew=1.4, zorder=2)
            ax.plot([start, points.mean()], [place] * 2, color=COLORS["dropped"], lw=1.6, zorder=1)
    ax.axvline(100 * dense, color=COLORS["dense"], lw=1.0, ls=(0, (4, 3)), zorder=1)
    ax.annotate(
        "before conversion",
        (100 * dense, -0.75),
        xytext=(-4, 0),
        ha="right",
        fontsize=9,
        textcoords="offset points",
        va="center",
        color=COLORS["dense"],
    )
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.4, -1.1), xlabel=f"{metric}, %")
    ax.margins(x=0.08)
    headline(ax, title)
    return ax


def by_shared(
    frame: pd.DataFrame,
    *,
    dense: float | None = None,
    metric: str = "accuracy",
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Score against the number of shared neurons, one line per way of splitting.

    Args:
        frame: Columns ``n_shared``, ``ranking`` and the metric (0 to 1); several rows of
            one pair are splits or seeds, and each is a point.
        dense: The metric before conversion, drawn as a line.
        metric: Column to draw.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax, ends = axes(ax), {}
    for name, rows in frame.groupby("ranking", sort=False):
        color = _BY_NAME.get(str(name), COLORS["moebert"])
        marker = MARKERS.get(str(name), "o")
        ax.plot(rows["n_shared"], 100 * rows[metric], marker, color=color, ls="", alpha=0.55, ms=4)
        mean = rows.groupby("n_shared")[metric].mean()
        ax.plot(mean.index, 100 * mean, "-", color=color)
        ends[str(name)] = (mean.index[-1], 100 * mean.iloc[-1], color)
    if dense is not None:
        reference(ax, 100 * dense, "before conversion", color=COLORS["dense"])
    ax.set(xlabel="shared neurons", ylabel=f"{metric}, %", xticks=sorted(set(frame["n_shared"])))
    label_ends(ax, ends)
    headline(ax, title)
    return ax


def beside_paper(
    frame: pd.DataFrame,
    figure: str,
    *,
    metric: str = "accuracy",
    dense: float | None = None,
    fig: Figure | SubFigure | None = None,
    title: str = "",
) -> Figure | SubFigure:
    """An ablation here and in the paper, side by side: another task, so another axis.

    Both vertical axes span the same number of points, so equal slopes are equal effects.
    Places are evenly spaced, as in the paper. Numbers are joined by a line, names are not.

    Args:
        frame: The setting that the figure varies (``paper.FIGURE_SETTINGS``) and the metric
            (0 to 1) as columns, one row per run.
        figure: Key of ``paper.FIGURES``, ``"figure2a"`` to ``"figure3c"``.
        metric: Column to draw.
        dense: The metric before conversion, drawn as a line on the left.
        fig: Where to draw; none makes a new figure.
        title: The finding.

    Returns:
        The figure: left these runs, right the paper.
    """
    paper, setting = FIGURES[figure], FIGURE_SETTINGS[figure]
    fig, (here, there) = panels(fig, 2, per_row=2, height=2.6)
    joined = pd.api.types.is_numeric_dtype(frame[setting])
    values = _by_place(frame, setting, metric, first=() if joined else tuple(paper))
    _runs_panel(here, values, joined=joined)
    if dense is not None:
        free = _far(values, 100 * dense)  # the words go where the points leave room
        reference(here, 100 * dense, "before conversion", color=COLORS["dense"], right=free)
    _paper_panel(there, paper, joined=joined)
    for ax, keys in ((here, values), (there, paper)):
        crowded = max(len(values), len(paper)) > 3
        names = [str(key).replace("-", "-\n") if crowded else str(key) for key in keys]
        ax.set_xticks(range(len(names)), names)
        ax.set(xlabel=FIGURE_AXES[figure], xlim=(-0.55, len(names) - 0.35))
    most = max(len(points) for points in values.values())
    here.set_ylabel(f"{metric}, %")
    here.set_title("here, one run" if most == 1 else f"here, {most} runs and mean", fontsize=10)
    there.set_ylabel("accuracy on MNLI, both sets, %")
    there.set_title(f"{figure.replace('figure', 'Figure ')}, mean of three runs", fontsize=10)
    _same_span(here, there)
    headline(fig, title)
    return fig


def _runs_panel(ax: Axes, values: dict[str | int, np.ndarray], *, joined: bool) -> None:
    means = [points.mean() for points in values.values()]
    for place, (key, points) in enumerate(values.items()):
        color, marker = _BY_NAME.get(str(key), COLORS["moebert"]), MARKERS.get(str(key), "o")
        dots(ax, place, points, color=color, marker=marker)
        step = means[place + 1] - means[place] if joined and place + 1 < len(means) else None
        mean_beside(ax, place + (0.25 if len(points) > 1 else 0.06), means[place], step=step)
    if joined:
        ax.plot(range(len(means)), means, color=COLORS["moebert"], lw=1)


def _paper_panel(ax: Axes, paper: Mapping[str | int, float], *, joined: bool) -> None:
    places = range(len(paper))
    ax.plot(places, list(paper.values()), ls="-" if joined else "", lw=1.0, **DIAMOND)
    for place, value in zip(places, paper.values(), strict=True):
        ax.annotate(
            f"{value:.2f}",
            (place, value),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
        )


def mean_beside(ax: Axes, x: float, value: float, *, step: float | None = None) -> None:
    """Print a mean beside its bar; below a line that goes up by ``step``, above one that falls."""
    away = 0 if step is None else -1 if step >= 0 else 1
    ax.annotate(
        f"{value:.1f}",
        (x, value),
        fontsize=9,
        xytext=(3, 5 * away),
        textcoords="offset points",
        ha="left",
        va={-1: "top", 0: "center", 1: "bottom"}[away],
        zorder=6,
        bbox=dict(fc="white", ec="none", pad=0.4, alpha=0.85 if step is None else 0),
    )


def _far(values: Mapping[str | int, np.ndarray], level: float) -> bool:
    """Whether the last place's points are further from ``level`` than the first place's."""
    gaps = [np.abs(points - level).min() for points in values.values()]
    return bool(gaps[-1] >= gaps[0])


def _same_span(*both: Axes) -> None:
    """Give the axes the same span in points, each around its own data."""
    spans = [ax.dataLim.intervaly for ax in both]
    span = 1.35 * max(1.0, *(high - low for low, high in spans))
    for ax, (low, high) in zip(both, spans, strict=True):
        middle = (low + high) / 2 + 0.04 * span  # room for the numbers above
        ax.set_ylim(middle - span / 2, middle + span / 2)
        ax.yaxis.set_major_locator(MaxNLocator(5))


def _by_place(
    frame: pd.DataFrame, x: str, metric: str, *, first: tuple[str | int, ...]
) -> dict[str | int, np.ndarray]:
    """Values in % by place: ``first`` in its order, then numbers sorted, names as they come."""
    groups = frame.groupby(x, sort=not first)[metric]
    order = [key for key in first if key in groups.groups]
    order += [key for key, _ in groups if key not in order]
    return {key: 100 * groups.get_group(key).to_numpy() for key in order}


def _counted(name: str, n: int) -> str:
    return name if n == 1 else f"{name}\n({n} runs)"


# The figure of all claims: every comparison of two arms, its pairs and the paper's step.

#: Verdicts as colours: the method's own, its opposite's, and chance's.
VERDICTS = {
    REPRODUCED: COLORS["moebert"],
    CONTRADICTED: COLORS["inverse"],
    UNDECIDED: COLORS["random"],
    NO_RUNS: COLORS["random"],
}
_SHADE = "#EEF0F9"  # COLORS["own"] so pale that points stand out
_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)


def forest(
    compared: pd.DataFrame, pairs: pd.DataFrame, *, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Differences of every comparison in points: each pair, the mean, the interval, the paper.

    The interval is the one that decides, of whatever pairs the comparison has (``verdicts.judge``).
    The horizontal axis is linear up to one point and logarithmic beyond, since the paper's
    steps are tenths and a short training's can be tens. Comparisons of one claim stand together.

    Args:
        compared: As ``verdicts.compare`` returns it.
        pairs: Columns ``comparison`` and ``difference``, one row per pair.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    groups = (compared["claim"] != compared["claim"].shift()).cumsum()
    places = np.arange(len(compared)) + 0.55 * groups.to_numpy()
    ax = axes(ax, (WIDE[0], 1.5 + 0.22 * (places[-1] + 1 if len(places) else 1)))
    ax.set_xscale("symlog", linthresh=1, linscale=0.9)
    drawn = [*pairs["difference"].abs(), *compared[["paper", "low", "high"]].abs().max(), 1.0]
    reach = 1.35 * max(value for value in drawn if value == value)
    for place, row in zip(places, compared.itertuples(), strict=True):
        low, high = np.clip(CLAIMED[row.kind], -reach, reach)
        ax.barh(place, high - low, left=low, height=0.9, color=_SHADE, lw=0, zorder=0)
        _row(ax, place, row, pairs.loc[pairs["comparison"] == row.comparison, "difference"])
    ax.axvline(0, color=INK, lw=0.9, zorder=1)
    ax.set_yticks(places, compared["comparison"])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set(xlim=(-reach, reach), ylim=(places[-1] + 0.8, places[0] - 0.8))
    marks = [tick for tick in _TICKS if tick < reach]
    ax.xaxis.set_major_locator(FixedLocator(sorted({s * tick for tick in marks for s in (-1, 1)})))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _signed(value)))
    ax.set_xlabel("first minus second, points (linear up to 1, logarithmic beyond)")
    headline(ax, title, legend_rows=legend_above(ax, 2, _handles()))
    return ax


def _row(ax: Axes, place: float, row: tuple, gaps: pd.Series) -> None:
    color = VERDICTS[row.verdict]
    pale = COLORS["paper"] if color == COLORS["random"] else color  # grey letters must be readable
    ax.annotate(
        row.verdict,
        (1.01, place),
        xycoords=("axes fraction", "data"),
        color=pale,
        va="center",
        fontsize=9,
        annotation_clip=False,
    )
    ax.plot(gaps, np.full(len(gaps), place), "o", color=color, ms=4, alpha=0.7, mew=0, zorder=2)
    if np.isfinite(row.low):
        ax.plot([row.low, row.high], [place] * 2, color=color, lw=2, zorder=3)
    if len(gaps) > 1:
        ax.plot([row.mean] * 2, [place - 0.34, place + 0.34], color=color, lw=2, zorder=3)
    ax.plot(row.paper, place, zorder=4, ls="", **{**DIAMOND, "ms": 5})


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", "−") if value else "0"


def _handles() -> list:
    ink = dict(color=COLORS["moebert"])
    return [
        Line2D([], [], ls="", marker="o", ms=4, alpha=0.7, mew=0, label="a pair of runs", **ink),
        Line2D([], [], lw=2, label="mean, and the 95% interval that decides", **ink),
        Line2D([], [], ls="", label="the paper", **{**DIAMOND, "ms": 5}),
        Patch(color=_SHADE, lw=0, label="as claimed (~: within half a point)"),
    ]
