"""Encoders of every family: exact conversion, exact scores, true transformers models."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from moebert_lib.experiments.neuron_measurements import excite, without
from moebert_lib.method import encoder_layouts
from moebert_lib.method.importance import ffn_importance
from moebert_lib.method.other_scores import ffn_scores
from moebert_lib.method.partition import random_ranking
from moebert_lib.method.routing import ROUTINGS
from moebert_lib.model.accelerate import PackedEncoder, accelerate, accelerate_if_exact
from moebert_lib.model.conversion import load_dense, to_moebert
from moebert_lib.model.modeling import HEADS
from moebert_lib.model.moe_layer import RoutingCall, moe_layers
from moebert_lib.teaching import checks
from moebert_lib.teaching.checks import encoder_table, tiny_batch, tiny_encoder

KINDS = list(HEADS)
CLASSIFIERS = [kind for kind in KINDS if kind.__name__.endswith("SequenceClassification")]
OTHERS = [kind for kind in CLASSIFIERS if not kind.__name__.startswith("Bert")]
RANKING = random_ranking(2, 64, seed=0)
every_head = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
every_family = pytest.mark.parametrize("kind", CLASSIFIERS, ids=lambda kind: kind.__name__)
all_but_bert = pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)


def converted(dense, **changes):
    """A MoEBERT of 4 experts whose parameters have all drifted apart."""
    options = {"n_experts": 4, "expert_size": 16, "n_shared": 8, **changes}
    model = to_moebert(dense, RANKING, token_frequencies=torch.arange(99), **options)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            values += 0.1 * torch.randn(values.shape, generator=noise).to(values)
    return model


def logits(model, given):
    output = model(**{k: given[k] for k in ("input_ids", "attention_mask")})
    parts = [output[name] for name in ("logits", "start_logits", "end_logits") if name in output]
    return torch.stack(parts).detach()


def test_two_heads_of_each_family_are_in_the_table():
    assert {kind.config_class.model_type for kind in KINDS} == set(encoder_layouts.FAMILIES)
    assert len(KINDS) == 2 * len(encoder_layouts.FAMILIES)
    for kind, moe in HEADS.items():
        assert issubclass(moe, kind)
        assert moe.config_class.model_type == "moe" + kind.config_class.model_type


@every_head
def test_one_full_expert_is_the_dense_model(kind):
    dense = tiny_encoder(kind)
    one = to_moebert(dense, RANKING, n_experts=1)
    checks.one_expert_is_dense(dense, one, tiny_batch(dense))
    shared = to_moebert(dense, RANKING, n_experts=1, expert_layer_norm="shared")
    checks.one_expert_is_dense(dense, shared, tiny_batch(dense))


@every_head
def test_permuting_neurons_changes_nothing(kind):
    dense = tiny_encoder(kind)
    checks.permuting_neurons_changes_nothing(dense, tiny_batch(dense))


@every_head
def test_scores_equal_the_slow_loop_over_weight_gradients(kind):
    dense = tiny_encoder(kind)
    checks.importance_equals_slow_loop(ffn_importance, dense, tiny_batch(dense))


@every_head
def test_scores_without_padding_are_the_same(kind):
    dense = tiny_encoder(kind)
    one, other = (ffn_importance(m, [tiny_batch(dense)]).scores for m in (dense, accelerate(dense)))
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@every_family
def test_scores_of_a_permuted_model_are_the_permuted_scores(kind):
    dense, order = tiny_encoder(kind), torch.randperm(64)
    shuffled = copy.deepcopy(dense)
    for layer in encoder_layouts.ffns(shuffled):
        layer.up.weight.data, layer.up.bias.data = layer.up.weight[order], layer.up.bias[order]
        layer.down.weight.data = layer.down.weight[:, order]
    one, other = (ffn_importance(model, [tiny_batch(dense)]).scores for model in (dense, shuffled))
    assert torch.allclose(one[:, order], other, rtol=1e-10, atol=0)


@every_head
@pytest.mark.parametrize("routing", ROUTINGS)
def test_saving_changes_nothing_and_padding_neither(kind, routing, tmp_path):
    model = converted(tiny_encoder(kind), routing=routing)
    given = tiny_batch(model)
    checks.saving_changes_nothing(model, given)
    checks.padding_changes_nothing(model, given)
    assert (model(**given).aux_loss is None) == routing.startswith("hash")


@every_head
def test_every_neuron_sits_where_the_deal_says(kind):
    dense = tiny_encoder(kind)
    moe = to_moebert(dense, RANKING, expert_size=16, n_shared=8)
    for layer, old in zip(moe_layers(moe), encoder_layouts.ffns(dense), strict=True):
        for e, kept in enumerate(layer.neurons):
            assert torch.equal(layer.experts.up_proj[e], old.up.weight[kept])
            assert torch.equal(layer.experts.up_proj_bias[e], old.up.bias[kept])
            assert torch.equal(layer.experts.down_proj[e], old.down.weight[:, kept])
            assert torch.equal(layer.LayerNorm.weight[e], old.norm.weight)
    old, new = dense.state_dict(), moe.state_dict()
    kept = {name for name in old if name in new and torch.equal(old[name], new[name])}
    assert len(old) - len(kept) == 2 * 6  # of each layer W1, b1, W2, b2, gain and bias


@all_but_bert
@pytest.mark.parametrize("scaling", ["inside", "outside"])
def test_a_layer_equals_the_token_by_token_reference(kind, scaling):
    model = converted(tiny_encoder(kind), routing="gate-token", gate_scaling=scaling)
    layer, a = moe_layers(model)[1], torch.randn(2, 5, 32).double()
    route, parts = layer.router(a, None, None), layer.experts
    slow = []
    for x, e, p in zip(a.flatten(0, 1), route.experts[:, 0], route.weights[:, 0], strict=True):
        h = torch.nn.functional.gelu(parts.up_proj[e] @ x + parts.up_proj_bias[e])
        y = parts.down_proj[e] @ h + parts.down_proj_bias[e]
        y = x + (y if layer.outside else p * y)
        y = (y - y.mean()) / (y.var(correction=0) + layer.LayerNorm.eps).sqrt()
        y = y * layer.LayerNorm.weight[e] + layer.LayerNorm.bias[e]
        slow.append(y * p if layer.outside else y)
    assert torch.allclose(layer(a, RoutingCall()), torch.stack(slow).view_as(a), atol=1e-12)


@every_head
def test_auto_classes_know_what_was_saved(kind, tmp_path):
    model = converted(tiny_encoder(kind), routing="gate-token")
    model.save_pretrained(tmp_path)
    auto = (
        AutoModelForSequenceClassification
        if kind in CLASSIFIERS
        else (AutoModelForQuestionAnswering)
    )
    back = auto.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(back) is type(model) and type(back.config) is model.config_class
    near = dict(rtol=0, atol=1e-12)
    given = tiny_batch(model)
    assert torch.allclose(logits(back.eval(), given), logits(model, given), **near)
    assert AutoConfig.from_pretrained(tmp_path).routing == "gate-token"
    encoder = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(encoder) is type(model.base_model)
    ids = tiny_batch(model)["input_ids"]
    states = model.base_model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.allclose(encoder(ids).last_hidden_state, states[-1], **near)


@every_head
def test_a_dense_model_is_read_with_its_own_head(kind, tmp_path):
    dense = tiny_encoder(kind)
    dense.save_pretrained(tmp_path)
    assert type(load_dense(str(tmp_path))) is kind


@every_family
def test_tied_neurons_grouped_mm_and_hash_hold_as_for_bert(kind):
    tied, one = converted(tiny_encoder(kind), shared_neurons="tied"), converted(tiny_encoder(kind))
    given = tiny_batch(tied)
    checks.saving_changes_nothing(tied, given)
    checks.same_token_same_expert(one, given)
    loop = logits(one.float(), given)
    one.set_experts_implementation("grouped_mm")
    assert torch.allclose(logits(one, given), loop, atol=1e-5)


@every_family
def test_removed_neurons_are_zeros_in_their_rows(kind):
    dense = tiny_encoder(kind)
    gone, zeroed = RANKING[:, :20], copy.deepcopy(dense)
    for layer, neurons in zip(encoder_layouts.ffns(zeroed), gone, strict=True):
        layer.down.weight.data[:, neurons] = 0
    with without(dense, gone):
        cut = logits(dense, tiny_batch(dense))
    assert torch.allclose(cut, logits(zeroed, tiny_batch(dense)), atol=1e-12)
    rows = {**tiny_batch(dense), "index": torch.arange(4)}
    assert excite(dense, [rows])["mean"].shape == (2, 64)


@every_family
def test_accelerate_takes_each_family(kind):
    dense = tiny_encoder(kind)
    for model in (dense, converted(dense)):
        assert isinstance(accelerate_if_exact(model).base_model, PackedEncoder)


def test_the_table_of_the_notebook_has_each_family_and_holds():
    made = encoder_table()
    assert list(made["encoder"]) == [row.name for row in encoder_layouts.FAMILIES.values()]
    assert (made["effective"] < made["dense"]).all() and (made["dense"] < made["stored"]).all()


def test_an_unsupported_model_is_refused_in_a_line_that_names_the_supported():
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    gated = ModernBertForSequenceClassification(
        ModernBertConfig(
            **small,
            intermediate_size=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    )
    known = "supported: BertForSequenceClassification.*DistilBertForQuestionAnswering"
    with pytest.raises(ValueError, match=f"feed-forward layer is gated.*{known}"):
        to_moebert(gated, RANKING)
    with pytest.raises(ValueError, match=f"cannot convert a BertForMaskedLM; {known}"):
        to_moebert(tiny_encoder(BertForMaskedLM), RANKING)
    for score in (ffn_importance, lambda model, given: encoder_layouts.width(model.config)):
        with pytest.raises(ValueError, match="BERT, MiniLM, RoBERTa, ELECTRA, MPNet, DistilBERT"):
            score(gated, [{}])


def test_an_encoder_whose_layers_have_berts_names_is_not_scored_for_them():
    config = DebertaV2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=9,
        intermediate_size=16,
    )
    other = DebertaV2ForSequenceClassification(config)
    known = "type 'deberta-v2' cannot be converted; supported: BERT, MiniLM, RoBERTa"
    for kind in ("importance", "weight"):
        with pytest.raises(ValueError, match=known):
            ffn_scores(other, [], kind)
    with pytest.raises(ValueError, match=known):
        ffn_importance(other, [])


@every_family
def test_the_longest_input_is_taken_and_no_longer_one(kind):
    dense = tiny_encoder(kind)
    longest = encoder_layouts.longest(dense)
    assert longest == {"roberta": 62, "mpnet": 62}.get(dense.config.model_type, 64)
    dense(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        dense(torch.full((1, longest + 1), 5))
