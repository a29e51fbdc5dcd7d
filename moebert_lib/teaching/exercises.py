"""Exercises of the notebooks: try a reader's function on cases, report the result in one line.

Nothing here raises, so a notebook whose exercises are not done yet runs to its end. Each exercise
takes the reader's function of the same name. Its first cases are worked by hand and tell the right
answer from common mistakes; the others are random and compared with the library or a slow loop.
"""

import copy
import inspect
import pickle
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moebert_lib.evidence import statistics
from moebert_lib.method import rank_stability, release_files
from moebert_lib.method.distillation_loss import layer_distances, prediction_loss
from moebert_lib.method.importance import Importance
from moebert_lib.method.partition import composition, deal_neurons, random_ranking
from moebert_lib.method.routing import SentenceGate, balanced_table, loads
from moebert_lib.model.modeling import MoEBertConfig, MoEBertModel
from moebert_lib.model.moe_layer import moe_layers, parameter_counts
from moebert_lib.training.evaluation import score

TOLERANCE = 1e-6  # a reader computes in float32 or in float64


class Case(NamedTuple):
    """Arguments of the reader's function, and the value it should return."""

    arguments: tuple
    expected: Any


class Attempt(NamedTuple):
    """The result of trying a function; prints as one line."""

    right: bool
    said: str

    def __repr__(self) -> str:
        return self.said


def attempt(function: Callable[..., Any], cases: Iterable[Case]) -> Attempt:
    """Try a reader's function on each case, until one goes wrong.

    Args:
        function: The function. Returning nothing means that it is not written yet.
        cases: At least one; arguments are copied, so that a case cannot be spoilt.

    Example:
        >>> attempt(lambda x: 2 * x, [Case((1,), 2), Case((3,), 7)])
        not yet: your function(x=3) gave 6, expected 7
    """
    name = getattr(function, "__name__", "<lambda>").replace("<lambda>", "your function")
    n_cases = 0
    for n_cases, case in enumerate(cases, start=1):  # noqa: B007  counted for the last line
        call = f"{name}({', '.join(_named(function, case.arguments))})"
        try:
            value = function(*copy.deepcopy(case.arguments))
        except Exception as error:  # noqa: BLE001  whatever a reader's code may raise
            return Attempt(False, f"not yet: {call} raised {type(error).__name__}: {error}")
        if value is None:
            return Attempt(False, f"to do: {name} returns nothing yet")
        if difference := _difference(value, case.expected):
            return Attempt(False, f"not yet: {call} {difference}")
    return Attempt(True, f"right: {name}, {n_cases} cases")


def _named(function: Callable[..., Any], arguments: tuple) -> list[str]:
    """The arguments as a call has them, by the names that the reader gave."""
    try:
        names = list(inspect.signature(function).bind(*arguments).arguments)
    except (TypeError, ValueError):  # too few or too many
        names = []
    values = [_short(value) for value in arguments]
    if len(names) != len(arguments):
        return values
    return [f"{name}={value}" for name, value in zip(names, values, strict=True)]


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal random numbers from a separate generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _difference(actual: Any, expected: Any) -> str:
    """How a value differs from the expected one; "" where they agree."""
    if isinstance(expected, str | bool | set | dict):
        return "" if actual == expected else f"gave {_short(actual)}, expected {_short(expected)}"
    try:
        left, right = (torch.as_tensor(value).double() for value in (actual, expected))
    except (TypeError, ValueError, RuntimeError):
        return f"gave {_short(actual)}, expected {_short(expected)}"
    if left.shape != right.shape:
        return f"gave shape {tuple(left.shape)}, expected {tuple(right.shape)}"
    if torch.allclose(left, right, rtol=TOLERANCE, atol=TOLERANCE):
        return ""
    return f"gave {_short(actual)}, expected {_short(expected)}"


def _short(value: Any) -> str:
    """A value in a few words: small tensors as lists, large ones by their shape."""
    if isinstance(value, Tensor):
        if value.numel() > 12:
            return f"tensor of shape {tuple(value.shape)}"
        return _short(value.tolist())
    if isinstance(value, list) and value:
        return f"[{', '.join(map(_short, value))}]" if len(value) <= 12 else f"{len(value)} values"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


SEEDS = range(3)


def neuron_adds(function: Callable) -> Attempt:
    """Notebook 0: what one neuron adds. ``(A, w1_j, b1_j, w2_j)`` to ``(words, outputs)``."""
    cases = [Case((_real([[1, 0], [0, 2]]), _real([3, -1]), 1.0, _real([2, 5])), [[8, 20], [0, 0]])]
    for layer in map(_layer, SEEDS):
        A, W1, b1, W2, _ = layer
        rest = torch.arange(len(b1)) != 2
        without = _narrow(layer, rest)
        cases.append(Case((A[:, 0], W1[:, 2], b1[2], W2[2]), (_narrow(layer) - without)[:, 0]))
    return attempt(function, cases)


def importance_of(function: Callable) -> Attempt:
    """Notebook 0: Eq. 4 from its two terms. ``(term_w1, term_w2)``, ``(words, F)``, to ``(F,)``."""
    terms = _real([[2, -1], [-2, 3]]), _real([[-1, 0], [-1, -3]])
    cases = [Case(terms, [4, 1])]
    for layer in map(_layer, SEEDS):
        a, grad_a, h, grad_h = _flows(layer)
        both = ((a - layer.b1) * grad_a).sum(1), (h * grad_h).sum(1)
        cases.append(Case(both, _slow_scores(layer)))
    return attempt(function, cases)


def closest_expert(function: Callable) -> Attempt:
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
    return attempt(function, cases)


def mass_held(function: Callable) -> Attempt:
    """Notebook 1: what the best neurons hold. ``(scores, top)``, ``(L, F)``, to ``(L,)``."""
    cases = [Case((_real([[1, 4, 3, 2], [10, 60, 20, 10]]), 2), [0.7, 0.8])]
    for seed, top in zip(SEEDS, (1, 5, 12), strict=True):
        scores = _random(3, 12, seed=seed).exp()
        none = torch.zeros(0)
        cases.append(Case((scores, top), Importance(scores, none, none).mass(top)))
    return attempt(function, cases)


def fast_scores(function: Callable) -> Attempt:
    """Notebook 1: Eq. 4 from activations. ``(a, b1, grad_a, h, grad_h)`` to ``(F,)``.

    ``b1`` is ``(F,)``, the others are ``(B, T, F)``: examples, tokens, neurons.
    """
    a, grad_a = _real([[[2], [1]], [[0], [3]]]), _real([[[-3], [-2]], [[5], [1]]])
    h, grad_h = _real([[[1], [1]], [[0], [2]]]), _real([[[0], [1]], [[1], [2]]])
    cases = [Case((a, _real([1]), grad_a, h, grad_h), [3])]
    for layer in (_layer(seed, n_tokens=5) for seed in SEEDS):
        a, grad_a, h, grad_h = _flows(layer)
        cases.append(Case((a, layer.b1, grad_a, h, grad_h), _slow_scores(layer)))
    return attempt(function, cases)


def found_again(function: Callable) -> Attempt:
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
        again = rank_stability.top_overlap(blocks[drawn].sum(0), blocks.sum(0), 10)
        cases.append(Case((blocks, drawn, 10), again))
    return attempt(function, cases)


def counted(function: Callable) -> Attempt:
    """Notebook 2: a deal's neurons in all, some, no experts. ``(experts, F)`` to three counts."""
    cases = [
        Case((torch.tensor([[5, 2, 1], [5, 0, 3]]), 7), [1, 4, 2]),
        Case((torch.tensor([[4, 1], [4, 1], [4, 1]]), 5), [2, 0, 3]),
        Case((torch.tensor([[1, 0, 2], [0, 3, 1], [4, 5, 0]]), 7), [1, 5, 1]),
    ]
    for hands in map(_deal, SEEDS):
        cases.append(Case((hands, 40), list(composition(hands, 40))))
    return attempt(function, cases)


def mass_of_experts(function: Callable) -> Attempt:
    """Notebook 2: the part of a layer's importance in each expert. ``(scores, experts)``.

    ``scores`` is ``(F,)``, ``experts`` ``(E, K)``; the answer is ``(E,)``.
    """
    cases = [Case((_real([1, 2, 3, 4]), torch.tensor([[3, 2], [3, 1]])), [0.7, 0.6])]
    for seed in SEEDS:
        scores = _random(40, seed=seed).exp()
        hands = _deal(seed)
        cases.append(Case((scores, hands), [sum(scores[hand]) / sum(scores) for hand in hands]))
    return attempt(function, cases)


def back_and_forth(function: Callable) -> Attempt:
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
    return attempt(function, cases)


def distance_of_a_layer(function: Callable) -> Attempt:
    """Notebook 3: Eq. 5's term of one layer over real tokens, from ``(X, X_tea, mask)``."""
    X = torch.tensor([[[1.0, 2.0], [0.5, -1.0], [3.0, 3.0]]])
    X_tea = torch.tensor([[[0.5, 2.0], [0.5, 0.0], [0.0, 0.0]]])
    cases = [Case((X, X_tea, torch.tensor([[1, 1, 0]])), 0.3125)]
    for seed in (0, 1):
        student, teacher = noise(3, 5, 4, seed=seed), noise(3, 5, 4, seed=seed + 10)
        mask = (torch.arange(5) < torch.tensor([[5], [2], [3]])).long()
        cases.append(Case((student, teacher, mask), layer_distances([student], [teacher], mask)[0]))
    return attempt(function, cases)


def distance_of_predictions(function: Callable) -> Attempt:
    """Notebook 3: Eq. 6 of a batch, from probabilities ``(p, p_tea)``, each ``(B, C)``."""
    p, p_tea = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    cases = [Case((p, p_tea), 0.13732653608351372)]  # 1/8 ln 3
    for seed in (0, 1):
        a, b = noise(4, 3, seed=seed), noise(4, 3, seed=seed + 10)
        cases.append(Case((a.softmax(-1), b.softmax(-1)), prediction_loss(a, b)))
    return attempt(function, cases)


def objective_of_a_sentence(function: Callable) -> Attempt:
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
        X, X_tea = noise(4, 5, 2, seed=seed + 20), noise(4, 5, 2, seed=seed + 30)
        hidden = layer_distances(list(X[:, None]), list(X_tea[:, None]), None).sum()
        distill = hidden + prediction_loss(a[None], b[None])
        arguments = (a.softmax(-1), seed, X, b.softmax(-1), X_tea, 5.0)
        cases.append(Case(arguments, 5.0 * distill - a.log_softmax(-1)[seed]))
    return attempt(function, cases)


def gaps_by_seed(function: Callable) -> Attempt:
    """Notebook 4: paired differences of two settings, from ``(a, b)``, score by seed of each."""
    return attempt(
        function,
        [
            Case(({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.75}), [0.25, -0.25]),
            Case(({2: 0.5, 0: 0.75}, {0: 0.25, 2: 0.125}), [0.5, 0.375]),  # kept in another order
            Case(
                ({0: 1.0, 1: 0.5, 3: 0.5}, {3: 0.25, 1: 0.0}), [0.5, 0.25]
            ),  # seed 0 has no partner
        ],
    )


def verdicts_by_chance(function: Callable) -> Attempt:
    """Notebook 4: verdicts that chance gives, from ``(n, m)``: pairs, and comparisons."""
    return attempt(
        function,
        [
            Case((1, 1), 1.0),  # a single pair always agrees with itself
            Case((2, 1), 0.5),
            Case((3, 12), 3.0),
            Case((4, 20), 2.5),
        ],
    )


def least_shared(function: Callable) -> Attempt:
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
    return attempt(function, cases)


def _can_be_dealt(F: int, N: int, K: int, s: int) -> bool:
    sizes = dict(n_experts=N, expert_size=K, n_shared=s, allow_identical=True)
    try:
        deal_neurons(torch.arange(F), **sizes)
    except ValueError:
        return False
    return True


def load_of_experts(function: Callable) -> Attempt:
    """Notebook 5: share of the real tokens of each expert, from ``(experts, mask, N)``."""
    by_hand = Case((torch.tensor([[0, 1, 1, 0]]), torch.tensor([[1, 1, 1, 0]]), 2), [1 / 3, 2 / 3])
    idle = Case((torch.tensor([[0, 0]]), torch.tensor([[1, 1]]), 3), [1.0, 0.0, 0.0])
    cases = [by_hand, idle]
    for seed in (0, 1):
        experts = torch.randint(4, (3, 7), generator=torch.Generator().manual_seed(seed))
        mask = (torch.arange(7) < torch.tensor([[7], [2], [4]])).long()
        cases.append(Case((experts, mask, 4), loads(experts, 4, mask)))
    return attempt(function, cases)


def way_of_a_sentence(function: Callable) -> Attempt:
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
    return attempt(function, cases)


def balanced_deal(function: Callable) -> Attempt:
    """Notebook 5: the balanced hash's table, from ``(counts, N)``; every token occurs."""
    cases = [Case((torch.tensor([50, 9, 8, 12, 30, 1]), 2), torch.tensor([0, 1, 0, 1, 1, 1]))]
    for seed, n_experts in ((0, 3), (1, 4)):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
        counts = (order + 1) ** 2  # no two alike
        cases.append(Case((counts, n_experts), balanced_table(counts, n_experts, seed=0)))
    return attempt(function, cases)


def f1(function: Callable) -> Attempt:
    """Notebook 6: F1 of class 1. ``(truth, predicted)``, 0 and 1, ``(n,)``, to a number."""
    cases = [
        Case((np.array([1, 1, 1, 0, 0, 0]), np.array([1, 0, 0, 1, 0, 0])), 0.4),
        Case((np.array([0, 1, 0]), np.array([0, 0, 0])), 0.0),  # nothing found: 0, not 0 / 0
        Case((np.array([0, 0]), np.array([0, 0])), 0.0),  # nothing to find either
    ]
    for draw in map(np.random.default_rng, SEEDS):
        truth, predicted = draw.integers(2, size=(2, 30))
        cases.append(Case((truth, predicted), score(predicted, truth, ["f1"])["f1"]))
    return attempt(function, cases)


def sign_flip(function: Callable) -> Attempt:
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
    return attempt(function, cases)


def holm(function: Callable) -> Attempt:
    """Notebook 6: Holm's correction. p-values ``(m,)`` in any order to ``(m,)`` in that order."""
    cases = [
        Case((np.array([0.2, 0.01]),), [0.2, 0.02]),
        Case((np.array([0.03, 0.01, 0.04]),), [0.06, 0.03, 0.06]),  # 0.04 stays behind 0.06
        Case((np.array([0.6, 0.9]),), [1.0, 1.0]),  # no p above 1
    ]
    for draw in map(np.random.default_rng, SEEDS):
        p = draw.uniform(size=8) ** 3
        cases.append(Case((p,), statistics.holm(p)))
    return attempt(function, cases)


def layer_parameters(function: Callable) -> Attempt:
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
    return attempt(function, cases)


def speedup(function: Callable) -> Attempt:
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
    return attempt(function, cases)


def longest(function: Callable) -> Attempt:
    """Notebook 7: ``(D, F, N, gain)`` to the longest sentence whose limit is still ``gain``."""

    def limit(D: int, F: int, N: int, T: int) -> float:
        attention, ffn = 4 * D * D + 2 * T * D, 2 * D * F
        return (attention + ffn) / (attention + ffn / N)

    cases = [Case((2, 12, 4, 1.5), 11)]  # at T = 11 the limit is 108 / 72
    for shape in ((768, 3072, 4, 1.5), (768, 3072, 8, 1.3), (64, 300, 2, 1.25)):
        *sizes, gain = shape
        enough = (T for T in range(1, 10_000) if limit(*sizes, T + 1) < gain)
        cases.append(Case(shape, next(enough)))
    return attempt(function, cases)


def leak(function: Callable) -> Attempt:
    """Notebook 8: ``(training, development, n)``, both ``(F,)``, to a number.

    By how much the ``n`` neurons chosen on development look better there, in the mean, than
    the ``n`` chosen on training.
    """
    training, development = torch.tensor([4.0, 3, 2, 1]), torch.tensor([0.0, 2, 1, 3])
    cases = [Case((training, development, 2), 1.5), Case((training, development, 4), 0.0)]
    for seed in SEEDS:
        training, development = noise(2, 40, seed=seed)
        left, right = (
            sorted(range(40), key=scores.__getitem__)[-10:] for scores in (training, development)
        )
        gap = sum(development[i] for i in right) - sum(development[i] for i in left)
        cases.append(Case((training, development, 10), gap / 10))
    return attempt(function, cases)


def own_order(function: Callable) -> Attempt:
    """Notebook 8: a layer of a release's file, ``(scores, neurons)``, to scores by neuron.

    All are ``(F,)``: scores from high to low, the neuron that each belongs to, and the result,
    whose entry ``j`` is the score of neuron ``j``.
    """
    cases = [Case((torch.tensor([9.0, 5, 1]), torch.tensor([1, 2, 0])), [1, 9, 5])]
    for seed in SEEDS:
        scores = noise(12, seed=seed).abs().sort(descending=True).values.double()
        neurons = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        cases.append(Case((scores, neurons), _as_read(scores, neurons)))
    return attempt(function, cases)


def jaccard(function: Callable) -> Attempt:
    """Notebook 8: ``(left, right, top)``, scores ``(F,)`` of one layer each, to a number."""
    left, right = torch.tensor([6.0, 5, 4, 3, 2, 1]), torch.tensor([6.0, 1, 5, 2, 4, 3])
    cases = [Case((left, right, 2), 1 / 3), Case((left, right, 3), 0.5), Case((left, left, 2), 1.0)]
    for seed in SEEDS:
        left, right = noise(2, 30, seed=seed)
        cases.append(Case((left, right, 12), rank_stability.jaccard(left[None], right[None], 12)))
    return attempt(function, cases)


def _as_read(scores: Tensor, neurons: Tensor) -> Tensor:
    """What the library reads out of a file of one layer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "importance_one.pkl"
        content = {"importance": [scores.tolist()], "idx": [neurons.tolist()]}
        path.write_bytes(pickle.dumps(content))
        return release_files.read(path).scores[0]


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
