"""Figures about importance: how it is spread over neurons, what removal costs, how stable it is.

Importance scores (Eq. 4) have shape ``(L, F)``, layers by neurons, in units of the loss summed
over examples. Only their order and their shares of a layer's sum matter.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from moebert_lib.plots import style
from moebert_lib.plots.style import COLORS, INK, MARKERS, SINGLE, WIDE

#: What can become of a neuron, and its name in figures.
PARTS = {"shared": "shared by all experts", "own": "one expert's own", "dropped": "dropped"}

#: What is removed first, with the colour and the marker of what is therefore kept.
REMOVAL_LOOKS = {
    "least important first": (COLORS["importance"], MARKERS["importance"]),
    "random": (COLORS["random"], MARKERS["random"]),
    "most important first": (COLORS["inverse"], MARKERS["inverse"]),
}

#: Names of scores in figures, where they differ from the names in tables.
NAMES = {"importance": "Eq. 4"}


def sorted_scores(scores: ArrayLike, *, n_shared: int, n_kept: int, title: str = "") -> Figure:
    """Every layer's scores from most to least important, on a log scale, one panel per layer.

    Shaded are the ``n_shared`` neurons of every expert, those of one expert (``n_kept`` neurons
    are kept in all), and the dropped ones, each with its share of the layer's importance. Zero
    scores, as of a dead neuron, are not drawn. ``scores`` have shape ``(L, F)``.
    """
    frame = _ranked(scores)
    edges = {"shared": (0, n_shared), "own": (n_shared, n_kept), "dropped": (n_kept, np.inf)}

    def draw(ax: Axes, layer: pd.DataFrame) -> None:
        ax.plot(layer["rank"] - 1, layer["score"].where(layer["score"] > 0), color=INK, lw=1.4)
        ax.set(yscale="log", xlim=(0, len(layer)))
        ax.margins(y=0.12)
        for part, (start, stop) in edges.items():
            stop = min(stop, len(layer))
            if stop > start:
                inside = layer["rank"].between(start + 1, stop)
                held = layer["score"][inside].sum() / layer["score"].sum()
                _shade(ax, part, start, stop, held)

    handles = [Patch(fc=(COLORS[part], 0.4), ec=INK, lw=0.4, label=t) for part, t in PARTS.items()]
    handles.append(Patch(alpha=0, label="(%: share of the layer's importance)"))
    labels = ("neurons, most important first", "importance (loss, summed over examples)")
    look = {"per_row": 3 if frame["layer"].nunique() <= 6 else 4, "name": "layer {}"}
    return style.facets(frame, "layer", draw, title=title, labels=labels, handles=handles, **look)


def _ranked(scores: ArrayLike) -> pd.DataFrame:
    """Scores sorted down within each layer: columns ``layer`` and ``rank`` (from 1), ``score``."""
    ordered = np.sort(np.asarray(scores, dtype=float), axis=1)[:, ::-1]  # (L, F)
    layer, rank = np.indices(ordered.shape) + 1
    return pd.DataFrame({"layer": layer.ravel(), "rank": rank.ravel(), "score": ordered.ravel()})


def _shade(ax: Axes, part: str, start: float, stop: float, held: float) -> None:
    """Shade a part of a layer's ranks, and write its share of the importance at the top."""
    ax.axvspan(start, stop, color=COLORS[part], alpha=0.4, lw=0, zorder=0)
    ax.axvline(start, color=INK, lw=0.5)
    place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "top"}
    ax.annotate(f"{held:.0%}", ((start + stop) / 2, 0.97), fontsize=8, **place)


def mass_held(
    scores: ArrayLike, *, marks: Mapping[str, int] | None = None, title: str = ""
) -> Axes:
    """Share of a layer's importance that its top neurons hold, one curve per layer.

    ``scores`` have shape ``(L, F)``; ``marks`` are vertical lines, name to number of neurons.
    """
    ax, frame = style.axes(), _ranked(scores)
    n_layers, width = frame["layer"].nunique(), frame["rank"].max()
    look = {"hue": "layer", "palette": style.depth_colors(n_layers), "lw": 1.3, "ax": ax}
    sns.ecdfplot(frame, x="rank", weights="score", stat="percent", **look)
    sns.move_legend(ax, "lower right", ncols=1 if n_layers <= 6 else 2, labelspacing=0.25)
    _mark_shares(ax, width, {f"{name}: {n:,}": n for name, n in (marks or {}).items()})
    ax.set(xlabel="neurons kept, most important first", ylabel="importance held, %")
    style.headline(ax, title)
    return ax


def mass_by_file(
    curves: pd.DataFrame, *, marks: Mapping[str, float] | None = None, title: str = ""
) -> Axes:
    """Share of importance that the top neurons hold, one curve per set of scores.

    ``curves`` are those of ``release_files.mass_curves``, index and values in %; ``marks`` are
    vertical lines, name to % of a layer's neurons.
    """
    ax = style.axes((SINGLE[0] + 0.4, SINGLE[1] + 0.5))
    evenest_first = curves[curves.sum().sort_values().index]
    sns.lineplot(evenest_first, palette=style.depth_colors(curves.shape[1]), errorbar=None, ax=ax)
    style.legend_above(ax, 4)
    _mark_shares(ax, 100, marks or {}, foot=True)
    ax.set(xlabel="neurons of a layer, most important first, %", ylabel="importance held, %")
    style.headline(ax, title)
    return ax


def _mark_shares(ax: Axes, width: float, marks: Mapping[str, float], *, foot: bool = False) -> None:
    """The curve of ``width`` equally important neurons, and named vertical lines."""
    ax.plot([0, width], [0, 100], color=COLORS["random"], lw=1, ls=":")
    slope = {"rotation": np.degrees(np.arctan2(100, width)), "transform_rotates_text": True}
    look = {"rotation_mode": "anchor", "ha": "center", "va": "top", "color": COLORS["paper"]}
    ax.text(0.4 * width, 38, "all equal", fontsize=9, **slope, **look)
    for name, x in marks.items():
        ax.axvline(x, color=INK, lw=0.8, ls=(0, (4, 3)))
        place = {"xytext": (3, 4), "ha": "left"} if foot else {"xytext": (0, 3), "ha": "center"}
        coordinates = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        ax.annotate(name, (x, 0 if foot else 1), fontsize=9, **coordinates, **place)
    ax.set(xlim=(0, width), ylim=(0, 100))


def removal_curves(
    frame: pd.DataFrame, *, chance: float | None = None, metric: str = "accuracy", title: str = ""
) -> Axes:
    """A metric while neurons are removed in three orders; every random draw is drawn.

    Args:
        frame: Columns ``fraction`` (removed, 0 to 1), the metric (0 to 1), ``order`` (a
            key of ``REMOVAL_LOOKS``) and ``draw`` (repeats of the random order).
        chance: The metric of guessing, 0 to 1; neither ``None`` nor NaN is drawn.
        metric: Column to draw.
        title: What the figure shows.
    """
    ax = style.axes(WIDE)
    _removal(ax, frame, metric, REMOVAL_LOOKS)
    if chance is not None and not np.isnan(chance):
        style.reference(ax, 100 * chance, "guessing", color=COLORS["random"], right=False)
    ax.set(xlabel="neurons removed in every layer, %", ylabel=f"{metric}, %", xlim=(-2, 102))
    n_draws = frame.loc[frame["order"] == "random", "draw"].nunique()
    names = {"random": f"random (mean of {n_draws} draws)"} if n_draws > 1 else {}
    style.legend_above(
        ax, 3, _legend({names.get(order, order): look for order, look in REMOVAL_LOOKS.items()})
    )
    style.headline(ax, title)
    return ax


def score_removal(frame: pd.DataFrame, *, metric: str = "accuracy", title: str = "") -> Figure:
    """A metric while the neurons of the lowest score go first: a panel for each score.

    Importance (Eq. 4) and the random orders are in every panel. ``frame`` is that of
    ``neuron_measurements.by_score``: ``order`` (a score's name), ``draw``, ``fraction``, metric.
    """
    looks = {name: (COLORS[name], MARKERS[name]) for name in ("importance", "random")}
    in_all = frame["order"].isin(looks)
    parts = [
        pd.concat([rows, frame[in_all]]).assign(panel=name)
        for name, rows in frame[~in_all].groupby("order", sort=False)
    ]

    def draw(ax: Axes, rows: pd.DataFrame) -> None:
        _removal(ax, rows, metric, {rows["panel"].iloc[0]: (INK, "D"), **looks})
        ax.set(xlim=(-3, 93), xticks=[0, 25, 50, 75])

    names = {"score of the panel": (INK, "D"), "importance (Eq. 4)": looks["importance"]}
    handles = _legend({**names, "random (mean of the draws)": looks["random"]})
    labels = ("neurons removed in every layer, lowest score first, %", f"{metric}, %")
    return style.facets(
        pd.concat(parts), "panel", draw, title=title, labels=labels, handles=handles
    )


def _removal(
    ax: Axes, frame: pd.DataFrame, metric: str, looks: Mapping[str, tuple[str, str]]
) -> None:
    """The mean of each order in its colour and marker, and pale lines for the random draws."""
    percent = frame.assign(removed=100 * frame["fraction"], value=100 * frame[metric])
    both = {"x": "removed", "y": "value", "ax": ax}
    random = percent[percent["order"] == "random"]
    if random["draw"].nunique() > 1:
        pale = {"color": COLORS["random"], "lw": 0.7, "alpha": 0.55}
        sns.lineplot(random, units="draw", estimator=None, **pale, **both)
    for order, (color, marker) in looks.items():
        look = {"color": color, "marker": marker, "mec": color}
        sns.lineplot(percent[percent["order"] == order], errorbar=None, **look, **both)


def _legend(looks: Mapping[str, tuple[str, str]]) -> list[Line2D]:
    """Entries of a legend from names to colours and markers."""
    return [Line2D([], [], color=c, marker=m, label=name) for name, (c, m) in looks.items()]


def stability(
    agreement: pd.DataFrame, overlap: pd.DataFrame, *, chance: float, title: str = ""
) -> Figure:
    """How far scores depend on the examples: on their number (left), and on which they are.

    Args:
        agreement: Rank correlation with the scores of all examples: columns ``n_examples``,
            ``agreement`` and ``layer`` (from 1); several rows of one layer and number are draws.
        overlap: Share of the top neurons that stay when examples are redrawn: columns ``layer``
            (from 1), ``overlap``, ``low`` and ``high`` (of a bootstrap interval), 0 to 1.
        chance: Expected overlap of two random choices, 0 to 1.
        title: What the figure shows.
    """
    fig, (left, right) = style.panels(2, per_row=2, height=2.9)
    n_layers = agreement["layer"].nunique()
    both = {"x": "n_examples", "y": "agreement", "hue": "layer", "ax": left}
    both["palette"] = style.depth_colors(n_layers)
    sns.scatterplot(agreement, s=12, linewidth=0, alpha=0.6, legend=False, **both)
    sns.lineplot(agreement, errorbar=None, lw=1.3, legend="full", **both)
    sns.move_legend(left, "lower right", ncols=1 if n_layers <= 6 else 2, labelspacing=0.25)
    counts = sorted(agreement["n_examples"].unique())
    left.set_xscale("log")
    left.set_xticks(counts, [f"{n:,}" for n in counts])
    left.minorticks_off()
    left.set(xlabel="examples scored", ylabel="rank agreement (Spearman's ρ)")
    left.set_ylim(top=1)
    color, values = COLORS["importance"], 100 * overlap[["overlap", "low", "high"]]
    interval = {"color": color, "lw": 1.6, "label": "95% bootstrap interval"}
    right.vlines(overlap["layer"], values["low"], values["high"], **interval)
    right.plot(overlap["layer"], values["overlap"], "_", color=color, ms=9, mew=1.8)
    style.reference(right, 100 * chance, "two random choices", color=COLORS["random"])
    right.set(xlabel="layer", ylabel="top neurons that stay, %", xticks=overlap["layer"])
    right.set(ylim=(0, 100))
    right.margins(x=0.08)
    right.legend(loc="center right")
    style.headline(fig, title)
    return fig


def task_overlap(
    overlap: pd.DataFrame, *, chance: float, halves: float | None = None, title: str = ""
) -> Axes:
    """How far tasks agree on their top neurons: the lower triangle of a square table.

    Args:
        overlap: Square, symmetric, tasks on both sides, values 0 to 1 (Jaccard).
        chance: Value for two random choices.
        halves: Value for two halves of one task's examples: the darkest colour.
        title: What the figure shows.
    """
    ax = style.axes((SINGLE[0], min(SINGLE[0] - 0.5, 1.7 + 0.6 * len(overlap))))
    values = overlap.iloc[1:, :-1].where(np.tri(len(overlap) - 1, dtype=bool))
    top = max(float(np.nanmax(values)), halves or 0.0)
    style.heat(ax, values, ".2f", vmax=top)
    same = "" if halves is None else f"; same task, other examples: {halves:.2f}"
    ax.set_xlabel(f"shared by both top sets (Jaccard)\ntwo random choices: {chance:.2f}{same}")
    style.headline(ax, title)
    return ax


def score_agreement(pairs: pd.DataFrame, *, top: int, chance: float, title: str = "") -> Axes:
    """Each pair of scores twice: the rank correlation below the diagonal, the overlap above it.

    Args:
        pairs: From ``rank_stability.score_pairs``: ``score``, ``other``, ``rho``, ``overlap``.
        top: Neurons in the sets whose overlap it is.
        chance: Overlap of two random choices, 0 to 1; two random orders correlate by 0.
        title: What the figure shows.
    """
    names = list(dict.fromkeys([*pairs["score"], *pairs["other"]]))
    ax = style.axes((WIDE[0] - 1.2, 1.6 + 0.44 * len(names)))
    values, text = pd.DataFrame(np.nan, names, names), pd.DataFrame("", names, names)
    for pair in pairs.itertuples():
        values.loc[pair.other, pair.score] = pair.rho
        values.loc[pair.score, pair.other] = pair.overlap
        text.loc[pair.other, pair.score] = f"{pair.rho:.2f}".replace("-", "−")
        text.loc[pair.score, pair.other] = f"{pair.overlap:.0%}"
    style.heat(ax, values.rename(index=NAMES, columns=NAMES), text, vmax=1)
    ax.set_xlabel(
        f"below the diagonal: rank correlation (Spearman's ρ); above it: share of the "
        f"top {top:,}\nthat both choose (two random choices: {chance:.0%}); means over layers"
    )
    style.headline(ax, title)
    return ax
