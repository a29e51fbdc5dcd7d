"""A sentence's way through the experts as a table of text: what changes while one types.

Plain HTML is written in a millisecond whatever the script of the tokens, can be read aloud,
and scrolls where a sentence is long. Colours and numbers are those of ``plots_routing``.
"""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike

from moebert_lib.plots import EXPERTS, INK, expert_color, ink_on

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
