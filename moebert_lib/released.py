"""MoE layers the way the release computes them: a yardstick for speed, with the same results.

Every layer sorts the padded batch by expert, splits it, asks one module for each expert,
stacks what they answer and sorts it back.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_lib.moe_layer import MoEOutput, moe_layers
from moebert_lib.routing import balance_loss


class ReleasedExpert(nn.Module):
    """One expert as a module of its own: two linear layers, dropout, residual, LayerNorm.

    Args:
        layer: The layer whose weights are copied.
        expert: Which of its experts.
    """

    def __init__(self, layer: MoEOutput, expert: int):
        super().__init__()
        own, norm = layer.experts, layer.LayerNorm
        K, D = own.up_proj[expert].shape
        self.fc1, self.fc2 = nn.Linear(D, K), nn.Linear(K, D)
        self.act, self.dropout, self.outside = own.act_fn, layer.dropout, layer.outside
        self.LayerNorm = nn.LayerNorm(D, eps=norm.eps)
        mine = expert if layer.per_expert else ...
        values = {
            self.fc1: (own.up_proj[expert], own.up_proj_bias[expert]),
            self.fc2: (own.down_proj[expert], own.down_proj_bias[expert]),
            self.LayerNorm: (norm.weight[mine], norm.bias[mine]),
        }
        for module, (weight, bias) in values.items():
            module.weight = nn.Parameter(weight.detach().clone())
            module.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Its tokens ``(n, D)``, and the gate's factors ``(n, 1)``; None for a hash."""
        y = self.dropout(self.fc2(self.act(self.fc1(x))))
        if weights is not None and not self.outside:
            y = y * weights
        y = self.LayerNorm(y + x)
        return y * weights if weights is not None and self.outside else y


class ReleasedFFN(nn.Module):
    """Stands where :class:`moe_layer.MoEOutput` stood, with its results.

    A sentence gate's tokens are sorted one by one here; the release sorts whole sentences.

    Args:
        layer: The layer that is copied; router and context are its own.
    """

    def __init__(self, layer: MoEOutput):
        super().__init__()
        self.router, self.context = layer.router, layer.context
        n_experts = layer.experts.num_experts
        self.experts = nn.ModuleList(ReleasedExpert(layer, expert) for expert in range(n_experts))

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Both arguments are the attention output, ``(B, T, D)``, and so is the result."""
        mask = self.context.mask
        route = self.router(hidden_states, self.context.input_ids, mask)
        chosen, x = route.experts[:, 0], input_tensor.flatten(0, 1)
        order = chosen.argsort(0)
        counts = F.one_hot(chosen, len(self.experts)).sum(0).tolist()
        weights: tuple = (None,) * len(counts)
        if route.probabilities is not None:
            self.context.balance_losses.append(balance_loss(route, mask))
            weights = route.weights[order].split(counts)
        pieces = zip(self.experts, x[order].split(counts), weights, strict=True)
        served = torch.vstack([expert(tokens, own) for expert, tokens, own in pieces])
        return served[order.argsort(0)].view_as(input_tensor)


def as_released(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a MoEBERT whose layers compute as the release's do.

    Args:
        model: A MoEBERT with any head, not accelerated. It stays as it is.

    Returns:
        The same kind of model with weights of its own: it answers and trains as ``model`` does.

    Raises:
        ValueError: there are no expert layers.
    """
    if not moe_layers(model):
        raise ValueError(
            f"as_released takes a MoEBERT, not a {type(model).__name__} without experts"
        )
    model = copy.deepcopy(model)
    for layer in model.base_model.encoder.layer:
        layer.output = ReleasedFFN(layer.output).train(layer.training)
    return model
