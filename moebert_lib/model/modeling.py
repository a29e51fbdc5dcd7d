"""MoEBERT as a transformers model: an encoder whose feed-forward layers are experts.

A layer runs transformers' own code up to the attention output; then ``moe_layer.MoEOutput`` takes
the place of the feed-forward network. Saving, loading, pipelines and ``Trainer`` therefore work
unchanged, and ``AutoModel``, ``AutoModelForSequenceClassification`` and
``AutoModelForQuestionAnswering`` find the model once ``moebert_lib`` is imported.

The classes of all families are here; they differ in names only.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ElectraConfig,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraModel,
    MPNetConfig,
    MPNetForQuestionAnswering,
    MPNetForSequenceClassification,
    MPNetModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.distilbert.modeling_distilbert import TransformerBlock
from transformers.models.electra.modeling_electra import ElectraLayer
from transformers.models.mpnet.modeling_mpnet import MPNetLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.utils.generic import can_return_tuple

from moebert_lib.config.settings import check_remedies, check_top_k
from moebert_lib.method.encoder_layouts import family
from moebert_lib.method.routing import ALL_ROUTINGS, HashRouter, random_table
from moebert_lib.model.moe_layer import Experts, MoEOutput, RoutingCall, moe_layers


@dataclass(repr=False, eq=False, kw_only=True)
class ExpertsConfig:
    """How FFNs became experts; a mix-in before a family's configuration.

    Attributes:
        n_experts: Experts per layer ``E``.
        num_experts_per_tok: Of these, how many serve each token; more than one behind a gate only.
        expert_size: Neurons in each expert ``K``.
        n_shared: Neurons that every expert of a layer started with.
        shared_neurons: ``copied``, a set for each expert that training moves apart (as the
            release), or ``tied``, one set for all.
        routing: ``hash-random``, ``hash-balance``, ``hash-cluster``, ``gate-token`` or
            ``gate-sentence``.
        expert_layer_norm: ``per-expert`` (as the release) or ``shared``.
        gate_scaling: where a gate's probability multiplies, ``inside`` the residual as in
            Eq. 2, or ``outside`` it after LayerNorm, as the release does.
        router_aux_loss_coef: Weight of the gates' load-balance loss in ``loss``.
        padding_in_balance: Count padding in that loss, as the release does.
        balance_over: Whether that loss is a mean over ``tokens`` or over ``sentences``.
        gate_noise: Standard deviation of the noise on a gate's logits while it is trained.
        gate_capacity: While it is trained, tokens that an expert takes over the mean load; None:
            any number.
        gate_assignment: While it is trained, ``argmax`` or ``balanced``, all experts the same.
    """

    keys_to_ignore_at_inference = ["aux_loss"]

    n_experts: int = 4
    num_experts_per_tok: int = 1
    expert_size: int = 768
    n_shared: int = 512
    shared_neurons: str = "copied"
    routing: str = "hash-random"
    expert_layer_norm: str = "per-expert"
    gate_scaling: str = "inside"
    router_aux_loss_coef: float | int = 0.01
    padding_in_balance: bool = False
    balance_over: str = "tokens"
    gate_noise: float | int = 0.0
    gate_capacity: float | int | None = None
    gate_assignment: str = "argmax"

    def __post_init__(self, **kwargs):
        _one_of("routing", self.routing, ALL_ROUTINGS)
        check_top_k("num_experts_per_tok", self.num_experts_per_tok, self)
        _one_of("balance_over", self.balance_over, ("tokens", "sentences"))
        _one_of("gate_assignment", self.gate_assignment, ("argmax", "balanced"))
        check_remedies(self, top_k=self.num_experts_per_tok)
        _one_of("shared_neurons", self.shared_neurons, ("copied", "tied"))
        _one_of("expert_layer_norm", self.expert_layer_norm, ("per-expert", "shared"))
        _one_of("gate_scaling", self.gate_scaling, ("inside", "outside"))
        super().__post_init__(**kwargs)


@strict
class MoEBertConfig(ExpertsConfig, BertConfig):
    """BERT's configuration plus that of the experts, :class:`ExpertsConfig`."""

    model_type = "moebert"


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


def _with_signature_of(dense: type[PreTrainedModel], forward: Callable) -> Callable:
    @functools.wraps(forward)
    def same(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    same.__signature__ = inspect.signature(dense.forward)
    return same


class MoEPreTrainedModel(PreTrainedModel):
    """Common to all MoEBERT models; a mix-in before transformers' classes."""

    def __init_subclass__(cls, **kwargs):
        """Give ``forward`` the dense class's signature, which ``Trainer`` reads."""
        super().__init_subclass__(**kwargs)
        for dense in cls.__bases__:
            if issubclass(dense, PreTrainedModel) and not issubclass(dense, MoEPreTrainedModel):
                cls.forward = _with_signature_of(dense, cls.forward)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers caches the answer on the class, and a dense BERT built earlier in the
        # process would hand down its "no" by inheritance
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # grouped_mm, transformers' default, has no float64; the loop works in every dtype and
        # is as fast on a CPU. On a GPU: model.set_experts_implementation("grouped_mm").
        return super().get_correct_experts_implementation(requested_experts or "eager")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            for name, values in module.named_parameters():
                if name.endswith("bias"):
                    init.zeros_(values)
                else:
                    init.normal_(values, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, HashRouter):
            table = random_table(self.config.vocab_size, self.config.n_experts, seed=0)
            init.copy_(module.tid2eid, table[:, None])
        elif isinstance(module, MoEOutput):
            init.zeros_(module.neurons)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """As transformers', and hash tables get the new size too.

        Tables are cut, or new ids are given experts by the routing's own rule: at random, evenly,
        or by the nearest cluster. Same ids get the same experts on every machine.
        """
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        rule = (embeddings.weight, self.config.routing, self.config.n_experts)
        for index, layer in enumerate(moe_layers(self)):
            if isinstance(layer.router, HashRouter):
                layer.router.resize(*rule, seed=index)
        return embeddings

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        function = kwargs.get("gradient_checkpointing_func", args[0] if args else checkpoint)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if enable and reentrant and self.config.routing.startswith("gate"):
            raise ValueError(
                "reentrant gradient checkpointing would lose the gradient of the gates' "
                "load-balance loss; expected gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        super()._set_gradient_checkpointing(enable, *args, **kwargs)


class RoutedLayer:
    """A layer of an encoder with experts for its feed-forward half; a mix-in before BERT's layer.

    The dense layer's own code runs up to the attention output, which goes to the experts together
    with the call (``moe_layer.RoutingCall``). RoBERTa's and ELECTRA's layers are alike.
    """

    def forward(self, hidden_states, *args, routing_call=None, **kwargs):
        """As the dense layer's; ``routing_call`` holds what routers need."""
        attention_output = super().forward(hidden_states, *args, **kwargs)
        return self.output(attention_output, routing_call or RoutingCall())

    def feed_forward_chunk(self, attention_output):
        """The dense layer's feed-forward half, which is left out here."""
        return attention_output


class MoEEncoder(MoEPreTrainedModel):
    """An encoder with experts for feed-forward layers; a mix-in before the dense class.

    Attributes:
        routed_layer: Class of its layers, a subclass of the dense layer's.
    """

    routed_layer: type[nn.Module]

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        if config.chunk_size_feed_forward:
            raise ValueError("chunk_size_feed_forward must be 0: chunks would lose their token ids")
        super().__init__(config, *args, **kwargs)
        row = family(config.model_type.removeprefix("moe"))
        for layer in row.layers_of(self):
            setattr(layer, row.bypassed, nn.Identity())  # its parameters go
            setattr(layer, row.replaced, MoEOutput(config))
            layer.__class__ = self.routed_layer
        self._no_split_modules = [*(self._no_split_modules or ()), self.routed_layer.__name__]
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, *args, **kwargs):
        """As the dense encoder's; a head may pass a ``RoutingCall`` in place of the mask."""
        call = RoutingCall.of(attention_mask)
        call.input_ids = input_ids
        return super().forward(input_ids, call.mask, *args, routing_call=call, **kwargs)


class MoEHead(MoEPreTrainedModel):
    """A dense model's head with an encoder of class :attr:`encoder`; a mix-in before the head."""

    encoder: type[MoEEncoder]
    output_class: type[ModelOutput]

    def __init__(self, config: PreTrainedConfig):
        checkpointing = getattr(config, "gradient_checkpointing", False)  # of older versions
        super().__init__(config)  # head and dense encoder, as transformers builds them
        if checkpointing:
            config.gradient_checkpointing = True  # the dense encoder has consumed it
        unpooled = getattr(self.base_model, "pooler", ()) is None
        options = {"add_pooling_layer": False} if unpooled else {}
        setattr(self, self.base_model_prefix, self.encoder(config, **options))
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, *args, **kwargs) -> ModelOutput:
        """As the dense model's, with ``aux_loss``, whose weighted part is in ``loss``."""
        # Dense heads hand the mask to their encoder as it is, so the call takes its place.
        call = RoutingCall(mask=attention_mask)
        output = super().forward(input_ids, call, *args, **kwargs, return_dict=True)
        aux_loss = call.take_balance()
        if aux_loss is not None and output.loss is not None:
            output.loss = output.loss + self.config.router_aux_loss_coef * aux_loss
        at_inference = output.loss is None and not self.training
        return self.output_class(**output, aux_loss=None if at_inference else aux_loss)


@dataclass
class MoEBertSequenceClassifierOutput(SequenceClassifierOutput):
    """``SequenceClassifierOutput`` plus ``aux_loss``, the gates' load balance summed over layers.

    ``aux_loss`` is ``None`` for hash routing, and at inference: in eval mode without labels. When
    labels are given, ``loss`` includes it with weight ``router_aux_loss_coef``.
    """

    aux_loss: Tensor | None = None


@dataclass
class MoEBertQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """``QuestionAnsweringModelOutput`` plus ``aux_loss``, as for sequence classification."""

    aux_loss: Tensor | None = None


class MoEClassifier(MoEHead):
    """A head that classifies sentences."""

    output_class = MoEBertSequenceClassifierOutput


class MoESpans(MoEHead):
    """A head that answers with a span."""

    output_class = MoEBertQuestionAnsweringOutput


#: Dense class to the MoEBERT class with the same head.
HEADS: dict[type[PreTrainedModel], type[MoEHead]] = {}


def register(
    config: type[PreTrainedConfig],
    encoder: type[MoEEncoder],
    classifier: type[MoEClassifier],
    spans: type[MoESpans],
) -> None:
    """Make a family's classes known to transformers' ``Auto`` classes."""
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, encoder)
    AutoModelForQuestionAnswering.register(config, spans)
    AutoModelForSequenceClassification.register(config, classifier)
    HEADS.update({head.__bases__[1]: head for head in (classifier, spans)})


class MoEBertLayer(RoutedLayer, BertLayer):
    """``BertLayer`` with experts for its feed-forward half."""


class MoEBertModel(MoEEncoder, BertModel):
    """``BertModel`` with experts for feed-forward layers."""

    config_class, routed_layer = MoEBertConfig, MoEBertLayer


class MoEBertForSequenceClassification(MoEClassifier, BertForSequenceClassification):
    """``BertForSequenceClassification`` with experts for feed-forward layers."""

    config_class, encoder = MoEBertConfig, MoEBertModel


class MoEBertForQuestionAnswering(MoESpans, BertForQuestionAnswering):
    """``BertForQuestionAnswering`` with experts for feed-forward layers."""

    config_class, encoder = MoEBertConfig, MoEBertModel


register(MoEBertConfig, MoEBertModel, MoEBertForSequenceClassification, MoEBertForQuestionAnswering)


# MoEBERTs of the other families: RoBERTa, ELECTRA, MPNet and DistilBERT.
# Each has four classes with names, as BERT's in ``modeling``, which does the work.


@strict
class MoERobertaConfig(ExpertsConfig, RobertaConfig):
    """RoBERTa's configuration plus that of the experts."""

    model_type = "moeroberta"


class MoERobertaLayer(RoutedLayer, RobertaLayer):
    """``RobertaLayer`` with experts for its feed-forward half."""


class MoERobertaModel(MoEEncoder, RobertaModel):
    """``RobertaModel`` with experts for feed-forward layers."""

    config_class, routed_layer = MoERobertaConfig, MoERobertaLayer


class MoERobertaForSequenceClassification(MoEClassifier, RobertaForSequenceClassification):
    """``RobertaForSequenceClassification`` with experts for feed-forward layers."""

    config_class, encoder = MoERobertaConfig, MoERobertaModel


class MoERobertaForQuestionAnswering(MoESpans, RobertaForQuestionAnswering):
    """``RobertaForQuestionAnswering`` with experts for feed-forward layers."""

    config_class, encoder = MoERobertaConfig, MoERobertaModel


@strict
class MoEElectraConfig(ExpertsConfig, ElectraConfig):
    """ELECTRA's configuration plus that of the experts."""

    model_type = "moeelectra"


class MoEElectraLayer(RoutedLayer, ElectraLayer):
    """``ElectraLayer`` with experts for its feed-forward half."""


class MoEElectraModel(MoEEncoder, ElectraModel):
    """``ElectraModel`` with experts for feed-forward layers."""

    config_class, routed_layer = MoEElectraConfig, MoEElectraLayer


class MoEElectraForSequenceClassification(MoEClassifier, ElectraForSequenceClassification):
    """``ElectraForSequenceClassification`` with experts for feed-forward layers."""

    config_class, encoder = MoEElectraConfig, MoEElectraModel


class MoEElectraForQuestionAnswering(MoESpans, ElectraForQuestionAnswering):
    """``ElectraForQuestionAnswering`` with experts for feed-forward layers."""

    config_class, encoder = MoEElectraConfig, MoEElectraModel


@strict
class MoEMPNetConfig(ExpertsConfig, MPNetConfig):
    """MPNet's configuration plus that of the experts."""

    model_type = "moempnet"


class MoEMPNetLayer(MPNetLayer):
    """``MPNetLayer`` with experts for its feed-forward half."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_bias=None,
        output_attentions=False,
        *,
        routing_call=None,
    ):
        """As the dense layer's; ``routing_call`` holds what routers need."""
        attention_output, *maps = self.attention(
            hidden_states,
            attention_mask,
            position_bias=position_bias,
            output_attentions=output_attentions,
        )
        return self.output(attention_output, routing_call or RoutingCall()), *maps


class RoutedMPNetModel(MPNetModel):
    """``MPNetModel``, whose encoder is given the call too: the dense class drops it."""

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        *,
        routing_call=None,
        **kwargs,
    ):
        """As the dense model's; ``routing_call`` holds what routers need."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        usual = (self.config.output_attentions, self.config.output_hidden_states)
        asked = (output_attentions, output_hidden_states)
        wanted = [
            default if value is None else value for default, value in zip(usual, asked, strict=True)
        ]
        embedded = self.embeddings(input_ids, position_ids, inputs_embeds)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=embedded, attention_mask=attention_mask
        )
        encoded = self.encoder(embedded, mask, *wanted, return_dict=True, routing_call=routing_call)
        last = encoded.last_hidden_state
        pooled = None if self.pooler is None else self.pooler(last)
        return BaseModelOutputWithPooling(last, pooled, encoded.hidden_states, encoded.attentions)

    forward = _with_signature_of(MPNetModel, forward)


class MoEMPNetModel(MoEEncoder, RoutedMPNetModel):
    """``MPNetModel`` with experts for feed-forward layers."""

    config_class, routed_layer = MoEMPNetConfig, MoEMPNetLayer


class MoEMPNetForSequenceClassification(MoEClassifier, MPNetForSequenceClassification):
    """``MPNetForSequenceClassification`` with experts for feed-forward layers."""

    config_class, encoder = MoEMPNetConfig, MoEMPNetModel


class MoEMPNetForQuestionAnswering(MoESpans, MPNetForQuestionAnswering):
    """``MPNetForQuestionAnswering`` with experts for feed-forward layers."""

    config_class, encoder = MoEMPNetConfig, MoEMPNetModel


@strict
class MoEDistilBertConfig(ExpertsConfig, DistilBertConfig):
    """DistilBERT's configuration plus that of the experts; BERT's names are understood."""

    model_type = "moedistilbert"
    attribute_map: ClassVar = {
        **DistilBertConfig.attribute_map,
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
    }
    layer_norm_eps: float = 1e-12  # fixed in DistilBERT's code


class MoEDistilBertLayer(TransformerBlock):
    """DistilBERT's layer with experts in the place of its last LayerNorm."""

    def forward(self, hidden_states, attention_mask=None, *, routing_call=None, **kwargs):
        """As the dense layer's; ``routing_call`` holds what routers need."""
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        attention_output = self.sa_layer_norm(attended + hidden_states)
        return self.output_layer_norm(attention_output, routing_call or RoutingCall())


class MoEDistilBertModel(MoEEncoder, DistilBertModel):
    """``DistilBertModel`` with experts for feed-forward layers."""

    config_class, routed_layer = MoEDistilBertConfig, MoEDistilBertLayer


class MoEDistilBertForSequenceClassification(MoEClassifier, DistilBertForSequenceClassification):
    """``DistilBertForSequenceClassification`` with experts for feed-forward layers."""

    config_class, encoder = MoEDistilBertConfig, MoEDistilBertModel


class MoEDistilBertForQuestionAnswering(MoESpans, DistilBertForQuestionAnswering):
    """``DistilBertForQuestionAnswering`` with experts for feed-forward layers."""

    config_class, encoder = MoEDistilBertConfig, MoEDistilBertModel


register(
    MoERobertaConfig,
    MoERobertaModel,
    MoERobertaForSequenceClassification,
    MoERobertaForQuestionAnswering,
)
register(
    MoEElectraConfig,
    MoEElectraModel,
    MoEElectraForSequenceClassification,
    MoEElectraForQuestionAnswering,
)
register(
    MoEMPNetConfig,
    MoEMPNetModel,
    MoEMPNetForSequenceClassification,
    MoEMPNetForQuestionAnswering,
)
register(
    MoEDistilBertConfig,
    MoEDistilBertModel,
    MoEDistilBertForSequenceClassification,
    MoEDistilBertForQuestionAnswering,
)
