"""Explore importance: choose scores and sizes, see the deal at once, ask a neuron what excites it.

``explore`` shows controls over an interactive canvas (ipympl), ``still`` the same picture for a
page. A moved control only moves what is drawn; the browser then asks for a frame, so dragging
never queues. Without ipywidgets or ipympl one sentence says what is missing.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moebert_lib.errors import UserError, nearest
from moebert_lib.explorer_widget import COLUMNS, Explorer, views
from moebert_lib.layer_view import fit
from moebert_lib.plots_explorer import MOST, Picture
from moebert_lib.sizes import proportions
from moebert_lib.sources import EQ4, Source
from moebert_lib.widgets import ready

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
