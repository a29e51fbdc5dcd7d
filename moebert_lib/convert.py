"""From a fine-tuned BERT to a MoEBERT of the same head (Sec. 3.1)."""

import torch
from torch import Tensor, nn
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    PreTrainedModel,
)

from moebert_lib.experts import deal_layers
from moebert_lib.importance import Importance
from moebert_lib.modeling import (
    MoEBertConfig,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
)
from moebert_lib.moe_layer import MoEOutput, moe_layers
from moebert_lib.routing import BalancedHash, HashRouter, RandomHash
from moebert_lib.settings import nearest

#: What may follow the named arguments of :func:`to_moebert`.
OPTIONS = ("shared_neurons", "expert_layer_norm", "gate_scaling", "router_aux_loss_coef",
           "padding_in_balance", "allow_identical")  # fmt: skip

#: Dense class to the MoEBERT class with the same head.
HEADS = {
    BertForSequenceClassification: MoEBertForSequenceClassification,
    BertForQuestionAnswering: MoEBertForQuestionAnswering,
}


def to_moebert(
    model: PreTrainedModel,
    importance: Importance | Tensor,
    *,
    n_experts: int = 4,
    expert_size: int | None = None,
    n_shared: int | None = None,
    routing: str = "hash-random",
    seed: int = 0,
    token_frequencies: Tensor | None = None,
    **config: object,
) -> PreTrainedModel:
    """Split every feed-forward layer of ``model`` into experts.

    The dense model is left as it is. Each expert is a copy of the neurons it was dealt, with
    the layer's output bias and LayerNorm. Every routing serves both heads; with
    ``gate-sentence``, question and context are one sentence and go to one expert.

    Args:
        model: A fine-tuned ``BertForSequenceClassification`` or ``BertForQuestionAnswering``.
        importance: Scores from :func:`ffn_importance`, or a ranking ``(L, F)``, int64, most
            important neuron first.
        n_experts: Experts per layer (the paper: 4).
        expert_size: Neurons in each; ``None`` is the FFN's width over ``n_experts``.
        n_shared: Neurons in all of them; ``None`` is two thirds of ``expert_size``
            (the paper: 512 of 768).
        routing: ``hash-random``, ``hash-balance``, ``gate-token`` or ``gate-sentence``.
        seed: Of the hash tables (one a layer) and the gates' initial weights.
        token_frequencies: Occurrences of each vocabulary entry in the training set,
            ``(vocab,)``; ``hash-balance`` needs them.
        config: ``shared_neurons``, ``expert_layer_norm``, ``gate_scaling``,
            ``router_aux_loss_coef`` or ``padding_in_balance`` of :class:`MoEBertConfig`, or
            ``allow_identical`` to permit experts that are all the same.

    Returns:
        The MoEBERT model, in ``model``'s dtype, device and train/eval mode.

    Raises:
        TypeError: an unknown argument.
        ValueError: an unsupported model, a ranking of another shape, sizes that do not fit,
            or ``hash-balance`` without a frequency for each vocabulary entry.
    """
    head = _head(model)
    _check_names(config)
    if n_experts < 1:
        raise ValueError(f"n_experts={n_experts} must be at least 1")
    width, n_layers = model.config.intermediate_size, model.config.num_hidden_layers
    ranking = importance.ranking if isinstance(importance, Importance) else importance
    if tuple(ranking.shape) != (n_layers, width):
        raise ValueError(
            f"importance ranks {tuple(ranking.shape)} (layers, neurons), "
            f"the model has {(n_layers, width)}"
        )
    expert_size = max(width // n_experts, 1) if expert_size is None else expert_size
    n_shared = 2 * expert_size // 3 if n_shared is None else n_shared
    allow_identical = bool(config.pop("allow_identical", False)) or n_experts == 1
    sizes = dict(n_experts=n_experts, expert_size=expert_size, n_shared=n_shared)
    neurons = deal_layers(ranking, **sizes, allow_identical=allow_identical)  # (L, E, K)

    student = head(_config(model, routing=routing, **sizes, **config)).to(model.dtype)
    own = student.state_dict()
    same = {k: v for k, v in model.state_dict().items() if k in own and own[k].shape == v.shape}
    student.load_state_dict(same, strict=False)  # everything but the FFNs, filled below
    _set_routers(student, seed=seed, token_frequencies=token_frequencies)
    dense_layers = model.base_model.encoder.layer
    for layer, old, kept in zip(moe_layers(student), dense_layers, neurons, strict=True):
        _fill_layer(layer, old, kept)
    return student.to(model.device).train(model.training)


def _check_names(options: dict[str, object]) -> None:
    for name in options:
        if name not in OPTIONS:
            hint = nearest(name, [*OPTIONS, "n_experts", "expert_size", "n_shared", "routing"])
            raise TypeError(f"to_moebert has no argument '{name}'; {hint}")


def _head(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The MoEBERT class with the model's head."""
    if type(model) not in HEADS:
        known = ", ".join(cls.__name__ for cls in HEADS)
        raise ValueError(f"cannot convert a {type(model).__name__}; supported: {known}")
    return HEADS[type(model)]


def _config(model: PreTrainedModel, **changes: object) -> MoEBertConfig:
    """The dense model's configuration, with the experts' values on top."""
    left_out = ("model_type", "architectures")
    kept = {k: v for k, v in model.config.to_dict().items() if k not in left_out}
    return MoEBertConfig(**kept, **changes)


@torch.no_grad()
def _fill_layer(layer: MoEOutput, old: nn.Module, neurons: Tensor) -> None:
    """Copy the dense layer's neurons, output bias and LayerNorm into each expert."""
    up, down = old.intermediate.dense, old.output.dense
    neurons = neurons.to(up.weight.device)
    layer.neurons.copy_(neurons)
    layer.experts.set_neurons(
        up.weight[neurons],  # (E, K, D)
        up.bias[neurons],  # (E, K)
        down.weight.T[neurons].mT,  # (E, D, K)
    )
    layer.experts.down_proj_bias.copy_(down.bias.expand_as(layer.experts.down_proj_bias))
    layer.LayerNorm.weight.copy_(old.output.LayerNorm.weight.expand_as(layer.LayerNorm.weight))
    layer.LayerNorm.bias.copy_(old.output.LayerNorm.bias.expand_as(layer.LayerNorm.bias))


@torch.no_grad()
def _set_routers(student: nn.Module, *, seed: int, token_frequencies: Tensor | None) -> None:
    config, layers = student.config, moe_layers(student)
    generator = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(layers):
        if isinstance(layer.router, HashRouter):
            own_seed = seed * len(layers) + index  # a table of its own for every layer
            fresh = _hash_router(config, token_frequencies, seed=own_seed)
            layer.router.tid2eid.copy_(fresh.tid2eid)
        else:
            weight = layer.router.gate.weight
            drawn = torch.randn(weight.shape, generator=generator) * config.initializer_range
            weight.copy_(drawn)


def _hash_router(config: MoEBertConfig, frequencies: Tensor | None, *, seed: int) -> HashRouter:
    if config.routing == "hash-random":
        return RandomHash(config.vocab_size, config.n_experts, seed=seed)
    if frequencies is None or len(frequencies) != config.vocab_size:
        given = "none" if frequencies is None else len(frequencies)
        raise ValueError(
            "routing='hash-balance' needs token_frequencies, one count for each of the "
            f"{config.vocab_size} vocabulary ids, not {given}"
        )
    return BalancedHash(frequencies, config.n_experts, seed=seed)
