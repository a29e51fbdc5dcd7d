"""The training benchmark at a tiny size: what it times, that steps agree, what it keeps."""

import dataclasses

import pytest
import torch

from moebert_lib.bench import harness, inference
from moebert_lib.bench import training_and_importance as training
from moebert_lib.bench.training_and_importance import CACHED, DRY, HALF, PACKED, RELEASE, WET
from moebert_lib.store.store import Store

TINY = inference.TINY


@pytest.fixture
def batch():
    return training.with_labels(inference.glue_like(TINY["vocab_size"], n=8, longest=32))


@pytest.fixture
def steps(batch, tmp_path):
    return training.steps(TINY, batch, folder=tmp_path)


def test_all_variants_of_a_student_have_one_loss_and_one_gradient(steps):
    losses = training.check_losses(steps)
    assert losses[PACKED] == pytest.approx(losses[RELEASE], rel=1e-5)
    assert losses[HALF] == pytest.approx(losses[RELEASE], rel=2e-2)
    assert losses[HALF] != losses[PACKED]
    gradients = {}
    for name in ("ordinary, padded", PACKED, CACHED, RELEASE):
        steps[name]()
        gradients[name] = steps[name].student.bert.embeddings.word_embeddings.weight.grad.clone()
    for name in (PACKED, CACHED):
        assert torch.allclose(gradients[name], gradients["ordinary, padded"], rtol=0, atol=1e-6)
    assert gradients[PACKED].abs().max() > 1e-4
    # the release counts padding, whose states differ
    assert not torch.allclose(gradients[RELEASE], gradients[PACKED], rtol=0, atol=1e-6)


def test_a_step_that_computes_something_else_is_not_timed(steps):
    ids = steps[PACKED].batch["input_ids"]
    wrong = steps[PACKED].batch | {"input_ids": (ids + 1) % TINY["vocab_size"]}
    made = {**steps, PACKED: dataclasses.replace(steps[PACKED], batch=wrong)}
    with pytest.raises(training.UserError, match="losses of 'packed' differ") as refusal:
        training.check_losses(made)
    assert "\n" not in str(refusal.value)


def test_dropout_reaches_the_student_and_never_the_teacher(steps):
    step = steps[PACKED]
    assert step.loss(padding=False) == step.loss(padding=False)
    training.set_dropout(step.student, 0.5)
    assert step.loss(padding=False) != step.loss(padding=False)
    first, second = step.teacher(), step.teacher()
    assert torch.equal(first.logits, second.logits)


def test_the_cached_teachers_file_leaves_no_name(steps, tmp_path):
    assert list(tmp_path.iterdir()) == [] and training.check_losses(steps)[CACHED] > 0


def test_each_setting_is_timed_and_compared_with_the_release(moebert_home):
    benchmark = training.training(shape=TINY, repeats=2, scale=4)
    assert harness.run(benchmark)
    record = harness.read(Store(), "training")
    table = harness.pd.DataFrame(record["summary"])
    wet = table[table["setting"] == WET]
    assert set(wet["variant"]) == {RELEASE, PACKED, HALF}
    assert table.loc[table["variant"] == RELEASE, "ratio"].tolist() == [1, 1]
    dry = table[table["setting"] == DRY].set_index("variant")
    assert dry.loc[[*benchmark.limits], "of_limit"].notna().all()
    assert record["main"] == PACKED


def test_sentences_are_padded_and_labelled():
    batch = training.with_labels(inference.glue_like(99))
    assert batch["input_ids"].shape == (32, 128) and set(batch["labels"].tolist()) == {0, 1}
    assert 0.2 < batch["attention_mask"].double().mean() < 0.4
