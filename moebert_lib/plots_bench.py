"""Figures of the kept benchmarks: every variant beside what limits it, and how cost grows.

A benchmark's timings have columns ``setting``, ``variant``, ``repeat`` and ``seconds``. Speeds are
ratios within a round, and every round is a point.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from moebert_lib.plots import COLORS, WIDE, headline, legend_under, panels
from moebert_lib.plots_speed import (
    DASHES,
    LIMIT,
    MARKS,
    model_and_code,
    name_rows,
    plain_log,
    rows_of_groups,
    variant_color,
    variant_name,
)

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
