"""The training benchmark at a tiny size: what it times, that steps agree, what it keeps."""

import dataclasses

import pytest
import torch

from moebert_lib.bench import harness, training
from moebert_lib.bench.training import (
    CACHED,
    DRY,
    HALF,
    LIMITS,
    PACKED,
    RELEASE,
    WET,
    agree,
    glue,
    variants,
    wet,
)
from moebert_lib.config.errors import UserError

VOCAB = harness.TINY_SHAPE["vocab_size"]


@pytest.fixture
def steps(tmp_path):
    return variants(harness.TINY_SHAPE, glue(VOCAB, scale=4), dropout=0.0, folder=tmp_path)


def test_all_variants_of_a_student_have_one_loss_and_one_gradient(steps):
    losses = agree(steps)
    assert losses[PACKED] == pytest.approx(losses[RELEASE], rel=1e-5)
    assert (
        losses[HALF] == pytest.approx(losses[RELEASE], rel=2e-2) and losses[HALF] != losses[PACKED]
    )
    found = {}
    for name in ("ordinary, padded", PACKED, CACHED, RELEASE):
        steps[name]()
        found[name] = steps[name].student.bert.embeddings.word_embeddings.weight.grad.clone()
    for name in (PACKED, CACHED):
        assert torch.allclose(found[name], found["ordinary, padded"], rtol=0, atol=1e-6)
    assert found[PACKED].abs().max() > 1e-4
    # the release counts padding, whose states differ
    assert not torch.allclose(found[RELEASE], found[PACKED], rtol=0, atol=1e-6)


def test_a_step_that_computes_something_else_is_not_timed(steps):
    ids = steps[PACKED].batch["input_ids"]
    wrong = steps[PACKED].batch | {"input_ids": (ids + 1) % VOCAB}
    with pytest.raises(UserError, match="the loss of 'packed' is .* nothing is timed") as refusal:
        agree({**steps, PACKED: dataclasses.replace(steps[PACKED], batch=wrong)})
    assert "\n" not in str(refusal.value)


def test_dropout_reaches_the_student_and_never_the_teacher(steps):
    step = steps[PACKED]
    assert step.loss(padding=False) == step.loss(padding=False)
    wet(step.student, 0.5)
    assert step.loss(padding=False) != step.loss(padding=False)
    one, other = step.teacher(), step.teacher()
    assert torch.equal(one.logits, other.logits)


def test_the_cached_teachers_file_leaves_no_name(steps, tmp_path):
    assert list(tmp_path.iterdir()) == [] and agree(steps)[CACHED] > 0


def test_each_setting_is_timed_and_judged_against_the_release():
    timings = training.measure(harness.TINY_SHAPE, repeats=3, scale=4)
    assert timings.groupby("setting")["repeat"].max().to_dict() == {DRY: 2, WET: 1}
    assert set(timings[timings["setting"] == WET]["variant"]) == {RELEASE, PACKED, HALF}
    assert (timings["seconds"] > 0).all()
    table = harness.summary(timings, against=RELEASE, limits=LIMITS, units=8)
    base = table[table["variant"] == RELEASE]
    assert base["ratio"].tolist() == [1, 1]
    dry = table[table["setting"] == DRY].set_index("variant")
    assert dry.loc[[*LIMITS], "of_limit"].notna().all()
    wanted = {(t["variant"], t["wanted"]) for t in harness.judge(timings, training.WISHES)}
    assert {(PACKED, 3.0), (HALF, 4.5)} <= wanted


def test_the_command_keeps_a_record(tmp_path, capsys):
    out = tmp_path / "training.json"
    assert training.main(shape=harness.TINY_SHAPE, repeats=2, out=out)
    assert "packed is" in capsys.readouterr().out
    text = out.read_text()
    assert '"what": "training"' in text and '"targets"' in text and RELEASE in text


def test_sentences_are_padded_and_labelled():
    batch = glue(VOCAB)
    assert batch["input_ids"].shape == (32, 128) and set(batch["labels"].tolist()) == {0, 1}
    assert 0.2 < batch["attention_mask"].double().mean() < 0.4
