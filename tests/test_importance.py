"""Eq. 4 against slow references, and what surrounds it."""

import hashlib

import pytest
import torch
from tiny_spans import span_batch, span_bert
from torch import nn

import moebert_lib
from moebert_lib import accelerate
from moebert_lib.experiments.neuron_measurements import without
from moebert_lib.method.encoder_layouts import ffns
from moebert_lib.method.importance import (
    Importance,
    example_importance,
    ffn_digest,
    ffn_importance,
)
from moebert_lib.teaching import checks


def test_scores_equal_the_per_example_loop_in_float64(tiny_bert, tiny_batch):
    check = checks.importance_equals_slow_loop(
        ffn_importance, tiny_bert(num_labels=3), tiny_batch(n=6, num_labels=3)
    )
    assert check.difference < 1e-10


def test_a_hand_worked_importance_of_one_example():
    a = torch.tensor([[[1.0, 3.0], [2.0, 0.0]]])  # (B, T, F) = (1, 2, 2)
    h = torch.tensor([[[1.0, 2.0], [1.0, 0.0]]])
    b1 = torch.tensor([1.0, 2.0])
    grad_a = torch.tensor([[[5.0, 1.0], [2.0, 1.0]]])
    grad_h = torch.tensor([[[3.0, -4.0], [-9.0, 7.0]]])
    # neuron 1: (0 * 5 + 1 * 2) + (1 * 3 + 1 * -9) = 2 - 6; neuron 2: (1 * 1 - 2 * 1) + (2 * -4)
    assert example_importance(a, h, b1, grad_a, grad_h).tolist() == [[4.0, 9.0]]


KINDS = (
    "padded sentences",
    "holes",
    "two segments",
    "no mask",
    "one sentence",
    "padded on the left",
    "regression",
    "padded spans",
    "spans without padding",
)


def by_weights(model, batch):
    """Eq. 4 from the gradients of the weights themselves, one example at a time."""
    slow = torch.zeros(2, 64).double()
    for i in range(len(batch["input_ids"])):
        model.zero_grad()
        model(**{name: value[i : i + 1] for name, value in batch.items()}).loss.backward()
        for row, layer in zip(slow, model.bert.encoder.layer, strict=True):
            w1, w2 = layer.intermediate.dense.weight, layer.output.dense.weight
            row += ((w1 * w1.grad).sum(1) + (w2 * w2.grad).sum(0)).abs().detach()
    model.zero_grad()
    assert slow.max() > 1e-3
    return slow


def kinds(tiny_bert, tiny_batch):
    """A model and a batch of every kind that is scored."""
    batch = tiny_batch(n=6)
    mask, n = batch["attention_mask"], len(batch["labels"])
    full = dict(input_ids=batch["input_ids"], labels=batch["labels"])
    left = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    spans, unpadded = span_batch(batch), span_batch({**batch, "attention_mask": mask * 0 + 1})
    return {
        "padded sentences": (tiny_bert(), batch),
        "holes": (tiny_bert(), {**batch, "attention_mask": mask * (torch.arange(12) != 3)}),
        "two segments": (tiny_bert(), {**batch, "token_type_ids": (torch.arange(12) > 4) * mask}),
        "no mask": (tiny_bert(), full),
        "one sentence": (tiny_bert(), {name: value[1:2] for name, value in batch.items()}),
        "padded on the left": (tiny_bert(), {**batch, **left}),
        "regression": (tiny_bert(num_labels=1), {**batch, "labels": torch.arange(n).double()}),
        "padded spans": (span_bert(tiny_bert()), spans),
        "spans without padding": (span_bert(tiny_bert()), unpadded),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_those_of_weight_gradients(kind, tiny_bert, tiny_batch):
    model, batch = kinds(tiny_bert, tiny_batch)[kind]
    slow, inputs = (
        by_weights(model, batch),
        {**batch, "index": torch.arange(len(batch["input_ids"]))},
    )
    for scored in (model, accelerate(model)):
        fast = ffn_importance(scored, [inputs])
        assert fast.n_examples == len(batch["input_ids"])
        assert torch.allclose(fast.scores, slow, rtol=0, atol=1e-12)


def test_a_model_that_cannot_be_accelerated_is_scored_alike(tiny_bert, tiny_batch):
    class Wrapped(nn.Module):
        def __init__(self, bert):
            super().__init__()
            self.inner = bert

        def forward(self, **inputs):
            return self.inner(**inputs)

    model, batch = tiny_bert(), tiny_batch(n=6)
    fast = ffn_importance(Wrapped(model).eval(), [batch])
    assert torch.allclose(fast.scores, by_weights(model, batch), rtol=0, atol=1e-12)


def test_feed_forward_layers_in_chunks_of_tokens_are_scored_whole(tiny_bert, tiny_batch):
    model, batch = tiny_bert(), tiny_batch(n=6)
    whole = ffn_importance(model, [batch]).scores
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 4
    assert torch.allclose(ffn_importance(model, [batch]).scores, whole, rtol=0, atol=1e-12)
    assert all(layer.chunk_size_feed_forward == 4 for layer in model.bert.encoder.layer)


def test_a_layer_that_is_called_twice_is_refused(tiny_bert, tiny_batch):
    model = tiny_bert()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    with pytest.raises(ValueError, match="called twice in one forward pass"):
        ffn_importance(model, [tiny_batch()])
    assert not model.bert.encoder.layer[0].intermediate._forward_hooks


def test_padding_is_not_computed_and_the_last_layer_sees_first_tokens_alone(tiny_bert, tiny_batch):
    model, batch, seen = tiny_bert(), tiny_batch(n=6), []
    for layer in ffns(model):
        layer.up.register_forward_hook(lambda _m, _i, a: seen.append(a.shape))
    ffn_importance(accelerate(model), [batch])
    real = int(batch["attention_mask"].sum())
    assert real < 6 * 12 and seen == [(1, real, 64), (1, 6, 64)]


def test_only_the_first_pre_activation_is_a_leaf_of_the_graph(tiny_bert, tiny_batch):
    model, leaves, below = tiny_bert(), [], []

    def walk(_module, _inputs, logits):
        left, seen = [logits.grad_fn], set()
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaves.extend([node.variable] if hasattr(node, "variable") else [])
            left += [after for after, _ in node.next_functions]

    model.classifier.register_forward_hook(walk)
    first = model.bert.encoder.layer[0]
    first.intermediate.dense.register_forward_hook(lambda _m, i, a: below.extend([i[0], a]))
    ffn_importance(model, [tiny_batch()])
    x, a = below
    assert not x.requires_grad and len(leaves) == 1 and leaves[0] is a
    assert a.grad is None and all(p.grad is None for p in model.parameters())


def test_bfloat16_is_close_and_float16_refused(tiny_bert, tiny_batch):
    model, batch = tiny_bert(dtype=torch.float32), tiny_batch(n=8)
    exact = ffn_importance(model, [batch]).scores
    half = ffn_importance(model, [batch], dtype=torch.bfloat16).scores
    away = (half - exact).abs().max() / exact.max()
    assert 1e-5 < away < 0.1  # it has 8 bits
    with pytest.raises(ValueError, match=r"dtype=torch.float16: expected None.* torch.bfloat16"):
        ffn_importance(model, [batch], dtype=torch.float16)


def test_the_check_can_fail(tiny_bert, tiny_batch):
    def wrong(model, batches):  # scores the sum of two examples instead of each
        for_one = {name: value[:1] for name, value in batches[0].items()}
        return ffn_importance(model, [for_one, for_one])

    with pytest.raises(AssertionError, match="FAILS"):
        checks.importance_equals_slow_loop(wrong, tiny_bert(), tiny_batch())


def test_scores_do_not_depend_on_batching(tiny_bert, tiny_batch):
    model, batch = tiny_bert(), tiny_batch(n=7)
    whole = ffn_importance(model, [batch])
    pairs = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4, 6)]
    parts = ffn_importance(model, pairs)
    assert torch.allclose(whole.scores, parts.scores, rtol=0, atol=1e-12)
    assert torch.allclose(whole.blocks, parts.blocks, rtol=0, atol=1e-12)


def test_a_score_estimates_the_change_of_loss_without_the_neuron(tiny_bert, tiny_batch):
    model, batch = tiny_bert(), tiny_batch(n=1)
    for layer in model.bert.encoder.layer:  # nearly linear in the neuron: Taylor is exact
        layer.output.dense.weight.data *= 1e-4
        layer.intermediate.dense.bias.data.zero_()
    layer = model.bert.encoder.layer[1]
    h2 = {}
    hook = layer.intermediate.register_forward_hook(lambda m, i, o: h2.update(h=o))
    base = model(**batch).loss
    grad = torch.autograd.grad(base, h2["h"])[0]
    hook.remove()
    first_order = (h2["h"] * grad).sum(1)[0]
    for j in (0, 5, 63):
        with without(model, _only(1, j)):
            change = base - model(**batch).loss
        assert change.item() == pytest.approx(first_order[j].item(), rel=1e-2, abs=1e-12)


def _only(layer, neuron):
    """That neuron in its layer, none in the other."""
    rows = [torch.empty(0, dtype=torch.int64)] * 2
    rows[layer] = torch.tensor([neuron])
    return rows


def test_the_model_is_left_as_it_was(tiny_bert, tiny_batch):
    model = tiny_bert().train()
    frozen = model.classifier.weight.requires_grad_(False)
    quiet = model.bert.embeddings.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ffn_importance(model, [tiny_batch()])
    assert model.training and not quiet.training and not frozen.requires_grad
    assert model.bert.pooler.dense.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.bert.encoder.layer[0].intermediate.modules())


def test_dropout_is_off_while_scoring(tiny_bert, tiny_batch):
    model, batch = tiny_bert(hidden_dropout_prob=0.5).train(), tiny_batch()
    assert torch.equal(ffn_importance(model, [batch]).scores, ffn_importance(model, [batch]).scores)


def test_blocks_add_up_and_count_every_example(tiny_bert, tiny_batch):
    scores = ffn_importance(tiny_bert(), [tiny_batch(n=20), tiny_batch(n=13)])
    assert torch.allclose(scores.blocks.sum(0), scores.scores)
    assert scores.n_examples == 33 and scores.counts.tolist() == [2] * 13 + [1] * 7


def test_bootstrap_resamples_the_blocks():
    blocks = torch.rand(5, 2, 3).double()
    scores = Importance(blocks.sum(0), blocks, torch.ones(5).long())
    drawn = scores.bootstrap(4000, seed=1)
    assert torch.allclose(drawn.mean(0), scores.scores, rtol=0.05)
    spread = blocks.std(0, correction=0) * 5**0.5
    assert torch.allclose(drawn.std(0), spread, rtol=0.1)


def test_pairs_have_no_block_in_common():
    blocks = 2.0 ** torch.arange(6).double().view(6, 1, 1)  # a sum names its blocks
    scores = Importance(blocks.sum(0), blocks, torch.ones(6).long())
    left, right = scores.pairs(2, 50)[:, :, 0, 0].long().unbind(1)
    assert (left & right == 0).all() and len(left.unique()) > 5
    assert all(bin(value).count("1") == 2 for value in [*left.tolist(), *right.tolist()])


def test_pairs_of_more_than_all_blocks_are_refused():
    blocks = torch.ones(5, 1, 2).double()
    with pytest.raises(ValueError, match=r"size=3 must lie in 1..2, half of the 5 blocks"):
        Importance(blocks.sum(0), blocks, torch.ones(5).long()).pairs(3, 1)


def test_mass_by_hand():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0]]).double()
    held = Importance(scores, scores[None], torch.tensor([1]))
    assert held.mass(1).tolist() == [0.4] and held.mass(4).tolist() == [1.0]
    assert held.ranking.tolist() == [[1, 2, 3, 0]]


def test_saved_scores_come_back_bit_for_bit(tmp_path, tiny_bert, tiny_batch):
    model = tiny_bert()
    scores = ffn_importance(model, [tiny_batch()], meta={"task": "x", "n": 3})
    scores.save(tmp_path / "scores.safetensors")
    back = Importance.load(tmp_path / "scores.safetensors")
    assert torch.equal(back.scores, scores.scores) and torch.equal(back.blocks, scores.blocks)
    assert back.meta == {"task": "x", "n": 3, "ffn": ffn_digest(model)}
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="not an importance file"):
        Importance.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        ([{"input_ids": torch.ones(1, 3).long()}], "needs labels, or start_positions and end"),
        ([{"start_positions": torch.ones(1).long()}], "needs labels, or start_positions and end"),
    ],
)
def test_missing_examples_or_labels_are_refused(tiny_bert, batches, message):
    with pytest.raises(ValueError, match=message):
        ffn_importance(tiny_bert(), batches)


def test_one_batch_in_place_of_a_list_is_refused(tiny_bert, tiny_batch):
    with pytest.raises(TypeError, match=r"a list of batches.*pass \[batch\]"):
        ffn_importance(tiny_bert(), tiny_batch())


def test_scores_introduce_themselves_in_a_line(tiny_bert, tiny_batch):
    scores = ffn_importance(tiny_bert(), [tiny_batch()], meta={"task": "rte"})
    assert repr(scores) == "Importance(2 layers of 64 neurons, 4 examples, task 'rte')"
    sums = Importance(torch.ones(3, 5), torch.ones(0, 3, 5), torch.ones(0).long())
    assert repr(sums) == "Importance(3 layers of 5 neurons, examples unknown)"


def test_the_digest_by_hand_and_what_it_depends_on(tiny_bert):
    model = tiny_bert(dtype=torch.float32)
    weights = b"".join(
        dense.weight.detach().numpy().astype("<f4").tobytes()
        for layer in model.bert.encoder.layer
        for dense in (layer.intermediate.dense, layer.output.dense)
    )
    known = ffn_digest(model)
    assert known == hashlib.sha256(weights).hexdigest()
    model.classifier.weight.data += 1
    model.bert.encoder.layer[0].output.dense.bias.data += 1
    assert ffn_digest(model.double()) == ffn_digest(model.bert) == known
    model.bert.encoder.layer[1].output.dense.weight.data[3, 5] *= 2
    assert ffn_digest(model) != known


def test_a_model_without_ffn_layers_is_refused():
    with pytest.raises(ValueError, match="no dense feed-forward layers to score of BERT"):
        ffn_importance(torch.nn.Linear(2, 2), [])


def test_the_public_name_leaves_padding_out_and_gives_the_same(tiny_bert, tiny_batch, monkeypatch):
    model, batch, seen = tiny_bert().train(), tiny_batch(), []
    model.bert.embeddings.register_forward_hook(lambda _m, _a, states: seen.append(states.shape))
    expected = ffn_importance(model, [batch]).scores
    given = moebert_lib.ffn_importance(model, [batch])
    assert torch.allclose(given.scores, expected, rtol=1e-9, atol=0)
    n_real = int(batch["attention_mask"].sum())
    assert seen[0].numel() > seen[1].numel() == n_real * model.config.hidden_size
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
