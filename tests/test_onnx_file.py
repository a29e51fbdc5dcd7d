"""The ONNX graph says what the model says, for every router, head, batch size and length."""

import importlib.util

import pytest
import tiny_models
import torch
from sharing import converted, saved_bert
from transformers import (
    DistilBertForSequenceClassification,
    ElectraForSequenceClassification,
    MPNetForQuestionAnswering,
    RobertaForQuestionAnswering,
)

from moebert_lib.config.errors import UserError
from moebert_lib.method.partition import random_ranking
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.moe_layer import moe_layers
from moebert_lib.publish import onnx_export, share_model
from moebert_lib.teaching import checks

SHAPES = ([7, 12, 3, 5], [1], [9], [1, 1], [4, 4, 4, 2, 8, 60])


@pytest.mark.parametrize(
    "kind, changes",
    [
        (RobertaForQuestionAnswering, {"routing": "hash-random"}),
        (MPNetForQuestionAnswering, {"routing": "gate-token"}),
        (
            ElectraForSequenceClassification,
            {"routing": "gate-token", "num_experts_per_tok": 2, "shared_neurons": "tied"},
        ),
        (DistilBertForSequenceClassification, {"routing": "gate-sentence"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_agrees_whatever_the_batch(kind, changes, tmp_path):
    spans = kind.__name__.endswith("QuestionAnswering")
    model = to_moebert(checks.tiny_encoder(kind), random_ranking(2, 64, seed=0), **changes)
    model = tiny_models.perturbed(model, seed=1).float()
    onnx_export.export(model, tiny_models.batch([5, 3, 8]), tmp_path / "model.onnx")
    assert model.config._experts_implementation == "eager"  # its own stays as it was
    graph = onnx_export.OnnxModel(tmp_path / "model.onnx")
    for lengths in SHAPES:
        batch = tiny_models.batch(lengths, seed=len(lengths))
        with torch.no_grad():
            ours = model(**batch)
        theirs = graph(**batch)
        for name in ("start_logits", "end_logits") if spans else ("logits",):
            real = tiny_models.real(batch) if spans else ...
            torch.testing.assert_close(theirs[name][real], ours[name][real], atol=1e-4, rtol=0)


def test_a_graph_of_another_model_fails_its_check(tmp_path, tiny_bert, tiny_batch):
    model = converted(saved_bert(tmp_path, tiny_bert), tiny_batch, routing="gate-token")
    results = share_model.write(model, tmp_path / "moe", name="moe", onnx=True)[-3:]
    assert all(result.claim.startswith("the ONNX graph") and result.holds for result in results)
    assert "| model.onnx | `" in (tmp_path / "moe" / "README.md").read_text()
    with torch.no_grad():
        moe_layers(model.model)[0].experts.up_proj *= -1  # a shift LayerNorm would take out
    results = share_model.run_checks(model, tmp_path / "moe")[-3:]
    assert not any(result.holds for result in results)


def test_a_package_that_is_missing_is_named(monkeypatch):
    usual = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else usual(name)
    )
    with pytest.raises(UserError, match="ONNX needs onnxruntime; pip install 'moebert"):
        onnx_export.check()
