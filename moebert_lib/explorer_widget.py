"""The explorer's controls and canvas: a change of either moves what is drawn, and no more."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from moebert_lib import readout
from moebert_lib.layer_view import View, fit, view
from moebert_lib.plots_explorer import MOST, Picture
from moebert_lib.sources import Source

COLUMNS = 3  # scores side by side at most
NONE = "(none)"


def views(chosen: Sequence[tuple[Source, str]], *, layer: int, **sizes: int) -> list[View]:
    """What each column shows.

    Sizes are in neurons of the first column's layers; a layer of another width gets the same
    proportions, and a model with fewer layers shows its last. Sizes that do not fit are cut.
    """
    lead, found = chosen[0][0].shape[1], []
    for source, name in chosen:
        n_layers, width = source.shape
        size, shared = (round(sizes[n] * width / lead) for n in ("expert_size", "n_shared"))
        size, shared = fit(width, sizes["n_experts"], max(size, 1), shared)
        at = min(layer, n_layers)
        found.append(
            view(
                source.heading(name, at),
                source.scores[name][at - 1],
                n_experts=sizes["n_experts"],
                expert_size=size,
                n_shared=shared,
            )
        )
    return found


class Explorer:
    """The controls, the canvas and the texts; :attr:`box` is what is displayed.

    Args:
        sources: What the menus offer.
        chosen: The columns at the start.
        layer: As for :func:`explore`.
        sizes: All three.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        chosen: Sequence[tuple[Source, str]],
        *,
        layer: int,
        **sizes: int,
    ):
        from ipywidgets import HTML

        Canvas, FigureManager = _canvas_classes()
        self.sources = {source.name: source for source in sources}
        self.chosen, self.hovered, self._busy = list(chosen), None, False
        self.sliders = _sliders(chosen[0][0], layer, sizes)
        self.menus = [_menus(self.sources, chosen, n) for n in range(COLUMNS)]
        self.canvas = Canvas(Figure(dpi=100))
        self.manager = FigureManager(self.canvas, 0)  # ipympl draws through it
        for part in ("toolbar", "header", "footer"):
            setattr(self.canvas, f"{part}_visible", False)
        self.canvas.capture_scroll = False
        self.canvas.layout.flex = "0 0 auto"
        self.canvas.on_msg(self._fix_size)
        self.canvas.syncing_data_url = False  # a second image of every frame, for saving
        self.table, self.neuron = HTML(), HTML()
        self._compose()
        for slider in self.sliders.values():
            slider.observe(self._guarded(self._move), "value")
        for pair in self.menus:
            for menu in pair:
                menu.observe(self._guarded(self._choose), "value")
        self.canvas.mpl_connect("motion_notify_event", self._hover)
        self.canvas.mpl_connect("figure_leave_event", self._hover)
        self.canvas.mpl_connect("button_press_event", self._click)
        self.box = self._laid_out()

    def _laid_out(self) -> Any:
        """Controls over the picture, the table beside it where there is room, else below."""
        from ipywidgets import Box, Layout, VBox

        def in_rows(children: Sequence[Any], gap: str) -> Any:
            return Box(children, layout=Layout(flex_flow="row wrap", grid_gap=gap))

        self.table.layout = Layout(flex="1 1 320px", min_width="0")
        left = VBox([self.canvas, self.neuron], layout=Layout(width="870px"))
        menus = in_rows([VBox(pair) for pair in self.menus], "0 12px")
        sliders = in_rows(list(self.sliders.values()), "0 12px")
        return VBox([menus, sliders, in_rows([left, self.table], "0 10px")])

    def _fix_size(self, *_message: Any) -> None:
        """Take the handle away that the page gives every canvas when it first shows it."""
        self.canvas.on_msg(self._fix_size, remove=True)
        self.canvas.resizable = True
        self.canvas.resizable = False

    def _guarded(self, act: Callable[[], None]) -> Callable[[Any], None]:
        """``act`` for the reader's changes only, not for those that it makes itself."""

        def react(_change: Any) -> None:
            if not self._busy:
                self._busy = True
                try:
                    act()
                finally:
                    self._busy = False

        return react

    def _values(self) -> dict[str, int]:
        return {name: slider.value for name, slider in self.sliders.items() if name != "rank"}

    def _compose(self) -> None:
        """A new picture: other columns."""
        self.views = views(self.chosen, **self._values())
        self.canvas.figure.clear()
        self.picture = Picture(self.canvas.figure, self.views)
        self._move()

    def _move(self) -> None:
        """A slider moved: the same picture with other sizes, layer or neuron.

        The slider wins over a pointer that rests on the picture.
        """
        self.hovered, values = None, self._values()
        self.views = views(self.chosen, **values)
        self.picture.update(self.views, self.marked())
        self._tell()
        del values["layer"]
        self.table.value = readout.table(self.chosen, self.views, asked=values)

    def _choose(self) -> None:
        """A menu changed: other columns, and sliders of the first one's range."""
        self.chosen = []
        for menu, scores in self.menus:
            source = self.sources.get(menu.value)
            names = list(source.scores) if source else []
            if list(scores.options) != names:
                kept = scores.value if scores.value in names else next(iter(names), None)
                scores.options, scores.value = names, kept
            if source:
                self.chosen.append((source, scores.value))
        _rescale(self.sliders, self.chosen[0][0])
        self._compose()

    def marked(self) -> list[int]:
        """Rank of the chosen neuron in each column, from 0.

        Columns of models alike show the same neuron; others show the one of the same relative
        rank.
        """
        column, rank = self.hovered or (0, self.sliders["rank"].value - 1)
        own = self.views[column].ranking
        return [
            int(np.flatnonzero(one.ranking == own[rank])[0])
            if len(one.ranking) == len(own)
            else rank * len(one.ranking) // len(own)
            for one in self.views
        ]

    def _tell(self) -> None:
        self.neuron.value = readout.neuron(
            self.chosen, self.views, self.marked(), layer=self.sliders["layer"].value
        )
        self.canvas.draw_idle()

    def _hover(self, event: Any) -> None:
        """Preview the neuron under the pointer; elsewhere the chosen one is back."""
        under = self._under(event)
        if under != self.hovered:
            self.hovered = under
            self.picture.mark(self.views, self.marked())
            self._tell()

    def _click(self, event: Any) -> None:
        if self._under(event):
            self.hovered = self._under(event)
            self.sliders["rank"].value = self.marked()[0] + 1

    def _under(self, event: Any) -> tuple[int, int] | None:
        """Column and rank under the pointer."""
        for n, column in enumerate(self.picture.columns):
            if event.inaxes in (column.curve, column.deal) and event.inaxes:
                return n, int(np.clip(event.xdata, 0, len(self.views[n].ranking) - 1))
        return None


def _canvas_classes() -> tuple[type, type]:
    """ipympl's canvas and manager; the notebook's other figures stay with their own backend.

    At its first import ipympl makes itself the backend of all figures.
    """
    use = mpl.use
    mpl.use = lambda *_args, **_options: None
    try:
        from ipympl.backend_nbagg import Canvas, FigureManager
    finally:
        mpl.use = use
    return Canvas, FigureManager


def _sliders(source: Source, layer: int, sizes: dict[str, int]) -> dict[str, Any]:
    from ipywidgets import IntSlider, Layout

    words = {
        "layer": "layer",
        "n_experts": "experts",
        "expert_size": "neurons in each",
        "n_shared": "of them shared",
        "rank": "look at rank",
    }
    start = {"layer": layer, **sizes, "rank": 1}
    options = dict(style={"description_width": "8.4em"}, layout=Layout(width="390px"))
    sliders = {
        name: IntSlider(description=word, min=1, max=2**31 - 1, value=start[name], **options)
        for name, word in words.items()
    }
    _rescale(sliders, source, keep=False)
    return sliders


def _rescale(sliders: dict[str, Any], source: Source, *, keep: bool = True) -> None:
    """Give the sliders a source's range; sizes keep their share of the width."""
    n_layers, width = source.shape
    share = width / sliders["rank"].max if keep else 1
    most = {
        "layer": n_layers,
        "n_experts": min(MOST, width),
        "expert_size": width,
        "n_shared": width,
        "rank": width,
    }
    for name, slider in sliders.items():
        scaled = name not in ("layer", "n_experts")
        value = round(slider.value * share) if scaled else slider.value
        with slider.hold_trait_notifications():
            slider.min = 0 if name == "n_shared" else 1
            slider.max, slider.value = most[name], min(max(value, slider.min), most[name])


def _menus(
    sources: dict[str, Source], chosen: Sequence[tuple[Source, str]], n: int
) -> tuple[Any, Any]:
    """The menus of one column: its source, none allowed but for the first, and its score."""
    from ipywidgets import Dropdown, Layout

    source, score = chosen[n] if n < len(chosen) else (None, None)
    options = dict(style={"description_width": "4.8em"}, layout=Layout(width="276px"))
    names = [*sources] if n == 0 else [NONE, *sources]
    menu = Dropdown(
        options=names,
        value=source.name if source else NONE,
        description=f"column {n + 1}",
        **options,
    )
    return menu, Dropdown(
        options=list(source.scores) if source else [],
        value=score,
        description=f"score {n + 1}",
        **options,
    )
