"""How every figure looks, what its colours mean, and how it is saved.

The drawings are in ``plots_importance``, ``plots_experts``, ``plots_learning``,
``plots_results`` and ``plots_routing``. Each takes plain arrays or a DataFrame, draws into
``ax`` (or a new figure) and returns it; none shows or saves. The title states the finding
and comes from the notebook.

Colours are safe for red-green blindness, and differ in lightness so they survive grey
printing. Experts are told apart by number as well.
"""

import os
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure, SubFigure

from moebert_lib import store

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

#: A value of the paper's, as arguments of ``plot``.
DIAMOND = dict(marker="D", mfc="white", mec=COLORS["paper"], mew=1.3, ms=6, color=COLORS["paper"])

#: One colour per expert, in order; also told apart by number.
EXPERTS = (
    "#882255", "#56B4E9", "#228833", "#EDDC5C", "#D98BA3", "#5E3A1A", "#8FD3B6", "#A05AC8",
)  # fmt: skip

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
    "svg.fonttype": "path",
}


def use_style() -> None:
    """Set the look of all following figures; once at the top of a notebook."""
    mpl.rcParams.update(STYLE)


def save(drawing: Axes | Figure, name: str, data: pd.DataFrame | None = None) -> Path:
    """Write a figure as PNG and SVG, with the numbers behind it as CSV.

    The same drawing gives the same bytes. Files appear whole or not at all, in
    ``store.output_dir()``.

    Args:
        drawing: What a plot function returned.
        name: File name without ending, such as ``"figure2a"``.
        data: The numbers drawn, one row per mark; none writes no CSV.

    Returns:
        Path of the PNG.

    Raises:
        ValueError: ``name`` holds a folder or is empty.
    """
    figure = drawing if isinstance(drawing, Figure) else drawing.get_figure(root=True)
    png = output_file(name, "png")
    settle(figure)
    with mpl.rc_context({"svg.hashsalt": "moebert", "svg.fonttype": "path"}):
        no_date = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
        for ending, metadata in no_date.items():
            options = dict(format=ending, dpi=200, metadata=metadata)
            write(png.with_suffix(f".{ending}"), lambda path, o=options: figure.savefig(path, **o))
    if data is not None:
        write(png.with_suffix(".csv"), lambda path: write_csv(data, path))
    return png


def output_file(name: str, ending: str) -> Path:
    """Where ``name`` is written; refuses anything but a plain name."""
    if not name or Path(name).name != name or "." in name:
        raise ValueError(f"name={name!r} must be a file name without folder or ending")
    return store.output_dir() / f"{name}.{ending}"


def write(path: Path, produce: Callable[[str], object]) -> None:
    """Let ``produce`` write a temporary file, then move it to ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    os.close(handle)
    try:
        produce(temporary)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_csv(data: pd.DataFrame, path: str) -> None:
    """CSV with eight digits: the last bits of a float differ between machines."""
    index = not only_counts(data.index)
    data.to_csv(path, index=index, float_format="%.8g", lineterminator="\n")


def only_counts(index: pd.Index) -> bool:
    """Whether a table's index says nothing: unnamed row numbers, not shown or written."""
    return index.names == [None] and pd.api.types.is_integer_dtype(index)


def settle(figure: Figure) -> None:
    """Lay the figure out once and for all, so that saving it again gives equal bytes.

    Constrained layout starts from where it last stopped, and moves by the last bit of a float.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


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
    lines = -(-len(title) // letters)
    text = title
    if lines > 1:  # the narrowest width that needs no further line
        wrapped = (textwrap.fill(title, width) for width in range(len(title) // lines, letters))
        fits = (text for text in wrapped if text.count("\n") < lines)
        text = next(fits, textwrap.fill(title, letters))
    if isinstance(drawing, Axes):
        drawing.set_title(text, loc="left", pad=7 + 14 * legend_rows)
    else:
        drawing.suptitle(text + "\n" * legend_rows, x=0.01, ha="left")


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
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns,
        borderaxespad=0.15, columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip
    return -(-len(handles) // columns)


def legend_under(fig: Figure | SubFigure, handles: Sequence) -> None:
    """One row of legend under a figure's :func:`headline`, which left a line for it."""
    below = 0.05 + 0.2 * fig.get_suptitle().count("\n")  # inches
    height = fig.bbox.height / fig.get_figure(root=True).dpi
    fig.legend(
        handles=handles, ncols=len(handles), loc="upper left",
        bbox_to_anchor=(0.005, 1 - below / height), columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip


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


def dots(ax: Axes, x: float, values: Sequence[float], *, color: str) -> None:
    """Every value as a point around ``x``, and their mean as a short bar."""
    values = np.asarray(values, dtype=float)
    many = len(values) > 1
    ax.plot(x + spread(len(values)), values, "o", color=color, ms=4.5 if many else 6,
            alpha=0.75 if many else 1, zorder=3)  # fmt: skip
    if many:
        ax.plot([x - 0.24, x + 0.24], [values.mean()] * 2, color=color, lw=2.2, zorder=4,
                solid_capstyle="butt")  # fmt: skip


def reference(ax: Axes, y: float, label: str, *, color: str = INK, right: bool = True) -> None:
    """A dashed horizontal line, labelled at its end instead of in a legend."""
    ax.axhline(y, color=color, lw=1.0, ls=(0, (4, 3)), zorder=1)
    ink = COLORS["paper"] if color == GREY else color  # GREY is too pale for small letters
    ax.annotate(
        label, (1.0 if right else 0.0, y), xycoords=("axes fraction", "data"),
        xytext=(-2 if right else 2, 2), textcoords="offset points",
        ha="right" if right else "left", va="bottom", color=ink, fontsize=9,
    )  # fmt: skip
