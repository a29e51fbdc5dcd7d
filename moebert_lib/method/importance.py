"""How much the loss would change without a neuron (Eq. 4), for all neurons in one backward.

Eq. 4 sums ``|w1_j . dL/dw1_j + w2_j . dL/dw2_j|`` over examples, where ``w1_j`` is column ``j``
of W1 and ``w2_j`` row ``j`` of W2. Both products are sums over tokens of what flows through the
neuron: with pre-activation ``a`` and activation ``h``,

    w1_j . dL/dw1_j = sum_t (a_tj - b1_j) dL/da_tj        w2_j . dL/dw2_j = sum_t h_tj dL/dh_tj

so one backward through activations gives exact per-example scores, with frozen parameters.
Biases are not scored (Sec. 3.1, footnotes), nothing below the first layer's ``a`` is
differentiated, and padding is not computed, except a span head's, whose loss counts it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moebert_lib.data.batching import Packing
from moebert_lib.method.encoder_layouts import FFN, ffns, supported
from moebert_lib.model.accelerate import PackedBert, accelerate

N_BLOCKS = 20  # examples are spread over this many block sums, for intervals


@dataclass(frozen=True, repr=False)
class Importance:
    """Scores of every feed-forward neuron, with what is needed to doubt them.

    Attributes:
        scores: Eq. 4, or another of :mod:`scores`, over all examples. Shape ``(L, F)``, float64.
        blocks: The same over disjoint sets of examples, ``(M, L, F)``, adding up to ``scores``:
            the sampling error. None (``M = 0``) where unknown, as in the release's files.
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
        known = "examples unknown" if self.n_examples is None else f"{self.n_examples} examples"
        task = f", task {self.meta['task']!r}" if "task" in self.meta else ""
        return f"Importance({layers} layers of {width} neurons, {known}{task})"

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
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        parts = {name: getattr(self, name).contiguous() for name in ("scores", "blocks", "counts")}
        meta = {"moebert_importance": json.dumps(self.meta, sort_keys=True)}
        save_file(parts, partial, metadata=meta)
        partial.replace(path)

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

    Exact per example, though batches are processed whole; memory does not grow with their number.
    The model is used in eval mode (no dropout) and given back as it was, without gradients.

    Args:
        model: Of a family in ``adapters``, with a head whose forward returns the mean ``loss``.
        batches: Dictionaries of model inputs with ``labels``, or with ``start_positions`` and
            ``end_positions`` inside the input; on the model's device. ``index`` is ignored.
        meta: Stored with the result, beside the digest of the scored weights.
        dtype: ``torch.bfloat16`` is faster and moves ranks a little: ``moebert bench
            importance`` says how much. By default the model's own, which is exact.

    Raises:
        TypeError: one batch in place of a list of batches.
        ValueError: no batch, a batch without targets, an unknown family, another ``dtype``.

    Source: Eq. 4; derivation in this module's header.
    """
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: expected None, the model's own, or torch.bfloat16")
    with frozen(model):
        fast = fast_eval(model)
        return summed(
            model,
            batches,
            lambda batch: {"importance": sum(batch_flows(fast, batch, dtype=dtype)).abs()},
            meta=meta,
        )["importance"]


def summed(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    terms: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    *,
    meta: dict | None = None,
) -> dict[str, Importance]:
    """Scores that are sums over examples, by name; errors as :func:`ffn_importance`.

    Args:
        model: As for :func:`ffn_importance`, and :func:`frozen`.
        batches, meta: As there.
        terms: From a batch to what its examples add to each score, ``(L, B, F)``.
    """
    if isinstance(batches, Mapping):
        raise TypeError("scores take a list of batches, and this is one: pass [batch]")
    scored_ffns(model)
    blocks, counts = {}, torch.zeros(N_BLOCKS).long()
    for batch in batches:
        for name, each in terms(batch).items():
            block = (torch.arange(each.shape[1]) + counts.sum()) % N_BLOCKS
            each = each.transpose(0, 1).double().cpu()  # (B, L, F)
            blocks.setdefault(name, each.new_zeros(N_BLOCKS, *each.shape[1:]))
            blocks[name].index_add_(0, block, each)
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


def batch_flows(
    model: nn.Module, batch: dict[str, Tensor], *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The two terms of Eq. 4 for each example, of ``w1`` and of ``w2``: ``(L, B, F)`` each.

    Args:
        model: An encoder with a head and :func:`frozen` parameters, accelerated or not.
        batch: Inputs with targets.
        dtype: As :func:`ffn_importance`.

    Raises:
        ValueError: a batch without targets.
    """
    if "labels" not in batch and not {"start_positions", "end_positions"} <= {*batch}:
        raise ValueError(
            "importance needs labels, or start_positions and end_positions: "
            "Eq. 4 scores the task loss"
        )
    layers, start, hooks = [*ffns(model)], [], []
    sums: tuple = [0] * len(layers), [0] * len(layers)  # through a, through h
    inputs = {name: value for name, value in batch.items() if name != "index"}
    B = len(inputs["labels" if "labels" in inputs else "start_positions"])
    packing = packing_of(model, inputs)

    def watch(row: list, index: int, module: nn.Module, _inputs: tuple, x: Tensor) -> None:
        """Once the gradient of ``a`` or ``h`` is there, sum their product."""
        if not x.requires_grad:
            start.append(x.requires_grad_())  # the first layer's a: nothing before it is kept
        value, bias = x.detach(), getattr(module, "bias", None)  # b1, where x is a

        def add(gradient: Tensor) -> None:
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            flow = (wide if bias is None else wide - bias) * gradient
            row[index] = row[index] + by_example(flow, B, packing)

        x.register_hook(add)

    for index, layer in enumerate(layers):
        for row, module in zip(sums, (layer.up, layer.act), strict=True):
            hooks.append(module.register_forward_hook(partial(watch, row, index)))
    try:
        with torch.enable_grad():
            device = layers[0].down.weight.device.type
            with torch.autocast(device, dtype, enabled=dtype is not None):
                loss = model(**inputs).loss * B  # the sum over examples
            torch.autograd.grad(loss, start)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(sums[0]), torch.stack(sums[1])


def packing_of(model: nn.Module, inputs: dict[str, Tensor]) -> Packing | None:
    """How an accelerated model packs these inputs."""
    if not isinstance(getattr(model, "base_model", None), PackedBert) or "input_ids" not in inputs:
        return None
    mask = inputs.get("attention_mask")
    return Packing.of(torch.ones_like(inputs["input_ids"]) if mask is None else mask)


def by_example(flow: Tensor, B: int, packing: Packing | None) -> Tensor:
    """Sums over each example's tokens, ``(B, F)``."""
    if len(flow) == B:  # (B, T, F)
        return flow.sum(1)
    rows = flow[0]  # of the last layer only first tokens, if the loss sees no other
    return packing.sums(rows) if len(rows) == len(packing) else packing.to_batch_order(rows)


def fast_eval(model: nn.Module) -> nn.Module:
    """The model accelerated, in eval mode; as it is where ``accelerate`` knows no way."""
    try:
        return accelerate(model).eval()
    except ValueError:
        return model


def scored_ffns(model: nn.Module) -> list[FFN]:
    """The dense feed-forward networks of a model; a ValueError where it has none."""
    if layers := [*ffns(model)]:
        return layers
    raise ValueError(
        f"{type(model).__name__} has no dense feed-forward layers to score of {supported()}"
    )


@contextmanager
def frozen(model: nn.Module):
    """Eval mode and no parameter gradients inside the block; both restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)
