"""The figure of all claims: every comparison of two arms, its pairs and the paper's step."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moebert_lib.plots import COLORS, DIAMOND, INK, WIDE, axes, headline, legend_above
from moebert_lib.verdicts import CLAIMED, CONTRADICTED, NO_RUNS, REPRODUCED, UNDECIDED

#: Verdicts as colours: the method's own, its opposite's, and chance's.
VERDICTS = {
    REPRODUCED: COLORS["moebert"],
    CONTRADICTED: COLORS["inverse"],
    UNDECIDED: COLORS["random"],
    NO_RUNS: COLORS["random"],
}
_SHADE = "#EEF0F9"  # COLORS["own"] so pale that points stand out
_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)


def forest(
    compared: pd.DataFrame, pairs: pd.DataFrame, *, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Differences of every comparison in points: each pair, the mean, the interval, the paper.

    The interval is the one that decides, of whatever pairs the comparison has (``verdicts.judge``).
    The horizontal axis is linear up to one point and logarithmic beyond, since the paper's
    steps are tenths and a short training's can be tens. Comparisons of one claim stand together.

    Args:
        compared: As ``verdicts.compare`` returns it.
        pairs: Columns ``comparison`` and ``difference``, one row per pair.
        ax: Where to draw; none makes a new figure.
        title: The finding.
    """
    groups = (compared["claim"] != compared["claim"].shift()).cumsum()
    places = np.arange(len(compared)) + 0.55 * groups.to_numpy()
    ax = axes(ax, (WIDE[0], 1.5 + 0.22 * (places[-1] + 1 if len(places) else 1)))
    ax.set_xscale("symlog", linthresh=1, linscale=0.9)
    drawn = [*pairs["difference"].abs(), *compared[["paper", "low", "high"]].abs().max(), 1.0]
    reach = 1.35 * max(value for value in drawn if value == value)
    for place, row in zip(places, compared.itertuples(), strict=True):
        low, high = np.clip(CLAIMED[row.kind], -reach, reach)
        ax.barh(place, high - low, left=low, height=0.9, color=_SHADE, lw=0, zorder=0)
        _row(ax, place, row, pairs.loc[pairs["comparison"] == row.comparison, "difference"])
    ax.axvline(0, color=INK, lw=0.9, zorder=1)
    ax.set_yticks(places, compared["comparison"])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set(xlim=(-reach, reach), ylim=(places[-1] + 0.8, places[0] - 0.8))
    marks = [tick for tick in _TICKS if tick < reach]
    ax.xaxis.set_major_locator(FixedLocator(sorted({s * tick for tick in marks for s in (-1, 1)})))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _signed(value)))
    ax.set_xlabel("first minus second, points (linear up to 1, logarithmic beyond)")
    headline(ax, title, legend_rows=legend_above(ax, 2, _handles()))
    return ax


def _row(ax: Axes, place: float, row: tuple, gaps: pd.Series) -> None:
    color = VERDICTS[row.verdict]
    pale = COLORS["paper"] if color == COLORS["random"] else color  # grey letters must be readable
    ax.annotate(
        row.verdict,
        (1.01, place),
        xycoords=("axes fraction", "data"),
        color=pale,
        va="center",
        fontsize=9,
        annotation_clip=False,
    )
    ax.plot(gaps, np.full(len(gaps), place), "o", color=color, ms=4, alpha=0.7, mew=0, zorder=2)
    if np.isfinite(row.low):
        ax.plot([row.low, row.high], [place] * 2, color=color, lw=2, zorder=3)
    if len(gaps) > 1:
        ax.plot([row.mean] * 2, [place - 0.34, place + 0.34], color=color, lw=2, zorder=3)
    ax.plot(row.paper, place, zorder=4, ls="", **{**DIAMOND, "ms": 5})


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", "−") if value else "0"


def _handles() -> list:
    ink = dict(color=COLORS["moebert"])
    return [
        Line2D([], [], ls="", marker="o", ms=4, alpha=0.7, mew=0, label="a pair of runs", **ink),
        Line2D([], [], lw=2, label="mean, and the 95% interval that decides", **ink),
        Line2D([], [], ls="", label="the paper", **{**DIAMOND, "ms": 5}),
        Patch(color=_SHADE, lw=0, label="as claimed (~: within half a point)"),
    ]
