"""Figures about the release: what each of its switches changes, and its importance files."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from moebert_lib.plots import (
    COLORS,
    INK,
    SINGLE,
    WIDE,
    all_equal,
    axes,
    depth_colors,
    headline,
    legend_above,
    spread,
)


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
