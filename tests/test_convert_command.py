"""``moebert convert``, ``bench`` and ``-p`` with nothing after the equals sign, as typed."""

import os
from typing import get_args

import pytest
import torch
from tiny_spans import span_batch, span_bert
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertModel,
    BertTokenizerFast,
)

from moebert_lib.cli import main, model_commands
from moebert_lib.config import settings
from moebert_lib.method.importance import Importance, ffn_importance
from moebert_lib.model.conversion import load_dense
from moebert_lib.model.moe_layer import moe_layers


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands are typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def saved(folder, tiny_bert, tiny_batch):
    """Saves a model with a tokenizer, and its scores if asked; ``bert`` is there already."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film"]
    (folder / "vocab.txt").write_text("\n".join(words))

    def save(name, model, batch=None):
        BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / name)
        model.save_pretrained(folder / name)
        if batch is not None:
            ffn_importance(model, [batch]).save(folder / f"{name}.scores")

    save("bert", tiny_bert(dtype=torch.float32), tiny_batch())
    return save


def convert(name, scores="bert.scores", out="moe", *more):
    return main.main(["convert", name, "--importance", scores, "--out", out, *more])


def refusal(capsys):
    """The one line on stderr; nothing else was printed, not by transformers either."""
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("moebert: ")
    return line


def test_small_models_are_counted_in_plain_numbers(saved, folder, capsys):
    assert convert("bert") == 0
    stored = AutoModelForSequenceClassification.from_pretrained(folder / "moe").num_parameters()
    expert = 16 * 32 + 16 + 32 * 16 + 32 + 2 * 32  # W1, b1, W2, b2 and its LayerNorm
    told = f"{stored - 2 * 3 * expert:,} of {stored:,} parameters per token: moe"
    assert told in capsys.readouterr().out and len(f"{stored}") == 5


def test_a_model_of_spans_keeps_its_head(saved, folder, tiny_bert, tiny_batch):
    dense, batch = span_bert(tiny_bert(dtype=torch.float32)), span_batch(tiny_batch())
    saved("spans", dense, batch)
    assert convert("spans", "spans.scores") == 0
    moe = AutoModelForQuestionAnswering.from_pretrained(folder / "moe")
    assert type(moe).__name__ == "MoEBertForQuestionAnswering" and len(moe_layers(moe)) == 2
    assert torch.equal(moe.qa_outputs.weight, dense.qa_outputs.weight)


def test_scores_of_another_model_are_refused_and_those_of_the_release_are_not(
    saved, folder, tiny_bert, tiny_batch, capsys
):
    saved("other", tiny_bert(dtype=torch.float32, seed=1), tiny_batch())
    capsys.readouterr()
    assert convert("other") == 2
    assert "another model" in refusal(capsys) and not (folder / "moe").exists()
    imported = Importance(torch.rand(2, 64), torch.rand(0, 2, 64), torch.ones(0).long())
    imported.save(folder / "imported.scores")
    assert convert("other", "imported.scores") == 0


def test_a_checkpoint_without_a_head_is_refused(saved, tiny_bert, capsys):
    dense = tiny_bert(dtype=torch.float32)
    encoder = BertModel(dense.config)
    encoder.load_state_dict(dense.bert.state_dict())
    saved("headless", encoder)
    capsys.readouterr()
    assert convert("headless") == 2
    assert "a BertModel without classifier.bias, classifier.weight; expected" in refusal(capsys)


def test_loading_leaves_transformers_messages_as_they_were(saved):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    assert not load_dense("bert").training
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    "sizes, said",
    [
        (["--expert-size", "40"], "largest expert_size that fits is 31"),
        (["--expert-size", "40", "--n-shared", "4"], "largest expert_size that fits is 19"),
        (["--n-experts", "65"], "largest n_experts that fits is 64"),
        (["--n-shared", "17"], "largest n_shared is 16"),
    ],
)
def test_the_size_it_names_holds_under_what_was_typed(saved, sizes, said, capsys):
    assert convert("bert", "bert.scores", "moe", *sizes) == 2
    assert said in refusal(capsys)


def test_a_name_that_is_no_folder_is_said_before_the_hub_is_asked(saved, capsys):
    assert convert("nope") == 2
    out, err = capsys.readouterr()
    assert out == "no folder nope here; asking the hub\n"
    assert err.startswith("moebert: no model 'nope' could be read: ") and err.count("\n") == 1


@pytest.mark.parametrize("out", ["bert.scores/moe", "locked/deep/moe"])
def test_a_place_that_cannot_be_written_is_refused_before_loading(
    saved, folder, out, monkeypatch, capsys
):
    (folder / "locked").mkdir()
    usual = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != folder / "locked" and usual(path, mode)
    )
    monkeypatch.setattr(Importance, "load", None)
    assert convert("bert", out=out) == 2
    assert f"{folder / out.split('/')[0]} is not a folder that can be written to" in refusal(capsys)


def test_more_tokens_than_bert_takes_are_refused(capsys):
    assert main.main(["bench", "--length", "1000"]) == 2
    assert refusal(capsys) == "moebert: --length 1000: BERT takes at most 512 tokens"


def test_nothing_after_the_equals_sign_is_an_empty_text(moebert_home, capsys):
    assert main.main(["run", "01", "--plan", "--scale", "smoke", "-p", "task="]) == 0
    assert "task" not in capsys.readouterr().out.splitlines()[0]
    assert main.main(["run", "01", "--plan", "-p", "seed="]) == 2
    assert "seed=''" in refusal(capsys)
    assert main.main(["run", "01", "--plan", "-p", "n_shared=null"]) == 0


def test_every_router_of_the_settings_can_be_asked_for():
    assert set(model_commands.ROUTINGS) == set(get_args(settings.Routing))
