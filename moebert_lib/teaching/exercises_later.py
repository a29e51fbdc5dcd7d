"""Cases of the exercises of notebooks 3, 4 and 5: distillation, comparisons, routing."""

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moebert_lib.evidence import statistics
from moebert_lib.method import rank_stability, release_files
from moebert_lib.method.distillation_loss import layer_distances, prediction_loss
from moebert_lib.method.partition import deal_neurons
from moebert_lib.method.routing import SentenceGate, balanced_table, loads
from moebert_lib.model.modeling import MoEBertConfig, MoEBertModel
from moebert_lib.model.moe_layer import moe_layers, parameter_counts
from moebert_lib.teaching.exercises import Attempt, Case, attempt, noise
from moebert_lib.training.evaluation import score


def distance_of_a_layer(mine: Callable) -> Attempt:
    """Notebook 3: Eq. 5's term of one layer over real tokens, from ``(X, X_tea, mask)``."""
    X = torch.tensor([[[1.0, 2.0], [0.5, -1.0], [3.0, 3.0]]])
    X_tea = torch.tensor([[[0.5, 2.0], [0.5, 0.0], [0.0, 0.0]]])
    cases = [Case((X, X_tea, torch.tensor([[1, 1, 0]])), 0.3125)]
    for seed in (0, 1):
        own, other = noise(3, 5, 4, seed=seed), noise(3, 5, 4, seed=seed + 10)
        mask = (torch.arange(5) < torch.tensor([[5], [2], [3]])).long()
        cases.append(Case((own, other, mask), layer_distances([own], [other], mask)[0]))
    return attempt(mine, cases)


def distance_of_predictions(mine: Callable) -> Attempt:
    """Notebook 3: Eq. 6 of a batch, from probabilities ``(p, p_tea)``, each ``(B, C)``."""
    p, p_tea = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    cases = [Case((p, p_tea), 0.13732653608351372)]  # 1/8 ln 3
    for seed in (0, 1):
        a, b = noise(4, 3, seed=seed), noise(4, 3, seed=seed + 10)
        cases.append(Case((a.softmax(-1), b.softmax(-1)), prediction_loss(a, b)))
    return attempt(mine, cases)


def objective_of_a_sentence(mine: Callable) -> Attempt:
    """Notebook 3: the whole objective, from ``(p, y, X, p_tea, X_tea, lam)``.

    ``p`` and ``p_tea`` have shape ``(C,)``, ``X`` and ``X_tea`` ``(L + 1, T, D)``.
    """
    even = torch.tensor([0.5, 0.5])
    X = torch.tensor([[[1.0, 0.0]], [[2.0, 2.0]]])  # two states, one token, two dimensions
    agree = Case((even, 0, X, even, X, 2.0), 0.6931471805599453)  # only CE = ln 2 is left
    apart = Case((even, 0, X + 1, even, X, 2.0), 4.693147180559945)  # and 2 x (1 + 1)
    cases = [agree, apart]
    for seed in (0, 1):
        a, b = noise(3, seed=seed), noise(3, seed=seed + 10)
        own, other = noise(4, 5, 2, seed=seed + 20), noise(4, 5, 2, seed=seed + 30)
        hidden = layer_distances(list(own[:, None]), list(other[:, None]), None).sum()
        distill = hidden + prediction_loss(a[None], b[None])
        arguments = (a.softmax(-1), seed, own, b.softmax(-1), other, 5.0)
        cases.append(Case(arguments, 5.0 * distill - a.log_softmax(-1)[seed]))
    return attempt(mine, cases)


def gaps_by_seed(mine: Callable) -> Attempt:
    """Notebook 4: paired differences of two settings, from ``(a, b)``, score by seed of each."""
    return attempt(
        mine,
        [
            Case(({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.75}), [0.25, -0.25]),
            Case(({2: 0.5, 0: 0.75}, {0: 0.25, 2: 0.125}), [0.5, 0.375]),  # kept in another order
            Case(
                ({0: 1.0, 1: 0.5, 3: 0.5}, {3: 0.25, 1: 0.0}), [0.5, 0.25]
            ),  # seed 0 has no partner
        ],
    )


def verdicts_by_chance(mine: Callable) -> Attempt:
    """Notebook 4: verdicts that chance gives, from ``(n, m)``: pairs, and comparisons."""
    return attempt(
        mine,
        [
            Case((1, 1), 1.0),  # a single pair always agrees with itself
            Case((2, 1), 0.5),
            Case((3, 12), 3.0),
            Case((4, 20), 2.5),
        ],
    )


def least_shared(mine: Callable) -> Attempt:
    """Notebook 4: the fewest shared neurons that a layer allows, from ``(F, N, K)``."""
    cases = [
        Case((12, 4, 3), 0),
        Case((20, 3, 4), 0),
        Case((12, 4, 6), 4),
        Case((12, 3, 5), 2),
        Case((10, 1, 10), 0),
    ]
    for F, N, K in ((64, 8, 16), (100, 3, 50), (1536, 4, 768)):
        fits = (s for s in range(K + 1) if _can_be_dealt(F, N, K, s))
        cases.append(Case((F, N, K), next(fits)))
    return attempt(mine, cases)


def _can_be_dealt(F: int, N: int, K: int, s: int) -> bool:
    sizes = dict(n_experts=N, expert_size=K, n_shared=s, allow_identical=True)
    try:
        deal_neurons(torch.arange(F), **sizes)
    except ValueError:
        return False
    return True


def load_of_experts(mine: Callable) -> Attempt:
    """Notebook 5: share of the real tokens of each expert, from ``(experts, mask, N)``."""
    by_hand = Case((torch.tensor([[0, 1, 1, 0]]), torch.tensor([[1, 1, 1, 0]]), 2), [1 / 3, 2 / 3])
    idle = Case((torch.tensor([[0, 0]]), torch.tensor([[1, 1]]), 3), [1.0, 0.0, 0.0])
    cases = [by_hand, idle]
    for seed in (0, 1):
        experts = torch.randint(4, (3, 7), generator=torch.Generator().manual_seed(seed))
        mask = (torch.arange(7) < torch.tensor([[7], [2], [4]])).long()
        cases.append(Case((experts, mask, 4), loads(experts, 4, mask)))
    return attempt(mine, cases)


def way_of_a_sentence(mine: Callable) -> Attempt:
    """Notebook 5: a sentence gate's expert for each sentence, from ``(a, mask, W_g)``.

    ``a`` has shape ``(B, T, D)``, ``mask`` ``(B, T)`` and ``W_g`` ``(D, N)``.
    """
    a = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 9.0]]])
    eye = torch.eye(2)
    cases = [Case((a, torch.tensor([[1, 1, 0]]), eye), torch.tensor([0]))]
    cases += [Case((a, torch.tensor([[1, 1, 1]]), eye), torch.tensor([1]))]
    loud = torch.tensor([[[10.0, 0.0], [0.0, 3.0], [0.0, 3.0]]])  # the mean of choices differs
    cases += [Case((loud, torch.tensor([[1, 1, 1]]), eye), torch.tensor([0]))]
    mask = (torch.arange(6) < torch.tensor([[6], [1], [3], [2]])).long()
    for seed in (0, 1, 2):
        states, gate = noise(4, 6, 3, seed=seed), SentenceGate(3, 5)
        gate.gate.weight.data = noise(5, 3, seed=seed + 10)
        route = gate(states, None, mask).experts.view(4, 6)[:, 0]
        cases.append(Case((states, mask, gate.gate.weight.data.T.clone()), route))
    return attempt(mine, cases)


def balanced_deal(mine: Callable) -> Attempt:
    """Notebook 5: the balanced hash's table, from ``(counts, N)``; every token occurs."""
    cases = [Case((torch.tensor([50, 9, 8, 12, 30, 1]), 2), torch.tensor([0, 1, 0, 1, 1, 1]))]
    for seed, n_experts in ((0, 3), (1, 4)):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
        counts = (order + 1) ** 2  # no two alike
        cases.append(Case((counts, n_experts), balanced_table(counts, n_experts, seed=0)))
    return attempt(mine, cases)


# Exercises of notebooks 6 to 8: what runs can say, what one expert buys, what a file holds.
# Each function takes the reader's function of the same name and tries it on cases: some worked
# by hand, which tell the answer from the mistakes that come to mind first, then random ones held
# to the library or to a slow loop.

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
        cases.append(Case((gaps,), statistics.permutation_p(gaps)))
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
        cases.append(Case((p,), statistics.holm(p)))
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
        cases.append(Case((left, right, 12), rank_stability.jaccard(left[None], right[None], 12)))
    return attempt(mine, cases)


def _as_read(scores: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    """What the library reads out of a file of one layer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "importance_one.pkl"
        content = {"importance": [scores.tolist()], "idx": [neurons.tolist()]}
        path.write_bytes(pickle.dumps(content))
        return release_files.read(path).scores[0]
