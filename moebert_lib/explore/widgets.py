"""Widgets of the notebooks: a partition of neurons, hidden states by layer, a sentence's experts.

Each draws into one picture that stays in place. Its view draws without a browser and only indexes
and draws (or sends one sentence through small models), so that it keeps up with a slider. Sizes
that do not fit a layer are cut, and the title names those that are drawn. Without ipywidgets one
sentence names what is missing.
"""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import PIL.Image
import torch
from jinja2 import Environment, FileSystemLoader, Template
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import nn
from transformers import PreTrainedTokenizerBase

from moebert_lib.config.settings import proportions
from moebert_lib.method.partition import deal_neurons, fit
from moebert_lib.plots.experts import deal, who_keeps_what
from moebert_lib.plots.style import EXPERTS, INK, WIDE, ink_on
from moebert_lib.plots.training import step
from moebert_lib.training.routing_analysis import sentence_ways

MISSING = "The slider needs ipywidgets (pip install ipywidgets); the figure below stands still."
DPI = 110
#: Layout of controls with long descriptions, one below the other.
ROOMY = {"style": {"description_width": "9em"}, "layout": {"width": "32em", "max_width": "100%"}}
BEFORE_AFTER = [("converted, before distillation", "converted"), ("distilled", "distilled")]
UNSEEN = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)"


class View(NamedTuple):
    """What is shown, and the function that draws it again."""

    widgets: tuple  #: ipywidgets, one under the other
    draw: Callable[..., None]  #: takes the values of the controls by name


class Picture:
    """A figure drawn again and again, shown as one image that stays where it is.

    Attributes:
        image: The ipywidget of the picture.
        words: A description for screen readers.
        axes: One for each column.
    """

    def __init__(self, size: tuple[float, float], **subplots: Any):
        from ipywidgets import HTML, Image

        self._figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(self._figure)  # whatever backend the notebook has
        self.axes: list[Axes] = list(self._figure.subplots(1, squeeze=False, **subplots).flat)
        self.image = Image(format="png", width=f"{size[0] * DPI:.0f}")
        self.words = HTML()  # an image's own tooltip breaks its view in the page

    def redraw(self, draw: Callable[..., object], description: str) -> None:
        """Clear the axes, let ``draw(*axes)`` fill them, and show them with a description."""
        for ax in self.axes:
            ax.clear()
        draw(*self.axes)
        self._figure.canvas.draw()
        self._figure.set_layout_engine("none")  # laid out once: axes stay, and drawing is faster
        with io.BytesIO() as buffer:
            pixels = PIL.Image.fromarray(np.asarray(self._figure.canvas.buffer_rgba()))
            pixels.convert("RGB").save(buffer, "png", compress_level=1)
            self.image.value = buffer.getvalue()
        self.words.value = f"<span role='status' style='{UNSEEN}'>{escape(description)}</span>"


def explore_deal(
    ranking: ArrayLike,
    *,
    n_experts: int = 4,
    expert_size: int | None = None,
    n_shared: int | None = None,
) -> None:
    """Explore the partition of a layer: cards for up to 16 neurons, otherwise a map.

    Args:
        ranking: Shape ``(F,)``, neurons, most important first.
        n_experts: Start of its slider.
        expert_size: Start of its slider; by default ``F // n_experts``, as in the paper.
        n_shared: Start of its slider; by default two thirds of ``expert_size``, as in the paper.
    """
    if ready():
        _explore(deal_view(ranking), size_sliders(len(ranking), n_experts, expert_size, n_shared))


def deal_view(ranking: ArrayLike) -> View:
    """:func:`explore_deal` without its controls."""
    ranking = torch.as_tensor(ranking)
    figure = deal if len(ranking) <= 16 else who_keeps_what
    picture = Picture((WIDE[0], 3.0))

    def draw(n_experts: int, expert_size: int, n_shared: int) -> None:
        size, shared = fit(len(ranking), n_experts, expert_size, n_shared)
        experts = deal_neurons(
            ranking, n_experts=n_experts, expert_size=size, n_shared=shared, allow_identical=True
        )
        kept = len(experts.unique())
        many = f"{n_experts} experts" if n_experts > 1 else "one expert"
        title = f"{many} of {size}, {shared} shared: {kept:,} of {len(ranking):,} neurons kept"
        hands = experts.numpy(), ranking.numpy()
        picture.redraw(lambda ax: figure(*hands, ax=ax, title=title), title)

    return View((picture.image, picture.words), draw)


def explore_states(frame: pd.DataFrame, distances: pd.DataFrame) -> None:
    """Explore hidden states by layer: a student's beside its teacher's, before and after training.

    Args:
        frame: From ``evaluation.planes``: stages ``teacher``, ``converted`` and ``distilled``.
        distances: Columns ``layer``, ``stage`` and ``distance`` (Eq. 5).
    """
    if ready():
        from ipywidgets import Dropdown, IntSlider

        last = int(frame["layer"].max())
        layer = IntSlider(value=last, min=0, max=last, description="layer", **ROOMY)
        stage = Dropdown(options=BEFORE_AFTER, description="student", **ROOMY)
        _explore(states_view(frame, distances), {"layer": layer, "stage": stage})


def states_view(frame: pd.DataFrame, distances: pd.DataFrame) -> View:
    """:func:`explore_states` without its controls."""
    picture = Picture((WIDE[0], 3.7), ncols=2)
    apart = distances.groupby(["stage", "layer"])["distance"].mean()
    seen = frame.groupby("layer")["seen"].first()

    def draw(layer: int, stage: str) -> None:
        name = f"Layer {layer}" if layer else "Embeddings"
        title = (
            f"{name}, {stage}: distance {apart[stage, layer]:.3g}; the plane holds "
            f"{seen[layer]:.0%} of the teacher's spread"
        )
        options = dict(layer=layer, stage=stage, title=title)
        picture.redraw(lambda *axs: step(frame, distances, axs=axs, **options), title)

    return View((picture.image, picture.words), draw)


def explore_routing(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sentence: str,
    loads: Mapping[str, ArrayLike],
    max_length: int = 512,
) -> None:
    """Type a sentence and see the expert of each token with every router, and the loads.

    Args:
        models: Router name to a MoEBERT model.
        tokenizer: The tokenizer of the models.
        sentence: Start of the text field.
        loads: Router name to shares of the validation set, ``(L, E)``.
        max_length: Tokens that the models read; longer sentences are cut.
    """
    if ready():
        from ipywidgets import IntSlider, Text

        # While the kernel is busy the page keeps the latest text only: typing never queues.
        text = Text(value=sentence, description="sentence", continuous_update=True, **ROOMY)
        n_layers = len(next(iter(loads.values())))
        layer = IntSlider(value=1, min=1, max=n_layers, description="layer", **ROOMY)
        view = routing_view(models, tokenizer, loads=loads, max_length=max_length)
        _explore(view, {"sentence": text, "layer": layer})


def routing_view(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    *,
    loads: Mapping[str, ArrayLike],
    max_length: int = 512,
) -> View:
    """:func:`explore_routing` without its controls."""
    from ipywidgets import HTML

    page, cached = HTML(), {}

    def draw(sentence: str, layer: int) -> None:
        if not sentence.strip():
            page.value = "<p role='status'>Nothing to route: type a sentence.</p>"
            return
        if sentence not in cached:  # another layer needs no model
            cached.clear()
            cached[sentence] = sentence_ways(models, tokenizer, sentence, max_length=max_length)
        routed = cached[sentence]
        note = f" Cut after {max_length} tokens, the most that the models read." * routed.cut
        page.value = token_table(routed.tokens, routed.experts, loads, layer=layer, note=note)

    return View((page,), draw)


def ready(*packages: str, missing: str = MISSING) -> bool:
    """Return whether ipywidgets and other packages are installed; otherwise print ``missing``."""
    installed = all(map(importlib.util.find_spec, ("ipywidgets", *packages)))
    if not installed:
        print(missing)
    return installed


def size_sliders(
    width: int, n_experts: int, expert_size: int | None, n_shared: int | None
) -> dict[str, Any]:
    """Return sliders for the three sizes, with the defaults of ``Settings``."""
    from ipywidgets import IntSlider

    expert_size, n_shared = proportions(width, n_experts, expert_size, n_shared)
    step = max(1, width // 96)
    ranges = {
        "n_experts": dict(value=n_experts, min=1, max=min(8, width), description="experts"),
        "expert_size": dict(
            value=expert_size, min=step, max=width, step=step, description="expert size"
        ),
        "n_shared": dict(value=n_shared, min=0, max=width, step=step, description="shared neurons"),
    }
    return {name: IntSlider(**limits, **ROOMY) for name, limits in ranges.items()}


def _explore(view: View, controls: dict[str, Any]) -> None:
    """Draw a view whenever one of its controls changes; errors are printed below them."""
    from IPython.display import display
    from ipywidgets import interact

    def show(**values: Any) -> None:
        view.draw(**values)

    interact(show, **controls)
    display(*view.widgets)


# A sentence's experts as a table of text, which changes while the user types: HTML is written in
# a millisecond whatever the script of the tokens, can be read aloud, and scrolls.


def token_table(
    tokens: Sequence[str],
    routes: Mapping[str, ArrayLike],
    loads: Mapping[str, ArrayLike],
    *,
    layer: int,
    note: str = "",
) -> str:
    """Return an HTML table: tokens across, layers down, a block for each router, and its loads.

    Tokens are shown as they are: nothing in them is taken for markup or formula.

    Args:
        tokens: The ``T`` tokens.
        routes: Router name to the experts ``(T, L)``, from 0; they are printed from 1.
        loads: Router name to shares of the validation set, ``(L, E)``.
        layer: Counted from 1: its rows are marked, its loads drawn.
        note: Added to the first line.
    """
    blocks = []
    for name, experts in routes.items():
        experts, usual = np.asarray(experts), np.asarray(loads[name])[layer - 1]
        shares = np.bincount(experts[:, layer - 1], minlength=len(usual)) / len(experts)
        blocks.append((name, experts.T.tolist(), list(zip(shares, usual, strict=True))))
    return template("token_table.html.jinja").render(
        tokens=tokens,
        blocks=blocks,
        layer=layer,
        summary=busiest_experts(routes, layer=layer),
        note=note,
        ink=INK,
        colors=[(color, ink_on(color)) for color in EXPERTS],
    )


def busiest_experts(routes: Mapping[str, ArrayLike], *, layer: int) -> str:
    """Describe in one line how many tokens the busiest expert of each router gets in a layer."""
    most = {name: np.bincount(np.asarray(e)[:, layer - 1]).max() for name, e in routes.items()}
    n_tokens = len(next(iter(routes.values())))
    each = ", ".join(f"{n} with {name}" for name, n in most.items())
    return f"Layer {layer}: of {n_tokens} tokens the busiest expert serves {each}."


@cache
def template(name: str) -> Template:
    """Return a Jinja template of this folder; all values are escaped."""
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(loader=folder, autoescape=True, trim_blocks=True).get_template(name)
