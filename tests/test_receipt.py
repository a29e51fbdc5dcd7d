"""The receipt of a shipped model: it holds for every router, and fails where a model is touched."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shipping import made, saved_bert

from moebert_lib import receipt, ship
from moebert_lib.moe_layer import moe_layers
from moebert_lib.provenance import file_digest
from moebert_lib.settings import UserError


@pytest.fixture
def shipped(tmp_path, tiny_bert, tiny_batch):
    """What is shipped, and its folder."""
    one = made(saved_bert(tmp_path, tiny_bert), tiny_batch)
    ship.write(one, tmp_path / "moe", name="moe")
    return one, tmp_path / "moe"


def checked(one, folder, **changes):
    """The receipt's rows for a model of which something may be another."""
    parts = {"dense": one.dense, "scores": one.scores, "untrained": one.untrained,
             "model": one.model, **changes}  # fmt: skip
    return receipt.checked(*parts.values(), folder, one.batch)


def failing(rows):
    return [row["claim"] for row in rows if not row["holds"]]


@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "gate-sentence"])
@pytest.mark.parametrize("spans", [False, True])
def test_every_check_holds_and_is_told_with_its_tolerance(
    tmp_path, tiny_bert, tiny_batch, routing, spans
):
    one = made(saved_bert(tmp_path, tiny_bert, spans=spans), tiny_batch, routing=routing)
    proof = ship.write(one, tmp_path / "moe", name="moe")
    assert len(proof["checks"]) >= 7 and failing(proof["checks"]) == []
    assert all(row["difference"] <= row["tolerance"] for row in proof["checks"])
    assert receipt.verify(tmp_path / "moe") == json.loads(json.dumps(proof))


def test_it_holds_the_digest_of_every_file_but_card_and_itself(shipped):
    _, folder = shipped
    proof = receipt.verify(folder)
    beside = {path.name for path in folder.iterdir()} - {"README.md", "receipt.json"}
    assert {"model.safetensors", "importance.safetensors", "tokenizer.json"} <= beside
    assert proof["files"] == {name: file_digest(folder / name) for name in beside}
    assert proof["versions"]["torch"] == torch.__version__ and "commit" in proof


def test_a_neuron_that_is_not_the_dense_layers_fails(shipped):
    one, folder = shipped
    with torch.no_grad():
        moe_layers(one.untrained)[1].experts.down_proj[2, 0, 3] += 1e-3
    rows = checked(one, folder, untrained=one.untrained)
    (row,) = [row for row in rows if "dense layer's own" in row["claim"]]
    assert not row["holds"] and row["difference"] == pytest.approx(1e-3, rel=1e-3)
    line = next(line for line in receipt.table({"checks": rows}).splitlines() if "own" in line)
    assert line.endswith("| 1.0e-03 | 0e+00 | **FAILS** |")


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
        receipt.verify(folder)


def test_a_receipt_without_a_file_or_with_a_failure_or_none_is_refused(shipped, tmp_path):
    _, folder = shipped
    proof = receipt.verify(folder)
    (folder / "importance.safetensors").rename(tmp_path / "away")
    with pytest.raises(UserError, match="importance.safetensors is not .* missing"):
        receipt.verify(folder)
    (tmp_path / "away").rename(folder / "importance.safetensors")
    proof["checks"][0]["holds"] = False
    (folder / receipt.FILE).write_text(json.dumps(proof))
    with pytest.raises(UserError, match="fails its receipt: one full-width expert"):
        receipt.verify(folder)
    with pytest.raises(UserError, match="holds no receipt.json"):
        receipt.verify(tmp_path)
    (folder / receipt.FILE).write_text("[]")
    with pytest.raises(UserError, match="can be read"):
        receipt.verify(folder)
