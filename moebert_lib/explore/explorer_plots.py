"""Draw the explorer's picture: one column for each of up to three scores, redrawn in place.

A column shows a layer: its sorted scores with the shared, assigned and dropped neurons, the ranks
of each expert's neurons, each expert's share of the layer's score, and the overlap of every two
experts. All is laid out once; a redraw only moves artists, so that it keeps up with a slider.
"""

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from moebert_lib.method.partition import View, interval
from moebert_lib.plots.style import COLORS, INK, RAMP, STYLE, expert_color

WIDTH, HEIGHT, TITLE = 8.5, 5.0, 0.42  # inches
MAX_EXPERTS = 8  # experts
BINS = 240  # steps of the ranking at most, where experts are shown along it
MUTED = "#555555"
#: Inches from the bottom and height of each row of axes; the strip is for several columns.
ROWS = {"strip": (2.62, 0.1), "deal": (1.74, 0.68), "held": (0.1, 1.06)}
CURVE = {True: (2.62, 1.88), False: (3.04, 1.46)}  # alone, or above a strip
INSET = 0.55  # inches for labels to the left of the axes


class Picture:
    """A figure with one :class:`Column` for each view.

    Args:
        figure: Empty; its size is set here.
        views: One to three.
        title: The headline of a figure; a widget has none.
    """

    def __init__(self, figure: Figure, views: list[View], *, title: str = ""):
        height = HEIGHT + bool(title) * TITLE
        figure.set_size_inches(WIDTH, height)
        with mpl.rc_context({**STYLE, "axes.titley": 1.0}):  # titles don't look for room
            if title:
                figure.suptitle(title, x=0.1 / WIDTH, y=1 - 0.1 / height, ha="left", va="top")
            wide = (WIDTH - 0.1) / len(views)
            places = [(0.1 + n * wide, wide) for n in range(len(views))]
            self.columns = [
                Column(figure, at, len(view.ordered), alone=len(views) == 1)
                for at, view in zip(places, views, strict=True)
            ]
            self.update(views)

    def update(self, views: list[View], marked: list[int | None] | None = None) -> None:
        """Show other views in the same columns.

        Args:
            views: As many as there are columns, of the same widths.
            marked: Rank of the chosen neuron in each column.
        """
        lead, limits = views[0], _limits(views)
        for n, (column, view) in enumerate(zip(self.columns, views, strict=True)):
            column.update(view, limits)
            column.mark(view, marked[n] if marked else None)
            alike = n > 0 and len(view.ranking) == len(lead.ranking)
            shared = lead.ranking[: lead.n_shared]
            column.where(np.isin(view.ranking, shared) if alike else None)

    def mark(self, views: list[View], marked: list[int | None]) -> None:
        """Move the chosen neuron's mark only."""
        for column, view, rank in zip(self.columns, views, marked, strict=True):
            column.mark(view, rank)


class Column:
    """The axes and artists of one view.

    Axes have no axis but for the scores': a few texts are drawn in a tenth of the time.

    Args:
        figure: Of its final size.
        place: Inches from the figure's left edge, and the column's width in inches.
        width: Neurons of a layer.
        alone: Whether there is no other column.
    """

    def __init__(self, figure: Figure, place: tuple[float, float], width: int, *, alone: bool):
        self.figure, self.left, self.wide = figure, *place
        room = self.wide - INSET - 0.14
        half = min(1.06, 0.4 * room)
        curve = CURVE[alone]
        self.heading = [
            self._text((0.05, sum(curve) + lift), size, color, va="baseline", parse_math=False)
            for lift, size, color in ((0.27, 10.5, INK), (0.1, 8.5, MUTED))
        ]
        self.curve = self._axes(INSET, curve, room, yscale="log")
        self.strip = self._axes(INSET, ROWS["strip"], room)
        self.deal = self._axes(INSET, ROWS["deal"], room)
        self.held = self._axes(INSET, ROWS["held"], room - half - 0.3)
        self.overlap = self._axes(INSET + room - half, ROWS["held"], half)
        self._fill_curve(width)
        self._fill_strip()
        self._fill_deal(width, room)
        self._fill_held(room - half)

    def _axes(self, start: float, row: tuple[float, float], length: float, **options) -> Axes:
        height, (bottom, tall) = self.figure.get_figheight(), row
        box = ((self.left + start) / WIDTH, bottom / height, length / WIDTH, tall / height)
        ax = self.figure.add_axes(box, **options)
        ax.xaxis.set_visible(False)
        if not options:
            ax.set_axis_off()
        return ax

    def _text(self, at: tuple[float, float], size: float, color: str, **options) -> Text:
        """A text so many inches from the column's left and the figure's lower edge."""
        x, y = (self.left + at[0]) / WIDTH, at[1] / self.figure.get_figheight()
        return self.figure.text(x, y, options.pop("s", ""), fontsize=size, color=color, **options)

    def _side_label(self, left: float, row: tuple[float, float], text: str) -> None:
        bottom, tall = row
        place = (left, bottom + tall / 2)
        self._text(place, 8.5, INK, s=text, rotation=90, ha="center", va="center")

    def _fill_curve(self, width: int) -> None:
        ax, names = self.curve, ("shared", "own", "dropped")
        across = ax.get_xaxis_transform()
        self.spans = [ax.axvspan(0, 1, color=COLORS[name], alpha=0.35, lw=0) for name in names]
        self.names = [
            ax.text(
                0, 0.97, "", transform=across, ha="center", va="top", fontsize=8.5, linespacing=1.05
            )
            for _ in names
        ]
        (self.line,) = ax.plot([], [], color=INK, lw=1.4)
        (self.stem,) = ax.plot([], [], color=INK, lw=0.8, ls=(0, (3, 2)))
        (self.point,) = ax.plot([], [], "o", mfc="white", mec=INK, mew=1.4, ms=6.5, zorder=5)
        ax.set_xlim(0, width)
        self.ticks = LogLocator(numticks=5)
        ax.yaxis.set_major_locator(self.ticks)
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(_plain))
        ax.tick_params(labelsize=8)
        bottom, tall = (n * self.figure.get_figheight() for n in ax.get_position().bounds[1::2])
        self._side_label(0.1, (bottom, tall), "score / mean")

    def _fill_strip(self) -> None:
        self.density = self.strip.imshow(
            np.zeros((1, 1)), aspect="auto", cmap=RAMP, vmin=0, vmax=1, interpolation="nearest"
        )
        self.caption = self._text(
            (INSET, sum(ROWS["strip"]) + 0.05), 8, MUTED, s="where column 1's shared neurons rank"
        )

    def _fill_deal(self, width: int, room: float) -> None:
        ax = self.deal
        self.image = ax.imshow(np.zeros((1, 1, 3)), aspect="auto", interpolation="nearest")
        self.cuts = [ax.axvline(0, color=INK, lw=0.8) for _ in range(2)]
        (self.below,) = ax.plot(
            [0, 0], [0, 1], transform=ax.get_xaxis_transform(), color=INK, lw=0.8, ls=(0, (3, 2))
        )
        ax.set_xlim(0, width)
        at = ROWS["deal"][0] - 0.04
        for x, words, side in (
            (0, "1", "left"),
            (room, f"{width:,}", "right"),
            (room / 2, "rank, highest score first", "center"),
        ):
            self._text((INSET + x, at), 8.5, INK, s=words, ha=side, va="top")

    def _fill_held(self, overlap_at: float) -> None:
        ax, rows = self.held, range(MAX_EXPERTS)
        self.common = ax.barh(rows, 1, 0.8, color=COLORS["shared"])
        self.alone = ax.barh(rows, 1, 0.8, color=[expert_color(e) for e in rows])
        self.masses = [ax.text(0, e, "", va="center", fontsize=8) for e in rows]
        ax.set_xlim(0, 100 * (1 + 0.3 / (overlap_at - 0.3)))
        self.numbers = [
            axes.text(
                -0.03 / n,
                0,
                str(e + 1),
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="center",
                fontsize=8,
            )
            for axes, n in ((self.deal, 2), (ax, 1))
            for e in rows
        ]
        for row in ("deal", "held"):
            self._side_label(0.2, ROWS[row], "expert")
        above = sum(ROWS["held"]) + 0.05
        self._text((INSET, above), 8.5, MUTED, s="score held, %")
        right = INSET + overlap_at + self.overlap.get_position().width * WIDTH
        self.shared_by = self._text((right, above), 8.5, MUTED, ha="right")
        self.common_image = self.overlap.imshow(
            np.zeros((1, 1)), cmap=RAMP, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )

    def update(self, view: View, limits: tuple[float, float]) -> None:
        """Show ``view``; ``limits`` are those of the scores' axis."""
        for text, words in zip(self.heading, view.heading, strict=True):
            text.set_text(words)
        self.curve.set_ylim(*limits)
        self.ticks.set_params(subs=(1, 2, 5) if limits[1] < 50 * limits[0] else (1,))
        self._update_curve(view)
        self._update_deal(view)
        self._update_held(view)

    def _update_curve(self, view: View) -> None:
        width, seen = len(view.ordered), view.relative[view.ordered > 0]
        self.line.set_data(np.arange(len(seen)) + 0.5, seen)
        edges = (0, view.n_shared, view.n_kept, width)
        for n, name in enumerate(("shared", "dealt", "dropped")):
            start, stop = edges[n : n + 2]
            self.spans[n].set(x=start, width=stop - start)
            held = f"{100 * (view.top(stop) - view.top(start)):.0f}%"
            room = (stop - start) / width * self.curve.get_position().width * WIDTH  # inches
            count = f" {stop - start:,}" if room > 0.66 else ""
            words = f"{name}{count}\n{held}" if room > 0.33 else held
            self.names[n].set(x=(start + stop) / 2, text=words, visible=room > 0.27)

    def _update_deal(self, view: View) -> None:
        n_experts, width = len(view.hands), len(view.ordered)
        self.image.set_data(tints(view))
        self.image.set_extent((0, width, n_experts - 0.5, -0.5))
        for line, edge in zip(self.cuts, (view.n_shared, view.n_kept), strict=True):
            line.set_xdata([edge, edge])
            line.set_visible(0 < edge < width)
        for n, number in enumerate(self.numbers):
            number.set(y=n % MAX_EXPERTS, visible=n % MAX_EXPERTS < n_experts)
        for ax in (self.deal, self.held):
            ax.set_ylim(n_experts - 0.5, -0.5)

    def _update_held(self, view: View) -> None:
        n_experts, shared = len(view.hands), 100 * view.top(view.n_shared)
        for e in range(MAX_EXPERTS):
            held = 100 * view.mass[e] if e < n_experts else 0.0
            self.common[e].set_width(min(shared, held))
            self.alone[e].set(x=shared, width=max(held - shared, 0))
            self.masses[e].set(x=held + 2, text=f"{held:.0f}", visible=e < n_experts)
        overlap = view.overlap
        self.common_image.set_data(overlap)
        self.common_image.set_extent((-0.5, n_experts - 0.5, n_experts - 0.5, -0.5))
        self.overlap.set(xlim=(-0.5, n_experts - 0.5), ylim=(n_experts - 0.5, -0.5))
        apart = 100 * overlap[~np.eye(n_experts, dtype=bool)]
        self.shared_by.set_text(f"overlap: {interval(apart)}%" if n_experts > 1 else "one expert")

    def mark(self, view: View, rank: int | None) -> None:
        """Mark the neuron of a rank; ``None`` removes the mark."""
        for artist in (self.stem, self.point, self.below):
            artist.set_visible(rank is not None)
        if rank is not None:
            x = rank + 0.5
            height = view.relative[rank]
            self.stem.set_data([x, x], [self.curve.get_ylim()[0], height])
            self.below.set_xdata([x, x])
            self.point.set_data([x], [height])

    def where(self, chosen: np.ndarray | None) -> None:
        """Show where chosen neurons lie in the ranking ``(F,)``; ``None`` hides the strip."""
        self.density.set_visible(chosen is not None)
        self.caption.set_visible(chosen is not None)
        if chosen is None:
            return
        starts = np.arange(0, len(chosen), max(1, len(chosen) // 60))
        parts = np.add.reduceat(chosen.astype(float), starts)
        self.density.set_data((parts / np.diff(np.r_[starts, len(chosen)]))[None])


def _limits(views: list[View]) -> tuple[float, float]:
    """Return one range of scores for all columns, with room for names above the lines."""
    positive = [view.relative[view.ordered > 0] for view in views]
    low = min((values[-1] for values in positive if len(values)), default=0.1)
    high = max((values[0] for values in positive if len(values)), default=1.0)
    return low / 1.3, high * (high / low) ** 0.25 * 1.3


def _plain(value: float, _position: int) -> str:
    """Format a tick as a plain number, or as a power of ten where that is long."""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    return f"$10^{{{round(np.log10(value))}}}$"


def tints(view: View) -> np.ndarray:
    """Return the colours of every expert along the ranking, ``(E, steps, 3)``.

    A step is the mean colour of its neurons. Its length is a multiple of the number of experts,
    since neurons are assigned in turn.
    """
    n_experts, width = len(view.hands), len(view.ordered)
    holds, shared = view.holds, np.arange(width) < view.n_shared
    colors = np.empty((n_experts, width, 3))
    colors[:] = to_rgb(COLORS["dropped"])
    for expert in range(n_experts):
        colors[expert, holds[expert]] = to_rgb(expert_color(expert))
        colors[expert, shared] = to_rgb(COLORS["shared"])
    step = n_experts * max(1, width // BINS // n_experts) if width > BINS else 1
    starts = np.arange(0, width, step)
    lengths = np.diff(np.r_[starts, width])
    return np.add.reduceat(colors, starts, axis=1) / lengths[:, None]
