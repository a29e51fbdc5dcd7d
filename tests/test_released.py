"""The release's layers: the same results and gradients as MoEBERT's, from weights of their own."""

import pytest
import torch

from moebert_lib.bench import harness
from moebert_lib.bench.harness import glue_like
from moebert_lib.model.modeling import MoEBertConfig, MoEBertForSequenceClassification

TINY = harness.TINY_SHAPE


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


@pytest.mark.parametrize(
    "more",
    [{}, {"gate_scaling": "outside"}, {"shared_neurons": "tied"}, {"expert_layer_norm": "shared"}],
    ids=str,
)
@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "gate-sentence"])
def test_it_answers_as_the_model_it_was_made_from(routing, more):
    model, inputs = moebert(routing, **more), glue_like(99, n=5, longest=9)
    labels = torch.tensor([0, 1, 1, 0, 1])
    found, wanted = (
        m(**inputs, labels=labels, output_hidden_states=True)
        for m in (harness.as_released(model), model)
    )
    assert torch.allclose(found.logits, wanted.logits, rtol=0, atol=1e-12)
    assert torch.allclose(found.loss, wanted.loss, rtol=0, atol=1e-12)
    for own, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert torch.allclose(own, other, rtol=0, atol=1e-12)


def test_its_gradients_are_those_of_the_model():
    model, inputs = moebert(), glue_like(99, n=5, longest=9)
    copy = harness.as_released(model)
    for m in (model, copy):
        m(**inputs).logits.square().sum().backward()
    layer, own = model.bert.encoder.layer[0].output, copy.bert.encoder.layer[0].output
    for expert, module in enumerate(own.experts):
        pairs = [
            (module.fc1.weight.grad, layer.experts.up_proj.grad[expert]),
            (module.fc2.bias.grad, layer.experts.down_proj_bias.grad[expert]),
            (module.LayerNorm.weight.grad, layer.LayerNorm.weight.grad[expert]),
        ]
        assert all(torch.allclose(a, b, rtol=0, atol=1e-10) and b.abs().sum() for a, b in pairs)


def test_its_weights_are_its_own():
    model = moebert()
    before = model.bert.encoder.layer[0].output.experts.up_proj.clone()
    copy = harness.as_released(model)
    with torch.no_grad():
        copy.bert.encoder.layer[0].output.experts[0].fc1.weight.zero_()
    assert torch.equal(model.bert.encoder.layer[0].output.experts.up_proj, before)
    own, other = ({p.data_ptr() for p in m.parameters()} for m in (copy, model))
    assert own and not own & other


def test_every_expert_is_asked_once_a_layer_for_its_own_tokens():
    model, sizes = harness.as_released(moebert()), []
    layer = model.bert.encoder.layer[0].output
    for expert in layer.experts:
        expert.register_forward_hook(lambda _m, given, _out: sizes.append(len(given[0])))
    inputs = glue_like(99, n=5, longest=9)
    model(**inputs)
    chosen = layer.router.tid2eid[inputs["input_ids"].flatten(), 0]
    assert sizes == torch.bincount(chosen, minlength=4).tolist()


def test_a_dense_model_is_refused():
    dense = harness.models(TINY, only=("dense",))["dense"]
    with pytest.raises(ValueError, match="takes a MoEBERT, not a BertForSequenceClassification"):
        harness.as_released(dense)
