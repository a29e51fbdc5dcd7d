"""Sliders over figures: at most one per notebook, always after the same figure, still.

Each explorer draws into one figure of its own and only indexes and draws, so it keeps up
with the slider. Sizes that do not fit the layer are cut to the largest that do; the title
says which were drawn. Without ipywidgets one sentence says what is missing.
"""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from moebert_lib.experts import deal_neurons
from moebert_lib.plots import WIDE
from moebert_lib.plots_experts import deal, who_keeps_what
from moebert_lib.plots_importance import score_curve
from moebert_lib.plots_routing import token_map

MISSING = "The slider needs ipywidgets (pip install ipywidgets); the figure above stands still."


def explore_importance(
    scores: ArrayLike,
    *,
    n_experts: int = 4,
    expert_size: int | None = None,
    n_shared: int | None = None,
) -> None:
    """Any layer's sorted importance, and which part is shared, dealt and dropped.

    Args:
        scores: Shape ``(L, F)``.
        n_experts: Where its slider starts.
        expert_size: Likewise; ``None`` is ``F // n_experts``, the paper's proportion.
        n_shared: Likewise; ``None`` is two thirds of ``expert_size``, as in the paper.
    """
    n_layers, width = scores.shape

    def draw(ax: Axes, layer: int, n_experts: int, expert_size: int, n_shared: int) -> None:
        size, shared = fit(width, n_experts, expert_size, n_shared)
        kept = shared + n_experts * (size - shared)
        title = f"Layer {layer}: {n_experts} experts of {size}, {shared} shared, keep {kept:,}"
        score_curve(scores[layer - 1], n_shared=shared, n_kept=kept, ax=ax, title=title)

    if controls := size_sliders(width, n_experts, expert_size, n_shared):
        _explore(draw, (5.6, 3.2), {"layer": (1, n_layers, 1), **controls})


def explore_deal(
    ranking: ArrayLike,
    *,
    n_experts: int = 4,
    expert_size: int | None = None,
    n_shared: int | None = None,
) -> None:
    """One layer's deal: cards for up to 16 neurons, else who keeps what.

    Args:
        ranking: Shape ``(F,)``, neurons, most important first.
        n_experts: Where its slider starts.
        expert_size: Likewise; ``None`` is ``F // n_experts``, the paper's proportion.
        n_shared: Likewise; ``None`` is two thirds of ``expert_size``, as in the paper.
    """
    ranking = torch.as_tensor(ranking)
    picture = deal if len(ranking) <= 16 else who_keeps_what

    def draw(ax: Axes, n_experts: int, expert_size: int, n_shared: int) -> None:
        size, shared = fit(len(ranking), n_experts, expert_size, n_shared)
        experts = deal_neurons(
            ranking, n_experts=n_experts, expert_size=size, n_shared=shared, allow_identical=True
        )
        title = f"{n_experts} experts of {size}, {shared} shared"
        picture(experts.numpy(), ranking.numpy(), ax=ax, title=title)

    if controls := size_sliders(len(ranking), n_experts, expert_size, n_shared):
        _explore(draw, (WIDE[0], 3.0), controls)


def explore_routing(maps: Mapping[str, tuple[Sequence[str], ArrayLike]]) -> None:
    """The expert of every token and layer, for one of several sentences.

    Args:
        maps: Name in the menu to the ``T`` tokens and an array ``(T, L)`` of experts.
    """

    def draw(ax: Axes, sentence: str) -> None:
        tokens, experts = maps[sentence]
        token_map(tokens, experts, ax=ax, title=str(sentence))

    if ready():
        _explore(draw, (WIDE[0], 3.0), {"sentence": list(maps)})


def fit(width: int, n_experts: int, expert_size: int, n_shared: int) -> tuple[int, int]:
    """The nearest ``(expert_size, n_shared)`` that a layer of ``width`` neurons can fill.

    Example:
        >>> fit(6, n_experts=2, expert_size=5, n_shared=1)
        (3, 1)
    """
    shared = min(n_shared, expert_size, width)
    return min(expert_size, (width + (n_experts - 1) * shared) // n_experts), shared


def ready() -> bool:
    """Whether ipywidgets is there; says so in one sentence where it is not."""
    if importlib.util.find_spec("ipywidgets") is None:
        print(MISSING)
        return False
    return True


def size_sliders(
    width: int, n_experts: int, expert_size: int | None, n_shared: int | None
) -> dict[str, Any]:
    """Sliders for the three sizes, started where ``Settings`` would put them; none if not ready."""
    if not ready():
        return {}
    from ipywidgets import IntSlider

    expert_size = expert_size or max(1, width // n_experts)
    n_shared = 2 * expert_size // 3 if n_shared is None else n_shared
    step = max(1, width // 96)
    ranges = {
        "n_experts": dict(value=n_experts, min=1, max=min(8, width)),
        "expert_size": dict(value=expert_size, min=step, max=width, step=step),
        "n_shared": dict(value=n_shared, min=0, max=width // 2, step=step),
    }
    return {
        name: IntSlider(**limits, description=name.replace("_", " "))
        for name, limits in ranges.items()
    }


def _explore(draw: Callable[..., None], size: tuple[float, float], controls: dict) -> None:
    """Call ``draw(ax, **values)`` whenever a control moves, into one picture that stays put."""
    from IPython.display import display
    from ipywidgets import Image, interact

    figure, ax = plt.subplots(figsize=size, layout="constrained")
    plt.close(figure)  # shown as the picture only, not again at the end of the cell
    picture = Image(format="png", width=f"{size[0] * 110:.0f}")

    def show(**values: Any) -> None:
        ax.clear()
        draw(ax, **values)
        picture.value = render(figure)
        figure.set_layout_engine("none")  # laid out once: axes stay, and drawing is faster

    interact(show, **controls)  # an error in show is printed under the sliders
    display(picture)


def render(figure: Figure) -> bytes:
    """A figure as PNG for the screen."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()
