"""What a model's routers did: loads of the experts, a gate's probabilities, a sentence's way."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moebert_lib.evaluate import predict
from moebert_lib.moe_layer import record_routes
from moebert_lib.routing import loads


def expert_loads(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> np.ndarray:
    """Share of the real tokens that each expert serves; padding is left out.

    Args:
        model: A MoEBERT model.
        batches: From ``data.batches``.

    Returns:
        Shape ``(L, E)``; rows sum to 1.
    """
    layers, mask = _routes(model, batches)
    n_experts = model.config.n_experts
    shares = [loads(torch.cat([r.experts for r in layer]), n_experts, mask) for layer in layers]
    return torch.stack(shares).cpu().numpy()


def mean_factor(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """Eq. 3's ``p`` of the chosen expert averaged over real tokens and layers; 1 for a hash.

    Of several experts it is the sum.
    """
    layers, mask = _routes(model, batches)
    factors = [
        torch.cat([route.weights for route in layer])[mask].sum(1).mean() for layer in layers
    ]
    return float(torch.stack(factors).mean())


def factors(models: Iterable[nn.Module], batches: Iterable[dict[str, Tensor]]) -> pd.DataFrame:
    """:func:`mean_factor` of each model, as column ``p``."""
    batches = list(batches)
    return pd.DataFrame({"p": [mean_factor(model, batches) for model in models]})


def count(models: Mapping[str, nn.Module], batches: Iterable[dict[str, Tensor]]) -> pd.DataFrame:
    """:func:`expert_loads` of each model, as :func:`load_frame`'s rows."""
    batches = list(batches)
    return load_frame({name: expert_loads(model, batches) for name, model in models.items()})


def _routes(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> tuple[list, Tensor]:
    batches = list(batches)
    with record_routes(model) as layers:
        predict(model, batches)
    return layers, torch.cat([batch["attention_mask"].flatten() for batch in batches]).bool()


class Ways(NamedTuple):
    """A sentence's way through several models."""

    tokens: list[str]  #: the ``T`` tokens; words that the vocabulary lacks stand in pieces
    experts: dict[str, np.ndarray]  #: model's name to the expert of each token, ``(T, L)``
    cut: bool  #: whether the sentence was longer than the models read


@torch.inference_mode()
def sentence_ways(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    max_length: int = 512,
) -> Ways:
    """The expert of each of a sentence's tokens in each layer; one pass through each model.

    Args:
        models: By name, MoEBERT models with one vocabulary.
        tokenizer: Theirs.
        text: The sentence.
        max_length: Tokens that are read; what is longer is cut.
    """
    inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
    cut = any(encoding.overflowing for encoding in inputs.encodings or ())
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    experts = {}
    for name, model in models.items():
        with record_routes(model) as layers:
            model.eval().base_model(**inputs.to(next(model.parameters()).device))
        experts[name] = (
            torch.cat([layer[0].experts[:, :1] for layer in layers], dim=1).cpu().numpy()
        )
    return Ways(tokens, experts, cut)


def follow(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_length: int,
) -> pd.DataFrame:
    """:func:`sentence_ways`, as :func:`way_frame`'s rows."""
    way = sentence_ways(models, tokenizer, text, max_length=max_length)
    return way_frame(way.tokens, way.experts)


def load_frame(shares: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Loads by router as one row per ``router``, ``layer`` and ``expert``, counted from 1."""
    rows = [
        (router, layer + 1, expert + 1, float(share))
        for router, table in shares.items()
        for (layer, expert), share in np.ndenumerate(table)
    ]
    return pd.DataFrame(rows, columns=["router", "layer", "expert", "share"])


def shares(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Loads by router, ``(L, E)``, from :func:`load_frame`'s rows."""
    return {
        router: rows.pivot(index="layer", columns="expert", values="share").to_numpy()
        for router, rows in frame.groupby("router", sort=False)
    }


def way_frame(tokens: Sequence[str], ways: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Ways by router as one row per ``router``, ``layer`` and token, counted from 1."""
    rows = [
        (router, layer + 1, place + 1, tokens[place], int(expert) + 1)
        for router, experts in ways.items()
        for (place, layer), expert in np.ndenumerate(experts)
    ]
    return pd.DataFrame(rows, columns=["router", "layer", "position", "token", "expert"])


def ways(frame: pd.DataFrame) -> tuple[list[str], dict[str, np.ndarray]]:
    """The tokens, and ways by router, ``(T, L)``, from :func:`way_frame`'s rows."""
    parts = frame.groupby("router", sort=False)
    experts = {
        router: rows.pivot(index="position", columns="layer", values="expert").to_numpy() - 1
        for router, rows in parts
    }
    first = frame[frame["router"] == frame["router"].iloc[0]].drop_duplicates("position")
    return first.sort_values("position")["token"].tolist(), experts


def busiest(shares: Mapping[str, np.ndarray]) -> pd.Series:
    """Load of the busiest expert over the mean load, in each router's least even layer."""
    return pd.Series({name: float((t.max(1) / t.mean(1)).max()) for name, t in shares.items()})
