"""Groups of exactly one size: against exhaustive search, planted groups, and refusals."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moebert_lib.method.partition import (
    balanced_assignment,
    balanced_kmeans,
    coactivation,
    composition,
    deal_neurons,
    group_neurons,
    partition_graph,
    unit_rows,
)

SEEDS = st.integers(0, 2**31 - 1)


def divisions(n: int, k: int):
    """Every way to give ``n`` things labels ``0 .. k - 1``, each equally often."""
    return {*itertools.permutations([label for label in range(k) for _ in range(n // k)])}


def spread_within(points: np.ndarray, labels) -> float:
    """Squared distances to the own cluster's mean, added up in a loop."""
    labels = np.asarray(labels)
    groups = [points[labels == label] for label in set(labels.tolist())]
    return sum(((p - group.mean(0)) ** 2).sum() for group in groups for p in group)


def weight_within(graph: np.ndarray, labels) -> float:
    """Weight of all pairs in one part, added up in a loop."""
    pairs = itertools.combinations(range(len(graph)), 2)
    return sum(graph[i, j] for i, j in pairs if labels[i] == labels[j])


def graph_of(seed: int, n: int) -> np.ndarray:
    half = np.triu(np.random.default_rng(seed).random((n, n)), 1)
    return half + half.T


@given(SEEDS)
def test_the_assignment_is_the_best_of_all(seed):
    cost = np.random.default_rng(seed).normal(size=(6, 3))
    found = balanced_assignment(cost)
    assert np.bincount(found).tolist() == [2, 2, 2]
    best = min(cost[range(6), labels].sum() for labels in divisions(6, 3))
    assert cost[range(6), found].sum() == pytest.approx(best)


@given(SEEDS, st.integers(1, 6))
def test_a_larger_assignment_costs_what_scipy_s_does(seed, k):
    rng = np.random.default_rng(seed)
    ties = rng.integers(9, size=(10 * k, k)) + rng.integers(9, size=k)
    for cost in (ties, rng.normal(size=ties.shape) + rng.normal(size=k)):
        found = balanced_assignment(cost)
        assert np.bincount(found).tolist() == [10] * k
        least = cost.repeat(10, axis=1)[linear_sum_assignment(cost.repeat(10, axis=1))].sum()
        assert cost[range(10 * k), found].sum() == pytest.approx(least)


@given(SEEDS)
def test_kmeans_cannot_be_bettered_by_either_of_its_steps(seed):
    points = np.random.default_rng(seed).normal(size=(12, 2))
    labels = balanced_kmeans(points, 3, seed=seed).numpy()
    assert np.bincount(labels).tolist() == [4, 4, 4]
    centres = np.stack([points[labels == c].mean(0) for c in range(3)])
    cost = ((points[:, None] - centres) ** 2).sum(-1)
    own = cost[range(12), labels].sum()
    assert own == pytest.approx(spread_within(points, labels))
    assert own == pytest.approx(cost[range(12), balanced_assignment(cost)].sum())


def test_kmeans_finds_planted_clusters_whatever_its_start():
    planted = torch.randperm(40) % 4
    points = 9 * np.eye(4)[planted] + np.random.default_rng(0).normal(size=(40, 4))
    for seed in range(5):
        labels = balanced_kmeans(points, 4, seed=seed)
        assert len({*zip(planted.tolist(), labels.tolist(), strict=True)}) == 4
        assert torch.equal(labels, balanced_kmeans(points, 4, seed=seed))


def test_kmeans_starts_from_points_apart():
    # k-means++ never takes a point twice, so pairs of one point are found from any seed
    places = np.random.default_rng(0).integers(100, size=(8, 2)).astype(float)
    for seed in range(20):
        labels = balanced_kmeans(np.concatenate([places, places]), 8, seed=seed).tolist()
        assert labels[:8] == labels[8:]


def test_kmeans_of_equal_points_still_has_equal_clusters():
    assert torch.bincount(balanced_kmeans(np.ones((8, 2)), 4, seed=0)).tolist() == [2] * 4


@given(SEEDS)
def test_no_exchange_of_two_neurons_betters_a_partition(seed):
    graph = graph_of(seed, 12)
    labels = partition_graph(graph, 3)
    assert torch.bincount(labels).tolist() == [4, 4, 4]
    own = weight_within(graph, labels)
    for i, j in itertools.combinations(range(12), 2):
        other = labels.clone()
        other[[i, j]] = labels[[j, i]]
        assert weight_within(graph, other) <= own + 1e-9
    assert own >= weight_within(graph, torch.arange(12) % 3)  # the deal it starts from


def slow_partition(graph: np.ndarray, k: int) -> list[int]:
    """The exchanges one by one, each gain from the whole weight inside."""

    def gain(labels, i, j):
        other = labels.copy()
        other[[i, j]] = labels[[j, i]]
        now, then = (graph[s[:, None] == s].sum() / 2 for s in (labels, other))
        return then - now

    nodes = range(len(graph))
    labels, moved = np.arange(len(graph)) % k, True
    while moved:
        gains = [[gain(labels, i, j) for j in nodes] for i in nodes]
        moved = False
        for i in sorted(nodes, key=lambda i: -max(gains[i])):
            j = gains[i].index(max(gains[i]))
            if max(gains[i]) > 0 and gain(labels, i, j) > 0:
                labels[[i, j]], moved = labels[[j, i]], True
    return labels.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_a_partition_by_counts_is_that_of_exchanges_one_by_one(seed):
    graph = np.round(20 * graph_of(seed, 12))
    assert partition_graph(graph, 3).tolist() == slow_partition(graph, 3)


@pytest.mark.parametrize("n, seed", [(8, 9), (24, 0), (40, 1), (40, 6), (40, 7)])
def test_a_partition_by_fractions_ends_where_nothing_but_rounding_is_gained(n, seed):
    graph = np.round(10 * graph_of(seed, n)) / 10  # steps of 0.1, which no float is
    labels = partition_graph(graph, 4).numpy()
    assert np.bincount(labels).tolist() == [n // 4] * 4
    towards = np.stack([graph[:, labels == part].sum(1) for part in range(4)], axis=1)
    for i, j in itertools.combinations(range(n), 2):
        a, b = labels[i], labels[j]
        gain = towards[i, b] - towards[i, a] + towards[j, a] - towards[j, b] - 2 * graph[i, j]
        assert a == b or gain < 1e-8


def test_a_partition_of_few_is_near_the_best_of_all():
    shares = []
    for seed in range(10):
        graph = graph_of(seed, 8)
        best = max(weight_within(graph, labels) for labels in divisions(8, 2))
        shares.append(weight_within(graph, partition_graph(graph, 2)) / best)
    assert max(shares) == pytest.approx(1) and min(shares) > 0.9


def test_a_partition_finds_planted_parts():
    planted = torch.randperm(40) % 4
    graph = (planted[:, None] == planted).double().numpy() + 0.3 * graph_of(1, 40)
    np.fill_diagonal(graph, 0)
    assert len({*zip(planted.tolist(), partition_graph(graph, 4).tolist(), strict=True)}) == 4


def test_coactivation_counts_tokens_on_which_both_are_active():
    active = torch.rand(50, 7) > 0.5
    graph = coactivation(active)
    for i, j in itertools.product(range(7), repeat=2):
        assert graph[i, j] == (0 if i == j else sum(a[i] and a[j] for a in active.tolist()))


@given(SEEDS, st.integers(0, 3))
def test_grouping_moves_neurons_between_experts_and_changes_nothing_else(seed, n_shared):
    ranking = torch.from_numpy(np.random.default_rng(seed).permutation(40))
    dealt = deal_neurons(ranking, n_experts=4, expert_size=5, n_shared=n_shared)
    own = dealt[:, n_shared:].T.flatten()
    labels = torch.randperm(len(own)) % 4
    grouped = group_neurons(dealt, n_shared, labels)
    assert torch.equal(grouped[:, :n_shared], dealt[:, :n_shared])
    assert composition(grouped, 40) == composition(dealt, 40)
    place = {int(neuron): rank for rank, neuron in enumerate(ranking)}
    for expert, hand in enumerate(grouped[:, n_shared:].tolist()):
        assert {*hand} == {int(n) for n, label in zip(own, labels, strict=True) if label == expert}
        assert hand == sorted(hand, key=place.__getitem__)


def test_a_deal_is_the_grouping_by_turns():
    dealt = deal_neurons(torch.randperm(30), n_experts=3, expert_size=6, n_shared=2)
    assert torch.equal(group_neurons(dealt, 2, torch.arange(12) % 3), dealt)


def test_only_directions_count():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert unit_rows(rows).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: balanced_kmeans(np.ones((7, 2)), 3, seed=0), "7 points do not make 3 clusters"),
        (lambda: partition_graph(np.ones((7, 7)), 2), "7 neurons do not make 2 parts"),
        (
            lambda: group_neurons(torch.arange(8).view(2, 4), 2, torch.tensor([0, 0, 0, 1])),
            r"groups of \[3, 1\] neurons; expected 2 of 2",
        ),
    ],
)
def test_groups_of_other_sizes_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
