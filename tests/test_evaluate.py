"""Metrics against hand-worked cases, order of predictions, distances."""

import numpy as np
import pytest
import torch
from tiny_spans import span_bert

from moebert_lib.method.distillation_loss import layer_distances
from moebert_lib.method.partition import random_ranking
from moebert_lib.model.accelerate import accelerate_if_exact
from moebert_lib.model.conversion import to_moebert
from moebert_lib.training.evaluation import METRICS, predict, score, state_distances


def test_metrics_by_hand():
    # labels 1 1 1 0, predictions 1 0 1 1: 2 of 4 right; F1 = 2*2 / (2*2 + 1 + 1)
    scores = score(np.array([1, 0, 1, 1]), np.array([1, 1, 1, 0]), ["accuracy", "f1", "matthews"])
    tp, tn, fp, fn = 2, 0, 1, 1
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert scores["accuracy"] == 0.5 and scores["f1"] == pytest.approx(4 / 6)
    assert scores["matthews"] == pytest.approx((tp * tn - fp * fn) / root)


def test_correlations_see_order_and_line():
    values, exact = np.array([1.0, 2.0, 3.0, 10.0]), np.array([2.0, 4.0, 6.0, 20.0])
    assert score(exact, values, ["pearson"])["pearson"] == pytest.approx(1)
    monotone = np.exp(values)
    assert score(monotone, values, ["spearman"])["spearman"] == pytest.approx(1)
    assert score(monotone, values, ["pearson"])["pearson"] < 0.99


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="unknown metric 'bleu'; choose from accuracy"):
        score(np.array([0]), np.array([0]), ["bleu"])


def test_all_metrics_are_covered():
    assert set(METRICS) == {"accuracy", "f1", "matthews", "pearson", "spearman"}


def test_predictions_come_in_the_datasets_order_without_labels(tiny_bert, tiny_batch):
    model, batch = tiny_bert().train(), tiny_batch(n=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    batches = [
        {**{k: v[part] for k, v in inputs.items()}, "index": part} for part in order.split(4)
    ]
    expected = model.eval()(**inputs).logits.detach().float().numpy()
    model.train()
    assert np.allclose(predict(model, batches), expected, atol=1e-6) and model.training


def test_a_faster_model_predicts_the_same_and_stays_in_its_mode(tiny_bert, tiny_batch):
    moebert, batch = to_moebert(tiny_bert(), random_ranking(2, 64, seed=0)), tiny_batch(n=6)
    batches = [{**batch, "index": torch.arange(6).flip(0)}]
    for model in (tiny_bert(), moebert):
        quick = accelerate_if_exact(model)
        assert quick is not model
        assert np.allclose(predict(quick, batches), predict(model, batches), rtol=0, atol=1e-6)
        assert not model.training and not quick.training


def test_a_model_whose_padding_counts_stays_as_it_is(tiny_bert):
    ranking = random_ranking(2, 64, seed=0)
    balanced = to_moebert(tiny_bert(), ranking, routing="gate-token", padding_in_balance=True)
    spans = span_bert(tiny_bert())
    assert accelerate_if_exact(balanced) is balanced and accelerate_if_exact(spans) is spans


def test_distances_weigh_every_real_token_the_same(tiny_bert, tiny_batch):
    one, two, batch = tiny_bert(seed=0), tiny_bert(seed=1), tiny_batch(n=6)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 4), slice(4, 6))]
    whole = layer_distances(
        *(m(**batch, output_hidden_states=True).hidden_states for m in (one, two)),
        batch["attention_mask"],
    )
    fast_one, fast_two = accelerate_if_exact(one), accelerate_if_exact(two)
    for pair in ((one, two), (fast_one, fast_two), (one, fast_two)):
        assert torch.allclose(state_distances(*pair, parts).double(), whole, rtol=1e-6)
