"""Training without padding, in bfloat16, and by tokens."""

import copy
import itertools

import datasets
import pytest
import torch
from test_checkpoints import Pad
from tiny_spans import span_batch, span_bert

from moebert_lib.config.settings import Settings
from moebert_lib.data.batching import TokenBatches
from moebert_lib.method.distillation_loss import distillation_terms, layer_distances
from moebert_lib.method.partition import random_ranking
from moebert_lib.model.conversion import to_moebert
from moebert_lib.training import trainer as train
from moebert_lib.training.trainer import (
    DistillationTrainer,
    distil,
    fine_tune,
    training_arguments,
)

RANKING = random_ranking(2, 64, seed=0)
SETTINGS = Settings.at("smoke", batch_size=4, epochs=3.0, learning_rate=1e-3, dropout=0.0)
DRY = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture
def encoded():
    noise = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 12, (22,), generator=noise).tolist()
    rows = [torch.randint(1, 99, (n,), generator=noise).tolist() for n in lengths]
    return datasets.Dataset.from_dict(
        {
            "input_ids": rows,
            "attention_mask": [[1] * n for n in lengths],
            "length": lengths,
            "labels": torch.randint(2, (22,), generator=noise).tolist(),
        }
    )


@pytest.fixture
def pair(tiny_bert):
    """A student and its teacher, without dropout, whose experts have parted."""
    teacher = tiny_bert(dtype=torch.float32, **DRY)
    student = to_moebert(teacher, RANKING)
    with torch.no_grad():
        for values in student.parameters():
            values += 0.05 * torch.randn(values.shape)
    return student, teacher


def trainer(student, teacher, folder, **changes):
    arguments = training_arguments(
        folder,
        SETTINGS.but(epochs=1, batch_size=4, learning_rate=1e-3, weight_decay=0.0),
        seed=0,
    )
    return DistillationTrainer(student, arguments, teacher=teacher, data_collator=list, **changes)


def gradients(made, batch, model=None):
    loss = made.compute_loss(made.model if model is None else model, batch)
    loss.backward()
    found = {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}
    return loss.detach(), found


@pytest.mark.parametrize("layers", ["all", "skip", "last", "none"])
@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "gate-sentence"])
def test_without_padding_loss_and_gradients_are_those_of_the_padded_batch(
    tiny_bert, tiny_batch, tmp_path, routing, layers
):
    teacher, batch = tiny_bert(**DRY), tiny_batch(n=5)
    student = to_moebert(teacher, RANKING, routing=routing).double()
    other = copy.deepcopy(student)
    packed = trainer(student, teacher, tmp_path, distill=layers)
    padded = trainer(other, teacher, tmp_path, distill=layers)
    padded.packed, padded.teacher = False, teacher
    loss, found = gradients(packed, batch)
    expected, wanted = gradients(padded, batch, other)
    assert torch.allclose(loss, expected, rtol=0, atol=1e-12) and packed.packed
    wanted = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and len(found) > 20
    assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=1e-11) for name in wanted)


def test_packed_states_are_compared_without_a_mask_and_in_the_students_dtype():
    own, other = torch.randn(2, 7, 5).double(), torch.randn(2, 7, 5).bfloat16()
    found = layer_distances(list(own), list(other), torch.ones(3, 4))
    assert torch.allclose(found, ((own - other.double()) ** 2).mean((1, 2)))


def test_padding_on_the_left_is_left_out_too(tiny_bert, tiny_batch, tmp_path):
    teacher = tiny_bert(**DRY)
    batch = {name: v.flip(1) if v.dim() == 2 else v for name, v in tiny_batch(n=5).items()}
    student = to_moebert(teacher, RANKING).double()
    made = trainer(student, teacher, tmp_path)
    own, other = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    terms = distillation_terms(own, other, mask=batch["attention_mask"])
    loss = made.compute_loss(made.model, batch)
    assert torch.allclose(loss, own.loss + sum(terms), rtol=0, atol=1e-12)
    assert not batch["attention_mask"][:, 0].all()


def test_kept_states_are_refused_where_padding_counts(pair, tmp_path):
    for changes in (dict(padding_in_loss=True), dict(teacher_dropout=True)):
        with pytest.raises(ValueError, match="without padding and without dropout"):
            trainer(*pair, tmp_path, teacher_states=object(), **changes)


def test_what_comes_back_is_the_ordinary_student_in_eval_mode(pair, encoded, tmp_path):
    student, teacher = pair
    names, kind, before = list(student.state_dict()), type(student.bert), student.bert
    distil(student.train(), teacher.train(), encoded, Pad(), SETTINGS, tmp_path)
    assert list(student.state_dict()) == names and student.bert is before
    assert type(student.bert) is kind
    for model in (student, teacher):
        assert not any(module.training for module in model.modules())


def test_gates_that_balance_padding_train_as_they_are(tiny_bert, tiny_batch, tmp_path):
    teacher = tiny_bert(dtype=torch.float32)
    student = to_moebert(teacher, RANKING, routing="gate-token", padding_in_balance=True)
    made = trainer(student, teacher, tmp_path)
    assert not made.packed and made.model is student
    assert made.compute_loss(student, tiny_batch()).isfinite()


def test_spans_whose_distribution_counts_padding_train_as_they_are(tiny_bert, tiny_batch, tmp_path):
    teacher, batch = span_bert(tiny_bert(**DRY)), span_batch(tiny_batch(n=4))
    student = to_moebert(teacher, RANKING).double()
    made = trainer(student, teacher, tmp_path, weight=2.0)
    loss = made.compute_loss(made.model, batch)
    own, other = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    terms = distillation_terms(own, other, mask=batch["attention_mask"])
    assert made.model is student and made.teacher is teacher
    assert torch.allclose(loss, own.loss + 2.0 * sum(terms), rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [dict(), dict(cache_teacher=True), dict(tokens_per_batch=30)])
def test_bfloat16_trains_to_nearly_the_same(pair, encoded, tmp_path, changes):
    curves = {}
    for dtype in ("float32", "bfloat16"):
        student, teacher = copy.deepcopy(pair[0]), pair[1]
        settings = SETTINGS.but(dtype=dtype, **changes)
        curves[dtype] = distil(student, teacher, encoded, Pad(), settings, tmp_path)
        assert {p.dtype for p in student.parameters()} == {torch.float32}
    one, other = (curves[dtype].to_numpy() for dtype in ("float32", "bfloat16"))
    assert (one != other).any() and one == pytest.approx(other, rel=0.1, abs=0.01)


def test_a_teacher_is_fine_tuned_in_bfloat16(pair, encoded, tmp_path):
    _, teacher = pair
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    fine_tune(teacher, encoded, Pad(), SETTINGS.but(dtype="bfloat16"), tmp_path)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32} and not teacher.training
    assert any(not torch.equal(p, before[name]) for name, p in teacher.named_parameters())


def test_auto_is_float32_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not train.in_half(SETTINGS) and train.in_half(SETTINGS.but(dtype="bfloat16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)
    assert train.in_half(SETTINGS) and not train.in_half(SETTINGS.but(dtype="float32"))


@pytest.mark.parametrize("budget", [1, 12, 40, 1000])
def test_every_example_is_in_one_batch_of_an_epoch_within_the_budget(encoded, budget):
    lengths = encoded["length"][:]
    sampler, epochs = TokenBatches(lengths, budget), []
    for _ in range(3):
        parts = list(sampler)
        assert sorted(itertools.chain(*parts)) == list(range(22)) and len(parts) == len(sampler)
        sizes = [sum(lengths[row] for row in part) for part in parts]
        assert max(sizes) <= budget or max(len(part) for part in parts) == 1
        epochs.append((sorted(sizes), parts))
    assert epochs[0][0] == epochs[1][0] == epochs[2][0]  # so that a training's steps are known
    assert budget == 1000 or epochs[0][1] != epochs[1][1]


def test_batches_by_tokens_train_on_every_example_and_repeat_by_seed(pair, encoded, tmp_path):
    seen, weights = [], []
    for seed in (1, 1, 2):
        student, teacher = copy.deepcopy(pair[0]), pair[1]
        hook = teacher.register_forward_pre_hook(
            lambda _, __, given: seen.append(given["attention_mask"].sum().item()), with_kwargs=True
        )
        settings = SETTINGS.but(tokens_per_batch=30, seed=seed)
        steps = len(distil(student, teacher, encoded, Pad(), settings, tmp_path))
        hook.remove()
        assert steps == 3 * len(TokenBatches(encoded["length"][:], 30)) == len(seen)
        assert sum(seen) == 3 * sum(encoded["length"][:]) and max(seen) <= 30
        seen.clear()
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
