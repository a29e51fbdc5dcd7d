"""The checks themselves: each holds where it should and fails where it should."""

import copy
from functools import partial

import pytest
import torch

from moebert_lib.method.partition import random_ranking
from moebert_lib.model.conversion import to_moebert
from moebert_lib.teaching import checks

RANKING = random_ranking(2, 64, seed=0)


def test_a_check_prints_one_line():
    check = checks.Check("two things are equal", 1e-15, 1e-12)
    assert str(check) == (
        "holds: two things are equal (largest difference 1.0e-15, tolerance 1e-12)"
    )
    assert "FAILS" in str(checks.Check("x", 1.0, 1e-12)) and "\n" not in repr(check)


@pytest.mark.parametrize(
    "left, right",
    [
        (torch.ones(2).double(), [1.0, 1.0 + 1e-9]),
        (torch.ones(2), torch.ones(2, 1)),
        ([1.0, float("nan")], [1.0, float("nan")]),
        ([[1, 2], [3, 4]], [[1, 2], [4, 3]]),
    ],
)
def test_sides_that_differ_are_not_equal(left, right):
    with pytest.raises(AssertionError, match="FAILS: a claim"):
        checks.equal("a claim", left, right)


def test_tensors_lists_and_tolerances_can_be_compared():
    assert checks.equal("a claim", torch.tensor([1, 2]), [1, 2]).difference == 0
    assert checks.equal("a claim", torch.tensor([0.1], dtype=torch.float64), [0.1]).difference == 0
    assert str(checks.equal("near", [1.0], [1.1], tolerance=0.2)).startswith("holds: near")


def layer(states, neurons, *, spoil=None):
    """Four neurons with ReLU, of which only some; ``spoil`` is what they do to each other."""
    made = torch.Generator().manual_seed(0)
    W1, b1, W2, b2 = (torch.randn(n, generator=made).double() for n in ((3, 4), 4, (4, 2), 2))
    hidden = (states @ W1[:, neurons] + b1[neurons]).relu()
    return (spoil(hidden) if spoil and len(neurons) else hidden) @ W2[neurons] + b2


def test_a_layer_is_the_sum_of_its_neurons():
    check = checks.layer_is_the_sum_of_its_neurons(layer, torch.randn(5, 3).double(), 4)
    assert check.difference < check.tolerance


@pytest.mark.parametrize(
    "spoil", [lambda h: h.softmax(-1), lambda h: h - h.mean(-1, keepdim=True), lambda h: h.flip(-1)]
)
def test_neurons_that_see_each_other_or_their_order_are_no_sum(spoil):
    with pytest.raises(AssertionError, match="FAILS: the layer"):
        checks.layer_is_the_sum_of_its_neurons(
            partial(layer, spoil=spoil), torch.randn(5, 3).double(), 4
        )


W1, W2 = torch.randn(3, 4).double(), torch.randn(4, 2).double()
STATES = torch.randn(6, 3).double()
IMPORTANCE = (checks.importance_equals_weight_gradients, checks.importance_is_a_slope)


def losses(w1, w2):
    outputs = torch.sigmoid(STATES @ w1) @ w2
    return torch.nn.functional.cross_entropy(outputs, torch.arange(6) % 2, reduction="none")


def terms():
    """Both terms of Eq. 4 for each example and neuron, ``(6, 4)``, by hand."""
    h = torch.sigmoid(STATES @ W1)
    delta = (h @ W2).softmax(-1) - torch.nn.functional.one_hot(torch.arange(6) % 2)
    return (STATES @ W1) * h * (1 - h) * (delta @ W2.T), h * (delta @ W2.T)


@pytest.mark.parametrize("check", IMPORTANCE)
def test_importance_by_hand_holds(check):
    check(sum(terms()).abs().sum(0), losses, W1, W2)


@pytest.mark.parametrize("check", IMPORTANCE)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda one, two: (one + two).sum(0).abs(),
        lambda one, two: (one.abs() + two.abs()).sum(0),
        lambda one, two: two.abs().sum(0),
        lambda one, two: (one + two).abs().mean(0),
    ],
    ids=["signs of examples", "signs of terms", "rows only", "mean"],
)
def test_importance_with_a_slip_fails(check, wrong):
    with pytest.raises(AssertionError, match="FAILS: importance"):
        check(wrong(*terms()), losses, W1, W2)


@pytest.mark.parametrize("hands", [[[0, 1, 2], [0, 1, 3]], [[0, 1, 2]], [[0, 1], [0, 1]]])
def test_a_deal_keeps_as_many_as_the_formula(hands):
    kept = len({neuron for hand in hands for neuron in hand})
    check = checks.deal_keeps_as_many_as_the_formula(torch.tensor(hands), n_shared=2)
    assert f"{kept} neurons are kept" in str(check)


@pytest.mark.parametrize("hands", [[[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [0, 3, 4]]])
def test_a_deal_that_keeps_another_number_fails(hands):
    with pytest.raises(AssertionError, match="FAILS: . neurons are kept"):
        checks.deal_keeps_as_many_as_the_formula(torch.tensor(hands), n_shared=2)


def test_several_experts_are_not_the_dense_model(tiny_bert, tiny_batch):
    dense = tiny_bert()
    with pytest.raises(AssertionError, match="FAILS: one full-width expert"):
        checks.one_expert_is_dense(dense, to_moebert(dense, RANKING), tiny_batch())


def test_a_model_that_depends_on_neuron_order_fails(tiny_bert, tiny_batch):
    dense = tiny_bert()
    for layer in dense.bert.encoder.layer:  # scales neurons by their position
        layer.intermediate.register_forward_hook(lambda m, i, h: h * torch.arange(64).double())
    with pytest.raises(AssertionError, match="FAILS"):
        checks.permuting_neurons_changes_nothing(dense, tiny_batch())


@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "gate-sentence"])
def test_padding_changes_nothing(tiny_bert, tiny_batch, routing):
    checks.padding_changes_nothing(to_moebert(tiny_bert(), RANKING, routing=routing), tiny_batch())


def test_a_gate_that_drops_its_factor_for_a_batch_of_one_fails(tiny_bert, tiny_batch):
    def as_the_release(gate, inputs, route):
        alone = len(inputs[0]) == 1
        return route._replace(weights=torch.ones_like(route.weights)) if alone else route

    moe = to_moebert(tiny_bert(), RANKING, routing="gate-sentence")
    for layer in moe.bert.encoder.layer:
        layer.output.router.register_forward_hook(as_the_release)
    with pytest.raises(AssertionError, match="FAILS: a sentence alone"):
        checks.padding_changes_nothing(moe, tiny_batch())


def test_experts_that_mix_tokens_up_fail():
    class Shuffling(torch.nn.Module):
        def forward(self, hidden, expert_of, weights):
            return hidden.flip(0)

    with pytest.raises(AssertionError, match="FAILS: every token"):
        checks.tokens_return_to_their_place(
            Shuffling(), torch.randn(5, 3), torch.zeros(5, 1).long()
        )


def test_a_table_that_is_not_saved_fails(tiny_bert, tiny_batch):
    moe = to_moebert(tiny_bert(), RANKING)
    router = moe.bert.encoder.layer[0].output.router
    table = copy.deepcopy(router.tid2eid)
    router.register_buffer("tid2eid", (table + 1) % 4, persistent=False)
    with pytest.raises(Exception, match="FAILS|tid2eid"):
        checks.saving_changes_nothing(moe, tiny_batch())


@pytest.mark.parametrize("hands", [[[0, 1], [2, 3]], [[0, 1], [0, 1]]])
def test_an_unfair_deal_fails(hands):
    with pytest.raises(AssertionError, match="FAILS"):
        checks.deal_is_fair(torch.tensor(hands), torch.arange(4), n_shared=1)


def test_a_loss_that_charges_for_agreement_fails():
    with pytest.raises(AssertionError, match="FAILS"):
        checks.teacher_is_its_own_best_student(lambda *_: 0.1, [], torch.zeros(1))


def test_nan_never_passes():
    with pytest.raises(AssertionError, match="FAILS"):
        checks.teacher_is_its_own_best_student(lambda *_: float("nan"), [], torch.zeros(1))


def one_step(student, teacher, *, train=False, grad=False):
    teacher.train(train)
    with torch.set_grad_enabled(grad):
        teacher(input_ids=torch.tensor([[1, 2, 3]]))


def test_a_teacher_that_only_answers_passes(tiny_bert):
    check = checks.teacher_only_watches(one_step, tiny_bert(), tiny_bert())
    assert "answers 1 batches in eval mode" in str(check)


@pytest.mark.parametrize("fault", [{"train": True}, {"grad": True}])
def test_a_teacher_in_train_mode_or_with_gradients_fails(tiny_bert, fault):
    step = partial(one_step, **fault)
    with pytest.raises(AssertionError, match="in train mode"):
        checks.teacher_only_watches(step, tiny_bert(), tiny_bert())


def test_a_teacher_that_learns_fails(tiny_bert):
    def step(student, teacher):
        one_step(student, teacher)
        teacher.classifier.bias.data += 1

    with pytest.raises(AssertionError, match="does not move"):
        checks.teacher_only_watches(step, tiny_bert(), tiny_bert())


def test_a_teacher_inside_the_student_fails(tiny_bert):
    student = tiny_bert()
    student.teacher = tiny_bert()
    with pytest.raises(AssertionError, match="part of the student"):
        checks.teacher_only_watches(one_step, student, student.teacher)
