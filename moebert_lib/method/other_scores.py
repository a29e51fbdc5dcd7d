"""Eq. 4 beside other ways to score a neuron, all by one function.

With activation ``h_tj`` of neuron ``j`` at token ``t``, column ``w1_j`` of W1 and row ``w2_j`` of
W2, :data:`SCORES` says what each score is. Three of them differentiate the loss and share one
backward; two only look at activations and share one forward pass; two need no example. Padding
counts in none, except where a span head's loss counts it (``importance``).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from moebert_lib.config.errors import nearest
from moebert_lib.data.batching import without_targets
from moebert_lib.method.encoder_layouts import FFN, watching
from moebert_lib.method.importance import (
    Importance,
    batch_flows,
    by_example,
    fast_eval,
    ffn_digest,
    frozen,
    packing_of,
    scored_ffns,
    summed,
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
_BY_LOSS = {
    "importance": lambda through_a, through_h: (through_a + through_h).abs(),
    "taylor": lambda _, through_h: through_h.abs(),
    "fisher": lambda _, through_h: through_h.double().square(),
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
    found = []
    for layer in layers:
        up, down = layer.up.weight, layer.down.weight  # (F, D), (D, F)
        found.append((up.detach().double().norm(dim=1) * down.detach().double().norm(dim=0)).cpu())
    return torch.stack(found)


def _scored(
    model: nn.Module, batches: Iterable, kinds: list[str], seed: int, meta: dict | None
) -> dict[str, Importance]:
    layers = scored_ffns(model)
    by_loss, by_activation = (
        {kind: term for kind, term in terms.items() if kind in kinds}
        for terms in (_BY_LOSS, _BY_ACTIVATION)
    )
    found = {}
    if by_loss or by_activation:
        with frozen(model):
            fast = fast_eval(model)
            encoder = fast_eval(getattr(model, "base_model", model))

            def terms(batch: dict[str, Tensor]) -> dict[str, Tensor]:
                flows = batch_flows(fast, batch) if by_loss else ()
                seen = _over_tokens(encoder, batch, by_activation) if by_activation else {}
                return {kind: term(*flows) for kind, term in by_loss.items()} | seen

            found = summed(model, batches, terms)
    meta = {**(meta or {}), "ffn": ffn_digest(model)}
    if "wanda" in kinds:
        leaving = [layer.down.weight.detach().double().norm(1, dim=0) for layer in layers]
        found["wanda"] = _sums(torch.stack(leaving).cpu() * found["wanda"].scores.sqrt())
    if "weight" in kinds:
        found["weight"] = _sums(magnitudes(layers))
    if "random" in kinds:
        width = layers[0].up.out_features
        found["random"] = _sums(random_ranking(len(layers), width, seed=seed).double())
    return {kind: replace(found[kind], meta={**meta, "score": kind}) for kind in kinds}


def _sums(scores: Tensor) -> Importance:
    """Scores that are no sum over examples."""
    return Importance(scores, scores.new_zeros(0, *scores.shape), torch.zeros(0).long())


def _over_tokens(encoder: nn.Module, batch: dict[str, Tensor], terms: Mapping) -> dict[str, Tensor]:
    """For each example the sums over its real tokens of ``terms`` of ``h``, ``(L, B, F)`` each."""
    inputs = without_targets(batch)
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    packing, found = packing_of(encoder, inputs), {kind: [] for kind in terms}

    def add(_layer: int, h: Tensor) -> None:
        padded = h.shape[:2] == mask.shape  # else packed: (1, N, F)
        for kind, term in terms.items():
            each = term(h) * mask[..., None] if padded else term(h)
            found[kind].append(by_example(each, len(mask), packing))

    with watching(encoder, add), torch.inference_mode():
        encoder(**inputs)
    return {kind: torch.stack(each) for kind, each in found.items()}
