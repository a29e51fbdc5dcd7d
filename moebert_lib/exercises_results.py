"""Exercises of notebooks 6 to 8: what runs can say, what one expert buys, what a file holds.

Each function takes the reader's function of the same name and tries it on cases: some worked
by hand, which tell the answer from the mistakes that come to mind first, then random ones held
to the library or to a slow loop.
"""

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moebert_lib import intervals, release, stability
from moebert_lib.evaluate import score
from moebert_lib.exercises import Attempt, Case, attempt, noise
from moebert_lib.modeling import MoEBertConfig, MoEBertModel
from moebert_lib.moe_layer import moe_layers, parameter_counts

SEEDS = range(3)


def f1(mine: Callable) -> Attempt:
    """Notebook 6: F1 of class 1. Arrays ``(truth, said)`` of 0 and 1, ``(n,)``, to a number."""
    cases = [
        Case((np.array([1, 1, 1, 0, 0, 0]), np.array([1, 0, 0, 1, 0, 0])), 0.4),
        Case((np.array([0, 1, 0]), np.array([0, 0, 0])), 0.0),  # nothing found: 0, not 0 / 0
        Case((np.array([0, 0]), np.array([0, 0])), 0.0),  # nothing to find either
    ]
    for draw in map(np.random.default_rng, SEEDS):
        truth, said = draw.integers(2, size=(2, 30))
        cases.append(Case((truth, said), score(said, truth, ["f1"])["f1"]))
    return attempt(mine, cases)


def sign_flip(mine: Callable) -> Attempt:
    """Notebook 6: p of the two-sided sign-flip test. Differences ``(n,)`` to a number."""
    cases = [
        Case((np.array([1.0, 2.0]),), 0.5),  # sums 3, 1, -1, -3: two of four as far from zero
        Case((np.array([-1.0, -2.0, -4.0]),), 0.25),  # negative ones are as far
        Case((np.array([3.0, -1.0, -1.0]),), 1.0),  # a sum of 1, and none is closer to zero
        Case((np.array([0.1, 0.2, 0.3, -0.1]),), 0.375),  # equal sums differ in the last bit
    ]
    for draw in map(np.random.default_rng, SEEDS):
        gaps = draw.normal(0.5, size=6)
        cases.append(Case((gaps,), intervals.permutation_p(gaps)))
    return attempt(mine, cases)


def holm(mine: Callable) -> Attempt:
    """Notebook 6: Holm's correction. p-values ``(m,)`` in any order to ``(m,)`` in that order."""
    cases = [
        Case((np.array([0.2, 0.01]),), [0.2, 0.02]),
        Case((np.array([0.03, 0.01, 0.04]),), [0.06, 0.03, 0.06]),  # 0.04 stays behind 0.06
        Case((np.array([0.6, 0.9]),), [1.0, 1.0]),  # no p above 1
    ]
    for draw in map(np.random.default_rng, SEEDS):
        p = draw.uniform(size=8) ** 3
        cases.append(Case((p,), intervals.holm(p)))
    return attempt(mine, cases)


def layer_parameters(mine: Callable) -> Attempt:
    """Notebook 7: ``(D, K, N)`` to ``(used, stored)``, parameters of a layer's experts.

    Each of ``N`` experts has two matrices, two biases and a LayerNorm; no gate.
    """
    cases = [Case((2, 3, 4), (21, 84))]  # 6 + 3, 6 + 2, and 2 + 2 of the LayerNorm
    for D, K, N in ((8, 5, 1), (8, 4, 2), (16, 12, 4)):
        small = {"hidden_size": D, "num_attention_heads": 2, "num_hidden_layers": 1}
        size = {"intermediate_size": N * K, "expert_size": K, "n_shared": 0, "n_experts": N}
        model = MoEBertModel(MoEBertConfig(vocab_size=9, **small, **size))
        stored = sum(p.numel() for p in moe_layers(model)[0].parameters())
        idle = parameter_counts(model).stored - parameter_counts(model).effective
        cases.append(Case((D, K, N), (stored - idle, stored)))
    return attempt(mine, cases)


def speedup(mine: Callable) -> Attempt:
    """Notebook 7: seconds ``(dense, other)``, each ``(rounds,)`` in turns, to times as fast."""
    cases = [
        Case((np.array([2.0, 2.0, 2.0]), np.array([1.0, 1.0, 1.0])), 2.0),
        # ratios 2, 2/3 and 3; the medians are equal, the means 6 and 3.7
        Case((np.array([2.0, 4.0, 12.0]), np.array([1.0, 6.0, 4.0])), 2.0),
    ]
    for draw in map(np.random.default_rng, SEEDS):
        dense, other = draw.uniform(1, 3, size=(2, 11))
        ratios = sorted(a / b for a, b in zip(dense, other, strict=True))
        cases.append(Case((dense, other), ratios[5]))
    return attempt(mine, cases)


def longest(mine: Callable) -> Attempt:
    """Notebook 7: ``(D, F, N, gain)`` to the longest sentence whose limit is still ``gain``."""

    def limit(D: int, F: int, N: int, T: int) -> float:
        attention, ffn = 4 * D * D + 2 * T * D, 2 * D * F
        return (attention + ffn) / (attention + ffn / N)

    cases = [Case((2, 12, 4, 1.5), 11)]  # at T = 11 the limit is 108 / 72
    for shape in ((768, 3072, 4, 1.5), (768, 3072, 8, 1.3), (64, 300, 2, 1.25)):
        *sizes, gain = shape
        enough = (T for T in range(1, 10_000) if limit(*sizes, T + 1) < gain)
        cases.append(Case(shape, next(enough)))
    return attempt(mine, cases)


def leak(mine: Callable) -> Attempt:
    """Notebook 8: ``(training, development, n)``, both ``(F,)``, to a number.

    By how much the ``n`` neurons chosen on development look better there, in the mean, than
    the ``n`` chosen on training.
    """
    training, development = torch.tensor([4.0, 3, 2, 1]), torch.tensor([0.0, 2, 1, 3])
    cases = [Case((training, development, 2), 1.5), Case((training, development, 4), 0.0)]
    for seed in SEEDS:
        training, development = noise(2, 40, seed=seed)
        left, right = (
            sorted(range(40), key=one.__getitem__)[-10:] for one in (training, development)
        )
        gap = sum(development[i] for i in right) - sum(development[i] for i in left)
        cases.append(Case((training, development, 10), gap / 10))
    return attempt(mine, cases)


def own_order(mine: Callable) -> Attempt:
    """Notebook 8: a layer of a release's file, ``(scores, neurons)``, to scores by neuron.

    All are ``(F,)``: scores from high to low, the neuron that each belongs to, and the result,
    whose entry ``j`` is the score of neuron ``j``.
    """
    cases = [Case((torch.tensor([9.0, 5, 1]), torch.tensor([1, 2, 0])), [1, 9, 5])]
    for seed in SEEDS:
        scores = noise(12, seed=seed).abs().sort(descending=True).values.double()
        neurons = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        cases.append(Case((scores, neurons), _as_read(scores, neurons)))
    return attempt(mine, cases)


def jaccard(mine: Callable) -> Attempt:
    """Notebook 8: ``(left, right, top)``, scores ``(F,)`` of one layer each, to a number."""
    left, right = torch.tensor([6.0, 5, 4, 3, 2, 1]), torch.tensor([6.0, 1, 5, 2, 4, 3])
    cases = [Case((left, right, 2), 1 / 3), Case((left, right, 3), 0.5), Case((left, left, 2), 1.0)]
    for seed in SEEDS:
        left, right = noise(2, 30, seed=seed)
        cases.append(Case((left, right, 12), stability.jaccard(left[None], right[None], 12)))
    return attempt(mine, cases)


def _as_read(scores: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    """What the library reads out of a file of one layer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "importance_one.pkl"
        content = {"importance": [scores.tolist()], "idx": [neurons.tolist()]}
        path.write_bytes(pickle.dumps(content))
        return release.read(path).scores[0]
