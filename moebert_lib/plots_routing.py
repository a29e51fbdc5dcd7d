"""Figures about routing: which expert takes which token, and how evenly (Sec. 3.2)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from moebert_lib.plots import (
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
            ax.text(expert, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=8.5,
                    color=ink_on(RAMP(share / top)[:3]))  # fmt: skip
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
        ax.text(token, layer, int(expert) + 1, ha="center", va="center", fontsize=8.5,
                color=ink_on(color))  # fmt: skip
    ax.set_xticks(range(n_tokens), tokens, rotation=45, ha="left", rotation_mode="anchor")
    ax.xaxis.tick_top()
    ax.set_yticks(range(n_layers), range(1, n_layers + 1))
    ax.set(xlim=(-0.5, n_tokens - 0.5), ylim=(n_layers - 0.5, -0.5), ylabel="layer")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    headline(ax, title)
    return ax


def token_maps(
    ways: Mapping[str, tuple[Sequence[str], ArrayLike]],
    *,
    fig: Figure | SubFigure | None = None,
    title: str = "",
) -> Figure | SubFigure:
    """One :func:`token_map` under the other; the tokens stand once, on top.

    Args:
        ways: Name of each map to the ``T`` tokens and the experts ``(T, L)``; the tokens of
            all are the same.
        fig: Where to draw; none makes a new figure.
        title: The finding.
    """
    n_layers = np.asarray(next(iter(ways.values()))[1]).shape[1]
    height = 0.35 + 0.2 * n_layers
    fig, grid = panels(fig, len(ways), per_row=1, height=height)
    for place, ((name, (tokens, experts)), ax) in enumerate(zip(ways.items(), grid, strict=True)):
        token_map(tokens if place == 0 else [""] * len(tokens), experts, ax=ax)
        ax.set_ylabel(name.replace("-", "-\n"), rotation=0, ha="right", va="center")
    fig.supylabel("layer", fontsize=10)
    headline(fig, title)
    return fig
