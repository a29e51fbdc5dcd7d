"""Preset release equals a plain reference of the released formulas, and only that preset does."""

import pytest
import torch
from release_reference import ReleasedModel, hidden_loss, prediction_loss
from tiny_spans import span_batch, span_bert
from transformers import TrainingArguments

from moebert_lib.config.presets import RELEASE
from moebert_lib.method.distillation_loss import distillation_terms
from moebert_lib.method.partition import random_ranking
from moebert_lib.method.routing import ROUTINGS
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.moe_layer import moe_layers, record_routes
from moebert_lib.training.trainer import DistillationTrainer

SIZES = dict(n_experts=4, expert_size=16, n_shared=8)
RANKING = random_ranking(2, 64, seed=3)
BALANCE, LAMBDA = 0.3, 2.0
#: The preset's switches that are options of the conversion; one more is of the training.
OPTIONS = dict(
    shared_neurons=RELEASE["shared_neurons"],
    expert_layer_norm=RELEASE["expert_layer_norm"],
    gate_scaling=RELEASE["gate_scaling"],
    padding_in_balance=RELEASE["padding_in_loss"],
    router_aux_loss_coef=BALANCE,
)
TASKS = ("classification", "regression", "spans")
CLOSE = dict(rtol=0, atol=1e-10)


@pytest.fixture
def case(tiny_bert, tiny_batch):
    """Maker of (dense, batch): a teacher of the task, and a padded batch of five rows."""

    def make(task="classification"):
        dense = tiny_bert(num_labels={"classification": 3, "regression": 1, "spans": 2}[task])
        batch = tiny_batch(n=5, length=9, num_labels=3)
        if task == "spans":
            return span_bert(dense), span_batch(batch)
        if task == "regression":
            batch["labels"] = batch["labels"].double()
        return dense, batch

    return make


def converted(dense, routing, **changes):
    frequencies = torch.arange(99) % 7
    return to_moebert(
        dense,
        RANKING,
        routing=routing,
        token_frequencies=frequencies,
        seed=2,
        **SIZES,
        **{**OPTIONS, **changes},
    )


def released(dense, routing, student):
    """The reference with the student's tables or gates and weights of its own."""
    if routing.startswith("hash"):
        routers = [layer.router.tid2eid[:, 0].tolist() for layer in moe_layers(student)]
    else:
        routers = [layer.router.gate.weight.detach().clone() for layer in moe_layers(student)]
    return ReleasedModel(dense, RANKING, routing, routers, **SIZES).eval()


@torch.no_grad()
def drift(reference, student):
    """Move every expert's every parameter as training would, and hand them to the student."""
    noise = torch.Generator().manual_seed(11)
    for values in reference.layers.parameters():
        values += 0.2 * torch.randn(values.shape, generator=noise)
    for layer, experts in zip(moe_layers(student), reference.layers, strict=True):
        for e, expert in enumerate(experts):
            layer.experts.up_proj[e] = expert.fc1.weight
            layer.experts.up_proj_bias[e] = expert.fc1.bias
            layer.experts.down_proj[e] = expert.fc2.weight
            layer.experts.down_proj_bias[e] = expert.fc2.bias
            if layer.per_expert:
                layer.LayerNorm.weight[e], layer.LayerNorm.bias[e] = expert.norm.parameters()


@torch.no_grad()
def spread(reference, student, batch):
    """Turn the gates away from what all states have in common, so that no expert gets all."""
    states = []
    for layer, weight in zip(moe_layers(student), reference.gates, strict=True):
        hook = layer.router.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        student(**batch)
        hook.remove()
        mean = states[-1].mean((0, 1))
        weight *= 40
        weight -= torch.outer(weight @ mean, mean) / (mean @ mean)
        layer.router.gate.weight.copy_(weight)


def trained(dense, batch, routing, **changes):
    """Student and reference with the same weights, no two experts alike."""
    student = converted(dense, routing, **changes)
    reference = released(dense, routing, student)
    drift(reference, student)
    if routing.startswith("gate"):
        spread(reference, student, batch)
    return student, reference


def logits(output):
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits])
    return torch.stack([output.start, output.end]) if hasattr(output, "start") else output.logits


def balance(output):
    return torch.zeros(()) if output.aux_loss is None else output.aux_loss


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_conversion_gives_the_releases_experts(case, routing, task):
    dense, batch = case(task)
    student = converted(dense, routing)
    expected = released(dense, routing, student)(**batch)
    assert torch.allclose(logits(student(**batch)), logits(expected), **CLOSE)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_logits_and_losses_are_the_releases(case, routing, task):
    dense, batch = case(task)
    student, reference = trained(dense, batch, routing)
    output, expected = student(**batch, output_hidden_states=True), reference(**batch)
    teacher = dense(**batch, output_hidden_states=True)
    terms = distillation_terms(output, teacher, mask=None)
    hidden = hidden_loss(expected.states, teacher.hidden_states)
    for own, other in (
        (logits(output), logits(expected)),
        (balance(output), expected.balance),
        (output.loss, expected.task + BALANCE * expected.balance),
        (terms.hidden, hidden),
        (terms.prediction, prediction_loss(expected, teacher)),
    ):
        assert torch.allclose(own.double(), other, **CLOSE)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_objective_and_its_gradients_are_the_releases(case, tmp_path, routing, task):
    dense, batch = case(task)
    student, reference = trained(dense, batch, routing)
    trainer = DistillationTrainer(
        student,
        TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
        teacher=dense,
        weight=LAMBDA,
        padding_in_loss=RELEASE["padding_in_loss"],
    )
    loss = trainer.compute_loss(student, batch)
    expected, teacher = reference(**batch), dense(**batch, output_hidden_states=True)
    distill = hidden_loss(expected.states, teacher.hidden_states)
    distill = distill + prediction_loss(expected, teacher)
    total = expected.task + BALANCE * expected.balance + LAMBDA * distill
    assert torch.allclose(loss, total, **CLOSE)
    for own, other in zip(gradients(student, loss), gradients(reference, total), strict=True):
        assert other.abs().max() > 1e-4 and torch.allclose(own, other, **CLOSE)


def gradients(model, loss):
    """Of each layer: all experts' first weights, their LayerNorms' gains, the gate."""
    if isinstance(model, ReleasedModel):
        wanted = [e.fc1.weight for experts in model.layers for e in experts]
        wanted += [e.norm.weight for experts in model.layers for e in experts]
        wanted += [*model.gates] if model.routing.startswith("gate") else []
        found = torch.autograd.grad(loss, wanted, materialize_grads=True)
        by_kind = found[:8], found[8:16]
        stacked = [torch.stack(kind[i : i + 4]) for kind in by_kind for i in (0, 4)]
        return [*stacked, *found[16:]]
    layers = moe_layers(model)
    wanted = [layer.experts.up_proj for layer in layers]
    wanted += [layer.LayerNorm.weight for layer in layers]
    if model.config.routing.startswith("gate"):
        wanted += [layer.router.gate.weight for layer in layers]
    return torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("routing", ["gate-token", "gate-sentence"])
@pytest.mark.parametrize("task", TASKS)
def test_gates_that_scale_inside_give_other_logits(case, routing, task):
    dense, batch = case(task)
    student, reference = trained(dense, batch, routing, gate_scaling="inside")
    assert far(logits(student(**batch)), logits(reference(**batch)))


def test_one_layer_norm_for_all_experts_gives_other_logits(case):
    dense, batch = case()
    student, reference = trained(dense, batch, "hash-random", expert_layer_norm="shared")
    for layer, experts in zip(moe_layers(student), reference.layers, strict=True):
        layer.LayerNorm.load_state_dict(experts[0].norm.state_dict())
    assert far(logits(student(**batch)), logits(reference(**batch)))


def test_tied_neurons_get_the_sum_of_the_gradients_of_the_releases_copies(case):
    dense, batch = case()
    tied = converted(dense, "hash-random", shared_neurons="tied")
    reference, s = released(dense, "hash-random", tied), SIZES["n_shared"]
    tied(**batch).loss.backward()
    reference(**batch).task.backward()
    for layer, experts in zip(moe_layers(tied), reference.layers, strict=True):
        copies = torch.stack([expert.fc1.weight.grad[:s] for expert in experts])
        assert torch.allclose(layer.experts.shared_up.grad, copies.sum(0), **CLOSE)
        assert all(far(layer.experts.shared_up.grad, copy) for copy in copies)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_padding_left_out_of_the_loss_gives_another_distance(case, routing):
    dense, batch = case()
    student, reference = trained(dense, batch, routing)
    output, teacher = (m(**batch, output_hidden_states=True) for m in (student, dense))
    terms = distillation_terms(output, teacher, mask=batch["attention_mask"])
    assert far(terms.hidden, hidden_loss(reference(**batch).states, teacher.hidden_states))


@pytest.mark.parametrize("routing", ["gate-token", "gate-sentence"])
def test_padding_left_out_of_the_balance_gives_another_balance(case, routing):
    dense, batch = case()
    student, reference = trained(dense, batch, routing, padding_in_balance=False)
    assert far(student(**batch).aux_loss, reference(**batch).balance)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_these_cases_are_padded_and_ask_several_experts(case, routing):
    # else the comparisons above would say nothing
    dense, batch = case()
    student, _ = trained(dense, batch, routing)
    with record_routes(student) as routes:
        student(**batch)
    asked = [len(calls[0].experts.unique()) for calls in routes]
    assert min(asked) >= (2 if routing == "gate-sentence" else 4)
    assert 0 < batch["attention_mask"].double().mean() < 1


def test_a_batch_of_one_is_outside_the_references_sentence_gate(case):
    dense, batch = case()
    _, reference = trained(dense, batch, "gate-sentence")
    with pytest.raises(ValueError, match="another path for a batch of one"):
        reference(**{name: value[:1] for name, value in batch.items()})


def far(one, other):
    """Differs by far more than rounding."""
    return (one - other).abs().max() > 1e-3
