"""One feed-forward layer of experts, and how to look inside it.

:class:`MoEOutput` replaces ``BertOutput``. It routes each token to an expert, applies the experts
to their tokens (``routing.experts_forward``, Eqs. 1-2), and adds residual and LayerNorm. What the
routers need beyond states comes with each forward pass, as a :class:`RoutingCall`.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from moebert_lib.data.batching import Packing
from moebert_lib.method.routing import (
    GATES,
    HashRouter,
    Route,
    balance_loss,
    experts_forward,
    random_table,
)


@use_experts_implementation(has_gate=False, has_bias=True)
class Experts(nn.Module):
    """All experts of one layer, stacked: ``E`` two-layer networks of ``K`` neurons.

    The loop below is the reference ("eager"); transformers swaps in ``grouped_mm`` and
    others through ``model.set_experts_implementation``.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.num_experts = config.n_experts
        self._add_neurons(config)
        self.down_proj_bias = nn.Parameter(torch.zeros(config.n_experts, config.hidden_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def _add_neurons(self, config: PreTrainedConfig) -> None:
        E, K, D = config.n_experts, config.expert_size, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(E, K, D))  # W1 of Eq. 1, transposed
        self.up_proj_bias = nn.Parameter(torch.zeros(E, K))
        self.down_proj = nn.Parameter(torch.empty(E, D, K))  # W2 of Eq. 1, transposed

    @torch.no_grad()
    def set_neurons(self, up: Tensor, up_bias: Tensor, down: Tensor) -> None:
        """Copy weights in: ``(E, K, D)``, ``(E, K)`` and ``(E, D, K)``, shared neurons first."""
        self.up_proj.copy_(up)
        self.up_proj_bias.copy_(up_bias)
        self.down_proj.copy_(down)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``weight * E_i(a)``, summed over each token's experts ``i`` (Eq. 2).

        Args:
            hidden_states: Shape ``(B*T, D)``.
            top_k_index: Experts of each token, ``(B*T, k)``, int64.
            top_k_weights: Factors on their outputs, ``(B*T, k)``.

        Returns:
            Shape ``(B*T, D)``, tokens in the order they came in.
        """
        k = top_k_index.shape[1]
        rows = hidden_states[:, None].expand(-1, k, -1).flatten(0, 1)  # (B*T*k, D)
        p = top_k_weights.reshape(-1, 1).to(rows.dtype)
        output = experts_forward(rows, top_k_index.flatten(), p, *self.unbound(), self.act_fn)
        return output if k == 1 else output.unflatten(0, (-1, k)).sum(1)

    def unbound(self) -> tuple[tuple[Tensor, ...], ...]:
        """W1, b1, W2 and b2 of Eq. 1, each a tuple of one tensor an expert."""
        stacked = (self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias)
        return tuple(parameter.unbind(0) for parameter in stacked)


class TiedExperts(Experts):
    """Experts whose first ``s`` neurons are one set of parameters, so they stay the same.

    The other neurons of each expert are stored beside them. ``up_proj``, ``up_proj_bias`` and
    ``down_proj`` are concatenated on every access, in the shapes of :class:`Experts`, so every
    implementation of transformers runs, and gradients add up over the experts.
    """

    def _add_neurons(self, config: PreTrainedConfig) -> None:
        E, s, D = config.n_experts, config.n_shared, config.hidden_size
        n_own = config.expert_size - s
        self.shared_up = nn.Parameter(torch.empty(s, D))
        self.shared_up_bias = nn.Parameter(torch.zeros(s))
        self.shared_down = nn.Parameter(torch.empty(D, s))
        self.own_up = nn.Parameter(torch.empty(E, n_own, D))
        self.own_up_bias = nn.Parameter(torch.zeros(E, n_own))
        self.own_down = nn.Parameter(torch.empty(E, D, n_own))

    def _joined(self, shared: Tensor, own: Tensor, dim: int) -> Tensor:
        return torch.cat([shared.expand(self.num_experts, *shared.shape), own], dim)

    @property
    def up_proj(self) -> Tensor:
        return self._joined(self.shared_up, self.own_up, 1)  # (E, K, D)

    @property
    def up_proj_bias(self) -> Tensor:
        return self._joined(self.shared_up_bias, self.own_up_bias, 1)  # (E, K)

    @property
    def down_proj(self) -> Tensor:
        return self._joined(self.shared_down, self.own_down, 2)  # (E, D, K)

    @torch.no_grad()
    def set_neurons(self, up: Tensor, up_bias: Tensor, down: Tensor) -> None:
        s = len(self.shared_up)
        for shared, own, values in (
            (self.shared_up, self.own_up, up),
            (self.shared_up_bias, self.own_up_bias, up_bias),
            (self.shared_down.T, self.own_down.mT, down.mT),
        ):
            shared.copy_(values[0, :s])
            own.copy_(values[:, s:])


class ExpertLayerNorm(nn.Module):
    """LayerNorm whose gain and bias belong to the expert that served the token.

    With several experts a token, their gains and biases are averaged, weighted by their factors.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.n_experts, config.hidden_size))
        self.eps = config.layer_norm_eps

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """``x`` has shape ``(B*T, D)``, ``experts`` and ``weights`` ``(B*T, k)``."""
        normal = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        gain = self._of(self.weight, experts, weights)
        bias = self._of(self.bias, experts, weights)
        return normal * gain + bias

    @staticmethod
    def _of(table: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Rows of ``(E, D)`` for each token; an index's gradient would vary on two threads."""
        if experts.shape[1] == 1:
            return F.embedding(experts[:, 0], table)  # (B*T, D)
        share = weights / weights.sum(-1, keepdim=True)
        return (F.embedding(experts, table) * share[..., None]).sum(1)


class RoutingCall:
    """What the routers of all layers share during one forward pass.

    Each forward pass makes one, and it travels with the pass as an argument. Nothing of a pass is
    kept in the model, so one model may serve several threads, and a layer that is computed again
    (gradient checkpointing) sees what it saw the first time.

    Attributes:
        input_ids: Token ids, ``(B, T)``, or None where the model was given embeddings.
        mask: 1 for real tokens, ``(B, T)``; or a batch's ``Packing``; or None.
        balance_losses: The load-balance loss of each gated layer so far.
    """

    def __init__(self, input_ids: Tensor | None = None, mask: Tensor | Packing | None = None):
        self.input_ids, self.mask = input_ids, mask
        self.balance_losses: list[Tensor] = []
        self._taken = False

    @classmethod
    def of(cls, mask: "Tensor | RoutingCall | None") -> "RoutingCall":
        """The call that a head handed to its encoder in place of the mask, or a new one."""
        return mask if isinstance(mask, cls) else cls(mask=mask)

    def of_tokens(self, input_ids: Tensor, mask: Packing) -> "RoutingCall":
        """The same pass over tokens in another shape; balance losses go to the same list."""
        call = RoutingCall(input_ids, mask)
        call.balance_losses = self.balance_losses
        return call

    def keep_balance(self, loss: Tensor) -> None:
        """Keep a layer's load-balance loss until :meth:`take_balance`; later ones are repeats."""
        if not self._taken:
            self.balance_losses.append(loss)

    def take_balance(self) -> Tensor | None:
        """The load-balance losses summed over layers; None where there are no gates."""
        total = sum(self.balance_losses) if self.balance_losses else None
        self.balance_losses, self._taken = [], True  # a loss's graph holds this object
        return total


class MoEOutput(nn.Module):
    """The feed-forward half of a layer: route, experts, dropout, residual, LayerNorm.

    ``neurons`` ``(E, K)`` are the dense layer's neurons that each expert was made of.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.router = _router(config)
        tied = config.shared_neurons == "tied"
        self.experts = TiedExperts(config) if tied else Experts(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.top_k = config.num_experts_per_tok
        self.per_expert = config.expert_layer_norm == "per-expert"
        norm = ExpertLayerNorm if self.per_expert else _shared_layer_norm
        self.LayerNorm = norm(config)
        self.outside = config.gate_scaling == "outside"
        self.padding_in_balance = config.padding_in_balance
        self.balance_over = config.balance_over
        shape = (config.n_experts, config.expert_size)
        self.register_buffer("neurons", torch.zeros(shape, dtype=torch.int64), persistent=True)

    def forward(self, attention_output: Tensor, call: RoutingCall) -> Tensor:
        """``(B, T, D)`` to the layer's output of the same shape.

        Args:
            attention_output: After its residual and LayerNorm.
            call: Of this forward pass.
        """
        route = self.router(attention_output, call.input_ids, call.mask)
        self.note_balance(route, call)
        return self.serve(attention_output, route)

    def serve(self, attention_output: Tensor, route: Route) -> Tensor:
        """:meth:`forward` along a given route."""
        tokens = attention_output.flatten(0, 1)  # (B*T, D)
        weights = torch.ones_like(route.weights) if self.outside else route.weights
        x = self.dropout(self.experts(tokens, route.experts, weights))  # Eq. 2
        summed = x + tokens
        args = (summed, route.experts, route.weights) if self.per_expert else (summed,)
        output = self.LayerNorm(*args)
        if self.outside:
            output = output * route.weights
        return output.view_as(attention_output)

    @property
    def gated(self) -> bool:
        """Whether the router looks at states, rather than at token ids."""
        return not isinstance(self.router, HashRouter)

    def note_balance(self, route: Route, call: RoutingCall) -> None:
        """Keep a gate's load-balance loss for the model's output; a hash and a graph have none."""
        if route.probabilities is not None and not torch.compiler.is_exporting():
            real = None if self.padding_in_balance else call.mask
            call.keep_balance(balance_loss(route, real, over=self.balance_over))


def _shared_layer_norm(config: PreTrainedConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def _router(config: PreTrainedConfig) -> nn.Module:
    if config.routing in GATES:
        return GATES[config.routing](
            config.hidden_size,
            config.n_experts,
            config.num_experts_per_tok,
            noise=config.gate_noise,
            capacity=config.gate_capacity,
            assignment=config.gate_assignment,
        )
    table = random_table(config.vocab_size, config.n_experts, seed=0)  # loaded or set later
    return HashRouter(table)


def moe_layers(model: nn.Module) -> list[MoEOutput]:
    """The expert layers of a model, first to last."""
    return [module for module in model.modules() if isinstance(module, MoEOutput)]


@contextmanager
def record_routes(model: nn.Module) -> Iterator[list[list[Route]]]:
    """Collect every route taken inside the block: ``routes[layer][call]``.

    Only forward passes of the thread that opened the block are recorded. Of an accelerated model
    they are those of packed tokens; use the ordinary one.

    Example: ``with record_routes(model) as routes: model(**batch)``
    """
    layers = moe_layers(model)
    routes: list[list[Route]] = [[] for _ in layers]
    thread = threading.get_ident()

    def keep(_module: nn.Module, _args: tuple, route: Route, *, kept: list[Route]) -> None:
        if threading.get_ident() == thread:
            kept.append(route)

    hooks = [
        layer.router.register_forward_hook(functools.partial(keep, kept=kept))
        for layer, kept in zip(layers, routes, strict=True)
    ]
    try:
        yield routes
    finally:
        for hook in hooks:
            hook.remove()


class ParameterCounts(NamedTuple):
    """Parameters a token uses, and parameters on disk."""

    effective: int
    stored: int


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count parameters; effective are those without the experts that a token does not visit.

    Tied neurons are stored once and used by every token. Buffers (hash tables) are not counted.
    Works on the meta device.
    """
    stored = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in moe_layers(model):
        named = layer.experts.named_parameters()
        per_expert = [p for name, p in named if not name.startswith("shared_")]
        if layer.per_expert:
            per_expert += [*layer.LayerNorm.parameters()]
        n_experts = layer.experts.num_experts
        idle += sum(p.numel() for p in per_expert) * (n_experts - layer.top_k) // n_experts
    return ParameterCounts(stored - idle, stored)
