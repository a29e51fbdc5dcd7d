"""The checks of a shared model: they hold for every router, and fail for a changed model."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharing import converted, saved_bert

from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.moe_layer import Experts, moe_layers
from moebert_lib.publish import share_model


@pytest.fixture
def bert(tmp_path, tiny_bert):
    """The folder of a dense model."""
    return saved_bert(tmp_path, tiny_bert)


@pytest.fixture
def shared(bert, tiny_batch):
    """A converted model, and the folder that it is written to."""
    model = converted(bert, tiny_batch)
    share_model.write(model, bert.parent / "moe", name="moe")
    return model, bert.parent / "moe"


def failing(results):
    return [result.claim for result in results if not result.holds]


@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "gate-sentence"])
@pytest.mark.parametrize("spans", [False, True])
def test_every_check_holds_within_its_tolerance(tmp_path, tiny_bert, tiny_batch, routing, spans):
    model = converted(saved_bert(tmp_path, tiny_bert, spans=spans), tiny_batch, routing=routing)
    results = share_model.write(model, tmp_path / "moe", name="moe")
    assert len(results) >= 9 and failing(results) == []
    assert all(result.difference <= result.tolerance for result in results)


def test_a_neuron_that_is_not_the_dense_layers_fails(shared):
    model, folder = shared
    with torch.no_grad():
        moe_layers(model.untrained)[1].experts.down_proj[2, 0, 3] += 1e-3
    results = share_model.run_checks(model, folder)
    (result,) = [result for result in results if "dense model's own" in result.claim]
    assert not result.holds and result.difference == pytest.approx(1e-3, rel=1e-3)


def experts_but_the_first(layer, part):
    """Change the LayerNorm or the output bias of experts 1 to 3."""
    with torch.no_grad():
        if part == "LayerNorm":
            layer.LayerNorm.weight[1:] *= 1.5
        else:
            layer.experts.down_proj_bias[1:] += 1


@pytest.mark.parametrize("part", ["LayerNorm", "bias"])
def test_experts_with_another_bias_or_layer_norm_fail(bert, tiny_batch, tmp_path, part):
    model = converted(bert, tiny_batch)
    for layer in moe_layers(model.model):
        experts_but_the_first(layer, part)
    results = share_model.write(model, tmp_path / "moe", name="moe")
    (claim,) = failing(results)
    assert claim.startswith("before training every expert's weights")


def test_a_conversion_by_the_inverse_ranking_fails(bert, tiny_batch, tmp_path):
    model = converted(bert, tiny_batch)
    inverse = to_moebert(model.dense, model.scores.ranking.flip(-1), n_experts=4)
    model = replace(model, untrained=inverse, model=inverse)
    results = share_model.write(model, tmp_path / "moe", name="moe")
    (claim,) = failing(results)
    assert claim.startswith("the highest scores are in every expert")


def test_a_model_that_sends_all_tokens_to_the_first_expert_fails(shared, monkeypatch):
    usual = Experts.forward
    monkeypatch.setattr(Experts, "forward", lambda self, a, e, p: usual(self, a, 0 * e, p))
    failed = failing(share_model.run_checks(*shared))
    assert "every token is served by its own experts' weights (Eq. 2)" in failed


def test_each_check_names_the_model_it_was_run_on(shared):
    model, folder = shared
    on = [result.on for result in share_model.run_checks(model, folder)]
    assert on == ["the dense model, as one expert", "the dense model", *["this model"] * 8]
    trained = replace(model, model=copy.deepcopy(model.model))
    results = share_model.run_checks(trained, folder)
    on = [result.on for result in results]
    assert on[2:5] == ["its conversion", "its conversion", "this model"]
    assert results[3].claim == results[4].claim and failing(results) == []


def test_a_hash_table_that_changed_in_training_fails(shared, bert, tiny_batch):
    model, folder = shared
    other = converted(bert, tiny_batch, seed=1)
    failed = failing(share_model.run_checks(replace(model, model=other.model), folder))
    assert "training leaves a hash's tables as they were" in failed
    assert "saved and loaded, the model gives the same logits" in failed


def test_a_weight_file_that_was_changed_fails(shared):
    model, folder = shared
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert failing(share_model.run_checks(model, folder)) == [
        "saved and loaded, the model gives the same logits"
    ]
