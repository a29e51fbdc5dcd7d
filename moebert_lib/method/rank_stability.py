"""How much of a ranking by importance is luck, and how far two rankings agree.

All from the block sums that :class:`Importance` keeps: other examples could have been drawn,
and the blocks say what they would have changed. The teacher is held fixed throughout; what
another fine-tuning would do to the ranking is not known here. Not in the paper.
"""

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moebert_lib.method.importance import Importance


def top_overlap(left: Tensor, right: Tensor, top: int) -> Tensor:
    """Share of the ``top`` neurons of one scoring that the other ranks there too.

    Two random rankings of ``F`` neurons share ``top / F`` on average.

    Args:
        left: Scores, ``(..., F)``.
        right: Scores that broadcast with ``left``.
        top: How many neurons count as top.

    Returns:
        Shape ``(...)``, from 0 to 1.

    Example:
        >>> top_overlap(torch.tensor([4.0, 3, 2, 1]), torch.tensor([4.0, 1, 2, 3]), top=2)
        tensor(0.5000, dtype=torch.float64)
    """

    def best(scores: Tensor) -> Tensor:
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        return chosen.scatter(-1, scores.topk(top).indices, True)

    return (best(left) & best(right)).double().sum(-1) / top


def rank_correlation(left: Tensor, right: Tensor) -> Tensor:
    """Spearman's rho of two scorings, ``(..., F)`` each; shape ``(...)``.

    Equal scores are ranked in the order in which they stand.
    """

    def ranks(scores: Tensor) -> Tensor:
        places = scores.argsort(dim=-1, stable=True).argsort(dim=-1).double()
        return places - places.mean(-1, keepdim=True)

    a, b = ranks(left), ranks(right)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def agreement(importance: Importance, *, n: int = 5, seed: int = 0) -> pd.DataFrame:
    """Rank correlation of scores from two sets of examples that have none in common.

    Args:
        importance: Scores with at least two blocks.
        n: Draws of a pair for each size; draws overlap, so they are no independent repeats.
        seed: Of the draws.

    Returns:
        Columns ``n_examples`` (in each set), ``draw``, ``layer`` (from 1) and ``agreement``.
    """
    M = len(importance.blocks)
    rows = []
    for size in [size for size in (1, 2, 5, 10) if size <= M // 2]:
        pairs = importance.pairs(size, n, seed=seed)  # (n, 2, L, F)
        rho = rank_correlation(pairs[:, 0], pairs[:, 1])  # (n, L)
        n_examples = round(size * importance.n_examples / M)
        rows += [
            {"n_examples": n_examples, "draw": draw, "layer": layer + 1, "agreement": value}
            for draw, layers in enumerate(rho.tolist())
            for layer, value in enumerate(layers)
        ]
    return pd.DataFrame(rows)


def top_again(importance: Importance, top: int, *, n: int = 200, seed: int = 0) -> pd.DataFrame:
    """Share of each layer's top neurons found again when the examples are drawn anew.

    Args:
        importance: Scores; their blocks are resampled with replacement.
        top: How many neurons count as top.
        n: Resamples.
        seed: Of the resampling.

    Returns:
        Columns ``layer`` (from 1), ``overlap`` (mean over resamples, 0 to 1) and the 95%
        percentile interval ``low`` to ``high``.
    """
    found = top_overlap(importance.bootstrap(n, seed=seed), importance.scores, top)  # (n, L)
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    layers = np.arange(1, found.shape[1] + 1)
    mean = found.mean(0).numpy()
    return pd.DataFrame({"layer": layers, "overlap": mean, "low": low, "high": high})


def score_pairs(scores: Mapping[str, Tensor], top: int) -> pd.DataFrame:
    """How far ways to score the same neurons agree, for each pair of them.

    Args:
        scores: Name to ``(L, F)``.
        top: How many neurons count as top.

    Returns:
        Columns ``score``, ``other``, and their mean over layers of :func:`rank_correlation`
        (``rho``) and :func:`top_overlap` (``overlap``). Each pair once, in the order given.
    """
    rows = [
        {
            "score": one,
            "other": other,
            "rho": float(rank_correlation(scores[one], scores[other]).mean()),
            "overlap": float(top_overlap(scores[one], scores[other], top).mean()),
        }
        for one, other in itertools.combinations(scores, 2)
    ]
    return pd.DataFrame(rows)


def jaccard(left: Tensor, right: Tensor, top: int) -> float:
    """Neurons in both top sets over neurons in either, mean over layers. Scores ``(L, F)``."""
    share = top_overlap(left, right, top)
    return float((share / (2 - share)).mean())


def jaccard_table(importances: Mapping[str, Importance], top: int) -> pd.DataFrame:
    """:func:`jaccard` of every pair: square, symmetric, names on both sides."""
    names = list(importances)
    values = [
        [jaccard(one.scores, other.scores, top) for other in importances.values()]
        for one in importances.values()
    ]
    return pd.DataFrame(values, names, names)


def jaccard_halves(importance: Importance, top: int, *, n: int = 5, seed: int = 0) -> float:
    """:func:`jaccard` of two halves of the examples, mean of ``n`` draws: the noise alone."""
    halves = importance.pairs(len(importance.blocks) // 2, n, seed=seed)
    return float(np.mean([jaccard(*pair, top) for pair in halves]))


def jaccard_chance(top: int, width: int) -> float:
    """What two random choices of ``top`` out of ``width`` neurons would share, to first order.

    Example:
        >>> round(jaccard_chance(512, 3072), 3)
        0.091
    """
    return (top / width) / (2 - top / width)
