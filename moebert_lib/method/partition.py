"""Which neurons each expert gets (Sec. 3.1, Fig. 1).

A *neuron* of a feed-forward network is a column of W1 with the matching row of W2. The
most important neurons go to every expert, the next ones are dealt out like cards, the
rest are dropped. Tensors in, tensors out: no model is known here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def deal_neurons(
    ranking: Tensor,
    *,
    n_experts: int,
    expert_size: int,
    n_shared: int,
    allow_identical: bool = False,
) -> Tensor:
    """Deal one layer's neurons out to experts, most important first.

    Every expert receives the ``n_shared`` top neurons. The following ones are dealt one at
    a time around the table, so no expert is left with only weak ones. Neurons after the
    last full round belong to no expert.

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
    n_own = expert_size - n_shared
    needed = n_shared + n_experts * n_own
    if needed > width:
        largest = (width + (n_experts - 1) * n_shared) // n_experts
        raise ValueError(
            f"{needed} neurons are needed to fill {n_experts} experts, the layer has {width}; "
            f"with n_shared={n_shared} the largest expert_size is {largest}"
        )
    shared = ranking[:n_shared].expand(n_experts, -1)  # (E, n_shared)
    own = ranking[n_shared:needed].view(n_own, n_experts).T  # (E, n_own)
    return torch.cat([shared, own], dim=1)  # (E, K)


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


# One layer's scores as a deal makes use of them: who holds what, how much, and in common.
# Any score can rank the neurons; the paper's is Eq. 4. Arrays in, arrays out.


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
        found = np.zeros((len(self.hands), len(self.ordered)), dtype=bool)
        np.put_along_axis(found, self.hands, True, axis=1)
        return found

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
