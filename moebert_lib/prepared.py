"""One layer of a BERT or MoEBERT without gradient, its weights as ``kernels`` wants them."""

from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from moebert_lib.kernels import Kernels, Linear, Watch
from moebert_lib.packing import Packing, attention, by_expert


class PreparedLayer:
    """A ``BertLayer`` ready to run; of use as long as ``watch.same()``.

    Args:
        layer: With a dense feed-forward layer, or with ``MoEOutput``.
        kernels: How to compute.
    """

    def __init__(self, layer: nn.Module, kernels: Kernels):
        self.moe = hasattr(layer.output, "experts")
        routers = layer.output.router.modules() if self.moe else ()
        self.watch, self.layer, self.kernels = Watch(layer, called=routers), layer, kernels
        own, output = layer.attention.self, layer.attention.output
        self.heads = (own.num_attention_heads, own.attention_head_size)
        self.projection, self.norm = kernels.layers(output.dense), self._norm(output.LayerNorm)
        if self.moe:
            stacks = zip(*layer.output.experts.unbound(), strict=True)
            self.ffns = [self._expert(layer.output, e, own) for e, own in enumerate(stacks)]
        else:
            act, up = layer.intermediate.intermediate_act_fn, layer.intermediate.dense
            up = kernels.layers(up, gelu=is_gelu(act))
            down, norm = kernels.layers(layer.output.dense), self._norm(layer.output.LayerNorm)
            self.ffns = [FFN(up, act, down, norm)]

    @cached_property
    def qkv(self) -> Linear:
        """Queries, keys and values side by side."""
        own = self.layer.attention.self
        return self.kernels.layers(own.query, own.key, own.value)

    @cached_property
    def q_and_kv(self) -> tuple[Linear, Linear]:
        """The same apart, for a layer in which few tokens ask."""
        own = self.layer.attention.self
        return self.kernels.layers(own.query), self.kernels.layers(own.key, own.value)

    def __call__(self, x: Tensor, ids: Tensor, packing: Packing, *, first: bool = False) -> Tensor:
        """The next state.

        Args:
            x: State of all tokens, ``(N, D)``.
            ids: Token ids, ``(N,)``.
            packing: Of the batch.
            first: Only the first tokens' states are wanted.

        Returns:
            Shape ``(N, D)``, or with ``first`` ``(B, D)``, shortest sentence first.
        """
        rows = packing.starts[:-1].long() if first else None
        gated = self.moe and self.layer.output.gated  # a gate looks at all tokens
        if first and not gated:
            q_of, kv_of = self.q_and_kv
            mine, ids, rows = x.index_select(0, rows), ids[rows], None
            q, (k, v) = (
                q_of(mine).view(-1, *self.heads),
                kv_of(x).view(-1, 2, *self.heads).unbind(1),
            )
        else:
            mine, (q, k, v) = x, self.qkv(x).view(-1, 3, *self.heads).unbind(1)
        a = self.norm(self.projection(attention(q, k, v, packing), mine))
        return self.feed_forward(a, ids, packing, rows)

    def feed_forward(
        self, a: Tensor, ids: Tensor, packing: Packing, rows: Tensor | None = None
    ) -> Tensor:
        """The layer's second half: each expert's tokens picked out, served and put back.

        Args:
            a: Attention output, ``(N, D)``.
            ids: Token ids, ``(N,)``.
            packing: Of the batch; a sentence gate reads it.
            rows: Tokens to serve; all where None.
        """
        output = self.layer.output
        if not self.moe:
            return self.ffns[0](a if rows is None else a[rows])
        seen = a.to(output.router.gate.weight.dtype) if output.gated else a
        route = output.router(seen[None], ids[None], packing)
        output.note_balance(route, packing)
        expert_of, weights = route.experts, route.weights.to(a.dtype) if output.gated else None
        if rows is not None:
            a, expert_of, weights = (x if x is None else x[rows] for x in (a, expert_of, weights))
        order, back, counts = by_expert(expert_of, len(self.ffns))
        if max(counts) == len(a):  # one expert has all: nothing to pick out
            return self.ffns[counts.index(len(a))](a, weights, outside=output.outside)
        factors = [None] * len(counts)
        if weights is not None:
            factors = weights.index_select(0, order).split(counts)
        parts = zip(self.ffns, a.index_select(0, order).split(counts), factors, strict=True)
        served = [ffn(x, own, outside=output.outside) for ffn, x, own in parts if len(x)]
        return torch.cat(served).index_select(0, back)

    def _expert(self, output: nn.Module, expert: int, own: tuple[Tensor, ...]) -> "FFN":
        act, norm = output.experts.act_fn, output.LayerNorm
        up, up_bias, down, down_bias = own
        up = self.kernels.linear(up, up_bias, gelu=is_gelu(act))
        gain, bias = norm.weight, norm.bias
        if output.per_expert:
            gain, bias = gain[expert], bias[expert]
        norm = self.kernels.norm(gain, bias, norm.eps)
        return FFN(up, act, self.kernels.linear(down, down_bias), norm)

    def _norm(self, norm: nn.LayerNorm):
        return self.kernels.norm(norm.weight, norm.bias, norm.eps)


class FFN:
    """A feed-forward layer, dense or one expert, with residual and LayerNorm."""

    def __init__(self, up: Linear, act: nn.Module, down: Linear, norm):
        self.up, self.down, self.norm = up, down, norm
        self.act = None if is_gelu(act) else act  # else it is part of ``up``

    def __call__(self, a: Tensor, weights: Tensor | None = None, *, outside: bool = False):
        """``LN(weight * FFN(a) + a)``, or with the weight ``outside``: of ``(n, D)`` tokens."""
        h = self.up(a)
        h = h if self.act is None else self.act(h)
        if weights is None:
            return self.norm(self.down(h, a))
        if outside:
            return self.norm(self.down(h, a)) * weights
        return self.norm((self.down(h) * weights).add_(a))


def is_gelu(act: nn.Module) -> bool:
    """Whether an activation is the exact gelu, which a linear layer can apply by itself."""
    return isinstance(act, GELUActivation)
