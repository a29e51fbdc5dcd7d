"""MoEBERTs of the other families: RoBERTa, ELECTRA and DistilBERT.

Each has four classes with names, as BERT's in ``modeling``, which does the work.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import (
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ElectraConfig,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraModel,
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaModel,
)

from moebert_lib.modeling import (
    HEADS,
    ExpertsConfig,
    MoEClassifier,
    MoEEncoder,
    MoESpans,
    register,
)

__all__ = ["HEADS"]  # complete once this module is imported


@strict
class MoERobertaConfig(ExpertsConfig, RobertaConfig):
    """RoBERTa's configuration plus that of the experts."""

    model_type = "moeroberta"


class MoERobertaModel(MoEEncoder, RobertaModel):
    """``RobertaModel`` with experts for feed-forward layers."""

    config_class = MoERobertaConfig


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


class MoEElectraModel(MoEEncoder, ElectraModel):
    """``ElectraModel`` with experts for feed-forward layers."""

    config_class = MoEElectraConfig


class MoEElectraForSequenceClassification(MoEClassifier, ElectraForSequenceClassification):
    """``ElectraForSequenceClassification`` with experts for feed-forward layers."""

    config_class, encoder = MoEElectraConfig, MoEElectraModel


class MoEElectraForQuestionAnswering(MoESpans, ElectraForQuestionAnswering):
    """``ElectraForQuestionAnswering`` with experts for feed-forward layers."""

    config_class, encoder = MoEElectraConfig, MoEElectraModel


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
    layer_norm_eps: float = 1e-12  # which DistilBERT's own code fixes


class MoEDistilBertModel(MoEEncoder, DistilBertModel):
    """``DistilBertModel`` with experts for feed-forward layers."""

    config_class = MoEDistilBertConfig


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
    MoEDistilBertConfig,
    MoEDistilBertModel,
    MoEDistilBertForSequenceClassification,
    MoEDistilBertForQuestionAnswering,
)
