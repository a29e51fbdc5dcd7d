"""Tiny BERTs with any head, MoEBERTs of them, and batches of every kind for them.

Every parameter is moved off its start: experts that share biases or LayerNorms, as they do
after conversion, would hide one that is taken for another.
"""

import torch
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from moebert_lib.method.partition import random_ranking
from moebert_lib.model.conversion import to_moebert

SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def perturbed(model, *, seed=0):
    """The model with noise on every parameter, in eval mode."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in model.parameters():
            values += 0.2 * torch.randn(values.shape, generator=noise)
    return model.eval()


def dense(kind=BertForSequenceClassification, *, dtype=torch.float64, **config):
    """A BERT of class ``kind``."""
    return perturbed(kind(BertConfig(**{**SIZES, **config}))).to(dtype)


def moebert(*, spans=False, dtype=torch.float64, config=None, **changes):
    """A MoEBERT of 4 experts with 16 neurons, 8 of them shared; hash-random unless changed."""
    kind = BertForQuestionAnswering if spans else BertForSequenceClassification
    options = {"routing": "hash-random", "token_frequencies": torch.arange(99), **changes}
    model = to_moebert(
        dense(kind, **(config or {})),
        random_ranking(2, 64, seed=0),
        n_experts=4,
        expert_size=16,
        n_shared=8,
        **options,
    )
    return perturbed(model, seed=1).to(dtype)


def batch(lengths, *, longest=None, seed=0):
    """``input_ids`` and ``attention_mask`` of sentences of these lengths; token 0 pads."""
    noise = torch.Generator().manual_seed(seed)
    mask = (torch.arange(longest or max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return dict(
        input_ids=torch.randint(1, 99, mask.shape, generator=noise) * mask, attention_mask=mask
    )


def batches():
    """Name to inputs that are packed: all the shapes a batch comes in."""
    padded = batch([7, 12, 3, 7, 12])
    ids, mask = padded["input_ids"], padded["attention_mask"]
    types = (torch.arange(12) > 4).long().expand(5, 12)
    holes = mask * (torch.arange(12) != 2) * (torch.arange(12) != torch.arange(5)[:, None] + 1)
    return {
        "padded": padded,
        "more padding than any needs": batch([4, 2], longest=9),
        "unpadded": batch([6, 6, 6]),
        "one sentence": batch([9]),
        "one token": batch([1]),
        "single tokens": batch([1, 1, 1], longest=4),
        "a single token among others": batch([5, 1, 3]),
        "more tokens than positions": batch([11] * 5 + [12] * 3),
        "sentence pairs": {**padded, "token_type_ids": types},
        "no mask": {"input_ids": ids},
        "a boolean mask": {"input_ids": ids, "attention_mask": mask.bool()},
        "a mask of floats": {"input_ids": ids, "attention_mask": mask.float()},
        "holes in the mask": {"input_ids": ids, "attention_mask": holes},
    }


def real(inputs):
    """Where the real tokens are, ``(B, T)``, boolean."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]).bool() if mask is None else mask.bool()


def packed_by_hand(padded, mask):
    """Real tokens' rows, shortest sentence first, those of one length as they came."""
    order = sorted(range(len(mask)), key=lambda i: int(mask[i].sum()))
    return torch.cat([padded[i][mask[i]] for i in order])


def with_labels(model, inputs, *, seed=0):
    """The inputs and random labels of the kind that the model's head takes."""
    noise = torch.Generator().manual_seed(seed)
    mask, name = real(inputs), type(model).__name__
    if name.endswith("Model"):
        return inputs
    if "QuestionAnswering" in name:
        drawn = (torch.rand(len(mask), generator=noise) * mask.shape[1]).long()
        return {**inputs, "start_positions": drawn // 2, "end_positions": drawn}
    shape = mask.shape if "Token" in name or "LM" in name else mask.shape[:1]
    labels = torch.randint(2, shape, generator=noise)
    return {**inputs, "labels": labels.masked_fill(~mask, -100) if labels.dim() == 2 else labels}
