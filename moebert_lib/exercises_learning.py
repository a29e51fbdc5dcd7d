"""Cases of the exercises of notebooks 3, 4 and 5: distillation, comparisons, routing."""

from collections.abc import Callable

import torch

from moebert_lib.distill import layer_distances, prediction_loss
from moebert_lib.exercises import Attempt, Case, attempt, noise
from moebert_lib.experts import deal_neurons
from moebert_lib.routing import SentenceGate, balanced_table, loads


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
