"""The model card: metadata that the hub reads, results, checks, and digests of the files."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, metadata_load
from sharing import converted, saved_bert

from moebert_lib.config.provenance import file_digest
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
def shared(tmp_path, tiny_bert, tiny_batch):
    """An untrained model, its folder, and the results of its checks."""
    model = converted(saved_bert(tmp_path, tiny_bert), tiny_batch)
    return model, tmp_path / "moe", share_model.write(model, tmp_path / "moe", name="moe")


@pytest.fixture
def card(shared):
    """Maker of a card's text from facts that differ: ``card(name="x", steps=3)``."""
    model, folder, results = shared

    def write(results=results, **facts):
        share_model.write_card(folder, {**model.facts, "name": "moe", **facts}, results)
        return (folder / "README.md").read_text()

    return write


def test_the_card_of_an_untrained_model_names_no_metric(shared, card):
    model, folder, results = shared
    assert metadata_load(folder / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["moebert", "mixture-of-experts"],
    }
    text = card()
    assert "distil it before you use it" in text and "Not measured" in text
    assert f"{model.facts['used']:,} of {model.facts['stored']:,} parameters" in text
    assert "| n_experts | 4 |" in text and "| routing |" not in text


def test_the_card_has_every_check_and_the_digest_of_every_other_file(shared, card):
    _, folder, results = shared
    text = card()
    assert [text.count(f"| {result.claim} |") for result in results] == [1] * len(results)
    assert text.count("| holds |") == len(results)
    files = {path.name for path in folder.iterdir()} - {"README.md"}
    assert {"model.safetensors", "importance.safetensors", "tokenizer.json"} <= files
    for name in files:
        assert f"| {name} | `{file_digest(folder / name)}` |" in text


def test_a_check_that_failed_is_in_the_card(shared, card):
    _, _, results = shared
    failed = replace(results[1], holds=False, difference=None, tolerance=None)
    line = f"| {failed.claim} | {failed.on} | unknown |  | **FAILS** |"
    assert line in card([results[0], failed, *results[2:]]).splitlines()


def test_the_card_of_a_trained_model_has_its_results_with_n_and_interval(shared, card):
    text = card(**TRAINED, base="me/bert")
    read = ModelCard.load(shared[1] / "README.md")
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.875)
    assert (result.dataset_type, result.dataset_config) == ("nyu-mll/glue", "sst2")
    assert result.dataset_split == TRAINED["part"]
    assert read.data.base_model == "me/bert" and read.data.datasets == ["nyu-mll/glue"]
    row = "| accuracy | 90.0 (86.0 to 93.0) | 87.5 (83.0 to 91.0) | -2.5 (-5.0 to +0.0) |"
    assert row in text.splitlines() and f"400 examples of `sst2` ({TRAINED['part']})" in text
    assert "1,234 steps on 9,000 examples of `sst2`" in text
    assert "untrained" not in text.lower() and "most frequent class gives 50.0" in text


def test_an_interval_that_is_not_known_is_left_out(card):
    few = {**ROW, "dense": [0.5, float("nan"), float("nan")]}
    assert "| accuracy | 50.0 | 87.5 (" in card(**{**TRAINED, "metrics": [few]})


def test_tables_have_no_gaps_and_no_line_of_jinja_is_left(card):
    text = card(**TRAINED)
    assert "{{" not in text and "{%" not in text and "\n\n\n" not in text
    for block in re.split(r"\n\n", text):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len(rows) in (0, len(block.splitlines())) and len(rows) != 1


@pytest.mark.parametrize(
    "score, words",
    [("importance", "importance (Eq. 4)"), ("fisher", "`fisher`, not the paper's score")],
)
def test_it_names_the_score_that_ranked_the_neurons(tmp_path, tiny_bert, tiny_batch, score, words):
    folder = saved_bert(tmp_path, tiny_bert)
    scores = converted(folder, tiny_batch).scores
    scores = replace(scores, meta={**scores.meta, "score": score})
    model = share_model.from_scores(str(folder), scores, n_experts=4, seed=0)
    share_model.write(model, tmp_path / "moe", name="moe")
    assert f"ranked by {words}" in (tmp_path / "moe" / "README.md").read_text()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_neurons_chosen_on_the_examples_of_the_results_are_a_limit(card, split):
    text = card(**{**TRAINED, "scored_on": split})
    assert ("chosen on validation examples" in text) == (split == "validation")


@pytest.mark.parametrize("k, words", [(1, "to 1 expert,"), (2, "to 2 experts,")])
def test_it_counts_the_experts_of_a_token(tmp_path, tiny_bert, tiny_batch, k, words):
    sizes = {"routing": "gate-token", "num_experts_per_tok": k}
    model = converted(saved_bert(tmp_path, tiny_bert), tiny_batch, **sizes)
    results = share_model.write(model, tmp_path / "moe", name="moe")
    assert f"sends each token {words}" in (tmp_path / "moe" / "README.md").read_text()
    assert all(result.holds for result in results)


@pytest.mark.parametrize(
    "task, n, cap, part",
    [
        ("library", 48, 48, "first 48 of validation"),
        ("library", 40, 48, "validation"),
        ("library", 40, None, "validation"),
        ("mnli", 9815, None, "validation_matched"),
        ("sst2", 400, 400, "400 of validation, drawn at random"),
    ],
)
def test_a_part_of_a_split_is_called_one(task, n, cap, part):
    settings = Settings.at("small", task=task, max_eval_examples=cap)
    assert share_model.evaluated_part(settings, n) == part


def test_a_model_of_spans_is_loaded_by_its_class(tmp_path, tiny_bert, tiny_batch):
    model = converted(saved_bert(tmp_path, tiny_bert, spans=True), tiny_batch)
    share_model.write(model, tmp_path / "moe", name="moe")
    card = tmp_path / "moe" / "README.md"
    assert metadata_load(card)["pipeline_tag"] == "question-answering"
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    names = {"NAME": str(tmp_path / "moe")}
    exec(code, names)
    assert type(names["model"]).__name__ == "MoEBertForQuestionAnswering"
