"""Figures that compare runs: splits, ablations beside the paper, speed (Figs. 2, 3, 4).

Every run is drawn as a point, with the mean over seeds; the paper's values are hollow
diamonds. Scores come in as 0 to 1 and are drawn in %.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from moebert_lib.paper import DIGITISED, FIGURE_AXES, FIGURE_SETTINGS, FIGURES
from moebert_lib.plots import (
    COLORS,
    DIAMOND,
    SINGLE,
    axes,
    dots,
    headline,
    legend_above,
    panels,
    reference,
)

#: Colour of a way of splitting; other settings are drawn as MoEBERT.
_BY_NAME = {name: COLORS[name] for name in ("importance", "random", "inverse")}

#: Variants of ``bench`` that share a colour with another are told apart by their dashes.
_DASHES = {"moebert gate-sentence": (4, 2), "equal FLOPs": (4, 2), "half depth": (1, 1.5)}


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
        chance: The metric of guessing, drawn as a line.
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
            ax.fill_between([place - 0.24, place + 0.24], low, high, color=color, alpha=0.2, lw=0,
                            label="95% interval of the mean")  # fmt: skip
        dots(ax, place, 100 * rows[metric], color=color)
        _value(ax, place + (0.25 if len(rows) > 1 else 0.06), 100 * rows[metric].mean())
    reference(ax, 100 * dense, "before conversion", color=COLORS["dense"])
    if chance is not None:
        reference(ax, 100 * chance, "guessing", color=COLORS["random"])
    counts = frame["ranking"].value_counts()
    ax.set_xticks(range(len(order)), [_counted(name, counts[name]) for name in order])
    ax.set(xlim=(-0.5, len(order) - 0.3), ylabel=f"{metric}, %")
    ax.margins(y=0.12)
    headline(ax, title, legend_rows=legend_above(ax, 1, ax.get_legend_handles_labels()[0][:1]))
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
    ax = axes(ax)
    for name, rows in frame.groupby("ranking", sort=False):
        color = _BY_NAME.get(str(name), COLORS["moebert"])
        ax.plot(rows["n_shared"], 100 * rows[metric], ".", color=color, alpha=0.55, ms=6)
        mean = rows.groupby("n_shared")[metric].mean()
        ax.plot(mean.index, 100 * mean, "-", color=color, label=str(name))
    if dense is not None:
        reference(ax, 100 * dense, "before conversion", color=COLORS["dense"])
    ax.set(xlabel="shared neurons", ylabel=f"{metric}, %", xticks=sorted(set(frame["n_shared"])))
    headline(ax, title, legend_rows=legend_above(ax, 3))
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
        reference(here, 100 * dense, "before conversion", color=COLORS["dense"])
    _paper_panel(there, paper, joined=joined)
    for ax, keys in ((here, values), (there, paper)):
        crowded = max(len(values), len(paper)) > 3
        names = [str(key).replace("-", "-\n") if crowded else str(key) for key in keys]
        ax.set_xticks(range(len(names)), names)
        ax.set(xlabel=FIGURE_AXES[figure], xlim=(-0.55, len(names) - 0.45))
    most = max(len(points) for points in values.values())
    here.set_ylabel(f"{metric}, %")
    here.set_title("here, one run" if most == 1 else f"here, {most} runs and mean", fontsize=10)
    there.set_ylabel("accuracy on MNLI, both sets, %")
    there.set_title(f"{figure.replace('figure', 'Figure ')}, mean of three runs", fontsize=10)
    _same_span(here, there)
    headline(fig, title)
    return fig


def speed(
    timings: pd.DataFrame,
    *,
    limit: str = "equal FLOPs",
    ratios: Mapping[str, float] | None = None,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Examples a second of each model (Fig. 4); every timing is a point, the median a bar.

    Args:
        timings: Columns ``variant`` and ``seconds`` of one example, as ``bench.inference``
            returns them. The first variant is the one that ``ratios`` refer to.
        limit: A variant drawn as a line: what no router can beat, a dense FFN as narrow as
            one expert.
        ratios: The paper's speed over BERT, by variant: hollow diamonds.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    names = [name for name in dict.fromkeys(timings["variant"]) if name != limit]
    ax = axes(ax, (SINGLE[0] + 0.8, 1.3 + 0.42 * len(names)))
    rates = {name: 1 / rows.to_numpy() for name, rows in timings.groupby("variant")["seconds"]}
    medians = {name: float(np.median(rate)) for name, rate in rates.items()}
    for place, name in enumerate(names):
        color = variant_color(name)
        ax.plot(rates[name], np.full(len(rates[name]), place), "o", color=color, alpha=0.6)
        ax.plot([medians[name]] * 2, [place - 0.3, place + 0.3], color=color, lw=2.2)
        ax.annotate(f"{medians[name]:.3g}", (medians[name], place - 0.32), ha="center",
                    va="bottom", fontsize=9)  # fmt: skip
        if name in (ratios or {}):
            ax.plot(medians[names[0]] * ratios[name], place, ls="", zorder=5, **DIAMOND,
                    label=f"paper's ratio to BERT ({DIGITISED})")  # fmt: skip
    if limit in medians:
        ax.axvline(medians[limit], color=COLORS["dense"], lw=1, ls=(0, (4, 3)),
                   label=f"{limit}, dense: {medians[limit]:.3g}")  # fmt: skip
    handles = {h.get_label(): h for h in ax.get_legend_handles_labels()[0]}
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="examples a second", ylim=(len(names) - 0.45, -0.75))
    ax.set_xlim(left=0)
    ax.tick_params(axis="y", length=0)
    headline(ax, title, legend_rows=legend_above(ax, 1, list(handles.values())))
    return ax


def latency(
    timings: pd.DataFrame,
    *,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Milliseconds of one sentence against its tokens; every timing is a point.

    Args:
        timings: Columns ``variant``, ``tokens`` and ``seconds``, one row per timing.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax)
    for name, rows in timings.groupby("variant", sort=False):
        color = variant_color(str(name))
        ax.plot(rows["tokens"], 1000 * rows["seconds"], ".", color=color, alpha=0.4, ms=5)
        median = 1000 * rows.groupby("tokens")["seconds"].median()
        line = (0, _DASHES.get(str(name), ()))
        ax.plot(median.index, median, color=color, label=str(name), ls=line)
    ax.set(xlabel="tokens in the sentence", ylabel="ms per sentence")
    ax.set_xticks(sorted(set(timings["tokens"])))
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    headline(ax, title, legend_rows=legend_above(ax, 2))
    return ax


def variant_color(name: str) -> str:
    """Colour of a variant of ``bench``: ink for dense, indigo for MoEBERT, grey for others."""
    if name.lower().startswith("moebert"):
        return COLORS["moebert"]
    return COLORS["dense" if name == "dense" else "other"]


def _runs_panel(ax: Axes, values: dict[str | int, np.ndarray], *, joined: bool) -> None:
    means = [points.mean() for points in values.values()]
    for place, (key, points) in enumerate(values.items()):
        dots(ax, place, points, color=_BY_NAME.get(str(key), COLORS["moebert"]))
        if joined:  # on the side that the line does not leave on
            rising = means[place] < means[min(place + 1, len(means) - 1)]
            _value(ax, place + (-0.05 if rising else 0.05), means[place], above=points.max(),
                   align="right" if rising else "center")  # fmt: skip
        else:
            _value(ax, place + (0.25 if len(points) > 1 else 0.06), means[place])
    if joined:
        ax.plot(range(len(means)), means, color=COLORS["moebert"], lw=1)


def _paper_panel(ax: Axes, paper: Mapping[str | int, float], *, joined: bool) -> None:
    places = range(len(paper))
    ax.plot(places, list(paper.values()), ls="-" if joined else "", lw=1.0, **DIAMOND)
    for place, value in zip(places, paper.values(), strict=True):
        _value(ax, place, value, above=value, digits=2)


def _value(
    ax: Axes, x: float, value: float, *, above: float | None = None, digits: int = 1,
    align: str = "center",
) -> None:  # fmt: skip
    """Print a mean beside its bar, or above the highest point of its column."""
    beside = above is None
    ax.annotate(
        f"{value:.{digits}f}", (x, value if beside else above), fontsize=9,
        xytext=(4, 0) if beside else (0, 6), textcoords="offset points",
        ha="left" if beside else align, va="center" if beside else "bottom", zorder=6,
        bbox=dict(fc="white", ec="none", pad=0.6, alpha=0.85),  # readable across a dashed line
    )  # fmt: skip


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
