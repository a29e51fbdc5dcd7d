"""Figures about distillation: what the losses do, layer by layer and step by step (Eq. 5-7)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from moebert_lib.config.settings import Settings
from moebert_lib.plots.results import mean_beside
from moebert_lib.plots.style import (
    COLORS,
    DIAMOND,
    INK,
    SINGLE,
    axes,
    dots,
    headline,
    legend_above,
    legend_under,
    panels,
    reference,
    spread,
)

#: The terms of the objective, as ``distill`` reports them, and how each line is drawn.
TERM_STYLES = {
    "total": dict(color=INK, ls="-"),
    "task": dict(color=INK, ls=(0, (4, 2))),
    "hidden": dict(color=COLORS["moebert"], ls="-"),
    "prediction": dict(color=COLORS["moebert"], ls=(0, (2, 1.5))),
}


def hidden_distance(frame: pd.DataFrame, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Distance of student and teacher after every layer, before and after distillation.

    Args:
        frame: Columns ``layer`` (0 is the embedding output), ``distance`` (mean squared
            difference of hidden states) and ``stage``: ``converted`` or ``distilled``.
            Several rows of one pair are seeds; each is a point.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax)
    color = COLORS["moebert"]
    for stage, rows in frame.groupby("stage", sort=False):
        face = "white" if stage == "converted" else color
        line = (0, (4, 2)) if stage == "converted" else "-"
        mean = rows.groupby("layer")["distance"].mean()
        ax.plot(mean.index, mean, color=color, ls=line, marker="o", mfc=face, label=str(stage))
        if len(rows) > len(mean):
            ax.plot(rows["layer"], rows["distance"], ".", color=color, alpha=0.5, ms=4)
    ax.set_xticks(sorted(frame["layer"].unique()))
    ax.set(xlabel="after layer (0: embeddings)", ylabel="distance to the teacher (MSE)")
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", style="plain")  # a power of ten would sit on the legend
    headline(ax, title, legend_rows=legend_above(ax, 3))
    return ax


def learning_curve(frame: pd.DataFrame, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Terms of the loss by step: every step pale, their running mean strong, log scale.

    A term that is 0 throughout is left out.

    Args:
        frame: Column ``step`` and one column per term, as ``train.distil`` returns them:
            ``task``, ``hidden`` and ``prediction`` before weighting, ``total`` after.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax)
    for term, style in TERM_STYLES.items():
        if term not in frame or not (frame[term] > 0).any():
            continue
        smooth = frame[term].rolling(max(1, len(frame) // 20), min_periods=1, center=True).mean()
        ax.plot(frame["step"], frame[term], color=style["color"], lw=0.5, alpha=0.3)
        ax.plot(frame["step"], smooth, label=term, **style)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="training step", ylabel="loss")
    ax.margins(x=0.02)
    headline(ax, title, legend_rows=legend_above(ax, 5))
    return ax


def rounds(curve: pd.DataFrame, settings: Settings, n_train: int) -> pd.DataFrame:
    """Means of the loss terms over each whole round of lengths, one row a round.

    Trainer's ``group_by_length`` takes the examples of 50 batches at a time (fewer of a small
    set: a quarter of it) and deals them from the longest to the shortest. Means over anything
    but whole rounds compare long sentences with short ones. Where batches are counted in tokens
    they come in any order, and a round is a tenth of the steps.

    Args:
        curve: As :func:`learning_curve` takes it.
        settings: What the student was trained with.
        n_train: Rows that one epoch trains on.
    """
    terms = curve.drop(columns="step")
    if settings.tokens_per_batch is not None:
        size = epoch = max(1, len(curve) // 10)
    else:
        size = max(1, min(n_train // (4 * settings.batch_size), 50))
        epoch = -(-n_train // settings.batch_size)
    step = pd.Series(range(len(curve)), index=curve.index)
    number = step // epoch * epoch + step % epoch // size  # the last round of an epoch is cut off
    return terms.groupby(number).mean()[number.value_counts(sort=False) == size]


def ladder(
    frame: pd.DataFrame,
    *,
    chance: float | None = None,
    metric: str = "accuracy",
    labels: Mapping[str, str] | None = None,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Score at every stage, from the dense teacher over conversion to distillation.

    Args:
        frame: Columns ``stage``, ``seed`` and the metric (0 to 1). Stages stand in the
            order of their first rows; the runs of one seed are joined.
        chance: The metric of guessing, drawn as a line.
        metric: Column to draw.
        labels: Printed names of stages.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax)
    places = {stage: place for place, stage in enumerate(dict.fromkeys(frame["stage"]))}
    runs = list(frame.groupby("seed"))
    for aside, (_, run) in zip(spread(len(runs)), runs, strict=True):
        ax.plot(run["stage"].map(places) + aside, 100 * run[metric], color=COLORS["own"], lw=1)
    for stage, place in places.items():
        scores = 100 * frame[frame["stage"] == stage].sort_values("seed")[metric]
        dots(ax, place, scores, color=COLORS["dense" if place == 0 else "moebert"])
        mean_beside(ax, place + 0.24, scores.mean())
    if chance is not None:
        reference(ax, 100 * chance, "guessing", color=COLORS["random"])
    ax.set_xticks(range(len(places)), [(labels or {}).get(s, s) for s in places])
    ax.set(xlim=(-0.45, len(places) - 0.55), ylabel=f"{metric}, %")
    ax.margins(y=0.15)
    headline(ax, title)
    return ax


def gaps(frame: pd.DataFrame, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Student minus teacher on each task: runs as points, the paper's values as diamonds.

    Args:
        frame: Columns ``task`` (rows of the figure, in this order), ``gap`` in points, and
            ``source``: ``here`` (one row per run) or ``paper``.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    names = list(dict.fromkeys(frame["task"]))
    ax = axes(ax, (SINGLE[0] + 1.0, 1.2 + 0.27 * len(names)))
    ax.axvline(0, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
    for source, rows in frame.groupby("source", sort=False):
        places = rows["task"].map(names.index)
        mine = dict(color=COLORS["moebert"], ls="", marker="o", alpha=0.75, label="here, every run")
        ax.plot(
            rows["gap"],
            places,
            **(dict(ls="", label="the paper", **DIAMOND) if source == "paper" else mine),
        )
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="student minus teacher, points", ylim=(len(names) - 0.5, -0.5))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y")
    headline(ax, title, legend_rows=legend_above(ax, 2))
    return ax


# Figures of states: how far a student is from its teacher after every layer, seen in a plane.

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
