"""Exercises: a reader's function is tried on cases, and one line says what came of it.

Nothing here raises, so a notebook whose exercises are not done yet runs to its end. The cases
of each notebook's exercises are in ``exercises_*``: some worked by hand, some drawn at random
and held to the library.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moebert_lib.method.importance import Importance
from moebert_lib.method.partition import composition, deal_neurons, random_ranking
from moebert_lib.method.rank_stability import top_overlap

TOLERANCE = 1e-6  # a reader computes in float32 or in float64


class Case(NamedTuple):
    """Arguments of the reader's function, and the value it should return."""

    arguments: tuple
    expected: Any


class Attempt(NamedTuple):
    """What came of trying a function; prints as its one line."""

    right: bool
    said: str

    def __repr__(self) -> str:
        return self.said


def attempt(mine: Callable[..., Any], cases: Iterable[Case]) -> Attempt:
    """Try a reader's function on each case, until one goes wrong.

    Args:
        mine: The function. Returning nothing means that it is not written yet.
        cases: At least one; arguments are copied, so that a case cannot be spoilt.

    Example:
        >>> attempt(lambda x: 2 * x, [Case((1,), 2), Case((3,), 7)])
        not yet: your function(x=3) gave 6, expected 7
    """
    name = getattr(mine, "__name__", "<lambda>").replace("<lambda>", "your function")
    n_cases = 0
    for n_cases, case in enumerate(cases, start=1):  # noqa: B007  counted for the last line
        asked = f"{name}({', '.join(_named(mine, case.arguments))})"
        try:
            found = mine(*copy.deepcopy(case.arguments))
        except Exception as error:  # noqa: BLE001  whatever a reader's code may raise
            return Attempt(False, f"not yet: {asked} raised {type(error).__name__}: {error}")
        if found is None:
            return Attempt(False, f"to do: {name} returns nothing yet")
        if difference := _difference(found, case.expected):
            return Attempt(False, f"not yet: {asked} {difference}")
    return Attempt(True, f"right: {name}, {n_cases} cases")


def _named(mine: Callable[..., Any], arguments: tuple) -> list[str]:
    """The arguments as a call has them, by the names that the reader gave."""
    try:
        names = list(inspect.signature(mine).bind(*arguments).arguments)
    except (TypeError, ValueError):  # too few or too many
        names = []
    said = map(_short, arguments)
    if len(names) != len(arguments):
        return list(said)
    return [f"{name}={value}" for name, value in zip(names, said, strict=True)]


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers of a generator of their own, for cases drawn at random."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _difference(found: Any, expected: Any) -> str:
    """How a value differs from the expected one; "" where they agree."""
    if isinstance(expected, str | bool | set | dict):
        return "" if found == expected else f"gave {_short(found)}, expected {_short(expected)}"
    try:
        left, right = (torch.as_tensor(value).double() for value in (found, expected))
    except (TypeError, ValueError, RuntimeError):
        return f"gave {_short(found)}, expected {_short(expected)}"
    if left.shape != right.shape:
        return f"gave shape {tuple(left.shape)}, expected {tuple(right.shape)}"
    if torch.allclose(left, right, rtol=TOLERANCE, atol=TOLERANCE):
        return ""
    return f"gave {_short(found)}, expected {_short(expected)}"


def _short(value: Any) -> str:
    """A value in a few words: small tensors as lists, large ones by their shape."""
    if isinstance(value, torch.Tensor):
        if value.numel() > 12:
            return f"tensor of shape {tuple(value.shape)}"
        return _short(value.tolist())
    if isinstance(value, list) and value:
        return f"[{', '.join(map(_short, value))}]" if len(value) <= 12 else f"{len(value)} values"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Exercises of notebooks 0 to 2: a neuron, its importance, the deal.
# Each function takes the reader's function of the same name and tries it on cases: one or two
# worked by hand, which tell the answer from the mistakes that come to mind first, then random
# ones held to the library or to a slow loop.

SEEDS = range(3)


def neuron_adds(mine: Callable) -> Attempt:
    """Notebook 0: what one neuron adds. ``(A, w1_j, b1_j, w2_j)`` to ``(words, outputs)``."""
    cases = [Case((_real([[1, 0], [0, 2]]), _real([3, -1]), 1.0, _real([2, 5])), [[8, 20], [0, 0]])]
    for layer in map(_layer, SEEDS):
        A, W1, b1, W2, _ = layer
        rest = torch.arange(len(b1)) != 2
        without = _narrow(layer, rest)
        cases.append(Case((A[:, 0], W1[:, 2], b1[2], W2[2]), (_narrow(layer) - without)[:, 0]))
    return attempt(mine, cases)


def importance_of(mine: Callable) -> Attempt:
    """Notebook 0: Eq. 4 from its two terms. ``(term_w1, term_w2)``, ``(words, F)``, to ``(F,)``."""
    terms = _real([[2, -1], [-2, 3]]), _real([[-1, 0], [-1, -3]])
    cases = [Case(terms, [4, 1])]
    for layer in map(_layer, SEEDS):
        a, grad_a, h, grad_h = _flows(layer)
        both = ((a - layer.b1) * grad_a).sum(1), (h * grad_h).sum(1)
        cases.append(Case(both, _slow_scores(layer)))
    return attempt(mine, cases)


def closest_expert(mine: Callable) -> Attempt:
    """Notebook 0: the expert nearest to the dense layer. ``(X, outputs)`` to ``(words,)``.

    ``X`` is ``(words, 2)``, the dense layer's; ``outputs`` is ``(E, words, 2)``, each expert's.
    """
    X = _real([[1, 1], [-2, 0], [0, 3]])
    outputs = _real([[[1, 0], [-1, 1], [9, 9]], [[-1, 3], [2, 0], [1, 3]]])
    cases = [Case((X, outputs), [0, 0, 1])]
    cases.append(Case((_real([[0, 0]]), _real([[[3, 0]], [[2, 2]]])), [1]))  # 9 against 8
    for layer in map(_layer, SEEDS):
        ranking = _slow_scores(layer).argsort(descending=True)
        hands = deal_neurons(ranking, n_experts=3, expert_size=3, n_shared=1)
        X, outputs = (values[..., 0, :] for values in (_narrow(layer), _served(layer, hands)))
        far = [[float((o - x).norm()) for o in outputs[:, i]] for i, x in enumerate(X)]
        cases.append(Case((X, outputs), [row.index(min(row)) for row in far]))
    return attempt(mine, cases)


def mass_held(mine: Callable) -> Attempt:
    """Notebook 1: what the best neurons hold. ``(scores, top)``, ``(L, F)``, to ``(L,)``."""
    cases = [Case((_real([[1, 4, 3, 2], [10, 60, 20, 10]]), 2), [0.7, 0.8])]
    for seed, top in zip(SEEDS, (1, 5, 12), strict=True):
        scores = _random(3, 12, seed=seed).exp()
        none = torch.zeros(0)
        cases.append(Case((scores, top), Importance(scores, none, none).mass(top)))
    return attempt(mine, cases)


def fast_scores(mine: Callable) -> Attempt:
    """Notebook 1: Eq. 4 from activations. ``(a, b1, grad_a, h, grad_h)`` to ``(F,)``.

    ``b1`` is ``(F,)``, the others are ``(B, T, F)``: examples, tokens, neurons.
    """
    a, grad_a = _real([[[2], [1]], [[0], [3]]]), _real([[[-3], [-2]], [[5], [1]]])
    h, grad_h = _real([[[1], [1]], [[0], [2]]]), _real([[[0], [1]], [[1], [2]]])
    cases = [Case((a, _real([1]), grad_a, h, grad_h), [3])]
    for layer in (_layer(seed, n_tokens=5) for seed in SEEDS):
        a, grad_a, h, grad_h = _flows(layer)
        cases.append(Case((a, layer.b1, grad_a, h, grad_h), _slow_scores(layer)))
    return attempt(mine, cases)


def found_again(mine: Callable) -> Attempt:
    """Notebook 1: one resample of the examples. ``(blocks, drawn, top)`` to a share, 0 to 1.

    ``blocks`` is ``(M, F)``, scores summed over each block of examples; ``drawn`` is ``(M,)``,
    the blocks of the resample, some of them more than once.
    """
    blocks = _real([[5, 1, 0, 2], [0, 7, 1, 4], [1, 1, 3, 2]])
    cases = [Case((blocks, torch.tensor([0, 0, 1]), 2), 0.5)]  # neurons 0, 1 against 1, 3
    cases.append(Case((blocks, torch.tensor([2, 1, 0]), 2), 1.0))
    for seed in SEEDS:
        blocks = _random(20, 30, seed=seed).exp()
        drawn = torch.randint(20, (20,), generator=torch.Generator().manual_seed(seed))
        again = top_overlap(blocks[drawn].sum(0), blocks.sum(0), 10)
        cases.append(Case((blocks, drawn, 10), again))
    return attempt(mine, cases)


def counted(mine: Callable) -> Attempt:
    """Notebook 2: a deal's neurons in all, some, no experts. ``(experts, F)`` to three counts."""
    cases = [
        Case((torch.tensor([[5, 2, 1], [5, 0, 3]]), 7), [1, 4, 2]),
        Case((torch.tensor([[4, 1], [4, 1], [4, 1]]), 5), [2, 0, 3]),
        Case((torch.tensor([[1, 0, 2], [0, 3, 1], [4, 5, 0]]), 7), [1, 5, 1]),
    ]
    for hands in map(_deal, SEEDS):
        cases.append(Case((hands, 40), list(composition(hands, 40))))
    return attempt(mine, cases)


def mass_of_experts(mine: Callable) -> Attempt:
    """Notebook 2: the part of a layer's importance in each expert. ``(scores, experts)``.

    ``scores`` is ``(F,)``, ``experts`` ``(E, K)``; the answer is ``(E,)``.
    """
    cases = [Case((_real([1, 2, 3, 4]), torch.tensor([[3, 2], [3, 1]])), [0.7, 0.6])]
    for seed in SEEDS:
        scores = _random(40, seed=seed).exp()
        hands = _deal(seed)
        cases.append(Case((scores, hands), [sum(scores[hand]) / sum(scores) for hand in hands]))
    return attempt(mine, cases)


def back_and_forth(mine: Callable) -> Attempt:
    """Notebook 2: a deal that turns around after each round. ``(ranking, N, K, s)``.

    The answer is ``(N, K)``: in each expert the shared neurons, then its own in order.
    """
    cases = [Case((torch.arange(7), 2, 4, 1), [[0, 1, 4, 5], [0, 2, 3, 6]])]
    cases.append(Case((torch.tensor([4, 0, 3, 1, 2]), 2, 2, 0), [[4, 1], [0, 3]]))
    for seed, (N, K, s) in zip(SEEDS, ((4, 9, 5), (3, 6, 2), (1, 4, 0)), strict=True):
        (ranking,) = random_ranking(1, 24, seed=seed)
        hands = [ranking[:s].tolist() for _ in range(N)]
        for place, neuron in enumerate(ranking[s : s + N * (K - s)].tolist()):
            turn, seat = divmod(place, N)
            hands[N - 1 - seat if turn % 2 else seat].append(neuron)
        cases.append(Case((ranking, N, K, s), hands))
    return attempt(mine, cases)


class _Layer(NamedTuple):
    """A random feed-forward layer of 8 neurons with ReLU, and states ``(B, T, 3)`` for it."""

    A: Tensor
    W1: Tensor
    b1: Tensor
    W2: Tensor
    b2: Tensor


def _layer(seed: int, *, n_tokens: int = 1) -> _Layer:
    values = [(6, n_tokens, 3), (3, 8), (8,), (8, 2), (2,)]
    return _Layer(*(_random(*shape, seed=10 * seed + n) for n, shape in enumerate(values)))


def _narrow(layer: _Layer, kept: Tensor | slice = slice(None)) -> Tensor:
    """Output of the layer's neurons ``kept``, with the bias of the output."""
    A, W1, b1, W2, b2 = layer
    return (A @ W1[:, kept] + b1[kept]).relu() @ W2[kept] + b2


def _served(layer: _Layer, hands: Tensor) -> Tensor:
    return torch.stack([_narrow(layer, hand) for hand in hands])


def _losses(output: Tensor) -> Tensor:
    """Of outputs ``(B, T, 2)``, one for each example; every other one is of class 1."""
    return cross_entropy(output.mean(1), torch.arange(len(output)) % 2, reduction="none")


def _flows(layer: _Layer) -> list[Tensor]:
    """Pre-activations, their gradient, activations, their gradient: ``(B, T, F)`` each."""
    a = (layer.A @ layer.W1 + layer.b1).requires_grad_()
    h = a.relu()
    grad_a, grad_h = torch.autograd.grad(_losses(h @ layer.W2 + layer.b2).sum(), (a, h))
    return [a.detach(), grad_a, h.detach(), grad_h]


def _slow_scores(layer: _Layer) -> Tensor:
    """Eq. 4 as it is written: weight gradients, example by example. Shape ``(F,)``."""
    scores = torch.zeros(len(layer.b1), dtype=torch.float64)
    for n in range(len(layer.A)):
        W1, W2 = (weight.clone().requires_grad_() for weight in (layer.W1, layer.W2))
        loss = _losses(_narrow(layer._replace(W1=W1, W2=W2)))[n]
        grad_w1, grad_w2 = torch.autograd.grad(loss, (W1, W2))
        scores += ((W1 * grad_w1).sum(0) + (W2 * grad_w2).sum(1)).detach().abs()
    return scores


def _deal(seed: int) -> Tensor:
    """Experts ``(4, 10)`` of 40 neurons; the larger the seed, the more are shared."""
    (ranking,) = random_ranking(1, 40, seed=seed)
    return deal_neurons(ranking, n_experts=4, expert_size=10, n_shared=3 * seed)


def _random(*shape: int, seed: int) -> Tensor:
    return noise(*shape, seed=seed, dtype=torch.float64)


def _real(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
