"""Partition: which neurons each expert gets (Sec. 3.1, Fig. 1), and alternatives by clustering.

A *neuron* of a feed-forward network is a column of W1 with the matching row of W2. The paper
copies the most important neurons to every expert, deals the next ones out in turn, and drops the
rest, so every expert gets some of everything. MoEfication (Zhang et al. 2022) does the opposite: it
puts similar neurons into one expert. Here the same neurons are then grouped, into experts of
exactly one size, so that only their company differs. Functions of tensors and arrays; no model.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROUNDS = 100  # of k-means at most; it settles in about twenty
ROWS = 64  # of gains computed at a time, so that they fit a processor's cache


def deal_neurons(
    ranking: Tensor,
    *,
    n_experts: int,
    expert_size: int,
    n_shared: int,
    allow_identical: bool = False,
) -> Tensor:
    """Deal one layer's neurons out to experts, most important first (Fig. 1).

    Every expert receives the ``n_shared`` top neurons. The following ones are dealt in turn, one
    at a time, so that no expert is left with only weak ones. Neurons after the last full round
    belong to no expert.

    Args:
        ranking: Neuron indices, most important first. Shape ``(F,)``, int64, a permutation
            of ``0 .. F - 1``.
        n_experts: Number of experts ``E``.
        expert_size: Neurons in each expert ``K``.
        n_shared: Top neurons that every expert holds.
        allow_identical: Accept ``n_shared == expert_size`` with several experts, which
            makes them all the same (the right end of Fig. 2c).

    Returns:
        Shape ``(E, K)``, int64: row ``e`` lists the neurons of expert ``e``, shared first.

    Raises:
        ValueError: ``ranking`` is no permutation, a size is out of range, the layer has too
            few neurons to fill every expert, or all experts would be identical.

    Example:
        >>> deal_neurons(torch.tensor([5, 2, 0, 1, 3, 4]),
        ...              n_experts=2, expert_size=3, n_shared=1)
        tensor([[5, 2, 1],
                [5, 0, 3]])
    """
    _check_deal(ranking, n_experts, expert_size, n_shared, allow_identical)
    n_own = expert_size - n_shared
    shared = ranking[:n_shared].expand(n_experts, -1)  # (E, n_shared)
    dealt = ranking[n_shared : n_shared + n_experts * n_own]  # the rest is dropped
    own = dealt.view(n_own, n_experts).T  # (E, n_own), each round gives one to every expert
    return torch.cat([shared, own], dim=1)  # (E, K)


def _check_deal(
    ranking: Tensor, n_experts: int, expert_size: int, n_shared: int, allow_identical: bool
) -> None:
    width = len(ranking)
    if ranking.dim() != 1 or not torch.equal(ranking.sort().values.cpu(), torch.arange(width)):
        raise ValueError(f"ranking must be a permutation of 0..{width - 1}")
    if n_experts < 1 or expert_size < 1:
        raise ValueError(f"n_experts={n_experts} and expert_size={expert_size} must be at least 1")
    if not 0 <= n_shared <= expert_size:
        raise ValueError(f"n_shared={n_shared} must lie in 0..expert_size={expert_size}")
    if n_shared == expert_size and n_experts > 1 and not allow_identical:
        raise ValueError(
            f"n_shared={n_shared} of expert_size={expert_size} makes all {n_experts} experts "
            "identical; pass allow_identical=True if that is meant"
        )
    needed = n_shared + n_experts * (expert_size - n_shared)
    if needed > width:
        largest = (width + (n_experts - 1) * n_shared) // n_experts
        raise ValueError(
            f"{needed} neurons are needed to fill {n_experts} experts, the layer has {width}; "
            f"with n_shared={n_shared} the largest expert_size is {largest}"
        )


def deal_layers(ranking: Tensor, **sizes: int | bool) -> Tensor:
    """:func:`deal_neurons` for every layer: ``(L, F)`` to ``(L, E, K)``."""
    return torch.stack([deal_neurons(layer, **sizes) for layer in ranking])


def random_ranking(n_layers: int, width: int, *, seed: int) -> Tensor:
    """A random order per layer (Fig. 3a, "Random"). Shape ``(L, F)``, int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(width, generator=generator) for _ in range(n_layers)])


def choose_ranking(ranking: Tensor, kind: str, *, seed: int = 0) -> Tensor:
    """The order that a split follows (Fig. 3a).

    Args:
        ranking: Most important first. Shape ``(L, F)``.
        kind: ``importance`` keeps it, ``inverse`` turns it around so that the least important
            neurons are shared, ``random`` replaces it by a random order.
        seed: Of the random order.

    Raises:
        ValueError: unknown ``kind``.
    """
    if kind == "importance":
        return ranking
    if kind == "inverse":
        return ranking.flip(-1)
    if kind == "random":
        return random_ranking(*ranking.shape, seed=seed)
    raise ValueError(f"kind must be importance, random or inverse, not {kind!r}")


class Composition(NamedTuple):
    """How one layer's ``F`` neurons are used; the three counts add up to ``F``."""

    shared: int  #: neurons in every expert
    own: int  #: neurons in some experts but not in all
    dropped: int  #: neurons in no expert


def composition(experts: Tensor, width: int) -> Composition:
    """Count shared, own and dropped neurons of an assignment ``(E, K)``.

    Example:
        >>> composition(torch.tensor([[5, 2, 1], [5, 0, 3]]), width=6)
        Composition(shared=1, own=4, dropped=1)
    """
    holders = torch.zeros(width, dtype=torch.int64)
    for expert in experts.cpu():
        holders[expert.unique()] += 1
    shared = int((holders == len(experts)).sum())
    dropped = int((holders == 0).sum())
    return Composition(shared, width - shared - dropped, dropped)


# Other ways to fill experts: similar neurons together.


def group_neurons(dealt: Tensor, n_shared: int, labels: Tensor) -> Tensor:
    """An assignment with the same neurons, of which those not shared are grouped by ``labels``.

    Args:
        dealt: One layer's neurons by expert, ``(E, K)``, from :func:`deal_neurons`.
        n_shared: Its first columns, which stay.
        labels: Group of each neuron in ``dealt[:, n_shared:].T.flatten()``, that is by
            importance: ``(E * (K - n_shared),)``, each of ``0 .. E - 1`` equally often.

    Returns:
        Shape ``(E, K)``, int64; within an expert by importance.

    Raises:
        ValueError: groups of other sizes.
    """
    E, own = len(dealt), dealt[:, n_shared:].T.flatten()
    sizes = torch.bincount(labels, minlength=E)
    if len(labels) != len(own) or len(sizes) != E or len(set(sizes.tolist())) != 1:
        raise ValueError(f"groups of {sizes.tolist()} neurons; expected {E} of {len(own) // E}")
    grouped = torch.stack([own[labels == expert] for expert in range(E)])
    return torch.cat([dealt[:, :n_shared], grouped], dim=1)


def unit_rows(features: Tensor) -> np.ndarray:
    """Rows of length one, float64, so that only directions count; a row of zeros stays."""
    rows = features.detach().double().cpu().numpy()
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def balanced_kmeans(points: np.ndarray, k: int, *, seed: int) -> Tensor:
    """k-means with clusters of exactly one size.

    Lloyd's two steps, but the first is :func:`balanced_assignment`: of all ways to give every
    centre equally many points, the one with the least sum of squared distances. Neither step
    raises that sum. Starts from k-means++.

    Args:
        points: Shape ``(n, d)``; ``n`` is a multiple of ``k``.
        k: Clusters.
        seed: Of the start.

    Returns:
        Cluster of each point, ``(n,)``, int64.
    """
    if len(points) % k:
        raise ValueError(f"{len(points)} points do not make {k} clusters of one size")
    centres, labels = _spread(points, k, np.random.default_rng(seed)), None
    for _ in range(ROUNDS):
        nearest = balanced_assignment(_squared(points, centres))
        if labels is not None and np.array_equal(nearest, labels):
            break
        labels = nearest
        centres = np.stack([points[labels == cluster].mean(0) for cluster in range(k)])
    return torch.as_tensor(labels)


def balanced_assignment(cost: np.ndarray) -> np.ndarray:
    """The column of each row, every column equally often, with the least total cost.

    scipy's exact solver, each column offered as often as it may be taken.

    Args:
        cost: Shape ``(n, k)``; ``n`` is a multiple of ``k``.

    Returns:
        Shape ``(n,)``, int64.
    """
    n, k = cost.shape
    _, places = linear_sum_assignment(np.repeat(cost, n // k, axis=1))
    return places // (n // k)


def _squared(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances, ``(n, k)``."""
    return (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)


def _spread(points: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is a point, the likelier the further from the former ones."""
    chosen = [int(generator.integers(len(points)))]
    for _ in range(k - 1):
        far = _squared(points, points[chosen]).min(1).clip(min=0)
        share = far / far.sum() if far.sum() > 0 else None
        chosen.append(int(generator.choice(len(points), p=share)))
    return points[chosen]


def coactivation(active: Tensor) -> np.ndarray:
    """The co-activation graph: on how many tokens two neurons are both active.

    Args:
        active: Whether a neuron is, ``(tokens, F)``, bool.

    Returns:
        Symmetric weights ``(F, F)``, float64, zeros on the diagonal.
    """
    seen = active.float().cpu()
    graph = (seen.T @ seen).double().numpy()
    np.fill_diagonal(graph, 0)
    return graph


def partition_graph(graph: np.ndarray, k: int) -> Tensor:
    """Parts of exactly one size with much weight inside them.

    Starts from nodes dealt in turn. Then pairs of nodes change places, those that gain most first,
    until no exchange gains anything (after Kernighan and Lin 1970). A gain below 1e-10 of a
    node's whole weight counts as rounding.

    Args:
        graph: Symmetric weights ``(n, n)`` with a zero diagonal; ``n`` is a multiple of ``k``.
        k: Parts.

    Returns:
        Part of each node, ``(n,)``, int64.
    """
    n = len(graph)
    if n % k:
        raise ValueError(f"{n} neurons do not make {k} parts of one size")
    labels, least = np.arange(n) % k, 1e-10 * np.abs(graph).sum(1).max(initial=0)
    while True:
        towards = graph @ np.eye(k)[labels]  # (n, k), summed anew: rounding does not pile up
        partner, gain = _partners(graph, labels, towards)
        first = np.argsort(-gain, kind="stable")[: (gain > least).sum()]
        if not any([_exchange(graph, labels, towards, i, partner[i], least) for i in first]):
            return torch.as_tensor(labels)


def _partners(
    graph: np.ndarray, labels: np.ndarray, towards: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best node for each to change places with, and what that gains. Both ``(n,)``."""
    here = np.eye(towards.shape[1])[labels]
    move = towards - (towards * here).sum(1, keepdims=True)  # gain of going to each part, (n, k)
    left, right = np.hstack([move, here]), np.hstack([here, move]).T
    partners, gains = [], []
    for start in range(0, len(graph), ROWS):
        rows = slice(start, start + ROWS)
        gain = left[rows] @ right - 2 * graph[rows]  # of i in the part of j, and j in that of i
        partners.append(gain.argmax(1))
        gains.append(gain.max(1))
    return np.concatenate(partners), np.concatenate(gains)


def _exchange(
    graph: np.ndarray, labels: np.ndarray, towards: np.ndarray, i: int, j: int, least: float
) -> bool:
    """Let two nodes change parts if that still gains, now that others may have moved."""
    p, q = labels[i], labels[j]
    gain = towards[i, q] - towards[i, p] + towards[j, p] - towards[j, q]
    if gain - 2 * graph[i, j] <= least:
        return False
    moved = graph[j] - graph[i]
    towards[:, p] += moved
    towards[:, q] -= moved
    labels[i], labels[j] = q, p
    return True


# One layer's scores and the experts that follow from them: which expert has which neurons, how much
# of the score, and how much in common with the others.


@dataclass(frozen=True, eq=False)
class View:
    """One layer's scores dealt out to experts, by rank: 0 is the neuron with the highest score.

    Attributes:
        heading: What is scored, and by which score: two lines.
        ranking: Neurons, highest score first, ``(F,)``.
        ordered: Their scores, ``(F,)``.
        hands: Ranks of each expert's neurons, ``(E, K)``.
        n_shared: How many are in all of them.
    """

    heading: tuple[str, str]
    ranking: np.ndarray
    ordered: np.ndarray
    hands: np.ndarray
    n_shared: int

    @property
    def n_kept(self) -> int:
        """Neurons that some expert holds."""
        n_experts, size = self.hands.shape
        return self.n_shared + n_experts * (size - self.n_shared)

    @property
    def holds(self) -> np.ndarray:
        """Whether an expert holds the neuron of a rank, ``(E, F)``."""
        holds = np.zeros((len(self.hands), len(self.ordered)), dtype=bool)
        np.put_along_axis(holds, self.hands, True, axis=1)
        return holds

    @property
    def mass(self) -> np.ndarray:
        """Share of the layer's score that each expert holds, ``(E,)``."""
        return self.ordered[self.hands].sum(1) / self.total

    @property
    def relative(self) -> np.ndarray:
        """Scores over the layer's mean, ``(F,)``: one scale for all scores and models."""
        return self.ordered * len(self.ordered) / self.total

    @property
    def total(self) -> float:
        """The layer's score; never 0."""
        return float(self.ordered.sum()) or 1.0

    def top(self, n: int) -> float:
        """Share of the layer's score that its ``n`` highest neurons hold."""
        return float(self.ordered[:n].sum()) / self.total

    @property
    def overlap(self) -> np.ndarray:
        """Share of a row's expert's score that the column's expert holds too, ``(E, E)``."""
        holds = self.holds.astype(float)
        common = (holds * self.ordered) @ holds.T
        return common / np.maximum(np.diag(common)[:, None], 1e-300)

    def part(self, rank: int) -> str:
        """What becomes of the neuron of a rank, in words."""
        if rank < self.n_shared:
            return "all experts" if len(self.hands) > 1 else "the only expert"
        holders = np.flatnonzero((self.hands == rank).any(1))
        return f"expert {holders[0] + 1}" if len(holders) else "no expert, it is dropped"


def view(
    heading: tuple[str, str], scores: np.ndarray, *, n_experts: int, expert_size: int, n_shared: int
) -> View:
    """One layer's scores ``(F,)`` dealt to experts as conversion deals them."""
    ranking = np.argsort(-scores, kind="stable")
    hands = deal_neurons(
        torch.arange(len(scores)),
        n_experts=n_experts,
        expert_size=expert_size,
        n_shared=n_shared,
        allow_identical=True,
    ).numpy()
    return View(heading, ranking, scores[ranking], hands, n_shared)


def fit(width: int, n_experts: int, expert_size: int, n_shared: int) -> tuple[int, int]:
    """The nearest ``(expert_size, n_shared)`` that a layer of ``width`` neurons can fill.

    Example:
        >>> fit(6, n_experts=2, expert_size=5, n_shared=1)
        (3, 1)
    """
    shared = min(n_shared, expert_size, width)
    return min(expert_size, (width + (n_experts - 1) * shared) // n_experts), shared


def interval(values: np.ndarray) -> str:
    """Lowest and highest value in whole numbers, one where they are the same.

    Example:
        >>> interval(np.array([1.2, 3.0])), interval(np.array([1.2, 1.3]))
        ('1 to 3', '1')
    """
    low, high = f"{values.min():.0f}", f"{values.max():.0f}"
    return low if low == high else f"{low} to {high}"
