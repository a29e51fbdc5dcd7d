"""Figures of states: how far a student is from its teacher after every layer, seen in a plane."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from moebert_lib.plots import COLORS, INK, headline, legend_above, legend_under, panels
from moebert_lib.plots_learning import hidden_distance

#: Hollow before distillation, filled after, as in ``plots_learning.hidden_distance``.
FACES = {"converted": "white", "distilled": COLORS["moebert"]}


def plane(frame: pd.DataFrame, *, layer: int, stage: str, ax: Axes, dot: float = 3.2) -> Axes:
    """A layer's sentences: the teacher's states, a student's, and a line from each to its own.

    Args:
        frame: From ``states.planes``, with ``teacher`` among its stages.
        layer: Whose states; 0 is the embeddings.
        stage: ``converted`` or ``distilled``. The axes are those of both, and do not move.
        ax: Where to draw.
        dot: Size of a student's dot, in points.
    """
    of = frame[frame["layer"] == layer].set_index("stage")
    own, student = of.loc[["teacher"], ["x", "y"]], of.loc[[stage], ["x", "y"]]
    pairs = np.stack([own.to_numpy(), student.to_numpy(), np.full(own.shape, np.nan)], axis=1)
    ax.plot(*pairs.reshape(-1, 2).T, color=COLORS["moebert"], lw=0.7, alpha=0.6, zorder=2)
    ax.plot(*student.to_numpy().T, color=COLORS["moebert"], mfc=FACES[stage], **_dot(dot), zorder=3)
    ax.plot(*own.to_numpy().T, color=INK, **_dot(0.75 * dot), zorder=4)
    middle = (of[["x", "y"]].max() + of[["x", "y"]].min()) / 2
    half = 1.08 * max((of[["x", "y"]] - middle).abs().to_numpy().max(), 1e-6)
    ax.set(
        xlim=(middle["x"] - half, middle["x"] + half),
        xticks=[],
        yticks=[],
        ylim=(middle["y"] - half, middle["y"] + half),
    )
    ax.set_aspect("equal", adjustable="box")
    ax.spines[:].set_visible(True)
    return ax


def step(
    frame: pd.DataFrame,
    distances: pd.DataFrame,
    *,
    layer: int,
    stage: str,
    axs: Sequence[Axes],
    title: str = "",
) -> None:
    """One layer in its :func:`plane`, and beside it where that layer's distance stands.

    Args:
        frame: As for :func:`plane`.
        distances: As for ``plots_learning.hidden_distance``, one seed.
        layer: Which one.
        stage: ``converted`` or ``distilled``.
        axs: Two axes.
        title: What is seen.
    """
    left, right = axs
    plane(frame, layer=layer, stage=stage, ax=left)
    left.set(xlabel="first main direction of the teacher", ylabel="second")
    headline(left, title, legend_rows=legend_above(left, 2, _handles([stage])))
    hidden_distance(distances, ax=right)
    here = distances[(distances["layer"] == layer) & (distances["stage"] == stage)]
    right.plot(
        here["layer"],
        here["distance"],
        "o",
        ms=13,
        mfc="none",
        mec=INK,
        mew=1.3,
        clip_on=False,
        zorder=5,
    )


def steps(
    frame: pd.DataFrame,
    distances: pd.DataFrame,
    *,
    fig: Figure | SubFigure | None = None,
    title: str = "",
    most: int = 7,
) -> Figure | SubFigure:
    """Every layer's :func:`plane`, before distillation above and after it below.

    Args:
        frame: As for :func:`plane`.
        distances: As for ``plots_learning.hidden_distance``, one seed; printed in each panel.
        fig: Where to draw; none makes a new figure.
        title: The finding.
        most: Layers to draw at most; of a deeper model evenly spaced ones, first and last among
            them.
    """
    last = int(frame["layer"].max())
    layers = np.unique(np.linspace(0, last, min(most, last + 1)).round().astype(int)).tolist()
    apart = distances.groupby(["stage", "layer"])["distance"].mean()
    fig, grid = panels(fig, 2 * len(layers), per_row=len(layers), height=1.15, head=0.7)
    for place, ax in enumerate(grid):
        stage, layer = list(FACES)[place // len(layers)], layers[place % len(layers)]
        plane(frame, layer=layer, stage=stage, ax=ax, dot=2.4)
        ax.set_xlabel(f"{apart[stage, layer]:.3g}", fontsize=9, labelpad=2)
        if place < len(layers):
            ax.set_title(
                f"layer {layer}" if layer else "embeddings", fontsize=9, pad=3, loc="center"
            )
        if layer == 0:
            ax.set_ylabel(stage)
    fig.supxlabel("under each panel: distance to the teacher (MSE, Eq. 5)", fontsize=9)
    headline(fig, title, legend_rows=1)
    legend_under(fig, _handles(FACES))
    return fig


def _dot(size: float) -> dict:
    return dict(ls="", marker="o", ms=size, mew=0.8)


def _handles(stages) -> list[Line2D]:
    """The teacher's dot, and a student's of each stage."""
    students = [
        Line2D([], [], color=COLORS["moebert"], mfc=FACES[stage], **_dot(4.5), label=stage)
        for stage in stages
    ]
    return [Line2D([], [], color=INK, **_dot(4), label="teacher"), *students]
