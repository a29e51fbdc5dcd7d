"""All ways to score give the same scores; what is timed, scaled, compared and kept."""

import json

import pandas as pd
import pytest
import torch

from moebert_lib.bench import harness, importance
from moebert_lib.bench.importance import FORWARD, HALF, LOOP, PACKED, RELEASE
from moebert_lib.config.errors import UserError
from moebert_lib.method.importance import Importance

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
    found = {name: call() for name, call in importance.calls(tiny_bert(), batch).items()}
    assert list(found) == VARIANTS
    rows = [1, 2]  # one and two tokens shorter than 12: nearest to the mean
    assert torch.equal(importance.few(batch)[0]["input_ids"], batch["input_ids"][rows])
    for name in ("one backward, padded", "packed"):
        torch.testing.assert_close(found[name], found[LOOP], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[RELEASE], found[LOOP][:, rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[FORWARD], found["forward alone, packed"])


def test_the_release_walks_the_graph_for_every_weight(tiny_bert, batch, monkeypatch):
    asked, grad = [], torch.autograd.grad

    def count(loss, weight, retain_graph):
        asked.append((tuple(weight.shape), retain_graph))
        return grad(loss, weight, retain_graph=retain_graph)

    monkeypatch.setattr(torch.autograd, "grad", count)
    importance.release(tiny_bert(), {name: x[:3] for name, x in batch.items()})
    assert asked == [((64, 32), True), ((32, 64), True)] * 2 * 3  # layers, examples


def test_the_loop_trims_each_example_to_its_length(tiny_bert, batch):
    model, seen = tiny_bert(), []
    model.bert.embeddings.register_forward_hook(lambda _m, _i, x: seen.append(x.shape[1]))
    importance.per_example(model, batch)
    assert seen == batch["attention_mask"].sum(1).tolist() == [12, 11, 10, 9] * 2
    assert all(p.grad is None for p in model.parameters())


def test_the_few_stand_for_the_tokens_of_all():
    mask = (torch.arange(10) < torch.tensor([10, 1, 4, 5])[:, None]).long()
    few, factor = importance.few({"attention_mask": mask, "labels": torch.arange(4)})
    assert few["labels"].tolist() == [2, 3] and factor == pytest.approx(20 / 9)


def test_scores_that_differ_are_not_timed(tiny_bert, batch):
    found = {name: call() for name, call in importance.calls(tiny_bert(), batch).items()}
    importance.agree(found, batch)
    for name, change in ((PACKED, 1.01), (RELEASE, 1.01), (HALF, 1.3), (PACKED, torch.nan)):
        with pytest.raises(UserError, match=f"the scores of '{name}'"):
            importance.agree({**found, name: found[name] * change}, batch)


def test_every_way_is_timed_in_every_setting(monkeypatch):
    alone = harness.time_interleaved
    monkeypatch.setattr(
        harness, "time_interleaved", lambda *a, **k: alone(*a, **k).assign(seconds=1.0)
    )
    frames = list(importance.measure(harness.TINY_SHAPE, repeats=2, scale=4))
    assert [frame["setting"].unique().tolist() for frame in frames] == [["32 x 64"], ["GLUE-like"]]
    for frame in frames:
        assert frame["variant"].unique().tolist() == VARIANTS and len(frame) == 2 * len(VARIANTS)
        scaled = frame["variant"] == RELEASE  # two of eight sentences were run
        assert (frame.loc[~scaled, "seconds"] == 1).all()
    assert frames[0].loc[frames[0]["variant"] == RELEASE, "seconds"].tolist() == [4.0, 4.0]


def test_the_error_of_ranks_by_hand(monkeypatch):
    exact = torch.arange(12, 0, -1).double()[None]
    other = exact.clone()
    other[0, [0, 2]] = other[0, [2, 0]]  # the first of the two shared falls to the third place
    scores = {None: exact, torch.bfloat16: other}

    def score(_model, batches, *, dtype=None):
        assert len(batches) == 3
        return Importance(scores[dtype], scores[dtype][None], torch.ones(1).long())

    monkeypatch.setattr(importance, "ffn_importance", score)
    (row,) = importance.rank_error(None, iter([{}] * 3)).to_dict("records")
    assert row["shared"] == 0.5 and row["kept"] == 1.0 and row["error"] == 0.0
    assert row["spearman"] == pytest.approx(1 - 6 * 8 / (12 * 143))


def test_the_command_keeps_targets_and_the_error_of_ranks(moebert_home, monkeypatch, capsys):
    rows = [("32 x 64", name, 0, 3.0) for name in VARIANTS]
    rows[VARIANTS.index(PACKED)] = ("32 x 64", PACKED, 0, 1.0)
    timings = pd.DataFrame(rows, columns=["setting", "variant", "repeat", "seconds"])
    monkeypatch.setattr(importance, "measure", lambda *a, **k: iter([timings]))
    assert importance.main(repeats=1, out=moebert_home / "kept.json", scale="smoke") is True
    record = json.loads((moebert_home / "kept.json").read_text())
    met = {(row["against"], row["variant"]): row["met"] for row in record["targets"]}
    assert met[LOOP, PACKED] is True and met[LOOP, HALF] is None and met[FORWARD, PACKED] is True
    table = harness.frame(record, "summary").set_index("variant")
    assert table.loc[PACKED, "of_limit"] == 3.0 and table.loc[PACKED, "per_second"] == 32
    moved = harness.frame(record, "rank_error")
    assert len(moved) == 2 and moved[["shared", "kept", "spearman"]].to_numpy().min() > 0.5
    assert "wanted 2.2: met" in capsys.readouterr().out


def test_without_the_weights_of_that_model_the_rest_is_measured(monkeypatch, capsys):
    def missing(*_args, **_kwargs):
        raise UserError("no weights of MiniLM here")

    monkeypatch.setattr(importance, "teacher", missing)
    assert importance._said_rank_error("smoke").empty
    assert "not measured: no weights of MiniLM here" in capsys.readouterr().out
