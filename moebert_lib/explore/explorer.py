"""Explore importance: choose scores and sizes, see the deal at once, ask a neuron what excites it.

``explore`` shows controls over an interactive canvas (ipympl), ``still`` the same picture for a
page. A moved control only moves what is drawn; the browser then asks for a frame, so dragging
never queues. Without ipywidgets or ipympl one sentence says what is missing.
"""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.settings import proportions
from moebert_lib.explore.explorer_plots import MOST, Picture
from moebert_lib.explore.score_sources import EQ4, Source
from moebert_lib.explore.widgets import ready
from moebert_lib.method.partition import View, fit, interval, view
from moebert_lib.plots.style import COLORS

MISSING = (
    "The explorer needs ipywidgets and ipympl (pip install ipywidgets ipympl); the figure below "
    "stands still."
)
SIZES = ("n_experts", "expert_size", "n_shared")

Shown = Sequence[tuple[str, str]]


def explore(
    sources: Source | Sequence[Source],
    *,
    shown: Shown | None = None,
    layer: int | None = None,
    **sizes: int,
) -> None:
    """Show the explorer in JupyterLab or Voila.

    Args:
        sources: What its menus offer.
        shown: Names of a source and of one of its scores for each column at the start, three at
            most; None is all scores of the first source, or where it has but one, as a file has,
            Eq. 4 of each source.
        layer: Where its slider starts, counted from 1; None is the middle of the first source.
        sizes: Where the sliders ``n_experts``, ``expert_size`` and ``n_shared`` start, in neurons
            of the first column's layers; the paper's proportions where none are given. Sizes
            that do not fit are cut, and eight experts are the most.

    Raises:
        UserError: no source, or one, a score, a layer or a size that is not there.
    """
    chosen = chosen_columns(sources, shown)
    start = _start(chosen[0][0], layer, sizes)
    if ready("ipympl", missing=MISSING):
        from IPython.display import display

        display(Explorer(_listed(sources), chosen, **start).box)


def still(
    sources: Source | Sequence[Source],
    *,
    shown: Shown | None = None,
    layer: int | None = None,
    title: str = "",
    **sizes: int,
) -> Figure:
    """The explorer's picture at its start, as a figure to save; arguments as for :func:`explore`.

    Raises:
        UserError: as :func:`explore`.
    """
    chosen = chosen_columns(sources, shown)
    start = _start(chosen[0][0], layer, sizes)
    figure = plt.figure()
    Picture(figure, views(chosen, **start), title=title)
    return figure


def numbers(
    sources: Source | Sequence[Source],
    *,
    shown: Shown | None = None,
    layer: int | None = None,
    **sizes: int,
) -> pd.DataFrame:
    """The numbers of :func:`still`: a row for each neuron, in order of rank, of each column.

    Returns:
        Columns ``column`` (from 1), ``score``, ``layer``, ``rank`` (from 1), ``neuron`` (from 0),
        ``value``, the score; ``over_mean``, the same over the layer's mean; ``holders``, the
        number of experts that hold it.
    """
    chosen = chosen_columns(sources, shown)
    start = _start(chosen[0][0], layer, sizes)
    frames = []
    shown_views = views(chosen, **start)
    for n, ((source, name), one) in enumerate(zip(chosen, shown_views, strict=True), start=1):
        frames.append(
            pd.DataFrame(
                {
                    "column": n,
                    "score": name,
                    "layer": min(start["layer"], source.shape[0]),
                    "rank": np.arange(1, len(one.ranking) + 1),
                    "neuron": one.ranking,
                    "value": one.ordered,
                    "over_mean": one.relative,
                    "holders": one.holds.sum(0),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def chosen_columns(
    sources: Source | Sequence[Source], shown: Shown | None
) -> list[tuple[Source, str]]:
    """The source and the name of its score for each column.

    Raises:
        UserError: nothing to explore, too many columns, or a name that is not there.
    """
    by_name = {source.name: source for source in _listed(sources)}
    if not by_name:
        raise UserError(
            "nothing to explore: no scores were given; expected some of "
            "sources.from_settings, from_store or from_file"
        )
    shown = _usual(list(by_name.values())) if shown is None else list(shown)
    if not 1 <= len(shown) <= COLUMNS:
        raise UserError(f"shown has {len(shown)} columns; expected 1 to {COLUMNS}")
    for name, score in shown:
        if name not in by_name:
            raise UserError(f"shown: no source '{name}'; {nearest(name, by_name)}")
        if score not in by_name[name].scores:
            choices = by_name[name].scores
            raise UserError(f"shown: '{name}' has no score '{score}'; {nearest(score, choices)}")
    return [(by_name[name], score) for name, score in shown]


def _listed(sources: Source | Sequence[Source]) -> list[Source]:
    return [sources] if isinstance(sources, Source) else list(sources)


def _usual(sources: list[Source]) -> list[tuple[str, str]]:
    """Columns where none are named: the scores of the first source, or one of each source."""
    lead = sources[0]
    every = [(lead.name, score) for score in lead.scores]
    return (every if len(every) > 1 else [(one.name, EQ4) for one in sources])[:COLUMNS]


def _start(source: Source, layer: int | None, sizes: dict[str, int]) -> dict[str, int]:
    """Layer and the three sizes: the middle, the paper's proportions; refused if they can't be."""
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
    n_experts = min(n_experts, MOST, width)
    size, shared = proportions(width, n_experts, sizes.get("expert_size"), sizes.get("n_shared"))
    size, shared = fit(width, n_experts, size, shared)
    return {"layer": layer, "n_experts": n_experts, "expert_size": size, "n_shared": shared}


# The explorer's controls and canvas: a change of either moves what is drawn, and no more.

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
        self.table.value = table(self.chosen, self.views, asked=values)

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
        self.neuron.value = neuron(
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


# The explorer's words: what a deal costs and keeps, and what excites a neuron, as HTML tables.
# Both are live regions, so that a screen reader says what a moved slider changed.

Chosen = Sequence[tuple[Source, str]]

STYLE = """<style>
.moebert table{border-collapse:collapse;margin:.3em 0 .6em;font-size:13px;line-height:1.3}
.moebert caption{text-align:left;font-weight:600;padding:.2em 0}
.moebert th,.moebert td{padding:.12em .7em .12em 0;text-align:left;font-weight:400;
vertical-align:top;border:0}
.moebert thead th{border-bottom:1px solid #999;font-weight:600}
.moebert tbody th{color:#444;min-width:5.5em}
.moebert td.number{text-align:right;font-variant-numeric:tabular-nums;padding-right:.9em}
.moebert td.before{text-align:right;padding-right:.3em;color:#444}
.moebert td.after{color:#444}
.moebert mark{background:INK;padding:0 .2em}
.moebert .side{display:flex;flex-wrap:wrap;gap:0 2.5em}
.moebert .told{display:flex;gap:1.2em}
.moebert p{margin:.1em 0;font-size:13px;line-height:1.35;max-width:27em}
</style>""".replace("INK", COLORS["own"])


def table(chosen: Chosen, views: Sequence[View], *, asked: dict[str, int] | None = None) -> str:
    """What the deal of each column is, costs and keeps; one cell where all columns say the same.

    Args:
        chosen: Source and score of each column.
        views: What each column shows.
        asked: The three sizes as the sliders have them, where they may not fit the first column.
    """
    facts = [_facts(source, score, one) for (source, score), one in zip(chosen, views, strict=True)]
    if len(views) > 1:
        for fact, one in zip(facts, views, strict=True):
            fact["its shared neurons, shared in column 1"] = _agreement(one, views[0])
    heads = [_numbered(n, one.heading[0], len(views)) for n, one in enumerate(views, start=1)]
    head = "".join(f"<th scope='col'>{escape(words)}</th>" for words in heads)
    rows = "".join(
        f"<tr><th scope='row'>{name}</th>{_cells([fact[name] for fact in facts])}</tr>"
        for name in facts[0]
    )
    note = f"<p class='note'>{_cut(views[0], **asked)}</p>" if asked else ""
    return _live(
        f"{note}<table><caption>What this deal costs and keeps</caption><thead><tr><td></td>{head}"
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


def _numbered(column: int, words: str, n_columns: int) -> str:
    return f"{column} · {words}" if n_columns > 1 else words


def _cells(values: list[str]) -> str:
    if len(set(values)) == 1:
        return f"<td colspan='{len(values)}'>{values[0]}</td>"
    return "".join(f"<td>{value}</td>" for value in values)


def _cut(one: View, *, n_experts: int, expert_size: int, n_shared: int) -> str:
    """What of the asked sizes does not fit, and what is drawn instead; empty where all fits."""
    size = one.hands.shape[1]
    if size < expert_size:
        with_shared = f" with {n_shared:,} shared" if n_experts > 1 else ""
        return (
            f"{expert_size:,} neurons in each do not fit in {_count(n_experts, 'expert')}"
            f"{with_shared}; drawn: {size:,}"
        )
    if one.n_shared < n_shared and n_experts > 1:
        return f"{n_shared:,} shared are more than the {size:,} in each; drawn: {one.n_shared:,}"
    return ""


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'s' * (n != 1)}"


def _sizes(n_experts: int, size: int, n_shared: int) -> str:
    """The sizes of a deal in words.

    Example:
        >>> _sizes(8, 3, 3), _sizes(1, 6, 2)
        ('8 experts, 3 neurons each, all shared', '1 expert, 6 neurons')
    """
    words = f"{_count(n_experts, 'expert')}, {_count(size, 'neuron')}"
    if n_experts == 1:
        return words
    return f"{words} each, {'all' if n_shared == size else f'{n_shared:,}'} shared"


def _facts(source: Source, score: str, one: View) -> dict[str, str]:
    n_experts, size = one.hands.shape
    width = len(one.ordered)
    sizes = (n_experts, size, one.n_shared)
    return {
        "experts of a layer": _sizes(*sizes),
        "neurons kept, dropped": f"{one.n_kept:,}, {width - one.n_kept:,} of {width:,}",
        "this layer's score kept": f"{one.top(one.n_kept):.0%}; in each expert "
        f"{interval(100 * one.mass)}%",
        "two experts have in common": _common(one),
        "parameters stored": _parameters(source, n_experts, size, stored=True),
        "parameters a token uses": _parameters(source, n_experts, size, stored=False),
        f"{source.metric or 'accuracy'} right after conversion": _accuracy(source, score, one),
    }


def _common(one: View) -> str:
    """How much of an expert's score another one holds too: the picture's overlap, in words."""
    apart = one.overlap[~np.eye(len(one.hands), dtype=bool)]
    return f"{interval(100 * apart)}% of the score that each holds" if len(apart) else "one expert"


def _parameters(source: Source, n_experts: int, size: int, *, stored: bool) -> str:
    counts = source.parameters(n_experts, size)
    if counts is None:
        return "unknown: no model of these layers is known"
    dense = source.parameters(0, 0).stored
    count = counts.stored if stored else counts.effective
    head = "" if source.head else ", without a head"
    return f"{count / 1e6:.1f} million, {count / dense:.0%} of dense{head}"


def _accuracy(source: Source, score: str, one: View) -> str:
    """Of the nearest conversion that was judged, or why there is none."""
    sizes = (*one.hands.shape, one.n_shared)
    if source.dense is not None and sizes[1] == len(one.ordered):
        return f"{100 * source.dense:.1f}%: each expert is the whole dense layer"
    if source.accuracy.empty:
        return "unknown: no conversion of it was judged"
    if score != next(iter(source.scores)):
        return "unknown: only Eq. 4 was judged"
    runs = source.nearest(*sizes)
    n_experts, size, shared = (int(runs[name].iloc[0]) for name in list(runs)[:3])
    near = (n_experts, size, shared)
    words = "these sizes" if near == sizes else f"the nearest judged: {_sizes(*near)}"
    return f"{_runs(100 * runs['value'])} at {words}; dense {100 * source.dense:.1f}%"


def _runs(values: Sequence[float]) -> str:
    """Percentages of some runs: their mean, and each of them where they are few."""
    mean, ordered = f"{np.mean(values):.1f}%", [f"{value:.1f}" for value in sorted(values)]
    if len(ordered) == 1:
        return f"{mean}: one run"
    each = ", ".join(ordered) if len(ordered) <= 3 else f"{ordered[0]} to {ordered[-1]}"
    return f"{mean} ({each}): mean of {len(ordered)} runs"


def _agreement(one: View, lead: View) -> str:
    if one is lead:
        return ""
    if len(one.ranking) != len(lead.ranking):
        return "other layers: neurons do not correspond"
    if not one.n_shared:
        return "none is shared"
    common = np.isin(one.ranking[: one.n_shared], lead.ranking[: lead.n_shared]).mean()
    return f"{common:.0%}; {one.n_shared / len(one.ranking):.0%} by chance"


def neuron(chosen: Chosen, views: Sequence[View], ranks: Sequence[int], *, layer: int) -> str:
    """One neuron of each column: rank, score, who holds it, and what excites it.

    What excites it is told once where columns show the same neuron of the same model.
    """
    told: dict[tuple, list[str]] = {}
    columns = enumerate(zip(chosen, views, ranks, strict=True), start=1)
    for n, ((source, score), one, rank) in columns:
        at, j = min(layer, source.shape[0]), int(one.ranking[rank])
        line = (
            f"rank {rank + 1:,} of {len(one.ranking):,} by {escape(score)}, "
            f"{one.relative[rank]:.3g} of the mean: {one.part(rank)}"
        )
        line = _numbered(n, line, len(views))
        told.setdefault((source.name, at, j), [source]).append(line)
    parts = [_one_neuron(name, at, j, *lines) for (name, at, j), lines in told.items()]
    return _live(f"<div class='side'>{''.join(parts)}</div>")


def _one_neuron(name: str, layer: int, j: int, source: Source, *lines: str) -> str:
    caption = f"Neuron {j} of layer {layer}, {escape(name)}"
    held = "".join(f"<p>{line}</p>" for line in lines)
    if source.excited is None:
        return f"<div><p><b>{caption}</b></p>{held}<p>No tokens: {escape(source.silent)}</p></div>"
    rows = "".join(
        f"<tr><td class='number'>{value:.2f}</td><td class='before'>{escape(before)}</td>"
        f"<td><mark>{escape(token)}</mark></td><td class='after'>{escape(after)}</td></tr>"
        for value, before, token, after in source.excited.contexts(layer - 1, j)
    )
    heads = "".join(
        f"<th scope='col'>{head}</th>" for head in ("activation", "before", "token", "after")
    )
    found = f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>"
    return (
        f"<div class='told'><div><p><b>{caption}</b></p>{held}</div><table>"
        f"<caption>Tokens that excite it most</caption>{found}</table></div>"
    )


def _live(content: str) -> str:
    return f"{STYLE}<div class='moebert' role='status' aria-live='polite'>{content}</div>"
