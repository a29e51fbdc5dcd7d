"""Eq. 4 beside other ways to score a neuron, all by one function.

With activation ``h_tj`` of neuron ``j`` at token ``t``, column ``w1_j`` of W1 and row ``w2_j`` of
W2, :data:`SCORES` says what each score is. Three of them differentiate the loss and share one
backward; two only look at activations and share one forward pass; two need no example. Padding
counts in none, except where a span head's loss counts it (``importance``).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from moebert_lib.config.errors import nearest
from moebert_lib.data.batching import without_targets
from moebert_lib.method.encoder_layouts import FFN, watching
from moebert_lib.method.importance import (
    Flow,
    Importance,
    ffn_digest,
    frozen,
    of_eq4,
    score_batch,
    scored_ffns,
    sum_over_examples,
    token_sum,
)
from moebert_lib.method.partition import random_ranking

#: Name of a score to what it is, and whose.
SCORES = {
    "importance": "sum over examples of |w1 . dL/dw1 + w2 . dL/dw2| (the paper's Eq. 4)",
    "taylor": "sum over examples of |sum_t h dL/dh|, Eq. 4's second term alone "
    "(first-order Taylor: Molchanov et al. 2017, Michel et al. 2019)",
    "fisher": "sum over examples of (sum_t h dL/dh)^2, the diagonal of the Fisher information "
    "of a mask on neurons (Kwon et al. 2022)",
    "activation": "sum over tokens of |h|",
    "wanda": "|w2|_1 times the root of sum_t h^2: Wanda's score of a weight, added up over the "
    "weights that leave the neuron (Sun et al. 2024)",
    "weight": "|w1|_2 |w2|_2, no example needed",
    "random": "drawn with a seed, the control",
}
_BY_LOSS: dict[str, Callable[[Flow], Tensor]] = {
    "importance": of_eq4,
    "taylor": lambda flow: flow.sum_tokens(flow.h * flow.grad_h).abs(),
    "fisher": lambda flow: flow.sum_tokens(flow.h * flow.grad_h).double().square(),
}
_BY_ACTIVATION = {"activation": torch.abs, "wanda": torch.square}


def ffn_scores(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    kind: str,
    *,
    seed: int = 0,
    meta: dict | None = None,
) -> Importance:
    """Score every feed-forward neuron of a fine-tuned encoder in one of several ways.

    The result serves wherever Eq. 4's does. The model is used in eval mode and given back as it
    was.

    Args:
        model: As for :func:`importance.ffn_importance`.
        batches: As there. ``weight`` and ``random`` do not look at them, ``activation`` and
            ``wanda`` not at their labels.
        kind: A name of :data:`SCORES`.
        seed: Of ``random``.
        meta: Stored with the result, beside the digest of the weights and ``score``, the kind.

    Returns:
        Scores ``(L, F)``, float64, on the CPU; higher is to be kept first. With blocks of
        examples where the score is a sum over examples: not for ``wanda``, ``weight`` and
        ``random``.

    Raises:
        ValueError: unknown ``kind``, or as ``ffn_importance``.
        TypeError: as there.

    Source: :data:`SCORES` names each.
    """
    if kind not in SCORES:
        raise ValueError(f"unknown score {kind!r}; {nearest(kind, SCORES)}")
    return _scored(model, batches, [kind], seed, meta)[kind]


def every_score(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    seed: int = 0,
    meta: dict | None = None,
) -> dict[str, Importance]:
    """:func:`ffn_scores` of all kinds, with one backward and one further forward a batch.

    Arguments and errors are those of :func:`ffn_scores`.
    """
    return _scored(model, batches, list(SCORES), seed, meta)


def magnitudes(layers: list[FFN]) -> Tensor:
    """``|w1_j| |w2_j|`` of every neuron, ``(L, F)``, float64."""
    rows = []
    for layer in layers:
        up = layer.up.weight.detach().double()  # (F, D)
        down = layer.down.weight.detach().double()  # (D, F)
        rows.append((up.norm(dim=1) * down.norm(dim=0)).cpu())
    return torch.stack(rows)


def _scored(
    model: nn.Module, batches: Iterable, kinds: list[str], seed: int, meta: dict | None
) -> dict[str, Importance]:
    layers = scored_ffns(model)
    by_loss = {kind: score for kind, score in _BY_LOSS.items() if kind in kinds}
    by_activation = {kind: term for kind, term in _BY_ACTIVATION.items() if kind in kinds}

    def of_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        from_loss = score_batch(model, batch, by_loss) if by_loss else {}
        from_h = _score_activations(model, batch, by_activation) if by_activation else {}
        return from_loss | from_h

    scores = {}
    if by_loss or by_activation:
        with frozen(model):
            scores = sum_over_examples(model, batches, of_batch)
    if "wanda" in kinds:
        leaving = [layer.down.weight.detach().double().norm(1, dim=0) for layer in layers]
        scores["wanda"] = _no_sum(torch.stack(leaving).cpu() * scores["wanda"].scores.sqrt())
    if "weight" in kinds:
        scores["weight"] = _no_sum(magnitudes(layers))
    if "random" in kinds:
        width = layers[0].up.out_features
        scores["random"] = _no_sum(random_ranking(len(layers), width, seed=seed).double())
    meta = {**(meta or {}), "ffn": ffn_digest(model)}
    return {kind: replace(scores[kind], meta={**meta, "score": kind}) for kind in kinds}


def _no_sum(scores: Tensor) -> Importance:
    """Scores that are not sums over examples: without blocks."""
    return Importance(scores, scores.new_zeros(0, *scores.shape), torch.zeros(0).long())


def _score_activations(
    model: nn.Module, batch: dict[str, Tensor], terms: Mapping[str, Callable[[Tensor], Tensor]]
) -> dict[str, Tensor]:
    """For each example the sums over its real tokens of ``terms`` of ``h``, ``(L, B, F)`` each."""
    encoder, inputs = getattr(model, "base_model", model), without_targets(batch)
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    sum_tokens = token_sum(model, inputs)
    rows = {kind: [] for kind in terms}

    def add(_layer: int, h: Tensor) -> None:
        padded = h.shape[:2] == mask.shape  # not so in an accelerated model
        for kind, term in terms.items():
            values = term(h) * mask[..., None] if padded else term(h)
            rows[kind].append(sum_tokens(values))

    # an accelerated model computes all tokens of its last layer only if it is asked for states
    all_tokens = {"output_hidden_states": True} if hasattr(encoder, "token_sum") else {}
    with watching(encoder, add), torch.inference_mode():
        encoder(**inputs, **all_tokens)
    return {kind: torch.stack(of_layers) for kind, of_layers in rows.items()}
