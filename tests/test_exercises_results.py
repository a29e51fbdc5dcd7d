"""The exercises of notebooks 6 to 8 take the right answer and refuse the tempting ones."""

import itertools

import numpy as np
import pytest

from moebert_lib.teaching import exercises


def f1(truth, said):
    hits = (truth * said).sum()
    return 2 * hits / max(1, truth.sum() + said.sum())


def sign_flip(gaps, *, sided=abs, slack=1e-9):
    signs = itertools.product([1, -1], repeat=len(gaps))
    sums = [sided(np.dot(gaps, pattern)) for pattern in signs]
    return np.mean([total >= sided(gaps.sum()) - slack for total in sums])


def holm(p, *, stays_behind=True):
    order = np.argsort(p)
    raised = p[order] * np.arange(len(p), 0, -1)
    raised = np.maximum.accumulate(raised) if stays_behind else raised
    return np.minimum(raised, 1)[np.argsort(order)]


def layer_parameters(D, K, N, *, bias=1, norm=2):
    used = 2 * D * K + bias * (K + D) + norm * D
    return used, N * used


def longest(D, F, N, gain):
    return int(F * (1 - gain / N) / (gain - 1) - 2 * D)


def leak(training, development, n):
    chosen = [split.topk(n).indices for split in (development, training)]
    return development[chosen[0]].mean() - development[chosen[1]].mean()


def own_order(scores, neurons):
    return scores[neurons.argsort()]


def in_both(left, right, top):
    return len(set(left.topk(top).indices.tolist()) & set(right.topk(top).indices.tolist()))


def jaccard(left, right, top):
    both = in_both(left, right, top)
    return both / (2 * top - both)


RIGHT = {
    "f1": f1,
    "sign_flip": sign_flip,
    "holm": holm,
    "layer_parameters": layer_parameters,
    "speedup": lambda dense, other: np.median(dense / other),
    "longest": longest,
    "leak": leak,
    "own_order": own_order,
    "jaccard": jaccard,
}

TEMPTING = [
    ("f1", lambda truth, said: (truth == said).mean()),
    ("f1", lambda truth, said: f1(1 - truth, 1 - said)),
    ("sign_flip", lambda gaps: sign_flip(gaps, sided=float)),
    ("sign_flip", lambda gaps: sign_flip(gaps, slack=-1e-9)),
    ("sign_flip", lambda gaps: 2.0 ** (1 - len(gaps))),
    ("holm", lambda p: np.minimum(p * len(p), 1)),
    ("holm", lambda p: holm(p, stays_behind=False)),
    ("holm", lambda p: np.sort(holm(p))),
    ("layer_parameters", lambda D, K, N: layer_parameters(D, K, N, bias=0)),
    ("layer_parameters", lambda D, K, N: layer_parameters(D, K, N, norm=0)),
    ("layer_parameters", lambda D, K, N: layer_parameters(D, K, N)[::-1]),
    ("speedup", lambda dense, other: np.median(other / dense)),
    ("speedup", lambda dense, other: np.median(dense) / np.median(other)),
    ("speedup", lambda dense, other: dense.mean() / other.mean()),
    ("longest", lambda D, F, N, gain: longest(D, F, N, gain) + 1),
    ("longest", lambda D, F, N, gain: int(F * (1 - gain / N) / (gain - 1) - 4 * D)),
    ("leak", lambda training, development, n: leak(development, training, n)),
    ("leak", lambda one, two, n: two.topk(n).values.mean() - one.topk(n).values.mean()),
    ("own_order", lambda scores, neurons: scores[neurons]),
    ("own_order", lambda scores, neurons: scores),
    ("jaccard", lambda left, right, top: in_both(left, right, top) / top),
    ("jaccard", lambda left, right, top: jaccard(-left, -right, top)),
]


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_answer_is_taken(name):
    attempt = getattr(exercises, name)(RIGHT[name])
    assert attempt.right, attempt


@pytest.mark.parametrize("name, mine", TEMPTING)
def test_an_answer_that_comes_to_mind_first_is_refused(name, mine):
    attempt = getattr(exercises, name)(mine)
    assert not attempt.right and "expected" in attempt.said, attempt
