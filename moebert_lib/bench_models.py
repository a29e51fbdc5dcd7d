"""What is timed: models of random weights, and sentences like those of real tasks."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from moebert_lib.modeling import MoEBertConfig, MoEBertForSequenceClassification
from moebert_lib.released import as_released
from moebert_lib.routing import random_table

#: BERT-base, the model of Fig. 4.
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
#: Two small layers: for tests.
TINY_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}
VOCAB = BertConfig().vocab_size
#: Names that are asked for elsewhere too.
LIMIT, RELEASE = "equal FLOPs", "release style"


def models(
    shape: dict[str, int], *, seed: int = 0, only: tuple[str, ...] = ()
) -> dict[str, nn.Module]:
    """The variants of Fig. 4, the limit and the release's layers; eval mode, random weights.

    ``dense`` is BERT; ``half depth`` is DistilBERT (every other layer gone); ``equal FLOPs`` is
    BERT with an FFN as narrow as one expert, which no MoE of one active expert can beat by
    routing alone; the ``moebert`` ones have 4 experts of a quarter, with a random hash table in
    each layer or with a gate; ``release style`` is a copy of the first, computed as released.

    Args:
        shape: BERT's sizes.
        seed: Of the weights.
        only: Names of those to build; all by default.
    """
    torch.manual_seed(seed)
    width = shape["intermediate_size"]
    narrow = {**shape, "intermediate_size": width // 4}
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: _bert(shape),
        LIMIT: lambda: _bert(narrow),
        "half depth": lambda: _distilbert(shape),
        "moebert hash-random": lambda: moebert(shape),
        "moebert gate-sentence": lambda: moebert(shape, routing="gate-sentence"),
    }
    built = {n: _shaken(make()) for n, make in makers.items() if not only or n in only}
    if not only or RELEASE in only:
        built[RELEASE] = as_released(built.get("moebert hash-random") or _shaken(moebert(shape)))
    return built


@torch.no_grad()
def _shaken(model: nn.Module) -> nn.Module:
    """In eval mode, with LayerNorms and biases that differ: else a mix-up would not show."""
    for name, values in model.named_parameters():
        if values.dim() == 1 or "LayerNorm" in name or "bias" in name:
            values.add_(0.1 * torch.randn_like(values))
    return model.eval()


def _bert(shape: dict[str, int]) -> nn.Module:
    return BertForSequenceClassification(BertConfig(**shape))


def _distilbert(shape: dict[str, int]) -> nn.Module:
    config = DistilBertConfig(
        vocab_size=shape.get("vocab_size", VOCAB),
        dim=shape["hidden_size"],
        n_layers=max(shape["num_hidden_layers"] // 2, 1),
        n_heads=shape["num_attention_heads"],
        hidden_dim=shape["intermediate_size"],
    )
    return DistilBertForSequenceClassification(config)


def moebert(
    shape: dict[str, int],
    *,
    routing: str = "hash-random",
    n_experts: int = 4,
    expert_size: int | None = None,
) -> MoEBertForSequenceClassification:
    """A MoEBERT of random weights; its experts share the FFN's width unless a size is given."""
    size = expert_size or shape["intermediate_size"] // n_experts
    config = MoEBertConfig(
        **shape, n_experts=n_experts, expert_size=size, n_shared=0, routing=routing
    )
    model = MoEBertForSequenceClassification(config).eval()
    if routing == "hash-random":
        for index, layer in enumerate(model.bert.encoder.layer):
            table = random_table(config.vocab_size, n_experts, seed=index)
            layer.output.router.tid2eid.copy_(table.view(-1, 1))
    return model


def zipf(vocab: int, *, n: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """``n`` sentences of ``length`` tokens, as unevenly frequent as words: ``input_ids``.

    The r-th token of the vocabulary comes with a frequency proportional to 1/r (Zipf's law);
    token 0, BERT's padding, does not come.
    """
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, vocab, dtype=torch.float64)
    ids = torch.multinomial(frequencies, n * length, replacement=True, generator=generator)
    return {"input_ids": 1 + ids.view(n, length)}


def glue_like(vocab: int, *, n: int = 32, longest: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """A padded batch with lengths spread like GLUE's: most are short, a few are long.

    Lengths are evenly spaced quantiles of a log-normal distribution: at 32 sentences their mean
    is 40 of the 128 tokens of the longest. Other lengths scale with ``longest``.

    Returns:
        ``input_ids`` and ``attention_mask``, ``(n, longest)``.
    """
    ids = zipf(vocab, n=n, length=longest, seed=seed)["input_ids"]
    spread = 0.635
    steps = norm.ppf((np.arange(n) + 0.5) / n)
    lengths = np.round(longest * np.exp(spread * (steps - steps[-1]))).clip(min=3)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(longest) < torch.tensor(lengths)[order, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
