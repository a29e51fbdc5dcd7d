"""The model card: metadata that the hub reads, and text that says what the run found."""

import re

import pytest
from huggingface_hub import ModelCard, metadata_load
from shipping import made, saved_bert

from moebert_lib import card, receipt, ship

ROW = {"metric": "accuracy", "dense": [0.9, 0.86, 0.93], "moebert": [0.875, 0.83, 0.91],
       "difference": [-0.025, -0.05, 0.0]}  # fmt: skip
TRAINED = {"metrics": [ROW], "steps": 1234, "n": 400, "n_train": 9000, "guessing": 0.5,
           "task": "sst2", "data": "d" * 64}  # fmt: skip


@pytest.fixture
def shipped(tmp_path, tiny_bert, tiny_batch):
    """What is shipped untrained, its folder and its receipt."""
    one = made(saved_bert(tmp_path, tiny_bert), tiny_batch)
    return one, tmp_path / "moe", ship.write(one, tmp_path / "moe", name="moe")


def text_of(folder):
    return (folder / "README.md").read_text()


def test_the_card_of_an_untrained_model_says_so_and_claims_no_metric(shipped):
    one, folder, proof = shipped
    meta = metadata_load(folder / "README.md")
    assert meta == {"library_name": "transformers", "pipeline_tag": "text-classification",
                    "tags": ["moebert", "mixture-of-experts"]}  # fmt: skip
    text = text_of(folder)
    assert "**untrained: distil it before use**" in text and "Not measured" in text
    assert "- Trained on: nothing since conversion" in text
    assert f"SHA-256 `{proof['files']['importance.safetensors']}`" in text
    assert f"{one.told['used']:,} of {one.told['stored']:,} parameters" in text
    assert receipt.table(proof) in text and text.count("| holds |") == len(proof["checks"])
    assert "| routing |" not in text and "| n_experts | 4 |" in text


def test_the_card_of_a_trained_model_has_its_metrics_with_n_and_interval(shipped):
    one, folder, proof = shipped
    card.write(folder, {**one.told, **TRAINED, "name": "me/film", "base": "me/bert"}, proof)
    read = ModelCard.load(folder / "README.md")
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.875)
    assert (result.dataset_type, result.dataset_split) == ("nyu-mll/glue", "validation")
    assert read.data.base_model == "me/bert" and read.data.datasets == ["nyu-mll/glue"]
    row = "| accuracy | 90.0 (86.0 to 93.0) | 87.5 (83.0 to 91.0) | -2.5 (-5.0 to +0.0) |"
    assert row in read.text and "On 400 validation examples of `sst2`" in read.text
    assert "9,000 training examples of `sst2`, 1,234 steps" in read.text
    assert "untrained" not in read.text.lower() and "most frequent class: 50.0" in read.text


def test_an_interval_that_is_not_known_is_left_out(shipped):
    one, folder, proof = shipped
    few = {**ROW, "dense": [0.5, float("nan"), float("nan")]}
    card.write(folder, {**one.told, **TRAINED, "metrics": [few], "name": "x"}, proof)
    assert "| accuracy | 50.0 | 87.5 (" in text_of(folder)


def test_a_check_that_failed_stands_in_the_card(shipped):
    one, folder, proof = shipped
    proof["checks"][1]["holds"] = False
    card.write(folder, {**one.told, "name": "moe"}, proof)
    assert "| **FAILS** |" in text_of(folder)


def test_a_model_of_spans_is_loaded_by_its_class(tmp_path, tiny_bert, tiny_batch):
    one = made(saved_bert(tmp_path, tiny_bert, spans=True), tiny_batch)
    ship.write(one, tmp_path / "moe", name="moe")
    assert metadata_load(tmp_path / "moe" / "README.md")["pipeline_tag"] == "question-answering"
    (code,) = re.findall(r"```python\n(.*?)```", text_of(tmp_path / "moe"), re.DOTALL)
    found = {"NAME": str(tmp_path / "moe")}
    exec(code, found)
    assert type(found["model"]).__name__ == "MoEBertForQuestionAnswering"
