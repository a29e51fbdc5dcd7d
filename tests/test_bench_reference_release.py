"""The release's layers: the same results and gradients as MoEBERT's, from weights of their own."""

import pytest
import torch

from moebert_lib.bench import inference
from moebert_lib.bench.inference import glue_like
from moebert_lib.model.modeling import MoEBertConfig, MoEBertForSequenceClassification
from moebert_lib.model.moe_layer import RoutingCall

TINY = inference.TINY


def moebert(routing="hash-random", **more):
    config = MoEBertConfig(
        **TINY,
        expert_size=16,
        n_shared=8,
        routing=routing,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        **more,
    )
    torch.manual_seed(3)
    model = MoEBertForSequenceClassification(config).double()
    with torch.no_grad():  # at first all LayerNorms are equal, and no mistake would show
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("more", [{}, {"shared_neurons": "tied"}], ids=str)
def test_it_answers_as_the_model_it_was_made_from(more):
    model, inputs = moebert(**more), glue_like(99, n=5, longest=9)
    labels = torch.tensor([0, 1, 1, 0, 1])
    copy, original = (
        m(**inputs, labels=labels, output_hidden_states=True)
        for m in (inference.reference_release(model), model)
    )
    assert torch.allclose(copy.logits, original.logits, rtol=0, atol=1e-12)
    assert torch.allclose(copy.loss, original.loss, rtol=0, atol=1e-12)
    for state, other in zip(copy.hidden_states, original.hidden_states, strict=True):
        assert torch.allclose(state, other, rtol=0, atol=1e-12)


def test_its_gradients_are_those_of_the_model():
    model, inputs = moebert(), glue_like(99, n=5, longest=9)
    copy = inference.reference_release(model)
    for m in (model, copy):
        m(**inputs).logits.square().sum().backward()
    pairs = zip(model.named_parameters(), copy.named_parameters(), strict=True)
    for (name, parameter), (other_name, other) in pairs:
        assert name == other_name
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, other.grad, rtol=0, atol=1e-10), name
    experts = copy.bert.encoder.layer[0].output.experts
    assert experts.up_proj.grad.abs().sum((1, 2)).min() > 0


def test_its_weights_are_its_own():
    model = moebert()
    before = model.bert.encoder.layer[0].output.experts.up_proj.clone()
    copy = inference.reference_release(model)
    with torch.no_grad():
        copy.bert.encoder.layer[0].output.experts.up_proj[0].zero_()
    assert torch.equal(model.bert.encoder.layer[0].output.experts.up_proj, before)
    own, other = ({p.data_ptr() for p in m.parameters()} for m in (copy, model))
    assert own and not own & other


def test_each_expert_is_called_once_a_layer_for_its_own_tokens(monkeypatch):
    model, sizes = inference.reference_release(moebert()), []
    usual = inference.F.layer_norm

    def count(x, *args):
        sizes.append(len(x))
        return usual(x, *args)

    monkeypatch.setattr(inference.F, "layer_norm", count)
    layer, x = model.bert.encoder.layer[0].output, torch.rand(5, 9, 32, dtype=torch.float64)
    ids = glue_like(99, n=5, longest=9)["input_ids"]
    layer(x, RoutingCall(ids))
    chosen = layer.router.tid2eid[ids.flatten(), 0]
    assert sizes == torch.bincount(chosen, minlength=4).tolist()


@pytest.mark.parametrize("options", [{"routing": "gate-token"}, {"expert_layer_norm": "shared"}])
def test_a_model_that_it_does_not_compute_is_refused(options):
    with pytest.raises(ValueError, match="expected a MoEBERT with hash routing"):
        inference.reference_release(moebert(**options))


def test_a_dense_model_is_refused():
    dense = inference.models(TINY, only=("dense",))["dense"]
    with pytest.raises(ValueError, match="hash routing, not BertForSequenceClassification"):
        inference.reference_release(dense)
