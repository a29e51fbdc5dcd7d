"""How fast a forward pass is: the paper's Figure 4, full and real batches, beside their limits.

Each setting is one interleaved run of all its variants. Before a model is timed, what it
answers is compared with the model it was made from: a fast wrong answer is worth nothing.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from moebert_lib import bench, roofline
from moebert_lib.bench_models import BASE, LIMIT, RELEASE, VOCAB, glue_like, zipf
from moebert_lib.errors import UserError
from moebert_lib.packed import accelerate

Inputs = dict[str, Tensor]

ACCELERATED = ("dense", LIMIT, "moebert hash-random", "moebert gate-sentence")
HALF = ("dense", LIMIT, "moebert hash-random")
FAST, FAST_HALF = ", accelerated", ", accelerated, bf16"
MOE = "moebert hash-random" + FAST

#: Largest difference of logits from the ordinary model's that is let pass, by dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}

#: How many times as fast, on a CPU in float32.
WISHES: list[bench.Wish] = [
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
    built = bench.models(shape)
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
    return bench.time_interleaved(calls, repeats=repeats, look=agree)


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
        table = bench.summary(timings, against=against, limits=limits(models), units={setting: n})
        rounds = timings["repeat"].nunique()
        print(
            f"\n{setting}: {n} sentence{'s' * (n > 1)}, {tokens(batches)[setting]} tokens, "
            f"{rounds} rounds; speed over {against}, and of the equal-FLOP limit's"
        )
        bench.show(table.drop(columns="setting"))
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
    conditions = bench.prepare()
    vocab = shape.get("vocab_size", VOCAB)
    batches = settings(vocab) if batch is None and length is None else one(vocab, batch, length)
    print(
        f"BERT with hidden size {shape['hidden_size']} and {shape['num_hidden_layers']} layers, "
        f"float32 unless it says bf16, {torch.get_num_threads()} threads",
        flush=True,
    )
    models = variants(shape)
    ceiling = roofline.ceilings()
    timings, complete = bench.gather(measured(models, batches, repeats=repeats))
    units = {setting: len(inputs["input_ids"]) for setting, inputs in batches.items()}
    table = bench.summary(timings, limits=limits(models), units=units)
    targets = bench.judge(timings, WISHES)
    print()
    bench.say(targets)
    rows = roof(table, models, batches, ceiling)
    what = "inference" if batch is None and length is None else "inference-one"
    bench.keep(
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
