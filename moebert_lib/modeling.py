"""MoEBERT as a transformers model: BERT whose feed-forward layers are experts.

``BertLayer`` computes ``output(intermediate(x), x)``. With the identity at ``intermediate``
and ``moe_layer.MoEOutput`` at ``output`` the FFN is replaced at one seam, and every other line
that runs is transformers' own. Saving, loading, pipelines and ``Trainer`` therefore work
unchanged, and ``AutoModel``, ``AutoModelForSequenceClassification`` and
``AutoModelForQuestionAnswering`` find the model once ``moebert_lib`` is imported.
"""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from moebert_lib.moe_layer import Experts, MoEOutput, RoutingContext
from moebert_lib.routing import ALL_ROUTINGS, HashRouter, RandomHash
from moebert_lib.sizes import check_top_k


@strict
class MoEBertConfig(BertConfig):
    """BERT's configuration plus how its FFNs became experts.

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
    """

    model_type = "moebert"
    keys_to_ignore_at_inference = ["aux_loss"]

    n_experts: int = 4
    num_experts_per_tok: int = 1
    expert_size: int = 768
    n_shared: int = 512
    shared_neurons: str = "copied"
    routing: str = "hash-random"
    expert_layer_norm: str = "per-expert"
    gate_scaling: str = "inside"
    router_aux_loss_coef: float = 0.01
    padding_in_balance: bool = False

    def __post_init__(self, **kwargs):
        _one_of("routing", self.routing, ALL_ROUTINGS)
        check_top_k("num_experts_per_tok", self.num_experts_per_tok, self)
        _one_of("shared_neurons", self.shared_neurons, ("copied", "tied"))
        _one_of("expert_layer_norm", self.expert_layer_norm, ("per-expert", "shared"))
        _one_of("gate_scaling", self.gate_scaling, ("inside", "outside"))
        super().__post_init__(**kwargs)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


class MoEBertPreTrainedModel(PreTrainedModel):
    """What all MoEBERT models have in common; mixed in before transformers' BERT classes."""

    config_class = MoEBertConfig

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers caches its answer on the class, and a dense BERT built earlier in the
        # process would pass on its "no" by inheritance
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # grouped_mm, transformers' default, has no float64; the loop works in every dtype and
        # costs the same on a CPU. On a GPU: model.set_experts_implementation("grouped_mm").
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
            fresh = RandomHash(self.config.vocab_size, self.config.n_experts)
            init.copy_(module.tid2eid, fresh.tid2eid)
        elif isinstance(module, MoEOutput):
            init.zeros_(module.neurons)

    def _with_aux_loss(self, output: ModelOutput, kind: type[ModelOutput]) -> ModelOutput:
        """A head's output as ``kind``, with ``aux_loss``, and its weighted part in ``loss``."""
        balance_losses = self.base_model.context.balance_losses
        aux_loss = sum(balance_losses) if balance_losses else None
        balance_losses.clear()
        if aux_loss is not None and output.loss is not None:
            output.loss = output.loss + self.config.router_aux_loss_coef * aux_loss
        return kind(**output, aux_loss=aux_loss)


class MoEBertModel(MoEBertPreTrainedModel, BertModel):
    """``BertModel`` with experts for feed-forward layers."""

    def __init__(self, config: MoEBertConfig, add_pooling_layer: bool = True):
        if config.chunk_size_feed_forward:
            raise ValueError("chunk_size_feed_forward must be 0: chunks would lose their token ids")
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.context = RoutingContext()
        for layer in self.encoder.layer:
            layer.intermediate = nn.Identity()
            layer.output = MoEOutput(config, self.context)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """As ``BertModel.forward``; token ids and mask are handed to the routers."""
        self.context.input_ids = input_ids
        self.context.mask = attention_mask
        self.context.balance_losses.clear()
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@dataclass
class MoEBertSequenceClassifierOutput(SequenceClassifierOutput):
    """``SequenceClassifierOutput`` plus ``aux_loss``, the gates' load balance summed over layers.

    ``aux_loss`` is ``None`` for hash routing. When labels are given, ``loss`` includes it
    with weight ``router_aux_loss_coef``.
    """

    aux_loss: Tensor | None = None


class MoEBertForSequenceClassification(MoEBertPreTrainedModel, BertForSequenceClassification):
    """``BertForSequenceClassification`` with experts for feed-forward layers."""

    def __init__(self, config: MoEBertConfig):
        # past BertForSequenceClassification's own constructor, which would build a dense BERT
        super(BertForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.bert = MoEBertModel(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs
    ) -> MoEBertSequenceClassifierOutput:
        """As ``BertForSequenceClassification.forward``; ``labels`` may be absent."""
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            labels=labels, **kwargs,
        )  # fmt: skip
        return self._with_aux_loss(output, MoEBertSequenceClassifierOutput)


@dataclass
class MoEBertQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """``QuestionAnsweringModelOutput`` plus ``aux_loss``, as for sequence classification."""

    aux_loss: Tensor | None = None


class MoEBertForQuestionAnswering(MoEBertPreTrainedModel, BertForQuestionAnswering):
    """``BertForQuestionAnswering`` with experts for feed-forward layers."""

    def __init__(self, config: MoEBertConfig):
        super(BertForQuestionAnswering, self).__init__(config)  # as above
        self.num_labels = config.num_labels
        self.bert = MoEBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, start_positions=None,
        end_positions=None, **kwargs,
    ) -> MoEBertQuestionAnsweringOutput:  # fmt: skip
        """As ``BertForQuestionAnswering.forward``; the positions may be absent."""
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            start_positions=start_positions, end_positions=end_positions, **kwargs,
        )  # fmt: skip
        return self._with_aux_loss(output, MoEBertQuestionAnsweringOutput)


AutoConfig.register("moebert", MoEBertConfig)
AutoModel.register(MoEBertConfig, MoEBertModel)
AutoModelForQuestionAnswering.register(MoEBertConfig, MoEBertForQuestionAnswering)
AutoModelForSequenceClassification.register(MoEBertConfig, MoEBertForSequenceClassification)
