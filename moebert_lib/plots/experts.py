"""Figures about experts: how neurons are dealt to them (Fig. 1), and how many are kept.

An assignment has shape ``(E, K)``: row ``e`` lists the neurons of expert ``e``. A ranking has
shape ``(F,)``: neurons, most important first.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import FancyBboxPatch, Patch
from numpy.typing import ArrayLike

from moebert_lib.plots import style
from moebert_lib.plots.style import COLORS, INK, WIDE

SHARED, DROPPED = -1, -2
MUTED = "#555555"  # of words beside the cards


def owners(assignment: ArrayLike, n_neurons: int) -> np.ndarray:
    """For each neuron the only expert that has it, ``SHARED`` or ``DROPPED``; shape ``(F,)``.

    Example:
        >>> owners([[5, 2, 1], [5, 0, 3]], n_neurons=6).tolist()
        [1, 0, 0, 1, -2, -1]
    """
    owner = np.full(n_neurons, DROPPED)
    for expert, hand in enumerate(assignment):
        hand = np.asarray(hand, dtype=int)
        owner[hand] = np.where(owner[hand] == DROPPED, expert, SHARED)
    return owner


def owner_color(owner: int) -> str:
    """Colour of one entry of :func:`owners`."""
    named = {SHARED: COLORS["shared"], DROPPED: COLORS["dropped"]}
    return named[owner] if owner in named else style.expert_color(owner)


def deal(
    assignment: ArrayLike | Sequence[Sequence[int]],
    ranking: ArrayLike,
    *,
    scores: Sequence[float] | None = None,
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """The deal as cards (Fig. 1): above, neurons by importance; below, the hand of each expert.

    Args:
        assignment: Neurons of each expert, ``(E, K)`` or lists of any lengths.
        ranking: Neurons, most important first: all of a layer, or some. About 16 cards fit.
        scores: Importance by neuron, printed above its card.
        ax: Where to draw; by default in a new figure.
        title: What the figure shows.
    """
    ranking = np.asarray(ranking)
    hands = [np.asarray(hand, dtype=int) for hand in assignment]
    lefts = np.cumsum([0, *(len(hand) + 0.7 for hand in hands)])
    ax = style.axes((WIDE[0], 3.0)) if ax is None else ax
    owner = owners(hands, ranking.max() + 1)
    width = lefts[-1] - 0.7
    top = {neuron: place + (width - len(ranking)) / 2 for place, neuron in enumerate(ranking)}
    for neuron, x in top.items():
        _card(ax, x, 1.9, neuron, owner[neuron])
        if scores is not None:
            ax.text(x + 0.5, 2.72, f"{scores[neuron]:.2g}", ha="center", fontsize=9, color=MUTED)
    for expert, (hand, left) in enumerate(zip(hands, lefts[:-1], strict=True)):
        ax.text(left + len(hand) / 2, -0.14, f"expert {expert + 1}", ha="center", va="top")
        for place, neuron in enumerate(hand):
            _card(ax, left + place, 0, neuron, owner[neuron])
            _thread(ax, top[neuron] + 0.5, left + place + 0.5, owner_color(owner[neuron]))
    low = min(0.0, (width - len(ranking)) / 2)
    if (owner[ranking] == DROPPED).any():
        ax.text(max(top.values()) + 1.15, 2.28, "dropped", va="center", color=MUTED)
    ax.text(low - 0.25, 2.28, "by\nimportance", ha="right", va="center")
    ax.text(low - 0.25, 0.38, "dealt", ha="right", va="center")
    room = max(1.6, 0.13 * (width - 2 * low))  # for the words on the left
    ax.set(xlim=(low - room, width - low + (room if low < 0 else 0.2)), ylim=(-0.5, 3.0))
    ax.set_axis_off()
    style.headline(ax, title)
    return ax


def spaced(
    assignment: ArrayLike, ranking: ArrayLike, *, n: int
) -> tuple[list[int], list[list[int]]]:
    """``n`` neurons at even distances in a ranking, and those of them that each expert has.

    The distance is coprime to the number of experts, which get their neurons in turn; with a
    common factor only some of the experts would be seen.

    Args:
        assignment: Shape ``(E, K)``, neurons of each expert.
        ranking: Shape ``(F,)``, neurons, most important first.
        n: Neurons to pick, at most ``F``.

    Example:
        >>> spaced([[5, 2, 1], [5, 0, 3]], [5, 2, 0, 1, 3, 4], n=6)
        ([5, 2, 0, 1, 3, 4], [[5, 2, 1], [5, 0, 3]])
    """
    ranking, hands = np.asarray(ranking).tolist(), np.asarray(assignment).tolist()
    step = next(s for s in range(len(ranking) // n, 0, -1) if math.gcd(s, len(hands)) == 1)
    seen = ranking[step // 2 :: step][:n]
    return seen, [[neuron for neuron in seen if neuron in hand] for hand in hands]


def _card(ax: Axes, x: float, y: float, neuron: int, owner: int) -> None:
    """A neuron as a card, whose lower left corner is at ``x`` and ``y``."""
    color = owner_color(owner)
    look = {"boxstyle": "round,pad=0,rounding_size=0.09", "fc": color, "ec": "white", "lw": 0.8}
    card = FancyBboxPatch((x + 0.1, y + 0.06), 0.8, 0.64, zorder=3, gid=f"neuron {neuron}", **look)
    ax.add_patch(card)
    text = {"ha": "center", "va": "center", "zorder": 4, "color": style.ink_on(color)}
    size = 12 - max(0, len(str(neuron)) - 2)
    ax.text(x + 0.5, y + 0.37, rf"$h_{{{neuron}}}$", fontsize=size, **text)


def _thread(ax: Axes, x_from: float, x_to: float, color: str) -> None:
    """A curve from a card above to a card below."""
    t = np.linspace(0, 1, 40)
    x = x_from + (x_to - x_from) * (3 * t**2 - 2 * t**3)  # vertical at both ends
    ax.plot(x, 1.92 - 1.2 * t, color=color, lw=1.2, alpha=0.85, zorder=1)


def who_keeps_what(
    assignment: ArrayLike, ranking: ArrayLike, *, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Each expert's neurons along the ranking: shared, its own, or not in this expert.

    A layer with more neurons than pixels is drawn in mixed colours. ``assignment`` has shape
    ``(E, K)``, ``ranking`` ``(F,)``, most important first; ``ax`` is by default a new figure's.
    """
    assignment, ranking = np.asarray(assignment), np.asarray(ranking)
    n_experts, n_neurons = len(assignment), len(ranking)
    ax = style.axes((WIDE[0], 1.1 + 0.34 * n_experts)) if ax is None else ax
    owner = owners(assignment, n_neurons)[ranking]  # (F,) along the ranking
    for expert in range(n_experts):
        strip = np.tile(to_rgb(COLORS["dropped"]), (1, n_neurons, 1))
        strip[0, owner == SHARED] = to_rgb(COLORS["shared"])
        strip[0, owner == expert] = to_rgb(style.expert_color(expert))
        ax.imshow(strip, aspect="auto", zorder=2, extent=(0, n_neurons, expert + 0.4, expert - 0.4))
    n_shared, n_kept = int((owner == SHARED).sum()), int((owner != DROPPED).sum())
    for edge in {n_shared, n_kept} - {0, n_neurons}:
        ax.axvline(edge, color=INK, lw=0.8, zorder=3)
    ax.set_yticks(range(n_experts), [f"expert {e + 1}" for e in range(n_experts)])
    ax.set(xlim=(0, n_neurons), ylim=(n_experts - 0.45, -0.55))
    ax.set_xlabel("neurons, most important first")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    hands = tuple(Patch(color=style.expert_color(e)) for e in range(min(n_experts, 4)))
    swatches = {
        f"shared by all: {n_shared:,}": Patch(color=COLORS["shared"]),
        f"one expert each: {n_kept - n_shared:,}": hands,
        f"dropped: {n_neurons - n_kept:,}": Patch(color=COLORS["dropped"]),
    }
    place = {"ncols": 3, "loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderaxespad": 0.15}
    together = {tuple: HandlerTuple(ndivide=None, pad=0)}
    ax.legend(list(swatches.values()), list(swatches), handler_map=together, **place)
    style.headline(ax, title)
    return ax


def kept_by_shared(frame: pd.DataFrame, *, width: int, title: str = "") -> Axes:
    """How many neurons are shared, in one expert and dropped, against the shared neurons.

    ``frame`` has the columns ``n_shared`` and ``own`` (neurons in exactly one expert); the dense
    layer has ``width`` neurons.
    """
    ax, frame = style.axes(), frame.sort_values("n_shared")
    shared, own = frame["n_shared"].to_numpy(), frame["own"].to_numpy()
    parts = {"shared": shared, "own": own, "dropped": width - shared - own}
    colors = [COLORS[name] for name in parts]
    ax.stackplot(shared, *parts.values(), colors=colors, edgecolor="white", lw=0.6)
    ax.plot(shared, shared + own, "o-", color=INK, ms=4, lw=1.2, zorder=4, clip_on=False)
    _name_areas(ax, shared, parts)
    ax.set(xlim=(shared.min(), shared.max()), ylim=(0, width), xticks=shared)
    ax.set(xlabel="shared neurons", ylabel="neurons of the layer")
    style.headline(ax, title)
    return ax


def _name_areas(ax: Axes, x: np.ndarray, parts: dict[str, np.ndarray]) -> None:
    """Write each part's name where its area is tallest, instead of a legend."""
    names = {"shared": "shared by all", "own": "one expert each", "dropped": "dropped"}
    inner = np.linspace(x.min(), x.max(), 101)[15:-15]  # not at the edges
    floor, total = np.zeros(len(inner)), sum(heights[0] for heights in parts.values())
    for part, heights in parts.items():
        height = np.interp(inner, x, heights)
        at = int(height.argmax())
        if height[at] > 0.06 * total:
            look = {
                "ha": "center",
                "va": "center",
                "color": style.ink_on(COLORS[part]),
                "zorder": 5,
            }
            ax.text(inner[at], floor[at] + height[at] / 2, names[part], **look)
        floor = floor + height
