"""What a machine allows: operations and bytes of a forward pass against two measured ceilings.

No call is faster than its operations at the machine's best rate, nor than its bytes at the
memory's. Operations: per token and layer ``4D^2 + 2TD`` multiplications of attention and ``2DK``
of a feed-forward layer (notebook 07), two operations each. Bytes: every weight that is used
once, and every intermediate result written once and read once; a cache may spare some of the
latter, biases and embeddings are left out.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from moebert_lib.bench.harness import time_interleaved, zipf
from moebert_lib.data.batching import Packing
from moebert_lib.method.routing import HashRouter
from moebert_lib.model.accelerate import PackedBert
from moebert_lib.model.cpu_kernels import Kernels, PreparedLayer


@dataclass(frozen=True)
class Ceilings:
    """Best rates of this machine, with the threads torch has.

    Attributes:
        float32: Of a large matrix product, operations a second.
        bfloat16: The same in bfloat16.
        bandwidth: Of memory, bytes a second.
    """

    float32: float
    bfloat16: float
    bandwidth: float

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second in this dtype."""
        return self.bfloat16 if dtype == torch.bfloat16 else self.float32

    record = asdict


@dataclass(frozen=True)
class Work:
    """What one call does: operations, bytes that move, and the dtype of both."""

    flops: int
    bytes: int
    dtype: torch.dtype = torch.float32


def ceilings(*, size: int = 2048, megabytes: int = 256, seconds: float = 0.4) -> Ceilings:
    """Measure the ceilings: the best of many tries, about two seconds in all.

    Args:
        size: Of square matrices.
        megabytes: Of the buffer that is read and copied: many times a processor's cache.
        seconds: For each of five measurements.
    """
    numbers = torch.rand(megabytes * 2**20 // 4)
    copy = torch.empty_like(numbers)
    moved = {2 * numbers.nbytes: lambda: copy.copy_(numbers), numbers.nbytes: numbers.sum}
    return Ceilings(
        float32=max(
            _gemm(size, torch.float32, packed=packed, seconds=seconds) for packed in (False, True)
        ),
        bfloat16=_gemm(size, torch.bfloat16, packed=True, seconds=seconds),
        bandwidth=max(n / _best(call, seconds) for n, call in moved.items()),
    )


@torch.inference_mode()
def _gemm(size: int, dtype: torch.dtype, *, packed: bool, seconds: float) -> float:
    x = torch.rand(size, size, dtype=dtype)
    linear = Kernels(dtype=dtype, prepack=packed).layers(nn.Linear(size, size, dtype=dtype))
    return 2 * size**3 / _best(lambda: linear(x), seconds)


def _best(call: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest of all calls that fit in a time, at least two."""
    call()
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def layer_work(
    D: int,
    K: int,
    lengths: Sequence[int],
    *,
    touched: int = 1,
    first: bool = False,
    gated: bool = False,
    item: int = 4,
) -> tuple[int, int]:
    """Operations and bytes of one layer.

    Args:
        D: Hidden size.
        K: Neurons that a token uses: the FFN's width, or one expert's.
        lengths: Tokens of each sentence, padding included where it is computed.
        touched: Experts that serve any token; their weights are read.
        first: Only first tokens are wanted of it; others give keys and values alone.
        gated: A gate looks at all tokens, so that attention cannot leave any out.
        item: Bytes of a number.
    """
    N, B = sum(lengths), len(lengths)
    asking = B if first and not gated else N  # tokens with queries
    served = B if first else N
    pairs = sum(lengths) if asking == B and first else sum(T * T for T in lengths)
    products = 2 * N * D * D + 2 * asking * D * D + 2 * pairs * D + 2 * served * D * K
    weights = 4 * D * D + 2 * D * K * touched
    between = 2 * N * D + asking * (2 * D + 2 * D) + served * (K + 2 * D)
    return 2 * products, item * (weights + 2 * between)


def work(model: nn.Module, inputs: Mapping[str, Tensor]) -> Work:
    """What a forward pass of a model of :mod:`bench_models`, accelerated or not, has to do.

    A sentence gate is taken to touch one expert for each sentence, or all.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    base, config = model.base_model, model.config
    packed = isinstance(base, PackedBert)
    lengths = [ids.shape[1]] * len(ids)
    if packed and mask is not None:
        lengths = mask.sum(1).tolist()
    dtype = packed and base.kernels.dtype or model.dtype
    D, n_layers = config.hidden_size, config.num_hidden_layers
    routers = [module.router for module in model.modules() if hasattr(module, "router")]
    K = config.expert_size if routers else getattr(config, "intermediate_size", None)
    K = K or config.hidden_dim  # DistilBERT's name for it
    flops, moved = 0, 0
    for index in range(n_layers):
        first = packed and index == n_layers - 1
        router = routers[index] if routers else None
        gated = router is not None and not isinstance(router, HashRouter)
        served = ids[:, :1] if first and not gated else ids
        real = None if mask is None or not packed else mask[:, : served.shape[1]]
        more = layer_work(
            D,
            K,
            lengths,
            touched=_touched(router, served, real),
            first=first,
            gated=gated,
            item=dtype.itemsize,
        )
        flops, moved = flops + more[0], moved + more[1]
    head = D * D + D * config.num_labels
    return Work(flops + 2 * len(ids) * head, moved + head * model.dtype.itemsize, dtype)


def _touched(router: nn.Module | None, ids: Tensor, mask: Tensor | None) -> int:
    if router is None:
        return 1
    if isinstance(router, HashRouter):
        served = ids if mask is None else ids[mask.bool()]
        return len(router.tid2eid[served].unique())
    return min(router.gate.out_features, len(ids))


def table(
    summary: pd.DataFrame, works: Mapping[tuple[str, str], Work], ceiling: Ceilings
) -> pd.DataFrame:
    """Each call that was timed beside what the machine allows.

    Args:
        summary: Columns ``setting``, ``variant``, ``median_ms``.
        works: What each setting and variant has to do.
        ceiling: Of the machine that it was timed on.

    Returns:
        ``setting``, ``variant``, ``flops``, ``bytes``, ``intensity`` (operations a byte),
        ``attainable`` and ``achieved`` (operations a second), ``share`` of the attainable,
        ``bound`` ("compute" or "memory"), ``least_ms`` where memory and arithmetic overlap, and
        ``in_turn_ms`` where one waits for the other.
    """
    rows = []
    for row in summary.itertuples():
        done = works[row.setting, row.variant]
        rate = ceiling.rate(done.dtype)
        intensity = done.flops / done.bytes
        attainable = min(rate, intensity * ceiling.bandwidth)
        achieved = done.flops / (row.median_ms / 1000)
        compute, memory = done.flops / rate, done.bytes / ceiling.bandwidth
        rows.append(
            {
                "setting": row.setting,
                "variant": row.variant,
                "flops": done.flops,
                "bytes": done.bytes,
                "intensity": intensity,
                "attainable": attainable,
                "achieved": achieved,
                "share": achieved / attainable,
                "bound": "compute" if compute >= memory else "memory",
                "least_ms": 1000 * max(compute, memory),
                "in_turn_ms": 1000 * (compute + memory),
            }
        )
    return pd.DataFrame(rows)


def why(rows: pd.DataFrame, setting: str, variant: str, limit: str, *, measured: float) -> str:
    """One sentence: how near a variant can come to its limit's speed, and how near it came.

    Args:
        rows: From :func:`table`.
        setting: Of both.
        variant: A MoE.
        limit: Dense, with as many operations.
        measured: Its speed over the limit's, as timed.
    """
    found = rows[rows["setting"] == setting].set_index("variant")
    own, other = found.loc[variant], found.loc[limit]
    best, in_turn = other["least_ms"] / own["least_ms"], other["in_turn_ms"] / own["in_turn_ms"]
    return (
        f"{setting}: {variant} computes {own['flops'] / other['flops']:.2f} times as much as "
        f"{limit} and moves {own['bytes'] / other['bytes']:.2f} times the bytes, since the "
        f"weights of every expert in use are read. Its speed could be {best:.2f} of the "
        f"limit's if reading hides behind computing, {in_turn:.2f} if one waits for the other; "
        f"it is {measured:.2f}."
    )


def points(
    built: Mapping[str, nn.Module],
    *,
    tokens: Sequence[int] = (16, 64, 256, 1024),
    repeats: int = 5,
) -> pd.DataFrame:
    """Time the feed-forward layers of models alone, one after the other as in a pass.

    All run through the same kernels. With few tokens each weight that is read serves few of
    them, and of four experts each serves a quarter of those.

    Args:
        built: Models of :mod:`bench_models`, dense or MoEBERT with a hash, not accelerated.
        tokens: How many go through at once.
        repeats: Timed rounds.

    Returns:
        Columns ``variant``, ``tokens``, ``repeat``, ``seconds``, ``flops`` and ``bytes`` of all
        layers: each weight in use read once, each state written once and read once.
    """
    frames, ready = [], {name: _prepared(model) for name, model in built.items()}
    for n in tokens:
        calls, works = {}, {}
        for name, model in built.items():
            ids = zipf(model.config.vocab_size, n=1, length=n)["input_ids"][0]
            calls[name] = _ffn(model, ids, ready[name])
            works[name] = _ffn_work(model, ids)
        timings = time_interleaved(calls, repeats=repeats).assign(tokens=n)
        for column, of in (("flops", 0), ("bytes", 1)):
            timings[column] = [works[name][of] for name in timings["variant"]]
        frames.append(timings)
    return pd.concat(frames, ignore_index=True)


def _prepared(model: nn.Module) -> list[PreparedLayer]:
    return [PreparedLayer(layer, Kernels()) for layer in model.base_model.encoder.layer]


def _ffn(model: nn.Module, ids: Tensor, layers: list[PreparedLayer]) -> Callable[[], Tensor]:
    packing = Packing.of(torch.ones(1, len(ids)))
    states = torch.rand(len(ids), model.config.hidden_size, dtype=model.dtype)

    @torch.inference_mode()
    def call() -> Tensor:
        x = states
        for layer in layers:
            x = layer.feed_forward(x, ids, packing)
        return x

    return call


def _ffn_work(model: nn.Module, ids: Tensor) -> tuple[int, int]:
    config, n = model.config, len(ids)
    D, K = config.hidden_size, getattr(config, "expert_size", config.intermediate_size)
    flops, moved = 0, 0
    for layer in model.base_model.encoder.layer:
        touched = _touched(getattr(layer.output, "router", None), ids, None)
        flops += 2 * n * 2 * D * K
        moved += model.dtype.itemsize * (2 * D * K * touched + 2 * n * (K + 2 * D))
    return flops, moved
