"""Figures about experts show the assignment they are given."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from moebert_lib.method.partition import deal_neurons
from moebert_lib.plots import experts as drawn
from moebert_lib.plots.style import COLORS, EXPERTS

HANDS = np.array([[5, 2, 1], [5, 0, 3]])
RANKING = np.array([5, 2, 0, 1, 3, 4])


@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 5), st.integers(0, 9))
def test_owners_counts_shared_own_and_dropped_neurons(n_experts, n_shared, n_own, n_dropped):
    n_neurons = n_shared + n_experts * n_own + n_dropped
    own = np.arange(n_shared, n_shared + n_experts * n_own).reshape(n_experts, n_own)
    hands = np.c_[np.tile(np.arange(n_shared), (n_experts, 1)), own]
    owner = drawn.owners(hands, n_neurons)
    held_by_all = n_shared if n_experts > 1 else 0  # one expert shares with nobody
    assert (owner == drawn.SHARED).sum() == held_by_all
    assert (owner == drawn.DROPPED).sum() == n_dropped
    assert ((owner >= 0).sum(), n_neurons) == (n_neurons - held_by_all - n_dropped, len(owner))


def test_the_deal_has_one_card_per_neuron_and_one_per_place_in_a_hand():
    ax = drawn.deal(HANDS, RANKING)
    cards = [(patch.get_gid(), to_hex(patch.get_facecolor()).upper()) for patch in ax.patches]
    first, second = EXPERTS[:2]
    shared, dropped = COLORS["shared"], COLORS["dropped"]
    sorted_row = [(5, shared), (2, first), (0, second), (1, first), (3, second), (4, dropped)]
    hands = [(5, shared), (2, first), (1, first), (5, shared), (0, second), (3, second)]
    assert cards == [(f"neuron {n}", color.upper()) for n, color in sorted_row + hands]


def test_scores_are_printed_above_their_own_neuron():
    ax = drawn.deal(HANDS, RANKING, scores=[0.3, 0.2, 0.4, 0.1, 0.0, 0.9])
    printed = [t.get_text() for t in ax.texts if t.get_position()[1] == 2.72]
    assert printed == ["0.9", "0.4", "0.3", "0.2", "0.1", "0"]


def test_hands_may_be_of_different_lengths_and_neurons_of_any_number():
    ax = drawn.deal([[905, 12], [905], []], [905, 12, 7])
    assert [patch.get_gid() for patch in ax.patches] == [
        f"neuron {n}" for n in (905, 12, 7, 905, 12, 905)
    ]
    colors = [to_hex(patch.get_facecolor()).upper() for patch in ax.patches[:3]]
    assert colors == [COLORS["shared"], EXPERTS[0].upper(), COLORS["dropped"]]


@pytest.mark.parametrize("width, n_experts", [(1536, 4), (3072, 4), (4096, 8), (64, 3), (12, 1)])
def test_neurons_spaced_along_a_ranking_show_the_deal_in_proportion(width, n_experts, generator):
    ranking = torch.randperm(width, generator=generator)
    size = width // n_experts
    sizes = dict(n_experts=n_experts, expert_size=size, n_shared=2 * size // 3)
    experts = deal_neurons(ranking, **sizes)
    seen, hands = drawn.spaced(experts, ranking, n=12)
    ranks = [ranking.tolist().index(neuron) for neuron in seen]
    assert len(set(seen)) == 12 and len(set(np.diff(ranks))) == 1
    for hand, held in zip(hands, experts.tolist(), strict=True):
        assert set(hand) == set(seen) & set(held)
    own = [neuron for hand in hands for neuron in hand if sum(neuron in h for h in hands) == 1]
    if width > 1000:  # a round of cards shows every expert before it shows one again
        owners = [next(e for e, h in enumerate(hands) if n in h) for n in seen if n in own]
        assert len(set(owners[:n_experts])) == min(n_experts, len(owners))


def test_each_experts_strip_marks_exactly_its_neurons_along_the_ranking():
    ax = drawn.who_keeps_what(HANDS, RANKING)
    blank = np.array([int(COLORS["dropped"][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    held = [~np.isclose(image.get_array()[0], blank).all(axis=1) for image in ax.get_images()]
    assert [RANKING[mask].tolist() for mask in held] == [[5, 2, 1], [5, 0, 3]]


def test_the_legend_of_who_keeps_what_counts_neurons():
    legend = drawn.who_keeps_what(HANDS, RANKING).get_legend()
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["shared by all: 1", "one expert each: 4", "dropped: 1"]


def test_kept_neurons_are_shared_plus_own():
    frame = pd.DataFrame({"n_shared": [384, 0, 256], "own": [0, 1536, 512]})
    ax = drawn.kept_by_shared(frame, width=1536)
    line = ax.get_lines()[0]
    assert list(line.get_xdata()) == [0, 256, 384]
    assert list(line.get_ydata()) == [1536, 768, 384]
    assert ax.get_ylim() == (0, 1536)
