"""Every score against a slow loop over examples and tokens, and what must hold for any of them."""

import pytest
import torch
from tiny_spans import span_batch, span_bert

from moebert_lib import accelerate
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import teacher
from moebert_lib.method import other_scores
from moebert_lib.method.encoder_layouts import ffn
from moebert_lib.method.importance import Importance, ffn_digest, ffn_importance
from moebert_lib.method.other_scores import SCORES, every_score, ffn_scores
from moebert_lib.method.partition import random_ranking
from moebert_lib.store.store import Store

#: Scores that are sums over examples, and so have blocks.
SUMS = ("importance", "taylor", "fisher", "activation")
#: Scores that need examples.
SEEN = (*SUMS, "wanda")


def split(batch, *sizes):
    """The batch cut into batches of these sizes."""
    parts = [batch[name].split(sizes) for name in batch]
    return [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]


def unpadded(batch):
    """One example at a time, without its padding."""
    for i in range(len(batch["input_ids"])):
        real = batch["attention_mask"][i].bool()
        one = {
            name: value[i : i + 1] if value.dim() == 1 else value[i : i + 1, real]
            for name, value in batch.items()
        }
        yield {**one, "position_ids": real.nonzero().T}


def slow(model, batch, kind):
    """A score from weights and single tokens, neuron by neuron where it sums."""
    found, squares = torch.zeros(2, 64).double(), torch.zeros(2, 64).double()
    layers = model.bert.encoder.layer
    for one in unpadded(batch):
        flows = [[], []]
        hooks = [
            layer.intermediate.register_forward_hook(lambda _m, _i, h, row=row: row.append(h))
            for row, layer in zip(flows, layers, strict=True)
        ]
        loss = model(**one).loss
        for hook in hooks:
            hook.remove()
        for row, layer, ((h,),) in zip(range(2), layers, zip(flows, strict=True), strict=True):
            w1, w2 = layer.intermediate.dense.weight, layer.output.dense.weight
            d1, d2, dh = torch.autograd.grad(loss, (w1, w2, h), retain_graph=True)
            flow = torch.zeros(64).double()
            for t in range(h.shape[1]):  # token by token
                flow += (h[0, t] * dh[0, t]).detach()
                squares[row] += h[0, t].detach() ** 2
                if kind == "activation":
                    found[row] += h[0, t].detach().abs()
            if kind == "importance":
                found[row] += ((w1 * d1).sum(1) + (w2 * d2).sum(0)).abs().detach()
            elif kind in ("taylor", "fisher"):
                found[row] += flow.abs() if kind == "taylor" else flow**2
    if kind == "wanda":  # of each weight that leaves the neuron, added up
        for row, layer in enumerate(layers):
            for weights in layer.output.dense.weight.detach():  # (F,): into one output
                found[row] += weights.abs() * squares[row].sqrt()
    return found


@pytest.mark.parametrize("kind", SEEN)
def test_a_score_equals_its_slow_loop_however_the_examples_are_batched(kind, tiny_bert, tiny_batch):
    model, batch = tiny_bert(num_labels=3), tiny_batch(n=7, num_labels=3)
    expected = slow(model, batch, kind)
    assert expected.min() > 0 and expected.std() > 1e-3 * expected.mean()
    for scored in (model, accelerate(model)):
        for sizes in ((7,), (1, 3, 3), (1,) * 7):
            scores = ffn_scores(scored, split(batch, *sizes), kind).scores
            torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["activation", "wanda"])
def test_activations_need_no_labels_and_count_every_token_of_any_mask(kind, tiny_bert, tiny_batch):
    batch = tiny_batch(n=6)
    flipped = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    for inputs in (batch, batch | flipped):
        expected = slow(tiny_bert(), inputs, kind)
        bare = {name: inputs[name] for name in flipped} | {"index": torch.arange(6)}
        for model in (tiny_bert(), accelerate(tiny_bert())):
            scores = ffn_scores(model, [bare], kind).scores
            torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)
    bare.pop("attention_mask")
    full = {**bare, "attention_mask": torch.ones_like(bare["input_ids"])}
    assert torch.equal(
        ffn_scores(tiny_bert(), [bare], kind).scores, ffn_scores(tiny_bert(), [full], kind).scores
    )


def test_a_span_heads_padding_excites_nobody(tiny_bert, tiny_batch):
    model, batch = span_bert(tiny_bert()), span_batch(tiny_batch(n=6))
    pairs = every_score(model, split(batch, 2, 4))
    for scored in (model, accelerate(model)):
        whole = every_score(scored, [batch])
        for kind in ("activation", "wanda"):
            torch.testing.assert_close(whole[kind].scores, pairs[kind].scores)
            expected = slow(model, batch, kind)
            torch.testing.assert_close(whole[kind].scores, expected, rtol=1e-9, atol=1e-12)


def test_a_model_that_cannot_be_accelerated_is_scored_alike(tiny_bert, tiny_batch):
    class Wrapped(torch.nn.Module):
        def __init__(self, bert):
            super().__init__()
            self.inner = bert

        def forward(self, labels=None, **inputs):
            return self.inner(**inputs, labels=labels)

    model, batches = tiny_bert(), split(tiny_batch(n=5), 1, 4)
    for kind, found in every_score(Wrapped(model).eval(), batches).items():
        expected = ffn_scores(model, batches, kind).scores
        torch.testing.assert_close(found.scores, expected, rtol=1e-9, atol=1e-12)


def test_all_at_once_are_the_same_as_one_by_one_and_the_papers_is_first(tiny_bert, tiny_batch):
    model, batches = tiny_bert(), split(tiny_batch(n=9), 4, 5)
    found = every_score(model, iter(batches), seed=3, meta={"task": "x"})
    assert list(found) == list(SCORES) and next(iter(found)) == "importance"
    for kind, one in found.items():
        alone = ffn_scores(model, batches, kind, seed=3, meta={"task": "x"})
        assert torch.equal(one.scores, alone.scores) and torch.equal(one.blocks, alone.blocks)
        assert one.meta == alone.meta == {"task": "x", "score": kind, "ffn": ffn_digest(model)}
    assert torch.equal(found["importance"].scores, ffn_importance(model, batches).scores)


def test_blocks_are_kept_where_a_score_is_a_sum_over_examples(tiny_bert, tiny_batch, tmp_path):
    found = every_score(tiny_bert(), [tiny_batch(n=20), tiny_batch(n=13)])
    for kind, one in found.items():
        one.save(tmp_path / kind)
        assert torch.equal(Importance.load(tmp_path / kind).scores, one.scores)
        if kind in SUMS:
            torch.testing.assert_close(one.blocks.sum(0), one.scores)
            assert one.counts.tolist() == [2] * 13 + [1] * 7
        else:
            assert one.blocks.shape == (0, 2, 64) and one.n_examples is None


def test_fisher_of_one_example_is_taylor_squared_and_of_many_at_most(tiny_bert, tiny_batch):
    model, batch = tiny_bert(), tiny_batch(n=6)
    found = every_score(model, split(batch, 1, 5)[:1])
    torch.testing.assert_close(found["fisher"].scores, found["taylor"].scores ** 2)
    many = every_score(model, [batch])
    assert (many["fisher"].scores <= many["taylor"].scores ** 2).all()
    assert (many["fisher"].scores >= many["taylor"].scores ** 2 / 6 - 1e-15).all()  # Cauchy


def test_scaling_a_neuron_up_and_down_again_moves_only_what_looks_at_one_side(
    tiny_bert, tiny_batch
):
    """With a ReLU, 3 w1 and w2 / 3 are the same function: the loss's terms do not notice."""
    batches, wide = [tiny_batch(n=6)], tiny_bert(hidden_act="relu")
    before = every_score(wide, batches)
    for layer in wide.bert.encoder.layer:
        layer.intermediate.dense.weight.data[5] *= 3
        layer.intermediate.dense.bias.data[5] *= 3
        layer.output.dense.weight.data[:, 5] /= 3
    after = every_score(wide, batches)
    assert before["activation"].scores[0, 5] > 0 and before["fisher"].scores[0, 5] > 0
    for kind in SCORES:
        expected = before[kind].scores.clone()
        expected[:, 5] *= 3 if kind == "activation" else 1
        torch.testing.assert_close(after[kind].scores, expected, rtol=1e-9, atol=1e-12)


def test_a_neuron_that_reaches_nothing_is_worth_nothing_unless_only_its_answers_count(
    tiny_bert, tiny_batch
):
    model = tiny_bert()
    model.bert.encoder.layer[1].output.dense.weight.data[:, 7] = 0
    for kind, one in every_score(model, [tiny_batch()]).items():
        nothing = kind in ("taylor", "fisher", "wanda", "weight", "importance")
        assert (one.scores[1, 7] == 0) == nothing or kind == "random"


def test_magnitude_is_the_product_of_two_norms_and_looks_at_no_batch(tiny_bert):
    model = tiny_bert()
    layer = model.bert.encoder.layer[1]
    up, down = layer.intermediate.dense.weight, layer.output.dense.weight
    found = ffn_scores(model, (), "weight").scores
    assert torch.isclose(found[1, 5], up[5].norm() * down[:, 5].norm())
    assert torch.equal(found[1:], other_scores.magnitudes([ffn(layer)]))


def test_random_is_seeded_and_has_every_rank_once(tiny_bert):
    drawn = [ffn_scores(tiny_bert(), (), "random", seed=seed).scores for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].sort().values.equal(torch.arange(64).double().expand(2, -1))
    assert torch.equal(drawn[0].long(), random_ranking(2, 64, seed=1))


def test_the_model_is_left_as_it_was(tiny_bert, tiny_batch):
    model = tiny_bert(hidden_dropout_prob=0.5).train()
    batches = [tiny_batch()]
    first = every_score(model, batches)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(layer.intermediate._forward_hooks for layer in model.bert.encoder.layer)
    again = every_score(model, batches)
    assert all(torch.equal(first[kind].scores, again[kind].scores) for kind in SCORES)


@pytest.mark.parametrize(
    ("kind", "batches", "message"),
    [
        ("fischer", [], "unknown score 'fischer'; did you mean 'fisher'?"),
        ("magic", [], "unknown score 'magic'; choose from importance, taylor"),
        ("taylor", [], "no batches"),
        ("wanda", [], "no batches"),
        ("fisher", [{"input_ids": torch.ones(1, 3).long()}], "needs labels"),
    ],
)
def test_what_cannot_be_scored_is_refused(kind, batches, message, tiny_bert):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        ffn_scores(tiny_bert(), batches, kind)


@pytest.mark.parametrize("kind", SCORES)
def test_a_model_without_ffn_layers_and_a_single_batch_are_refused(kind, tiny_bert, tiny_batch):
    with pytest.raises(ValueError, match="no dense feed-forward layers"):
        ffn_scores(torch.nn.Linear(2, 2), [], kind)
    if kind in SEEN:
        with pytest.raises(TypeError, match=r"pass \[batch\]"):
            ffn_scores(tiny_bert(), tiny_batch(), kind)


def test_a_teachers_scores_are_kept_and_its_importance_is_the_one_that_is_dealt(
    moebert_home, capsys
):
    settings = Settings.at("smoke")
    first, again = teacher.all_scores(Store(), settings), teacher.all_scores(Store(), settings)
    assert list(first) == list(SCORES)
    assert all(torch.equal(first[kind], again[kind]) for kind in SCORES)
    assert torch.equal(first["importance"], teacher.importance(Store(), settings).scores)
    assert "scores for library: reused" in capsys.readouterr().out
