"""How fast a forward pass is on a GPU, in bfloat16, beside compiled dense models."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from moebert_lib import bench
from moebert_lib.bench_inference import FAST, MOE, Inputs, limits, measured, one, tokens
from moebert_lib.bench_models import BASE, LIMIT, RELEASE, VOCAB, glue_like, zipf
from moebert_lib.errors import UserError
from moebert_lib.packed import accelerate

COMPILED = ", compiled"
COMPILER = partial(torch.compile, dynamic=False)
AGAINST = "dense" + COMPILED
BATCHES = (1, 32, 128, 512)  # of 128 tokens; 1 is Fig. 4's

#: A MoE should have this share of the speed of either equal-FLOP limit.
WISHES: list[bench.Wish] = [
    *((f"{n} x 128", MOE, LIMIT + how, 0.85) for n in BATCHES for how in (COMPILED, FAST)),
    *(("GLUE-like", MOE, LIMIT + how, 0.85) for how in (COMPILED, FAST)),
    *((setting, MOE, AGAINST, None) for setting in ("32 x 128", "GLUE-like", "512 x 128")),
]


def settings(vocab: int = VOCAB, *, device: str = "cuda", scale: int = 1) -> dict[str, Inputs]:
    """Full batches of 1 to 512 sentences, and a GLUE-like one; ``scale`` divides, for tests."""
    long = 128 // scale
    found = {f"{n} x 128": zipf(vocab, n=max(n // scale, 1), length=long) for n in BATCHES}
    found["GLUE-like"] = glue_like(vocab, n=32 // scale, longest=long)
    return {setting: _to(inputs, device) for setting, inputs in found.items()}


def variants(
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
    built = bench.models(shape, only=names)
    built = {name: model.to(device, torch.bfloat16) for name, model in built.items()}
    built["moebert hash-random"].set_experts_implementation("grouped_mm")
    found = dict(built)
    found |= {name + COMPILED: compiler(built[name]) for name in ("dense", LIMIT)}
    fast = ("dense", LIMIT, "moebert hash-random")
    return found | {name + FAST: accelerate(built[name]) for name in fast}


def main(
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
    conditions = bench.prepare()
    vocab = shape.get("vocab_size", VOCAB)
    batches = settings(vocab)
    if batch is not None or length is not None:
        batches = {name: _to(inputs, "cuda") for name, inputs in one(vocab, batch, length).items()}
    print(
        f"BERT with hidden size {shape['hidden_size']} and {shape['num_hidden_layers']} layers, "
        f"bfloat16, {torch.cuda.get_device_name()}",
        flush=True,
    )
    torch._dynamo.config.recompile_limit = 64  # each setting is a shape of its own
    models = variants(shape)
    timings, complete = bench.gather(measured(models, batches, repeats=repeats, against=AGAINST))
    units = {setting: len(inputs["input_ids"]) for setting, inputs in batches.items()}
    table = bench.summary(timings, against=AGAINST, limits=limits(models), units=units)
    targets = bench.judge(timings, WISHES)
    bench.say(targets)
    what = "inference-cuda" if batch is None and length is None else "inference-one-cuda"
    bench.keep(
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
