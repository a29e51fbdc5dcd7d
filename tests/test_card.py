"""The model card: metadata that the hub reads, and text that says what the run found."""

import re

import pytest
from huggingface_hub import ModelCard, metadata_load
from shipping import made, saved_bert

from moebert_lib.config.settings import Settings
from moebert_lib.publish import share_model

ROW = {
    "metric": "accuracy",
    "dense": [0.9, 0.86, 0.93],
    "moebert": [0.875, 0.83, 0.91],
    "difference": [-0.025, -0.05, 0.0],
}
TRAINED = {
    "metrics": [ROW],
    "steps": 1234,
    "n": 400,
    "n_train": 9000,
    "guessing": 0.5,
    "task": "sst2",
    "data": "d" * 64,
    "part": "400 of validation, drawn at random",
    "scored_on": "train",
}


@pytest.fixture
def shipped(tmp_path, tiny_bert, tiny_batch):
    """What is shipped untrained, its folder and its receipt."""
    one = made(saved_bert(tmp_path, tiny_bert), tiny_batch)
    return one, tmp_path / "moe", share_model.write(one, tmp_path / "moe", name="moe")


def text_of(folder):
    return (folder / "README.md").read_text()


def test_the_card_of_an_untrained_model_says_so_and_claims_no_metric(shipped):
    one, folder, proof = shipped
    meta = metadata_load(folder / "README.md")
    assert meta == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["moebert", "mixture-of-experts"],
    }
    text = text_of(folder)
    assert "**untrained: distil it before use**" in text and "Not measured" in text
    assert "- Trained on: nothing since conversion" in text
    assert f"SHA-256 `{proof['files']['importance.safetensors']}`" in text
    assert f"{one.told['used']:,} of {one.told['stored']:,} parameters" in text
    assert share_model.table(proof) in text and text.count("| holds |") == len(proof["checks"])
    assert "| routing |" not in text and "| n_experts | 4 |" in text


def test_the_card_of_a_trained_model_has_its_metrics_with_n_and_interval(shipped):
    one, folder, proof = shipped
    told = {**one.told, **TRAINED, "name": "me/film", "base": "me/bert"}
    share_model.write_card(folder, told, {**proof, **TRAINED})
    read = ModelCard.load(folder / "README.md")
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.875)
    assert (result.dataset_type, result.dataset_config) == ("nyu-mll/glue", "sst2")
    assert result.dataset_split == TRAINED["part"]
    assert read.data.base_model == "me/bert" and read.data.datasets == ["nyu-mll/glue"]
    row = "| accuracy | 90.0 (86.0 to 93.0) | 87.5 (83.0 to 91.0) | -2.5 (-5.0 to +0.0) |"
    assert row in read.text and f"On 400 examples of `sst2` ({TRAINED['part']}), %" in read.text
    assert "9,000 training examples of `sst2`, 1,234 steps" in read.text
    assert "untrained" not in read.text.lower() and "most frequent class: 50.0" in read.text


def test_an_interval_that_is_not_known_is_left_out(shipped):
    one, folder, proof = shipped
    few = {**ROW, "dense": [0.5, float("nan"), float("nan")]}
    changed = {**TRAINED, "metrics": [few]}
    share_model.write_card(folder, {**one.told, **changed, "name": "x"}, {**proof, **changed})
    assert "| accuracy | 50.0 | 87.5 (" in text_of(folder)


@pytest.mark.parametrize(
    "score, said",
    [
        ("importance", "every expert, by importance (Eq. 4) ("),
        ("fisher", "every expert, by `fisher`, not the paper's score ("),
    ],
)
def test_it_names_the_score_that_chose_the_neurons_and_how_many_are_kept(shipped, score, said):
    one, folder, proof = shipped
    share_model.write_card(folder, {**one.told, "name": "x", "score": score}, proof)
    assert said in text_of(folder) and "neurons of a layer are kept" in text_of(folder)


@pytest.mark.parametrize("routing", ["hash-random", "gate-token"])
def test_neurons_chosen_on_what_the_metrics_are_of_is_a_limit(shipped, routing):
    one, folder, proof = shipped
    for split in ("train", "validation"):
        told = {**one.told, **TRAINED, "name": "x", "scored_on": split}
        told["config"] = {**told["config"], "routing": routing}
        share_model.write_card(folder, told, {**proof, **TRAINED})
        assert ("chosen on validation examples" in text_of(folder)) == (split == "validation")


@pytest.mark.parametrize(
    "k, serving, work",
    [
        (1, "One expert serves a token", "is that of one."),
        (2, "2 experts serve a token", "is that of 2."),
    ],
)
def test_it_tells_how_many_experts_serve_a_token(tmp_path, tiny_bert, tiny_batch, k, serving, work):
    sizes = {"routing": "gate-token", "num_experts_per_tok": k}
    one = made(saved_bert(tmp_path, tiny_bert), tiny_batch, **sizes)
    proof = share_model.write(one, tmp_path / "moe", name="moe")
    assert serving in text_of(tmp_path / "moe") and work in text_of(tmp_path / "moe")
    assert all(row["holds"] for row in proof["checks"])


@pytest.mark.parametrize(
    "task, n, cap, told",
    [
        ("library", 48, 48, "first 48 of validation"),
        ("library", 40, 48, "validation"),
        ("library", 40, None, "validation"),
        ("mnli", 9815, None, "validation_matched"),
        ("sst2", 400, 400, "400 of validation, drawn at random"),
    ],
)
def test_a_part_of_a_split_is_told_as_one(task, n, cap, told):
    assert share_model.part(Settings.at("small", task=task, max_eval_examples=cap), n) == told


def test_a_check_that_failed_stands_in_the_card(shipped):
    one, folder, proof = shipped
    proof["checks"][1]["holds"] = False
    share_model.write_card(folder, {**one.told, "name": "moe"}, proof)
    assert "| **FAILS** |" in text_of(folder)


def test_a_model_of_spans_is_loaded_by_its_class(tmp_path, tiny_bert, tiny_batch):
    one = made(saved_bert(tmp_path, tiny_bert, spans=True), tiny_batch)
    share_model.write(one, tmp_path / "moe", name="moe")
    assert metadata_load(tmp_path / "moe" / "README.md")["pipeline_tag"] == "question-answering"
    (code,) = re.findall(r"```python\n(.*?)```", text_of(tmp_path / "moe"), re.DOTALL)
    found = {"NAME": str(tmp_path / "moe")}
    exec(code, found)
    assert type(found["model"]).__name__ == "MoEBertForQuestionAnswering"
