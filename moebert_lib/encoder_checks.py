"""Every family of ``adapters`` held to the same equalities, on small random models."""

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moebert_lib import checks
from moebert_lib.adapters import FAMILIES, family
from moebert_lib.convert import to_moebert
from moebert_lib.encoders import HEADS
from moebert_lib.importance import ffn_importance
from moebert_lib.moe_layer import parameter_counts

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}


@torch.no_grad()
def tiny(kind: type[PreTrainedModel], *, seed: int = 0, **config: object) -> PreTrainedModel:
    """A random model of a dense class: float64, eval mode, no bias 0 and no LayerNorm the identity.

    Args:
        kind: Such as ``RobertaForSequenceClassification``; its FFNs have 64 neurons.
        seed: Of its weights.
        config: Further values of its configuration.
    """
    row = family(kind.config_class.model_type)
    sizes = {row.key(name): size for name, size in SIZES.items()}
    model = kind(kind.config_class(**{**sizes, **config})).double().eval()
    noise = torch.Generator().manual_seed(seed)
    for name, values in model.named_parameters():
        centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        values.copy_(centre + 0.2 * torch.randn(values.shape, generator=noise))
    return model


def batch(model: PreTrainedModel, *, n: int = 4, length: int = 10, seed: int = 0) -> dict:
    """A padded batch with what the model's head is asked; row ``i`` lacks ``i % 4`` tokens."""
    noise = torch.Generator().manual_seed(seed)
    mask = (torch.arange(length) < length - torch.arange(n)[:, None] % 4).long()
    ids = torch.randint(3, model.config.vocab_size, mask.shape, generator=noise)
    inputs = {
        "input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id),
        "attention_mask": mask,
    }
    drawn: Tensor = torch.randint(2, (n,), generator=noise)
    if hasattr(model, "qa_outputs"):
        return {**inputs, "start_positions": drawn, "end_positions": drawn + 2}
    return {**inputs, "labels": drawn}


def table() -> pd.DataFrame:
    """Each family's classifier, converted: largest differences of two equalities, and parameters.

    Returns:
        One row a family: ``encoder``, ``one expert - dense`` of logits, ``scores - slow loop``
        over all neurons, and parameters of the dense model and of 4 experts of 16 neurons.

    Raises:
        AssertionError: an equality does not hold.
    """
    rows = []
    for kind in [kind for kind in HEADS if kind.__name__.endswith("SequenceClassification")]:
        dense = tiny(kind)
        inputs = batch(dense)
        scores = ffn_importance(dense, [inputs])
        one, four = (to_moebert(dense, scores, n_experts=n, n_shared=n // 4 * 8) for n in (1, 4))
        counts = parameter_counts(four)
        rows.append(
            {
                "encoder": FAMILIES[dense.config.model_type].name,
                "one expert - dense": checks.one_expert_is_dense(dense, one, inputs).difference,
                "scores - slow loop": checks.importance_equals_slow_loop(
                    ffn_importance, dense, inputs
                ).difference,
                "dense": parameter_counts(dense).stored,
                "effective": counts.effective,
                "stored": counts.stored,
            }
        )
    return pd.DataFrame(rows)
