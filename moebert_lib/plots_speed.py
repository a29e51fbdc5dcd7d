"""Figures about speed (Fig. 4): every timing is a point, their median a line or a bar.

A variant of ``bench`` is a model and the code that runs it: ``"dense"`` as transformers runs it,
``"dense, accelerated"`` after ``accelerate``. The two are drawn as groups, each with its own limit.
"""

import math
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moebert_lib.paper import DIGITISED
from moebert_lib.plots import (
    COLORS,
    DIAMOND,
    SINGLE,
    WIDE,
    axes,
    headline,
    label_ends,
    legend_above,
    panels,
)

#: A dense model with an FFN as narrow as one expert: what no router can beat in the same code.
LIMIT = "equal FLOPs"

#: Variants of ``bench`` that share a colour with another are told apart by their dashes.
DASHES = {"moebert gate-sentence": (4, 2), LIMIT: (4, 2), "half depth": (1, 1.5)}

#: And by the mark of their timings.
MARKS = {
    "dense": "o",
    LIMIT: "D",
    "half depth": "v",
    "moebert gate-sentence": "s",
    "release style": "X",
}


#: Codes that run a model, as variants name them, and as figures do.
CODES = {
    "ordinary": "as transformers runs them",
    "compiled": "the same, compiled",
    "bf16": "the same in bfloat16",
    "accelerated": "accelerated",
    "accelerated, bf16": "accelerated, bfloat16",
}


def model_and_code(variant: str) -> tuple[str, str]:
    """A variant's model, and the code that runs it.

    Example:
        >>> model_and_code("dense, accelerated, bf16"), model_and_code("half depth")
        (('dense', 'accelerated, bf16'), ('half depth', 'ordinary'))
    """
    model, _, code = variant.partition(", ")
    return (model, code) if code in CODES else (variant, "ordinary")


def speed(
    timings: pd.DataFrame,
    *,
    ratios: Mapping[str, float] | None = None,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Examples a second of each model (Fig. 4); every timing is a point, the median a bar.

    Models are grouped by the code that runs them, and the equal-FLOP model of each group is a
    dashed line across its group: what no router can beat there.

    Args:
        timings: Columns ``variant`` and ``seconds`` of one example. The first variant is the
            one that ``ratios`` refer to.
        ratios: The paper's speed over BERT, by variant: hollow diamonds.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    variants, rates = list(dict.fromkeys(timings["variant"])), {}
    for name, rows in timings.groupby("variant")["seconds"]:
        rates[name] = 1 / rows.to_numpy()
    medians = {name: float(np.median(rate)) for name, rate in rates.items()}
    places, heads = rows_of_groups(variants, beside=LIMIT)
    ax = axes(ax, (SINGLE[0] + 1.4, 1.2 + 0.4 * (len(places) + len(heads))))
    for name, place in places.items():
        color = variant_color(name)
        ax.plot(rates[name], np.full(len(rates[name]), place), "o", color=color, alpha=0.6)
        ax.plot([medians[name]] * 2, [place - 0.3, place + 0.3], color=color, lw=2.2)
        ax.annotate(
            _rate(medians[name]),
            (medians[name], place - 0.34),
            ha="center",
            va="bottom",
            fontsize=9,
            zorder=6,
            bbox=dict(fc="white", ec="none", pad=0.4),
        )
        if name in (ratios or {}):
            ax.plot(
                medians[variants[0]] * ratios[name],
                place,
                ls="",
                zorder=5,
                **DIAMOND,
                label=f"paper's ratio to BERT ({DIGITISED})",
            )
    for limit in (name for name in variants if name not in places):
        _limit(ax, limit, medians[limit], places)
    handles = {
        h.get_label(): h for h in ax.get_legend_handles_labels()[0] if h.get_label()[0] != "_"
    }
    name_rows(ax, places, heads)
    ax.set(xlabel="examples a second (bar: median)")
    ax.set_xlim(left=0)
    headline(ax, title, legend_rows=legend_above(ax, 1, list(handles.values())))
    return ax


def _limit(ax: Axes, limit: str, value: float, places: Mapping[str, float]) -> None:
    """A dashed line across the rows that share a limit's code, with its value at the lower end."""
    code = model_and_code(limit)[1]
    mine = [place for name, place in places.items() if model_and_code(name)[1] == code]
    top, end = min(mine, default=0) - 0.5, max(mine, default=0) + 0.5
    ax.plot([value, value], [top, end], color=COLORS["dense"], lw=1, ls=(0, (4, 3)), zorder=1)
    ax.annotate(
        f"{LIMIT}: {_rate(value)}",
        (value, end),
        xytext=(0, -1),
        va="top",
        ha="center",
        textcoords="offset points",
        fontsize=9,
    )


def rows_of_groups(
    variants: list[str], *, beside: str | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Where each variant's row stands, group under group by code, and each group's heading.

    Args:
        variants: In the order of their rows within a group.
        beside: A model that has no row of its own.

    Returns:
        Places by variant and places of headings by code; no headings where there is one code.
    """
    named = [(*model_and_code(name), name) for name in variants]
    codes = list(dict.fromkeys(code for _, code, _ in named))
    places, heads, place = {}, {}, 0.0
    for code in codes:
        if len(codes) > 1:
            heads[code] = place
            place += 0.9
        for model, own, name in named:
            if own == code and model != beside:
                places[name] = place
                place += 1
        place += 0.35 if beside is None else 0.6
    return places, heads


def name_rows(ax: Axes, places: Mapping[str, float], heads: Mapping[str, float]) -> None:
    """Names of models at their rows, names of codes above their groups."""
    labels = {place: variant_name(model_and_code(name)[0]) for name, place in places.items()}
    labels |= {place: CODES[code] for code, place in heads.items()}
    ax.set_yticks(sorted(labels), [labels[place] for place in sorted(labels)])
    for tick, place in zip(ax.get_yticklabels(), sorted(labels), strict=True):
        if place in heads.values():
            tick.set(style="italic", color=COLORS["paper"])
    last = max(places.values(), default=0)
    ax.set_ylim(last + (0.95 if heads else 0.45), -0.75 if not heads else -0.45)
    ax.tick_params(axis="y", length=0)


def latency(timings: pd.DataFrame, *, fig: Figure | None = None, title: str = "") -> Figure:
    """Milliseconds of one sentence against its tokens, a panel for each code that runs models.

    Args:
        timings: Columns ``variant``, ``tokens`` and ``seconds``, one row per timing.
        fig: Where to draw; none makes a new figure.
        title: The finding.
    """
    by_code = timings.groupby(
        timings["variant"].map(lambda name: model_and_code(name)[1]), sort=False
    )
    fig, parts = panels(fig, by_code.ngroups, per_row=2, height=2.7, sharey=True)
    for ax, (code, rows) in zip(parts, by_code, strict=True):
        ends = {}
        for name, timed in rows.groupby("variant", sort=False):
            model = model_and_code(str(name))[0]
            color, marker = variant_color(model), MARKS.get(model, "o")
            seconds = 1000 * timed["seconds"]
            ax.plot(timed["tokens"], seconds, marker, color=color, ls="", alpha=0.4, ms=4)
            median = 1000 * timed.groupby("tokens")["seconds"].median()
            ax.plot(median.index, median, color=color, ls=_line(model))
            ends[variant_name(model)] = (median.index[-1], median.iloc[-1], color)
        ax.set(xlabel="tokens in the sentence", xticks=sorted(set(timings["tokens"])))
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        if by_code.ngroups > 1:
            ax.set_title(CODES[code], loc="left", fontsize=10, color=COLORS["paper"])
        label_ends(ax, ends)
    parts[0].set_ylabel("ms per sentence (line: median)")
    headline(fig, title)
    return fig


def roof(
    rows: pd.DataFrame,
    *,
    flops: float,
    bandwidth: float,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Operations a second against operations a byte, under what this machine can do at best.

    Left of the bend memory is the limit (the slope is its bandwidth), right of it arithmetic.

    Args:
        rows: Columns ``variant``, ``tokens``, ``seconds``, ``flops`` and ``bytes``, as
            ``roofline.points`` gives them. Medians of a variant are joined.
        flops: Measured ceiling of arithmetic, operations a second.
        bandwidth: Measured ceiling of memory, bytes a second.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    ax = axes(ax, (WIDE[0] - 0.6, SINGLE[1] + 0.6))
    frame = rows.assign(
        intensity=rows["flops"] / rows["bytes"], achieved=rows["flops"] / rows["seconds"] / 1e9
    )
    bend, roof, ends = flops / bandwidth, flops / 1e9, {}
    left = min(0.75 * frame["intensity"].min(), bend / 3)
    right = 1.5 * max(frame["intensity"].max(), bend)
    ax.plot(
        [left, bend, right],
        [left * bandwidth / 1e9, roof, roof],
        lw=1,
        color=COLORS["dense"],
        ls=(0, (4, 3)),
        zorder=1,
    )
    for name, timed in frame.groupby("variant", sort=False):
        model = model_and_code(str(name))[0]
        color, marker = variant_color(model), MARKS.get(model, "o")
        ax.plot(timed["intensity"], timed["achieved"], marker, color=color, ls="", alpha=0.4, ms=3)
        median = timed.groupby("tokens")[["intensity", "achieved"]].median()
        ax.plot(
            median["intensity"],
            median["achieved"],
            marker,
            color=color,
            ls=_line(model),
            ms=6,
            label=variant_name(model),
        )
        ends[name] = median
    plain_log(ax)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom=0.85 * ax.get_ylim()[0])
    _name_tokens(ax, ends)
    _name_ceilings(ax, left, bend, flops=flops, bandwidth=bandwidth)
    ax.set(
        xlabel="operations for each byte moved (small numbers: tokens)",
        ylabel="billion operations a second",
    )
    headline(ax, title, legend_rows=legend_above(ax, 4))
    return ax


def _name_tokens(ax: Axes, medians: Mapping[str, pd.DataFrame]) -> None:
    """Tokens at the marks of the lowest line, below it, and above the first line's first."""
    first = next(iter(medians))
    lowest = min(medians, key=lambda name: medians[name]["achieved"].iloc[0])
    for name, above in {first: True, lowest: False}.items():
        color = variant_color(name)
        for tokens, (x, y) in medians[name].iloc[: 1 if above else None].iterrows():
            ax.annotate(
                f"{tokens:,}",
                (x, y),
                xytext=(-4, 8) if above else (4, -8),
                fontsize=8,
                textcoords="offset points",
                ha="right" if above else "left",
                zorder=6,
                va="bottom" if above else "top",
                color=color,
            )


def _line(model: str) -> tuple[int, tuple]:
    return (0, DASHES.get(model, ()))


def plain_log(ax: Axes, *, base: int = 10) -> None:
    """Logarithmic axes with plain numbers; ``base`` is that of the horizontal one."""
    ax.set_xscale("log", base=base)
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
        if axis is ax.yaxis or base == 10:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _name_ceilings(ax: Axes, left: float, bend: float, *, flops: float, bandwidth: float) -> None:
    """What limits, written along both parts of the roof, with its measured value."""
    low = (left * bend) ** 0.5
    ax.get_figure(root=True).draw_without_rendering()  # the layout decides the slope
    (x0, y0), (x1, y1) = ax.transData.transform([(1, 1), (10, 10)])
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    ax.annotate(
        f"memory, {bandwidth / 1e9:,.0f} GB/s",
        (low, low * bandwidth / 1e9),
        xytext=(-3, 5),
        textcoords="offset points",
        rotation=angle,
        ha="center",
        va="bottom",
        rotation_mode="anchor",
        fontsize=9,
    )
    ax.annotate(
        f"arithmetic, {flops / 1e9:,.0f} billion/s",
        (bend, flops / 1e9),
        xytext=(6, 3),
        textcoords="offset points",
        ha="left",
        va="bottom",
        fontsize=9,
    )


def variant_name(name: str) -> str:
    """How figures call a variant of ``bench``.

    Example:
        >>> variant_name("moebert gate-sentence"), variant_name("dense, accelerated")
        ('MoEBERT, gate-sentence', 'dense BERT, accelerated')
    """
    return (
        re.sub("^dense(?=,|$)", "dense BERT", name)
        .replace("moebert", "MoEBERT")
        .replace("MoEBERT ", "MoEBERT, ")
    )


def _rate(value: float) -> str:
    """Three digits, without a power of ten: 6.56, 13.0, 2,421."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def variant_color(name: str) -> str:
    """Colour of a variant of ``bench``: ink for dense, indigo for MoEBERT, grey for others."""
    if name.lower().startswith("moebert"):
        return COLORS["moebert"]
    return COLORS["dense" if model_and_code(name)[0] == "dense" else "other"]
