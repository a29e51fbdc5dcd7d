"""A layer of experts without gradient: each expert's tokens picked out, served, put back."""

import torch
from torch import Tensor, nn

from moebert_lib.kernels import Kernels, is_gelu
from moebert_lib.packing import Packing, by_expert


def serve(
    layer: nn.Module, a: Tensor, ids: Tensor, packing: Packing, kernels: Kernels, *, index: int,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What ``MoEOutput.forward`` computes, without dropout.

    Args:
        layer: The ``MoEOutput``.
        a: Attention output of the tokens, ``(N, D)``.
        ids: Token ids, ``(N,)``.
        packing: Of the batch; a sentence gate reads it.
        kernels: Linear layers.
        index: Number of the layer, which ``kernels`` keeps weights under.
        rows: Tokens to serve; all where None.

    Returns:
        Shape ``(N, D)``, or a row for each of ``rows``.
    """
    seen = a.to(layer.router.gate.weight.dtype) if layer.gated else a
    route = layer.router(seen[None], ids[None], packing)
    layer.note_balance(route, packing)
    expert_of, weights = route.experts, route.weights.to(a.dtype) if layer.gated else None
    if rows is not None:
        a, expert_of, weights = (x if x is None else x[rows] for x in (a, expert_of, weights))
    order, counts = by_expert(expert_of, layer.experts.num_experts)
    if max(counts) == len(a):  # one expert has all: nothing to pick out
        return _one(layer, counts.index(len(a)), a, weights, kernels, index)
    output = torch.empty_like(a)
    for expert, tokens in enumerate(order.split(counts)):
        if len(tokens):
            own = None if weights is None else weights[tokens]
            output.index_copy_(0, tokens, _one(layer, expert, a[tokens], own, kernels, index))
    return output


def _one(
    layer: nn.Module, expert: int, a: Tensor, weights: Tensor | None, kernels: Kernels, index: int
) -> Tensor:
    """One expert's tokens ``(n, D)``, with the gate's factor, residual and LayerNorm."""
    experts, name, norm = layer.experts, (index, expert), layer.LayerNorm
    sources, act = list(experts.parameters()), experts.act_fn

    def up() -> tuple[Tensor, Tensor]:
        return experts.up_proj[expert], experts.up_proj_bias[expert]

    def down() -> tuple[Tensor, Tensor]:
        return experts.down_proj[expert], experts.down_proj_bias[expert]

    h = kernels.linear((*name, "up"), a, sources, up, gelu=is_gelu(act))
    h = h if is_gelu(act) else act(h)
    y = kernels.linear((*name, "down"), h, sources, down)
    if weights is not None and not layer.outside:
        y = y * weights
    gain, bias = norm.weight, norm.bias
    if layer.per_expert:
        gain, bias = gain[expert], bias[expert]
    y = kernels.norm((*name, "norm"), y.add_(a), gain, bias, norm.eps)
    return y * weights if weights is not None and layer.outside else y
