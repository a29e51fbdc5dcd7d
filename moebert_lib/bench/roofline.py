"""Operations and bytes of a forward pass, beside the measured ceilings of this machine (roofline).

No call is faster than its operations at the best rate of arithmetic, or than its bytes at the best
rate of memory. Per token and layer there are ``4D^2 + 2TD`` multiplications of attention and
``2DK`` of a feed-forward layer, two operations each. Bytes: every weight in use, read once, and
every intermediate result, written once and read once; biases and embeddings are left out.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from moebert_lib.bench.harness import time_interleaved
from moebert_lib.data.batching import Packing
from moebert_lib.method.encoder_layouts import FAMILIES
from moebert_lib.method.routing import HashRouter
from moebert_lib.model.accelerate import PackedEncoder
from moebert_lib.model.cpu_kernels import Kernels, PreparedLayer
from moebert_lib.model.moe_layer import RoutingCall


@dataclass(frozen=True)
class Ceilings:
    """Best rates of this machine with the threads that torch has.

    Attributes:
        float32: Operations a second of a large matrix product.
        bfloat16: The same in bfloat16.
        bandwidth: Bytes a second of memory.
    """

    float32: float
    bfloat16: float
    bandwidth: float

    record = asdict

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second in this dtype."""
        return self.bfloat16 if dtype == torch.bfloat16 else self.float32

    def __str__(self) -> str:
        return (
            f"this machine: {self.float32 / 1e9:,.0f} GFLOP/s in float32, "
            f"{self.bfloat16 / 1e9:,.0f} in bfloat16, {self.bandwidth / 1e9:,.1f} GB/s of memory"
        )


def measure_ceilings(*, size: int = 2048, megabytes: int = 256, seconds: float = 0.4) -> Ceilings:
    """Measure the ceilings: the best of many tries, two seconds in all.

    Args:
        size: Rows and columns of the matrices.
        megabytes: Size of the buffer that is read and copied; many times the cache.
        seconds: For each of five measurements.
    """

    @torch.inference_mode()
    def product(dtype: torch.dtype, prepack: bool) -> float:
        x, layer = torch.rand(size, size, dtype=dtype), nn.Linear(size, size, dtype=dtype)
        linear = Kernels(dtype=dtype, prepack=prepack).layers(layer)
        return 2 * size**3 / _fastest(lambda: linear(x), seconds)

    numbers = torch.rand(megabytes * 2**20 // 4)
    target = torch.empty_like(numbers)
    copied = 2 * numbers.nbytes / _fastest(lambda: target.copy_(numbers), seconds)
    return Ceilings(
        float32=max(product(torch.float32, prepack) for prepack in (False, True)),
        bfloat16=product(torch.bfloat16, True),
        bandwidth=max(copied, numbers.nbytes / _fastest(numbers.sum, seconds)),
    )


def _fastest(call: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest of all calls that fit in the time, at least two."""
    call()
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


@dataclass(frozen=True)
class Work:
    """Operations of a call, bytes that it moves, and the dtype of both."""

    flops: int
    bytes: int
    dtype: torch.dtype = torch.float32


def ffn_work(D: int, K: int, tokens: int, *, experts: int = 1) -> tuple[int, int]:
    """Operations of a feed-forward layer, and numbers read or written.

    Args:
        D: Hidden size.
        K: Neurons that a token uses, the FFN's width or one expert's.
        tokens: Number of tokens.
        experts: Experts that any token visits; their weights are read.
    """
    return 4 * tokens * D * K, 2 * D * K * experts + 2 * tokens * (K + 2 * D)


def attention_work(D: int, lengths: Sequence[int], *, queries: Sequence[int]) -> tuple[int, int]:
    """Operations of attention, and numbers read or written.

    Args:
        D: Hidden size.
        lengths: Tokens of each sentence, padding included where it is computed.
        queries: Tokens of each sentence that look at the others.
    """
    N, asking = sum(lengths), sum(queries)
    pairs = sum(q * T for q, T in zip(queries, lengths, strict=True))
    products = 2 * N * D * D + 2 * asking * D * D + 2 * pairs * D
    return 2 * products, 4 * D * D + 2 * (2 * N * D + 4 * asking * D)


def work(model: nn.Module, inputs: Mapping[str, Tensor]) -> Work:
    """Count a forward pass of a BERT, DistilBERT or MoEBERT, accelerated or not.

    An accelerated model computes no padding, and its last layer for first tokens alone. A sentence
    gate is assumed to send each sentence to another expert.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    base, config = model.base_model, model.config
    packed = isinstance(base, PackedEncoder)
    if not packed or mask is None:
        mask = torch.ones_like(ids)
    lengths = mask.sum(1).tolist()
    dtype = (packed and base.kernels.dtype) or model.dtype
    D, K = config.hidden_size, _width(config)
    parts = []
    for index, router in enumerate(_routers(model)):
        first = packed and index == config.num_hidden_layers - 1
        gated = router is not None and not isinstance(router, HashRouter)
        columns = slice(1) if first and not gated else slice(None)
        experts = _visited(router, ids[:, columns], mask[:, columns])
        queries = [1] * len(ids) if first and not gated else lengths
        tokens = len(ids) if first else sum(lengths)
        parts.append(attention_work(D, lengths, queries=queries))
        parts.append(ffn_work(D, K, tokens, experts=experts))
    flops, numbers = map(sum, zip(*parts, strict=True))
    head = D * D + D * config.num_labels
    moved = numbers * dtype.itemsize + head * model.dtype.itemsize
    return Work(flops + 2 * len(ids) * head, moved, dtype)


def _width(config: Any) -> int:
    """Neurons that a token uses; DistilBERT has a name of its own for them."""
    names = ("expert_size", "intermediate_size", "hidden_dim")
    return next(getattr(config, name) for name in names if hasattr(config, name))


def _routers(model: nn.Module) -> list[nn.Module | None]:
    """The router of each layer; None in a dense model."""
    routers = [module.router for module in model.modules() if hasattr(module, "router")]
    return routers or [None] * model.config.num_hidden_layers


def _visited(router: nn.Module | None, ids: Tensor, mask: Tensor) -> int:
    """Experts that any token visits."""
    if router is None:
        return 1
    if isinstance(router, HashRouter):
        return len(router.tid2eid[ids[mask.bool()]].unique())
    return min(router.gate.out_features, len(ids))


def table(
    summary: pd.DataFrame, works: Mapping[tuple[Any, str], Work], ceilings: Ceilings
) -> pd.DataFrame:
    """Each timed variant beside what the machine allows.

    Args:
        summary: Columns ``setting``, ``variant``, ``median_ms``.
        works: Work of each setting and variant.
        ceilings: Of the machine that it was timed on.

    Returns:
        ``setting``, ``variant``, ``flops``, ``bytes``, ``intensity`` (operations a byte),
        ``attainable`` and ``achieved`` (operations a second), ``share`` of the attainable,
        ``bound`` ("compute" or "memory"), ``least_ms`` if memory and arithmetic overlap, and
        ``in_turn_ms`` if one waits for the other.
    """
    rows = summary[["setting", "variant"]].copy()
    counted = [works[pair] for pair in rows.itertuples(index=False, name=None)]
    rows["flops"] = [each.flops for each in counted]
    rows["bytes"] = [each.bytes for each in counted]
    rows["intensity"] = rows["flops"] / rows["bytes"]
    compute = rows["flops"] / [ceilings.rate(each.dtype) for each in counted]
    memory = rows["bytes"] / ceilings.bandwidth
    least = np.maximum(compute, memory)
    rows["attainable"] = rows["flops"] / least
    rows["achieved"] = rows["flops"] / (summary["median_ms"] / 1000)
    rows["share"] = rows["achieved"] / rows["attainable"]
    rows["bound"] = np.where(compute >= memory, "compute", "memory")
    return rows.assign(least_ms=1000 * least, in_turn_ms=1000 * (compute + memory))


def explain(rows: pd.DataFrame, setting: Any, variant: str, limit: str, *, measured: float) -> str:
    """Say how near a MoE can come to the speed of its limit, and how near it came.

    Args:
        rows: From :func:`table`.
        setting: Of both variants.
        variant: The MoE.
        limit: A dense model with as many operations.
        measured: Its speed over the limit's, as timed.
    """
    part = rows[rows["setting"] == setting].set_index("variant")
    moe, dense = part.loc[variant], part.loc[limit]
    best, in_turn = (dense[name] / moe[name] for name in ("least_ms", "in_turn_ms"))
    return (
        f"{setting}: {variant} computes {moe['flops'] / dense['flops']:.2f} times as much as "
        f"{limit} and moves {moe['bytes'] / dense['bytes']:.2f} times the bytes, since the "
        f"weights of every expert in use are read. It can reach {best:.2f} of the limit's speed "
        f"if reading overlaps with computing, {in_turn:.2f} if one waits for the other; it "
        f"reaches {measured:.2f}."
    )


def time_feed_forward(
    models: Mapping[str, nn.Module], ids: Sequence[Tensor], *, repeats: int = 5
) -> pd.DataFrame:
    """Time the feed-forward layers of models alone, one after the other, in the same kernels.

    Args:
        models: BERTs, or MoEBERTs with a hash, not accelerated; by variant.
        ids: Token ids ``(n,)`` to send through at once; each is a setting.
        repeats: Timed rounds.

    Returns:
        Columns ``variant``, ``repeat``, ``seconds``, ``tokens``, and ``flops`` and ``bytes`` of
        all layers.
    """
    frames = []
    for tokens in ids:
        calls = {name: _feed_forward(model, tokens) for name, model in models.items()}
        timings = time_interleaved(calls, repeats=repeats).assign(tokens=len(tokens))
        works = {name: _layers_work(model, tokens) for name, model in models.items()}
        timings["flops"] = [works[name].flops for name in timings["variant"]]
        timings["bytes"] = [works[name].bytes for name in timings["variant"]]
        frames.append(timings)
    return pd.concat(frames, ignore_index=True)


def _feed_forward(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    family, stack = FAMILIES["bert"], model.base_model.encoder.layer
    layers = [PreparedLayer(layer, family, Kernels()) for layer in stack]
    routing = RoutingCall(ids[None], Packing.of(torch.ones(1, len(ids))))
    states = torch.rand(len(ids), model.config.hidden_size, dtype=model.dtype)

    @torch.inference_mode()
    def call() -> Tensor:
        x = states
        for layer in layers:
            x = layer.feed_forward(x, routing)
        return x

    return call


def _layers_work(model: nn.Module, ids: Tensor) -> Work:
    D, K, everywhere = model.config.hidden_size, _width(model.config), torch.ones_like(ids)
    visited = [_visited(router, ids, everywhere) for router in _routers(model)]
    parts = [ffn_work(D, K, len(ids), experts=experts) for experts in visited]
    flops, numbers = map(sum, zip(*parts, strict=True))
    return Work(flops, numbers * model.dtype.itemsize, model.dtype)
