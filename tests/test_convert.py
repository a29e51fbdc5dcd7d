"""Conversion: dense where it must be, the right neurons, the release's layout, refusals."""

import pytest
import torch
from tiny_spans import span_batch, span_bert
from transformers import BertConfig, BertForMaskedLM

from moebert_lib.method.distillation_loss import teacher_layers
from moebert_lib.method.importance import Importance, ffn_importance
from moebert_lib.method.partition import deal_layers, random_ranking
from moebert_lib.method.routing import ROUTINGS
from moebert_lib.model.conversion import half_depth, to_moebert
from moebert_lib.model.moe_layer import moe_layers
from moebert_lib.teaching import checks

RANKING = random_ranking(2, 64, seed=0)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_full_width_expert_is_the_dense_model(tiny_bert, tiny_batch, routing):
    dense = tiny_bert()
    one = to_moebert(
        dense, RANKING, n_experts=1, routing=routing, token_frequencies=torch.arange(99)
    )
    checks.one_expert_is_dense(dense, one, tiny_batch())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_full_width_expert_is_the_dense_model_of_spans(tiny_bert, tiny_batch, routing):
    dense, batch = span_bert(tiny_bert()), span_batch(tiny_batch())
    one = to_moebert(
        dense,
        RANKING,
        n_experts=1,
        routing=routing,
        token_frequencies=torch.arange(99),
        router_aux_loss_coef=0.0,
        gate_scaling="outside",
    )
    own, other = one(**batch), dense(**batch)
    for name in ("loss", "start_logits", "end_logits"):
        assert torch.allclose(own[name], other[name], atol=1e-12)


def test_full_width_identical_experts_are_the_dense_model(tiny_bert, tiny_batch):
    dense, batch = tiny_bert(), tiny_batch()
    same = to_moebert(
        dense, RANKING, n_experts=3, expert_size=64, n_shared=64, allow_identical=True
    )
    assert torch.allclose(same(**batch).logits, dense(**batch).logits, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 5, 6])
def test_half_depth_is_every_other_layer_counted_from_the_last(tiny_bert, tiny_batch, depth):
    dense, batch = tiny_bert(num_hidden_layers=depth), tiny_batch()
    half = half_depth(dense)
    kept = teacher_layers((depth + 1) // 2, depth)[1:]
    assert half.config.num_hidden_layers == len(kept) and dense.config.num_hidden_layers == depth
    skipped = [layer for n, layer in enumerate(dense.bert.encoder.layer, start=1) if n not in kept]
    for layer in skipped:  # a layer that gives back what it is given, in the dense model
        layer.forward = lambda states, *others, **more: states
    assert torch.allclose(half(**batch).logits, dense(**batch).logits, atol=1e-12)
    half.bert.encoder.layer[0].output.dense.weight.data.zero_()  # it is a copy
    assert dense.bert.encoder.layer[kept[0] - 1].output.dense.weight.any()


def test_permuting_neurons_changes_nothing(tiny_bert, tiny_batch):
    checks.permuting_neurons_changes_nothing(tiny_bert(), tiny_batch())


def test_each_expert_holds_the_neurons_it_was_dealt(tiny_bert):
    dense = tiny_bert()
    moe = to_moebert(dense, RANKING, n_experts=4, expert_size=16, n_shared=8)
    dealt = deal_layers(RANKING, n_experts=4, expert_size=16, n_shared=8)
    for layer, old, rows in zip(moe_layers(moe), dense.bert.encoder.layer, dealt, strict=True):
        assert torch.equal(layer.neurons, rows)
        for e, row in enumerate(rows):
            assert torch.equal(layer.experts.up_proj[e], old.intermediate.dense.weight[row])
            assert torch.equal(layer.experts.up_proj_bias[e], old.intermediate.dense.bias[row])
            assert torch.equal(layer.experts.down_proj[e], old.output.dense.weight[:, row])
            assert torch.equal(layer.LayerNorm.bias[e], old.output.LayerNorm.bias)


def test_converted_output_equals_masking_the_dense_ffn(tiny_bert, tiny_batch):
    # with all tokens at expert 2, the model is the dense one without the other neurons
    dense, batch = tiny_bert(), tiny_batch()
    moe = to_moebert(dense, RANKING, n_experts=4, expert_size=16, n_shared=8)
    for layer, old in zip(moe_layers(moe), dense.bert.encoder.layer, strict=True):
        layer.router.tid2eid.fill_(2)
        gone = torch.ones(64, dtype=torch.bool)
        gone[layer.neurons[2]] = False
        old.output.dense.weight.data[:, gone] = 0
    assert torch.allclose(moe(**batch).logits, dense(**batch).logits, atol=1e-12)


def test_everything_but_the_ffn_is_copied(tiny_bert):
    dense = tiny_bert()
    own = to_moebert(dense, RANKING).state_dict()
    outside = [n for n in dense.state_dict() if "encoder.layer" not in n or "attention" in n]
    assert len(outside) > 20
    for name in outside:
        assert torch.equal(own[name], dense.state_dict()[name]), name


@pytest.mark.parametrize("shared", ["copied", "tied"])
@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "gate-sentence"])
def test_every_weight_is_set(tiny_bert, routing, shared):
    """Modules are made without initial values, here of NaN, so a forgotten one would show."""
    bert, before = tiny_bert(), torch.are_deterministic_algorithms_enabled()
    ranking = random_ranking(2, bert.config.intermediate_size, seed=0)
    torch.use_deterministic_algorithms(True)  # fills memory that is not set with NaN
    try:
        assert torch.empty(3).isnan().all()
        moe = to_moebert(bert, ranking, routing=routing, shared_neurons=shared)
    finally:
        torch.use_deterministic_algorithms(before)
    for name, values in moe.state_dict().items():
        if values.is_floating_point():
            assert values.isfinite().all(), name


def test_the_dense_model_is_untouched_and_shares_no_memory(tiny_bert, tiny_batch):
    dense, batch = tiny_bert(), tiny_batch()
    before = dense(**batch).logits
    for values in to_moebert(dense, RANKING).parameters():
        values.data.zero_()
    assert torch.equal(dense(**batch).logits, before)


def test_defaults_are_the_papers_proportions(tiny_bert):
    config = to_moebert(tiny_bert(), RANKING).config
    assert (config.n_experts, config.expert_size, config.n_shared) == (4, 16, 10)
    assert config.routing == "hash-random" and config.expert_layer_norm == "per-expert"


def test_scores_and_their_ranking_convert_alike(tiny_bert, tiny_batch):
    dense = tiny_bert()
    scores = ffn_importance(dense, [tiny_batch()])
    one, two = to_moebert(dense, scores), to_moebert(dense, scores.ranking)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_scores_of_another_model_are_refused_and_their_ranking_is_not(tiny_bert, tiny_batch):
    other = ffn_importance(tiny_bert(seed=1), [tiny_batch()])
    with pytest.raises(ValueError, match="another model.*importance.ranking if") as refusal:
        to_moebert(tiny_bert(), other)
    assert "\n" not in str(refusal.value)
    own = to_moebert(tiny_bert(), other.ranking).state_dict()
    unknown = Importance(other.scores, other.blocks, other.counts, {"source": "importance_rte.pkl"})
    same = to_moebert(tiny_bert(), unknown).state_dict()
    assert all(torch.equal(own[name], same[name]) for name in own)


@pytest.mark.parametrize("kind", [torch.Tensor.int, torch.Tensor.numpy, torch.Tensor.tolist])
def test_a_ranking_may_be_any_table_of_integers(tiny_bert, kind):
    own, same = (to_moebert(tiny_bert(), r).state_dict() for r in (RANKING, kind(RANKING)))
    assert all(torch.equal(own[name], same[name]) for name in own)


@pytest.mark.parametrize("scores", [torch.rand(2, 64), [[0.5]], [[1], [1, 2]], "scores", None])
def test_what_is_no_ranking_is_refused(tiny_bert, scores):
    with pytest.raises(ValueError, match="must be an Importance, or a ranking: integers"):
        to_moebert(tiny_bert(), scores)


def test_dtype_labels_and_mode_are_kept(tiny_bert):
    dense = tiny_bert(num_labels=3, dtype=torch.float32).train()
    dense.config.id2label = {0: "a", 1: "b", 2: "c"}
    moe = to_moebert(dense, RANKING)
    assert moe.dtype == torch.float32 and moe.training
    assert moe.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_seeds_decide_tables_and_gates(tiny_bert):
    for routing, name in (("hash-random", "router.tid2eid"), ("gate-token", "router.gate.weight")):
        one, same, other = (
            to_moebert(tiny_bert(), RANKING, routing=routing, seed=seed).state_dict()
            for seed in (1, 1, 2)
        )
        key = f"bert.encoder.layer.0.output.{name}"
        assert torch.equal(one[key], same[key]) and not torch.equal(one[key], other[key])


def test_balanced_tables_differ_between_layers_only_in_tokens_that_never_occur(tiny_bert):
    frequencies = torch.arange(99) % 3  # every third never occurs
    moe = to_moebert(
        tiny_bert(), RANKING, routing="hash-balance", token_frequencies=frequencies, seed=1
    )
    one, two = (layer.router.tid2eid[:, 0] for layer in moe_layers(moe))
    assert torch.equal(one[frequencies > 0], two[frequencies > 0])
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(expert_size=40, n_shared=4), "need 148 neurons.*largest expert_size that fits is 19"),
        (dict(expert_size=40), "need 82 neurons.*largest expert_size that fits is 31"),
        (dict(routing="hash-balance"), "token_frequencies.*99 vocabulary ids, not none"),
        (dict(routing="hash-balance", token_frequencies=torch.ones(1)), "99 vocab.*, not 1"),
        (dict(routing="hash"), "routing='hash' must be one of"),
        (dict(expert_size=16, n_shared=16), "identical"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_bert, changes, message):
    with pytest.raises(Exception, match=message):
        to_moebert(tiny_bert(), RANKING, **changes)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("n_expert", "n_experts"),
        ("routings", "routing"),
        ("gate_scale", "gate_"),
        ("padding_in_loss", "padding_in_balance"),
        ("shared_neuron", "shared_neurons"),
        ("gate_top_k", "num_experts_per_tok"),
    ],
)
def test_a_misspelt_argument_is_refused(tiny_bert, typo, meant):
    with pytest.raises(TypeError, match=f"no argument '{typo}'; did you mean '{meant}"):
        to_moebert(tiny_bert(), RANKING, **{typo: 2})


@pytest.mark.parametrize("sizes", [dict(n_experts=0), dict(expert_size=0)])
def test_no_expert_and_no_neuron_are_refused(tiny_bert, sizes):
    with pytest.raises(ValueError, match="must be at least 1|must lie in"):
        to_moebert(tiny_bert(), RANKING, **sizes)


def test_a_ranking_of_another_model_is_refused(tiny_bert):
    with pytest.raises(ValueError, match=r"ranks \(3, 64\).*the model has \(2, 64\)"):
        to_moebert(tiny_bert(), random_ranking(3, 64, seed=0))


def test_an_unsupported_model_names_the_supported_ones():
    model = BertForMaskedLM(
        BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            vocab_size=9,
        )
    )
    with pytest.raises(ValueError, match="BertForMaskedLM; supported: BertForSequenceClass"):
        to_moebert(model, random_ranking(1, 8, seed=0))
