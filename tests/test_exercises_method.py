"""Exercises of notebooks 0 to 2: answers pass, and the mistakes that come to mind do not."""

import pytest
import torch

from moebert_lib.method.partition import composition, deal_neurons
from moebert_lib.teaching import exercises


def added(A, w1, b1, w2):
    return (A @ w1 + b1).relu()[:, None] * w2


def distances(X, outputs):
    return (outputs - X).square().sum(-1)


def held(scores, top):
    return scores.sort(descending=True).values[:, :top].sum(1) / scores.sum(1)


def flow(a, b1, grad_a, h, grad_h):
    return (a - b1) * grad_a + h * grad_h


def again(blocks, drawn, top):
    best = [scores.topk(top).indices for scores in (blocks.sum(0), blocks[drawn].sum(0))]
    return torch.isin(*best).double().mean()


def turned(ranking, N, K, s):
    rest = ranking[s : s + N * (K - s)].view(K - s, N)
    odd = torch.arange(K - s)[:, None] % 2 == 1
    return torch.cat([ranking[:s].expand(N, -1), torch.where(odd, rest.flip(1), rest).T], 1)


def like_cards(ranking, N, K, s):
    sizes = dict(n_experts=N, expert_size=K, n_shared=s)
    return deal_neurons(ranking, **sizes)


ANSWERS = {
    "neuron_adds": added,
    "importance_of": lambda one, other: (one + other).abs().sum(0),
    "closest_expert": lambda X, outputs: distances(X, outputs).argmin(0),
    "mass_held": held,
    "fast_scores": lambda *flows: flow(*flows).sum(1).abs().sum(0),
    "found_again": again,
    "counted": composition,
    "mass_of_experts": lambda scores, experts: scores[experts].sum(1) / scores.sum(),
    "back_and_forth": turned,
}

MISTAKES = [
    ("neuron_adds", "without ReLU", lambda A, w1, b1, w2: (A @ w1 + b1)[:, None] * w2),
    ("neuron_adds", "without its bias", lambda A, w1, b1, w2: added(A, w1, 0, w2)),
    ("neuron_adds", "of all words together", lambda *layer: added(*layer).sum(0)),
    ("importance_of", "signs kept until the end", lambda one, two: (one + two).sum(0).abs()),
    ("importance_of", "each term without sign", lambda one, two: (one.abs() + two.abs()).sum(0)),
    ("importance_of", "of words", lambda one, two: (one + two).abs().sum(1)),
    ("closest_expert", "the farthest", lambda X, outputs: distances(X, outputs).argmax(0)),
    ("closest_expert", "the largest output", lambda X, outputs: outputs.sum(-1).argmax(0)),
    ("closest_expert", "with signs", lambda X, outputs: (outputs - X).sum(-1).abs().argmin(0)),
    ("mass_held", "not sorted", lambda scores, top: scores[:, :top].sum(1) / scores.sum(1)),
    ("mass_held", "of all layers", lambda scores, top: held(scores, top) / len(scores)),
    ("mass_held", "a sum", lambda scores, top: held(scores, top) * scores.sum(1)),
    ("fast_scores", "no sign at any token", lambda *flows: flow(*flows).abs().sum((0, 1))),
    ("fast_scores", "signs kept until the end", lambda *flows: flow(*flows).sum((0, 1)).abs()),
    ("fast_scores", "with b1", lambda a, b1, *rest: flow(a, 0, *rest).sum(1).abs().sum(0)),
    ("fast_scores", "one term", lambda *f: flow(*f[:3], 0, 0).sum(1).abs().sum(0)),
    (
        "found_again",
        "each block once",
        lambda blocks, drawn, top: again(blocks, drawn.unique(), top),
    ),
    (
        "found_again",
        "in the same place",
        lambda blocks, drawn, top: (
            (blocks.sum(0).topk(top).indices == blocks[drawn].sum(0).topk(top).indices)
            .double()
            .mean()
        ),
    ),
    ("found_again", "a count", lambda *given: top_times(again, *given)),
    (
        "counted",
        "shared once in each",
        lambda experts, F: (
            len(experts) * composition(experts, F).shared,
            *composition(experts, F)[1:],
        ),
    ),
    (
        "counted",
        "slots for neurons",
        lambda experts, F: (composition(experts, F).shared, experts.numel(), F - experts.numel()),
    ),
    (
        "mass_of_experts",
        "of all slots",
        lambda scores, experts: scores[experts].sum(1) / scores[experts].sum(),
    ),
    ("mass_of_experts", "a mean", lambda scores, experts: scores[experts].mean(1) / scores.sum()),
    (
        "mass_of_experts",
        "of places",
        lambda scores, experts: (
            scores[: experts.shape[1]].sum().expand(len(experts)) / scores.sum()
        ),
    ),
    ("back_and_forth", "one direction", like_cards),
    (
        "back_and_forth",
        "in blocks",
        lambda ranking, N, K, s: torch.cat(
            [ranking[:s].expand(N, -1), ranking[s : s + N * (K - s)].view(N, K - s)], 1
        ),
    ),
    ("back_and_forth", "all rounds backwards", lambda *given: like_cards(*given).flip(0)),
]


def top_times(share, blocks, drawn, top):
    return top * share(blocks, drawn, top)


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_is_right(name):
    attempt = getattr(exercises, name)(ANSWERS[name])
    assert attempt.right, attempt


@pytest.mark.parametrize("name", ANSWERS)
def test_an_empty_skeleton_is_to_do(name):
    attempt = getattr(exercises, name)(lambda *_: None)
    assert attempt == (False, "to do: your function returns nothing yet")


@pytest.mark.parametrize(
    "name, mine", [(n, f) for n, _, f in MISTAKES], ids=[f"{n}: {what}" for n, what, _ in MISTAKES]
)
def test_a_tempting_mistake_is_refused_by_a_case_worked_by_hand(name, mine):
    """In the first two cases, where the reader can follow the numbers."""
    attempt = getattr(exercises, name)(mine)
    assert not attempt.right and attempt.said.startswith("not yet: ")
    assert "tensor of shape" not in attempt.said.partition(" gave ")[0]
