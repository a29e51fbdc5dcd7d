"""Figures about routing: which expert takes which token, and how evenly (Sec. 3.2)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from moebert_lib.plots.style import (
    COLORS,
    INK,
    RAMP,
    WIDE,
    axes,
    depth_colors,
    expert_color,
    headline,
    ink_on,
    legend_above,
    panels,
    reference,
    spread,
)


def loads(
    shares: Mapping[str, ArrayLike],
    *,
    fig: Figure | SubFigure | None = None,
    title: str = "",
) -> Figure | SubFigure:
    """Share of tokens that each expert takes in each layer, one panel per router.

    Args:
        shares: Router name to an array of shape ``(L, E)``; rows sum to 1.
        fig: Where to draw; none makes a new figure.
        title: The finding.

    Returns:
        The figure. All panels have one colour scale, from 0 to the largest share.
    """
    tables = {name: np.asarray(table, dtype=float) for name, table in shares.items()}
    n_layers, n_experts = next(iter(tables.values())).shape
    top = max(float(table.max()) for table in tables.values())
    fig, grid = panels(fig, len(tables), per_row=4, height=0.6 + 0.26 * n_layers, sharey=True)
    for (name, table), ax in zip(tables.items(), grid, strict=True):
        ax.imshow(table, cmap=RAMP, vmin=0, vmax=top, aspect="auto")
        for (layer, expert), share in np.ndenumerate(table):
            ax.text(
                expert,
                layer,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=8.5,
                color=ink_on(RAMP(share / top)[:3]),
            )
        ax.set_title(name, fontsize=10, pad=4)
        ax.set_xticks(range(n_experts), range(1, n_experts + 1))
        ax.set_yticks(range(n_layers), range(1, n_layers + 1))
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    grid[0].set_ylabel("layer")
    fig.supxlabel("expert (in each cell: share of the tokens, %)", fontsize=10)
    headline(fig, title)
    return fig


def imbalance(
    shares: Mapping[str, ArrayLike],
    *,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Load of the busiest expert over the mean load; every layer is a point, light to dark.

    Args:
        shares: As for :func:`loads`.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax)
    for place, table in enumerate(shares.values()):
        busiest = np.asarray(table).max(1) / np.asarray(table).mean(1)  # (L,)
        colors = depth_colors(len(busiest))
        ax.scatter(place + spread(len(busiest)), busiest, c=colors, s=26, zorder=3)
    reference(ax, 1.0, "perfectly even")
    crowded = len(shares) > 3
    names = [name.replace("-", "-\n") if crowded else name for name in shares]
    ax.set_xticks(range(len(names)), names)
    ax.set(xlim=(-0.5, len(names) - 0.5), ylabel="busiest expert / mean load")
    ax.set_ylim(bottom=0)
    n_layers = len(busiest)
    handles = [
        Line2D([], [], ls="", marker="o", color=depth_colors(n_layers)[n], label=f"layer {n + 1}")
        for n in sorted({0, n_layers - 1})
    ]
    headline(ax, title, legend_rows=legend_above(ax, 2, handles))
    return ax


def token_map(
    tokens: Sequence[str],
    experts: ArrayLike,
    *,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """The expert of every token in every layer of one sentence, numbered and coloured.

    Args:
        tokens: The ``T`` tokens.
        experts: Shape ``(T, L)``, expert of each token in each layer, from 0; they are
            printed from 1.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    experts = np.asarray(experts)
    n_tokens, n_layers = experts.shape
    ax = axes(ax, (WIDE[0], 1.4 + 0.27 * n_layers))
    for (token, layer), expert in np.ndenumerate(experts):
        color = expert_color(int(expert))
        ax.add_patch(Rectangle((token - 0.47, layer - 0.45), 0.94, 0.9, color=color, lw=0))
        ax.text(
            token,
            layer,
            int(expert) + 1,
            ha="center",
            va="center",
            fontsize=8.5,
            color=ink_on(color),
        )
    ax.set_xticks(range(n_tokens), tokens, rotation=45, ha="left", rotation_mode="anchor")
    ax.xaxis.tick_top()
    ax.set_yticks(range(n_layers), range(1, n_layers + 1))
    ax.set(xlim=(-0.5, n_tokens - 0.5), ylim=(n_layers - 0.5, -0.5), ylabel="layer")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    headline(ax, title)
    return ax


def token_maps(
    tokens: Sequence[str],
    ways: Mapping[str, ArrayLike],
    shares: Mapping[str, ArrayLike],
    *,
    layer: int = 1,
    fig: Figure | SubFigure | None = None,
    title: str = "",
) -> Figure | SubFigure:
    """One :func:`token_map` under the other, each beside its loads in one layer.

    The maps hold the first 24 tokens, the loads all of them.

    Args:
        tokens: The ``T`` tokens; they stand once, on top.
        ways: Router name to the experts of the tokens, ``(T, L)``.
        shares: Router name to the experts' shares of a larger set, ``(L, E)``.
        layer: Whose loads are drawn, counted from 1; its row is framed.
        fig: Where to draw; none makes a new figure.
        title: The finding.
    """
    n_layers = np.asarray(next(iter(ways.values()))).shape[1]
    n_drawn = min(len(tokens), 24)
    rows = max(n_layers, 1 + len(next(iter(shares.values()))[0]))
    fig, grid = panels(
        fig, 2 * len(ways), per_row=2, height=0.35 + 0.2 * rows, width_ratios=(4.4, 1)
    )
    for place, (name, experts) in enumerate(ways.items()):
        left, right = grid[2 * place : 2 * place + 2]
        token_map(tokens[:n_drawn] if place == 0 else [""] * n_drawn, experts[:n_drawn], ax=left)
        left.set_ylabel(name.replace("-", "-\n"), rotation=0, ha="right", va="center")
        left.add_patch(Rectangle((-0.5, layer - 1.5), n_drawn, 1, fill=False, color=INK, lw=1.2))
        _two_loads(right, np.asarray(experts)[:, layer - 1], np.asarray(shares[name])[layer - 1])
    grid[1].set_title(f"layer {layer}: share of tokens, %", fontsize=9, pad=4, loc="right")
    grid[-1].set_xlabel("bar: this sentence\nline: validation set", fontsize=9)
    fig.supylabel("layer", fontsize=10)
    if n_drawn < len(tokens):
        title += f" (maps: the first {n_drawn} of {len(tokens)} tokens)"
    headline(fig, title)
    return fig


def beyond(
    runs: pd.DataFrame, metric: str, *, dense: float, ax: Axes | None = None, title: str = ""
) -> Axes:
    """A metric of several routers, in percent: a line for each seed, a bar at each mean.

    Args:
        runs: Columns ``name``, ``seed`` and the metric, a fraction; names keep their order.
        metric: Column.
        dense: The teacher's, a fraction.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax)
    table = 100 * runs.pivot(index="seed", columns="name", values=metric)
    table = table[runs["name"].unique()]  # (seeds, routers)
    places = np.arange(table.shape[1])
    for values in table.to_numpy():
        ax.plot(places, values, "-o", color=COLORS["moebert"], lw=0.8, ms=4, alpha=0.6)
    ax.hlines(table.mean(), places - 0.22, places + 0.22, color=INK, lw=2.2, zorder=3)
    reference(ax, 100 * dense, "teacher")
    ax.set_xticks(places, [name.replace("-", "-\n").replace(", ", "\n") for name in table])
    ax.set(xlim=(-0.5, len(places) - 0.5), ylabel=f"{metric}, %")
    ax.margins(y=0.15)
    headline(ax, title)
    return ax


def hindsight(
    frame: pd.DataFrame,
    metric: str,
    *,
    fig: Figure | SubFigure | None = None,
    title: str = "",
) -> Figure | SubFigure:
    """Models by their own router and by the oracle: distance by layer, and the metric.

    Args:
        frame: From ``oracle.compare``, the teacher's rows too.
        metric: Name of its ``score``, a fraction.
        fig: Where to draw; none makes a new figure.
        title: The finding.
    """
    fig, (left, right) = panels(fig, 2, per_row=2, height=2.9, width_ratios=(1.6, 1))
    taught = frame["model"] == "teacher"
    dense, frame = frame.loc[taught, "score"].iloc[0], frame[~taught]
    models = list(frame["model"].unique())
    for (model, router), rows in frame.groupby(["model", "router"], sort=False):
        own, first = router == "own", model == models[0]
        style = dict(color=COLORS["moebert"] if own else INK, marker="o" if own else "D")
        face = "white" if first else style["color"]
        line = (0, (4, 2)) if first else "-"
        named = f"{model}, {'own router' if own else 'oracle'}"
        left.plot(rows["layer"], rows["distance"], ls=line, mfc=face, ms=5, label=named, **style)
        place = models.index(model) + (-0.12 if own else 0.12)
        right.plot([place], [100 * rows["score"].iloc[0]], ls="", mfc=face, ms=7, **style)
    left.set(xlabel="after layer (0: embeddings)", ylabel="distance to the teacher (MSE)")
    left.set_xticks(sorted(frame["layer"].unique()))
    left.set_ylim(bottom=0)
    left.legend(fontsize=8.5)
    reference(right, 100 * dense, "teacher")
    right.set_xticks(range(len(models)), models)
    right.set(xlim=(-0.5, len(models) - 0.5), ylabel=f"{metric}, %")
    right.margins(y=0.15)
    headline(fig, title)
    return fig


def _two_loads(ax: Axes, experts: np.ndarray, shares: np.ndarray) -> None:
    """Each expert's share of a sentence as a bar, of a larger set as a line across it."""
    mine = 100 * np.bincount(experts, minlength=len(shares)) / len(experts)
    places = np.arange(len(shares))
    ax.barh(places, mine, color=[expert_color(e) for e in places], height=0.7)
    ax.vlines(100 * shares, places - 0.48, places + 0.48, color=INK, lw=1.6)
    ax.set_yticks(places, places + 1)
    ax.set(xlim=(0, 100), ylim=(len(shares) - 0.4, -0.6), xticks=(0, 50, 100), ylabel="expert")
    ax.tick_params(axis="y", length=0)
