"""Eq. 5-7 by hand and against slow references."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.data.batching import Packing
from moebert_lib.method.distillation_loss import (
    chosen_layers,
    distillation_terms,
    layer_distances,
    layer_loss,
    layer_loss_by_example,
    prediction_loss,
    teacher_layers,
    total_loss,
)
from moebert_lib.teaching import checks


def states(n=3, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 5, generator=noise).double() for _ in range(n)]


def test_layers_by_hand():
    assert chosen_layers(3, "all") == [0, 1, 2, 3]
    assert chosen_layers(12, "skip") == [0, 2, 4, 6, 8, 10, 12]
    assert chosen_layers(3, "skip") == [1, 3]
    assert chosen_layers(3, "last") == [3] and chosen_layers(3, "none") == []
    with pytest.raises(ValueError, match="all, skip, last or none"):
        chosen_layers(3, "first")


def test_distance_is_the_mean_over_real_tokens():
    own, other = states(seed=0), states(seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    for layer, value in enumerate(layer_distances(own, other, mask)):
        squares = [
            (own[layer][b, t, d] - other[layer][b, t, d]) ** 2
            for b in range(2)
            for t in range(4)
            for d in range(5)
            if mask[b, t]
        ]
        assert len(squares) == 20 and torch.allclose(value, sum(squares) / 20)


def outputs(own, other, mask):
    """Outputs of two models, padded or as packed states."""
    logits = torch.zeros(len(mask), 2).double()
    return [SimpleNamespace(hidden_states=states, logits=logits) for states in (own, other)]


@pytest.mark.parametrize("packed", [False, True])
def test_the_mean_by_example_weighs_short_and_long_examples_alike(packed):
    own, other = states(seed=0), states(seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    expected = 0
    for x, x_tea in zip(own, other, strict=True):
        of_example = []
        for b in range(2):
            tokens = [((x[b, t] - x_tea[b, t]) ** 2).mean() for t in range(4) if mask[b, t]]
            of_example.append(sum(tokens) / len(tokens))
        expected += sum(of_example) / 2
    if packed:
        packing = Packing.of(mask)
        own, other = ([packing.pack(x) for x in each] for each in (own, other))
    pair = outputs(own, other, mask)
    assert torch.allclose(distillation_terms(*pair, mask=mask, mean="examples").hidden, expected)
    assert not torch.allclose(distillation_terms(*pair, mask=mask).hidden, expected)


def test_both_means_are_one_where_all_examples_are_as_long():
    pair = outputs(states(seed=0), states(seed=1), torch.ones(2, 4))
    for mask in (torch.ones(2, 4).long(), None):
        one = distillation_terms(*pair, mask=mask, mean="tokens").hidden
        other = distillation_terms(*pair, mask=mask, mean="examples").hidden
        assert torch.allclose(one, other)


def test_an_example_without_tokens_is_none():
    x, x_tea = states(n=1, seed=0)[0][0], states(n=1, seed=1)[0][0]
    whole = layer_loss_by_example([x], [x_tea], torch.tensor([0, 2, 2, 2]))
    rows = (x - x_tea).square().mean(-1)
    assert torch.allclose(whole, (rows[0] + rows[1:].mean()) / 2)


def test_a_student_of_half_the_depth_is_compared_with_every_other_layer():
    assert teacher_layers(6, 12) == [0, 2, 4, 6, 8, 10, 12]
    assert teacher_layers(3, 5) == [0, 1, 3, 5] and teacher_layers(3, 3) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="student has 5 states, teacher 13"):
        teacher_layers(4, 12)
    own, other = states(n=4, seed=0), states(n=7, seed=1)
    pair = outputs(own, other, torch.ones(2, 4))
    for which, layers in {"all": [0, 1, 2, 3], "skip": [1, 3], "last": [3]}.items():
        expected = sum(((own[n] - other[2 * n]) ** 2).mean() for n in layers)
        found = distillation_terms(*pair, mask=None, layers=which).hidden
        assert torch.allclose(found, expected)


def test_without_mask_padding_counts():
    own, other = states(seed=0), states(seed=1)
    whole = layer_distances(own, other, None)
    means = [((a - b) ** 2).mean() for a, b in zip(own, other, strict=True)]
    assert torch.allclose(whole, torch.stack(means))
    assert torch.allclose(whole, layer_distances(own, other, torch.ones(2, 4)))


def test_padding_states_do_not_matter():
    own, other, mask = states(seed=0), states(seed=1), torch.tensor([[1, 1, 0, 0]] * 2)
    before = layer_distances(own, other, mask)
    own[1][:, 2:] = 1e9
    assert torch.equal(layer_distances(own, other, mask), before)


def test_another_number_of_states_is_refused():
    with pytest.raises(ValueError, match="student has 2 states, teacher 3"):
        layer_distances(states(2), states(3), None)


def test_symmetric_kl_by_hand():
    p, q = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.6, 0.4]).double()
    one = (p * (p / q).log()).sum()
    two = (q * (q / p).log()).sum()
    loss = prediction_loss(p.log()[None], q.log()[None])
    assert torch.allclose(loss, (one + two) / 2)


logits = st.lists(st.floats(-30, 30), min_size=3, max_size=3).map(lambda row: torch.tensor([row]))


@given(logits, logits)
def test_prediction_loss_is_symmetric_and_not_negative(one, two):
    there, back = prediction_loss(one, two), prediction_loss(two, one)
    assert there >= -1e-5 and torch.allclose(there, back, rtol=1e-4, atol=1e-5)


def test_vanishing_probabilities_give_a_finite_loss():
    loss = prediction_loss(torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]]))
    assert torch.isfinite(loss) and loss == 1000


def test_regression_compares_the_scores():
    student, teacher = (
        SimpleNamespace(hidden_states=states(), logits=torch.tensor([[score]]))
        for score in (2.0, 5.0)
    )
    assert distillation_terms(student, teacher, mask=None).prediction == 9


def test_the_objective_by_hand():
    X = [torch.tensor([[[1.0, 2.0], [0.5, -1.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])]
    X_tea = [torch.tensor([[[0.5, 2.0], [0.5, 0.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])]
    L_trm = layer_loss(X, X_tea)
    assert L_trm == (0.5**2 + 1.0**2) / 4 + 1.0**2 / 4
    assert total_loss(torch.tensor(2.0), L_trm, torch.tensor(0.25), 3.0) == 2 + 3 * (0.5625 + 0.25)


def test_a_span_costs_the_mean_of_its_start_and_its_end():
    noise = torch.Generator().manual_seed(4)
    student, teacher = (
        SimpleNamespace(
            hidden_states=states(seed=seed),
            start_logits=torch.randn(2, 4, generator=noise).double(),
            end_logits=torch.randn(2, 4, generator=noise).double(),
        )
        for seed in (0, 1)
    )
    terms = distillation_terms(student, teacher, mask=None)
    start = prediction_loss(student.start_logits, teacher.start_logits)
    end = prediction_loss(student.end_logits, teacher.end_logits)
    assert abs(start - end) > 0.1 and torch.allclose(terms.prediction, (start + end) / 2)
    each = layer_distances(student.hidden_states, teacher.hidden_states, None)
    assert torch.allclose(terms.hidden, each.sum())


def test_a_model_against_itself_costs_nothing():
    def loss(own, other, logits, teacher_logits):
        student = SimpleNamespace(hidden_states=own, logits=logits)
        teacher = SimpleNamespace(hidden_states=other, logits=teacher_logits)
        return sum(distillation_terms(student, teacher, mask=None))

    checks.teacher_is_its_own_best_student(loss, states(), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("layers", "counted"), [("all", [0, 1, 2]), ("skip", [0, 2]), ("last", [2])]
)
def test_terms_sum_the_chosen_layers(layers, counted):
    student = SimpleNamespace(hidden_states=states(seed=0), logits=torch.randn(2, 3).double())
    teacher = SimpleNamespace(hidden_states=states(seed=1), logits=torch.randn(2, 3).double())
    terms = distillation_terms(student, teacher, mask=None, layers=layers)
    each = layer_distances(student.hidden_states, teacher.hidden_states, None)
    assert torch.allclose(terms.hidden, each[counted].sum())
    assert torch.allclose(terms.prediction, prediction_loss(student.logits, teacher.logits))
