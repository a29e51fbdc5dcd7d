"""Linear layers through oneDNN, with prepacked weights and fused GELU and add; layers made of them.

oneDNN, the matrix library in torch's CPU builds, reads weights faster in an order of its own. The
operators that torch.compile uses for this are private, so a plain ``F.linear`` is used wherever
they are missing, fail, or do not support a dtype.
"""

import math
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.activations import GELUActivation

from moebert_lib.data.batching import attention
from moebert_lib.method.encoder_layouts import Family, at
from moebert_lib.method.encoder_layouts import ffn as dense_ffn
from moebert_lib.method.routing import by_expert
from moebert_lib.model.moe_layer import RoutingCall

#: A linear layer: of ``x`` ``(N, D_in)``, and what is added to the result where it is given.
Linear = Callable[..., Tensor]


class Kernels:
    """How layers compute without gradient.

    Args:
        dtype: To compute in; ``None`` is the weights' own.
        prepack: Rearrange weights for oneDNN where it can be done.
    """

    def __init__(self, *, dtype: torch.dtype | None = None, prepack: bool = True):
        self.dtype, self.prepack = dtype, prepack

    def linear(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> Linear:
        """``x W^T + b``, then gelu if wanted, then the sum with a second argument if there is one.

        Args:
            weight: Shape ``(D_out, D_in)``; what is made of it does not follow its changes.
            bias: Shape ``(D_out,)``.
            gelu: Apply the exact gelu.
        """
        weight, bias = (x.detach().to(self.dtype or x.dtype) for x in (weight, bias))
        if self.prepack and weight.numel() and _packable(weight.device.type, weight.dtype):
            return _prepacked(weight, bias, gelu)

        def plain(x: Tensor, other: Tensor | None = None) -> Tensor:
            y = F.linear(x, weight, bias)
            y = F.gelu(y) if gelu else y
            return y if other is None else y.add_(other)

        return plain

    def layers(self, *layers: nn.Module, gelu: bool = False) -> Linear:
        """:meth:`linear` with the outputs of several layers side by side.

        A layer that is not a plain ``nn.Linear``, or has hooks, is called itself.
        """
        if all(map(_is_plain, layers)):
            weights, biases = [m.weight for m in layers], [m.bias for m in layers]
            if len(layers) == 1:
                return self.linear(weights[0], biases[0], gelu=gelu)
            return self.linear(torch.cat(weights), torch.cat(biases), gelu=gelu)

        def called(x: Tensor, other: Tensor | None = None) -> Tensor:
            dtypes = [getattr(layer.weight, "dtype", x.dtype) for layer in layers]
            parts = [m(x.to(dtype)) for m, dtype in zip(layers, dtypes, strict=True)]
            y = torch.cat(parts, -1).to(x.dtype)
            y = F.gelu(y) if gelu else y
            return y if other is None else y + other

        return called

    def norm(self, weight: Tensor, bias: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
        """LayerNorm of ``(N, D)`` with gain and bias ``(D,)``."""
        shape = weight.shape
        weight, bias = (x.detach().to(self.dtype or x.dtype) for x in (weight, bias))
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)


class Watch:
    """Detects whether a module has changed: its parts, and the values of its parameters.

    A change of values is seen by a parameter's address, layout and torch's version counter, which
    does not count a change through ``.data`` in place. Parameters made in inference mode have no
    counter, so a module that has one always counts as changed.

    Args:
        module: The module.
        called: Those of its parts whose own forward is called, so that their hooks run.
    """

    def __init__(self, module: nn.Module, *, called: Iterable[nn.Module] = ()):
        modules, called = [*module.modules()], {*called}
        tables = [table for m in modules for table in (m._modules, m._parameters)]
        self.parts = [(table, name, part) for table in tables for name, part in table.items()]
        linear = [m for m in modules if isinstance(m, nn.Linear)]
        self.hooks = [hooks for m in linear for hooks in hooks_of(m)]
        self.n_hooks = [*map(len, self.hooks)]
        skipped = [m for m in modules if m not in called and not isinstance(m, nn.Linear)]
        self.skipped_hooks = [hooks for m in skipped for hooks in hooks_of(m)]
        # aliases keep the storage, so that no other weight comes to lie at its address
        self.aliases = [(x, x.detach()) for x in module.parameters()]
        self.counts = not any(x.is_inference() for x in module.parameters())
        self.versions = [x._version for x, _ in self.aliases] if self.counts else []

    def same(self) -> bool:
        """Whether nothing has changed since."""
        if not self.counts or [*map(len, self.hooks)] != self.n_hooks:
            return False
        if any(table.get(name) is not part for table, name, part in self.parts):
            return False
        return all(
            x._version == version
            and x.data_ptr() == alias.data_ptr()
            and x.shape == alias.shape
            and x.stride() == alias.stride()
            for (x, alias), version in zip(self.aliases, self.versions, strict=True)
        )

    def has_hooks(self) -> bool:
        """Whether a part whose forward is not called has hooks of a user."""
        return any(map(has_user_hook, self.skipped_hooks))


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """A module's dictionaries of forward and backward hooks."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def has_user_hook(hooks: dict) -> bool:
    """Whether a user's hook is among them; transformers has hooks that collect states."""
    return any(not getattr(h, "__module__", "").startswith("transformers.") for h in hooks.values())


class OneDNNLinear(TorchFunctionMode):
    """Inside the block ``F.linear`` runs through oneDNN, gradients too, where it can.

    Modules, hooks and parameters stay as they are; the two products of the backward pass are
    the same operator, so second derivatives work as well.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and len(args) == 3 and _supported(args[0], args[1]):
            return _Linear.apply(*args)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        flat = grad.flatten(0, -2)  # (N, D_out)
        of_x = _Linear.apply(grad, weight.t(), None) if needed[0] else None
        of_weight = _Linear.apply(flat.t(), x.flatten(0, -2).t(), None) if needed[1] else None
        return of_x, of_weight, flat.sum(0) if ctx.with_bias and needed[2] else None


def _supported(x: Tensor, weight: Tensor) -> bool:
    if not {type(x), type(weight)} <= {Tensor, nn.Parameter}:  # quantised, sharded, functorch's
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.dim() < 2:
        return False
    if torch.is_autocast_enabled("cpu") or not (x.numel() and weight.numel()):
        return False
    return _packable(weight.device.type, weight.dtype)


def _is_plain(layer: nn.Module) -> bool:
    unchanged = type(layer) is nn.Linear and "forward" not in vars(layer)
    return unchanged and not any(hooks_of(layer))


_KNOWN: dict[tuple[str, torch.dtype], bool] = {}


def _packable(device: str, dtype: torch.dtype) -> bool:
    """Whether this torch prepacks and multiplies such weights correctly; tried once."""
    if (device, dtype) not in _KNOWN:
        _KNOWN[device, dtype] = device == "cpu" and _tried(dtype)
    return _KNOWN[device, dtype]


def _tried(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    draw, shapes = torch.Generator("cpu").manual_seed(0), ((4, 16), (8, 16), (8,), (4, 8))
    random = (torch.randn(shape, generator=draw, device="cpu") for shape in shapes)
    x, weight, bias, other = (values.to(dtype) for values in random)
    y = F.linear(x, weight, bias)
    try:
        results = (
            _prepacked(weight, bias, True)(x),
            _prepacked(weight, bias, False)(x, other),
            _Linear.apply(x, weight.t().contiguous().t(), bias),
        )
    except Exception:  # a missing operator, dtype or processor feature: use F.linear
        return False
    near = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=5e-2)
    expected = (F.gelu(y), y + other, y)
    return all(torch.allclose(a, b, **near) for a, b in zip(results, expected, strict=True))


def _prepacked(weight: Tensor, bias: Tensor, gelu: bool) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    once = torch.ops.mkldnn._linear_pointwise.default
    summed = torch.ops.mkldnn._linear_pointwise.binary
    attr, algorithm = ("gelu", "none") if gelu else ("none", "")

    def prepacked(x: Tensor, other: Tensor | None = None) -> Tensor:
        if other is None:
            return once(x, packed, bias, attr, [], algorithm)
        if gelu:
            return once(x, packed, bias, attr, [], algorithm).add_(other)
        return summed(x, other, packed, bias, "add")

    return prepacked


# One layer of an encoder, dense or with experts, without gradient, with prepacked weights.


class PreparedLayer:
    """An encoder's layer with prepacked weights; valid as long as ``watch.same()``.

    Args:
        layer: With a dense feed-forward layer, or with ``MoEOutput``.
        family: Where it has its parts.
        kernels: How to compute.
    """

    def __init__(self, layer: nn.Module, family: Family, kernels: Kernels):
        self.output = at(layer, family.replaced)
        self.moe = hasattr(self.output, "experts")
        routers = self.output.router.modules() if self.moe else ()
        self.watch, self.layer, self.kernels = Watch(layer, called=routers), layer, kernels
        self.attend = [at(layer, path) for path in family.attention[1:4]]
        self.head_size = at(layer, family.attention.module).attention_head_size
        self.projection = kernels.layers(at(layer, family.attention.output))
        self.norm = self._norm(at(layer, family.attention.norm))
        if self.moe:
            stacks = zip(*self.output.experts.unbound(), strict=True)
            self.ffns = [self._expert(self.output, e, weights) for e, weights in enumerate(stacks)]
        else:
            ffn = dense_ffn(layer)
            act = getattr(ffn.act, "intermediate_act_fn", ffn.act)
            up = kernels.layers(ffn.up, gelu=is_gelu(act))
            self.ffns = [FFN(up, act, kernels.layers(ffn.down), self._norm(ffn.norm))]

    @cached_property
    def qkv(self) -> Linear:
        """Queries, keys and values side by side."""
        return self.kernels.layers(*self.attend)

    @cached_property
    def q_and_kv(self) -> tuple[Linear, Linear]:
        """The same in two products, for a layer with few queries."""
        query, key, value = self.attend
        return self.kernels.layers(query), self.kernels.layers(key, value)

    def __call__(
        self, x: Tensor, call: RoutingCall, *, first: bool = False, bias: Tensor | None = None
    ) -> Tensor:
        """The next state.

        Args:
            x: State of all tokens, ``(N, D)``.
            call: Its ids are ``(1, N)``, its mask the batch's packing.
            first: Compute the states of first tokens only.
            bias: Of attention's scores, ``(H, T, T)``.

        Returns:
            Shape ``(N, D)``, or with ``first`` ``(B, D)``, shortest sentence first.
        """
        packing = call.mask
        rows = packing.starts[:-1].long() if first else None
        gated = self.moe and self.output.gated  # a gate looks at all tokens
        if first and not gated:
            q_of, kv_of = self.q_and_kv
            queries = x.index_select(0, rows)
            call, rows = call.of_tokens(call.input_ids[:, rows], packing), None
            q = self._heads(q_of(queries))
            k, v = self._heads(kv_of(x), 2).unbind(1)
        else:
            queries = x
            q, k, v = self._heads(self.qkv(x), 3).unbind(1)
        a = self.norm(self.projection(attention(q, k, v, packing, bias=bias), queries))
        return self.feed_forward(a, call, rows)

    def _heads(self, x: Tensor, *parts: int) -> Tensor:
        """``(N, parts * H * d)`` to ``(N, parts, H, d)``."""
        heads = x.shape[1] // math.prod(parts) // self.head_size
        return x.view(-1, *parts, heads, self.head_size)

    def feed_forward(self, a: Tensor, call: RoutingCall, rows: Tensor | None = None) -> Tensor:
        """The layer's second half: gather each expert's tokens, apply it, put the rows back.

        Args:
            a: Attention output, ``(N, D)``.
            call: As in :meth:`__call__`.
            rows: Tokens to serve; all where None.
        """
        output = self.output
        if not self.moe:
            return self.ffns[0](a if rows is None else a[rows])
        seen = a.to(output.router.gate.weight.dtype) if output.gated else a
        route = output.router(seen[None], call.input_ids, call.mask)
        output.note_balance(route, call)
        expert_of, weights = route.experts, route.weights.to(a.dtype) if output.gated else None
        if rows is not None:
            a, expert_of, weights = (x if x is None else x[rows] for x in (a, expert_of, weights))
        order, back, counts = by_expert(expert_of[:, 0], len(self.ffns))
        if max(counts) == len(a):  # one expert has all tokens: nothing to gather
            return self.ffns[counts.index(len(a))](a, weights, outside=output.outside)
        factors = [None] * len(counts)
        if weights is not None:
            factors = weights.index_select(0, order).split(counts)
        parts = zip(self.ffns, a.index_select(0, order).split(counts), factors, strict=True)
        results = [ffn(x, p, outside=output.outside) for ffn, x, p in parts if len(x)]
        return torch.cat(results).index_select(0, back)

    def _expert(self, output: nn.Module, expert: int, weights: tuple[Tensor, ...]) -> "FFN":
        act, norm = output.experts.act_fn, output.LayerNorm
        up, up_bias, down, down_bias = weights
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
