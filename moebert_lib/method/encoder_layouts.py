"""Encoder layouts: which encoders can be converted, and the names of their parts, in one table.

All encoders in :data:`FAMILIES` compute ``LN(W2 act(W1 a + b1) + b2 + a)`` (Eq. 1 with residual
and LayerNorm) and differ in names only. ModernBERT does not: its feed-forward layer is gated, so a
neuron is two columns and a row, and no LayerNorm follows. Such layers are not described here yet.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moebert_lib.config.errors import UserError
from moebert_lib.config.presets import BASE, MINILM, MPNET, SHAPES, TINY, Shape
from moebert_lib.config.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

# torch takes seconds to import; a refusal should not wait for it.


class FFN(NamedTuple):
    """A dense feed-forward network, taken apart."""

    up: "nn.Linear"  #: W1 and b1 of Eq. 1: weight ``(F, D)``
    act: "nn.Module"  #: its output is the activation ``h``, ``(..., F)``
    down: "nn.Linear"  #: W2 and b2: weight ``(D, F)``
    norm: "nn.LayerNorm"  #: after the residual


class Attention(NamedTuple):
    """Where a layer has the parts of its attention, as paths below the layer."""

    module: str  #: it has the size of a head, and the dropout of probabilities
    query: str
    key: str
    value: str
    output: str
    norm: str  #: after the residual
    dropout: str  #: of the output; empty where there is none


#: BERT's, RoBERTa's and ELECTRA's.
SELF_ATTENTION = Attention(
    "attention.self",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "attention.output.dropout",
)


@dataclass(frozen=True)
class Family:
    """One kind of encoder.

    Attributes:
        model_type: transformers' name of the dense configuration; a MoEBERT's is ``moe`` and this.
        name: As people write it.
        layers: Where the encoder has its list of layers.
        parts: Where a layer has the parts of an :class:`FFN`.
        attention: Where it has those of its attention.
        bypassed: The part of a layer that does nothing any more once experts are in place.
        replaced: The part of a layer that the experts replace; it is called after ``bypassed``.
        config: Configuration names, by BERT's, where they are others.
        dropout: Configuration names of all dropout rates.
    """

    model_type: str
    name: str
    layers: str = "encoder.layer"
    parts: FFN = FFN("intermediate.dense", "intermediate", "output.dense", "output.LayerNorm")
    attention: Attention = SELF_ATTENTION
    bypassed: str = "intermediate"
    replaced: str = "output"
    config: dict[str, str] = field(default_factory=dict)
    dropout: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")

    def key(self, bert_name: str) -> str:
        """The name of a configuration's value that BERT calls ``bert_name``."""
        return self.config.get(bert_name, bert_name)

    def layers_of(self, encoder: "nn.Module") -> "nn.ModuleList":
        """The layers of an encoder without head, first to last."""
        return at(encoder, self.layers)

    def stack_of(self, encoder: "nn.Module") -> "nn.Module":
        """The part of an encoder that calls its layers."""
        return at(encoder, self.layers.rpartition(".")[0])

    @property
    def normed_last(self) -> bool:
        """Whether the experts replace a LayerNorm of ``ffn(a) + a``, as in DistilBERT."""
        return self.replaced == self.parts.norm


FAMILIES = {
    family.model_type: family
    for family in (
        Family("bert", "BERT, MiniLM"),
        Family("roberta", "RoBERTa"),
        Family("electra", "ELECTRA"),
        Family(
            "mpnet",
            "MPNet",
            attention=Attention(
                "attention.attn",
                "attention.attn.q",
                "attention.attn.k",
                "attention.attn.v",
                "attention.attn.o",
                "attention.LayerNorm",
                "attention.dropout",
            ),
        ),
        Family(
            "distilbert",
            "DistilBERT",
            layers="transformer.layer",
            parts=FFN("ffn.lin1", "ffn.activation", "ffn.lin2", "output_layer_norm"),
            attention=Attention(
                "attention",
                "attention.q_lin",
                "attention.k_lin",
                "attention.v_lin",
                "attention.out_lin",
                "sa_layer_norm",
                "",
            ),
            bypassed="ffn",
            replaced="output_layer_norm",
            config={
                "num_hidden_layers": "n_layers",
                "hidden_size": "dim",
                "intermediate_size": "hidden_dim",
                "num_attention_heads": "n_heads",
            },
            dropout=("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"),
        ),
    )
}

#: Why a family is refused, where there is more to say than that it is none of these.
WHY_NOT = {
    "modernbert": "its feed-forward layer is gated, and gated layers are not described here yet",
}


def supported() -> str:
    """The families' names in a line."""
    return ", ".join(family.name for family in FAMILIES.values())


def family(model_type: str | None) -> Family:
    """The row of a dense model, by the ``model_type`` of its configuration.

    Raises:
        ValueError: it is not in the table.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = f" ({WHY_NOT[model_type]})" if model_type in WHY_NOT else ""
    raise ValueError(
        f"a model of type '{model_type}' cannot be converted{reason}; supported: {supported()}"
    )


def width(config: Any) -> int:
    """Neurons ``F`` of a dense feed-forward layer, by the model's configuration."""
    return getattr(config, family(config.model_type).key("intermediate_size"))


def shape(model: str) -> Shape:
    """Sizes of a model that the scales name, or of an encoder in a folder or the hub's cache.

    BERT-base's for any other name: nothing is downloaded to find out.
    """
    if model in SHAPES:
        return SHAPES[model]
    names = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    try:
        config = json.loads(_config_file(model).read_text("utf-8"))
        encoder = family(config["model_type"])
        return Shape(*(config[encoder.key(name)] for name in names))
    except (OSError, ValueError, KeyError, TypeError):  # no such folder, or no such model
        return SHAPES[BASE]


def _config_file(model: str) -> Path:
    """A model's ``config.json``, in a folder or in the hub's cache."""
    in_folder = Path(model).expanduser() / "config.json"
    if in_folder.is_file():
        return in_folder
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json")
    return Path(cached) if isinstance(cached, str) else in_folder


def parameters(sizes: Shape, *, n_experts: int = 0, expert_size: int = 0) -> tuple[int, int]:
    """Parameters that a token uses, and those stored, without a head; by formula.

    Args:
        sizes: Of the dense model.
        n_experts: 0 for a dense model.
        expert_size: Neurons of an expert. Each expert has its own LayerNorm.
    """
    D, neurons = sizes.hidden, expert_size if n_experts else sizes.neurons
    embeddings = (sizes.vocabulary + sizes.positions + 2) * D + 2 * D
    pooler = D * D + D
    attention = 4 * (D * D + D) + 2 * D
    expert = 2 * D * neurons + neurons + D + 2 * D  # with LayerNorm
    rest = embeddings + pooler + sizes.layers * attention
    return rest + sizes.layers * expert, rest + sizes.layers * expert * max(n_experts, 1)


def check(settings: Settings) -> None:
    """Refuse a model that cannot be had, is of no known family, or too narrow for experts.

    Raises:
        UserError: naming the model and what was expected.
    """
    folder = Path(settings.model).expanduser()
    if not folder.is_dir():
        if not settings.offline or settings.model in (MINILM, MPNET, TINY):
            return
        if settings.model in SHAPES:
            raise UserError(
                f"model '{settings.model}' comes from the hub, scale {settings.scale} "
                "is offline; take --scale small, or name a folder"
            )
        raise UserError(
            f"no folder '{settings.model}', and scale {settings.scale} is offline; "
            "name a folder that holds a saved BERT"
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no readable config.json; expected a saved BERT") from None
    try:
        settings.fit(config[family(config.get("model_type")).key("intermediate_size")])
    except ValueError as error:
        raise UserError(str(error)) from None


def ffn(layer: "nn.Module") -> FFN | None:
    """A layer's dense feed-forward network; ``None`` where a module has none."""
    for row in FAMILIES.values():
        parts = [at(layer, path) for path in row.parts]
        if None not in parts:
            return FFN(*parts)
    return None


def ffns(model: "nn.Module") -> Iterator[FFN]:
    """The dense feed-forward networks of a model of any of the families, first to last.

    Raises:
        ValueError: its configuration names another family, whose layers may have the same names
            and compute something else.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is not None:
        family(kind.removeprefix("moe"))  # of a MoEBERT there are none
    return (layer for module in model.modules() if (layer := ffn(module)))


def longest(model: "nn.Module") -> int:
    """Tokens that an encoder, with or without head, takes at most.

    RoBERTa and MPNet count positions from the one after their padding's, so they have fewer than
    embeddings.
    """
    positions = model.base_model.embeddings.position_embeddings
    first = 0 if positions.padding_idx is None else positions.padding_idx + 1
    return positions.num_embeddings - first


def set_dropout(model: "nn.Module", rate: float) -> None:
    """Give every dropout of a dense model or a MoEBERT the same rate, 0 to 1, in place."""
    from torch import nn

    for name in family(model.config.model_type.removeprefix("moe")).dropout:
        setattr(model.config, name, rate)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


@contextmanager
def watching(model: "nn.Module", see: "Callable[[int, Tensor], None]") -> Iterator[None]:
    """Inside the block every forward pass calls ``see(layer, h)`` with each layer's activations.

    Args:
        model: Of any of the families.
        see: Given the layer, counted from 0, and Eq. 1's ``h``, ``(..., F)``.
    """
    hooks = [
        layer.act.register_forward_hook(lambda _m, _i, h, n=n: see(n, h))
        for n, layer in enumerate(ffns(model))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def at(module: Any, path: str) -> Any:
    """The part of a module at a path of names; None where there is none."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
