"""The faster forward gives what transformers' gives: outputs, states, losses, gradients."""

import copy
import itertools

import pytest
import torch
from test_adapters import converted
from tiny_models import batch, batches, dense, moebert, packed_by_hand, real, with_labels
from transformers import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from moebert_lib import accelerate
from moebert_lib.method.routing import ROUTINGS
from moebert_lib.model.modeling import HEADS
from moebert_lib.model.moe_layer import moe_layers
from moebert_lib.teaching.checks import tiny_encoder

DENSE = (
    BertForSequenceClassification,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertModel,
)
KINDS = [
    dict(routing=routing, shared_neurons=how, expert_layer_norm=norm, gate_scaling=scaling)
    for routing, how, norm, scaling in itertools.product(
        ROUTINGS, ("copied", "tied"), ("per-expert", "shared"), ("inside", "outside")
    )
    if scaling == "inside" or routing.startswith("gate")
]
BATCHES = batches()
ONE_A_TOKEN = ("last_hidden_state", "start_logits", "end_logits")


def named(kind):
    return " ".join(kind.values())


def differences(model, faster, inputs, *, states=True):
    """By field, how far two outputs lie apart at most, in units of the field's largest number.

    Padding counts in neither; a field that only one of them has is infinitely far.
    """
    one = model(**inputs, output_hidden_states=True)
    other = faster(**inputs, output_hidden_states=states)
    mask, found = real(inputs), {}
    assert (other.hidden_states is None) == (not states)
    for name in {*one.keys(), *other.keys()} - {"hidden_states"}:
        x, y = one.get(name), other.get(name)
        if x is None or y is None:
            found[name] = float("inf")
        elif name in ONE_A_TOKEN or x.dim() == 3:
            found[name] = apart(x[mask], y[mask])
        else:
            found[name] = apart(x, y)
    for index, pair in enumerate(zip(one.hidden_states, other.hidden_states or (), strict=False)):
        x, y = pair
        if states == "packed":
            found[f"state {index}"] = apart(packed_by_hand(x, mask), y)
        else:
            found[f"state {index}"] = apart(x[mask], y[mask])
            assert goes_ordinarily(model, mask) or y[~mask].abs().sum() == 0
    return found


def goes_ordinarily(model, mask):
    """Training spans on a padded batch, whose loss counts the padding; MPNet on one with holes."""
    if model.config.model_type.endswith("mpnet") and (mask[:, 1:] & ~mask[:, :-1]).any():
        return True
    return is_span(model) and torch.is_grad_enabled() and not mask.all()


def is_span(model):
    return "QuestionAnswering" in type(model).__name__


def apart(x, y):
    assert x.shape == y.shape
    return ((x - y).abs().max() / x.abs().max().clamp(min=1)).item()


def assert_same(model, faster, inputs, *, within=1e-12):
    """With and without gradient, and for each way of asking for states."""
    for grad, states in itertools.product((False, True), (None, True, "packed")):
        with torch.set_grad_enabled(grad):
            found = differences(model, faster, inputs, states=states)
        assert max(found.values()) <= within, (grad, states, found)
        assert len(found) >= (4 if states else 1)


def labelled(model, name):
    """A batch by its name, with labels where the loss is defined by real tokens alone."""
    inputs = BATCHES[name]
    return inputs if is_span(model) and not real(inputs).all() else with_labels(model, inputs)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
def test_a_dense_bert_with_any_head_gives_the_same(kind, name):
    model = dense(kind)
    assert_same(model, accelerate(model), labelled(model, name))


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_moebert_of_any_kind_gives_the_same(kind):
    for spans in (False, True):
        model = moebert(spans=spans, **kind)
        faster = accelerate(model)
        for name in ("padded", "unpadded", "a single token among others"):
            assert_same(model, faster, labelled(model, name))
        if kind["routing"].startswith("gate"):
            assert model(**with_labels(model, BATCHES["padded"])).aux_loss > 0


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_batch_goes_through_every_router(routing, name):
    model = moebert(routing=routing)
    assert_same(model, accelerate(model), labelled(model, name))
    assert_same(model.bert, accelerate(model.bert), BATCHES[name])


OTHERS = [kind for kind in HEADS if not kind.__name__.startswith("Bert")]
all_but_bert = pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)


def of_family(kind, routing, **config):
    """A model of another family: dense, or converted with all parameters moved apart."""
    model = tiny_encoder(kind, **config)
    return converted(model, routing=routing) if routing else model


@pytest.mark.parametrize("routing", [None, "hash-random", "gate-token", "gate-sentence"])
@all_but_bert
def test_every_family_and_head_gives_the_same(kind, routing):
    """Token 1, which RoBERTa and MPNet count positions by, is among the real ones too."""
    model = of_family(kind, routing)
    faster = accelerate(model)
    for name in BATCHES:
        assert_same(model, faster, labelled(model, name))
    for name in ("padded", "unpadded"):
        assert_same(model.base_model, accelerate(model.base_model), BATCHES[name])
        assert_same(model.float(), faster, labelled(model, name), within=1e-5)
        model.double()


def test_electras_narrower_embeddings_are_projected():
    kind = next(kind for kind in OTHERS if kind.__name__.startswith("Electra"))
    model = of_family(kind, None, embedding_size=12)
    assert model.base_model.embeddings_project.in_features == 12
    assert_same(model, accelerate(model), BATCHES["padded"])


@pytest.mark.parametrize("routing", [None, "gate-token"])
@all_but_bert
def test_gradients_of_every_family_are_the_same(kind, routing):
    model = of_family(kind, routing)
    inputs = with_labels(model, BATCHES["padded"])
    targets = torch.randn(3, *inputs["input_ids"].shape, 32, dtype=torch.float64)
    for states in (None, "packed"):
        one = gradients(model, inputs, targets, states=states and True)
        other = gradients(accelerate(model), inputs, targets, states=states)
        for name, values in one.items():
            assert torch.allclose(values, other[name], rtol=1e-10, atol=1e-12), name
        assert all(one[name].abs().max() > 1e-6 for name in one if "attention_bias" in name)


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("routing", [None, *ROUTINGS])
def test_in_single_precision_it_is_the_same_to_five_digits(routing, prepack):
    model = (moebert(routing=routing) if routing else dense()).float()
    for name in ("padded", "unpadded", "one token"):
        inputs = labelled(model, name)
        assert_same(model, accelerate(model, prepack=prepack), inputs, within=1e-5)


@pytest.mark.parametrize("act", ["relu", "gelu_new", "gelu_pytorch_tanh", "silu"])
def test_other_activations_are_applied_as_they_are(act):
    for model in (dense(hidden_act=act), moebert(config={"hidden_act": act})):
        assert_same(model, accelerate(model), BATCHES["padded"])
        model.float()
        assert_same(model, accelerate(model), BATCHES["padded"], within=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("part", ["LayerNorm", "experts"])
def test_experts_taken_for_one_another_would_be_seen(grad, part):
    """The control of all comparisons here: at conversion LayerNorms and biases are alike."""
    model = moebert()
    other = copy.deepcopy(model)
    for layer in moe_layers(other):
        for values in getattr(layer, part).parameters():
            values.data = values.data.roll(1, 0)
    with torch.set_grad_enabled(grad):
        found = differences(model, accelerate(other), BATCHES["padded"])
    assert found["logits"] > 1e-2 and found["state 1"] > 1e-2


@pytest.mark.parametrize("routing", [None, "gate-sentence"])
def test_the_ordinary_forward_takes_over_what_packing_cannot_do(routing):
    model = moebert(routing=routing) if routing else dense()
    model.set_attn_implementation("eager")  # sdpa gives no attentions
    faster, inputs = accelerate(model), BATCHES["padded"]
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    mask = inputs["attention_mask"]
    square = {**inputs, "attention_mask": mask[:, None, None].bool()}
    for asked in (
        {**inputs, "attention_mask": mask.flip(1)},  # left padding
        {"inputs_embeds": embeds, "attention_mask": mask},
        {**inputs, "output_attentions": True},
        {**inputs, "position_ids": torch.arange(12).flip(0)[None]},
        *([] if routing else [square]),  # a sentence gate takes no such mask
    ):
        one, other = (m(**asked, output_hidden_states=True) for m in (model, faster))
        assert one.keys() == other.keys()
        for x, y in zip(one.to_tuple(), other.to_tuple(), strict=True):
            assert all(map(torch.equal, x, y)) if isinstance(x, tuple) else torch.equal(x, y)
    left = {**inputs, "attention_mask": mask.flip(1)}
    packed = faster(**left, output_hidden_states="packed").hidden_states
    for x, y in zip(model(**left, output_hidden_states=True).hidden_states, packed, strict=True):
        assert torch.equal(packed_by_hand(x, mask.flip(1).bool()), y)


def test_what_the_configuration_asks_for_is_given():
    model = dense()
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = True
    faster, inputs = accelerate(model), BATCHES["padded"]
    assert len(faster(**inputs).hidden_states) == 3
    assert faster(**inputs, output_hidden_states=False).hidden_states is None
    model.config.output_attentions = True
    assert len(faster(**inputs).attentions) == 2


@pytest.mark.parametrize("kind", [*DENSE[:4], None], ids=str)
def test_tuples_are_given_on_request(kind):
    model = dense(kind) if kind else moebert(routing="gate-token")
    inputs = {**labelled(model, "unpadded"), "return_dict": False}
    one, other = model(**inputs), accelerate(model)(**inputs)
    assert isinstance(other, tuple) and len(one) == len(other)
    assert all(map(torch.allclose, one, other))


@pytest.mark.parametrize("routing", [None, *ROUTINGS])
def test_the_loss_of_spans_counts_padding_in_training(routing):
    """Without gradient, padding's logits are those of a zero state: the bias alone."""
    moe = dict(spans=True, routing=routing)
    model = moebert(**moe) if routing else dense(BertForQuestionAnswering)
    faster, inputs = accelerate(model), with_labels(model, BATCHES["padded"])
    assert torch.equal(faster(**inputs).loss, model(**inputs).loss)
    with torch.no_grad():
        start = faster(**inputs).start_logits
    assert torch.equal(start[~real(inputs)].unique(), model.qa_outputs.bias[:1])


@pytest.mark.parametrize("routing", [None, *ROUTINGS])
def test_under_autocast_it_is_the_same(routing):
    model = (moebert(routing=routing) if routing else dense()).float()
    faster, inputs = accelerate(model), BATCHES["unpadded"]
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            one, other = model(**inputs).logits, faster(**inputs).logits
        assert one.dtype == other.dtype == torch.bfloat16
        assert apart(one, other) < 0.02


def test_a_last_layer_of_first_tokens_alone_is_given_to_the_classifier():
    faster = accelerate(dense())
    states = faster(**BATCHES["padded"], output_hidden_states="packed").hidden_states
    served = []
    hook = faster.bert.encoder.layer[-1].output.register_forward_hook(
        lambda _m, _a, out: served.append(out.shape[1])
    )
    faster(**BATCHES["padded"])
    faster(**BATCHES["padded"], output_hidden_states=True)
    hook.remove()
    assert served == [5, len(states[0])] == [5, 41]


def gradients(model, inputs, targets, *, states):
    """Of the loss, plus a linear function of the real tokens' states if there are any."""
    model.zero_grad()
    output = model(**inputs, output_hidden_states=states)
    loss = output.loss if "loss" in output else output.pooler_output.sum()
    mask = real(inputs)
    for state, target in zip(output.hidden_states or (), targets, strict=False):
        rows = state if state.dim() == 2 else packed_by_hand(state, mask)
        loss = loss + (rows * packed_by_hand(target, mask)).sum() / 10
    loss.backward()
    named = model.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


@pytest.mark.parametrize("states", [None, True, "packed"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "kind", [None, "spans", *KINDS], ids=lambda k: named(k or {}) if k != "spans" else k
)
def test_gradients_of_every_parameter_are_the_same(kind, states, train):
    if isinstance(kind, dict):
        model = moebert(router_aux_loss_coef=0.5, **kind)
    else:
        model = dense(BertForQuestionAnswering if kind else BertForSequenceClassification)
    model.train(train)  # all dropout is zero
    inputs = with_labels(model, BATCHES["padded"])
    targets = torch.randn(3, *inputs["input_ids"].shape, 32, dtype=torch.float64)
    one = gradients(model, inputs, targets, states=states and True)
    other = gradients(accelerate(model), inputs, targets, states=states)
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert torch.allclose(values, other[name], rtol=1e-10, atol=1e-12), name
    assert sum(values.abs().max() > 1e-3 for values in one.values()) > 0.8 * len(one)


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@pytest.mark.parametrize("moe", [False, True])
def test_dropout_has_the_same_mean_and_spread(where, moe):
    """A batch of one sentence many times: each copy draws for itself."""
    n, config = 3000, {where: 0.3, "classifier_dropout": 0.0}
    model = (moebert(config=config) if moe else dense(**config)).float()
    sentence = batch([6], longest=8)
    inputs = {name: values.expand(n, -1) for name, values in sentence.items()}
    faster = accelerate(model)
    with torch.no_grad():
        assert torch.equal(faster(**inputs).logits, faster(**inputs).logits)
        faster.train()
        x, y = model(**inputs).logits, faster(**inputs).logits
    assert x.std(0).min() > 0.01
    error = ((x.var(0) + y.var(0)) / n).sqrt()
    assert ((x.mean(0) - y.mean(0)).abs() < 5 * error).all()
    assert ((x.std(0) / y.std(0)).log().abs() < 0.1).all()


def test_the_experts_implementation_of_transformers_may_be_chosen():
    model = moebert(dtype=torch.float32)
    faster, inputs = accelerate(model), BATCHES["padded"]
    expected = model(**inputs).logits
    faster.set_experts_implementation("grouped_mm")
    assert torch.allclose(faster(**inputs).logits, expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(faster(**inputs).logits, expected, atol=1e-5)
