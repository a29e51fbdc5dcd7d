"""What routers did is counted over real tokens, layer by layer."""

import numpy as np
import pytest
import torch

from moebert_lib import routes
from moebert_lib.convert import to_moebert
from moebert_lib.experts import random_ranking
from moebert_lib.routing import ROUTINGS


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
    shares = routes.expert_loads(moebert(routing), batches)
    assert shares.shape == (2, 4)
    assert np.allclose(shares.sum(1), 1)


def test_loads_of_a_hash_are_those_of_its_table_over_real_tokens(moebert, batches):
    model, (batch,) = moebert("hash-random"), batches
    real = batch["input_ids"][batch["attention_mask"].bool()]
    table = model.bert.encoder.layer[1].output.router.tid2eid[:, 0]
    expected = np.bincount(table[real], minlength=4) / len(real)
    assert np.allclose(routes.expert_loads(model, batches)[1], expected)


def test_a_hash_passes_its_experts_on_whole_and_a_fresh_gate_about_a_quarter(moebert, batches):
    assert routes.mean_factor(moebert("hash-balance"), batches) == 1
    assert 0.25 <= routes.mean_factor(moebert("gate-token"), batches) < 0.4


def test_frames_count_from_one_and_keep_every_value():
    loads = routes.load_frame({"a": np.array([[0.25, 0.75]])})
    assert loads.values.tolist() == [["a", 1, 1, 0.25], ["a", 1, 2, 0.75]]
    ways = routes.way_frame({"a": (["x", "y"], np.array([[0], [3]]))})
    assert ways.values.tolist() == [["a", 1, 1, "x", 1], ["a", 1, 2, "y", 4]]


def test_the_busiest_expert_is_that_of_the_least_even_layer():
    shares = {"a": np.array([[0.5, 0.5], [0.2, 0.8]])}
    assert routes.busiest(shares)["a"] == pytest.approx(1.6)
