"""MoEBERT as a transformers model: equal to BERT where it should be, saved whole."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from tiny_spans import span_batch, span_bert
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

import moebert_lib
from moebert_lib.method.partition import random_ranking
from moebert_lib.method.routing import ALL_ROUTINGS, ROUTINGS, balance_loss, nearest_cluster
from moebert_lib.model.conversion import load_dense, to_moebert
from moebert_lib.model.modeling import (
    HEADS,
    MoEBertConfig,
    MoEBertForQuestionAnswering,
    MoEBertForSequenceClassification,
    MoEBertModel,
)
from moebert_lib.model.moe_layer import RoutingCall, moe_layers, parameter_counts, record_routes
from moebert_lib.teaching import checks

RANKING = random_ranking(2, 64, seed=0)


@pytest.fixture
def moebert(tiny_bert):
    """Maker of a converted tiny BERT whose experts' LayerNorms have drifted apart."""

    def make(*, spans=False, **changes):
        frequencies = torch.arange(99)
        dense = span_bert(tiny_bert()) if spans else tiny_bert()
        model = to_moebert(
            dense,
            RANKING,
            n_experts=4,
            expert_size=16,
            n_shared=8,
            **{"token_frequencies": frequencies, **changes},
        )
        for layer in moe_layers(model):
            for values in layer.LayerNorm.parameters():
                values.data += 0.3 * torch.randn(values.shape, dtype=values.dtype)
        return model

    return make


def slow_layer(layer, hidden, route):
    """One token at a time, from Eq. 1-3: the reference for ``MoEOutput``."""
    out = []
    for token, e, p in zip(hidden.flatten(0, 1), route.experts, route.weights, strict=True):
        w1, b1 = layer.experts.up_proj[e[0]], layer.experts.up_proj_bias[e[0]]
        w2, b2 = layer.experts.down_proj[e[0]], layer.experts.down_proj_bias[e[0]]
        served = w2 @ torch.nn.functional.gelu(w1 @ token + b1) + b2
        x = token + (1 if layer.outside else p) * served
        x = (x - x.mean()) / (x.var(correction=0) + layer.LayerNorm.eps).sqrt()
        gain, shift = layer.LayerNorm.weight, layer.LayerNorm.bias
        gain, shift = (gain[e[0]], shift[e[0]]) if layer.per_expert else (gain, shift)
        out.append((x * gain + shift) * (p if layer.outside else 1))
    return torch.stack(out).view_as(hidden)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("norm", ["per-expert", "shared"])
@pytest.mark.parametrize("scaling", ["inside", "outside"])
def test_a_layer_equals_the_token_by_token_reference(moebert, routing, norm, scaling):
    model = moebert(routing=routing, expert_layer_norm=norm, gate_scaling=scaling)
    layer, hidden = moe_layers(model)[1], torch.randn(3, 6, 32).double()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    call = RoutingCall(torch.randint(99, (3, 6)), mask)
    route = layer.router(hidden, call.input_ids, call.mask)
    assert torch.allclose(layer(hidden, call), slow_layer(layer, hidden, route), atol=1e-13)


def test_every_token_returns_to_its_place(moebert):
    layer = moe_layers(moebert())[0]
    checks.tokens_return_to_their_place(
        layer.experts, torch.randn(40, 32), torch.randint(4, (40, 1))
    )


def test_an_expert_without_tokens_is_no_trouble(moebert):
    layer = moe_layers(moebert())[0]
    hidden, all_to_two = torch.randn(5, 32).double(), torch.full((5, 1), 2)
    layer.experts(hidden, all_to_two, torch.ones(5, 1)).sum().backward()
    touched = layer.experts.up_proj.grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [False, False, True, False]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_saving_keeps_tables_and_weights_bit_for_bit(moebert, tiny_batch, routing):
    checks.saving_changes_nothing(moebert(routing=routing), tiny_batch())


def test_tables_differ_between_layers_and_survive_saving(moebert, tmp_path):
    model = moebert(seed=5)
    tables = [layer.router.tid2eid for layer in moe_layers(model)]
    assert not torch.equal(*tables)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1234)  # nothing random may enter loading
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for layer, table in zip(moe_layers(back), tables, strict=True):
        assert torch.equal(layer.router.tid2eid, table)


def test_auto_classes_know_it_after_import(moebert, tmp_path):
    moebert(routing="gate-token").save_pretrained(tmp_path)
    assert moebert_lib.MoEBertForSequenceClassification is MoEBertForSequenceClassification
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoEBertConfig)
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(back) is MoEBertForSequenceClassification
    assert back.config.routing == "gate-token"


def test_the_checkpoint_is_safetensors_and_holds_only_the_student(moebert, tmp_path):
    model = moebert()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert not any("teacher" in name for name in model.state_dict())


def test_labels_may_be_absent(moebert, tiny_batch):
    batch = tiny_batch()
    del batch["labels"]
    for routing in ROUTINGS:
        output = moebert(routing=routing)(**batch)
        assert output.loss is None and output.logits.shape == (4, 2)


def test_outputs_are_those_of_transformers(moebert, tiny_batch):
    model, batch = moebert(), tiny_batch()
    model.set_attn_implementation("eager")  # sdpa gives no attentions
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(4, 12, 32)] * 3
    assert len(output.attentions) == 2
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


def test_loss_includes_the_gates_balance(moebert, tiny_batch):
    batch = tiny_batch()
    model = moebert(routing="gate-token", router_aux_loss_coef=0.5)
    output = model(**batch)
    task = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    assert torch.allclose(output.loss, task + 0.5 * output.aux_loss)
    assert moebert()(**batch).aux_loss is None


def test_the_balance_counts_padding_only_on_request(moebert, tiny_batch):
    batch = tiny_batch()
    for routing in ("gate-token", "gate-sentence"):
        without, counted = (
            moebert(routing=routing, padding_in_balance=flag) for flag in (False, True)
        )
        counted.load_state_dict(without.state_dict())
        with record_routes(counted) as routes:
            output = counted(**batch)
        expected = sum(balance_loss(calls[0]) for calls in routes)
        assert torch.allclose(output.aux_loss, expected, atol=1e-12)
        assert not torch.allclose(output.aux_loss, without(**batch).aux_loss, atol=1e-6)


def test_spans_have_the_outputs_of_transformers_and_no_pooler(moebert, tiny_batch):
    model, batch = moebert(spans=True), span_batch(tiny_batch())
    assert type(model) is MoEBertForQuestionAnswering and model.bert.pooler is None
    output = model(**batch, output_hidden_states=True)
    assert output.start_logits.shape == output.end_logits.shape == (4, 12)
    assert len(output.hidden_states) == 3
    as_tuple = model(**batch, return_dict=False)
    own = (output.loss, output.start_logits, output.end_logits)
    for one, other in zip(own, as_tuple[:3], strict=True):
        assert torch.equal(one, other)
    only = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model(**only).loss is None


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_loss_of_spans_includes_the_gates_balance(moebert, tiny_batch, routing):
    batch = span_batch(tiny_batch())
    model = moebert(spans=True, routing=routing, router_aux_loss_coef=0.5)
    output = model(**batch)
    task = sum(
        torch.nn.functional.cross_entropy(logits, batch[f"{side}_positions"]) / 2
        for side, logits in (("start", output.start_logits), ("end", output.end_logits))
    )
    assert (output.aux_loss is None) == routing.startswith("hash")
    balance = 0 if output.aux_loss is None else output.aux_loss
    assert torch.allclose(output.loss, task + 0.5 * balance, atol=1e-12)


def test_a_saved_span_model_is_found_by_its_auto_class(moebert, tiny_batch, tmp_path):
    model, batch = moebert(spans=True, routing="gate-token"), tiny_batch()
    del batch["labels"]
    model.save_pretrained(tmp_path)
    back = AutoModelForQuestionAnswering.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(back) is moebert_lib.MoEBertForQuestionAnswering
    logits = model(**batch).end_logits
    assert torch.allclose(back.eval()(**batch).end_logits, logits, rtol=0, atol=1e-12)


def test_the_encoder_alone_is_found_by_its_auto_class(moebert, tiny_batch, tmp_path):
    model, batch = moebert(), tiny_batch()
    del batch["labels"]
    model.save_pretrained(tmp_path)
    back = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(back) is MoEBertModel
    states = model.bert(**batch).last_hidden_state
    assert torch.allclose(back(**batch).last_hidden_state, states, rtol=0, atol=1e-12)


def test_padding_does_not_change_a_sentence(moebert, tiny_batch):
    batch = tiny_batch(n=1)
    del batch["labels"]
    padded = {k: torch.cat([v, torch.zeros(1, 5).long()], 1) for k, v in batch.items()}
    for routing in ROUTINGS:
        model = moebert(routing=routing)
        assert torch.allclose(model(**batch).logits, model(**padded).logits, atol=1e-12)


def test_grouped_mm_gives_the_same_as_the_loop(moebert, tiny_batch):
    model, batch = moebert().float(), tiny_batch()
    loop = model(**batch).logits
    model.set_experts_implementation("grouped_mm")
    assert torch.allclose(model(**batch).logits, loop, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(moebert, tiny_batch):
    plain, batch = moebert(), tiny_batch()
    saving = copy.deepcopy(plain).train()
    older = saving.gradient_checkpointing_enable  # its name until transformers 5.20
    getattr(saving, "activation_checkpointing_enable", older)()
    for module in saving.modules():
        module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    plain(**batch).loss.backward()
    saving(**batch).loss.backward()
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert one.grad is None or torch.allclose(one.grad, two.grad, atol=1e-12), name


def test_recording_routes_leaves_no_hook_behind(moebert, tiny_batch):
    model, batch = moebert(routing="gate-token"), tiny_batch()
    with record_routes(model) as routes:
        model(**batch)
        model(**batch)
    assert [len(calls) for calls in routes] == [2, 2]
    assert routes[0][0].experts.shape == (48, 1)
    assert not any(layer.router._forward_hooks for layer in moe_layers(model))


def test_parameter_counts_are_those_of_the_paper():
    with torch.device("meta"):
        model = MoEBertModel(MoEBertConfig())
    assert parameter_counts(model) == (66_987_264, 109_565_184)


def test_a_classification_pipeline_runs(moebert, tmp_path):
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    classify = pipeline("text-classification", model=moebert().float(), tokenizer=tokenizer)
    answers = classify(["good film", "bad"])
    assert {answer["label"] for answer in answers} <= {"LABEL_0", "LABEL_1"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("routing", "hash"),
        ("expert_layer_norm", "none"),
        ("gate_scaling", "both"),
        ("shared_neurons", "glued"),
    ],
)
def test_an_unknown_choice_is_refused(name, value):
    with pytest.raises(Exception, match=f"{name}='{value}' must be one of"):
        MoEBertConfig(**{name: value})


def test_chunked_feed_forward_is_refused():
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        MoEBertModel(MoEBertConfig(chunk_size_feed_forward=2, num_hidden_layers=1))


def test_a_balance_of_weight_nothing_is_left_out(moebert, tiny_batch, tmp_path):
    batch = tiny_batch()
    model = moebert(routing="gate-token", router_aux_loss_coef=0)
    output = model(**batch)
    assert torch.allclose(output.loss, F.cross_entropy(output.logits, batch["labels"]))
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).router_aux_loss_coef == 0


@pytest.mark.parametrize("kind", HEADS.items(), ids=lambda pair: pair[1].__name__)
def test_forward_has_the_dense_models_signature(kind):
    dense, head = kind
    assert inspect.signature(head.forward) == inspect.signature(dense.forward)
    encoders = head.encoder, head.encoder.__bases__[1]
    assert inspect.signature(encoders[0].forward) == inspect.signature(encoders[1].forward)


def test_trainer_keeps_the_columns_of_the_dense_model(moebert, tiny_bert, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    kept = []
    for model in (moebert(), tiny_bert()):
        trainer = Trainer(model, arguments)
        trainer._set_signature_columns_if_needed()
        kept.append(trainer._signature_columns)
    assert kept[0] == kept[1] and {"inputs_embeds", "position_ids", "labels"} <= set(kept[0])


@pytest.mark.parametrize("kind", [k for k in HEADS if "Sequence" in k.__name__])
@pytest.mark.parametrize("routing", ["gate-token", "gate-sentence"])
def test_gates_take_embeddings_and_positions(kind, routing):
    dense = checks.tiny_encoder(kind)
    model = to_moebert(dense, RANKING, routing=routing)
    given = checks.tiny_batch(dense)
    words = model.get_input_embeddings()(given["input_ids"])
    length = given["input_ids"].shape[1]
    first = 2 if "Roberta" in kind.__name__ else 0  # RoBERTa counts from its padding's on
    places = (first + torch.arange(length)).expand(4, -1)
    mask = given["attention_mask"]
    expected = model(given["input_ids"], mask, position_ids=places).logits
    by_words = model(inputs_embeds=words, attention_mask=mask, position_ids=places).logits
    assert torch.allclose(by_words, expected, atol=1e-12)
    elsewhere = model(inputs_embeds=words, attention_mask=mask, position_ids=places.flip(1))
    assert not torch.allclose(elsewhere.logits, expected, atol=1e-6)


def test_a_hash_of_embeddings_is_refused(moebert, tiny_batch):
    model, batch = moebert(), tiny_batch()
    words = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="hash routing needs input_ids"):
        model(inputs_embeds=words, attention_mask=batch["attention_mask"])


@pytest.mark.parametrize("routing", ALL_ROUTINGS)
@pytest.mark.parametrize("size", [60, 99, 105])
def test_a_resized_vocabulary_routes_trains_and_loads(moebert, routing, size, tmp_path):
    model = moebert(routing=routing)
    before = [getattr(layer.router, "tid2eid", None) for layer in moe_layers(model)]
    model.resize_token_embeddings(size)
    for layer, old in zip(moe_layers(model), before, strict=True):
        if old is not None:
            table = layer.router.tid2eid
            assert table.shape == (size, 1) and torch.equal(table[:99], old[:size])
            assert set(table.flatten().tolist()) <= set(range(4))
    ids = torch.arange(size - 12, size).view(2, 6)
    output = model.train()(ids, labels=torch.tensor([0, 1]))
    output.loss.backward()
    model.eval().save_pretrained(tmp_path)
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.allclose(back.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-12)


def test_new_ids_get_experts_by_the_routers_rule(moebert):
    sizes, tables = (139, 119, 139), []
    for steps in (sizes[:1], sizes[1:]):
        model = moebert()
        for size in steps:
            model.resize_token_embeddings(size, mean_resizing=False)
        tables.append([layer.router.tid2eid for layer in moe_layers(model)])
    for at_once, in_steps in zip(*tables, strict=True):
        assert torch.equal(at_once, in_steps)
    balanced = moebert(routing="hash-balance")
    balanced.resize_token_embeddings(139, mean_resizing=False)
    for layer in moe_layers(balanced):
        assert layer.router.tid2eid[99:, 0].bincount().tolist() == [10] * 4
    clustered = moebert(routing="hash-cluster")
    words = clustered.get_input_embeddings().weight.detach()
    table = moe_layers(clustered)[0].router.tid2eid[:, 0]
    assert torch.equal(nearest_cluster(words, words, table), table)  # k-means has settled


def test_checkpointing_that_an_old_configuration_asks_for_is_kept():
    config = MoEBertConfig(num_hidden_layers=2, vocab_size=9, hidden_size=8, num_attention_heads=2)
    config.gradient_checkpointing = True
    model = MoEBertForSequenceClassification(config)
    assert all(layer.gradient_checkpointing for layer in model.bert.encoder.layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_saved_in_half_precision_is_loaded_in_full(tiny_bert, tmp_path, dtype):
    tiny_bert().to(dtype).save_pretrained(tmp_path)
    assert load_dense(str(tmp_path)).dtype == torch.float32
