"""The explorer's words: what a deal costs and keeps, and what excites a neuron, as HTML tables.

Both are live regions, so that a screen reader says what a moved slider changed.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

from moebert_lib.layer_view import View, interval
from moebert_lib.plots import COLORS
from moebert_lib.sources import Source

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
