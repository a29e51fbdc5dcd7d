"""Figures that set the scores of ``scores`` beside the paper's: do they agree, do they serve?"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from moebert_lib.plots import (
    COLORS,
    INK,
    MARKERS,
    RAMP,
    WIDE,
    axes,
    headline,
    ink_on,
    legend_under,
    panels,
)

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
