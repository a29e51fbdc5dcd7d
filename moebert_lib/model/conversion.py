"""From a fine-tuned encoder to a MoEBERT of the same family and head (Sec. 3.1)."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import logging as transformers_logging

from moebert_lib.config.errors import nearest
from moebert_lib.config.settings import check_gate_start, check_sizes, proportions
from moebert_lib.method import encoder_layouts
from moebert_lib.method.importance import Importance, ffn_digest
from moebert_lib.method.partition import deal_layers
from moebert_lib.method.routing import (
    HashRouter,
    balanced_table,
    clustered_table,
    expert_directions,
    random_table,
)
from moebert_lib.model.modeling import HEADS
from moebert_lib.model.moe_layer import MoEOutput, moe_layers

#: What may follow the named arguments of :func:`to_moebert`.
OPTIONS = (
    "shared_neurons",
    "expert_layer_norm",
    "gate_scaling",
    "num_experts_per_tok",
    "router_aux_loss_coef",
    "padding_in_balance",
    "balance_over",
    "gate_noise",
    "gate_capacity",
    "gate_assignment",
    "gate_start",
    "allow_identical",
)

#: Hints for names that other parts of the library use.
ELSEWHERE = {
    "gate_top_k": "did you mean 'num_experts_per_tok'?",
    "grouping": "pass the neurons of each expert, (L, E, K), in place of the importance",
}


def to_moebert(
    model: PreTrainedModel,
    importance: Importance | Tensor | Sequence[Sequence[int]],
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

    The dense model is not changed. Each expert is a copy of its neurons, with the layer's output
    bias and LayerNorm. Every routing works with both heads; with ``gate-sentence``, question and
    context count as one sentence and go to one expert.

    Args:
        model: Fine-tuned, of a family in ``encoder_layouts`` (BERT, RoBERTa, ELECTRA, MPNet,
            DistilBERT), with a head for sequence classification or question answering.
        importance: Scores of this model's neurons from :func:`ffn_importance`, or a ranking
            ``(L, F)`` of integers, most important neuron first: a tensor, an array or lists.
            Or the neurons of each expert, ``(L, E, K)``, shared ones first, as
            ``partition`` makes them; the sizes must be theirs.
        n_experts: Experts per layer (the paper: 4).
        expert_size: Neurons in each; ``None`` is the FFN's width over ``n_experts``.
        n_shared: Neurons in all of them; ``None`` is two thirds of ``expert_size``
            (the paper: 512 of 768).
        routing: ``hash-random``, ``hash-balance``, ``hash-cluster`` (by the model's own
            embeddings of words), ``gate-token`` or ``gate-sentence``.
        seed: Of the hash tables (another one in each layer; clusters of words are the same in
            all layers) and of the gates' initial weights.
        token_frequencies: Occurrences of each vocabulary entry in the training set,
            ``(vocab,)``; ``hash-balance`` needs them.
        config: ``num_experts_per_tok`` (behind a gate, how many serve each token),
            ``shared_neurons``, ``expert_layer_norm``, ``gate_scaling``,
            ``router_aux_loss_coef``, ``padding_in_balance``, ``balance_over``, ``gate_noise``,
            ``gate_capacity`` or ``gate_assignment`` of ``ExpertsConfig``; ``gate_start``, the
            rows of gates: ``random``, or ``experts`` for ``routing.expert_directions``; or
            ``allow_identical`` to permit experts that are all the same.

    Returns:
        The MoEBERT model, in ``model``'s dtype, device and train/eval mode.

    Raises:
        TypeError: an unknown argument.
        ValueError: an unsupported model, scores of another model, a ranking or an assignment of
            another shape or not of integers, sizes that do not fit, or ``hash-balance`` without
            a frequency for each vocabulary entry.
    """
    head = _head(model)
    _check_names(config)
    if n_experts < 1:
        raise ValueError(f"n_experts={n_experts} must be at least 1")
    given, width = _integers(importance, model), encoder_layouts.width(model.config)
    check_sizes(width, n_experts, expert_size, n_shared)
    expert_size, n_shared = proportions(width, n_experts, expert_size, n_shared)
    allow_identical = bool(config.pop("allow_identical", False)) or n_experts == 1
    sizes = dict(n_experts=n_experts, expert_size=expert_size, n_shared=n_shared)
    gate_start = str(config.pop("gate_start", "random"))
    _check_gate_start(gate_start, routing)
    check_gate_start(gate_start, expert_size, n_shared)
    if given.dim() == 3:
        neurons = _assigned(given, model, **sizes)
    else:
        neurons = deal_layers(given, **sizes, allow_identical=allow_identical)  # (L, E, K)

    with init.no_init_weights():  # every weight is set below
        student = head(_config(model, routing=routing, **sizes, **config)).to(model.dtype)
    shapes = {name: value.shape for name, value in student.state_dict().items()}
    same = {k: v for k, v in model.state_dict().items() if shapes.get(k) == v.shape}
    student.load_state_dict(same, strict=False)  # everything but the FFNs, filled below
    _set_routers(student, seed=seed, token_frequencies=token_frequencies)
    for layer, old, kept in zip(
        moe_layers(student), encoder_layouts.ffns(model), neurons, strict=True
    ):
        _fill_layer(layer, old, kept)
        if gate_start == "experts":
            own = layer.experts.up_proj.detach()[:, n_shared:]  # (E, K - s, D)
            layer.router.gate.weight.data.copy_(expert_directions(own))
    return student.to(model.device).train(model.training)


def half_depth(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a dense model with every other of its layers, counted from the last.

    At the paper's sizes it costs as much as four experts of a quarter of the neurons: either way
    a layer's 12 D^2 multiplications a token become 6 D^2 on average. Its layer ``l`` is the
    model's ``2 l`` where the number of layers is even.

    Raises:
        ValueError: an unsupported model.
    """
    _head(model)
    student, encoder = copy.deepcopy(model), encoder_layouts.family(model.config.model_type)
    layers = encoder.layers_of(student.base_model)
    del layers[-2::-2]
    setattr(student.config, encoder.key("num_hidden_layers"), len(layers))
    return student


def _integers(importance: Any, model: PreTrainedModel) -> Tensor:
    """The ranking or assignment that was passed; refuses scores of another model."""
    scores = importance if isinstance(importance, Importance) else None
    try:
        ranking = torch.as_tensor(scores.ranking if scores else importance)
    except (TypeError, ValueError, RuntimeError):
        ranking = torch.empty(0)  # of floats, so it is refused below
    if ranking.is_floating_point() or ranking.is_complex() or ranking.dtype == torch.bool:
        raise ValueError(
            "importance must be an Importance, or a ranking: integers (layers, neurons), most "
            "important neuron first; of scores, pass scores.argsort(-1, descending=True)"
        )
    shape = (model.config.num_hidden_layers, encoder_layouts.width(model.config))
    if ranking.dim() != 3 and tuple(ranking.shape) != shape:
        raise ValueError(
            f"importance ranks {tuple(ranking.shape)} (layers, neurons), the model has {shape}"
        )
    if scores and scores.meta.get("ffn") not in (None, ffn_digest(model)):
        raise ValueError(
            "these importance scores are of another model (other FFN weights); score this one, "
            "or pass importance.ranking if that is meant"
        )
    return ranking.long()


def _assigned(
    neurons: Tensor, model: PreTrainedModel, *, n_experts: int, expert_size: int, n_shared: int
) -> Tensor:
    """An assignment as it was passed, after checks that it has the sizes that were asked for."""
    shape = (model.config.num_hidden_layers, n_experts, expert_size)
    if tuple(neurons.shape) != shape:
        raise ValueError(
            f"the assignment has shape {tuple(neurons.shape)} (layers, experts, "
            f"neurons of each), expected {shape}"
        )
    width, held = encoder_layouts.width(model.config), neurons.sort(-1).values
    if held.min() < 0 or held.max() >= width:
        raise ValueError(
            f"the assignment names neuron {int(held.max())} or {int(held.min())}; "
            f"expected 0..{width - 1}"
        )
    if (held[..., 1:] == held[..., :-1]).any():
        raise ValueError("the assignment gives an expert the same neuron twice; once is expected")
    if (neurons[..., :n_shared] != neurons[:, :1, :n_shared]).any():
        raise ValueError(
            f"the first n_shared={n_shared} neurons differ between experts; expected "
            "the shared ones first"
        )
    return neurons


def load_dense(name: str) -> PreTrainedModel:
    """A fine-tuned model with the head it was saved with, in float32, to be converted.

    Trained in the half precision it may have been saved in, most of its weights would not move.

    Args:
        name: A folder, or a name on the hub.

    Raises:
        ValueError: the checkpoint lacks weights, such as those of a head.
        OSError: there is no such model, or it cannot be read.
    """
    names = AutoConfig.from_pretrained(name).architectures or []
    spans = any(name.endswith("ForQuestionAnswering") for name in names)
    auto = AutoModelForQuestionAnswering if spans else AutoModelForSequenceClassification
    with _quiet():  # missing weights are reported below
        model, loading = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    _head(model)
    missing = sorted(loading["missing_keys"])
    if missing:
        kind = names[0] if names else "model"
        known = " or ".join(cls.__name__ for cls in HEADS)
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{name} holds a {kind} without {few}; expected a fine-tuned {known}")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no warning of transformers inside the block."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_names(options: dict[str, object]) -> None:
    for name in options:
        if name not in OPTIONS:
            named = (*OPTIONS, "n_experts", "expert_size", "n_shared", "routing")
            hint = ELSEWHERE.get(name) or nearest(name, named)
            raise TypeError(f"to_moebert has no argument '{name}'; {hint}")


def _head(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The MoEBERT class with the model's head."""
    if type(model) not in HEADS:
        reason = encoder_layouts.WHY_NOT.get(getattr(model.config, "model_type", None), "")
        known = ", ".join(cls.__name__ for cls in HEADS)
        kind = type(model).__name__ + (f" ({reason})" if reason else "")
        raise ValueError(f"cannot convert a {kind}; supported: {known}")
    return HEADS[type(model)]


def _config(model: PreTrainedModel, **changes: object) -> PreTrainedConfig:
    """The dense model's configuration, with the experts' values on top."""
    left_out = ("model_type", "architectures")
    kept = {k: v for k, v in model.config.to_dict().items() if k not in left_out}
    return HEADS[type(model)].config_class(**kept, **changes)


def _check_gate_start(gate_start: str, routing: str) -> None:
    if gate_start not in ("random", "experts"):
        hint = "a gate fitted to the nearest experts needs data: fit_gates of routing_analysis"
        raise ValueError(f"gate_start={gate_start!r}: expected 'random' or 'experts'; {hint}")
    if gate_start == "experts" and not routing.startswith("gate-"):
        raise ValueError(
            f"gate_start='experts' needs a gate, and routing='{routing}' has none; "
            "expected gate-token or gate-sentence"
        )


@torch.no_grad()
def _fill_layer(layer: MoEOutput, old: encoder_layouts.FFN, neurons: Tensor) -> None:
    """Copy the dense layer's neurons, output bias and LayerNorm into each expert."""
    up, down = old.up, old.down
    neurons = neurons.to(up.weight.device)
    layer.neurons.copy_(neurons)
    layer.experts.set_neurons(
        up.weight[neurons],  # (E, K, D)
        up.bias[neurons],  # (E, K)
        down.weight.T[neurons].mT,  # (E, D, K)
    )
    layer.experts.down_proj_bias.copy_(down.bias.expand_as(layer.experts.down_proj_bias))
    layer.LayerNorm.weight.copy_(old.norm.weight.expand_as(layer.LayerNorm.weight))
    layer.LayerNorm.bias.copy_(old.norm.bias.expand_as(layer.LayerNorm.bias))


@torch.no_grad()
def _set_routers(student: nn.Module, *, seed: int, token_frequencies: Tensor | None) -> None:
    config, layers = student.config, moe_layers(student)
    generator = torch.Generator().manual_seed(seed)
    clusters = None
    if config.routing == "hash-cluster":
        words = student.get_input_embeddings().weight
        clusters = clustered_table(words, config.n_experts, seed=seed)  # the same in all layers
    for index, layer in enumerate(layers):
        if isinstance(layer.router, HashRouter):
            table = clusters
            if table is None:
                own_seed = seed * len(layers) + index
                table = _hash_table(config, token_frequencies, seed=own_seed)
            layer.router.tid2eid.copy_(table[:, None])
        else:
            weight = layer.router.gate.weight
            drawn = torch.randn(weight.shape, generator=generator) * config.initializer_range
            weight.copy_(drawn)


def _hash_table(config: PreTrainedConfig, frequencies: Tensor | None, *, seed: int) -> Tensor:
    if config.routing == "hash-random":
        return random_table(config.vocab_size, config.n_experts, seed=seed)
    if frequencies is None or len(frequencies) != config.vocab_size:
        given = "none" if frequencies is None else len(frequencies)
        raise ValueError(
            "routing='hash-balance' needs token_frequencies, one count for each of the "
            f"{config.vocab_size} vocabulary ids, not {given}"
        )
    return balanced_table(frequencies, config.n_experts, seed=seed)
