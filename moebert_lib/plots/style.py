"""The look of all figures, the parts that several of them share, and how they are saved.

The drawing functions are in the other files of this folder, one file a subject. Each takes arrays
or a DataFrame, draws a figure with a ``title``, a sentence that says what it shows, and returns
its axes or the figure; none shows or saves it. Scores come in as 0 to 1 and are drawn in %.

Colours that meet in one figure differ for readers who do not see red or green and in grey print;
where grey brings two together, a marker, a number or a word tells them apart as well.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from moebert_lib.evidence.statistics import FEWEST, LEVEL
from moebert_lib.store.run_outputs import (
    finding,
    output_file,
    settle,
    vector_formats,
    write,
    write_csv,
)

#: Figure sizes in inches: half and full width of a page.
SINGLE, WIDE = (4.6, 3.2), (7.4, 3.2)

INDIGO, GREY, INK = "#3D52B5", "#9A9A9A", "#1A1A1A"

#: What colours mean, in every figure. Indigo is "by importance", grey is chance.
COLORS = {
    "dense": INK,  # the BERT before conversion
    "moebert": INDIGO,
    "importance": INDIGO,  # a split by importance
    "random": GREY,  # a random split, chance
    "other": GREY,  # a model drawn for comparison
    "inverse": "#C4500A",  # a split that shares the least important neurons
    "paper": "#5A5A5A",  # values of the paper: hollow diamonds
    "shared": INDIGO,  # neurons of every expert
    "own": "#A9B5E3",  # neurons of a single expert
    "dropped": "#DEDEDE",  # neurons of no expert
}

#: Markers of the ways to rank neurons, beside their colours.
MARKERS = {"importance": "o", "random": "s", "inverse": "^"}

#: How a value of the paper is drawn, as arguments of ``plot``.
DIAMOND = dict(marker="D", mfc="white", mec=COLORS["paper"], mew=1.3, ms=6, color=COLORS["paper"])

#: One colour per expert, in order; also told apart by number.
EXPERTS = (
    "#882255",
    "#56B4E9",
    "#228833",
    "#EDDC5C",
    "#D77590",
    "#591601",
    "#A8C27B",
    "#BB56A0",
)

#: Light to dark, for amounts and for depth (first to last layer).
RAMP = LinearSegmentedColormap.from_list("indigo", ["#F4F5FB", "#A9B5E3", "#3D52B5", "#161F4D"])

STYLE = {
    "font.family": "STIXGeneral",  # comes with matplotlib: the same on every machine
    "mathtext.fontset": "stix",
    "font.size": 10,
    "axes.titlesize": 11,
    "figure.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#444444",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.2,
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "savefig.dpi": 200,
}

#: Metadata that would differ between two runs, switched off.
_UNDATED = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}


def use_style() -> None:
    """Set the look of all following figures; called once at the top of a notebook."""
    mpl.rcParams.update(STYLE)


def save(drawing: Axes | Figure, name: str, data: pd.DataFrame | None = None) -> Path:
    """Write a figure as PNG, and the numbers behind it as CSV, in ``store.output_dir()``.

    Vector formats are written too where the environment variable MOEBERT_FORMATS names them
    (:func:`vector_formats`). Each picture carries its title (:func:`finding`) as metadata. The
    same drawing gives the same bytes, and files are replaced in one step.

    Args:
        drawing: What a plotting function returned.
        name: File name without ending, such as ``"figure2a"``.
        data: The numbers drawn, one row per mark; without them no CSV is written.

    Returns:
        Path of the PNG.

    Raises:
        ValueError: ``name`` holds a folder or is empty, or the figure has no title.
        UserError: MOEBERT_FORMATS names an unknown format.
    """
    figure = drawing if isinstance(drawing, Figure) else drawing.get_figure(root=True)
    png = output_file(name, "png")
    title = finding(figure)
    if not title:
        raise ValueError(f"{name} has no title: give it one with plots.headline")
    settle(figure)
    with mpl.rc_context({"svg.hashsalt": "moebert", "svg.fonttype": "path"}):
        for kind in ("png", *vector_formats()):
            options = {"format": kind, "dpi": 200, "metadata": {"Title": title, **_UNDATED[kind]}}
            write(png.with_suffix(f".{kind}"), partial(figure.savefig, **options))
    if data is not None:
        write(png.with_suffix(".csv"), lambda path: write_csv(data, path))
    return png


def axes(size: tuple[float, float] = SINGLE) -> Axes:
    """The axes of a new figure of ``size`` inches."""
    return plt.subplots(figsize=size, layout="constrained")[1]


def panels(
    n: int, *, per_row: int, height: float, head: float = 0.45, **subplots: Any
) -> tuple[Figure, list[Axes]]:
    """A new figure with ``n`` axes for different drawings, in rows of ``per_row`` across the page.

    ``height`` of one row and ``head`` for the title are in inches.
    """
    rows = -(-n // per_row)
    fig = plt.figure(figsize=(WIDE[0], head + rows * height), layout="constrained")
    return fig, list(fig.subplots(rows, per_row, squeeze=False, **subplots).flat)


def facets(
    frame: pd.DataFrame,
    column: str,
    draw: Callable[[Axes, pd.DataFrame], object],
    *,
    title: str,
    labels: tuple[str, str],
    per_row: int = 3,
    height: float = 2.1,
    name: str = "{}",
    side: str = "left",
    handles: Sequence = (),
    **grid: Any,
) -> Figure:
    """Small multiples across the page: the same drawing for each value of a column.

    Args:
        frame: The rows of all panels.
        column: Its values are the panels, in the order of the rows.
        draw: Called with the axes and the rows of each panel.
        title: What the figure shows.
        labels: Of the horizontal and of the vertical axis, once for all panels.
        per_row: Panels in a row.
        height: Of a panel, in inches.
        name: Title of a panel, with ``{}`` for the value.
        side: Of the panel that its title is aligned with.
        handles: Entries of one legend for all panels.
        grid: For ``seaborn.FacetGrid``, such as ``sharex``.
    """
    values = list(dict.fromkeys(frame[column]))
    columns = min(per_row, len(values))
    grid |= {"height": height, "aspect": WIDE[0] / columns / height, "despine": False}
    facet = sns.FacetGrid(frame, col=column, col_order=values, col_wrap=columns, **grid)
    for value, ax in facet.axes_dict.items():
        draw(ax, frame[frame[column] == value])
        ax.set(xlabel="", ylabel="", title="")
        ax.set_title(name.format(value), loc=side, fontsize=10, pad=4)
    figure = facet.figure
    figure.set_layout_engine("constrained")
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    headline(figure, title, legend=handles)
    return figure


def headline(drawing: Axes | Figure, title: str, *, legend: Sequence = ()) -> None:
    """Set a figure's title on the left, wrapped to its width, with one row of ``legend`` below."""
    figure = drawing.get_figure(root=True) if isinstance(drawing, Axes) else drawing
    width, height = figure.get_size_inches()
    title = re.sub(r"(?<![\w.])-(?=\d)", "−", title)  # a minus, not a hyphen
    letters = max(12, int(15.5 * (width - 0.4)))
    n_lines = max(1, -(-len(title) // letters))
    widths = range(max(12, len(title) // n_lines), letters + 1)
    whole = partial(textwrap.fill, title, break_on_hyphens=False, break_long_words=False)
    text = min(map(whole, widths), key=lambda wrapped: wrapped.count("\n"))  # lines alike in length
    figure.suptitle(text + "\n" * bool(legend), x=0.01, ha="left")
    if legend:
        below = 0.05 + 0.2 * (1 + text.count("\n"))  # inches
        corner = {"loc": "upper left", "bbox_to_anchor": (0.005, 1 - below / height)}
        look = {"columnspacing": 1.4, "handletextpad": 0.5}
        figure.legend(handles=legend, ncols=len(legend), **corner, **look)


def legend_above(ax: Axes, columns: int, handles: Sequence | None = None) -> None:
    """Put a legend between title and axes, where it covers no data."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        corner = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderaxespad": 0.15}
        ax.legend(handles=handles, ncols=columns, columnspacing=1.4, handletextpad=0.5, **corner)


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Name lines at their right ends instead of in a legend; names do not touch each other.

    ``ends`` has the last x, the last y and the colour of each line by name. The axes must have
    their final limits.
    """
    gap = 0.16 / (0.72 * ax.get_figure(root=True).get_figheight())  # one line of text, about
    names = sorted(ends, key=lambda name: ends[name][1])
    ends_on_page = ax.transData.transform([ends[name][:2] for name in names])
    x, y = ax.transAxes.inverted().transform(ends_on_page).T
    for _ in range(100):
        missing = np.clip(gap - np.diff(y), 0, None) / 2
        y[:-1] -= missing
        y[1:] += missing
        y += max(0, 0.03 - y[0])  # above the axis
    offset = {"xytext": (7, 0), "textcoords": "offset points", "annotation_clip": False}
    for name, *place in zip(names, x, y, strict=True):
        look = {"va": "center", "color": _readable(ends[name][2]), "fontsize": 9}
        ax.annotate(name, place, xycoords="axes fraction", **offset, **look)


def broken(names: Iterable[object]) -> list[str]:
    """Names of categories in several lines, so that they fit beside each other."""
    return [str(name).replace("-", "-\n").replace(", ", "\n") for name in names]


def listed(items: Iterable[object]) -> str:
    """Items with commas and "and".

    Example:
        >>> listed([256, 128, 384])
        '256, 128 and 384'
    """
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def above_or_below(gap: float) -> str:
    """A difference in points in words.

    Example:
        >>> above_or_below(1.26), above_or_below(-0.5), above_or_below(-0.01)
        ('1.3 points above', '0.5 points below', '0.0 points above')
    """
    return f"{abs(gap):.1f} points {'below' if round(gap, 1) < 0 else 'above'}"


def order_in_words(compared: pd.DataFrame, subject: str) -> str:
    """A title from comparisons of neighbours: which differ, and which do not clearly differ.

    Args:
        compared: From ``statistics.steps``.
        subject: What the values are, such as ``"Shared neurons"``.

    Example:
        >>> rows = {"better": [256, 384], "worse": [384, 0], "mean": [0.1, 3.1]}
        >>> compared = pd.DataFrame({**rows, "sign": ["?", ">"], "pairs": 3})
        >>> order_in_words(compared, "Shared neurons")[:68]
        'Shared neurons: in all 3 seeds 384 scored 3.1 points above 0; no cle'
    """
    n, parts = int(compared["pairs"].max()), []
    signed = compared[compared["sign"] != "?"].itertuples()
    differ = [f"{row.better} scored {above_or_below(row.mean)} {row.worse}" for row in signed]
    if differ:
        rule = f"in all {n} seeds" if n < FEWEST else f"by {LEVEL:.0%} intervals"
        parts.append(f"{rule} {listed(differ)}")
    group = (compared["sign"] != "?").cumsum()[compared["sign"] == "?"]
    for _, rows in compared[compared["sign"] == "?"].groupby(group):
        values = [rows["better"].iloc[0], *rows["worse"]]
        parts.append(f"no clear difference between {listed(values)}")
    return f"{subject}: {'; '.join(parts)}"


def differing_in_words(compared: pd.DataFrame, base: str) -> str:
    """A title from ``statistics.over``: the values whose interval excludes zero."""
    apart = compared.index[(compared["low"] > 0) | (compared["high"] < 0)]
    if not len(apart):
        return f"No clear difference from {base} (95% intervals, uncorrected)"
    return f"Clearly different from {base} (95% intervals, uncorrected): {'; '.join(apart)}"


def depth_colors(n_layers: int) -> list[tuple[float, float, float]]:
    """One colour per layer, light for the first to dark for the last."""
    return [to_rgb(RAMP(x)) for x in np.linspace(0.27, 1.0, n_layers)]


def expert_color(expert: int) -> str:
    """Colour of expert ``expert``, counted from 0; they repeat after eight."""
    return EXPERTS[expert % len(EXPERTS)]


def ink_on(color: str | Iterable[float]) -> str:
    """Black or white, whichever is easier to read on ``color``."""
    red, green, blue = to_rgb(color)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else INK


def _readable(color: str) -> str:
    """A colour for small letters: grey is too pale for them."""
    return COLORS["paper"] if color == GREY else color


def strip(
    ax: Axes,
    frame: pd.DataFrame,
    place: str,
    value: str,
    *,
    colors: Mapping[Any, str] | None = None,
    markers: Mapping[Any, str] | None = None,
    hollow: Iterable = (),
    rows: bool = False,
    middle: str | None = "mean",
    order: Sequence = (),
) -> list:
    """Draw every run as a point, side by side in its category, and their mean as a short bar.

    Args:
        ax: Where to draw.
        frame: One row per run.
        place: Column of the categories, drawn in the order of the rows.
        value: Column of the values.
        order: All categories in order, where some have no runs here.
        colors: Colours of categories; those not named are drawn as MoEBERT.
        markers: Markers of categories; those not named have circles.
        hollow: Categories whose points are drawn hollow.
        rows: Categories are below each other, values go from left to right.
        middle: What the bar is, ``mean`` or ``median``; None for no bar.

    Returns:
        The categories, at 0, 1, 2, ... on their axis.
    """
    names = list(order or dict.fromkeys(frame[place]))
    color = {name: (colors or {}).get(name, COLORS["moebert"]) for name in names}
    run = frame.groupby(place, sort=False).cumcount()  # side by side in this order
    axis = {"x": value, "y": place} if rows else {"x": place, "y": value}
    axis |= {"order": names, "orient": "h" if rows else "v", "legend": False, "ax": ax}
    points = {"dodge": True, "jitter": False, "alpha": 0.75, "size": 4.5}
    for name in dict.fromkeys(frame[place]):
        here, before = frame[place] == name, len(ax.collections)
        points["palette"] = [color[name]] * here.sum()
        points["marker"] = (markers or {}).get(name, "o")
        sns.stripplot(frame[here], hue=run[here], **points, **axis)
        for drawn in ax.collections[before:] if name in hollow else ():
            drawn.set(facecolor="white", edgecolor=color[name], linewidth=1, alpha=1)
    several = frame[frame[place].map(frame[place].value_counts()) > 1]
    bar = {"marker": "|" if rows else "_", "markersize": 15 if rows else 24, "markeredgewidth": 2.2}
    if middle and len(several):
        axis |= {"hue": place, "palette": color, "estimator": middle, "errorbar": None}
        sns.pointplot(several, linestyle="none", **bar, **axis)
    return names


def seed_lines(ax: Axes, frame: pd.DataFrame, place: str, value: str, *, dodge: float = 0) -> list:
    """Join the runs of each seed over the categories, and draw the means as short bars.

    As :func:`strip`, with ``seed`` in the frame; ``dodge`` is the distance between the points of
    the first and the last seed in a category.
    """
    axis = {"x": place, "y": value, "errorbar": None, "legend": False, "ax": ax}
    n_seeds = frame["seed"].nunique()
    thin = {"hue": "seed", "palette": [COLORS["moebert"]] * n_seeds, "lw": 0.8, "markersize": 4}
    sns.pointplot(frame, dodge=dodge if n_seeds > 1 else False, alpha=0.6, **thin, **axis)
    bar = {"marker": "_", "markersize": 26, "markeredgewidth": 2.2, "color": INK}
    sns.pointplot(frame, linestyle="none", **bar, **axis)
    return list(dict.fromkeys(frame[place]))


def heat(ax: Axes, values: pd.DataFrame, text: pd.DataFrame | str, **options: Any) -> None:
    """Draw a table as a heat map from 0 on; cells without a number stay empty.

    ``text`` stands in the cells, or is the format of the values; ``options`` are those of
    ``seaborn.heatmap``, such as ``vmax``, the value of the darkest colour.
    """
    cells = {"annot": True, "fmt": text} if isinstance(text, str) else {"annot": text, "fmt": ""}
    looks = {"cmap": RAMP, "vmin": 0, "cbar": False, "annot_kws": {"fontsize": 9}} | options
    sns.heatmap(values, ax=ax, **cells, **looks)
    filled = ax.collections[0].get_facecolors()[values.notna().to_numpy().ravel()]
    for word, color in zip(ax.texts, filled, strict=True):
        word.set_color(ink_on(color[:3]))
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)


def reference(ax: Axes, y: float, label: str, *, color: str = INK, right: bool = True) -> None:
    """A dashed horizontal line with its name at one end."""
    ax.axhline(y, color=color, lw=1.0, ls=(0, (4, 3)), zorder=1)
    side = 1 if right else -1
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "bottom"}
    place |= {"xytext": (-2 * side, 2), "ha": "right" if right else "left", "fontsize": 9}
    ax.annotate(label, (max(side, 0), y), color=_readable(color), **place)
