"""Who serves which token: balance, independence from the batch, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.method.partition import random_ranking
from moebert_lib.method.routing import (
    HashRouter,
    Route,
    SentenceGate,
    TokenGate,
    balance_loss,
    balanced_table,
    clustered_table,
    experts_forward,
    loads,
    random_table,
)
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.moe_layer import moe_layers


def test_two_experts_serve_three_tokens_by_hand():
    A = torch.tensor([[1.0, 2.0], [3.0, -1.0], [-1.0, 1.0]])  # (N, D) = (3, 2)
    W1 = [torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]])]  # one neuron each
    b1 = [torch.tensor([0.5]), torch.tensor([-1.0])]
    W2 = [torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [3.0]])]
    b2 = [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])]
    expert_of, p = torch.tensor([1, 0, 1]), torch.tensor([[1.0], [0.5], [1.0]])
    X = experts_forward(A, expert_of, p, W1, b1, W2, b2, torch.relu)
    # h of each token: relu(2 * 1 - 1) = 1, relu(3 - 1 + 0.5) = 2.5, relu(2 * -1 - 1) = 0
    assert X.tolist() == [[1.0, 3.0], [1.25, 0.5], [1.0, 0.0]]


def test_a_hash_looks_the_token_up():
    router = HashRouter(random_table(50, 4, seed=0))
    ids = torch.randint(50, (3, 7))
    route = router(torch.randn(3, 7, 8), ids, None)
    assert torch.equal(route.experts.view(3, 7), router.tid2eid[:, 0][ids])
    assert torch.equal(route.weights, torch.ones(21, 1)) and route.probabilities is None


def test_a_hash_without_token_ids_is_refused():
    with pytest.raises(ValueError, match="needs input_ids"):
        HashRouter(random_table(50, 4, seed=0))(torch.randn(3, 7, 8), None, None)


def test_a_random_table_is_nearly_uniform():
    share = loads(random_table(30_522, 4, seed=0), 4)
    assert torch.allclose(share, torch.full((4,), 0.25).double(), atol=0.01)


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=60), st.integers(1, 5))
def test_balanced_loads_differ_by_at_most_the_largest_frequency(counts, n_experts):
    frequencies = torch.tensor(counts)
    table = balanced_table(frequencies, n_experts, seed=0)
    load = torch.zeros(n_experts, dtype=torch.int64).index_add_(0, table, frequencies)
    assert load.max() - load.min() <= frequencies.max()


@given(st.integers(1, 6), st.integers(1, 40))
def test_unseen_tokens_are_spread_evenly(n_experts, vocab):
    table = balanced_table(torch.zeros(vocab, dtype=torch.int64), n_experts, seed=0)
    held = torch.bincount(table, minlength=n_experts)
    assert held.max() - held.min() <= 1


def test_balance_by_hand():
    # 5 and 4 go apart; 3 joins the 4, 2 joins the 5: 7 and 7
    table = balanced_table(torch.tensor([5, 4, 3, 2]), 2, seed=0)
    assert table.tolist() == [0, 1, 1, 0]


def test_zipf_tokens_are_better_balanced_than_at_random():
    frequencies = (100_000 / torch.arange(1, 5001)).long()
    spread = {}
    tables = {
        "balance": balanced_table(frequencies, 4, seed=0),
        "random": random_table(5000, 4, seed=0),
    }
    for name, table in tables.items():
        load = torch.zeros(4).index_add_(0, table, frequencies.float())
        spread[name] = float(load.max() / load.min())
    assert spread["balance"] < 1.01 < spread["random"]


def test_a_token_gate_takes_the_most_probable_expert():
    gate = TokenGate(8, 3)
    hidden = torch.randn(2, 5, 8)
    expected = (hidden.view(10, 8) @ gate.gate.weight.T).softmax(-1)
    route = gate(hidden, None, None)
    assert torch.allclose(route.probabilities, expected)
    assert torch.equal(route.experts[:, 0], expected.argmax(-1))
    assert torch.allclose(route.weights[:, 0], expected.max(-1).values)


def test_a_sentence_goes_to_one_expert_whatever_its_padding():
    gate, hidden = SentenceGate(8, 4), torch.randn(1, 5, 8)
    alone = gate(hidden, None, torch.ones(1, 5))
    padded = torch.cat([hidden, torch.full((1, 3, 8), 9.0)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    together = gate(padded, None, mask)
    assert len(set(together.experts[:, 0].tolist())) == 1
    assert torch.equal(alone.experts[0], together.experts[0])
    assert torch.allclose(alone.weights[0], together.weights[0])


def test_balance_loss_is_one_when_even_and_e_when_all_go_to_one():
    even = Route(torch.arange(4)[:, None], torch.ones(4, 1), torch.full((4, 4), 0.25))
    one = Route(torch.zeros(4, 1).long(), torch.ones(4, 1), torch.eye(4)[[0, 0, 0, 0]])
    assert float(balance_loss(even)) == pytest.approx(1.0)
    assert float(balance_loss(one)) == pytest.approx(4.0)


def test_balance_loss_leaves_padding_out():
    probabilities = torch.rand(6, 3).softmax(-1)
    experts = probabilities.argmax(-1, keepdim=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    real = mask.view(-1).bool()
    whole = Route(experts, torch.ones(6, 1), probabilities)
    part = Route(experts[real], torch.ones(3, 1), probabilities[real])
    assert torch.allclose(balance_loss(whole, mask), balance_loss(part))


def test_a_hash_has_nothing_to_balance():
    with pytest.raises(ValueError, match="no probabilities"):
        balance_loss(Route(torch.zeros(2, 1).long(), torch.ones(2, 1), None))


def test_every_word_is_nearest_to_the_mean_of_its_own_cluster():
    noise = torch.Generator().manual_seed(0)
    words = torch.randn(300, 6, generator=noise, dtype=torch.float64)
    table = clustered_table(words, 4, seed=0)
    means = torch.stack([words[table == e].mean(0) for e in range(4)])
    slow = [min(range(4), key=lambda e: float((w - means[e]).square().sum())) for w in words]
    assert table.tolist() == slow


def test_clusters_are_those_of_the_words_the_same_for_a_seed_and_others_for_another():
    words = torch.cat([torch.randn(20, 3) + 50 * e for e in range(3)])
    parts = clustered_table(words, 3, seed=0).view(3, 20)
    assert (
        all(len(set(part.tolist())) == 1 for part in parts) and len(set(parts[:, 0].tolist())) == 3
    )
    blur = torch.randn(500, 8)
    tables = [clustered_table(blur, 4, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def test_a_converted_model_has_one_table_of_its_own_words_for_all_layers(tiny_bert):
    dense = tiny_bert()
    model = to_moebert(dense, random_ranking(2, 64, seed=0), routing="hash-cluster", seed=3)
    table = clustered_table(dense.get_input_embeddings().weight, 4, seed=3)
    assert all(torch.equal(x.router.tid2eid[:, 0], table) for x in moe_layers(model))
