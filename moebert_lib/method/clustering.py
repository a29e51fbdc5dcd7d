"""Which neurons belong together: other ways to fill experts than dealing like cards.

The paper deals the neurons that are not shared around the table (Sec. 3.1), so every expert gets
some of everything. MoEfication (Zhang et al. 2022) does the opposite, and puts alike neurons into
one expert: those whose weights read alike, or which are active on the same tokens. Here the same
neurons that a deal would give out are grouped, into experts of exactly one size, so that nothing
differs but the company a neuron is in. Tensors in, tensors out: no model is known here.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROUNDS = 100  # of k-means at most; it settles in some twenty
ROWS = 64  # of gains at a time: what a processor's cache holds


def group_neurons(dealt: Tensor, n_shared: int, labels: Tensor) -> Tensor:
    """An assignment with the same neurons, those of each expert's own grouped by ``labels``.

    Args:
        dealt: One layer's deal, ``(E, K)``, from ``experts.deal_neurons``.
        n_shared: Its first columns, which stay.
        labels: Group of each own neuron ``dealt[:, n_shared:].T.flatten()``, that is by
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
    hands = torch.stack([own[labels == expert] for expert in range(E)])
    return torch.cat([dealt[:, :n_shared], hands], dim=1)


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
        found = balanced_assignment(_squared(points, centres))
        if labels is not None and np.array_equal(found, labels):
            break
        labels = found
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


def partition(graph: np.ndarray, k: int) -> Tensor:
    """Parts of exactly one size with much weight inside them.

    Neurons are dealt like cards, and then two whose exchange gains change places, those that
    gain most first, until no exchange gains anything (after Kernighan and Lin 1970). A gain of
    less than 1e-10 of all a node's weight is taken for rounding.

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
    one, other = np.hstack([move, here]), np.hstack([here, move]).T
    found = []
    for start in range(0, len(graph), ROWS):
        rows = slice(start, start + ROWS)
        gain = one[rows] @ other - 2 * graph[rows]  # of i in the part of j, and j in that of i
        found.append((gain.argmax(1), gain.max(1)))
    partner, best = map(np.concatenate, zip(*found, strict=True))
    return partner, best


def _exchange(
    graph: np.ndarray, labels: np.ndarray, towards: np.ndarray, i: int, j: int, least: float
) -> bool:
    """Let two nodes change parts if that still gains, now that others may have moved."""
    one, other = labels[i], labels[j]
    gain = towards[i, other] - towards[i, one] + towards[j, one] - towards[j, other]
    if gain - 2 * graph[i, j] <= least:
        return False
    moved = graph[j] - graph[i]
    towards[:, one] += moved
    towards[:, other] -= moved
    labels[i], labels[j] = other, one
    return True
