"""Who gets which neurons: hand cases, the release's rule, properties, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.method.partition import (
    choose_ranking,
    composition,
    deal_layers,
    deal_neurons,
    random_ranking,
)
from moebert_lib.teaching import checks


@st.composite
def deals(draw):
    """A ranking and sizes that fit it."""
    n_experts = draw(st.integers(1, 6))
    n_own = draw(st.integers(0 if n_experts == 1 else 1, 6))
    n_shared = draw(st.integers(0 if n_own else 1, 8))
    spare = draw(st.integers(0, 10))
    ranking = draw(st.permutations(range(n_shared + n_experts * n_own + spare)))
    sizes = dict(n_experts=n_experts, expert_size=n_shared + n_own, n_shared=n_shared)
    return torch.tensor(ranking), sizes


def test_the_card_game_by_hand():
    dealt = deal_neurons(torch.tensor([5, 2, 0, 1, 3, 4]), n_experts=2, expert_size=3, n_shared=1)
    assert dealt.tolist() == [[5, 2, 1], [5, 0, 3]]


def test_figure_1_of_the_paper():
    # four neurons, two experts of two: the best in both, the next two dealt, the last dropped
    dealt = deal_neurons(torch.arange(4), n_experts=2, expert_size=2, n_shared=1)
    assert dealt.tolist() == [[0, 1], [0, 2]]


@given(deals())
def test_the_top_is_shared_and_the_rest_is_owned_once(deal):
    ranking, sizes = deal
    dealt = deal_neurons(ranking, **sizes)
    assert dealt.shape == (sizes["n_experts"], sizes["expert_size"])
    checks.deal_is_fair(dealt, ranking, sizes["n_shared"])


@given(deals())
def test_dealing_equals_striding_over_the_remainder(deal):
    ranking, sizes = deal
    rest, n_own = ranking[sizes["n_shared"] :], sizes["expert_size"] - sizes["n_shared"]
    for e, hand in enumerate(deal_neurons(ranking, **sizes)):
        expected = [*ranking[: sizes["n_shared"]], *rest[e :: sizes["n_experts"]][:n_own]]
        assert hand.tolist() == [int(neuron) for neuron in expected]


@given(deals())
def test_shared_own_and_dropped_add_up(deal):
    ranking, sizes = deal
    counts = composition(deal_neurons(ranking, **sizes), len(ranking))
    assert sum(counts) == len(ranking)
    n_own = sizes["n_experts"] * (sizes["expert_size"] - sizes["n_shared"])
    if sizes["n_experts"] > 1:
        assert counts == (sizes["n_shared"], n_own, len(ranking) - sizes["n_shared"] - n_own)


@pytest.mark.parametrize(
    ("n_shared", "n_experts", "kept", "common"),
    [
        (512, 4, 1536, 512),
        (0, 4, 3072, 0),
        (256, 4, 2304, 256),
        (512, 2, 1024, 512),
        (512, 8, 2560, 512),
        (512, 1, 768, 768),
    ],
)
def test_how_many_neurons_survive_at_the_papers_sizes(n_shared, n_experts, kept, common):
    dealt = deal_neurons(
        torch.randperm(3072), n_experts=n_experts, expert_size=768, n_shared=n_shared
    )
    counts = composition(dealt, 3072)
    assert (counts.shared, counts.shared + counts.own) == (common, kept)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(n_experts=2, expert_size=5, n_shared=1), "9 neurons are needed.*largest.* is 3"),
        (dict(n_experts=2, expert_size=2, n_shared=3), "n_shared=3 must lie in 0..expert_size=2"),
        (dict(n_experts=2, expert_size=2, n_shared=2), "identical"),
        (dict(n_experts=0, expert_size=2, n_shared=1), "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        deal_neurons(torch.arange(6), **sizes)


def test_the_largest_size_it_names_does_fit():
    deal_neurons(torch.arange(6), n_experts=2, expert_size=3, n_shared=1)
    with pytest.raises(ValueError, match="largest"):
        deal_neurons(torch.arange(6), n_experts=2, expert_size=4, n_shared=1)


def test_identical_experts_are_made_when_asked_for():
    dealt = deal_neurons(
        torch.arange(6), n_experts=3, expert_size=2, n_shared=2, allow_identical=True
    )
    assert dealt.tolist() == [[0, 1]] * 3


def test_a_ranking_with_a_double_is_refused():
    with pytest.raises(ValueError, match="permutation"):
        deal_neurons(torch.tensor([0, 0, 1]), n_experts=1, expert_size=1, n_shared=0)


def test_layers_are_dealt_one_by_one():
    rankings = random_ranking(3, 12, seed=1)
    sizes = dict(n_experts=2, expert_size=4, n_shared=2)
    expected = [deal_neurons(layer, **sizes) for layer in rankings]
    assert torch.equal(deal_layers(rankings, **sizes), torch.stack(expected))


def test_a_random_split_repeats_with_its_seed_only():
    assert torch.equal(random_ranking(2, 50, seed=3), random_ranking(2, 50, seed=3))
    assert not torch.equal(random_ranking(2, 50, seed=3), random_ranking(2, 50, seed=4))


def test_inverse_shares_the_least_important():
    ranking = torch.tensor([[2, 0, 1]])
    assert choose_ranking(ranking, "inverse").tolist() == [[1, 0, 2]]
    assert choose_ranking(ranking, "importance") is ranking
    with pytest.raises(ValueError, match="importance, random or inverse"):
        choose_ranking(ranking, "best")
