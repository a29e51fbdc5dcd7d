"""Figures about importance: how it is spread, what removal costs, how stable it is (Eq. 4).

Importance scores have shape ``(L, F)``: layers by neurons, in units of the loss summed over
examples. Only order and shares matter.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from moebert_lib.plots.style import (
    COLORS,
    INK,
    MARKERS,
    RAMP,
    SINGLE,
    WIDE,
    all_equal,
    axes,
    depth_colors,
    headline,
    ink_on,
    legend_above,
    legend_under,
    panels,
    reference,
    spread,
)

#: What becomes of a neuron, and how figures say it.
PARTS = {"shared": "shared by all experts", "own": "one expert's own", "dropped": "dropped"}

_TINT = 0.4  # of the parts behind a curve

#: What is removed first, and the colour of what is therefore kept.
REMOVAL_COLORS = {
    "least important first": COLORS["importance"],
    "random": COLORS["random"],
    "most important first": COLORS["inverse"],
}


def sorted_scores(
    scores: ArrayLike,
    *,
    n_shared: int,
    n_kept: int,
    fig: Figure | SubFigure | None = None,
    title: str = "",
) -> Figure | SubFigure:
    """Every layer's scores from most to least important, on a log scale.

    Args:
        scores: Shape ``(L, F)``.
        n_shared: Top neurons that every expert holds.
        n_kept: Distinct neurons that some expert holds, shared ones included.
        fig: Where to draw; none makes a new figure.
        title: The finding.

    Returns:
        The figure, one panel per layer.
    """
    scores = np.asarray(scores, dtype=float)
    few = len(scores) <= 6
    fig, layers = panels(
        fig,
        len(scores),
        per_row=3 if few else 4,
        height=1.9 if few else 1.7,
        head=0.8,
        sharex=True,
        sharey=True,
    )
    for number, (layer, ax) in enumerate(zip(scores, layers, strict=True), start=1):
        score_curve(layer, n_shared=n_shared, n_kept=n_kept, ax=ax, names=False)
        ax.set_title(f"layer {number}", fontsize=10, pad=3)
        ax.set(xlabel="", ylabel="")
    fig.supxlabel("neurons, most important first", fontsize=10)
    fig.supylabel("importance (loss, summed)", fontsize=10)
    headline(fig, title, legend_rows=1)
    parts = [Patch(fc=(COLORS[part], _TINT), ec=INK, lw=0.4, label=t) for part, t in PARTS.items()]
    legend_under(fig, [*parts, Patch(alpha=0, label="(%: share of the layer's importance)")])
    return fig


def score_curve(
    scores: ArrayLike,
    *,
    n_shared: int,
    n_kept: int,
    ax: Axes | None = None,
    names: bool = True,
    title: str = "",
) -> Axes:
    """One layer's scores ``(F,)``, sorted, coloured by what becomes of the neurons.

    The share of importance that each part holds stands in it, with ``names`` also its name.
    Zero scores, as in a dead neuron, are not drawn: the axis is logarithmic.
    """
    ax = axes(ax)
    ordered = np.sort(np.asarray(scores, dtype=float))[::-1]
    ax.set_yscale("log")
    ax.plot(np.arange(len(ordered)), np.where(ordered > 0, ordered, np.nan), color=INK, lw=1.4)
    parts = {"shared": (0, n_shared), "own": (n_shared, n_kept), "dropped": (n_kept, len(ordered))}
    for name, (start, stop) in parts.items():
        if stop > start:
            ax.axvspan(start, stop, color=COLORS[name], alpha=_TINT, lw=0, zorder=0)
            held = ordered[start:stop].sum() / ordered.sum()
            ax.annotate(
                f"{name}\n{held:.0%}" if names else f"{held:.0%}",
                ((start + stop) / 2, 0.97),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=9 if names else 8,
            )
    ax.vlines([n_shared, n_kept], 0, 1, color=INK, lw=0.5, transform=ax.get_xaxis_transform())
    ax.set(
        xlim=(0, len(ordered)),
        xlabel="neurons, most important first",
        ylabel="importance (loss, summed)",
    )
    ax.margins(y=0.12)
    headline(ax, title)
    return ax


def mass_held(
    scores: ArrayLike,
    *,
    marks: Mapping[str, int] | None = None,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Share of a layer's importance held by its top neurons, one curve per layer.

    Args:
        scores: Shape ``(L, F)``.
        marks: Vertical lines, label to number of neurons, such as ``{"shared": 256}``.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax)
    ordered = np.sort(np.asarray(scores, dtype=float), axis=1)[:, ::-1]  # (L, F)
    n_layers, width = ordered.shape
    held = np.cumsum(ordered, axis=1) / ordered.sum(axis=1, keepdims=True)
    all_equal(ax, width)
    for number, color in enumerate(depth_colors(n_layers), start=1):
        ax.plot(
            np.arange(width + 1),
            100 * np.r_[0, held[number - 1]],
            color=color,
            lw=1.3,
            label=f"layer {number}",
        )
    for label, neurons in (marks or {}).items():
        ax.axvline(neurons, color=INK, lw=0.8, ls=(0, (4, 3)))
        ax.annotate(
            f"{label}: {neurons:,}",
            (neurons, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    ax.set(
        xlim=(0, width),
        ylim=(0, 100),
        xlabel="neurons kept, most important first",
        ylabel="importance held, %",
    )
    ax.legend(loc="lower right", ncols=1 if n_layers <= 6 else 2, labelspacing=0.25)
    headline(ax, title, legend_rows=1 if marks else 0)
    return ax


def removal_curves(
    frame: pd.DataFrame,
    *,
    chance: float | None = None,
    metric: str = "accuracy",
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """A metric while neurons are removed in three orders; every draw is drawn.

    Args:
        frame: Columns ``fraction`` (removed, 0 to 1), the metric (0 to 1), ``order`` (a
            key of ``REMOVAL_COLORS``) and ``draw`` (repeats of the random order).
        chance: The metric of guessing, 0 to 1; neither ``None`` nor NaN is drawn.
        metric: Column to draw.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax, WIDE)
    for (order, color), marker in zip(REMOVAL_COLORS.items(), MARKERS.values(), strict=True):
        rows = frame[frame["order"] == order]
        if rows.empty:
            continue
        draws = list(rows.groupby("draw"))
        for _, one in draws if len(draws) > 1 else []:
            one = one.sort_values("fraction")
            ax.plot(100 * one["fraction"], 100 * one[metric], color=color, lw=0.7, alpha=0.55)
        mean = rows.groupby("fraction")[metric].mean()
        label = order if len(draws) == 1 else f"{order} ({len(draws)} draws, mean)"
        ax.plot(100 * mean.index, 100 * mean, marker=marker, color=color, label=label)
    if chance is not None and not np.isnan(chance):
        reference(ax, 100 * chance, "guessing", color=COLORS["random"], right=False)
    ax.set(xlabel="neurons removed in every layer, %", ylabel=f"{metric}, %", xlim=(-2, 102))
    headline(ax, title, legend_rows=legend_above(ax, 3))
    return ax


def rank_agreement(
    frame: pd.DataFrame,
    *,
    measure: str = "rank agreement (Spearman's ρ)",
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """How far scores from few examples agree, against the number of examples.

    Args:
        frame: Columns ``n_examples``, ``agreement`` and ``layer`` (from 1); several rows of
            one layer and number are draws, and each is drawn.
        measure: What ``agreement`` is: the label of the vertical axis.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax)
    layers = sorted(frame["layer"].unique())
    for layer, color in zip(layers, depth_colors(len(layers)), strict=True):
        rows = frame[frame["layer"] == layer]
        ax.plot(rows["n_examples"], rows["agreement"], ".", color=color, ms=4, alpha=0.6)
        mean = rows.groupby("n_examples")["agreement"].mean()
        ax.plot(mean.index, mean, color=color, lw=1.3, label=f"layer {layer}")
    counts = sorted(frame["n_examples"].unique())
    ax.set_xscale("log")
    ax.set_xticks(counts, [f"{n:,}" for n in counts])
    ax.minorticks_off()
    ax.set(xlabel="examples scored", ylabel=measure)
    ax.set_ylim(top=1)
    ax.legend(loc="lower right", ncols=1 if len(layers) <= 6 else 2, labelspacing=0.25)
    headline(ax, title)
    return ax


def topk_overlap(
    frame: pd.DataFrame,
    *,
    chance: float,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Share of the top neurons found again when the examples are drawn anew, by layer.

    Args:
        frame: Columns ``layer`` (from 1), ``overlap``, ``low`` and ``high`` (0 to 1), the
            last two a bootstrap interval.
        chance: Expected overlap of two random choices, 0 to 1.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax)
    ax.vlines(
        frame["layer"],
        100 * frame["low"],
        100 * frame["high"],
        color=COLORS["importance"],
        lw=1.6,
        label="95% bootstrap interval",
    )
    ax.plot(frame["layer"], 100 * frame["overlap"], "_", color=COLORS["importance"], ms=9, mew=1.8)
    reference(ax, 100 * chance, "two random choices", color=COLORS["random"])
    ax.set(xlabel="layer", ylabel="top ones found again, %", ylim=(0, 100), xticks=frame["layer"])
    ax.margins(x=0.08)
    ax.legend(loc="center right")
    headline(ax, title)
    return ax


def task_overlap(
    overlap: pd.DataFrame,
    *,
    chance: float,
    halves: float | None = None,
    measure: str = "shared by both top sets (Jaccard)",
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """How far tasks agree on their top neurons: lower triangle of a square table.

    Args:
        overlap: Square, symmetric, tasks on both sides, values 0 to 1.
        chance: Value for two random choices; marked on the colour bar.
        halves: Value for two halves of one task's examples: the top of the colour bar.
        measure: What the values are: the label of the colour bar.
        ax, title: Where to draw, None for a new figure; the finding.
    """
    ax = axes(ax, (SINGLE[0] + 0.4, min(SINGLE[0] - 0.5, 1.7 + 0.6 * len(overlap))))
    values = overlap.to_numpy(dtype=float)[1:, :-1]
    hidden = np.triu(np.ones(values.shape, dtype=bool), k=1)
    top = max(float(values[~hidden].max()), halves or 0.0)
    image = ax.imshow(np.where(hidden, np.nan, values), cmap=RAMP, vmin=0, vmax=top)
    for row, column in zip(*np.nonzero(~hidden), strict=True):
        value = values[row, column]
        ax.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=9,
            color=ink_on(RAMP(value / top)[:3]),
        )
    ax.set_xticks(
        range(len(values)), overlap.columns[:-1], rotation=35, ha="right", rotation_mode="anchor"
    )
    ax.set_yticks(range(len(values)), overlap.index[1:])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    bar = ax.get_figure(root=False).colorbar(image, ax=ax, shrink=0.8, label=measure)
    bar.outline.set_visible(False)
    _mark(bar, chance, "chance")
    if halves is not None:
        _mark(bar, halves, "same task,\nother examples", below=halves == top)
    headline(ax, title)
    return ax


def _mark(bar: Colorbar, value: float, label: str, *, below: bool = False) -> None:
    bar.ax.axhline(value, color=INK, lw=1.2)
    place = {"xytext": (-4, 0), "ha": "right", "va": "top" if below else "center", "fontsize": 9}
    by = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    bar.ax.annotate(label, (0, value), **by, **place)


# Figures that set the scores of ``scores`` beside the paper's: do they agree, do they serve?

#: What a score is called in figures; others by their names.
NAMES = {"importance": "Eq. 4"}


def score_agreement(
    pairs: pd.DataFrame, *, top: int, chance: float, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Each pair of scores twice: the rank correlation below the diagonal, the overlap above it.

    Args:
        pairs: From ``stability.score_pairs``: ``score``, ``other``, ``rho`` and ``overlap``.
        top: Neurons in the sets whose overlap it is.
        chance: Overlap of two random choices, 0 to 1; two random orders correlate by 0.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    names = list(dict.fromkeys([*pairs["score"], *pairs["other"]]))
    ax = axes(ax, (WIDE[0] - 1.2, 1.6 + 0.44 * len(names)))
    values = np.full((len(names), len(names)), np.nan)
    for pair in pairs.itertuples():
        row, column = names.index(pair.score), names.index(pair.other)
        values[column, row], values[row, column] = pair.rho, pair.overlap
    ax.imshow(np.clip(values, 0, 1), cmap=RAMP, vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
        value = values[row, column]
        text = f"{value:.2f}" if row > column else f"{value:.0%}"
        ax.text(
            column,
            row,
            text.replace("-", "−"),
            ha="center",
            va="center",
            fontsize=9,
            color=ink_on(RAMP(float(np.clip(value, 0, 1)))[:3]),
        )
    labels = [NAMES.get(name, name) for name in names]
    ax.set_xticks(range(len(names)), labels)
    ax.set_yticks(range(len(names)), labels)
    ax.set_xlabel(
        f"below the diagonal: rank correlation (Spearman's ρ); above it: share of the "
        f"top {top:,}\nthat both choose (two random choices: {chance:.0%}); "
        "means over layers"
    )
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    headline(ax, title)
    return ax


def score_removal(
    frame: pd.DataFrame,
    *,
    metric: str = "accuracy",
    fig: Figure | SubFigure | None = None,
    title: str = "",
) -> Figure | SubFigure:
    """A metric while the neurons of the lowest score go first: a panel for each score.

    Importance (Eq. 4) and the random orders stand in all of them.

    Args:
        frame: From ``removal.by_score``: ``order`` (a score's name), ``draw``, ``fraction`` and
            the metric, 0 to 1.
        metric: Column to draw.
        fig: Where to draw; none makes a new figure.
        title: The finding.
    """
    others = [name for name in frame["order"].unique() if name not in ("importance", "random")]
    fig, places = panels(
        fig, len(others), per_row=3, height=1.95, head=0.8, sharex=True, sharey=True
    )
    for name, ax in zip(others, places, strict=True):
        for _, draw in frame[frame["order"] == "random"].groupby("draw"):
            ax.plot(
                100 * draw["fraction"],
                100 * draw[metric],
                color=COLORS["random"],
                lw=0.7,
                alpha=0.55,
            )
        for order, (color, marker) in _lines(name).items():
            mean = frame[frame["order"] == order].groupby("fraction")[metric].mean()
            ax.plot(100 * mean.index, 100 * mean, marker=marker, color=color)
        ax.set_title(NAMES.get(name, name), fontsize=10, pad=3)
        ax.set(xlim=(-3, 93), xticks=[0, 25, 50, 75])
    for ax in places[-3:]:  # the lowest of each column, also where the last row is short
        ax.tick_params(labelbottom=True)
    fig.supxlabel("neurons removed in every layer, lowest score first, %", fontsize=10)
    fig.supylabel(f"{metric}, %", fontsize=10)
    headline(fig, title, legend_rows=1)
    labels = ("the panel's score", "importance (Eq. 4)", "random (draws, mean)")
    legend_under(
        fig,
        [
            Line2D([], [], marker=marker, color=color, label=label)
            for label, (color, marker) in zip(labels, _lines("").values(), strict=True)
        ],
    )
    return fig


def _lines(score: str) -> dict[str, tuple[str, str]]:
    """Orders of a panel, the score's first, with colour and mark."""
    return {
        score: (INK, "D"),
        "importance": (COLORS["importance"], MARKERS["importance"]),
        "random": (COLORS["random"], MARKERS["random"]),
    }


# Figures about the release: what each of its switches changes, and its importance files.


def switches(
    differences: pd.DataFrame,
    *,
    unit: str = "points",
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """What a switch changes: every seed's paired difference a point, their mean a bar.

    Args:
        differences: Columns ``switch`` and ``difference``, one row per pair of runs.
        unit: Of the differences, the label of the horizontal axis.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    rows = list(differences.groupby("switch", sort=False))
    ax = axes(ax, (WIDE[0] - 1, 1.3 + 0.4 * len(rows)))
    ax.axvline(0, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
    for place, (_, runs) in enumerate(rows):
        values = runs["difference"].to_numpy()
        ax.plot(
            values, place + spread(len(values)), "o", color=COLORS["moebert"], alpha=0.75, zorder=3
        )
        if len(values) > 1:
            ax.plot(
                [values.mean()] * 2,
                [place - 0.3, place + 0.3],
                color=COLORS["moebert"],
                lw=2.2,
                zorder=4,
            )
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set(xlabel=unit, ylim=(len(rows) - 0.45, -0.55))
    widest = max(1.0, 1.15 * float(differences["difference"].abs().max()))
    ax.set_xlim(-widest, widest)
    ax.tick_params(axis="y", length=0)
    headline(ax, title)
    return ax


def mass_by_file(
    curves: pd.DataFrame,
    *,
    marks: Mapping[str, float] | None = None,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Share of importance that the top neurons hold, one curve per set of scores.

    Args:
        curves: As ``release.mass_curves`` returns them, both in %.
        marks: Vertical lines, label to % of a layer's neurons.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax, (SINGLE[0] + 0.4, SINGLE[1] + 0.5))
    all_equal(ax, 100)
    order = curves.sum().sort_values().index  # light: spread evenly
    widths = np.linspace(3.2, 1.1, len(order)) if len(order) < 5 else np.full(len(order), 1.3)
    for name, color, lw in zip(order, depth_colors(len(order)), widths, strict=True):
        ax.plot(curves.index, curves[name], color=color, lw=lw, label=name)  # none hides another
    for label, share in (marks or {}).items():
        ax.axvline(share, color=INK, lw=0.8, ls=(0, (4, 3)))
        ax.annotate(
            label,
            (share, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 4),
            textcoords="offset points",
            fontsize=9,
        )
    ax.set(
        xlim=(0, 100),
        ylim=(0, 100),
        xlabel="neurons of a layer, most important first, %",
        ylabel="importance held, %",
    )
    headline(ax, title, legend_rows=legend_above(ax, 4))
    return ax
