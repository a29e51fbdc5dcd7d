"""How fast a forward pass is: the paper's Figure 4, full and real batches, beside their limits.

Each setting is one interleaved run of all its variants. Before a model is timed, what it
answers is compared with the model it was made from: a fast wrong answer is worth nothing.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn

from moebert_lib.bench import harness, roofline
from moebert_lib.bench.harness import BASE, LIMIT, RELEASE, VOCAB, glue_like, moebert, zipf
from moebert_lib.config.errors import UserError
from moebert_lib.model.accelerate import accelerate

Inputs = dict[str, Tensor]

ACCELERATED = ("dense", LIMIT, "moebert hash-random", "moebert gate-sentence")
HALF = ("dense", LIMIT, "moebert hash-random")
FAST, FAST_HALF = ", accelerated", ", accelerated, bf16"
MOE = "moebert hash-random" + FAST

#: Largest difference of logits from the ordinary model's that is let pass, by dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}

#: How many times as fast, on a CPU in float32.
WISHES: list[harness.Wish] = [
    ("32 x 128", MOE, "dense", 2.3),
    ("GLUE-like", MOE, "dense", 6.5),
    ("1 x 64", MOE, "dense", 2.3),
    ("32 x 128", MOE, LIMIT + FAST, 0.93),
    ("GLUE-like", MOE, LIMIT + FAST, 0.95),
    ("1 x 64", MOE, LIMIT + FAST, 0.85),
    *((setting, MOE, "dense" + FAST, None) for setting in ("32 x 128", "GLUE-like", "1 x 64")),
]


def settings(vocab: int = VOCAB, *, scale: int = 1) -> dict[str, Inputs]:
    """The batches: full and GLUE-like ones of 32, one sentence of 64 tokens and of 128 (Fig. 4).

    Args:
        vocab: Number of token ids.
        scale: Divides sentences and lengths; for tests.
    """
    n, long, short = 32 // scale, 128 // scale, 64 // scale
    return {
        "32 x 128": zipf(vocab, n=n, length=long),
        "GLUE-like": glue_like(vocab, n=n, longest=long),
        "1 x 64": zipf(vocab, n=1, length=short),
        "1 x 128": zipf(vocab, n=1, length=long),
    }


def variants(shape: dict[str, int] = BASE) -> dict[str, nn.Module]:
    """All that is timed on a CPU, by name: ordinary models, accelerated ones, and in bfloat16.

    An accelerated model shares its parameters with the ordinary one of its name.
    """
    built = harness.models(shape)
    found = dict(built)
    found |= {name + FAST: accelerate(built[name]) for name in ACCELERATED}
    found["dense, bf16"] = copy.deepcopy(built["dense"]).bfloat16()
    half = torch.bfloat16
    return found | {name + FAST_HALF: accelerate(built[name], dtype=half) for name in HALF}


def forward(model: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    """A call that gives logits without gradient."""

    @torch.inference_mode()
    def call() -> Tensor:
        return model(**inputs).logits

    return call


def time_variants(
    models: Mapping[str, nn.Module], inputs: Inputs, *, repeats: int | None = None
) -> pd.DataFrame:
    """Time a forward pass of every model, once accelerated ones have given the right answer.

    Args:
        models: By variant; "X, accelerated" and "X, bf16" are compared with "X".
        inputs: ``input_ids`` and, for padded batches, ``attention_mask``.
        repeats: Timed rounds; none as :func:`bench.time_interleaved`.

    Raises:
        UserError: a model answers differently from the one it was made from.
    """
    calls = {name: forward(model, inputs) for name, model in models.items()}
    return harness.time_interleaved(calls, repeats=repeats, look=agree)


def agree(logits: Mapping[str, Tensor]) -> None:
    """Refuse logits of "X, ..." that are not those of "X"; the release's are a MoEBERT's.

    Raises:
        UserError: as said.
    """
    for name, found in logits.items():
        origin = "moebert hash-random" if name == RELEASE else name.partition(", ")[0]
        if origin == name or origin not in logits:
            continue
        half = "bf16" in name or logits[origin].dtype == torch.bfloat16
        limit = TOLERANCE[torch.bfloat16 if half else torch.float32]
        expected = logits[origin].float()
        apart = float((found.float() - expected).abs().max() / expected.abs().max())
        if not apart <= limit:  # NaN too
            raise UserError(
                f"'{name}' is {apart:.2g} of the largest logit from '{origin}', over "
                f"{limit}; nothing is timed that answers differently"
            )


def limits(names: Mapping[str, nn.Module]) -> dict[str, str]:
    """What each MoE could reach: the equal-FLOP model through the same code."""
    moe = [name for name in names if name.startswith("moebert") or name == RELEASE]
    return {name: LIMIT + name[len(name.partition(", ")[0]) :] for name in moe}


def measured(
    models: Mapping[str, nn.Module],
    batches: Mapping[str, Inputs],
    *,
    repeats: int | None = None,
    against: str = "dense",
) -> Iterator[pd.DataFrame]:
    """Timings of one setting after the other, each printed as it is finished.

    Args:
        models: By variant. The ordinary gate is left out of large batches: it is Fig. 4's.
        batches: By setting.
        repeats: Timed rounds.
        against: The variant whose speed is 1.
    """
    for setting, inputs in batches.items():
        n = len(inputs["input_ids"])
        chosen = {k: m for k, m in models.items() if n == 1 or k != "moebert gate-sentence"}
        timings = time_variants(chosen, inputs, repeats=repeats).assign(setting=setting)
        table = harness.summary(timings, against=against, limits=limits(models), units={setting: n})
        rounds = timings["repeat"].nunique()
        print(
            f"\n{setting}: {n} sentence{'s' * (n > 1)}, {tokens(batches)[setting]} tokens, "
            f"{rounds} rounds; speed over {against}, and of the equal-FLOP limit's"
        )
        harness.show(table.drop(columns="setting"))
        yield timings[["setting", "variant", "repeat", "seconds"]]


def measure(
    shape: dict[str, int] = BASE, *, repeats: int | None = None, scale: int = 1
) -> pd.DataFrame:
    """All CPU timings: columns ``setting``, ``variant``, ``repeat``, ``seconds``."""
    batches = settings(shape.get("vocab_size", VOCAB), scale=scale)
    return pd.concat([*measured(variants(shape), batches, repeats=repeats)], ignore_index=True)


def main(
    *,
    shape: dict[str, int] = BASE,
    batch: int | None = None,
    length: int | None = None,
    repeats: int | None = None,
    out: Path | None = None,
) -> bool:
    """``moebert bench inference``: time, print tables and targets, keep the record.

    Args:
        shape: BERT's sizes.
        batch: Sentences of one setting, timed in place of the usual ones.
        length: Tokens of each, likewise.
        repeats: Timed rounds of each setting; none: 5 to 21, about a minute.
        out: The record's file.

    Returns:
        Whether all settings were timed; Ctrl-C keeps those that were.

    Raises:
        UserError: a model answers wrongly.
    """
    conditions = harness.prepare()
    vocab = shape.get("vocab_size", VOCAB)
    batches = settings(vocab) if batch is None and length is None else one(vocab, batch, length)
    print(
        f"BERT with hidden size {shape['hidden_size']} and {shape['num_hidden_layers']} layers, "
        f"float32 unless it says bf16, {torch.get_num_threads()} threads",
        flush=True,
    )
    models = variants(shape)
    ceiling = roofline.ceilings()
    timings, complete = harness.gather(measured(models, batches, repeats=repeats))
    units = {setting: len(inputs["input_ids"]) for setting, inputs in batches.items()}
    table = harness.summary(timings, limits=limits(models), units=units)
    targets = harness.judge(timings, WISHES)
    print()
    harness.say(targets)
    rows = roof(table, models, batches, ceiling)
    what = "inference" if batch is None and length is None else "inference-one"
    harness.keep(
        what,
        timings,
        table,
        targets=targets,
        out=out,
        complete=complete,
        shape=shape,
        tokens=tokens(batches),
        ceilings=ceiling.record(),
        roofline=rows.to_dict("records"),
        conditions=conditions,
    )
    return complete


def one(vocab: int, batch: int | None, length: int | None) -> dict[str, Inputs]:
    """A single setting of ``batch`` sentences (1 by default) of ``length`` tokens (128)."""
    n, T = batch or 1, length or 128
    return {f"{n} x {T}": zipf(vocab, n=n, length=T)}


def tokens(batches: Mapping[str, Inputs]) -> dict[str, int]:
    """Real tokens of each setting."""
    sizes = {}
    for setting, inputs in batches.items():
        mask = inputs.get("attention_mask")
        sizes[setting] = inputs["input_ids"].numel() if mask is None else int(mask.sum())
    return sizes


def roof(
    table: pd.DataFrame,
    models: Mapping[str, nn.Module],
    batches: Mapping[str, Inputs],
    ceiling: roofline.Ceilings,
) -> pd.DataFrame:
    """The roofline of what was timed; prints why the MoE is where it is against its limit."""
    named = list(zip(table["setting"], table["variant"], strict=True))
    works = {(s, v): roofline.work(models[v], batches[s]) for s, v in named}
    rows = roofline.table(table, works, ceiling)
    print(
        f"\nthis machine: {ceiling.float32 / 1e9:,.0f} GFLOP/s in float32, "
        f"{ceiling.bfloat16 / 1e9:,.0f} in bfloat16, "
        f"{ceiling.bandwidth / 1e9:,.1f} GB/s of memory"
    )
    reached = table.set_index(["setting", "variant"])["of_limit"]
    for setting in table["setting"].unique():
        print(roofline.why(rows, setting, MOE, LIMIT + FAST, measured=reached[setting, MOE]))
    return rows


# What a forward pass costs as experts, tokens, sentences, their length or layers grow.
# One thing is varied at a time around 8 sentences of 64 tokens in two layers of 4 experts. Beside
# every point stands what the roofline says of it: how its operations and its bytes grow.

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
        DENSE: harness.models(shape, only=("dense",))["dense"],
        LIMIT + FAST: harness.models(narrow, only=("dense",))["dense"],
        MOE: moebert(shape, n_experts=point.n_experts, expert_size=size),
    }
    return {name: accelerate(model) for name, model in built.items()}


def measured_bench_scaling(
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


def measure_bench_scaling(
    shape: dict[str, int] = SHAPE, *, repeats: int = 7, chosen: Sequence[Point] | None = None
) -> pd.DataFrame:
    """All timings: ``axis``, ``value``, ``setting``, ``variant``, ``repeat``, ``seconds``."""
    chosen = points(shape["intermediate_size"]) if chosen is None else chosen
    frames = [*measured_bench_scaling(chosen, shape, repeats=repeats, works={})]
    return pd.concat(frames, ignore_index=True)


def summary(
    timings: pd.DataFrame,
    works: Mapping[tuple[str, str], roofline.Work],
    ceiling: roofline.Ceilings,
) -> pd.DataFrame:
    """:func:`bench.summary` of each point with ``axis``, ``value`` and the roofline's columns."""
    table = harness.summary(timings, against=DENSE, limits={MOE: LIMIT + FAST})
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


def main_bench_scaling(
    *, shape: dict[str, int] = SHAPE, repeats: int = 7, out: Path | None = None
) -> bool:
    """``moebert bench scaling``: time every point, print the exponents, keep the record.

    Returns:
        Whether all points were timed; Ctrl-C keeps those that were.
    """
    conditions = harness.prepare()
    print(
        f"hidden size {shape['hidden_size']}, FFN {shape['intermediate_size']}, float32, "
        f"{torch.get_num_threads()} threads; {repeats} interleaved rounds",
        flush=True,
    )
    ceiling = roofline.ceilings()
    works: dict[tuple[str, str], roofline.Work] = {}
    chosen = points(shape["intermediate_size"])
    timings, complete = harness.gather(
        measured_bench_scaling(chosen, shape, repeats=repeats, works=works)
    )
    table = summary(timings, works, ceiling)
    fits = slopes(table)
    print()
    for row in fits[fits["variant"] == MOE].itertuples():
        print(row.words)
    harness.keep(
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


# How fast a forward pass is on a GPU, in bfloat16, beside compiled dense models.

COMPILED = ", compiled"
COMPILER = partial(torch.compile, dynamic=False)
AGAINST = "dense" + COMPILED
BATCHES = (1, 32, 128, 512)  # of 128 tokens; 1 is Fig. 4's

#: A MoE should have this share of the speed of either equal-FLOP limit.
WISHES_bench_cuda: list[harness.Wish] = [
    *((f"{n} x 128", MOE, LIMIT + how, 0.85) for n in BATCHES for how in (COMPILED, FAST)),
    *(("GLUE-like", MOE, LIMIT + how, 0.85) for how in (COMPILED, FAST)),
    *((setting, MOE, AGAINST, None) for setting in ("32 x 128", "GLUE-like", "512 x 128")),
]


def settings_bench_cuda(
    vocab: int = VOCAB, *, device: str = "cuda", scale: int = 1
) -> dict[str, Inputs]:
    """Full batches of 1 to 512 sentences, and a GLUE-like one; ``scale`` divides, for tests."""
    long = 128 // scale
    found = {f"{n} x 128": zipf(vocab, n=max(n // scale, 1), length=long) for n in BATCHES}
    found["GLUE-like"] = glue_like(vocab, n=32 // scale, longest=long)
    return {setting: _to(inputs, device) for setting, inputs in found.items()}


def variants_bench_cuda(
    shape: dict[str, int] = BASE,
    *,
    device: str = "cuda",
    compiler: Callable[[nn.Module], nn.Module] = COMPILER,
) -> dict[str, nn.Module]:
    """Dense and equal-FLOP models ordinary, compiled and accelerated; MoEBERT; the release's.

    MoEBERT's experts run in one grouped product (transformers' ``grouped_mm``).

    Args:
        shape: BERT's sizes.
        device: Where.
        compiler: Compiles a model.
    """
    names = ("dense", LIMIT, RELEASE, "moebert hash-random")
    built = harness.models(shape, only=names)
    built = {name: model.to(device, torch.bfloat16) for name, model in built.items()}
    built["moebert hash-random"].set_experts_implementation("grouped_mm")
    found = dict(built)
    found |= {name + COMPILED: compiler(built[name]) for name in ("dense", LIMIT)}
    fast = ("dense", LIMIT, "moebert hash-random")
    return found | {name + FAST: accelerate(built[name]) for name in fast}


def main_bench_cuda(
    *,
    shape: dict[str, int] = BASE,
    batch: int | None = None,
    length: int | None = None,
    repeats: int | None = None,
    out: Path | None = None,
) -> bool:
    """``moebert bench inference --device cuda``: as ``bench_inference.main``, on a GPU.

    Raises:
        UserError: torch sees no GPU, or a model answers wrongly.
    """
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave it out to measure the CPU")
    conditions = harness.prepare()
    vocab = shape.get("vocab_size", VOCAB)
    batches = settings_bench_cuda(vocab)
    if batch is not None or length is not None:
        batches = {name: _to(inputs, "cuda") for name, inputs in one(vocab, batch, length).items()}
    print(
        f"BERT with hidden size {shape['hidden_size']} and {shape['num_hidden_layers']} layers, "
        f"bfloat16, {torch.cuda.get_device_name()}",
        flush=True,
    )
    torch._dynamo.config.recompile_limit = 64  # each setting is a shape of its own
    models = variants_bench_cuda(shape)
    timings, complete = harness.gather(measured(models, batches, repeats=repeats, against=AGAINST))
    units = {setting: len(inputs["input_ids"]) for setting, inputs in batches.items()}
    table = harness.summary(timings, against=AGAINST, limits=limits(models), units=units)
    targets = harness.judge(timings, WISHES_bench_cuda)
    harness.say(targets)
    what = "inference-cuda" if batch is None and length is None else "inference-one-cuda"
    harness.keep(
        what,
        timings,
        table,
        targets=targets,
        out=out,
        complete=complete,
        shape=shape,
        tokens=tokens(batches),
        conditions=conditions,
    )
    return complete


def _to(inputs: Inputs, device: str) -> Inputs:
    return {name: tensor.to(device) for name, tensor in inputs.items()}
