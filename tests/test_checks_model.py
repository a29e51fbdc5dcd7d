"""Checks about routers and learning hold for the library, and fail where they should."""

import copy

import pytest
import tiny_models
import torch

from moebert_lib.method import routing
from moebert_lib.method.distillation_loss import prediction_loss
from moebert_lib.method.partition import random_ranking
from moebert_lib.method.routing import balanced_table, random_table
from moebert_lib.model import moe_layer
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.moe_layer import moe_layers
from moebert_lib.teaching import checks


@pytest.fixture
def moebert(tiny_bert):
    def make(routing="hash-random", **sizes):
        ranking = random_ranking(2, 64, seed=0)
        return to_moebert(tiny_bert(), ranking, routing=routing, allow_identical=True, **sizes)

    return make


def test_a_hash_sends_a_token_to_one_expert_and_a_gate_does_not(moebert, tiny_batch):
    batch = tiny_batch(n=8)
    assert checks.same_token_same_expert(moebert(), batch).difference == 0
    with pytest.raises(AssertionError, match="FAILS: a hash sends every occurrence"):
        checks.same_token_same_expert(moebert("gate-token"), batch)


def test_a_sentence_gate_keeps_sentences_together_and_a_token_gate_does_not(moebert, tiny_batch):
    batch = tiny_batch(n=8)
    assert checks.sentence_stays_together(moebert("gate-sentence"), batch).difference == 0
    with pytest.raises(AssertionError, match="FAILS: a sentence gate keeps"):
        checks.sentence_stays_together(moebert("gate-token"), batch)


def test_a_gates_factor_is_at_least_an_even_share(moebert, tiny_batch):
    model = moebert("gate-token")
    checks.gate_takes_its_favourite(model, tiny_batch())
    model.config.n_experts = 1  # then p would have to be 1
    with pytest.raises(AssertionError, match="FAILS: a gate's p lies"):
        checks.gate_takes_its_favourite(model, tiny_batch())


def test_two_of_a_gates_factors_are_at_least_two_even_shares(moebert, tiny_batch):
    model, batch = moebert("gate-token", num_experts_per_tok=2), tiny_batch()
    assert "2 largest p add up" in checks.gate_takes_its_favourite(model, batch).claim
    checks.sentence_stays_together(moebert("gate-sentence", num_experts_per_tok=2), batch)
    model.config.n_experts = 2  # then both together would have to be 1
    with pytest.raises(AssertionError, match="FAILS: a gate's 2 largest p add up to between 2/N"):
        checks.gate_takes_its_favourite(model, batch)


def test_balanced_tables_are_within_one_token_and_random_ones_need_not_be():
    counts = torch.arange(1, 41)
    checks.balance_is_within_one_token(balanced_table(counts, 4, seed=0), counts, 4)
    with pytest.raises(AssertionError, match="FAILS: the loads differ"):
        checks.balance_is_within_one_token(random_table(40, 4, seed=0), counts, 4)
    with pytest.raises(AssertionError, match="FAILS: the loads differ"):
        checks.balance_is_within_one_token(torch.zeros(40, dtype=torch.int64), counts, 4)


def test_an_embedding_that_moved_is_found(moebert, tiny_bert, tiny_batch):
    dense, model = tiny_bert(), moebert()
    checks.conversion_leaves_embeddings(model, dense, tiny_batch())
    model.bert.embeddings.LayerNorm.bias.data[0] += 1e-6
    with pytest.raises(AssertionError, match="FAILS: conversion leaves"):
        checks.conversion_leaves_embeddings(model, dense, tiny_batch())


def test_one_direction_of_kl_is_not_symmetric(generator):
    a, b = torch.randn(2, 4, 3, generator=generator)
    checks.swapping_changes_nothing(prediction_loss, a, b)
    with pytest.raises(AssertionError, match="FAILS: L_pred"):
        one_way = lambda a, b: (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()  # noqa: E731
        checks.swapping_changes_nothing(one_way, a, b)
    with pytest.raises(AssertionError, match="choose others"):
        checks.swapping_changes_nothing(prediction_loss, a, a)


def test_identical_experts_are_one_and_others_are_not(moebert, tiny_batch):
    many = moebert(n_experts=4, expert_size=16, n_shared=16)
    one = moebert(n_experts=1, expert_size=16, n_shared=16)
    checks.identical_experts_are_one(many, one, tiny_batch())
    with pytest.raises(AssertionError, match="FAILS: identical experts"):
        checks.identical_experts_are_one(moebert(n_experts=4, n_shared=2), one, tiny_batch())


def test_a_table_that_changed_is_found_and_a_gate_has_none(moebert):
    before, after = moebert(), moebert()
    checks.training_leaves_tables(before, after)
    after.bert.encoder.layer[1].output.router.tid2eid[5] += 1
    with pytest.raises(AssertionError, match="FAILS: training leaves"):
        checks.training_leaves_tables(before, after)
    with pytest.raises(AssertionError, match="FAILS: training leaves"):
        checks.training_leaves_tables(moebert("gate-token"), copy.deepcopy(moebert("gate-token")))


def test_outputs_that_are_the_same_do_not_differ():
    checks.outputs_differ(torch.zeros(2, 3), torch.full((2, 3), 0.1))
    with pytest.raises(AssertionError, match="FAILS: outputs differ, by up to 1e-05"):
        checks.outputs_differ(torch.zeros(2, 3), torch.full((2, 3), 1e-5))


@pytest.mark.parametrize(
    "name",
    [
        "output.experts.down_proj_bias",
        "output.LayerNorm.weight",
        "output.LayerNorm.bias",
        "attention.self.query.weight",
    ],
)
@pytest.mark.parametrize("norm", ["per-expert", "shared"])
def test_a_bias_a_layer_norm_or_another_weight_that_moved_is_found(moebert, tiny_bert, name, norm):
    model = moebert(expert_layer_norm=norm)
    checks.experts_hold_the_dense_neurons(model, tiny_bert())
    model.bert.encoder.layer[1].get_parameter(name).data[-1] += 1e-9
    with pytest.raises(AssertionError, match="FAILS: before training every expert's"):
        checks.experts_hold_the_dense_neurons(model, tiny_bert())


@pytest.mark.parametrize("n_shared", [0, 10])
def test_a_deal_in_another_order_is_found(tiny_bert, n_shared):
    scores = torch.randint(9, (2, 64)).double()  # many alike
    ranking = scores.argsort(dim=-1, descending=True, stable=True)
    model, other = (
        to_moebert(tiny_bert(), order, n_shared=n_shared) for order in (ranking, ranking.flip(-1))
    )
    checks.deal_follows_scores(model, scores)
    with pytest.raises(AssertionError, match="FAILS: the highest scores are in every expert"):
        checks.deal_follows_scores(other, scores)
    neurons = moe_layers(model)[1].neurons
    neurons[:, -1] = neurons[:, -1].roll(1)  # as many of each rank, to other experts
    with pytest.raises(AssertionError, match="difference 4"):
        checks.deal_follows_scores(model, scores)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"routing": "gate-token", "num_experts_per_tok": 2, "shared_neurons": "tied"},
        {"routing": "gate-sentence", "gate_scaling": "outside", "expert_layer_norm": "shared"},
        {"routing": "gate-token", "num_experts_per_tok": 3, "expert_layer_norm": "shared"},
    ],
)
def test_a_token_served_by_another_expert_is_found(changes, monkeypatch):
    model, inputs = tiny_models.moebert(**changes), tiny_models.batch([5, 9, 2])
    assert checks.experts_serve_their_tokens(model, inputs).difference < 1e-12
    usual = routing.by_expert

    def back_to_another_place(experts, n_experts):
        order, back, counts = usual(experts, n_experts)
        return order, back.roll(1), counts

    monkeypatch.setattr(routing, "by_expert", back_to_another_place)
    with pytest.raises(AssertionError, match="FAILS: every token is served by its own"):
        checks.experts_serve_their_tokens(model, inputs)


def test_a_token_normalised_by_another_experts_layer_norm_is_found(monkeypatch):
    model, inputs = tiny_models.moebert(), tiny_models.batch([5, 9, 2])
    monkeypatch.setattr(moe_layer.ExpertLayerNorm, "_of", staticmethod(lambda own, *_: own[0]))
    with pytest.raises(AssertionError, match="FAILS: every token is served by its own"):
        checks.experts_serve_their_tokens(model, inputs)


@pytest.mark.parametrize("tied", ["copied", "tied"])
@pytest.mark.parametrize("name", ["up.weight", "up.bias", "down.weight"])
def test_a_neuron_that_is_not_the_dense_layers_is_found(moebert, tiny_bert, tied, name):
    dense, model = tiny_bert(), moebert(shared_neurons=tied)
    checks.experts_hold_the_dense_neurons(model, dense)
    layer = dense.bert.encoder.layer[1]
    part, kind = name.split(".")
    values = getattr({"up": layer.intermediate, "down": layer.output}[part].dense, kind).data
    kept = int(model.bert.encoder.layer[1].output.neurons[2, -1])
    (values.T if part == "down" else values)[kept] += 1e-9
    with pytest.raises(AssertionError, match="FAILS: before training every expert's"):
        checks.experts_hold_the_dense_neurons(model, dense)


def test_models_that_answer_otherwise_are_told_apart(moebert, tiny_batch):
    model, batch = moebert(), tiny_batch()
    other = copy.deepcopy(model)
    assert checks.same_logits("the same", model, other, batch, tolerance=0).difference == 0
    other.classifier.bias.data += 1e-3
    with pytest.raises(AssertionError, match="FAILS: the same") as failure:
        checks.same_logits("the same", model, other, batch, tolerance=1e-4)
    assert failure.value.args[0].difference == pytest.approx(1e-3)
