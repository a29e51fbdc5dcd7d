"""Figures about distillation: losses by step, hidden states by layer (Eq. 5-7), scores by stage."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moebert_lib.config.settings import Settings
from moebert_lib.plots import style
from moebert_lib.plots.style import COLORS, INK

#: The terms of the objective, and how the line of each is drawn.
TERM_STYLES = {
    "total": dict(color=INK, ls="-"),
    "task": dict(color=INK, ls=(0, (4, 2))),
    "hidden": dict(color=COLORS["moebert"], ls="-"),
    "prediction": dict(color=COLORS["moebert"], ls=(0, (2, 1.5))),
}

#: A student's marks: hollow before distillation, filled after it.
FACES = {"converted": "white", "distilled": COLORS["moebert"]}


def hidden_distance(frame: pd.DataFrame, *, ax: Axes | None = None, title: str = "") -> Axes:
    """Distance of student and teacher after every layer, before and after distillation.

    ``frame`` has the columns ``layer`` (0 is the embedding output), ``distance`` (mean squared
    difference of hidden states) and ``stage``: ``converted`` or ``distilled``. Several rows of one
    layer and stage are seeds; the line is their mean. ``ax`` is by default a new figure's.
    """
    ax, color = style.axes() if ax is None else ax, COLORS["moebert"]
    both = {"x": "layer", "y": "distance", "color": color, "ax": ax}
    for stage, rows in frame.groupby("stage", sort=False):
        look = {"ls": (0, (4, 2)) if stage == "converted" else "-", "mfc": FACES[stage]}
        sns.lineplot(rows, marker="o", mec=color, errorbar=None, label=stage, **look, **both)
    if frame.duplicated(["layer", "stage"]).any():
        sns.scatterplot(frame, s=10, alpha=0.5, linewidth=0, legend=False, **both)
    ax.set_xticks(sorted(frame["layer"].unique()))
    ax.set(xlabel="after layer (0: embeddings)", ylabel="distance to the teacher (MSE)")
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", style="plain")  # a power of ten would cover the legend
    style.legend_above(ax, 3)
    style.headline(ax, title)
    return ax


def learning_curve(frame: pd.DataFrame, *, title: str = "") -> Axes:
    """Terms of the loss by step, on a log scale: every step pale, their running mean strong.

    ``frame`` has the column ``step`` and one column per term: ``task``, ``hidden`` and
    ``prediction`` before weighting, ``total`` after. A term that is 0 throughout is left out.
    """
    ax, window = style.axes(), max(1, len(frame) // 20)
    for term, look in TERM_STYLES.items():
        if term not in frame or not (frame[term] > 0).any():
            continue
        smooth = frame[term].rolling(window, min_periods=1, center=True).mean()
        ax.plot(frame["step"], frame[term], color=look["color"], lw=0.5, alpha=0.3)
        ax.plot(frame["step"], smooth, label=term, **look)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="training step", ylabel="loss")
    ax.margins(x=0.02)
    style.legend_above(ax, 5)
    style.headline(ax, title)
    return ax


def rounds(curve: pd.DataFrame, settings: Settings, n_train: int) -> pd.DataFrame:
    """Means of the loss terms over each complete round of sentence lengths, one row a round.

    Trainer's ``group_by_length`` takes the examples of 50 batches at a time (or a quarter of a
    small set) and sorts them from the longest to the shortest. Means over anything but complete
    rounds compare long sentences with short ones. If batches are counted in tokens, they come in
    random order, and a round is a tenth of the steps.

    Args:
        curve: As for :func:`learning_curve`.
        settings: Those of the student's training.
        n_train: Examples of one epoch.
    """
    terms = curve.drop(columns="step")
    if settings.tokens_per_batch is not None:
        size = epoch = max(1, len(curve) // 10)
    else:
        size = max(1, min(n_train // (4 * settings.batch_size), 50))
        epoch = -(-n_train // settings.batch_size)
    step = pd.Series(range(len(curve)), index=curve.index)
    number = step // epoch * epoch + step % epoch // size  # an epoch's last round is incomplete
    return terms.groupby(number).mean()[number.value_counts(sort=False) == size]


def ladder(frame: pd.DataFrame, *, metric: str = "accuracy", title: str = "") -> Axes:
    """Score at every stage, from the dense teacher over conversion to distillation.

    ``frame`` has the columns ``stage`` (in the order of the figure), ``seed`` and the metric, 0 to
    1; the runs of one seed are joined.
    """
    ax = style.axes()
    points = frame.assign(value=100 * frame[metric])
    style.seed_lines(ax, points, "stage", "value", dodge=0.26)
    means = points.groupby("stage", sort=False)["value"].mean()
    ax.set_xticks(range(len(means)), [f"{stage}\n{value:.1f}" for stage, value in means.items()])
    ax.set(xlabel="stage and mean score", ylabel=f"{metric}, %")
    ax.margins(y=0.15)
    style.headline(ax, title)
    return ax


def plane(frame: pd.DataFrame, *, layer: int, stage: str, ax: Axes, dot: float = 3.2) -> Axes:
    """A layer's states of sentences in a plane: the teacher's, and lines to a student's.

    Args:
        frame: From ``evaluation.planes``, with ``teacher`` among its stages.
        layer: Of the states; 0 is the embeddings.
        stage: ``converted`` or ``distilled``. Both have the same axes.
        ax: Where to draw.
        dot: Size of a student's dot, in points.
    """
    states = frame[frame["layer"] == layer].set_index("stage")[["x", "y"]]
    teacher, student = states.loc[["teacher"]].to_numpy(), states.loc[[stage]].to_numpy()
    pairs = np.stack([teacher, student, np.full(teacher.shape, np.nan)], axis=1)
    ax.plot(*pairs.reshape(-1, 2).T, color=COLORS["moebert"], lw=0.7, alpha=0.6, zorder=2)
    ax.plot(*student.T, color=COLORS["moebert"], mfc=FACES[stage], **_dot(dot), zorder=3)
    ax.plot(*teacher.T, color=INK, **_dot(0.75 * dot), zorder=4)
    middle = (states.max() + states.min()) / 2
    half = 1.08 * max((states - middle).abs().to_numpy().max(), 1e-6)
    ax.set_xlim(middle["x"] - half, middle["x"] + half)
    ax.set_ylim(middle["y"] - half, middle["y"] + half)
    ax.set(xticks=[], yticks=[])
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
    """One layer's :func:`plane`, and beside it the layer's place among the distances.

    Args:
        frame: As for :func:`plane`.
        distances: As for :func:`hidden_distance`, one seed.
        layer: The layer that is drawn.
        stage: ``converted`` or ``distilled``.
        axs: Two axes.
        title: What the figure shows.
    """
    left, right = axs
    plane(frame, layer=layer, stage=stage, ax=left)
    left.set(xlabel="first main direction of the teacher", ylabel="second")
    style.legend_above(left, 2, _handles([stage]))
    style.headline(left, title)
    hidden_distance(distances, ax=right)
    here = distances[(distances["layer"] == layer) & (distances["stage"] == stage)]
    ring = {"ms": 13, "mfc": "none", "mec": INK, "mew": 1.3, "clip_on": False, "zorder": 5}
    right.plot(here["layer"], here["distance"], "o", **ring)


def steps(
    frame: pd.DataFrame, distances: pd.DataFrame, *, title: str = "", most: int = 7
) -> Figure:
    """Every layer's :func:`plane`, before distillation above and after it below.

    Each panel has its distance from ``distances``, those of one seed as for
    :func:`hidden_distance`. Of a deeper model ``most`` layers at even distances are drawn.
    """
    last = int(frame["layer"].max())
    layers = np.unique(np.linspace(0, last, min(most, last + 1)).round().astype(int)).tolist()
    distance = distances.groupby(["stage", "layer"])["distance"].mean()
    fig, grid = style.panels(2 * len(layers), per_row=len(layers), height=1.15, head=0.7)
    for place, ax in enumerate(grid):
        stage, layer = list(FACES)[place // len(layers)], layers[place % len(layers)]
        plane(frame, layer=layer, stage=stage, ax=ax, dot=2.4)
        ax.set_xlabel(f"{distance[stage, layer]:.3g}", fontsize=9, labelpad=2)
        if place < len(layers):
            name = f"layer {layer}" if layer else "embeddings"
            ax.set_title(name, fontsize=9, pad=3, loc="center")
        if layer == 0:
            ax.set_ylabel(stage)
    fig.supxlabel("under each panel: distance to the teacher (MSE, Eq. 5)", fontsize=9)
    style.headline(fig, title, legend=_handles(FACES))
    return fig


def _dot(size: float) -> dict:
    return dict(ls="", marker="o", ms=size, mew=0.8)


def _handles(stages: Iterable[str]) -> list[Line2D]:
    """Legend entries: the teacher's dot, and a student's at each stage."""
    students = [
        Line2D([], [], color=COLORS["moebert"], mfc=FACES[stage], **_dot(4.5), label=stage)
        for stage in stages
    ]
    return [Line2D([], [], color=INK, **_dot(4), label="teacher"), *students]
