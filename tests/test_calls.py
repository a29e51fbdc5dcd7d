"""State belongs to a call: threads, layers computed again, and two passes before one backward."""

import copy
import gc
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_adapters import converted, every_family
from tiny_models import batch, moebert, with_labels
from transformers import BertTokenizerFast, pipeline

from moebert_lib.model.accelerate import accelerate
from moebert_lib.model.moe_layer import RoutingCall, moe_layers, record_routes
from moebert_lib.teaching.checks import tiny_batch, tiny_encoder

ROUTINGS = ["hash-random", "gate-sentence", "gate-token"]
each_routing = pytest.mark.parametrize("routing", ROUTINGS)


@pytest.fixture
def busy_threads():
    """Threads change places as often as Python can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield ThreadPoolExecutor(4)
    sys.setswitchinterval(usual)


def different_batches(n=24):
    return [batch([2 + i % 9, 3 + i % 5, 1 + i % 3][: 1 + i % 3], seed=i) for i in range(n)]


def check_threads(threads, model, answer, questions):
    with torch.inference_mode():
        expected = [answer(model, question) for question in questions]

    def ask(question):
        with torch.inference_mode():
            return answer(model, question)

    for given, right in zip(threads.map(ask, questions * 5), expected * 5, strict=True):
        assert torch.allclose(given, right, rtol=0, atol=1e-10)


@each_routing
@pytest.mark.parametrize("faster", [False, True])
def test_four_threads_get_what_one_gets(busy_threads, routing, faster):
    model = moebert(routing=routing)
    model = accelerate(model) if faster else model
    check_threads(busy_threads, model, lambda m, x: m(**x).logits, different_batches())


@every_family
@each_routing
@pytest.mark.parametrize("faster", [False, True])
def test_threads_share_a_model_of_every_family(busy_threads, kind, routing, faster):
    dense = tiny_encoder(kind)
    questions = [tiny_batch(dense, n=1 + i % 4, length=5 + i, seed=i) for i in range(8)]
    model = converted(dense, routing=routing)
    model = accelerate(model) if faster else model
    check_threads(busy_threads, model, lambda m, x: m(**x).logits, questions)


@each_routing
def test_threads_train_copies_of_nothing(busy_threads, routing):
    """Losses with the balance of several threads at once are those of one after the other."""
    model = moebert(routing=routing, router_aux_loss_coef=0.5)
    questions = [with_labels(model, given) for given in different_batches(8)]
    check_threads(busy_threads, model, lambda m, x: m(**x).loss, questions)


@each_routing
def test_a_pipeline_in_a_pool_of_threads(busy_threads, routing, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    model = moebert(routing=routing).float()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    texts = [" ".join(words[5 + (i + j) % 5] for j in range(1 + i % 7)) for i in range(21)]
    expected = [classify(text)[0] for text in texts]
    for given, right in zip(busy_threads.map(classify, texts * 3), expected * 3, strict=True):
        assert given[0]["label"] == right["label"]
        assert given[0]["score"] == pytest.approx(right["score"], abs=1e-5)


@pytest.mark.parametrize("size", [2, 3])
@each_routing
def test_a_pipeline_in_batches(routing, size, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    model = moebert(routing=routing).float()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    texts = ["good film", "bad", "good good film", "bad film", "film"]
    together = [answer["score"] for answer in classify(texts, batch_size=size)]
    assert together == pytest.approx([classify(text)[0]["score"] for text in texts], abs=1e-5)


@each_routing
def test_the_balance_is_for_training(routing):
    model = moebert(routing=routing)
    inputs = batch([5, 3])
    gated = routing.startswith("gate")
    assert model(**inputs).aux_loss is None
    assert (model(**with_labels(model, inputs)).aux_loss is not None) == gated
    assert (model.train()(**inputs).aux_loss is not None) == gated


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one, other):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert torch.allclose(gradient, other[name], rtol=1e-10, atol=1e-13), name


def checkpointed(model, *, reentrant):
    older = model.gradient_checkpointing_enable  # its name until transformers 5.20
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": reentrant})
    return model.train()


KINDS = [(routing, False) for routing in ROUTINGS] + [("hash-random", True)]
each_kind = pytest.mark.parametrize(("routing", "reentrant"), KINDS)


@every_family
@each_kind
def test_layers_computed_again_give_the_same_gradients(kind, routing, reentrant):
    no_dropout = {
        name: 0.0
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout")
        + ("attention_dropout", "seq_classif_dropout", "classifier_dropout")
    }
    dense = tiny_encoder(kind, **no_dropout)
    plain = converted(dense, routing=routing, router_aux_loss_coef=0.5).train()
    if not dense.supports_gradient_checkpointing:  # transformers' MPNet
        with pytest.raises(ValueError, match="does not support"):
            checkpointed(plain, reentrant=reentrant)
        return
    saving = checkpointed(copy.deepcopy(plain), reentrant=reentrant)
    given = tiny_batch(dense)
    expected = gradients(plain, given)
    assert_same_gradients(expected, gradients(saving, given))
    if routing.startswith("gate"):  # and the balance has its part in it
        plain.config.router_aux_loss_coef = saving.config.router_aux_loss_coef = 0
        without = gradients(plain, given)
        assert_same_gradients(without, gradients(saving, given))
        gate = next(name for name in expected if "router.gate" in name)
        assert not torch.allclose(expected[gate], without[gate], rtol=1e-3)


@each_kind
def test_two_passes_before_one_backward(routing, reentrant):
    plain = moebert(routing=routing, router_aux_loss_coef=0.5).train()
    saving = checkpointed(copy.deepcopy(plain), reentrant=reentrant)
    first, second = (with_labels(plain, batch(n, seed=len(n))) for n in ([7, 3], [4, 9, 2]))
    found = []
    for model in (plain, saving):
        losses = [model(**given).loss for given in (first, second)]
        (losses[0] + 2 * losses[1]).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same_gradients(*found)


@pytest.mark.parametrize("routing", ["gate-token", "gate-sentence"])
def test_reentrant_checkpoints_would_lose_the_balance_and_are_refused(routing):
    with pytest.raises(ValueError, match="use_reentrant"):
        checkpointed(moebert(routing=routing), reentrant=True)


@each_kind
def test_a_call_ends_with_its_graph(routing, reentrant, monkeypatch):
    calls, usual = [], RoutingCall.__init__

    def noted(self, *args, **kwargs):
        usual(self, *args, **kwargs)
        calls.append(weakref.ref(self))

    monkeypatch.setattr(RoutingCall, "__init__", noted)
    model = checkpointed(moebert(routing=routing), reentrant=reentrant)
    model(**with_labels(model, batch([5, 3]))).loss.backward()
    gc.collect()
    assert calls and not any(call() for call in calls)


@each_routing
def test_between_passes_a_model_holds_nothing_of_them(routing):
    model = moebert(routing=routing).train()
    inputs = with_labels(model, batch([5, 3]))
    loss = model(**inputs).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(**inputs).loss, loss)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_routes_are_recorded_of_the_thread_that_asked(busy_threads):
    model, inputs = moebert(routing="gate-token"), batch([5, 3])
    with record_routes(model) as routes:
        model(**inputs)
        list(busy_threads.map(lambda given: model(**given).logits, different_batches()))
        model(**inputs)
    assert [len(calls) for calls in routes] == [2, 2]
    assert torch.equal(routes[1][0].experts, routes[1][1].experts)


@each_routing
def test_compiled_and_exported_it_is_the_same(routing):
    model = moebert(routing=routing)
    inputs = batch([7, 4, 9])
    expected = model(**inputs).logits
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(**inputs).logits, expected, atol=1e-12)
    model.set_experts_implementation("batched_mm")  # the loop counts tokens, which no graph can
    graph = torch.export.export(model, (), inputs, strict=False).module()
    assert torch.allclose(graph(**inputs).logits, expected, atol=1e-12)


def test_a_layer_by_itself_needs_its_call_for_a_hash():
    layer, hidden = moe_layers(moebert())[0], torch.randn(2, 5, 32).double()
    with pytest.raises(ValueError, match="input_ids"):
        layer(hidden, RoutingCall())
