"""Figures about speed (Fig. 4): every timing is a point, their median a line or a bar."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from moebert_lib.paper import DIGITISED
from moebert_lib.plots import COLORS, DIAMOND, SINGLE, axes, headline, label_ends, legend_above

#: Variants of ``bench`` that share a colour with another are told apart by their dashes.
_DASHES = {"moebert gate-sentence": (4, 2), "equal FLOPs": (4, 2), "half depth": (1, 1.5)}

#: And by the mark of their timings.
_MARKS = {"dense": "o", "equal FLOPs": "D", "half depth": "v", "moebert gate-sentence": "s"}


def speed(
    timings: pd.DataFrame,
    *,
    limit: str = "equal FLOPs",
    ratios: Mapping[str, float] | None = None,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Examples a second of each model (Fig. 4); every timing is a point, the median a bar.

    Args:
        timings: Columns ``variant`` and ``seconds`` of one example, as ``bench.inference``
            returns them. The first variant is the one that ``ratios`` refer to.
        limit: A variant drawn as a line: what no router can beat, a dense FFN as narrow as
            one expert.
        ratios: The paper's speed over BERT, by variant: hollow diamonds.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    names = [name for name in dict.fromkeys(timings["variant"]) if name != limit]
    ax = axes(ax, (SINGLE[0] + 0.8, 1.3 + 0.42 * len(names)))
    rates = {name: 1 / rows.to_numpy() for name, rows in timings.groupby("variant")["seconds"]}
    medians = {name: float(np.median(rate)) for name, rate in rates.items()}
    for place, name in enumerate(names):
        color = variant_color(name)
        ax.plot(rates[name], np.full(len(rates[name]), place), "o", color=color, alpha=0.6)
        ax.plot([medians[name]] * 2, [place - 0.3, place + 0.3], color=color, lw=2.2)
        ax.annotate(_rate(medians[name]), (medians[name], place - 0.34), ha="center",
                    va="bottom", fontsize=9, zorder=6,
                    bbox=dict(fc="white", ec="none", pad=0.4))  # fmt: skip
        if name in (ratios or {}):
            ax.plot(medians[names[0]] * ratios[name], place, ls="", zorder=5, **DIAMOND,
                    label=f"paper's ratio to BERT ({DIGITISED})")  # fmt: skip
    if limit in medians:
        ax.axvline(medians[limit], color=COLORS["dense"], lw=1, ls=(0, (4, 3)), zorder=1,
                   label=f"{limit}, dense: {_rate(medians[limit])}")  # fmt: skip
    handles = {h.get_label(): h for h in ax.get_legend_handles_labels()[0]}
    ax.set_yticks(range(len(names)), map(variant_name, names))
    ax.set(xlabel="examples a second (bar: median)", ylim=(len(names) - 0.45, -0.75))
    ax.set_xlim(left=0)
    ax.tick_params(axis="y", length=0)
    headline(ax, title, legend_rows=legend_above(ax, 1, list(handles.values())))
    return ax


def latency(
    timings: pd.DataFrame,
    *,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Milliseconds of one sentence against its tokens; every timing is a point.

    Args:
        timings: Columns ``variant``, ``tokens`` and ``seconds``, one row per timing.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax, ends = axes(ax, (SINGLE[0] + 1.2, SINGLE[1])), {}
    for name, rows in timings.groupby("variant", sort=False):
        color, marker = variant_color(str(name)), _MARKS.get(str(name), "o")
        ax.plot(rows["tokens"], 1000 * rows["seconds"], marker, color=color, ls="", alpha=0.4, ms=4)
        median = 1000 * rows.groupby("tokens")["seconds"].median()
        line = (0, _DASHES.get(str(name), ()))
        ax.plot(median.index, median, color=color, ls=line)
        ends[variant_name(str(name))] = (median.index[-1], median.iloc[-1], color)
    ax.set(xlabel="tokens in the sentence", ylabel="ms per sentence (line: median)")
    ax.set_xticks(sorted(set(timings["tokens"])))
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    label_ends(ax, ends)
    headline(ax, title)
    return ax


def variant_name(name: str) -> str:
    """How figures call a variant of ``bench``.

    Example:
        >>> variant_name("moebert gate-sentence"), variant_name("dense")
        ('MoEBERT, gate-sentence', 'dense BERT')
    """
    return "dense BERT" if name == "dense" else name.replace("moebert ", "MoEBERT, ")


def _rate(value: float) -> str:
    """Three digits, without a power of ten: 6.56, 13.0, 2,421."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def variant_color(name: str) -> str:
    """Colour of a variant of ``bench``: ink for dense, indigo for MoEBERT, grey for others."""
    if name.lower().startswith("moebert"):
        return COLORS["moebert"]
    return COLORS["dense" if name == "dense" else "other"]
