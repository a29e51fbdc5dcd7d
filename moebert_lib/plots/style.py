"""How every figure looks, what its colours mean, and how it is saved.

The drawings are in the modules ``plots_*``. Each takes plain arrays or a DataFrame, draws into
``ax`` (or a new figure) and returns it; none shows or saves. The title states the finding
and comes from the notebook.

Colours that meet in one figure stay apart for eyes without red or green, and in grey print;
where grey brings two together, a mark, a number or a word tells them apart as well.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure, SubFigure

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
    "inverse": "#C4500A",  # the least important neurons shared
    "paper": "#5A5A5A",  # values of the paper: hollow diamonds
    "shared": INDIGO,  # neurons that every expert holds
    "own": "#A9B5E3",  # neurons that one expert holds, whichever
    "dropped": "#DEDEDE",  # neurons that no expert holds
}

#: Marks of the ways to rank neurons, so that colour is never alone in telling them apart.
MARKERS = {"importance": "o", "random": "s", "inverse": "^"}

#: A value of the paper's, as arguments of ``plot``.
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
    "axes.grid": False,
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
    """Set the look of all following figures; once at the top of a notebook."""
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


def axes(ax: Axes | None, size: tuple[float, float] = SINGLE) -> Axes:
    """``ax``, or the axes of a new figure of ``size`` inches."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def panels(
    fig: Figure | SubFigure | None,
    n: int,
    *,
    per_row: int,
    height: float = 2.0,
    head: float = 0.45,
    **subplots,
) -> tuple[Figure | SubFigure, list[Axes]]:
    """``n`` axes in rows of ``per_row`` across the page, in ``fig`` or a new figure.

    ``height`` of one row and ``head`` for the title are in inches; the rest goes to
    ``Figure.subplots``.
    """
    columns = min(n, per_row)
    rows = -(-n // columns)
    if fig is None:
        fig = plt.figure(figsize=(WIDE[0], head + rows * height), layout="constrained")
    grid = list(fig.subplots(rows, columns, squeeze=False, **subplots).flat)
    for spare in grid[n:]:
        spare.set_axis_off()
    return fig, grid[:n]


def headline(drawing: Axes | Figure | SubFigure, title: str, *, legend_rows: int = 0) -> None:
    """Put a left-aligned title, wrapped to the width, and leave ``legend_rows`` under it."""
    letters = max(12, int(15.5 * _room(drawing)))
    text = title = re.sub(r"(?<![\w.])-(?=\d)", "−", title)  # a minus, not a hyphen
    lines = -(-len(title) // letters)
    if lines > 1:  # the narrowest width that needs no further line
        wrapped = (_wrap(title, width) for width in range(len(title) // lines, letters))
        fits = (text for text in wrapped if text.count("\n") < lines)
        text = next(fits, _wrap(title, letters))
    if isinstance(drawing, Axes):
        drawing.set_title(text, loc="left", pad=7 + 14 * legend_rows)
    else:
        drawing.suptitle(text + "\n" * legend_rows, x=0.01, ha="left")


def _wrap(title: str, width: int) -> str:
    """Lines of at most ``width`` letters; names such as hash-random stay in one piece."""
    return textwrap.fill(title, width, break_on_hyphens=False, break_long_words=False)


def _room(drawing: Axes | Figure | SubFigure) -> float:
    """Inches for a title: from the axes' left edge, estimated, to the right of the figure."""
    width = drawing.get_figure(root=True).get_figwidth()
    if not isinstance(drawing, Axes) or not drawing.axison:
        return width - 0.5
    spec = drawing.get_subplotspec()
    labels = max((len(label.get_text()) for label in drawing.get_yticklabels()), default=0)
    return width / (spec.get_gridspec().ncols if spec else 1) - 0.45 - 0.062 * labels


def legend_above(ax: Axes, columns: int, handles: Sequence | None = None) -> int:
    """A legend between title and axes, where it covers no data; returns its rows."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    if not handles:
        return 0
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        borderaxespad=0.15,
        columnspacing=1.4,
        handletextpad=0.5,
    )
    return -(-len(handles) // columns)


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Name lines at their right ends instead of in a legend; names that would touch move apart.

    Call it when the axes have their limits.

    Args:
        ax: Axes with the lines.
        ends: Name to the last ``x``, the last ``y`` and the colour of its line.
    """
    names = sorted(ends, key=lambda name: ends[name][1])
    inches = 0.72 * ax.get_figure(root=True).get_figheight()  # of the axes, about
    at = [ax.transAxes.inverted().transform(ax.transData.transform(ends[n][:2])) for n in names]
    heights, gap = np.array([y for _, y in at]), 0.16 / inches
    for _ in range(100):
        short = np.clip(gap - np.diff(heights), 0, None) / 2
        heights[:-1] -= short
        heights[1:] += short
        heights += max(0, 0.03 - heights[0])  # above the axis
    for name, (x, _), height in zip(names, at, heights, strict=True):
        ink = COLORS["paper"] if ends[name][2] == GREY else ends[name][2]
        ax.annotate(
            name,
            (x, height),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=ink,
            fontsize=9,
            annotation_clip=False,
        )


def legend_under(fig: Figure | SubFigure, handles: Sequence) -> None:
    """One row of legend under a figure's :func:`headline`, which left a line for it."""
    below = 0.05 + 0.2 * fig.get_suptitle().count("\n")  # inches
    height = fig.bbox.height / fig.get_figure(root=True).dpi
    fig.legend(
        handles=handles,
        ncols=len(handles),
        loc="upper left",
        bbox_to_anchor=(0.005, 1 - below / height),
        columnspacing=1.4,
        handletextpad=0.5,
    )


def depth_colors(n_layers: int) -> list[tuple[float, float, float]]:
    """One colour per layer, first light to last dark."""
    return [to_rgb(RAMP(x)) for x in np.linspace(0.27, 1.0, n_layers)]


def expert_color(expert: int) -> str:
    """Colour of expert ``expert``, counted from 0; they repeat after eight."""
    return EXPERTS[expert % len(EXPERTS)]


def ink_on(color: str | Iterable[float]) -> str:
    """Black or white, whichever reads better on ``color``."""
    red, green, blue = to_rgb(color)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else INK


def spread(n: int, width: float = 0.26) -> np.ndarray:
    """Sideways offsets that keep ``n`` points of one category apart, in axis units."""
    return np.linspace(-width / 2, width / 2, n) if n > 1 else np.zeros(n)


def dots(ax: Axes, x: float, values: Sequence[float], *, color: str, marker: str = "o") -> None:
    """Every value as a point around ``x``, and their mean as a short bar."""
    values = np.asarray(values, dtype=float)
    many = len(values) > 1
    ax.plot(
        x + spread(len(values)),
        values,
        marker,
        color=color,
        ls="",
        ms=4.5 if many else 6,
        alpha=0.75 if many else 1,
        zorder=3,
    )
    if many:
        ax.plot(
            [x - 0.24, x + 0.24],
            [values.mean()] * 2,
            color=color,
            lw=2.2,
            zorder=4,
            solid_capstyle="butt",
        )


def all_equal(ax: Axes, width: float) -> None:
    """The share in % that ``width`` neurons would hold if all mattered alike, named on its line."""
    ax.plot([0, width], [0, 100], color=COLORS["random"], lw=1, ls=":")
    ax.text(
        0.4 * width,
        38,
        "all equal",
        rotation=np.degrees(np.arctan2(100, width)),
        transform_rotates_text=True,
        rotation_mode="anchor",
        ha="center",
        va="top",
        color=COLORS["paper"],
        fontsize=9,
    )


def reference(ax: Axes, y: float, label: str, *, color: str = INK, right: bool = True) -> None:
    """A dashed horizontal line, labelled at its end instead of in a legend."""
    ax.axhline(y, color=color, lw=1.0, ls=(0, (4, 3)), zorder=1)
    ink = COLORS["paper"] if color == GREY else color  # GREY is too pale for small letters
    ax.annotate(
        label,
        (1.0 if right else 0.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(-2 if right else 2, 2),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        color=ink,
        fontsize=9,
    )
