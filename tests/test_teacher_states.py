"""A teacher's states kept on disk: the same states, once, and gone after the training."""

import copy
import gc
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
from test_adapters import every_family
from test_checkpoints import Pad, sentences

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.data import batching, loading
from moebert_lib.method.partition import random_ranking
from moebert_lib.model.accelerate import accelerate
from moebert_lib.model.conversion import to_moebert
from moebert_lib.teaching.checks import tiny_encoder
from moebert_lib.training import teacher_states
from moebert_lib.training.teacher_states import STATES, TeacherStates
from moebert_lib.training.trainer import distil

SETTINGS = Settings.at("smoke", batch_size=4, epochs=3.0, learning_rate=1e-3, dropout=0.0)


def batches(size, **changes):
    return list(batching.batches(sentences(), Pad(), size, **changes))


def asked(teacher, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return teacher(**inputs, output_hidden_states="packed")


def filled(folder, teacher, *, layers, dtype):
    lengths = batching.lengths(sentences())
    states = TeacherStates(folder / STATES, lengths, layers=layers, width=32, dtype=dtype)
    states.fill(lambda batch: asked(teacher, batch), batches(5))
    return states


@pytest.mark.parametrize(
    ("layers", "dtype", "close"),
    [
        ([0, 1, 2], torch.float64, 1e-12),
        ([0, 2], torch.float64, 1e-12),
        ([2], torch.float32, 1e-6),
        ([0, 1, 2], torch.bfloat16, 8e-3),
    ],
)
def test_what_is_kept_is_what_the_teacher_says_in_any_other_batch(
    tiny_bert, tmp_path, layers, dtype, close
):
    teacher = accelerate(tiny_bert(dtype=torch.float64))
    states = filled(tmp_path, teacher, layers=layers, dtype=dtype)
    for batch in batches(7, sort=False):
        found, wanted = states.output(batch, teacher), asked(teacher, batch)
        assert list(found.hidden_states) == layers
        for layer in layers:
            own, other = found.hidden_states[layer].double(), wanted.hidden_states[layer].double()
            assert own.shape == other.shape and torch.allclose(own, other, rtol=close, atol=close)
        assert torch.allclose(found.logits, wanted.logits, rtol=0, atol=10 * close)


@every_family
def test_kept_states_and_the_head_give_the_logits_of_every_family(kind, tmp_path):
    teacher = accelerate(tiny_encoder(kind))
    states = filled(tmp_path, teacher, layers=[0, 2], dtype=torch.float64)
    for batch in batches(7, sort=False):
        kept, expected = states.output(batch, teacher), asked(teacher, batch)
        assert torch.allclose(kept.logits, expected.logits, rtol=0, atol=1e-10)
        last = expected.hidden_states[2]
        assert torch.allclose(kept.hidden_states[2], last, rtol=0, atol=1e-10)


def test_the_same_batch_gives_the_same_bytes(tiny_bert, tmp_path):
    teacher = accelerate(tiny_bert(dtype=torch.float32))
    states = filled(tmp_path, teacher, layers=[0, 1, 2], dtype=torch.float32)
    for batch in batches(5):
        found, wanted = states.output(batch, teacher), asked(teacher, batch)
        for layer, state in found.hidden_states.items():
            assert torch.equal(state, wanted.hidden_states[layer])
        assert torch.equal(found.logits, wanted.logits)


def test_the_file_has_its_room_and_no_name(tmp_path, monkeypatch):
    made, reserve = [], teacher_states._reserve

    def measured(path, n_bytes):
        reserve(path, n_bytes)
        made.append(path.stat().st_size)

    monkeypatch.setattr(teacher_states, "_reserve", measured)
    sizes = dict(layers=[0, 2], width=8, dtype=torch.bfloat16)
    states = TeacherStates(tmp_path / STATES, [3, 4], **sizes)
    assert made == [7 * 2 * 8 * 2] and states.rows.shape == (7, 2, 8)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    sizes = dict(layers=[0, 1, 2], width=768, dtype=torch.float32)
    with (
        pytest.raises(UserError, match=r"needs 3\.69 GB in .*, where 1\.00 GB are free") as refusal,
    ):
        TeacherStates(tmp_path / STATES, [400_000], **sizes)
    assert "\n" not in str(refusal.value) and "cache_teacher=False" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [dict(), dict(distill="skip"), dict(tokens_per_batch=40)])
def test_a_training_with_kept_states_is_the_one_without(tiny_bert, tmp_path, changes):
    teacher, curves, calls = tiny_bert(dtype=torch.float32), [], []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    base = to_moebert(teacher, random_ranking(2, 64, seed=0))
    for cached in (False, True):
        calls.clear()
        settings = SETTINGS.but(cache_teacher=cached, **changes)
        student = copy.deepcopy(base)
        curves.append(distil(student, teacher, sentences(), Pad(), settings, tmp_path))
        assert not list(tmp_path.iterdir())
    assert len(calls) == 1 < len(curves[0])  # once about all 22 sentences
    assert curves[0].to_numpy() == pytest.approx(curves[1].to_numpy(), rel=1e-4)
    assert curves[0]["hidden"].iloc[-1] > 0


def test_a_teacher_is_asked_once_for_all_students_of_a_dataset(tiny_bert, tmp_path):
    teacher, calls = tiny_bert(dtype=torch.float32), []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    student = to_moebert(teacher, random_ranking(2, 64, seed=0))
    settings = SETTINGS.but(cache_teacher=True, epochs=1.0)
    few = sentences().select(range(8))
    for encoded, distil_from, n in (
        (sentences(), "all", 1),
        (sentences(), "last", 1),
        (sentences(), "none", 1),
        (few, "all", 2),
        (few, "skip", 2),
    ):
        changed = settings.but(distill=distil_from)
        distil(student, teacher, encoded, Pad(), changed, str(tmp_path / "new"))
        assert len(calls) == n


def test_what_a_teacher_said_goes_with_it(tiny_bert, tmp_path):
    teacher = tiny_bert(dtype=torch.float32)
    student = to_moebert(teacher, random_ranking(2, 64, seed=0))
    distil(student, teacher, sentences(), Pad(), SETTINGS.but(cache_teacher=True), tmp_path)
    assert teacher in teacher_states._cached
    n = len(teacher_states._cached)
    del teacher
    gc.collect()
    assert len(teacher_states._cached) == n - 1


def test_a_teacher_with_dropout_or_padding_that_counts_is_refused():
    for changes in (dict(teacher_dropout=True), dict(padding_in_loss=True), dict(preset="release")):
        with pytest.raises(UserError, match="cache_teacher=True needs the same states") as refusal:
            Settings.at("smoke", cache_teacher=True, **changes)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("task", ["passage", "squad"])
def test_a_teacher_of_spans_is_refused(task):
    settings = Settings.at("small", task=task, cache_teacher=True, doc_stride=64)
    with pytest.raises(UserError, match="keeps a teacher that classifies sentences"):
        loading.check(settings)


def test_sentences_of_these_tests_differ_in_length():
    assert len(set(batching.lengths(sentences()))) > 4
    assert isinstance(sentences(), datasets.Dataset)
