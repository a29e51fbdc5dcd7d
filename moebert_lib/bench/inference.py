"""Time a forward pass of BERT, MoEBERT and the equal-FLOP limit: Figure 4, padding, GPU, scaling.

Weights are random, since speed does not depend on them. A variant is a model and the code that
runs it, such as "dense, accelerated, bf16"; its logits are compared with those of "dense" before
it is timed, since a fast wrong answer is worth nothing.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
)

from moebert_lib.bench import roofline
from moebert_lib.bench.harness import Benchmark, as_json, check_equal
from moebert_lib.config.errors import UserError
from moebert_lib.method.routing import random_table
from moebert_lib.model.accelerate import accelerate
from moebert_lib.model.modeling import MoEBertConfig, MoEBertForSequenceClassification
from moebert_lib.model.moe_layer import MoEOutput, RoutingCall, moe_layers

Inputs = dict[str, Tensor]
Sizes = dict[str, int]


def sizes(D: int, *, layers: int, heads: int, width: int, vocab: int) -> Sizes:
    """A BERT's sizes by the names of its configuration."""
    return {
        "hidden_size": D,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": width,
        "vocab_size": vocab,
    }


BASE = sizes(768, layers=12, heads=12, width=3072, vocab=30522)  # BERT-base, as in Fig. 4
TWO_LAYERS = sizes(768, layers=2, heads=12, width=3072, vocab=8192)
TINY = sizes(32, layers=2, heads=4, width=64, vocab=99)  # for tests
LIMIT, RELEASE = "equal FLOPs", "release style"
HASH, GATE = "moebert hash-random", "moebert gate-sentence"
FAST, HALF, COMPILED = ", accelerated", ", accelerated, bf16", ", compiled"


def inference(
    *,
    shape: Sizes = BASE,
    batch: int | None = None,
    length: int | None = None,
    repeats: int | None = None,
    device: str = "cpu",
) -> Benchmark:
    """``moebert bench inference``: full and GLUE-like batches, or one of ``batch`` x ``length``.

    Args:
        shape: BERT's sizes.
        batch: Sentences of a single setting; 1 if only the length is given.
        length: Tokens of each; 128 if only the batch is given.
        repeats: Timed rounds.
        device: "cpu", in float32 unless a variant says bf16; or "cuda", all in bfloat16.

    Raises:
        UserError: torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave it out to measure the CPU")
    name, batches = "inference", fig4_batches(shape["vocab_size"], device=device)
    if batch is not None or length is not None:
        n, T = batch or 1, length or 128
        name = "inference-one"
        batches = {f"{n} x {T}": zipf(shape["vocab_size"], n=n, length=T, device=device)}
    where = f"{torch.get_num_threads()} threads"
    options = {}
    if device == "cuda":
        name, where = f"{name}-cuda", torch.cuda.get_device_name()
        options["baseline"] = "dense" + COMPILED
        models = gpu_models(shape)
    else:
        models = cpu_models(shape)
        options["finish"] = partial(_roofline, models, batches)
    facts = {"shape": shape, "tokens": {setting: _tokens(x) for setting, x in batches.items()}}
    return forward_passes(
        models,
        batches,
        name=name,
        title=f"a forward pass, hidden size {shape['hidden_size']}, {where}",
        main=HASH + FAST,
        repeats=repeats,
        facts=facts,
        **options,
    )


def forward_passes(
    models: Mapping[str, nn.Module], batches: Mapping[Any, Inputs], **options: Any
) -> Benchmark:
    """Time a forward pass of all models with all batches.

    The gate as transformers runs it, slow and there for Fig. 4, is left out of large batches.

    Args:
        models: By variant.
        batches: By setting: ``input_ids`` and, for padded batches, ``attention_mask``.
        options: Of :class:`~moebert_lib.bench.harness.Benchmark`.
    """

    def calls(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
        chosen = [name for name in models if name != GATE or len(inputs["input_ids"]) <= 16]
        return {name: forward(models[name], inputs) for name in chosen}

    return Benchmark(
        settings={setting: partial(calls, inputs) for setting, inputs in batches.items()},
        limits=limits(models),
        check=check_logits,
        examples={setting: len(inputs["input_ids"]) for setting, inputs in batches.items()},
        **options,
    )


def limits(variants: Iterable[str]) -> dict[str, str]:
    """By MoE variant, the equal-FLOP model run by the same code."""
    moe = [name for name in variants if name.startswith("moebert") or name == RELEASE]
    return {name: LIMIT + name.removeprefix(_model(name)) for name in moe}


def forward(model: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    """A call that returns logits, without gradients."""

    @torch.inference_mode()
    def call() -> Tensor:
        return model(**inputs).logits

    return call


def _model(variant: str) -> str:
    """The model of a variant, without the code that runs it."""
    return variant.partition(", ")[0]


def check_logits(logits: Mapping[str, Tensor]) -> None:
    """Refuse logits of "X, ..." that differ from those of "X", and RELEASE's from HASH's.

    Raises:
        UserError: as :func:`~moebert_lib.bench.harness.check_equal`.
    """
    models = {name: HASH if name == RELEASE else _model(name) for name in logits}
    origins = {name: model for name, model in models.items() if name != model and model in logits}
    check_equal("logits", logits, origins, exact=1e-4, half=0.1)


def _roofline(
    models: Mapping[str, nn.Module],
    batches: Mapping[str, Inputs],
    _timings: pd.DataFrame,
    table: pd.DataFrame,
) -> dict[str, Any]:
    """Print how near the MoE can come to its limit, and return the roofline of all variants."""
    ceilings = roofline.measure_ceilings()
    pairs = zip(table["setting"], table["variant"], strict=True)
    works = {(s, v): roofline.work(models[v], batches[s]) for s, v in pairs}
    rows = roofline.table(table, works, ceilings)
    print(f"\n{ceilings}")
    moe = table[table["variant"] == HASH + FAST].set_index("setting")["of_limit"]
    for setting, reached in moe.items():
        print(roofline.explain(rows, setting, HASH + FAST, LIMIT + FAST, measured=reached))
    return {"ceilings": ceilings.record(), "roofline": as_json(rows)}


# Scaling: one size at a time is varied around 8 sentences of 64 tokens, two layers, 4 experts.


def scaling(*, shape: Sizes = TWO_LAYERS, repeats: int = 7) -> Benchmark:
    """``moebert bench scaling``: cost by experts, tokens, sentences, their length and layers."""
    works: dict[tuple[str, str], roofline.Work] = {}
    build = lru_cache(maxsize=1)(partial(scaling_models, shape))

    def calls(setting: str, changed: Sizes) -> dict[str, Callable[[], Tensor]]:
        n, length = changed.pop("n", 8), changed.pop("length", 64)
        inputs, models = zipf(shape["vocab_size"], n=n, length=length), build(**changed)
        works.update({(setting, v): roofline.work(m, inputs) for v, m in models.items()})
        return {variant: forward(model, inputs) for variant, model in models.items()}

    def finish(timings: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
        ceilings = roofline.measure_ceilings()
        rows = roofline.table(table, works, ceilings)
        table = _with_axis(table.merge(rows, on=["setting", "variant"]))
        fits = slopes(table)
        print(*fits.loc[fits["variant"] == HASH + FAST, "words"], sep="\n")
        tables = {"summary": table, "timings": _with_axis(timings), "slopes": fits}
        return {name: as_json(rows) for name, rows in tables.items()} | {
            "ceilings": ceilings.record()
        }

    points = scaling_points(shape["intermediate_size"])
    return Benchmark(
        name="scaling",
        title=f"hidden size {shape['hidden_size']}, {torch.get_num_threads()} threads",
        settings={setting: partial(calls, setting, changed) for setting, changed in points.items()},
        baseline="dense" + FAST,
        limits={HASH + FAST: LIMIT + FAST},
        repeats=repeats,
        facts={"shape": shape},
        finish=finish,
    )


def scaling_points(width: int) -> dict[str, Sizes]:
    """Sizes that differ from the usual ones, by "axis = value"; ``width`` is the dense FFN's."""
    axes: dict[str, dict[int, Sizes]] = {
        "experts": {N: {"n_experts": N} for N in (1, 2, 4, 8, 16, 32, 64)},
        "experts of one size": {
            N: {"n_experts": N, "expert_size": width // 4} for N in (1, 2, 4, 8, 16, 32, 64)
        },
        "tokens": {8 * n * n: {"n": n, "length": 8 * n} for n in (1, 2, 4, 8, 16)},
        "sentences": {n: {"n": n} for n in (1, 2, 4, 8, 16, 32)},
        "length": {T: {"length": T} for T in (16, 32, 64, 128, 256, 512)},
        "layers": {L: {"n_layers": L} for L in (1, 2, 3, 4, 6)},
    }
    return {
        f"{axis} = {value}": changed
        for axis, points in axes.items()
        for value, changed in points.items()
    }


def scaling_models(
    shape: Sizes, *, n_layers: int = 2, n_experts: int = 4, expert_size: int | None = None
) -> dict[str, nn.Module]:
    """The MoE of one point, dense BERT and the equal-FLOP limit, all accelerated."""
    shape = {**shape, "num_hidden_layers": n_layers}
    size = expert_size or shape["intermediate_size"] // n_experts
    built = {
        "dense": bert(shape),
        LIMIT: bert({**shape, "intermediate_size": size}),
        HASH: moebert(shape, n_experts=n_experts, expert_size=size),
    }
    return {name + FAST: accelerate(model) for name, model in built.items()}


def _with_axis(table: pd.DataFrame) -> pd.DataFrame:
    parts = table["setting"].str.partition(" = ")
    return table.assign(axis=parts[0], value=parts[2].astype(int))


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Exponents of the power laws by which time, operations and bytes grow along each axis.

    Args:
        table: Columns ``axis``, ``variant``, ``value``, ``median_ms``, ``flops``, ``bytes`` and
            ``in_turn_ms``.

    Returns:
        A row for each axis and variant with three values or more: ``exponent``, the least-squares
        slope of log time over log value, with its 95 % t interval ``low`` to ``high``; ``flops``,
        ``bytes`` and ``in_turn``, the slopes of these; and ``words``.
    """
    rows = []
    for (axis, variant), part in table.groupby(["axis", "variant"], sort=False):
        if len(part) < 3:
            continue
        logs = np.log(part[["value", "median_ms", "flops", "bytes", "in_turn_ms"]].astype(float))
        fit, *others = (stats.linregress(logs["value"], logs[name]) for name in logs.columns[1:])
        half = fit.stderr * stats.t.ppf(0.975, len(part) - 2)
        row = {"exponent": fit.slope, "low": fit.slope - half, "high": fit.slope + half}
        row |= {n: o.slope for n, o in zip(("flops", "bytes", "in_turn"), others, strict=True)}
        words = "{axis}, {variant}: time grows with the power {exponent:.2f} ({low:.2f} to "
        words += (
            "{high:.2f}), operations {flops:.2f}, bytes {bytes:.2f}, both in turn {in_turn:.2f}"
        )
        row |= {"axis": axis, "variant": variant}
        rows.append({**row, "words": words.format(**row)})
    return pd.DataFrame(rows)


# The models and batches that are timed.


def cpu_models(shape: Sizes) -> dict[str, nn.Module]:
    """Ordinary models, accelerated ones that share their parameters, and some in bfloat16."""
    built = models(shape)
    fast = {name + FAST: accelerate(built[name]) for name in ("dense", LIMIT, HASH, GATE)}
    half = {"dense, bf16": copy.deepcopy(built["dense"]).bfloat16()}
    for name in ("dense", LIMIT, HASH):
        half[name + HALF] = accelerate(built[name], dtype=torch.bfloat16)
    return {**built, **fast, **half}


def gpu_models(
    shape: Sizes, *, device: str = "cuda", compiler: Callable[..., nn.Module] = torch.compile
) -> dict[str, nn.Module]:
    """Models in bfloat16: ordinary, compiled and accelerated; experts in one grouped product."""
    torch._dynamo.config.recompile_limit = 64  # each setting has shapes of its own
    built = models(shape, only=("dense", LIMIT, RELEASE, HASH))
    built = {name: model.to(device, torch.bfloat16) for name, model in built.items()}
    built[HASH].set_experts_implementation("grouped_mm")
    compiled = {name + COMPILED: compiler(built[name], dynamic=False) for name in ("dense", LIMIT)}
    fast = {name + FAST: accelerate(built[name]) for name in ("dense", LIMIT, HASH)}
    return {**built, **compiled, **fast}


def models(shape: Sizes, *, only: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """The models of Fig. 4 in eval mode, by name: those of ``only``, or all.

    ``dense`` is BERT; ``half depth`` is DistilBERT, half of the layers; ``equal FLOPs`` is BERT
    with an FFN as narrow as one expert, the limit of any router; the ``moebert`` ones have 4
    experts of a quarter; ``release style`` computes the hash-routed one as the paper's code does.
    """
    torch.manual_seed(0)
    makers = {
        "dense": partial(bert, shape),
        LIMIT: partial(bert, {**shape, "intermediate_size": shape["intermediate_size"] // 4}),
        "half depth": partial(distilbert, shape),
        HASH: partial(moebert, shape),
        GATE: partial(moebert, shape, routing="gate-sentence"),
    }
    built = {name: make() for name, make in makers.items() if not only or name in only}
    if not only or RELEASE in only:
        built[RELEASE] = reference_release(built.get(HASH) or moebert(shape))
    return built


def bert(shape: Sizes) -> nn.Module:
    """A BERT with random weights."""
    return _varied(BertForSequenceClassification(BertConfig(**shape)))


def distilbert(shape: Sizes) -> nn.Module:
    """A DistilBERT with random weights and half of the layers."""
    config = DistilBertConfig(
        vocab_size=shape["vocab_size"],
        dim=shape["hidden_size"],
        n_layers=max(shape["num_hidden_layers"] // 2, 1),
        n_heads=shape["num_attention_heads"],
        hidden_dim=shape["intermediate_size"],
    )
    return _varied(DistilBertForSequenceClassification(config))


def moebert(
    shape: Sizes, *, routing: str = "hash-random", n_experts: int = 4, expert_size: int = 0
) -> MoEBertForSequenceClassification:
    """A MoEBERT with random weights and, in each layer, a random hash table or a gate."""
    size = expert_size or shape["intermediate_size"] // n_experts
    experts = {"n_experts": n_experts, "expert_size": size, "n_shared": 0, "routing": routing}
    model = MoEBertForSequenceClassification(MoEBertConfig(**shape, **experts))
    if routing == "hash-random":
        for index, layer in enumerate(moe_layers(model)):
            table = random_table(shape["vocab_size"], n_experts, seed=index)
            layer.router.tid2eid.copy_(table.view(-1, 1))
    return _varied(model)


@torch.no_grad()
def _varied(model: nn.Module) -> nn.Module:
    """In eval mode, with LayerNorms and biases that differ: otherwise a mix-up would not show."""
    for name, values in model.named_parameters():
        if values.dim() == 1 or "LayerNorm" in name or "bias" in name:
            values.add_(0.1 * torch.randn_like(values))
    return model.eval()


class ReferenceFFN(MoEOutput):
    """A reference implementation of the paper's released layer, to compare speed with.

    It sorts the padded batch by expert, splits it, calls one expert after the other with its
    LayerNorm, and sorts the results back. Hash routing only.
    """

    def forward(self, attention_output: Tensor, call: RoutingCall) -> Tensor:
        """``(B, T, D)`` to the layer's output of the same shape."""
        route = self.router(attention_output, call.input_ids, call.mask)
        chosen = route.experts[:, 0]
        order = chosen.argsort(0)
        counts = F.one_hot(chosen, self.experts.num_experts).sum(0).tolist()
        parts = attention_output.flatten(0, 1)[order].split(counts)
        norms = self.LayerNorm.weight.unbind(0), self.LayerNorm.bias.unbind(0)
        outputs = []
        for x, w1, b1, w2, b2, *norm in zip(parts, *self.experts.unbound(), *norms, strict=True):
            y = F.linear(self.experts.act_fn(F.linear(x, w1, b1)), w2, b2)
            outputs.append(
                F.layer_norm(self.dropout(y) + x, x.shape[1:], *norm, self.LayerNorm.eps)
            )
        return torch.vstack(outputs)[order.argsort(0)].view_as(attention_output)


def reference_release(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a hash-routed MoEBERT that computes its layers as the paper's code does.

    Raises:
        ValueError: the model has no experts, a gate, or one LayerNorm for all experts.
    """
    layers = moe_layers(model)
    if not layers or any(layer.gated or not layer.per_expert for layer in layers):
        raise ValueError(f"expected a MoEBERT with hash routing, not {type(model).__name__}")
    model = copy.deepcopy(model)
    for layer in moe_layers(model):
        layer.__class__ = ReferenceFFN
    return model


def fig4_batches(vocab: int, *, device: str = "cpu", scale: int = 1) -> dict[str, Inputs]:
    """Full batches, a GLUE-like one and a single sentence (Fig. 4); large ones for a GPU.

    Args:
        vocab: Number of token ids.
        device: "cpu" or "cuda".
        scale: Divides sentences and lengths; for tests.
    """
    full = (
        [(32, 128), (1, 64), (1, 128)] if device == "cpu" else [(n, 128) for n in (1, 32, 128, 512)]
    )
    made = {
        f"{n} x {T}": zipf(vocab, n=max(n // scale, 1), length=T // scale, device=device)
        for n, T in full
    }
    return made | {
        "GLUE-like": glue_like(vocab, n=32 // scale, longest=128 // scale, device=device)
    }


def zipf(vocab: int, *, n: int, length: int, device: str = "cpu") -> Inputs:
    """``n`` sentences of ``length`` tokens, as unevenly frequent as words: ``input_ids``.

    The frequency of the r-th token is proportional to 1/r (Zipf's law); token 0 is padding.
    """
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, vocab, dtype=torch.float64)
    ids = torch.multinomial(frequencies, n * length, replacement=True, generator=generator)
    return {"input_ids": 1 + ids.view(n, length).to(device)}


def glue_like(vocab: int, *, n: int = 32, longest: int = 128, device: str = "cpu") -> Inputs:
    """A batch padded as GLUE's are: ``input_ids`` and ``attention_mask``, ``(n, longest)``.

    Lengths are evenly spaced quantiles of a log-normal distribution; 32 sentences of at most 128
    tokens have 40 on average.
    """
    spread, steps = 0.635, stats.norm.ppf((np.arange(n) + 0.5) / n)
    lengths = np.round(longest * np.exp(spread * (steps - steps[-1]))).clip(min=3)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(longest) < torch.tensor(lengths)[order, None]).long().to(device)
    ids = zipf(vocab, n=n, length=longest, device=device)["input_ids"]
    return {"input_ids": ids * mask, "attention_mask": mask}


def _tokens(inputs: Inputs) -> int:
    """Tokens of a batch without padding."""
    return int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum())
