"""What routers did is counted over real tokens, layer by layer."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from moebert_lib.config.presets import MINILM
from moebert_lib.data import pretrained_weights
from moebert_lib.method.partition import random_ranking
from moebert_lib.method.routing import ROUTINGS
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.moe_layer import record_routes
from moebert_lib.training import routing_analysis


@pytest.fixture
def moebert(tiny_bert):
    def make(routing):
        counts = torch.arange(99)
        ranking = random_ranking(2, 64, seed=0)
        return to_moebert(tiny_bert(), ranking, routing=routing, token_frequencies=counts)

    return make


@pytest.fixture
def batches(tiny_batch):
    batch = tiny_batch()
    return [{**batch, "index": torch.arange(len(batch["input_ids"]))}]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_loads_sum_to_one_in_every_layer(moebert, batches, routing):
    shares = routing_analysis.expert_loads(moebert(routing), batches)
    assert shares.shape == (2, 4)
    assert np.allclose(shares.sum(1), 1)


def test_loads_of_a_hash_are_those_of_its_table_over_real_tokens(moebert, batches):
    model, (batch,) = moebert("hash-random"), batches
    real = batch["input_ids"][batch["attention_mask"].bool()]
    table = model.bert.encoder.layer[1].output.router.tid2eid[:, 0]
    expected = np.bincount(table[real], minlength=4) / len(real)
    assert np.allclose(routing_analysis.expert_loads(model, batches)[1], expected)


def test_a_hash_passes_its_experts_on_whole_and_a_fresh_gate_about_a_quarter(moebert, batches):
    assert routing_analysis.mean_factor(moebert("hash-balance"), batches) == 1
    assert 0.25 <= routing_analysis.mean_factor(moebert("gate-token"), batches) < 0.4


def test_frames_count_from_one_and_keep_every_value():
    loads = routing_analysis.load_frame({"a": np.array([[0.25, 0.75]])})
    assert loads.values.tolist() == [["a", 1, 1, 0.25], ["a", 1, 2, 0.75]]
    ways = routing_analysis.way_frame(["x", "y"], {"a": np.array([[0], [3]])})
    assert ways.values.tolist() == [["a", 1, 1, "x", 1], ["a", 1, 2, "y", 4]]


def test_loads_and_ways_come_back_from_their_frames():
    draw = np.random.default_rng(0)
    loads = {"b": draw.random((3, 4)), "a": draw.random((3, 4))}
    back = routing_analysis.shares(routing_analysis.load_frame(loads))
    assert list(back) == ["b", "a"]
    assert all(np.array_equal(back[name], table) for name, table in loads.items())
    experts = {"b": draw.integers(4, size=(12, 3)), "a": draw.integers(4, size=(12, 3))}
    words = [*"abcabcabcxyz"]
    tokens, again = routing_analysis.ways(routing_analysis.way_frame(words, experts))
    assert tokens == words and list(again) == ["b", "a"]
    assert all(np.array_equal(again[name], table) for name, table in experts.items())


def test_the_busiest_expert_is_that_of_the_least_even_layer():
    shares = {"a": np.array([[0.5, 0.5], [0.2, 0.8]])}
    assert routing_analysis.busiest(shares)["a"] == pytest.approx(1.6)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(pretrained_weights.find(MINILM, hub=False))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_sentences_way_is_the_routers_choice_for_each_of_its_tokens(
    tiny_bert, tokenizer, routing
):
    counts, dense = torch.arange(len(tokenizer)), tiny_bert(vocab_size=len(tokenizer))
    ranking = random_ranking(2, 64, seed=0)
    model = to_moebert(dense, ranking, routing=routing, token_frequencies=counts)
    way = routing_analysis.sentence_ways({"it": model}, tokenizer, "Unsqueezable!")
    with record_routes(model) as layers:
        model(**tokenizer("Unsqueezable!", return_tensors="pt"))
    expected = torch.cat([layer[0].experts for layer in layers], dim=1)
    assert way.tokens[1:3] == ["un", "##sque"] and not way.cut
    assert np.array_equal(way.experts["it"], expected)


def test_a_long_sentence_is_cut_and_says_so(tiny_bert, tokenizer):
    model = to_moebert(tiny_bert(vocab_size=len(tokenizer)), random_ranking(2, 64, seed=0))
    way = routing_analysis.sentence_ways({"it": model}, tokenizer, "word " * 500, max_length=12)
    assert len(way.tokens) == 12 and way.cut and way.experts["it"].shape == (12, 2)
