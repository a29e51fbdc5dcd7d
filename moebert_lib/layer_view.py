"""One layer's scores as a deal makes use of them: who holds what, how much, and in common.

Any score can rank the neurons; the paper's is Eq. 4. Arrays in, arrays out.
"""

from dataclasses import dataclass

import numpy as np
import torch

from moebert_lib.experts import deal_neurons


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
