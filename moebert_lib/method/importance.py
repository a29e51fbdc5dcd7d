"""Importance of every feed-forward neuron (Eq. 4), exact per example, from one backward a batch.

Eq. 4 sums ``|w1_j . dL/dw1_j + w2_j . dL/dw2_j|`` over examples, where ``w1_j`` is column ``j``
of W1 and ``w2_j`` is row ``j`` of W2. Gradients of weights are sums over a whole batch, so they
do not give single examples. But both products can be written with the pre-activation ``a``, the
activation ``h`` and their gradients, which keep examples apart: :func:`example_importance`.

All parameters are frozen, so nothing below the first layer's ``a`` is differentiated. As in the
paper (Sec. 3.1, footnotes), biases are not scored. Works with any model of a family in
``encoder_layouts``. A model made by ``accelerate`` computes no padding, and is asked how to sum
over the tokens of an example.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from moebert_lib.config.file_io import write_bytes
from moebert_lib.method.encoder_layouts import FFN, ffns, supported

N_BLOCKS = 20  # examples are spread over this many block sums, for intervals


def over_tokens(values: Tensor) -> Tensor:
    """Sum over each example's tokens: ``(B, T, F)`` to ``(B, F)``."""
    return values.sum(1)


def example_importance(
    a: Tensor,
    h: Tensor,
    b1: Tensor,
    grad_a: Tensor,
    grad_h: Tensor,
    sum_tokens: Callable[[Tensor], Tensor] = over_tokens,
) -> Tensor:
    """How much each example's loss would change without each neuron: a term of Eq. 4's sum.

    ``w1_j . dL/dw1_j = sum_t (a_tj - b1_j) dL/da_tj``, since ``a_tj - b1_j = a_t . w1_j``, and
    ``w2_j . dL/dw2_j = sum_t h_tj dL/dh_tj``.

    Args:
        a: Pre-activations ``A W1 + b1`` of Eq. 1, ``(B, T, F)``.
        h: Activations ``H = act(a)``, ``(B, T, F)``.
        b1: Bias of W1, ``(F,)``.
        grad_a: ``dL/da``, ``(B, T, F)``, of the loss summed over examples.
        grad_h: ``dL/dh``, ``(B, T, F)``.
        sum_tokens: From ``(B, T, F)`` to ``(B, F)``; another one where tokens lie otherwise.

    Returns:
        ``|w1 . dL/dw1 + w2 . dL/dw2|`` of each example and neuron, ``(B, F)``.

    Source: Eq. 4.
    """
    w1_term = sum_tokens((a - b1) * grad_a)  # (B, F), w1 . dL/dw1
    w2_term = sum_tokens(h * grad_h)  # (B, F), w2 . dL/dw2
    return (w1_term + w2_term).abs()


@dataclass(frozen=True, repr=False)
class Importance:
    """Scores of every feed-forward neuron, and what is needed to judge their sampling error.

    Attributes:
        scores: Eq. 4, or a score of ``other_scores``, over all examples: ``(L, F)``, float64.
        blocks: The same over ``M`` disjoint sets of examples, ``(M, L, F)``; they add up to
            ``scores``. ``M = 0`` where they are unknown, as in the release's files.
        counts: Examples in each block, ``(M,)``, int64.
        meta: Where it came from, as JSON values: task, split, model, digests; ``ffn`` is
            :func:`ffn_digest` of the model that was scored.
    """

    scores: Tensor
    blocks: Tensor
    counts: Tensor
    meta: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        layers, width = self.scores.shape
        examples = "examples unknown" if self.n_examples is None else f"{self.n_examples} examples"
        task = f", task {self.meta['task']!r}" if "task" in self.meta else ""
        return f"Importance({layers} layers of {width} neurons, {examples}{task})"

    @property
    def n_examples(self) -> int | None:
        """Examples scored; ``None`` where unknown."""
        return int(self.counts.sum()) if len(self.counts) else None

    @property
    def ranking(self) -> Tensor:
        """Neurons of each layer, most important first. Shape ``(L, F)``, int64."""
        return self.scores.argsort(dim=-1, descending=True, stable=True)

    def mass(self, top: int) -> Tensor:
        """Share of each layer's total score that its ``top`` neurons hold. Shape ``(L,)``."""
        sorted_scores = self.scores.sort(dim=-1, descending=True).values
        return sorted_scores[:, :top].sum(-1) / sorted_scores.sum(-1)

    def bootstrap(self, n: int, *, seed: int = 0) -> Tensor:
        """Scores of ``n`` resamples of the blocks with replacement. Shape ``(n, L, F)``.

        Raises:
            ValueError: there are no blocks.
        """
        generator = torch.Generator().manual_seed(seed)
        M = self._n_blocks()
        drawn = torch.randint(M, (n, M), generator=generator)
        weights = torch.zeros(n, M, dtype=self.blocks.dtype)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=weights.dtype))
        return torch.einsum("nm,mlf->nlf", weights, self.blocks)

    def pairs(self, size: int, n: int, *, seed: int = 0) -> Tensor:
        """Scores of two sets of ``size`` blocks without a common example, ``(n, 2, L, F)``.

        Raises:
            ValueError: two sets of that size are more blocks than there are.
        """
        M = self._n_blocks()
        if not 1 <= size <= M // 2:
            raise ValueError(f"size={size} must lie in 1..{M // 2}, half of the {M} blocks")
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(n, M, generator=generator).argsort(-1)[:, : 2 * size]
        return self.blocks[drawn.view(n, 2, size)].sum(2)

    def _n_blocks(self) -> int:
        if not len(self.blocks):
            raise ValueError(
                "these scores are sums only, without blocks of examples; what other "
                "examples would change cannot be known"
            )
        return len(self.blocks)

    def save(self, path: str | Path) -> None:
        """Write safetensors with ``meta`` as JSON in the header; replaces atomically."""
        parts = {name: getattr(self, name).contiguous() for name in ("scores", "blocks", "counts")}
        meta = {"moebert_importance": json.dumps(self.meta, sort_keys=True)}
        write_bytes(Path(path), save(parts, metadata=meta))

    @classmethod
    def load(cls, path: str | Path) -> "Importance":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no importance file.
        """
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads(file.metadata()["moebert_importance"])
                return cls(*map(file.get_tensor, ("scores", "blocks", "counts")), meta)
        except Exception as error:
            raise ValueError(f"{path} is not an importance file: {error}") from None


def ffn_importance(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    meta: dict | None = None,
    dtype: torch.dtype | None = None,
) -> Importance:
    """Score every feed-forward neuron of a fine-tuned encoder by Eq. 4: ``(L, F)``, on the CPU.

    Exact for each example, although batches are processed whole; memory does not grow with the
    number of batches. The model is used in eval mode (no dropout) and given back as it was,
    without gradients.

    Args:
        model: Of a family in ``encoder_layouts``, with a head whose forward returns the mean
            ``loss``. ``accelerate(model)`` is scored without its padding, which is faster; the
            ``ffn_importance`` of ``moebert_lib`` itself does that.
        batches: Dictionaries of model inputs with ``labels``, or with ``start_positions`` and
            ``end_positions`` inside the input; on the model's device. ``index`` is ignored.
        meta: Stored with the result, beside the digest of the scored weights.
        dtype: ``torch.bfloat16`` is faster and moves ranks a little: ``moebert bench
            importance`` says how much. By default the model's own, which is exact.

    Raises:
        TypeError: a single batch instead of a list of batches.
        ValueError: no batch, a batch without targets, an unknown family, another ``dtype``.

    Source: Eq. 4; derivation in this module's header.
    """
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: expected None, the model's own, or torch.bfloat16")

    def scores(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return score_batch(model, batch, {"importance": of_eq4}, dtype=dtype)

    with frozen(model):
        return sum_over_examples(model, batches, scores, meta=meta)["importance"]


def sum_over_examples(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    scores: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    *,
    meta: dict | None = None,
) -> dict[str, Importance]:
    """Scores that are sums over examples, by name; errors as :func:`ffn_importance`.

    Args:
        model: As for :func:`ffn_importance`, and :func:`frozen`.
        batches: As there.
        scores: From a batch to the scores of its examples, ``(L, B, F)`` each.
        meta: As there.
    """
    if isinstance(batches, Mapping):
        raise TypeError("scores take a list of batches, and this is one: pass [batch]")
    scored_ffns(model)
    blocks, counts = {}, torch.zeros(N_BLOCKS).long()
    for batch in batches:
        for name, of_batch in scores(batch).items():
            block = (torch.arange(of_batch.shape[1]) + counts.sum()) % N_BLOCKS
            by_example = of_batch.transpose(0, 1).double().cpu()  # (B, L, F)
            blocks.setdefault(name, by_example.new_zeros(N_BLOCKS, *by_example.shape[1:]))
            blocks[name].index_add_(0, block, by_example)
        counts += torch.bincount(block, minlength=N_BLOCKS)
    if not counts.sum():
        raise ValueError("no batches: importance needs at least one example")
    used, meta = counts > 0, {**(meta or {}), "ffn": ffn_digest(model)}
    return {
        name: Importance(sums.sum(0), sums[used], counts[used], meta)
        for name, sums in blocks.items()
    }


def ffn_digest(model: nn.Module) -> str:
    """SHA-256 of all W1 and W2 of a model, layer by layer, as little-endian float32.

    It tells models apart, not files: the same weights in another dtype that holds them, on
    another device or under another head have the same digest.
    """
    total = hashlib.sha256()
    for layer in ffns(model):
        for dense in (layer.up, layer.down):
            weight = dense.weight.detach().to("cpu", torch.float32).contiguous()
            total.update(weight.numpy().astype("<f4", copy=False))
    return total.hexdigest()


class Flow(NamedTuple):
    """What passes through one layer's neurons: the arguments of :func:`example_importance`."""

    a: Tensor
    h: Tensor
    b1: Tensor
    grad_a: Tensor
    grad_h: Tensor
    sum_tokens: Callable[[Tensor], Tensor]


def of_eq4(flow: Flow) -> Tensor:
    """:func:`example_importance` of one layer, ``(B, F)``."""
    return example_importance(*flow)


def score_batch(
    model: nn.Module,
    batch: dict[str, Tensor],
    scores: Mapping[str, Callable[[Flow], Tensor]],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Scores of each example of a batch from one backward, ``(L, B, F)`` by name.

    Args:
        model: An encoder with a head and :func:`frozen` parameters, accelerated or not.
        batch: Inputs with targets.
        scores: By name; from what passes through a layer's neurons to ``(B, F)``.
        dtype: As :func:`ffn_importance`.

    Raises:
        ValueError: a batch without targets, or a layer that one forward pass calls twice.
    """
    if "labels" not in batch and not {"start_positions", "end_positions"} <= {*batch}:
        raise ValueError(
            "importance needs labels, or start_positions and end_positions: "
            "Eq. 4 scores the task loss"
        )
    inputs = {name: value for name, value in batch.items() if name != "index"}
    n_examples = len(inputs["labels" if "labels" in inputs else "start_positions"])
    sum_tokens = token_sum(model, inputs)
    layers = [_LayerFlow(layer, scores, sum_tokens) for layer in ffns(model)]
    try:
        with torch.enable_grad():
            device = layers[0].ffn.down.weight.device.type
            with torch.autocast(device, dtype, enabled=dtype is not None):
                loss = model(**inputs).loss * n_examples  # the sum over examples
            torch.autograd.grad(loss, layers[0].a)  # fills every layer's scores on its way
    finally:
        for layer in layers:
            layer.remove_hooks()
    return {name: torch.stack([layer.scores[name] for layer in layers]) for name in scores}


def token_sum(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """How to sum over each example's tokens what passes through a layer of this model.

    Args:
        model: An accelerated model has a ``token_sum`` of its own, since it packs tokens.
        inputs: Of the forward pass.
    """
    encoder = getattr(model, "base_model", model)
    return encoder.token_sum(**inputs) if hasattr(encoder, "token_sum") else over_tokens


class _LayerFlow:
    """Computes one layer's scores while the gradient passes through it, and then forgets it."""

    def __init__(
        self,
        ffn: FFN,
        scores: Mapping[str, Callable[[Flow], Tensor]],
        sum_tokens: Callable[[Tensor], Tensor],
    ):
        self.ffn, self.score, self.sum_tokens = ffn, scores, sum_tokens
        self.a = self.h = self.grad_h = None
        self.scores: dict[str, Tensor] = {}
        self.hooks = [
            ffn.up.register_forward_hook(self._see_a),
            ffn.act.register_forward_hook(self._see_h),
        ]

    def _see_a(self, _module: nn.Module, _inputs: tuple, a: Tensor) -> None:
        if self.a is not None:
            raise ValueError("a feed-forward layer is called twice in one forward pass")
        self.a = a if a.requires_grad else a.requires_grad_()  # the first layer's starts the graph
        a.register_hook(self._score)

    def _see_h(self, _module: nn.Module, _inputs: tuple, h: Tensor) -> None:
        self.h = h.detach()
        h.register_hook(self._see_grad_h)

    def _see_grad_h(self, grad_h: Tensor) -> None:
        self.grad_h = grad_h

    def _score(self, grad_a: Tensor) -> None:
        """Called with the gradient of ``a``, which comes last."""
        a, h = (_at_least_float32(x.detach()) for x in (self.a, self.h))
        flow = Flow(a, h, self.ffn.up.bias, grad_a, self.grad_h, self.sum_tokens)
        self.scores = {name: score(flow) for name, score in self.score.items()}
        self.h = self.grad_h = None

    def remove_hooks(self) -> None:
        self.a = None  # it refers to this object by its hook
        for hook in self.hooks:
            hook.remove()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scored_ffns(model: nn.Module) -> list[FFN]:
    """The dense feed-forward networks of a model; a ValueError where it has none."""
    if layers := [*ffns(model)]:
        return layers
    raise ValueError(
        f"{type(model).__name__} has no dense feed-forward layers to score of {supported()}"
    )


@contextmanager
def frozen(model: nn.Module):
    """Eval mode, no parameter gradients, all tokens in one chunk; after the block as before."""
    modes = [(module, module.training) for module in model.modules()]
    chunked = [m for m in model.modules() if getattr(m, "chunk_size_feed_forward", 0)]
    chunks = [module.chunk_size_feed_forward for module in chunked]
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for module in chunked:
        module.chunk_size_feed_forward = 0
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, size in zip(chunked, chunks, strict=True):
            module.chunk_size_feed_forward = size
        for parameter in trainable:
            parameter.requires_grad_(True)
