"""The objective, the teacher's place, and repeatability of training."""

import dataclasses
import inspect

import datasets
import pytest
import torch
import torch.nn.functional as F
from tiny_spans import span_bert
from transformers import AutoTokenizer, Trainer, TrainingArguments

from moebert_lib.config.presets import MINILM
from moebert_lib.config.settings import Settings
from moebert_lib.data import pretrained_weights
from moebert_lib.method.distillation_loss import distillation_terms
from moebert_lib.method.partition import random_ranking
from moebert_lib.model.accelerate import accelerate
from moebert_lib.model.conversion import to_moebert
from moebert_lib.training import trainer as train
from moebert_lib.training.trainer import (
    DistillationTrainer,
    distil,
    fine_tune,
    training_arguments,
)

RANKING = random_ranking(2, 64, seed=0)
SETTINGS = Settings.at("smoke", batch_size=4, learning_rate=1e-3, distill_weight=2.0)


@pytest.fixture
def encoded(tiny_batch):
    batch = tiny_batch(n=16)
    return datasets.Dataset.from_dict({k: v.tolist() for k, v in batch.items()})


class Pad:
    """A tokenizer as far as the collator needs one: rows are padded already."""

    def pad(self, rows, **_):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def trainer(student, teacher, folder, encoded=None, **changes):
    arguments = training_arguments(
        folder,
        SETTINGS.but(epochs=1, batch_size=4, learning_rate=1e-3, weight_decay=0.01),
        seed=0,
    )
    return DistillationTrainer(
        student, arguments, train_dataset=encoded, teacher=teacher, data_collator=list, **changes
    )


def pair(tiny_bert, **changes):
    teacher = tiny_bert(dtype=torch.float32, **changes)
    return to_moebert(teacher, RANKING), teacher


def test_the_objective_is_task_loss_plus_weighted_eq_7(tiny_bert, tiny_batch, tmp_path):
    student, teacher = pair(tiny_bert)
    batch = tiny_batch()
    made = trainer(student, teacher, tmp_path, weight=3.0)
    loss = made.compute_loss(made.model, batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    own = student(**inputs, output_hidden_states=True)
    other = teacher(**inputs, output_hidden_states=True)
    task = torch.nn.functional.cross_entropy(own.logits, batch["labels"])
    terms = distillation_terms(own, other, mask=batch["attention_mask"])
    assert torch.allclose(loss, task + 3.0 * (terms.hidden + terms.prediction), rtol=1e-6)


def test_without_distillation_only_the_task_counts(tiny_bert, tiny_batch, tmp_path):
    student, teacher = pair(tiny_bert)
    batch = tiny_batch()
    made = trainer(student, teacher, tmp_path, distill="none", weight=3.0)
    loss = made.compute_loss(made.model, batch)
    assert torch.allclose(loss, student(**batch).loss, rtol=1e-6)


def test_padding_counts_only_on_request(tiny_bert, tiny_batch, tmp_path):
    student, teacher = pair(tiny_bert)
    batch = tiny_batch()
    made = [trainer(student, teacher, tmp_path, padding_in_loss=flag) for flag in (False, True)]
    losses = [each.compute_loss(each.model, batch) for each in made]
    assert not torch.allclose(*losses)


def test_the_teacher_is_out_of_the_student(tiny_bert, tmp_path):
    student, teacher = pair(tiny_bert)
    before = set(student.state_dict())
    made = trainer(student, teacher, tmp_path)
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for p in made.model.parameters()}
    made.save_model(str(tmp_path))
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= before


def test_the_teacher_stays_in_eval_mode_and_unchanged(tiny_bert, tmp_path, encoded):
    student, teacher = pair(tiny_bert, hidden_dropout_prob=0.5)
    modes = []
    teacher.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    distil(student, teacher.train(), encoded, Pad(), SETTINGS, tmp_path)
    assert modes and not any(modes) and not teacher.training
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_release_switch_turns_teacher_dropout_on(tiny_bert, tmp_path, encoded):
    student, teacher = pair(tiny_bert)
    modes = []
    teacher.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    changed = SETTINGS.but(teacher_dropout=True)
    distil(student, teacher, encoded, Pad(), changed, tmp_path)
    assert modes and all(modes) and not teacher.training


def test_the_curve_has_every_step_and_adds_up(tiny_bert, tmp_path, encoded):
    student, teacher = pair(tiny_bert)
    curve = distil(student, teacher, encoded, Pad(), SETTINGS.but(epochs=2.0), tmp_path)
    assert curve["step"].tolist() == list(range(1, 9))
    total = curve["task"] + 2.0 * (curve["hidden"] + curve["prediction"])
    assert curve["total"].to_numpy() == pytest.approx(total.to_numpy(), rel=1e-5)


def test_training_brings_the_student_to_the_teacher(tiny_bert, tmp_path, encoded):
    student, teacher = pair(tiny_bert)
    curve = distil(student, teacher, encoded, Pad(), SETTINGS.but(epochs=20.0), tmp_path)
    assert curve["hidden"].tail(4).mean() < 0.5 * curve["hidden"].head(4).mean()


def test_same_seed_same_weights(tiny_bert, tmp_path, encoded):
    results = []
    for seed in (1, 1, 2):
        student, teacher = pair(tiny_bert)
        distil(student, teacher, encoded, Pad(), SETTINGS.but(seed=seed), tmp_path)
        results.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_gates_learn_through_their_weight(tiny_bert, tmp_path, encoded):
    teacher = tiny_bert(dtype=torch.float32)
    student = to_moebert(teacher, RANKING, routing="gate-token")
    gate = student.bert.encoder.layer[0].output.router.gate.weight
    before = gate.detach().clone()
    distil(student, teacher, encoded, Pad(), SETTINGS, tmp_path)
    assert not torch.equal(gate, before)


def test_fine_tuning_lowers_the_loss_and_leaves_no_files(tiny_bert, tmp_path, encoded, tiny_batch):
    model, batch = tiny_bert(dtype=torch.float32), tiny_batch(n=16)
    before = model(**batch).loss
    settings = SETTINGS.but(teacher_epochs=10.0, teacher_learning_rate=1e-3)
    fine_tune(model, encoded, Pad(), settings, tmp_path)
    assert model(**batch).loss < before and not model.training
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_the_papers_where_it_states_them(tmp_path):
    made = training_arguments(
        tmp_path,
        SETTINGS.but(epochs=5, batch_size=8, learning_rate=2e-5, weight_decay=0.01),
        seed=3,
    )
    assert (made.adam_beta1, made.adam_beta2, made.max_grad_norm) == (0.9, 0.999, 1.0)
    assert made.get_warmup_steps(1000) == 0 and made.lr_scheduler_type == "linear"
    assert made.seed == made.data_seed == 3 and made.per_device_train_batch_size == 8


def rates(tmp_path, tiny_bert, encoded, settings, of=""):
    """The learning rate of each step over the peak."""
    arguments = training_arguments(tmp_path, settings, seed=0, of=of)
    made = Trainer(tiny_bert(dtype=torch.float32), arguments, train_dataset=encoded)
    n = 4 * int(arguments.num_train_epochs)  # of 4 batches an epoch
    made.create_optimizer_and_scheduler(n)
    found = []
    for _ in range(n):
        found.append(made.lr_scheduler.get_last_lr()[0] / arguments.learning_rate)
        made.optimizer.step()
        made.lr_scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_rate_rises_over_its_share_of_the_updates(tmp_path, tiny_bert, encoded, schedule):
    settings = SETTINGS.but(epochs=5.0, warmup=0.2, schedule=schedule)
    falling = [(20 - n) / 16 if schedule == "linear" else 1.0 for n in range(4, 20)]
    expected = [n / 4 for n in range(4)] + falling
    assert rates(tmp_path, tiny_bert, encoded, settings) == pytest.approx(expected)


def test_the_teacher_has_its_own_warm_up_and_always_a_linear_rate(tmp_path, tiny_bert, encoded):
    settings = SETTINGS.but(
        teacher_epochs=2.0, teacher_warmup=0.5, schedule="constant", teacher_batch_size=4
    )
    found = rates(tmp_path, tiny_bert, encoded, settings, of="teacher_")
    assert found == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25])


def test_the_students_dropout_is_its_own(tiny_bert, tiny_batch, tmp_path, encoded):
    student, teacher = pair(tiny_bert, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    distil(student, teacher, encoded, Pad(), SETTINGS.but(student_dropout=0.0), tmp_path)
    batch = tiny_batch()
    for model, same in ((student, True), (accelerate(student), True), (teacher, False)):
        first, second = (model.train()(**batch).logits for _ in range(2))
        assert torch.equal(first, second) == same
    assert student.config.hidden_dropout_prob == 0.0 and teacher.config.hidden_dropout_prob == 0.5


def test_one_expert_of_all_neurons_is_the_dense_teacher_trained_on(tiny_bert, tmp_path, encoded):
    """The control: it learns as the dense model does from the task loss alone."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = tiny_bert(dtype=torch.float32, **none)
    student = to_moebert(teacher, RANKING, n_experts=1, expert_size=64, n_shared=0)
    dense = tiny_bert(dtype=torch.float32, **none)
    changes = dict(distill="none", epochs=3.0, teacher_epochs=3.0, teacher_batch_size=4)
    settings = SETTINGS.but(**changes, teacher_learning_rate=1e-3, learning_rate=1e-3)
    distil(student, teacher, encoded, Pad(), settings, tmp_path)
    fine_tune(dense, encoded, Pad(), settings, tmp_path)
    batch = {name: torch.tensor(encoded[name][:]) for name in encoded.column_names}
    after, before = dense(**batch).logits, teacher(**batch).logits
    assert torch.allclose(student(**batch).logits, after, atol=1e-4)
    assert (after - before).abs().max() > 0.01


def test_scoring_on_the_way_changes_nothing_and_comes_when_it_should(tiny_bert, tmp_path, encoded):
    found = []

    def score(epoch, model):
        assert not model.training
        found.append((epoch, model.classifier.weight.detach().clone()))

    settings = SETTINGS.but(epochs=2.0)
    student, teacher = pair(tiny_bert)
    plain = distil(student, teacher, encoded, Pad(), settings, tmp_path)
    again, _ = pair(tiny_bert)
    points = settings.but(score_at=(0.01, 0.25, 1, 2))
    scored = distil(again, teacher, encoded, Pad(), points, tmp_path, score=score)
    assert plain.equals(scored)
    assert [epoch for epoch, _ in found] == [0.01, 0.25, 1, 2]
    assert torch.equal(found[0][1], found[1][1])  # both after the first of 4 steps an epoch
    assert torch.equal(found[-1][1], student.classifier.weight)
    assert not torch.equal(found[1][1], found[2][1])


def test_batches_are_padded_to_max_length_only_where_padding_counts():
    tokenizer = AutoTokenizer.from_pretrained(pretrained_weights.find(MINILM))
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5]}]
    shapes = {}
    for counted in (False, True):
        settings = SETTINGS.but(padding_in_loss=counted, max_length=16)
        shapes[counted] = tuple(train._collator(tokenizer, settings)(rows)["input_ids"].shape)
    assert shapes == {False: (2, 3), True: (2, 16)}


def head(tiny_bert, **changes):
    dry = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    teacher = tiny_bert(dtype=torch.float32, **dry)
    return to_moebert(teacher, RANKING, **changes), teacher


def arguments(folder, **changes):
    options = dict(per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-3)
    options |= dict(use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
    return TrainingArguments(str(folder), **{**options, **changes})


#: Each name of the installed Trainer and TrainingArguments that is about loss, labels or logits.
OF_THE_LOSS = {
    "average_tokens_across_devices": "nothing to average: a mean over each device's batch",
    "compute_loss_func": "refused",
    "label_names": "honoured",
    "label_smoothing_factor": "honoured, or refused without classes",
    "liger_kernel_config": "refused with use_liger_kernel",
    "neftune_noise_alpha": "honoured, without packing",
    "prediction_loss_only": "honoured",
    "preprocess_logits_for_metrics": "honoured",
    "use_liger_kernel": "refused",
}


def test_every_argument_about_the_loss_is_honoured_or_refused():
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    names = fields | {*inspect.signature(Trainer.__init__).parameters}
    words = ("loss", "label", "logits", "noise", "across", "liger")
    assert {n for n in names if any(word in n for word in words)} <= set(OF_THE_LOSS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(compute_loss_func=lambda *_: None), "compute_loss_func"),
        (dict(model_init=lambda: None), "model_init"),
    ],
)
def test_what_would_replace_the_objective_is_refused(tiny_bert, tmp_path, changes, named):
    student, teacher = head(tiny_bert)
    with pytest.raises(ValueError, match=f"{named}.*expected"):
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher, **changes)


def test_a_loss_function_by_position_is_refused_too(tiny_bert, tmp_path):
    student, teacher = head(tiny_bert)
    others = (None, None, None, None, None, lambda *_: None)
    with pytest.raises(ValueError, match="compute_loss_func"):
        DistillationTrainer(student, arguments(tmp_path), *others, teacher=teacher)


@pytest.mark.parametrize("routing", ["hash-random", "gate-token"])
@pytest.mark.parametrize("distill", ["all", "none"])
def test_labels_are_smoothed(tiny_bert, tiny_batch, tmp_path, routing, distill):
    student, teacher = head(tiny_bert, routing=routing, router_aux_loss_coef=0.5)
    batch, losses = tiny_batch(), []
    for smoothing in (0.0, 0.3):
        options = arguments(tmp_path, label_smoothing_factor=smoothing)
        made = DistillationTrainer(student, options, teacher=teacher, distill=distill)
        losses.append(made.compute_loss(made.model.train(), dict(batch)))
        assert "labels" in batch
    logits = student(**batch).logits
    plain = F.cross_entropy(logits, batch["labels"])
    smooth = F.cross_entropy(logits, batch["labels"], label_smoothing=0.3)
    assert torch.allclose(losses[1] - losses[0], smooth - plain, atol=1e-5)
    assert (smooth - plain).abs() > 1e-3


def test_smoothing_labels_of_spans_is_refused(tiny_bert, tmp_path):
    teacher = span_bert(tiny_bert()).float()
    options = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1"):
        DistillationTrainer(to_moebert(teacher, RANKING), options, teacher=teacher)


def test_noise_on_embeddings_is_that_of_a_padded_batch(tiny_bert, encoded, tmp_path):
    student, teacher = head(tiny_bert)
    options = arguments(tmp_path, neftune_noise_alpha=5.0)
    made = DistillationTrainer(
        student, options, teacher=teacher, train_dataset=encoded, data_collator=Pad().pad
    )
    assert not made.packed
    made.train()


@pytest.mark.parametrize("routing", ["hash-random", "gate-token"])
@pytest.mark.parametrize("gradients", [False, True])
def test_evaluation_gives_logits_and_the_objective(
    tiny_bert, encoded, tmp_path, routing, gradients
):
    student, teacher = head(tiny_bert, routing=routing)
    seen = []

    def metrics(predicted):
        seen.append(predicted)
        return {"right": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    made = DistillationTrainer(
        student,
        arguments(tmp_path, gradient_checkpointing=gradients, eval_strategy="epoch"),
        teacher=teacher,
        train_dataset=encoded,
        eval_dataset=encoded,
        data_collator=Pad().pad,
        compute_metrics=metrics,
    )
    made.train()
    measured = made.evaluate()
    assert seen[-1].predictions.shape == (16, 2) and seen[-1].label_ids.shape == (16,)
    given = {name: torch.tensor(encoded[name][:]) for name in encoded.column_names}
    with torch.no_grad():
        logits = student.eval()(given["input_ids"], given["attention_mask"]).logits
    assert torch.allclose(torch.tensor(seen[-1].predictions), logits, atol=1e-5)
    assert set(measured) >= {"eval_loss", "eval_right"} and measured["eval_loss"] > 0
    assert len(made.curve()) == 4  # steps of training, none of evaluation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_not_trained(tiny_bert, tmp_path, encoded, dtype):
    student, teacher = head(tiny_bert)
    with pytest.raises(ValueError, match=f"{dtype}.*float"):
        DistillationTrainer(student.to(dtype), arguments(tmp_path), teacher=teacher)
    with pytest.raises(ValueError, match=f"{dtype}.*float"):
        fine_tune(teacher.to(dtype), encoded, Pad(), SETTINGS, tmp_path)
