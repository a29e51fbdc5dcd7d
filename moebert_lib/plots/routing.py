"""Figures about routing: which expert takes which token, and how evenly (Sec. 3.2)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from moebert_lib.evidence.claims import collapse_limit
from moebert_lib.plots import style
from moebert_lib.plots.style import COLORS, EXPERTS, INK, WIDE


def loads(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Share of tokens that each expert takes in each layer, one panel per router.

    ``frame`` has the columns ``router``, ``layer`` and ``expert`` (from 1) and ``share`` (0 to 1).
    All panels have one colour scale, from 0 to the largest share.
    """

    def draw(ax: Axes, rows: pd.DataFrame) -> None:
        table = 100 * rows.pivot(index="layer", columns="expert", values="share")
        style.heat(ax, table, ".0f", vmax=100 * frame["share"].max())

    labels = ("expert (in each cell: share of the tokens, %)", "layer")
    size = {"per_row": 4, "height": 0.6 + 0.26 * frame["layer"].nunique()}
    return style.facets(frame, "router", draw, title=title, labels=labels, **size)


def imbalance(frame: pd.DataFrame, *, title: str = "") -> Axes:
    """Load of the busiest expert over the mean load, a point for each layer.

    ``frame`` has the columns ``router``, ``layer`` and ``ratio``.
    """
    ax = style.axes()
    colors = style.depth_colors(frame["layer"].nunique())
    points = {"x": "router", "y": "ratio", "hue": "layer", "palette": colors}
    sns.stripplot(frame, dodge=True, jitter=False, legend="full", ax=ax, **points)
    style.reference(ax, 1.0, "perfectly even")
    routers = list(dict.fromkeys(frame["router"]))
    ax.set_xticks(range(len(routers)), style.broken(routers))
    ax.set(xlabel="", ylabel="busiest expert / mean load")
    ax.set_ylim(bottom=0)
    handles, layers = ax.get_legend_handles_labels()
    for handle, layer in zip(handles, layers, strict=True):
        handle.set_label(f"layer {layer}")
    style.legend_above(ax, 3, handles)
    style.headline(ax, title)
    return ax


def token_map(
    tokens: Sequence[str], experts: ArrayLike, *, ax: Axes | None = None, title: str = ""
) -> Axes:
    """The expert of every token in every layer of one sentence, numbered and coloured.

    ``experts`` has shape ``(T, L)``, the expert of each token in each layer from 0, printed from
    1; ``ax`` is by default a new figure's.
    """
    by_layer = pd.DataFrame(np.asarray(experts).T)  # (L, T)
    by_layer.index += 1
    ax = style.axes((WIDE[0], 1.4 + 0.27 * len(by_layer))) if ax is None else ax
    colors = ListedColormap(EXPERTS)
    tiles = {"cmap": colors, "vmin": -0.5, "vmax": len(EXPERTS) - 0.5, "linewidths": 1.5}
    style.heat(ax, by_layer % len(EXPERTS), (by_layer + 1).astype(str), xticklabels=tokens, **tiles)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_xticks(ax.get_xticks(), tokens, rotation=45, ha="left", rotation_mode="anchor")
    ax.set_ylabel("layer")
    style.headline(ax, title)
    return ax


def token_maps(
    tokens: Sequence[str],
    ways: Mapping[str, ArrayLike],
    shares: Mapping[str, ArrayLike],
    *,
    layer: int = 1,
    title: str = "",
) -> Figure:
    """A :func:`token_map` for each router, beside the loads of its experts in one layer.

    The maps show the first 24 tokens, the loads count all of them.

    Args:
        tokens: The ``T`` tokens, written above the first map.
        ways: Router name to the experts of the tokens, ``(T, L)``.
        shares: Router name to the experts' shares of a larger set, ``(L, E)``.
        layer: The layer whose loads are drawn, counted from 1; its row is framed.
        title: What the figure shows.
    """
    n_layers = np.asarray(next(iter(ways.values()))).shape[1]
    n_drawn = min(len(tokens), 24)
    rows = max(n_layers, 1 + len(next(iter(shares.values()))[0]))
    fig, grid = style.panels(
        2 * len(ways), per_row=2, height=0.35 + 0.2 * rows, width_ratios=(4.4, 1)
    )
    for place, (name, experts) in enumerate(ways.items()):
        left, right = grid[2 * place : 2 * place + 2]
        token_map(tokens[:n_drawn] if place == 0 else [""] * n_drawn, experts[:n_drawn], ax=left)
        left.set_ylabel(*style.broken([name]), rotation=0, ha="right", va="center")
        left.add_patch(Rectangle((0, layer - 1), n_drawn, 1, fill=False, color=INK, lw=1.2))
        _two_loads(right, np.asarray(experts)[:, layer - 1], np.asarray(shares[name])[layer - 1])
    grid[1].set_title(f"layer {layer}: share of tokens, %", fontsize=9, pad=4, loc="right")
    grid[-1].set_xlabel("bar: this sentence\nline: validation set", fontsize=9)
    fig.supylabel("layer", fontsize=10)
    if n_drawn < len(tokens):
        title += f" (maps: the first {n_drawn} of {len(tokens)} tokens)"
    style.headline(fig, title)
    return fig


def _two_loads(ax: Axes, experts: np.ndarray, shares: np.ndarray) -> None:
    """Each expert's share of a sentence as a bar, its share of a larger set as a line across."""
    of_sentence = 100 * np.bincount(experts, minlength=len(shares)) / len(experts)
    places = np.arange(len(shares))
    ax.barh(places, of_sentence, color=[style.expert_color(e) for e in places], height=0.7)
    ax.vlines(100 * shares, places - 0.48, places + 0.48, color=INK, lw=1.6)
    ax.set_yticks(places, places + 1)
    ax.set(xlim=(0, 100), ylim=(len(shares) - 0.4, -0.6), xticks=(0, 50, 100), ylabel="expert")
    ax.tick_params(axis="y", length=0)


def beyond(runs: pd.DataFrame, metric: str, *, dense: float, title: str = "") -> Axes:
    """A metric of several routers: a line for each seed, a bar at each mean.

    ``runs`` has the columns ``name``, ``seed`` and the metric, 0 to 1; ``dense`` is the teacher's
    metric, drawn as a line.
    """
    ax = style.axes()
    names = style.seed_lines(ax, runs.assign(value=100 * runs[metric]), "name", "value")
    style.reference(ax, 100 * dense, "teacher")
    ax.set_xticks(range(len(names)), style.broken(names))
    ax.set(xlabel="", ylabel=f"{metric}, %")
    ax.margins(y=0.15)
    style.headline(ax, title)
    return ax


def remedies(runs: pd.DataFrame, metric: str, *, dense: float, title: str = "") -> Figure:
    """Load of the busiest expert beside a metric, for each remedy; every run is a point.

    Points of a remedy whose gates have all collapsed are hollow.

    Args:
        runs: Columns ``name``, ``n_experts``, ``busiest`` (load of the busiest expert over the
            mean load), ``collapsed`` and the metric, 0 to 1.
        metric: Its name.
        dense: The teacher's metric.
        title: What the figure shows.
    """
    rows = runs["name"].nunique()
    options = {"per_row": 2, "height": 0.7 + 0.27 * rows, "sharey": True}
    fig, (left, right) = style.panels(2, **options)
    hollow = [name for name, part in runs.groupby("name") if part["collapsed"].all()]
    style.strip(left, runs, "name", "busiest", rows=True, hollow=hollow)
    percent = runs.assign(value=100 * runs[metric])
    style.strip(right, percent, "name", "value", rows=True, hollow=hollow)
    limit = collapse_limit(runs["n_experts"].max())
    widest = 1.05 * max(limit, runs["busiest"].max())
    left.axvspan(limit, widest, color=INK, alpha=0.07, lw=0)
    left.axvline(1.0, color=INK, lw=1.0, ls=(0, (4, 3)), zorder=1)
    right.axvline(100 * dense, color=INK, lw=1.0, ls=(0, (4, 3)), zorder=1)
    left.set_xlim(0, widest)
    left.set(xlabel="busiest expert / mean load\n(dashed: even; grey: collapsed)", ylabel="")
    right.set(xlabel=f"{metric}, %\n(dashed: teacher)", ylabel="")
    for ax in (left, right):
        ax.tick_params(axis="y", length=0)
    style.headline(fig, title)
    return fig


def hindsight(frame: pd.DataFrame, metric: str, *, title: str = "") -> Figure:
    """Models with their own router and with the best expert for each token (oracle).

    Left the distance to the teacher by layer, right the metric. Hollow marks are the first model.
    ``frame`` is that of ``routing_analysis.compare``, the teacher's rows too; ``metric`` is the
    name of its ``score``, 0 to 1.
    """
    fig, (left, right) = style.panels(2, per_row=2, height=2.9, width_ratios=(1.6, 1))
    is_teacher = frame["model"] == "teacher"
    dense, frame = frame.loc[is_teacher, "score"].iloc[0], frame[~is_teacher]
    models = list(frame["model"].unique())
    for (model, router), rows in frame.groupby(["model", "router"], sort=False):
        own, first = router == "own", model == models[0]
        color, marker = (COLORS["moebert"], "o") if own else (INK, "D")
        look = {"color": color, "marker": marker, "mfc": "white" if first else color}
        look |= {"ls": (0, (4, 2)) if first else "-", "ms": 5}
        label = f"{model}, {'own router' if own else 'oracle'}"
        left.plot(rows["layer"], rows["distance"], label=label, **look)
        place = models.index(model) + (-0.12 if own else 0.12)
        right.plot([place], [100 * rows["score"].iloc[0]], **{**look, "ls": "", "ms": 7})
    left.set(xlabel="after layer (0: embeddings)", ylabel="distance to the teacher (MSE)")
    left.set_xticks(sorted(frame["layer"].unique()))
    left.set_ylim(bottom=0)
    left.legend(fontsize=8.5)
    style.reference(right, 100 * dense, "teacher")
    right.set_xticks(range(len(models)), models)
    right.set(xlim=(-0.5, len(models) - 0.5), ylabel=f"{metric}, %")
    right.margins(y=0.15)
    style.headline(fig, title)
    return fig
