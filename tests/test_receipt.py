"""The receipt of a shipped model: it holds for every router, and fails where a model is touched."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shipping import made, saved_bert

from moebert_lib.config.errors import UserError
from moebert_lib.config.provenance import file_digest
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.moe_layer import Experts, moe_layers
from moebert_lib.publish import share_model


@pytest.fixture
def shipped(tmp_path, tiny_bert, tiny_batch):
    """What is shipped, and its folder."""
    one = made(saved_bert(tmp_path, tiny_bert), tiny_batch)
    share_model.write(one, tmp_path / "moe", name="moe")
    return one, tmp_path / "moe"


def checked(one, folder, **changes):
    """The receipt's rows for a model of which something may be another."""
    parts = {
        "dense": one.dense,
        "scores": one.scores,
        "untrained": one.untrained,
        "model": one.model,
        **changes,
    }
    return share_model.checked(*parts.values(), folder, one.batch)


def failing(rows):
    return [row["claim"] for row in rows if not row["holds"]]


@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "gate-sentence"])
@pytest.mark.parametrize("spans", [False, True])
def test_every_check_holds_and_is_told_with_its_tolerance(
    tmp_path, tiny_bert, tiny_batch, routing, spans
):
    one = made(saved_bert(tmp_path, tiny_bert, spans=spans), tiny_batch, routing=routing)
    proof = share_model.write(one, tmp_path / "moe", name="moe")
    assert len(proof["checks"]) >= 9 and failing(proof["checks"]) == []
    assert all(row["difference"] <= row["tolerance"] for row in proof["checks"])
    assert share_model.verify(tmp_path / "moe") == json.loads(json.dumps(proof))


def test_it_holds_the_digest_of_every_file_but_card_and_itself(shipped):
    _, folder = shipped
    proof = share_model.verify(folder)
    beside = {path.name for path in folder.iterdir()} - {"README.md", "receipt.json"}
    assert {"model.safetensors", "importance.safetensors", "tokenizer.json"} <= beside
    assert proof["files"] == {name: file_digest(folder / name) for name in beside}
    assert proof["versions"]["torch"] == torch.__version__ and "commit" in proof


def test_a_neuron_that_is_not_the_dense_layers_fails(shipped):
    one, folder = shipped
    with torch.no_grad():
        moe_layers(one.untrained)[1].experts.down_proj[2, 0, 3] += 1e-3
    rows = checked(one, folder, untrained=one.untrained)
    (row,) = [row for row in rows if "dense model's own" in row["claim"]]
    assert not row["holds"] and row["difference"] == pytest.approx(1e-3, rel=1e-3)
    line = next(line for line in share_model.table({"checks": rows}).splitlines() if "own" in line)
    assert line.endswith("| 1.0e-03 | 0e+00 | **FAILS** |")


def experts_but_the_first(layer, how):
    """A layer's experts 1 to 3 with their LayerNorm or output bias changed."""
    with torch.no_grad():
        if how == "LayerNorm":
            layer.LayerNorm.weight[1:] *= 1.5
        else:
            layer.experts.down_proj_bias[1:] += 1


@pytest.mark.parametrize("how", ["LayerNorm", "bias"])
def test_experts_that_were_given_another_bias_or_layer_norm_fail(
    tmp_path, tiny_bert, tiny_batch, how
):
    one = made(saved_bert(tmp_path, tiny_bert), tiny_batch)
    for layer in moe_layers(one.model):
        experts_but_the_first(layer, how)
    proof = share_model.write(one, tmp_path / "moe", name="moe")
    assert failing(proof["checks"]) == [
        "before training every expert's weights, and all others, are the dense model's own"
    ]


def test_a_conversion_by_the_ranking_turned_around_fails(tmp_path, tiny_bert, tiny_batch):
    one = made(saved_bert(tmp_path, tiny_bert), tiny_batch)
    turned = to_moebert(one.dense, one.scores.ranking.flip(-1), n_experts=4)
    one = dataclasses.replace(one, untrained=turned, model=turned)
    proof = share_model.write(one, tmp_path / "moe", name="moe")
    (claim,) = failing(proof["checks"])
    assert claim == "the highest scores are in every expert, the next are dealt in turn"


def test_a_model_that_serves_all_tokens_by_the_first_expert_fails(shipped, monkeypatch):
    one, folder = shipped
    usual = Experts.forward
    monkeypatch.setattr(Experts, "forward", lambda self, a, e, p: usual(self, a, 0 * e, p))
    failed = failing(checked(one, folder))
    assert "every token is served by its own experts' weights (Eq. 2)" in failed


def test_each_check_says_what_it_was_run_on(shipped):
    one, folder = shipped
    on = [row["on"] for row in share_model.verify(folder)["checks"]]
    assert on == ["the dense model, as one expert", "the dense model", *["this model"] * 8]
    rows = checked(one, folder, model=copy.deepcopy(one.model))
    assert [row["on"] for row in rows][2:5] == ["its conversion", "its conversion", "this model"]
    assert rows[3]["claim"] == rows[4]["claim"] and failing(rows) == []


def test_a_table_that_moved_in_training_fails(shipped, tiny_batch):
    one, folder = shipped
    other = made(folder.parent / "bert", tiny_batch, seed=1)
    rows = checked(one, folder, model=other.model)
    assert "training leaves a hash's tables as they were" in failing(rows)
    assert "saved and loaded, the model answers bit for bit" in failing(rows)


def test_a_weight_file_that_was_changed_fails_the_check_and_the_digest(shipped):
    one, folder = shipped
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert failing(checked(one, folder)) == ["saved and loaded, the model answers bit for bit"]
    with pytest.raises(UserError, match="model.safetensors is not the file of its receipt"):
        share_model.verify(folder)


def test_a_receipt_without_a_file_or_with_a_failure_or_none_is_refused(shipped, tmp_path):
    _, folder = shipped
    proof = share_model.verify(folder)
    (folder / "importance.safetensors").rename(tmp_path / "away")
    with pytest.raises(UserError, match="importance.safetensors is not .* missing"):
        share_model.verify(folder)
    (tmp_path / "away").rename(folder / "importance.safetensors")
    proof["checks"][0]["holds"] = False
    (folder / share_model.FILE).write_text(json.dumps(proof))
    with pytest.raises(UserError, match="fails its receipt: one full-width expert"):
        share_model.verify(folder)
    with pytest.raises(UserError, match="holds no receipt.json"):
        share_model.verify(tmp_path)
    (folder / share_model.FILE).write_text("[]")
    with pytest.raises(UserError, match="can be read"):
        share_model.verify(folder)


@pytest.mark.parametrize("emptied", ["checks", "files"])
def test_a_receipt_that_says_nothing_is_refused(shipped, emptied):
    _, folder = shipped
    proof = share_model.verify(folder)
    (folder / share_model.FILE).write_text(json.dumps({**proof, emptied: type(proof[emptied])()}))
    with pytest.raises(UserError, match="has no checks or no files"):
        share_model.verify(folder)


def test_a_file_that_is_not_in_the_receipt_is_refused_unless_hidden(shipped):
    _, folder = shipped
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    for name in (".gitattributes", ".cache/huggingface/x.lock"):
        (folder / name).write_text("")
    share_model.verify(folder)
    for name in ("pytorch_model.bin", "deep/x.py", ".cache.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
        with pytest.raises(UserError, match=f"{name} is not in the receipt"):
            share_model.verify(folder)
        (folder / name).unlink()


METRIC = {
    "metric": "accuracy",
    "dense": [0.9, 0.86, 0.93],
    "moebert": [0.875, 0.83, 0.91],
    "difference": [-0.025, -0.05, 0.0],
}


def test_a_card_with_other_metrics_or_checks_than_the_receipt_is_refused(shipped):
    one, folder = shipped
    told = {**one.told, "metrics": [METRIC], "n": 400, "task": "sst2", "part": "validation"}
    share_model.write(dataclasses.replace(one, told=told), folder, name="moe")
    assert share_model.verify(folder)["metrics"] == [METRIC]
    card = (folder / "README.md").read_text()
    for here, there in (
        ("87.5 (83.0", "97.5 (83.0"),
        ("On 400 ", "On 40,000 "),
        ("value: 0.875", "value: 0.975"),
        ("type: accuracy", "type: f1"),
        ("| holds |", "| **FAILS** |"),
        ("\nmodel-index:", "\nx:"),
    ):
        assert here in card
        (folder / "README.md").write_text(card.replace(here, there, 1))
        with pytest.raises(UserError, match="shows other checks or metrics than the receipt"):
            share_model.verify(folder)
    more = card.replace("\ntags:", "\nlicense: mit\ntags:") + "\nMore.\n"
    (folder / "README.md").write_text(more)
    share_model.verify(folder)
    for text in ("", "---\na: [\n---\n"):
        (folder / "README.md").write_text(text)
        with pytest.raises(UserError, match="cannot be read as a model card"):
            share_model.verify(folder)
