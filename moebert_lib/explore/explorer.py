"""Explore importance: choose scores and sizes, see the experts at once, look at single neurons.

``explore`` shows controls over an interactive canvas (ipympl), ``still`` the same picture as a
figure. A moved control only moves what is drawn; the browser then asks for a frame, so that
dragging never queues. Without ipywidgets or ipympl a sentence names what is missing.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.settings import proportions
from moebert_lib.explore.explorer_plots import MAX_EXPERTS, Picture
from moebert_lib.explore.score_sources import EQ4, Source
from moebert_lib.explore.widgets import ready, template
from moebert_lib.method.partition import View, fit, interval, view
from moebert_lib.plots.style import COLORS

MISSING = (
    "The explorer needs ipywidgets and ipympl (pip install ipywidgets ipympl); the figure below "
    "stands still."
)
SIZES = ("n_experts", "expert_size", "n_shared")
COLUMNS = 3  # scores side by side at most
NONE = "(none)"  # menu entry of an empty column

Sources = Source | Sequence[Source]
Shown = Sequence[tuple[str, str]]
Chosen = Sequence[tuple[Source, str]]


def explore(
    sources: Sources, *, shown: Shown | None = None, layer: int | None = None, **sizes: int
) -> None:
    """Show the explorer in JupyterLab or Voila.

    Args:
        sources: What its menus offer.
        shown: Names of a source and of its score for each column at the start, at most three;
            by default all scores of the first source, or Eq. 4 of each source where the first
            has only that.
        layer: Start of its slider, counted from 1; by default the middle of the first source.
        sizes: Start of the sliders ``n_experts`` (at most 8), ``expert_size`` and ``n_shared``,
            in neurons of the first column's layers; by default the paper's proportions. Sizes
            that do not fit are cut.

    Raises:
        UserError: no source, or a source, score, layer or size that does not exist.
    """
    chosen = chosen_columns(sources, shown)
    start = _start(chosen[0][0], layer, sizes)
    if ready("ipympl", missing=MISSING):
        from IPython.display import display

        display(Explorer(_as_list(sources), chosen, **start).box)


def still(
    sources: Sources,
    *,
    shown: Shown | None = None,
    layer: int | None = None,
    title: str = "",
    **sizes: int,
) -> Figure:
    """Draw the explorer's picture at its start; arguments and errors as for :func:`explore`."""
    chosen = chosen_columns(sources, shown)
    start = _start(chosen[0][0], layer, sizes)
    figure = plt.figure()
    Picture(figure, views(chosen, **start), title=title)
    return figure


def numbers(
    sources: Sources, *, shown: Shown | None = None, layer: int | None = None, **sizes: int
) -> pd.DataFrame:
    """Return the numbers of :func:`still`: a row for each neuron of each column, by rank.

    Returns:
        Columns ``column`` (from 1), ``score``, ``layer``, ``rank`` (from 1), ``neuron`` (from 0),
        ``value`` (the score), ``over_mean`` (the score over the layer's mean) and ``holders``
        (the number of experts that contain the neuron).
    """
    chosen = chosen_columns(sources, shown)
    start = _start(chosen[0][0], layer, sizes)
    frames = [
        pd.DataFrame(
            {
                "column": number,
                "score": score,
                "layer": min(start["layer"], source.shape[0]),
                "rank": np.arange(1, len(drawn.ranking) + 1),
                "neuron": drawn.ranking,
                "value": drawn.ordered,
                "over_mean": drawn.relative,
                "holders": drawn.holds.sum(0),
            }
        )
        for number, ((source, score), drawn) in enumerate(
            zip(chosen, views(chosen, **start), strict=True), start=1
        )
    ]
    return pd.concat(frames, ignore_index=True)


def chosen_columns(sources: Sources, shown: Shown | None) -> list[tuple[Source, str]]:
    """Return the source and the name of its score for each column.

    Raises:
        UserError: no source, too many columns, or a name that does not exist.
    """
    by_name = {source.name: source for source in _as_list(sources)}
    if not by_name:
        raise UserError(
            "nothing to explore: expected scores of score_sources.from_settings, from_store or "
            "from_file"
        )
    if shown is None:
        first = next(iter(by_name.values()))
        shown = [(first.name, score) for score in first.scores]
        if len(shown) == 1:
            shown = [(name, EQ4) for name in by_name]
        shown = shown[:COLUMNS]
    if not 1 <= len(shown) <= COLUMNS:
        raise UserError(f"shown has {len(shown)} columns; expected 1 to {COLUMNS}")
    for name, score in shown:
        if name not in by_name:
            raise UserError(f"shown: no source '{name}'; {nearest(name, by_name)}")
        scores = by_name[name].scores
        if score not in scores:
            raise UserError(f"shown: '{name}' has no score '{score}'; {nearest(score, scores)}")
    return [(by_name[name], score) for name, score in shown]


def views(chosen: Chosen, *, layer: int, **sizes: int) -> list[View]:
    """Return what each column shows.

    Sizes are in neurons of the first column's layers; a layer of another width gets the same
    proportions, and a model with fewer layers shows its last. Sizes that do not fit are cut.
    """
    first_width = chosen[0][0].shape[1]
    columns = []
    for source, score in chosen:
        n_layers, width = source.shape
        expert_size = round(sizes["expert_size"] * width / first_width)
        n_shared = round(sizes["n_shared"] * width / first_width)
        expert_size, n_shared = fit(width, sizes["n_experts"], max(expert_size, 1), n_shared)
        shown_layer = min(layer, n_layers)
        columns.append(
            view(
                source.heading(score, shown_layer),
                source.scores[score][shown_layer - 1],
                n_experts=sizes["n_experts"],
                expert_size=expert_size,
                n_shared=n_shared,
            )
        )
    return columns


def _as_list(sources: Sources) -> list[Source]:
    return [sources] if isinstance(sources, Source) else list(sources)


def _start(source: Source, layer: int | None, sizes: dict[str, int]) -> dict[str, int]:
    """Return layer and sizes at the start; refuse those that do not exist."""
    for name in sizes:
        if name not in SIZES:
            raise UserError(f"unknown size '{name}'; {nearest(name, SIZES)}")
    n_layers, width = source.shape
    layer = (n_layers + 1) // 2 if layer is None else layer
    if not 1 <= layer <= n_layers:
        raise UserError(f"layer={layer}: expected 1 to {n_layers}, the layers of {source.name}")
    n_experts = sizes.get("n_experts", 4)
    if n_experts < 1:
        raise UserError(f"n_experts={n_experts}: expected at least 1")
    n_experts = min(n_experts, MAX_EXPERTS, width)
    size, shared = proportions(width, n_experts, sizes.get("expert_size"), sizes.get("n_shared"))
    size, shared = fit(width, n_experts, size, shared)
    return {"layer": layer, "n_experts": n_experts, "expert_size": size, "n_shared": shared}


class Explorer:
    """Controls, canvas and texts; :attr:`box` is what is displayed.

    Args:
        sources: What the menus offer.
        chosen: The columns at the start.
        layer: As for :func:`explore`; ``sizes`` too, all three.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        chosen: Chosen,
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
        self.box = self._layout()

    def _layout(self) -> Any:
        """Return controls over the picture, with the table beside it where there is room."""
        from ipywidgets import Box, Layout, VBox

        def in_rows(children: Sequence[Any], gap: str) -> Any:
            return Box(children, layout=Layout(flex_flow="row wrap", grid_gap=gap))

        self.table.layout = Layout(flex="1 1 320px", min_width="0")
        left = VBox([self.canvas, self.neuron], layout=Layout(width="870px"))
        menus = in_rows([VBox(pair) for pair in self.menus], "0 12px")
        sliders = in_rows(list(self.sliders.values()), "0 12px")
        return VBox([menus, sliders, in_rows([left, self.table], "0 10px")])

    def _fix_size(self, *_message: Any) -> None:
        """Remove the resize handle that the page adds when it first shows the canvas."""
        self.canvas.on_msg(self._fix_size, remove=True)
        self.canvas.resizable = True
        self.canvas.resizable = False

    def _guarded(self, act: Callable[[], None]) -> Callable[[Any], None]:
        """Call ``act`` for changes that the user makes, not for those that it makes itself."""

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
        """Draw a new picture, of other columns."""
        self.views = views(self.chosen, **self._values())
        self.canvas.figure.clear()
        self.picture = Picture(self.canvas.figure, self.views)
        self._move()

    def _move(self) -> None:
        """Update the picture after a slider moved; a resting pointer no longer counts."""
        self.hovered = None
        values = self._values()
        self.views = views(self.chosen, **values)
        self.picture.update(self.views, self.marked())
        self._show_neuron()
        del values["layer"]
        self.table.value = table(self.chosen, self.views, asked=values)

    def _choose(self) -> None:
        """After a menu changed: other columns, and sliders with the first column's range."""
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
        """Return the rank of the chosen neuron in each column, from 0.

        Columns of the same width show the same neuron, others the same relative rank.
        """
        column, rank = self.hovered or (0, self.sliders["rank"].value - 1)
        ranking = self.views[column].ranking
        ranks = []
        for drawn in self.views:
            if len(drawn.ranking) == len(ranking):
                ranks.append(int(np.flatnonzero(drawn.ranking == ranking[rank])[0]))
            else:
                ranks.append(rank * len(drawn.ranking) // len(ranking))
        return ranks

    def _show_neuron(self) -> None:
        self.neuron.value = neuron(
            self.chosen, self.views, self.marked(), layer=self.sliders["layer"].value
        )
        self.canvas.draw_idle()

    def _hover(self, event: Any) -> None:
        """Preview the neuron under the pointer."""
        under = self._under(event)
        if under != self.hovered:
            self.hovered = under
            self.picture.mark(self.views, self.marked())
            self._show_neuron()

    def _click(self, event: Any) -> None:
        if self._under(event):
            self.hovered = self._under(event)
            self.sliders["rank"].value = self.marked()[0] + 1

    def _under(self, event: Any) -> tuple[int, int] | None:
        """Return the column and rank under the pointer."""
        for n, column in enumerate(self.picture.columns):
            if event.inaxes in (column.curve, column.deal) and event.inaxes:
                return n, int(np.clip(event.xdata, 0, len(self.views[n].ranking) - 1))
        return None


def _canvas_classes() -> tuple[type, type]:
    """Import ipympl's canvas and manager without making it the backend of other figures."""
    use = mpl.use
    mpl.use = lambda *_args, **_options: None
    try:
        from ipympl.backend_nbagg import Canvas, FigureManager
    finally:
        mpl.use = use
    return Canvas, FigureManager


def _sliders(source: Source, layer: int, sizes: dict[str, int]) -> dict[str, Any]:
    from ipywidgets import IntSlider, Layout

    labels = {
        "layer": "layer",
        "n_experts": "experts",
        "expert_size": "neurons in each",
        "n_shared": "of them shared",
        "rank": "look at rank",
    }
    start = {"layer": layer, **sizes, "rank": 1}
    options = dict(style={"description_width": "8.4em"}, layout=Layout(width="390px"))
    sliders = {
        name: IntSlider(description=label, min=1, max=2**31 - 1, value=start[name], **options)
        for name, label in labels.items()
    }
    _rescale(sliders, source, keep=False)
    return sliders


def _rescale(sliders: dict[str, Any], source: Source, *, keep: bool = True) -> None:
    """Give the sliders a source's range; sizes keep their share of the width."""
    n_layers, width = source.shape
    share = width / sliders["rank"].max if keep else 1
    most = {
        "layer": n_layers,
        "n_experts": min(MAX_EXPERTS, width),
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


def _menus(sources: dict[str, Source], chosen: Chosen, n: int) -> tuple[Any, Any]:
    """Return the menus of a column, source and score; only the first column needs a source."""
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


# The explorer's texts: what a partition costs and keeps, and what excites a neuron.


def table(chosen: Chosen, views: Sequence[View], *, asked: dict[str, int] | None = None) -> str:
    """Return an HTML table of the partition of each column: sizes, cost, score kept, accuracy.

    Args:
        chosen: Source and score of each column.
        views: What each column shows.
        asked: The three sizes of the sliders, which may not fit the first column.
    """
    columns = [
        _summary(source, score, drawn) for (source, score), drawn in zip(chosen, views, strict=True)
    ]
    if len(views) > 1:
        for column, drawn in zip(columns, views, strict=True):
            column["its shared neurons, shared in column 1"] = _agreement(drawn, views[0])
    headings = [_numbered(n, drawn.heading[0], len(views)) for n, drawn in enumerate(views, 1)]
    rows = [(name, [column[name] for column in columns]) for name in columns[0]]
    return _template().costs(headings, rows, _cut(views[0], **asked) if asked else None)


def neuron(chosen: Chosen, views: Sequence[View], ranks: Sequence[int], *, layer: int) -> str:
    """Return HTML about a neuron of each column: rank, score, its experts, what excites it."""
    parts: dict[tuple[str, int, int], dict[str, Any]] = {}
    columns = zip(chosen, views, ranks, strict=True)
    for number, ((source, score), drawn, rank) in enumerate(columns, start=1):
        shown_layer, j = min(layer, source.shape[0]), int(drawn.ranking[rank])
        line = (
            f"rank {rank + 1:,} of {len(drawn.ranking):,} by {score}, "
            f"{drawn.relative[rank]:.3g} of the mean: {drawn.part(rank)}"
        )
        excited = source.excited
        part = parts.setdefault(
            (source.name, shown_layer, j),
            {
                "caption": f"Neuron {j} of layer {shown_layer}, {source.name}",
                "contexts": excited.contexts(shown_layer - 1, j) if excited else None,
                "reason": source.silent,
                "lines": [],
            },
        )
        part["lines"].append(_numbered(number, line, len(views)))
    return _template().neurons(list(parts.values()))


@cache
def _template() -> Any:
    return template("explorer.html.jinja").make_module({"mark_color": COLORS["own"]})


def _numbered(column: int, text: str, n_columns: int) -> str:
    return f"{column} · {text}" if n_columns > 1 else text


def _cut(drawn: View, *, n_experts: int, expert_size: int, n_shared: int) -> str:
    """Describe which of the sizes do not fit, and what is drawn instead; empty where all fit."""
    size = drawn.hands.shape[1]
    if size < expert_size:
        with_shared = f" with {n_shared:,} shared" if n_experts > 1 else ""
        return (
            f"{expert_size:,} neurons in each do not fit in {_count(n_experts, 'expert')}"
            f"{with_shared}; drawn: {size:,}"
        )
    if drawn.n_shared < n_shared and n_experts > 1:
        return f"{n_shared:,} shared are more than the {size:,} in each; drawn: {drawn.n_shared:,}"
    return ""


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'s' * (n != 1)}"


def _sizes(n_experts: int, size: int, n_shared: int) -> str:
    """Describe the sizes of a partition.

    Example:
        >>> _sizes(8, 3, 3), _sizes(1, 6, 2)
        ('8 experts, 3 neurons each, all shared', '1 expert, 6 neurons')
    """
    text = f"{_count(n_experts, 'expert')}, {_count(size, 'neuron')}"
    if n_experts == 1:
        return text
    return f"{text} each, {'all' if n_shared == size else f'{n_shared:,}'} shared"


def _summary(source: Source, score: str, drawn: View) -> dict[str, str]:
    n_experts, size = drawn.hands.shape
    width = len(drawn.ordered)
    overlaps = drawn.overlap[~np.eye(n_experts, dtype=bool)]
    common = "one expert"
    if n_experts > 1:
        common = f"{interval(100 * overlaps)}% of the score that each holds"
    return {
        "experts of a layer": _sizes(n_experts, size, drawn.n_shared),
        "neurons kept, dropped": f"{drawn.n_kept:,}, {width - drawn.n_kept:,} of {width:,}",
        "this layer's score kept": f"{drawn.top(drawn.n_kept):.0%}; in each expert "
        f"{interval(100 * drawn.mass)}%",
        "two experts have in common": common,
        "parameters stored": _parameters(source, n_experts, size, "stored"),
        "parameters a token uses": _parameters(source, n_experts, size, "effective"),
        f"{source.metric or 'accuracy'} right after conversion": _accuracy(source, score, drawn),
    }


def _parameters(source: Source, n_experts: int, size: int, kind: str) -> str:
    counts = source.parameters(n_experts, size)
    if counts is None:
        return "unknown: no model of these layers is known"
    dense = source.parameters(0, 0).stored
    count = getattr(counts, kind)
    head = "" if source.head else ", without a head"
    return f"{count / 1e6:.1f} million, {count / dense:.0%} of dense{head}"


def _accuracy(source: Source, score: str, drawn: View) -> str:
    """Describe the metric of the nearest evaluated conversion, or why there is none."""
    sizes = (*drawn.hands.shape, drawn.n_shared)
    if source.dense is not None and sizes[1] == len(drawn.ordered):
        return f"{100 * source.dense:.1f}%: each expert is the whole dense layer"
    if source.accuracy.empty:
        return "unknown: no conversion of it was judged"
    if score != next(iter(source.scores)):
        return "unknown: only Eq. 4 was judged"
    runs = source.nearest(*sizes)
    nearest_sizes = tuple(int(runs[name].iloc[0]) for name in SIZES)
    same = nearest_sizes == sizes
    place = "these sizes" if same else f"the nearest judged: {_sizes(*nearest_sizes)}"
    return f"{_runs(100 * runs['value'])} at {place}; dense {100 * source.dense:.1f}%"


def _runs(values: Sequence[float]) -> str:
    """Describe the percentages of some runs: their mean, and each value where they are few."""
    mean, ordered = f"{np.mean(values):.1f}%", [f"{value:.1f}" for value in sorted(values)]
    if len(ordered) == 1:
        return f"{mean}: one run"
    each = ", ".join(ordered) if len(ordered) <= 3 else f"{ordered[0]} to {ordered[-1]}"
    return f"{mean} ({each}): mean of {len(ordered)} runs"


def _agreement(drawn: View, first: View) -> str:
    if drawn is first:
        return ""
    if len(drawn.ranking) != len(first.ranking):
        return "other layers: neurons do not correspond"
    if not drawn.n_shared:
        return "none is shared"
    common = np.isin(drawn.ranking[: drawn.n_shared], first.ranking[: first.n_shared]).mean()
    return f"{common:.0%}; {drawn.n_shared / len(drawn.ranking):.0%} by chance"
