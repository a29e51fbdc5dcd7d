"""Removal curves: three orders, every point with all its metrics, kept in the store."""

import pytest
import torch

from moebert_lib.config.settings import Settings
from moebert_lib.experiments import dataset, neuron_measurements, teacher
from moebert_lib.method.other_scores import SCORES
from moebert_lib.model.accelerate import accelerate_if_exact
from moebert_lib.store.store import Store


def test_the_orders_are_the_ranking_its_reverse_and_distinct_random_ones():
    ranking = torch.tensor([[2, 0, 1, 3], [3, 2, 1, 0]])
    least, first, second, most = neuron_measurements.orders(ranking, 2)
    assert least[2].tolist() == [[3, 1, 0, 2], [0, 1, 2, 3]] and torch.equal(most[2], ranking)
    assert [first[:2], second[:2]] == [("random", 0), ("random", 1)]
    assert not torch.equal(first[2], second[2])
    assert first[2].sort().values.tolist() == [[0, 1, 2, 3]] * 2


def test_leaving_out_equals_zeroing_columns_and_rows(tiny_bert, tiny_batch):
    model, zeroed, batch = tiny_bert(), tiny_bert(), tiny_batch()
    neurons = torch.stack([torch.randperm(64)[:20] for _ in range(2)])
    for layer, gone in zip(zeroed.bert.encoder.layer, neurons, strict=True):
        layer.output.dense.weight.data[:, gone] = 0
    whole = model(**batch).logits
    with neuron_measurements.without(model, neurons):
        assert torch.allclose(model(**batch).logits, zeroed(**batch).logits, atol=1e-14)
    assert torch.equal(model(**batch).logits, whole)


def test_an_accelerated_model_made_inside_the_block_misses_the_same_neurons(tiny_bert, tiny_batch):
    model, inputs = tiny_bert(dtype=torch.float32), tiny_batch()
    inputs.pop("labels")
    whole = torch.arange(64).expand(2, -1)
    with torch.inference_mode():
        before = model(**inputs).logits
        for gone in (whole[:, :20], whole[:, 40:], whole):
            with neuron_measurements.without(model, gone):
                found, slow = accelerate_if_exact(model)(**inputs).logits, model(**inputs).logits
            assert torch.allclose(found, slow, atol=1e-5) and not torch.allclose(found, before)


def test_the_model_is_whole_again_after_an_error(tiny_bert):
    model = tiny_bert()
    with (
        pytest.raises(ValueError, match="zip"),
        neuron_measurements.without(model, [torch.tensor([1])]),
    ):
        raise AssertionError("not reached: neurons for one layer of two")
    assert {layer.intermediate.dense.weight.shape for layer in model.bert.encoder.layer} == {
        (64, 32)
    }


def test_curves_start_from_the_whole_teacher_and_are_made_once(moebert_home, capsys):
    settings = Settings.at("smoke")
    curves = neuron_measurements.removal_curves(Store(), settings, n_examples=10_000)
    metric = dataset.dataset(settings).task.metric
    whole = curves[curves["fraction"] == 0]
    assert set(whole[metric]) == {teacher.teacher(Store(), settings).metrics[metric]}
    assert len(curves) == (1 + settings.n_random_splits + 1) * (
        1 + len(neuron_measurements.FRACTIONS)
    )
    assert "made in" in capsys.readouterr().out
    assert neuron_measurements.removal_curves(Store(), settings, n_examples=10_000).equals(curves)
    assert "removal curves: reused" in capsys.readouterr().out


def test_all_orders_meet_where_everything_is_gone(moebert_home, monkeypatch):
    monkeypatch.setattr(neuron_measurements, "FRACTIONS", (1.0,))
    gone = neuron_measurements.removal_curves(Store(), Settings.at("smoke"), n_examples=20)
    assert gone[gone["fraction"] == 1]["loss"].nunique() == 1


def test_every_score_is_removed_by_with_the_columns_of_the_three_orders(moebert_home, capsys):
    settings = Settings.at("smoke")
    curves = neuron_measurements.removal_curves(Store(), settings, n_examples=50)
    found = neuron_measurements.removal_by_score(Store(), settings, n_examples=50)
    assert list(found) == list(curves) and set(found["order"]) == set(SCORES)
    own = found[found["order"] == "importance"].drop(columns="order").reset_index(drop=True)
    least = curves[curves["order"] == "least important first"].drop(columns="order")
    assert own.equals(least.reset_index(drop=True))
    assert found[found["fraction"] == 0]["loss"].nunique() == 1
    assert set(found["order"].value_counts()[neuron_measurements.OTHERS]) == {
        1 + len(neuron_measurements.FRACTIONS)
    }
    assert neuron_measurements.removal_by_score(Store(), settings, n_examples=50).equals(found)
    assert "removal by score: reused" in capsys.readouterr().out


def test_a_score_removes_its_lowest_neurons_first(moebert_home, monkeypatch):
    settings, gone = Settings.at("smoke"), []
    without = neuron_measurements.without
    monkeypatch.setattr(neuron_measurements, "FRACTIONS", (0.5,))
    monkeypatch.setattr(
        neuron_measurements, "without", lambda m, n: (gone.append(n), without(m, n))[1]
    )
    neuron_measurements.removal_by_score(Store(), settings, n_examples=20)
    scored = teacher.all_scores(Store(), settings)
    for kind, neurons in zip(
        neuron_measurements.OTHERS, gone[-len(neuron_measurements.OTHERS) :], strict=True
    ):
        lost = torch.zeros(2, 64, dtype=torch.bool).scatter(1, neurons, True)
        for values, out in zip(scored[kind], lost, strict=True):
            assert out.sum() == 32 and values[out].max() <= values[~out].min()
