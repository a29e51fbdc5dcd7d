"""Exercises of notebooks 3 to 5 tell the right answer from the tempting ones."""

import pytest
import torch

from moebert_lib.teaching import exercises


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def objective(p, y, X, p_tea, X_tea, lam, *, weigh_all=False, first=0, mean=False):
    """The objective with its tempting mistakes."""
    layers = ((X - X_tea) ** 2).mean(dim=(1, 2))[first:]
    distill = (layers.mean() if mean else layers.sum()) + (kl(p, p_tea) + kl(p_tea, p)) / 2
    task = -p[y].log()
    return lam * (task + distill) if weigh_all else task + lam * distill


def in_turn(counts, N):
    table = torch.empty_like(counts)
    table[counts.argsort(descending=True)] = torch.arange(len(counts)) % N
    return table


def unsorted(counts, N):
    table, work = torch.empty_like(counts), [0] * N
    for token, count in enumerate(counts.tolist()):
        table[token] = work.index(min(work))
        work[table[token]] += count
    return table


WRONG = {
    "distance_of_a_layer": {
        "padding counted": lambda X, X_tea, mask: ((X - X_tea) ** 2).mean(),
        "divided by padding": lambda X, X_tea, m: (((X - X_tea) * m[..., None]) ** 2).mean(),
        "a sum": lambda X, X_tea, m: ((X - X_tea)[m.bool()] ** 2).sum(),
        "sentences alike": lambda X, X_tea, m: torch.stack(
            [((x - y)[k.bool()] ** 2).mean() for x, y, k in zip(X, X_tea, m, strict=True)]
        ).mean(),
    },
    "distance_of_predictions": {
        "one way": lambda p, q: kl(p, q).mean(),
        "the other way": lambda p, q: kl(q, p).mean(),
        "not halved": lambda p, q: (kl(p, q) + kl(q, p)).mean(),
        "summed over sentences": lambda p, q: ((kl(p, q) + kl(q, p)) / 2).sum(),
    },
    "objective_of_a_sentence": {
        "all weighed": lambda *given: objective(*given, weigh_all=True),
        "no embeddings": lambda *given: objective(*given, first=1),
        "mean over layers": lambda *given: objective(*given, mean=True),
    },
    "gaps_by_seed": {
        "as they come": lambda a, b: [x - y for x, y in zip(a.values(), b.values())],  # noqa: B905
        "means": lambda a, b: [sum(a.values()) / len(a) - sum(b.values()) / len(b)],
        "the other way": lambda a, b: [b[s] - a[s] for s in sorted(a.keys() & b.keys())],
    },
    "verdicts_by_chance": {
        "plus only": lambda n, m: m * 2.0**-n,
        "one comparison": lambda n, m: 2.0 ** (1 - n),
    },
    "least_shared": {
        "two thirds": lambda F, N, K: 2 * K // 3,
        "rounded down": lambda F, N, K: max(0, (N * K - F) // max(N - 1, 1)),
        "below zero": lambda F, N, K: -((F - N * K) // max(N - 1, 1)),
        "shared by N": lambda F, N, K: max(0, -((F - N * K) // N)),
    },
    "load_of_experts": {
        "padding served": lambda e, m, N: torch.bincount(e.flatten(), minlength=N) / e.numel(),
        "idle ones forgotten": lambda e, m, N: torch.bincount(e[m.bool()]) / int(m.sum()),
        "counts": lambda e, m, N: torch.bincount(e[m.bool()], minlength=N),
    },
    "way_of_a_sentence": {
        "padding in the mean": lambda a, m, W_g: (a.mean(1) @ W_g).argmax(-1),
        "its first token": lambda a, m, W_g: (a[:, 0] @ W_g).argmax(-1),
        "the favourite of most": lambda a, m, W_g: (a @ W_g).argmax(-1).mode(1).values,
    },
    "balanced_deal": {"in turn": in_turn, "not sorted": unsorted},
}


@pytest.mark.parametrize(
    "exercise, mistake", [(name, mistake) for name, found in WRONG.items() for mistake in found]
)
def test_a_tempting_answer_is_refused(exercise, mistake):
    assert getattr(exercises, exercise)(WRONG[exercise][mistake]).said.startswith("not yet")
