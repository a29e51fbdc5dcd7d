"""Agreement of rankings: hand cases, a reference, and what must hold for any scores."""

import pytest
import torch
from scipy.stats import spearmanr

from moebert_lib.method import rank_stability
from moebert_lib.method.importance import Importance


@pytest.fixture
def noisy(generator):
    """Two layers of 40 neurons, neuron j worth about j, in 20 blocks of 3 examples."""
    worth = torch.arange(40.0).double().expand(20, 2, 40)
    blocks = (worth + 4 * torch.randn(20, 2, 40, generator=generator)).clamp(min=0)
    return Importance(blocks.sum(0), blocks, torch.full((20,), 3))


def test_overlap_of_the_top_by_hand():
    left, right = torch.tensor([[9.0, 8, 1, 0]]), torch.tensor([[9.0, 0, 1, 8]])
    assert rank_stability.top_overlap(left, right, 2).tolist() == [0.5]
    assert rank_stability.top_overlap(left, left, 3).tolist() == [1.0]
    assert rank_stability.top_overlap(left, -left, 2).tolist() == [0.0]


def test_rank_correlation_is_scipys(generator):
    left, right = torch.rand(2, 3, 30, generator=generator)
    expected = [spearmanr(a, b).statistic for a, b in zip(left, right, strict=True)]
    assert rank_stability.rank_correlation(left, right).tolist() == pytest.approx(expected)


def test_pairs_of_scores_come_once_with_their_means_over_layers(generator):
    one, other, third = torch.rand(3, 2, 30, generator=generator)
    pairs = rank_stability.score_pairs({"a": one, "b": other, "c": -third}, 10)
    assert list(zip(pairs["score"], pairs["other"], strict=True)) == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    expected = [spearmanr(a, b).statistic for a, b in zip(one, -third, strict=True)]
    assert pairs["rho"][1] == pytest.approx(sum(expected) / 2)
    best = [set(scores.argsort()[-10:].tolist()) for scores in (*one, *other)]
    assert pairs["overlap"][0] == (len(best[0] & best[2]) + len(best[1] & best[3])) / 20


def test_more_examples_agree_better(noisy):
    frame = rank_stability.agreement(noisy, n=8)
    mean = frame.groupby("n_examples")["agreement"].mean()
    assert mean.index.tolist() == [3, 6, 15, 30]
    assert mean.is_monotonic_increasing and mean.iloc[-1] > 0.95
    assert len(frame) == 4 * 8 * 2


def test_too_few_blocks_leave_out_the_larger_sets(noisy):
    few = Importance(noisy.blocks[:5].sum(0), noisy.blocks[:5], noisy.counts[:5])
    assert set(rank_stability.agreement(few)["n_examples"]) == {3, 6}


def test_identical_blocks_find_every_top_neuron_again():
    blocks = torch.rand(1, 2, 10).double().expand(4, 2, 10)
    found = rank_stability.top_again(
        Importance(blocks.sum(0), blocks, torch.ones(4).long()), 3, n=10
    )
    assert found[["overlap", "low", "high"]].eq(1).all(axis=None)
    assert found["layer"].tolist() == [1, 2]


def test_an_interval_holds_the_mean_and_narrows_with_nothing_to_doubt(noisy):
    found = rank_stability.top_again(noisy, 10, n=100)
    assert (found["low"] <= found["overlap"]).all() and (found["overlap"] <= found["high"]).all()
    assert (found["low"] < 1).all()


def test_jaccard_by_hand():
    a, b = torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([[4.0, 1, 2, 3]])
    assert rank_stability.jaccard(a, b, 2) == pytest.approx(1 / 3)  # one of three in either


def test_the_table_of_tasks_is_symmetric_with_ones_on_the_diagonal(noisy, generator):
    other = Importance(torch.rand(2, 40, generator=generator), noisy.blocks, noisy.counts)
    table = rank_stability.jaccard_table({"a": noisy, "b": other}, 10)
    assert table.loc["a", "b"] == table.loc["b", "a"] < 1 == table.loc["b", "b"]


def test_halves_agree_better_than_chance_and_worse_than_perfectly(noisy):
    assert rank_stability.jaccard_chance(10, 40) < rank_stability.jaccard_halves(noisy, 10) < 1
