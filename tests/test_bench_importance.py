"""The importance benchmark: all ways to score give the same scores; what is compared and kept."""

import pytest
import torch

from moebert_lib.bench import harness, inference
from moebert_lib.bench import training_and_importance as scoring
from moebert_lib.bench.training_and_importance import (
    FORWARD,
    FORWARD_PACKED,
    HALF,
    LOOP,
    PACKED,
    WALKS,
)
from moebert_lib.config.errors import UserError
from moebert_lib.store.store import Store

VARIANTS = [
    "per-example loop",
    "release",
    "one backward, padded",
    "packed",
    "packed bf16",
    "forward alone, padded",
    "forward alone, packed",
]


@pytest.fixture
def batch(tiny_batch):
    """Eight sentences of four lengths."""
    return tiny_batch(n=8)


def test_the_ways_agree_in_float64(tiny_bert, batch):
    outputs = {name: call() for name, call in scoring.scorings(tiny_bert(), batch).items()}
    assert list(outputs) == VARIANTS
    for name in ("one backward, padded", PACKED, WALKS):
        torch.testing.assert_close(outputs[name], outputs[LOOP], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[FORWARD], outputs[FORWARD_PACKED])


def test_the_release_walks_the_graph_for_every_weight(tiny_bert, batch, monkeypatch):
    asked, grad = [], torch.autograd.grad

    def count(loss, weight, retain_graph):
        asked.append((tuple(weight.shape), retain_graph))
        return grad(loss, weight, retain_graph=retain_graph)

    monkeypatch.setattr(torch.autograd, "grad", count)
    three = {name: x[:3] for name, x in batch.items()}
    scoring.per_example(tiny_bert(), three, scoring.gradients_by_walks)
    assert asked == [((64, 32), True), ((32, 64), True)] * 2 * 3  # layers, examples


def test_the_loop_trims_each_example_to_its_length(tiny_bert, batch):
    model, seen = tiny_bert(), []
    model.bert.embeddings.register_forward_hook(lambda _m, _i, x: seen.append(x.shape[1]))
    scoring.per_example(model, batch, scoring.all_gradients)
    assert seen == batch["attention_mask"].sum(1).tolist() == [12, 11, 10, 9] * 2
    assert all(p.grad is None for p in model.parameters())


def test_scores_that_differ_are_not_timed(tiny_bert, batch):
    outputs = {name: call() for name, call in scoring.scorings(tiny_bert(), batch).items()}
    scoring.check_scores(outputs)
    for name, change in ((PACKED, 1.01), (WALKS, 1.01), (HALF, 1.3), (PACKED, torch.nan)):
        with pytest.raises(UserError, match=f"the scores of '{name}'"):
            scoring.check_scores({**outputs, name: outputs[name] * change})


def test_every_way_is_timed_in_every_setting_and_compared(moebert_home):
    benchmark = scoring.importance(shape=inference.TINY, repeats=2, preset="smoke", scale=4)
    assert harness.run(benchmark)
    record = harness.read(Store(), "importance")
    settings = ["32 x 64", "GLUE-like"]
    named = [(row["setting"], row["variant"]) for row in record["summary"]]
    assert named == [(setting, variant) for setting in settings for variant in VARIANTS]
    assert len(record["timings"]) == 2 * len(named)
    assert record["main"] == PACKED and benchmark.limits[PACKED] == FORWARD_PACKED
    ranks = harness.pd.DataFrame(record["rank_error"])
    assert len(ranks) == 2 and ranks[["shared", "kept", "spearman"]].to_numpy().min() > 0.5
    assert (ranks["error"] > 0).all()


def test_without_the_weights_of_that_model_the_rest_is_measured(monkeypatch, capsys):
    def missing(*_args, **_kwargs):
        raise UserError("no weights of MiniLM here")

    monkeypatch.setattr(scoring, "teacher", missing)
    assert scoring.rank_error("smoke") == []
    assert "not measured: no weights of MiniLM here" in capsys.readouterr().out
