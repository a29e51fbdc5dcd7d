"""What a forward pass costs as experts, tokens, sentences, their length or layers grow.

One thing is varied at a time around 8 sentences of 64 tokens in two layers of 4 experts. Beside
every point stands what the roofline says of it: how its operations and its bytes grow.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from moebert_lib import bench, roofline
from moebert_lib.bench_inference import FAST, MOE, time_variants
from moebert_lib.bench_models import BASE, LIMIT, moebert, zipf
from moebert_lib.packed import accelerate

SHAPE = {**BASE, "num_hidden_layers": 2, "vocab_size": 8192}
DENSE = "dense" + FAST

#: Why the counted operations and bytes grow as they do, by axis.
REASONS = {
    "experts": "an expert has 1/N of the width, so operations fall towards attention's alone, "
    "while the weights of all experts in use are read",
    "experts of one size": "a token visits one expert of the same size, so operations stay, "
    "while each expert in use adds weights to read and has fewer tokens in its product",
    "tokens": "weights are read once for all tokens, so few tokens cost more each; attention "
    "grows with the square of the length",
    "sentences": "weights are read once for all sentences, so few of them cost more each",
    "length": "weights are read once for all tokens, and attention grows with the square of the "
    "length",
    "layers": "each layer costs the same but for the last, which serves first tokens alone",
}


class Point(NamedTuple):
    """One setting: which axis it belongs to, its value there, and all sizes."""

    axis: str
    value: int
    n: int = 8
    length: int = 64
    n_layers: int = 2
    n_experts: int = 4
    expert_size: int | None = None  # the width over the number of experts

    @property
    def name(self) -> str:
        """How it is called among settings."""
        return f"{self.axis} = {self.value}"


def points(width: int = SHAPE["intermediate_size"]) -> list[Point]:
    """All settings, axis by axis."""
    counts = (1, 2, 4, 8, 16, 32, 64)
    grown = {
        "experts": [{"n_experts": N} for N in counts],
        "experts of one size": [{"n_experts": N, "expert_size": width // 4} for N in counts],
        "tokens": [{"n": n, "length": 8 * n} for n in (1, 2, 4, 8, 16)],
        "sentences": [{"n": n} for n in (1, 2, 4, 8, 16, 32)],
        "length": [{"length": T} for T in (16, 32, 64, 128, 256, 512)],
        "layers": [{"n_layers": L} for L in (1, 2, 3, 4, 6)],
    }
    return [Point(axis, _value(sizes), **sizes) for axis, steps in grown.items() for sizes in steps]


def _value(sizes: dict[str, int]) -> int:
    if {"n", "length"} <= set(sizes):
        return sizes["n"] * sizes["length"]
    return next(iter(sizes.values()))


def models(point: Point, shape: dict[str, int] = SHAPE) -> dict[str, nn.Module]:
    """The MoE of a point, dense BERT and the equal-FLOP limit, all accelerated."""
    shape = {**shape, "num_hidden_layers": point.n_layers}
    size = point.expert_size or shape["intermediate_size"] // point.n_experts
    narrow = {**shape, "intermediate_size": size}
    built = {
        DENSE: bench.models(shape, only=("dense",))["dense"],
        LIMIT + FAST: bench.models(narrow, only=("dense",))["dense"],
        MOE: moebert(shape, n_experts=point.n_experts, expert_size=size),
    }
    return {name: accelerate(model) for name, model in built.items()}


def measured(
    chosen: Sequence[Point],
    shape: dict[str, int],
    *,
    repeats: int,
    works: dict[tuple[str, str], roofline.Work],
) -> Iterator[pd.DataFrame]:
    """Timings of each point, one after the other; ``works`` is filled with what each has to do."""
    sizes, built = None, {}
    for point in chosen:
        if point[4:] != sizes:
            built.clear()  # before the next ones are built
            sizes, built = point[4:], models(point, shape)
        inputs = zipf(shape["vocab_size"], n=point.n, length=point.length)
        timings = time_variants(built, inputs, repeats=repeats)
        for name, model in built.items():
            works[point.name, name] = roofline.work(model, inputs)
        median = 1000 * timings.groupby("variant", sort=False)["seconds"].median()
        print(
            f"{point.name}: " + ", ".join(f"{v} {ms:.1f} ms" for v, ms in median.items()),
            flush=True,
        )
        named = timings.assign(axis=point.axis, value=point.value, setting=point.name)
        yield named[["axis", "value", "setting", "variant", "repeat", "seconds"]]


def measure(
    shape: dict[str, int] = SHAPE, *, repeats: int = 7, chosen: Sequence[Point] | None = None
) -> pd.DataFrame:
    """All timings: ``axis``, ``value``, ``setting``, ``variant``, ``repeat``, ``seconds``."""
    chosen = points(shape["intermediate_size"]) if chosen is None else chosen
    frames = [*measured(chosen, shape, repeats=repeats, works={})]
    return pd.concat(frames, ignore_index=True)


def summary(
    timings: pd.DataFrame,
    works: Mapping[tuple[str, str], roofline.Work],
    ceiling: roofline.Ceilings,
) -> pd.DataFrame:
    """:func:`bench.summary` of each point with ``axis``, ``value`` and the roofline's columns."""
    table = bench.summary(timings, against=DENSE, limits={MOE: LIMIT + FAST})
    rows = roofline.table(table, works, ceiling)
    where = timings.drop_duplicates("setting")[["setting", "axis", "value"]]
    return table.merge(rows, on=["setting", "variant"]).merge(where, on="setting")


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """How fast time grows along each axis, beside operations and bytes: exponents of power laws.

    Args:
        table: From :func:`summary`.

    Returns:
        One row an axis and variant: ``exponent``, the least-squares slope of log time over log
        value, with its 95 % t interval ``low`` to ``high`` over the points (wide where the law
        is no power); ``flops`` and ``bytes``, the counts' own; ``in_turn``, that of the time
        that operations and bytes would take one after the other; and ``words``.
    """
    rows = []
    for (axis, variant), part in table.groupby(["axis", "variant"], sort=False):
        x = np.log(part["value"].to_numpy(float))
        if len(x) < 3:
            continue
        fit = stats.linregress(x, np.log(part["median_ms"]))
        half = fit.stderr * stats.t.ppf(0.975, len(x) - 2)
        own = {
            name: stats.linregress(x, np.log(part[column].astype(float))).slope
            for name, column in (("flops", "flops"), ("bytes", "bytes"), ("in_turn", "in_turn_ms"))
        }
        words = (
            f"{axis}, {variant}: time goes with the power {fit.slope:.2f} "
            f"({fit.slope - half:.2f} to {fit.slope + half:.2f}), operations "
            f"{own['flops']:.2f}, bytes {own['bytes']:.2f}, both in turn "
            f"{own['in_turn']:.2f}: {REASONS[str(axis)]}"
        )
        rows.append(
            {
                "axis": axis,
                "variant": variant,
                "exponent": fit.slope,
                "low": fit.slope - half,
                "high": fit.slope + half,
                **own,
                "words": words,
            }
        )
    return pd.DataFrame(rows)


def main(*, shape: dict[str, int] = SHAPE, repeats: int = 7, out: Path | None = None) -> bool:
    """``moebert bench scaling``: time every point, print the exponents, keep the record.

    Returns:
        Whether all points were timed; Ctrl-C keeps those that were.
    """
    conditions = bench.prepare()
    print(
        f"hidden size {shape['hidden_size']}, FFN {shape['intermediate_size']}, float32, "
        f"{torch.get_num_threads()} threads; {repeats} interleaved rounds",
        flush=True,
    )
    ceiling = roofline.ceilings()
    works: dict[tuple[str, str], roofline.Work] = {}
    chosen = points(shape["intermediate_size"])
    timings, complete = bench.gather(measured(chosen, shape, repeats=repeats, works=works))
    table = summary(timings, works, ceiling)
    fits = slopes(table)
    print()
    for row in fits[fits["variant"] == MOE].itertuples():
        print(row.words)
    bench.keep(
        "scaling",
        timings,
        table,
        out=out,
        complete=complete,
        shape=shape,
        ceilings=ceiling.record(),
        slopes=fits.to_dict("records"),
        conditions=conditions,
    )
    return complete
