"""Figures about speed (Fig. 4): every timing is a point, their median a line or a number.

A variant of ``bench`` is a model and the code that runs it: ``"dense"`` as transformers runs it,
``"dense, accelerated"`` after ``accelerate``. Panels compare models run by the same code, each
with its own limit. A record is what ``bench.harness.read`` returns.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moebert_lib.config.paper_numbers import DIGITISED
from moebert_lib.plots import style
from moebert_lib.plots.style import COLORS, DIAMOND, SINGLE, WIDE

#: A dense model with an FFN as narrow as one expert: no router can be faster in the same code.
LIMIT = "equal FLOPs"

#: Dashes and markers of models, beside their colours.
DASHES = {"moebert gate-sentence": (4, 2), LIMIT: (4, 2), "half depth": (1, 1.5)}
MARKS = {LIMIT: "D", "half depth": "v", "moebert gate-sentence": "s", "release style": "X"}

#: Codes that run a model, as variants name them, and as figures do.
CODES = {
    "ordinary": "as transformers runs them",
    "compiled": "the same, compiled",
    "bf16": "the same in bfloat16",
    "accelerated": "accelerated",
    "accelerated, bf16": "accelerated, bfloat16",
}

_DASHED = {"color": COLORS["dense"], "lw": 1, "ls": (0, (4, 3)), "zorder": 1}

#: Sizes whose effect the title of :func:`growth` states.
GROWN = ("experts of one size", "tokens", "layers")


def model_and_code(variant: str) -> tuple[str, str]:
    """A variant's model, and the code that runs it.

    Example:
        >>> model_and_code("dense, accelerated, bf16"), model_and_code("half depth")
        (('dense', 'accelerated, bf16'), ('half depth', 'ordinary'))
    """
    model, _, code = variant.partition(", ")
    return (model, code) if code in CODES else (variant, "ordinary")


def variant_name(name: str) -> str:
    """The name of a variant in figures.

    Example:
        >>> variant_name("moebert gate-sentence"), variant_name("dense, accelerated")
        ('MoEBERT, gate-sentence', 'dense BERT, accelerated')
    """
    name = re.sub("^dense(?=,|$)", "dense BERT", name).replace("moebert", "MoEBERT")
    return name.replace("MoEBERT ", "MoEBERT, ")


def variant_color(name: str) -> str:
    """Colour of a variant: ink for dense BERT, indigo for MoEBERT, grey for others."""
    if name.lower().startswith("moebert"):
        return COLORS["moebert"]
    return COLORS["dense" if model_and_code(name)[0] == "dense" else "other"]


def _look(model: str) -> dict[str, Any]:
    """How a model's line and marks are drawn, as arguments of ``plot``."""
    dashes = (0, DASHES.get(model, ()))
    return {"color": variant_color(model), "marker": MARKS.get(model, "o"), "ls": dashes}


def _by_code(timings: pd.DataFrame) -> pd.DataFrame:
    """Timings with the columns ``model`` and ``code``, for panels."""
    parts = pd.DataFrame(timings["variant"].map(model_and_code).tolist(), timings.index)
    return timings.assign(model=parts[0], code=parts[1].map(CODES))


def speed(
    timings: pd.DataFrame, *, ratios: Mapping[str, float] | None = None, title: str = ""
) -> Figure:
    """Examples a second of each model (Fig. 4), a panel for each code that runs the models.

    The dashed line of a panel is its equal-FLOP model: no router can be faster in that code.

    Args:
        timings: Columns ``variant`` and ``seconds`` of one example. The first variant is the
            one that ``ratios`` refer to.
        ratios: The paper's speed over BERT, by variant: hollow diamonds.
        title: What the figure shows.
    """
    frame = _by_code(timings).assign(rate=1 / timings["seconds"])
    base = frame.loc[frame["variant"] == frame["variant"].iloc[0], "rate"].median()

    def draw(ax: Axes, rows: pd.DataFrame) -> None:
        medians = _rows(ax, rows[rows["model"] != LIMIT], "model", "rate", _three_digits)
        for place, model in enumerate(medians.index):
            if model in (ratios or {}) and model in set(rows["variant"]):
                ax.plot(base * ratios[model], place, ls="", zorder=5, **DIAMOND)
        limit = rows.loc[rows["model"] == LIMIT, "rate"]
        if len(limit):
            ax.axvline(limit.median(), **_DASHED)
        ax.set_xlim(0, 1.05 * frame["rate"].max())

    handles = [Line2D([], [], label=f"{LIMIT}, median", **_DASHED)]
    if ratios:
        label = f"paper's ratio to BERT ({DIGITISED})"
        handles.append(Line2D([], [], ls="", label=label, **DIAMOND))
    labels = ("examples a second (beside each name: median)", "")
    look = {"per_row": 2, "height": 2.6, "handles": handles, "sharey": False}
    return style.facets(frame, "code", draw, title=title, labels=labels, **look)


def _three_digits(value: float) -> str:
    """A number without a power of ten: 6.56, 13.0, 2,421."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _rows(
    ax: Axes, timed: pd.DataFrame, name: str, value: str, written: Callable[[float], str]
) -> pd.Series:
    """A strip of variants below each other, with their medians in words, which are returned."""
    colors = {variant: variant_color(variant) for variant in timed[name].unique()}
    style.strip(ax, timed, name, value, colors=colors, rows=True, middle="median")
    medians = timed.groupby(name, sort=False)[value].median()
    labels = [f"{variant_name(name)}   {written(median)}" for name, median in medians.items()]
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(left=0)
    return medians


def latency(timings: pd.DataFrame, *, title: str = "") -> Figure:
    """Milliseconds of one sentence against its tokens, a panel for each code that runs models.

    ``timings`` has the columns ``variant``, ``tokens`` and ``seconds``, one row per timing.
    """
    frame = _by_code(timings).assign(ms=1000 * timings["seconds"])

    def draw(ax: Axes, rows: pd.DataFrame) -> None:
        ends = {}
        for model, timed in rows.groupby("model", sort=False):
            median = _median_line(ax, timed, "tokens", "ms", model)
            ends[variant_name(model)] = (median.index[-1], median.iloc[-1], variant_color(model))
        ax.set_xticks(sorted(set(frame["tokens"])))
        ax.set_xlim(left=0)
        ax.set_ylim(0, 1.05 * frame["ms"].max())
        style.label_ends(ax, ends)

    labels = ("tokens in the sentence", "ms per sentence (line: median)")
    return style.facets(frame, "code", draw, title=title, labels=labels, per_row=2, height=2.7)


def _median_line(ax: Axes, timed: pd.DataFrame, x: str, y: str, model: str) -> pd.Series:
    """Every timing as a pale point, and a line through the medians, which are returned."""
    look = _look(model)
    points = {"alpha": 0.4, "ms": 3, **look, "ls": ""}
    ax.plot(timed[x], timed[y], **points)
    median = timed.groupby(x)[y].median()
    ax.plot(median.index, median, **{**look, "marker": ""})
    return median


def roof(rows: pd.DataFrame, *, flops: float, bandwidth: float, title: str = "") -> Axes:
    """Operations a second against operations per byte, below the best this machine can do.

    Left of the bend memory is the limit (the slope is its bandwidth), right of it arithmetic.

    Args:
        rows: Columns ``variant``, ``tokens``, ``seconds``, ``flops`` and ``bytes``, one row per
            timing. Medians of a variant are joined.
        flops: Measured ceiling of arithmetic, operations a second.
        bandwidth: Measured ceiling of memory, bytes a second.
        title: What the figure shows.
    """
    ax = style.axes((WIDE[0] - 0.6, SINGLE[1] + 0.6))
    frame = rows.assign(
        intensity=rows["flops"] / rows["bytes"], achieved=rows["flops"] / rows["seconds"] / 1e9
    )
    bend, slope = flops / bandwidth, bandwidth / 1e9
    left = min(0.75 * frame["intensity"].min(), bend / 3)
    right = 1.5 * max(frame["intensity"].max(), bend)
    ax.plot([left, bend, right], [left * slope, bend * slope, bend * slope], **_DASHED)
    for model, timed in frame.groupby("variant", sort=False):
        look = _look(model)
        ax.plot(timed["intensity"], timed["achieved"], **{**look, "ls": "", "alpha": 0.4, "ms": 3})
        median = timed.groupby("tokens")[["intensity", "achieved"]].median()
        ax.plot(*median.T.to_numpy(), **look, ms=6, label=variant_name(model))
        for tokens, point in median.iterrows() if model.startswith("moebert") else ():
            place = {"xytext": (4, -10), "textcoords": "offset points", "color": look["color"]}
            ax.annotate(f"{tokens:,}", point, fontsize=8, **place)
    _plain_log(ax)
    ax.set_xlim(left, right)
    ax.set_ylim(0.85 * ax.get_ylim()[0], 1.5 * bend * slope)
    _name_ceilings(ax, left, bend, slope)
    ax.set_xlabel("operations per byte moved (small numbers: tokens)")
    ax.set_ylabel("billion operations a second")
    style.legend_above(ax, 4)
    style.headline(ax, title)
    return ax


def _name_ceilings(ax: Axes, left: float, bend: float, slope: float) -> None:
    """Name both parts of the roof with their measured values."""
    x, level, small = (left * bend) ** 0.5, bend * slope, {"fontsize": 9, "va": "bottom"}
    turned = {"rotation": math.degrees(math.atan2(slope, 1)), "transform_rotates_text": True}
    turned |= {"rotation_mode": "anchor", "ha": "center"}
    ax.text(x, 1.08 * x * slope, f"memory, {slope:,.0f} GB/s", **small, **turned)
    ax.text(1.05 * bend, 1.04 * level, f"arithmetic, {level:,.0f} billion/s", **small)


def _plain_log(ax: Axes, *, base: int = 10) -> None:
    """Logarithmic axes with plain numbers; ``base`` is that of the horizontal one."""
    ax.set_xscale("log", base=base)
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
        if axis is ax.yaxis or base == 10:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def page(records: Mapping[str, Mapping[str, Any]]) -> Figure:
    """How many times as fast as its baseline every variant is: a row of panels per benchmark.

    Speeds are ratios within a round: each round is a point, their median a bar and a number.

    Args:
        records: By name of the benchmark; each of its settings is a panel.
    """
    ratios = {name: _ratios(record) for name, record in records.items()}
    heights = [0.95 + 0.23 * frame["variant"].nunique() for frame in ratios.values()]
    figure = plt.figure(figsize=(WIDE[0], sum(heights)), layout="constrained")
    parts = figure.subfigures(len(records), height_ratios=heights, squeeze=False).flat
    for part, (name, record) in zip(parts, records.items(), strict=True):
        part.suptitle(fastest_in_words(name, record), x=0.01, ha="left")
        part.supxlabel(f"times as fast, median beside it ({origin(record)})", fontsize=9)
        _ratio_panels(part, ratios[name])
    return figure


def _ratios(record: Mapping[str, Any]) -> pd.DataFrame:
    """Columns ``setting``, ``variant``, ``ratio``: speed over the baseline's in the same round."""
    timings, base = pd.DataFrame(record["timings"]), baseline(record)
    of_baseline = timings[timings["variant"] == base].set_index(["setting", "repeat"])["seconds"]
    rounds = pd.MultiIndex.from_frame(timings[["setting", "repeat"]])
    return timings.assign(ratio=of_baseline[rounds].to_numpy() / timings["seconds"])


def _ratio_panels(part: SubFigure, frame: pd.DataFrame) -> None:
    """A panel for each setting, with one row of points for each variant; the names stand left."""
    by_setting = frame.groupby("setting", sort=False)["variant"].unique()
    variants = list(dict.fromkeys([*max(by_setting, key=len), *frame["variant"]]))
    colors = {variant: variant_color(variant) for variant in variants}
    axes = part.subplots(1, len(by_setting), sharex=True, sharey=True, squeeze=False).flat
    for ax, setting in zip(axes, by_setting.index, strict=True):
        rows = frame[frame["setting"] == setting]
        style.strip(
            ax, rows, "variant", "ratio", colors=colors, rows=True, middle="median", order=variants
        )
        beside = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "center"}
        for variant, median in rows.groupby("variant")["ratio"].median().items():
            ax.text(0.99, variants.index(variant), f"{median:.2f}", **beside)
        ax.axvline(1, color=COLORS["other"], lw=0.7, zorder=0)
        ax.set(xlabel="", ylabel="")
        ax.set_title(setting.replace(" x ", " × "), fontsize=10, pad=4)
        ax.set_yticks(range(len(variants)), map(variant_name, variants), fontsize=10)
        ax.tick_params(axis="y", length=0)
    right = frame["ratio"].max() * 1.7 ** len(by_setting)  # room for the numbers
    ax.set(xscale="log", xlim=(0.8 * frame["ratio"].min(), right))  # of all: they share it
    ax.xaxis.set_major_locator(LogLocator(base=4, numticks=9))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


def baseline(record: Mapping[str, Any]) -> str:
    """The variant that a record's ratios refer to: its own ratio is 1 in every setting."""
    ratios = pd.DataFrame(record["summary"]).groupby("variant", sort=False)["ratio"]
    return next(str(name) for name, ratio in ratios if (ratio == 1).all())


def fastest_in_words(name: str, record: Mapping[str, Any]) -> str:
    """A benchmark's result in one sentence: the range of its main variant over the settings.

    The main variant is the one that the record names, else the fastest. Old records have a list
    of targets, whose first is of the main variant.
    """
    table = pd.DataFrame(record["summary"])
    named = [record.get("main"), *(row["variant"] for row in record.get("targets", ()))]
    variant = next(filter(None, named), table.loc[table["ratio"].idxmax(), "variant"])
    ratios = table.loc[table["variant"] == variant, "ratio"]
    times = " to ".join(dict.fromkeys(f"{ratio:.1f}" for ratio in (ratios.min(), ratios.max())))
    base = variant_name(baseline(record))
    return f"{name.capitalize()}: {in_brackets(variant)} is {times} times as fast as {base}"


def in_brackets(variant: str) -> str:
    """A variant's name in a sentence.

    Example:
        >>> in_brackets("moebert gate-sentence, accelerated"), in_brackets("packed")
        ('MoEBERT (gate-sentence, accelerated)', 'packed')
    """
    model, comma, rest = variant_name(variant).partition(", ")
    return f"{model} ({rest})" if comma else model


def origin(record: Mapping[str, Any]) -> str:
    """Where a record comes from: machine, versions, commit and day, in one line."""
    machine, versions = record["machine"], record["versions"]
    on_gpu = record["what"].endswith("-cuda")
    parts = [
        machine.get("gpu" if on_gpu else "cpu", "unknown processor"),
        f"{machine['cores']} cores" if "cores" in machine else "",
        f"torch {versions['torch']}",
        f"commit {record['commit'][:7]}",
        record["created"][:10],
    ]
    return ", ".join(part for part in parts if part)


def growth(record: Mapping[str, Any]) -> Figure:
    """Milliseconds of a call against one size at a time, on logarithmic axes.

    Dotted lines are the operations counted, scaled to the median at the largest size: points lie
    on them where time grows with the operations.

    Args:
        record: Of the benchmark ``scaling``: its timings have ``axis``, ``value``, ``variant``
            and ``seconds``, its summary also ``flops``.
    """
    timings, table = pd.DataFrame(record["timings"]), pd.DataFrame(record["summary"])
    flops = table.set_index(["axis", "variant", "value"])["flops"].sort_index()
    frame = timings.assign(ms=1000 * timings["seconds"])

    def draw(ax: Axes, rows: pd.DataFrame) -> None:
        for variant, timed in rows.groupby("variant", sort=False):
            median = _median_line(ax, timed, "value", "ms", model_and_code(variant)[0])
            counted = flops[rows["axis"].iloc[0], variant]
            scaled = counted * median.iloc[-1] / counted.iloc[-1]
            ax.plot(counted.index, scaled, color=variant_color(variant), lw=0.9, ls=":", zorder=1)
        _plain_log(ax, base=2)
        values = sorted(set(rows["value"]))
        ax.set_xticks(values[:: 1 + len(values) // 6])

    handles = [
        Line2D([], [], ms=3.5, label=variant_name(variant), **_look(model_and_code(variant)[0]))
        for variant in dict.fromkeys(timings["variant"])
    ]
    handles.append(Line2D([], [], color=COLORS["paper"], lw=0.9, ls=":", label="operations"))
    title, labels = _growth_in_words(timings), (origin(record), "ms a call")
    look = {"handles": handles, "sharex": False, "sharey": False}
    return style.facets(frame, "axis", draw, title=title, labels=labels, **look)


def _growth_in_words(timings: pd.DataFrame) -> str:
    """How many times as long MoEBERT takes from the smallest to the largest size."""
    moe = timings[timings["variant"].str.startswith("moebert")]
    medians = moe.groupby(["axis", "value"], sort=False)["seconds"].median()
    sizes = [axis for axis in GROWN if axis in medians.index] or medians.index.unique("axis")
    parts = []
    for axis in sizes:
        line = medians[axis].sort_index()
        longer, more = line.iloc[-1] / line.iloc[0], line.index[-1] / line.index[0]
        parts.append(f"{longer:,.1f} times as long with {more:,.0f} times the {axis}")
    return f"MoEBERT takes {style.listed(parts)}"
