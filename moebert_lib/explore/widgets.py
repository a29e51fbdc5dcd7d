"""Controls over pictures: at most one per notebook, always before the same picture, still.

Each explorer is a view with controls. A view draws into one picture that stays put and only
indexes and draws (or sends one sentence through small models), so it keeps up with the hand;
its ``draw`` needs no browser. Sizes that do not fit the layer are cut to the largest that do;
the title says which were drawn. Without ipywidgets one sentence says what is missing.
"""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import nn
from transformers import PreTrainedTokenizerBase

from moebert_lib.config.settings import proportions
from moebert_lib.method.partition import deal_neurons, fit
from moebert_lib.plots.experts import deal, who_keeps_what
from moebert_lib.plots.style import EXPERTS, INK, WIDE, expert_color, ink_on
from moebert_lib.plots.training import step
from moebert_lib.training.routing_analysis import sentence_ways

MISSING = "The slider needs ipywidgets (pip install ipywidgets); the figure below stands still."
DPI = 110
#: Descriptions as long as they are, under each other.
ROOMY = {"style": {"description_width": "9em"}, "layout": {"width": "32em", "max_width": "100%"}}
BEFORE_AFTER = [("converted, before distillation", "converted"), ("distilled", "distilled")]
UNSEEN = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)"


class View(NamedTuple):
    """What is shown, and how it is drawn anew."""

    widgets: tuple  #: ipywidgets, one under the other
    draw: Callable[..., None]  #: takes the values of the controls by name


class Picture:
    """A figure drawn again and again, shown as one image that stays where it is.

    Attributes:
        image: The ipywidget of the picture.
        words: What it shows, for whoever reads with a screen reader.
        axes: One for each column.
    """

    def __init__(self, size: tuple[float, float], **subplots: Any):
        from ipywidgets import HTML, Image

        self._figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(self._figure)  # whatever backend the notebook has
        self.axes: list[Axes] = list(self._figure.subplots(1, squeeze=False, **subplots).flat)
        self.image = Image(format="png", width=f"{size[0] * DPI:.0f}")
        self.words = HTML()  # an image's own tooltip breaks its view in the page

    def redraw(self, draw: Callable[..., object], said: str) -> None:
        """Clear the axes, let ``draw(*axes)`` fill them, and show; ``said`` tells it in words."""
        for ax in self.axes:
            ax.clear()
        draw(*self.axes)
        self._figure.canvas.draw()
        self._figure.set_layout_engine("none")  # laid out once: axes stay, and drawing is faster
        with io.BytesIO() as buffer:
            pixels = PIL.Image.fromarray(np.asarray(self._figure.canvas.buffer_rgba()))
            pixels.convert("RGB").save(buffer, "png", compress_level=1)
            self.image.value = buffer.getvalue()
        self.words.value = f"<span role='status' style='{UNSEEN}'>{escape(said)}</span>"


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
    """Step through the layers: a student's states beside its teacher's, before and after.

    Args:
        frame: From ``states.planes``: stages ``teacher``, ``converted`` and ``distilled``.
        distances: Columns ``layer``, ``stage`` and ``distance`` (Eq. 5), as
            ``plots_learning.hidden_distance`` draws them.
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
        title = f"{name}, {stage}: distance {apart[stage, layer]:.3g}"
        at = dict(layer=layer, stage=stage, title=title)
        at["title"] += f"; the plane holds {seen[layer]:.0%} of the teacher's spread"
        said = at["title"]
        picture.redraw(lambda *axs: step(frame, distances, axs=axs, **at), said)

    return View((picture.image, picture.words), draw)


def explore_routing(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sentence: str,
    loads: Mapping[str, ArrayLike],
    max_length: int = 512,
) -> None:
    """Type a sentence and see each token's expert under every router, and the loads.

    Args:
        models: Router name to a MoEBERT model.
        tokenizer: Theirs.
        sentence: What the text field starts with.
        loads: Router name to shares of the validation set, ``(L, E)``.
        max_length: Tokens that the models read; what is longer is cut.
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

    page, read = HTML(), {}

    def draw(sentence: str, layer: int) -> None:
        if not sentence.strip():
            page.value = "<p role='status'>Nothing to route: type a sentence.</p>"
            return
        if sentence not in read:  # moving to another layer asks no model
            read.clear()
            read[sentence] = sentence_ways(models, tokenizer, sentence, max_length=max_length)
        found = read[sentence]
        note = f" Cut after {max_length} tokens, the most that the models read." * found.cut
        page.value = token_table(found.tokens, found.experts, loads, layer=layer, note=note)

    return View((page,), draw)


def ready(*packages: str, missing: str = MISSING) -> bool:
    """Whether ipywidgets and other packages are there; says ``missing`` where one is not."""
    there = all(map(importlib.util.find_spec, ("ipywidgets", *packages)))
    if not there:
        print(missing)
    return there


def size_sliders(
    width: int, n_experts: int, expert_size: int | None, n_shared: int | None
) -> dict[str, Any]:
    """Sliders for the three sizes, started where ``Settings`` would put them."""
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
    """Draw a view whenever one of its controls moves; what goes wrong is printed under them."""
    from IPython.display import display
    from ipywidgets import interact

    def show(**values: Any) -> None:
        view.draw(**values)

    interact(show, **controls)
    display(*view.widgets)


# A sentence's way through the experts as a table of text: what changes while one types.
# Plain HTML is written in a millisecond whatever the script of the tokens, can be read aloud,
# and scrolls where a sentence is long. Colours and numbers are those of ``plots_routing``.

_STYLE = (
    f"""<style>
.moebert-way {{background:white; color:{INK}; padding:6px; line-height:1.25; font-size:13px}}
.moebert-way .scroll {{overflow-x:auto}}
.moebert-way table {{border-collapse:separate; border-spacing:1px; margin:0}}
.moebert-way th {{font-weight:normal; padding:0 4px; text-align:right; background:white}}
.moebert-way td {{min-width:22px; padding:0 2px; text-align:center}}
.moebert-way thead th span {{writing-mode:vertical-rl; transform:rotate(180deg)}}
.moebert-way thead th {{vertical-align:bottom; padding:2px 0; text-align:center}}
.moebert-way .here > :not(.side) {{font-weight:bold; box-shadow:0 -2px {INK}, 0 2px {INK}}}
.moebert-way tbody::before {{content:''; display:block; height:8px}}
.moebert-way .side {{position:sticky; left:0; min-width:215px; z-index:1; white-space:nowrap;
  text-align:left; vertical-align:top; padding:2px 8px 10px 0}}
.moebert-way .bar {{display:flex; align-items:center; font-weight:normal; font-size:12px}}
.moebert-way .track {{position:relative; width:110px; height:9px; margin:0 6px; background:#EEE}}
.moebert-way .track i {{position:absolute; left:0; top:0; bottom:0}}
.moebert-way .track b {{position:absolute; top:-2px; bottom:-2px; width:2px; background:{INK}}}
"""
    + "".join(
        f".moebert-way .e{e} {{background:{color}; color:{ink_on(color)}}}\n"
        for e, color in enumerate(EXPERTS)
    )
    + "</style>"
)


def token_table(
    tokens: Sequence[str],
    ways: Mapping[str, ArrayLike],
    loads: Mapping[str, ArrayLike],
    *,
    layer: int,
    note: str = "",
) -> str:
    """Tokens across, layers down, one block for each router; beside it the loads of one layer.

    Whatever stands in a token is shown as it is: nothing in it is taken for markup or formula.

    Args:
        tokens: The ``T`` tokens.
        ways: Router name to the experts ``(T, L)``, from 0; they are printed from 1.
        loads: Router name to shares of the validation set, ``(L, E)``.
        layer: Counted from 1: its rows are marked, its loads drawn.
        note: Added to the first line.
    """
    head = "".join(f"<th scope='col'><span>{escape(token)}</span></th>" for token in tokens)
    blocks = "".join(
        _block(name, np.asarray(experts), np.asarray(loads[name])[layer - 1], layer)
        for name, experts in ways.items()
    )
    return (
        f"{_STYLE}<div class='moebert-way tex2jax_ignore mathjax_ignore'>"
        f"<p role='status'>{escape(said(ways, layer=layer))}{escape(note)}</p>"
        "<div class='scroll' tabindex='0' role='region' aria-label='experts by token and layer'>"
        f"<table><thead><tr><th class='side'>share of the tokens:<br>bar, this sentence;"
        f"<br>line, validation set</th><th scope='col'><span>layer</span></th>{head}</tr></thead>"
        f"{blocks}</table></div></div>"
    )


def said(ways: Mapping[str, ArrayLike], *, layer: int) -> str:
    """One line about a layer: how many tokens go to the busiest expert of each router."""
    most = {name: np.bincount(np.asarray(e)[:, layer - 1]).max() for name, e in ways.items()}
    n_tokens = len(next(iter(ways.values())))
    each = ", ".join(f"{n} with {name}" for name, n in most.items())
    return f"Layer {layer}: of {n_tokens} tokens the busiest expert serves {each}."


def _block(name: str, experts: np.ndarray, shares: np.ndarray, here: int) -> str:
    """One router: its name and loads at the left, a row for each layer."""
    n_layers = experts.shape[1]
    mine = np.bincount(experts[:, here - 1], minlength=len(shares)) / len(experts)
    bars = "".join(_bar(e, *both) for e, both in enumerate(zip(mine, shares, strict=True)))
    side = (
        f"<th class='side' scope='rowgroup' rowspan='{n_layers}'><b>{escape(name)}</b>, "
        f"layer {here}{bars}</th>"
    )
    rows = []
    for layer, row in enumerate(experts.T.tolist(), start=1):
        cells = "".join(f"<td class='e{e % len(EXPERTS)}'>{e + 1}</td>" for e in row)
        mark = " class='here'" if layer == here else ""
        rows.append(f"<th scope='row'>{layer}</th>{cells}</tr>")
        rows[-1] = f"<tr{mark}>{side if layer == 1 else ''}" + rows[-1]
    return f"<tbody>{''.join(rows)}</tbody>"


def _bar(expert: int, share: float, usual: float) -> str:
    """A share of the sentence as a bar, that of the validation set as a line across it."""
    return (
        f"<div class='bar'><span>{expert + 1}</span><span class='track'>"
        f"<i style='width:{100 * share:.1f}%;background:{expert_color(expert)}'></i>"
        f"<b style='left:{100 * usual:.1f}%'></b></span>"
        f"<span>{100 * share:.0f}% ({100 * usual:.0f}%)</span></div>"
    )
