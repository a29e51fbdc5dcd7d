"""Figures about speed (Fig. 4): every timing is a point, their median a line or a bar.

A variant of ``bench`` is a model and the code that runs it: ``"dense"`` as transformers runs it,
``"dense, accelerated"`` after ``accelerate``. The two are drawn as groups, each with its own limit.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from moebert_lib.config.paper_numbers import DIGITISED
from moebert_lib.plots.style import (
    COLORS,
    DIAMOND,
    SINGLE,
    WIDE,
    axes,
    headline,
    label_ends,
    legend_above,
    legend_under,
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


# Figures of the kept benchmarks: every variant beside what limits it, and how cost grows.
# A benchmark's timings have columns ``setting``, ``variant``, ``repeat`` and ``seconds``.
# Speeds are
# ratios within a round, and every round is a point.

TARGET = COLORS["inverse"]
TOLD = ("experts of one size", "tokens", "layers")  # axes that a headline has room for
HEAD = 1.15  # inches above and below the panels


def ratios(
    timings: pd.DataFrame,
    *,
    against: str,
    targets: Iterable[Mapping[str, Any]] = (),
    about: str = "",
    fig: Figure | SubFigure | None = None,
    title: str = "",
) -> Figure | SubFigure:
    """How many times as fast as one variant every variant is, a panel for each setting.

    A round is a point, the thick line goes from quartile to quartile, the bar is the median and
    the number its value. The equal-FLOP model of each code is a dashed line across the rows of
    that code; what was wanted is an orange stroke.

    Args:
        timings: Columns ``setting``, ``variant``, ``repeat`` and ``seconds``.
        against: The variant whose speed is 1.
        targets: As ``bench.judge`` returns them; those without a wanted value are not drawn.
        about: What was measured on which machine, for under the panels.
        fig: Where to draw; none makes a new figure.
        title: The finding.
    """
    settings = list(dict.fromkeys(timings["setting"]))
    places, heads = rows_of_groups(list(dict.fromkeys(timings["variant"])))
    rows = _height(timings) - HEAD
    fig, parts = panels(
        fig, len(settings), per_row=len(settings), height=rows, head=HEAD, sharey=True
    )
    wanted = [target for target in targets if target["wanted"] is not None]
    for ax, setting in zip(parts, settings, strict=True):
        timed = timings[timings["setting"] == setting]
        wide = timed.pivot(index="repeat", columns="variant", values="seconds")
        speeds = wide[[against]].to_numpy() / wide
        mine = [target for target in wanted if target["setting"] == setting]
        judged = {target["variant"] for target in wanted}
        _ratio_panel(ax, speeds, places, targets=mine, judged=judged)
        ax.set_title(setting.replace(" x ", " × "), loc="left", fontsize=10)
    name_rows(parts[0], places, heads)
    for ax in parts[1:]:
        ax.tick_params(axis="y", length=0)
    fig.supxlabel(
        f"times as fast as {variant_name(against)}\n{about}".strip(),
        x=0.01,
        ha="left",
        fontsize=9,
        color=COLORS["paper"],
    )
    headline(fig, title, legend_rows=1)
    legend_under(
        fig,
        _ratio_legend(
            limit=LIMIT in timings["variant"].map(_model).to_numpy(), target=bool(wanted)
        ),
    )
    return fig


def _height(timings: pd.DataFrame) -> float:
    """Inches for a row a variant, for headings, titles and what stands below."""
    places, heads = rows_of_groups(list(dict.fromkeys(timings["variant"])))
    return HEAD + 0.55 + 0.24 * (len(places) + len(heads))


def _model(variant: str) -> str:
    return model_and_code(variant)[0]


def _ratio_panel(
    ax: Axes,
    speeds: pd.DataFrame,
    places: Mapping[str, float],
    *,
    targets: Sequence[Mapping[str, Any]],
    judged: set[str],
) -> None:
    """One setting: ``speeds`` are rounds by variants, ``judged`` those with a target anywhere."""
    middles = speeds.median()
    strokes = [(t["variant"], t["wanted"] * middles[t["against"]]) for t in targets]
    for name, place in places.items():
        if name not in speeds:
            continue
        color = COLORS["moebert"] if name in judged else variant_color(name)
        ratio = speeds[name]
        end = max([ratio.max(), *(x for variant, x in strokes if variant == name)])
        ax.plot(
            ratio,
            np.full(len(ratio), place),
            MARKS.get(_model(name), "o"),
            color=color,
            alpha=0.35,
            ms=3,
        )
        ax.plot(
            ratio.quantile([0.25, 0.75]),
            [place, place],
            color=color,
            lw=3,
            alpha=0.8,
            solid_capstyle="butt",
        )
        ax.plot([middles[name]] * 2, [place - 0.3, place + 0.3], color=color, lw=1.8)
        ax.annotate(
            f"{middles[name]:.2f}",
            (end, place),
            xytext=(6, 0),
            va="center",
            textcoords="offset points",
            fontsize=8,
            zorder=4,
            bbox=dict(fc="white", ec="none", pad=0.3),
        )
        if _model(name) == LIMIT:
            code = model_and_code(name)[1]
            rows = [at for other, at in places.items() if model_and_code(other)[1] == code]
            ax.plot(
                [middles[name]] * 2,
                [min(rows) - 0.45, max(rows) + 0.45],
                lw=0.9,
                color=COLORS["dense"],
                ls=(0, (4, 3)),
                zorder=1,
            )
    for variant, x in strokes:
        place = places[variant]
        ax.plot([x, x], [place - 0.42, place + 0.42], color=TARGET, lw=1.6, zorder=5)
    ax.axvline(1, color=COLORS["other"], lw=0.7, zorder=0)
    ax.set_xlim(0, 1.3 * max([speeds.max().max(), *(x for _, x in strokes)]))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.spines["left"].set_visible(False)


def _ratio_legend(*, limit: bool, target: bool) -> list[Line2D]:
    ink = COLORS["paper"]
    handles = [
        Line2D([], [], color=ink, marker="o", ls="", alpha=0.5, ms=3.5, label="one round"),
        Line2D([], [], color=ink, lw=3, alpha=0.8, label="quartiles"),
        Line2D([], [], color=ink, marker="|", ls="", ms=9, mew=1.8, label="median"),
    ]
    if limit:
        handles.append(
            Line2D(
                [], [], color=COLORS["dense"], lw=0.9, ls=(0, (4, 3)), label=f"{LIMIT}, same code"
            )
        )
    if target:
        handles.append(
            Line2D([], [], color=TARGET, marker="|", ls="", ms=11, mew=1.6, label="wanted")
        )
    return handles


def scaling(
    timings: pd.DataFrame,
    table: pd.DataFrame,
    *,
    about: str = "",
    fig: Figure | SubFigure | None = None,
    title: str = "",
) -> Figure | SubFigure:
    """Milliseconds of a call against one size at a time, on logarithmic axes.

    Dotted lines are the operations counted, laid through the median at the largest size: where
    time follows work, points lie on them.

    Args:
        timings: Columns ``axis``, ``value``, ``variant`` and ``seconds``.
        table: Columns ``axis``, ``value``, ``variant`` and ``flops``.
        about: What was measured on which machine, for under the panels.
        fig: Where to draw; none makes a new figure.
        title: The finding.
    """
    flops = table.set_index(["axis", "variant", "value"])["flops"].sort_index()
    kinds = list(dict.fromkeys(timings["axis"]))
    fig, parts = panels(fig, len(kinds), per_row=3, height=2.35, head=0.95)
    for ax, kind in zip(parts, kinds, strict=True):
        mine = timings[timings["axis"] == kind]
        for name, rows in mine.groupby("variant", sort=False):
            _scaling_lines(ax, str(name), rows, flops[kind, name])
        plain_log(ax, base=2)
        values = sorted(set(mine["value"]))
        ax.set_xticks(values[:: 1 + len(values) // 6])
        ax.set(xlabel=kind)
    for ax in parts[::3]:
        ax.set_ylabel("ms a call")
    fig.supxlabel(about, x=0.01, ha="left", fontsize=9, color=COLORS["paper"])
    headline(fig, title, legend_rows=1)
    handles = [_sample(str(name)) for name in dict.fromkeys(timings["variant"])]
    handles.append(Line2D([], [], color=COLORS["paper"], lw=0.9, ls=":", label="operations"))
    legend_under(fig, handles)
    return fig


def _scaling_lines(ax: Axes, name: str, rows: pd.DataFrame, flops: pd.Series) -> None:
    model = _model(name)
    color, marker = variant_color(name), MARKS.get(model, "o")
    ax.plot(rows["value"], 1000 * rows["seconds"], marker, color=color, ls="", alpha=0.35, ms=3)
    median = 1000 * rows.groupby("value")["seconds"].median()
    ax.plot(median.index, median, color=color, ls=(0, DASHES.get(model, ())))
    ax.plot(
        flops.index, flops * median.iloc[-1] / flops.iloc[-1], color=color, lw=0.9, ls=":", zorder=1
    )


def _sample(name: str) -> Line2D:
    model = _model(name)
    return Line2D(
        [],
        [],
        color=variant_color(name),
        marker=MARKS.get(model, "o"),
        ms=3.5,
        ls=(0, DASHES.get(model, ())),
        label=variant_name(name),
    )


def growth(record: Mapping[str, Any]) -> Figure | SubFigure:
    """:func:`scaling` of a record as ``bench.read`` gives it, with its finding."""
    timings, table = pd.DataFrame(record["timings"]), pd.DataFrame(record["summary"])
    moe = timings[timings["variant"].str.startswith("moebert")]
    medians = moe.groupby(["axis", "value"], sort=False)["seconds"].median()
    told = []
    for axis in [axis for axis in TOLD if axis in medians.index] or medians.index.unique("axis"):
        line = medians[axis].sort_index()
        longer, more = line.iloc[-1] / line.iloc[0], line.index[-1] / line.index[0]
        told.append(f"{longer:,.1f} times as long for {more:,.0f} times the {axis}")
    title = "MoEBERT takes " + ", ".join(told[:-1]) + " and " * (len(told) > 1) + told[-1]
    return scaling(timings, table, about=origin(record), title=title)


def page(records: Mapping[str, Mapping[str, Any]]) -> Figure:
    """:func:`ratios` of several benchmarks, one under the other, each with its own finding.

    Args:
        records: By name, as ``bench.read`` gives them.
    """
    frames = {name: pd.DataFrame(record["timings"]) for name, record in records.items()}
    heights = [_height(timings) for timings in frames.values()]
    gpu = any(_on_gpu(record) for record in records.values())
    fig = plt.figure(figsize=(WIDE[0], sum(heights)), layout="constrained")
    parts = fig.subfigures(len(frames), 1, height_ratios=heights, squeeze=False).flat
    for part, (name, timings) in zip(parts, frames.items(), strict=True):
        record = records[name]
        ratios(
            timings,
            against=baseline(record),
            targets=record["targets"],
            fig=part,
            about=origin(record, gpu=gpu),
            title=found(name, record),
        )
    return fig


def baseline(record: Mapping[str, Any]) -> str:
    """The variant that a record's ratios refer to: whose own is one in every setting."""
    ones = pd.DataFrame(record["summary"]).groupby("variant", sort=False)["ratio"]
    return next(str(name) for name, ratio in ones if (ratio == 1).all())


def found(name: str, record: Mapping[str, Any]) -> str:
    """A benchmark's finding in one sentence: of the first target, or of the fastest variant.

    Args:
        name: What was measured.
        record: As ``bench.read`` gives it.
    """
    against, targets = baseline(record), record["targets"]
    table = pd.DataFrame(record["summary"])
    fastest = table.loc[table["ratio"].idxmax(), "variant"]
    variant = targets[0]["variant"] if targets else fastest
    mine = table[table["variant"] == variant]
    reached = [f"{row.ratio:.2f} ({row.setting})" for row in mine.itertuples()]
    listed = ", ".join(reached[:-1]) + " and " * (len(reached) > 1) + reached[-1]
    subject = variant_name(variant) + "," * ("," in variant_name(variant))
    said = f"{name.capitalize()}: {subject} is {listed} times as fast as {variant_name(against)}"
    wanted = [target["met"] for target in targets if target["met"] is not None]
    told = f"; {sum(wanted)} of {len(wanted)} targets met" if wanted else ""
    return (said + told).replace(" x ", " × ")


def _on_gpu(record: Mapping[str, Any]) -> bool:
    return record["what"].endswith("-cuda")


def origin(record: Mapping[str, Any], *, gpu: bool = True) -> str:
    """Whose numbers a record has: machine, versions, commit and day, in one line.

    Args:
        record: From ``bench.read``.
        gpu: There is a record of a GPU too; else it says that there is none.
    """
    machine, versions = record["machine"], record["versions"]
    where = machine.get("gpu" if _on_gpu(record) else "cpu", "unknown processor")
    parts = [
        where,
        f"{machine['cores']} cores" if "cores" in machine else "",
        f"torch {versions['torch']}",
        f"commit {record['commit'][:7]}",
        record["created"][:10],
        "" if gpu else "no GPU was measured yet",
    ]
    return ", ".join(part for part in parts if part)
