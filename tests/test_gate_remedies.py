"""Remedies against a gate that sends everything to one expert, against slow references."""

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import batch, dense, moebert

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import GATES_ONLY, Settings
from moebert_lib.data.batching import Packing
from moebert_lib.evidence import claims
from moebert_lib.experiments import ablations, student
from moebert_lib.method.partition import random_ranking
from moebert_lib.method.routing import (
    ASSIGNED_TOGETHER,
    Route,
    SentenceGate,
    TokenGate,
    balance_loss,
    balanced_assignment,
    fit_gate,
    gate_route,
    within_capacity,
)
from moebert_lib.model.accelerate import accelerate
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.modeling import MoEBertForSequenceClassification
from moebert_lib.model.moe_layer import moe_layers, record_routes
from moebert_lib.store.store import Store
from moebert_lib.training.routing_analysis import evenness, fit_gates, hindsight

REMEDIES = [{"gate_noise": 0.5}, {"gate_capacity": 1.0}, {"gate_assignment": "balanced"}]
sizes = {"n": st.integers(1, 30), "n_experts": st.integers(1, 5), "seed": st.integers(0, 99)}


def drawn(n, n_experts, seed, *, bias=0.0):
    """Scores, the first expert's the highest in most rows if ``bias`` is large."""
    scores = torch.randn(n, n_experts, generator=torch.Generator().manual_seed(seed)).double()
    scores[:, 0] += bias
    return scores


def counts(experts, n_experts):
    return torch.bincount(experts, minlength=n_experts).tolist()


# Capacity.


def slow_capacity(scores, capacity):
    """Round by round: every row without an expert asks its next choice; the best are taken."""
    n, n_experts = scores.shape
    expert_of, load = {}, [0] * n_experts
    wishes = [sorted(range(n_experts), key=lambda e: -row[e]) for row in scores.tolist()]
    for turn in range(n_experts):
        asking = [r for r in range(n) if r not in expert_of]
        for r in sorted(asking, key=lambda r: -float(scores[r, wishes[r][turn]])):
            expert = wishes[r][turn]
            if load[expert] < capacity:
                expert_of[r] = expert
                load[expert] += 1
    return [expert_of[r] for r in range(n)]


@given(**sizes, factor=st.floats(1, 3), bias=st.sampled_from([0.0, 4.0]))
def test_capacity_equals_a_slow_loop_and_every_row_finds_an_expert(
    n, n_experts, seed, factor, bias
):
    scores, capacity = drawn(n, n_experts, seed, bias=bias), math.ceil(factor * n / n_experts)
    expert_of = within_capacity(scores, capacity)
    assert expert_of.tolist() == slow_capacity(scores, capacity)
    assert max(counts(expert_of, n_experts)) <= capacity


def test_with_enough_room_all_rows_have_their_favourite():
    scores = drawn(20, 4, 0, bias=5.0)
    assert torch.equal(within_capacity(scores, 20), scores.argmax(-1))


# Balanced assignment.


@given(n=st.integers(1, 7), n_experts=st.integers(1, 3), seed=st.integers(0, 99))
def test_an_assignment_is_the_best_of_all_balanced_ones(n, n_experts, seed):
    scores = drawn(n, n_experts, seed, bias=2.0)

    def total(experts):
        return sum(float(scores[row, e]) for row, e in enumerate(experts))

    even = [x for x in product(range(n_experts), repeat=n) if is_even(x, n_experts)]
    chosen = balanced_assignment(scores).tolist()
    assert is_even(chosen, n_experts)
    assert total(chosen) == pytest.approx(max(map(total, even)))


def is_even(experts, n_experts):
    load = [list(experts).count(e) for e in range(n_experts)]
    return max(load) - min(load) <= 1


def test_many_rows_are_balanced_up_to_one_too():
    n = 2 * ASSIGNED_TOGETHER * 3 + 5
    assert sorted(counts(balanced_assignment(drawn(n, 3, 0, bias=9.0)), 3)) == [257, 258, 258]


def test_logits_and_log_probabilities_give_one_assignment():
    scores = drawn(11, 4, 1)
    assert torch.equal(balanced_assignment(scores), balanced_assignment(scores.log_softmax(-1)))


# Gates.


def gate_of(kind, **options):
    torch.manual_seed(0)
    gate = kind(8, 4, **options).double()
    gate.gate.weight.data[0] += 2.0  # states below are positive: most rows prefer expert 1
    return gate


STATES = torch.rand(5, 6, 8, generator=torch.Generator().manual_seed(0)).double()
MASK = torch.tensor([[1] * n + [0] * (6 - n) for n in (6, 5, 3, 6, 1)])
OPTIONS = [{"noise": 0.5}, {"capacity": 1.0}, {"assignment": "balanced"}]


@pytest.mark.parametrize("kind", [TokenGate, SentenceGate])
@pytest.mark.parametrize("options", OPTIONS)
def test_at_inference_a_gate_takes_its_favourite_whatever_its_remedy(kind, options):
    plain, treated = gate_of(kind).eval(), gate_of(kind, **options).eval()
    for one, other in zip(plain(STATES, None, MASK), treated(STATES, None, MASK), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_padding_takes_no_place_of_an_expert(options):
    gate, real = gate_of(TokenGate, **options), MASK.bool().flatten()
    route = gate(STATES, None, MASK)
    alone = gate(STATES.flatten(0, 1)[real][None], None, None)
    assert torch.equal(route.experts[real], alone.experts)
    assert max(counts(alone.experts[:, 0], 4)) == math.ceil(int(real.sum()) / 4)
    p = route.probabilities.gather(-1, route.experts)
    assert torch.equal(route.weights, p)  # Eq. 3's p of the expert that serves


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_a_sentence_stays_together_and_sentences_are_spread(options):
    route = gate_of(SentenceGate, **options)(STATES, None, MASK)
    of_sentence = route.experts.view(5, 6)
    assert (of_sentence == of_sentence[:, :1]).all()
    assert max(counts(of_sentence[:, 0], 4)) == 2  # of five


@pytest.mark.parametrize("kind", [TokenGate, SentenceGate])
@pytest.mark.parametrize("options", OPTIONS[1:])
def test_a_packed_batch_is_routed_like_a_padded_one(kind, options):
    gate, packing = gate_of(kind, **options), Packing.of(MASK)
    padded = gate(STATES, None, MASK)
    packed = gate(packing.pack(STATES)[None], None, packing)
    for one, other in zip(padded, packed, strict=True):
        assert torch.allclose(packing.pack(one.view(5, 6, -1)), other)


def test_noise_follows_torchs_seed_and_moves_choices():
    gate, routes = gate_of(TokenGate, noise=2.0), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        routes.append(gate(STATES, None, None))
    assert torch.equal(routes[0].probabilities, routes[1].probabilities)
    assert not torch.equal(routes[0].experts, routes[2].experts)


def test_noise_is_normal_of_the_given_deviation():
    gate = gate_of(TokenGate, noise=0.5)
    states = STATES[:1, :1].expand(1, 20_000, 8)
    logits = gate(states, None, None).probabilities.log()
    apart = (logits[:, 1] - logits[:, 2]).detach().std()  # of a difference of two: 0.5 sqrt(2)
    assert float(apart) == pytest.approx(0.5 * 2**0.5, rel=0.03)


# The balance loss.


def test_sentences_count_alike_whatever_their_length():
    route = gate_route(drawn(30, 4, 0), 1)
    total_f, total_p = torch.zeros(4).double(), torch.zeros(4).double()
    for row, length in enumerate(MASK.sum(1).tolist()):
        for place in range(length):
            token = 6 * row + place
            total_f[route.experts[token, 0]] += 1 / length / 5
            total_p += route.probabilities[token] / length / 5
    expected = 4 * float((total_f * total_p).sum())
    assert float(balance_loss(route, MASK, over="sentences")) == pytest.approx(expected)


@pytest.mark.parametrize("over", ["tokens", "sentences"])
def test_the_loss_of_a_packed_batch_is_that_of_a_padded_one(over):
    route, packing = gate_route(drawn(30, 4, 0), 2), Packing.of(MASK)
    packed = Route(*(packing.pack(part.view(5, 6, -1)) for part in route))
    one, other = balance_loss(route, MASK, over=over), balance_loss(packed, packing, over=over)
    assert float(one) == pytest.approx(float(other), abs=1e-12)


def test_over_sentences_a_sentence_gate_counts_sentences():
    route = gate_of(SentenceGate).eval()(STATES, None, MASK)
    once = Route(*(part.view(5, 6, -1)[:, 0] for part in route))
    one, other = balance_loss(route, MASK, over="sentences"), balance_loss(once)
    assert one.item() == pytest.approx(other.item())


# Rows that need no training by gradient, or little.


def test_a_fitted_gate_predicts_what_a_linear_gate_can():
    states = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).double()
    truth = drawn(5, 6, 3)
    experts = (states @ truth.T).argmax(-1)
    rows = fit_gate(states, experts, 5, decay=1e-6)
    assert ((states @ rows.T).argmax(-1) == experts).double().mean() > 0.97


def test_a_fitted_gate_is_where_the_loss_has_no_slope():
    states, experts = drawn(60, 4, 0), torch.arange(60) % 3
    rows = fit_gate(states, experts, 3, decay=0.01).requires_grad_()
    p = (states @ rows.T).softmax(-1)
    loss = -p[torch.arange(60), experts].log().mean() + 0.01 * rows.square().sum()
    (slope,) = torch.autograd.grad(loss, rows)
    assert float(slope.abs().max()) < 1e-5


# Settings.


@pytest.mark.parametrize("changes", [*REMEDIES, {"gate_start": "experts"}])
def test_a_hash_has_no_remedies(changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"{name}=.* needs a gate"):
        Settings.at("smoke", **changes)
    gate = Settings.at("smoke", routing="gate-token", **changes)
    back = gate.but(routing="hash-random")
    assert {name: getattr(back, name) for name in GATES_ONLY} == GATES_ONLY


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"gate_capacity": 1.25, "gate_assignment": "balanced"}, "one of the two"),
        ({"gate_capacity": 1.25, "gate_top_k": 2}, "one expert a token"),
        ({"gate_assignment": "balanced", "gate_top_k": 2}, "one expert a token"),
        ({"gate_capacity": 0.5}, "gate_capacity=0.5"),
        ({"gate_noise": -1.0}, "gate_noise=-1"),
        ({"gate_start": "nearest", "gate_top_k": 2}, "fitted to one expert"),
        ({"gate_start": "experts", "n_shared": 16, "expert_size": 16}, "only one expert has"),
    ],
)
def test_what_cannot_be_done_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        Settings.at("smoke", routing="gate-token", **changes)


# Models.


@pytest.mark.parametrize("changes", [*REMEDIES, {"balance_over": "sentences"}])
def test_a_saved_model_keeps_its_remedies(changes, tmp_path):
    model, inputs = moebert(routing="gate-token", **changes), batch([5, 3])
    model.save_pretrained(tmp_path)
    again = MoEBertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert {name: getattr(again.config, name) for name in changes} == changes
    for one, other in zip(moe_layers(model), moe_layers(again), strict=True):
        names = ("noise", "capacity", "assignment")
        assert all(getattr(one.router, n) == getattr(other.router, n) for n in names)
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)


@pytest.mark.parametrize("routing", ["gate-token", "gate-sentence"])
@pytest.mark.parametrize("changes", [*REMEDIES[1:], {"balance_over": "sentences"}])
def test_an_accelerated_model_trains_alike(routing, changes):
    model = moebert(routing=routing, router_aux_loss_coef=1.0, **changes).train()
    inputs = {**batch([7, 12, 3, 7, 1]), "labels": torch.tensor([0, 1, 1, 0, 1])}
    gradients = []
    for version in (model, accelerate(model).train()):
        model.zero_grad()
        version(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_noise_trains_accelerated_too():
    model = accelerate(moebert(routing="gate-token", gate_noise=3.0)).train()
    inputs = batch([7, 5]) | {"labels": torch.tensor([0, 1])}
    losses = {model(**inputs).loss.item() for _ in range(3)}
    assert len(losses) == 3


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"routing": "hash-random", "gate_noise": 0.5}, "needs a gate"),
        ({"gate_capacity": 0.9}, "1 or more"),
        ({"gate_assignment": "even"}, "argmax, balanced"),
        ({"balance_over": "words"}, "tokens, sentences"),
        ({"gate_start": "nearest"}, "needs data"),
        ({"routing": "hash-random", "gate_start": "experts"}, "needs a gate"),
        ({"gate_start": "experts", "n_shared": 16, "allow_identical": True}, "only one expert has"),
    ],
)
def test_a_conversion_refuses_what_it_cannot_do(changes, said, tiny_bert):
    ranking = random_ranking(2, 64, seed=0)
    options = {"routing": "gate-token", "n_experts": 4, "expert_size": 16, "n_shared": 8, **changes}
    with pytest.raises(ValueError, match=said):
        to_moebert(tiny_bert(), ranking, **options)


def test_a_gate_starts_from_the_mean_weights_of_each_experts_own_neurons(tiny_bert):
    dense, ranking = tiny_bert(), random_ranking(2, 64, seed=0)
    sizes = {"n_experts": 4, "expert_size": 16, "n_shared": 8}
    model = to_moebert(dense, ranking, routing="gate-token", gate_start="experts", **sizes)
    up = dense.bert.encoder.layer[1].intermediate.dense.weight
    layer = moe_layers(model)[1]
    for row, neurons in zip(layer.router.gate.weight, layer.neurons.tolist(), strict=True):
        assert torch.allclose(row, torch.stack([up[j] for j in neurons[8:]]).mean(0))


@pytest.mark.parametrize("routing", ["gate-token", "gate-sentence"])
def test_fitted_gates_choose_the_nearest_expert_more_often(routing):
    model, teacher = moebert(routing=routing), dense()
    batches = [batch([9, 4, 7, 12, 5, 3, 8, 11], seed=seed) for seed in range(6)]

    def agreement():
        hits, total = 0, 0
        for inputs in batches:
            targets = teacher(**inputs, output_hidden_states=True).hidden_states[1:]
            with torch.no_grad(), record_routes(model) as own:
                model(**inputs)
            with torch.no_grad(), hindsight(model, targets, whole=True):
                with record_routes(model) as best:
                    model(**inputs)
            real = inputs["attention_mask"].bool().flatten()
            same = own[0][0].experts[real] == best[0][0].experts[real]  # same states in layer 1
            hits, total = hits + int(same.sum()), total + len(same)
        return hits / total

    before = agreement()
    fit_gates(model, teacher, batches)
    assert agreement() > before + 0.05


# How far a gate has collapsed.


def test_evenness_by_hand():
    even, one = evenness(np.full((2, 4), 0.25)), evenness(np.eye(4)[[0, 0]])
    assert even == pytest.approx((1.0, 1.0)) and one == pytest.approx((4.0, 0.0))
    half = evenness(np.array([[0.5, 0.5, 0, 0], [0.25] * 4]))
    assert half == pytest.approx((1.5, 0.75))


def test_a_gate_has_collapsed_beyond_half_of_the_way_to_one_expert():
    assert claims.collapse_limit(4) == 2.5 and claims.collapse_limit(2) == 1.5
    assert claims.collapsed({"busiest": 2.6, "n_experts": 4})
    assert not claims.collapsed({"busiest": 2.4, "n_experts": 4})
    assert not claims.collapsed({"busiest": 1.0, "n_experts": 1})
    assert not claims.collapsed({"n_experts": 4})  # not measured


def test_a_collapsed_gate_enters_no_verdict():
    settings = Settings.at("quick", n_seeds=1)
    points = [settings.but(routing=r) for r in ("hash-random", "gate-sentence")]
    scores = {"task": "library", "accuracy": 0.8, "teacher_accuracy": 0.9, "guessing": 0.5}
    rows = [scores | {"seed": 0, "n_experts": 4, "busiest": busy} for busy in (np.nan, 3.9)]
    options = {"points": points, "width": 1536}
    arms = [
        set(claims.collect(settings, ["library"], runs=pd.DataFrame(some), **options)["arm"])
        for some in (rows, [rows[0], rows[1] | {"busiest": 1.2}])
    ]
    assert arms[1] - arms[0] == {"gate-sentence"} and "hash-random" in arms[0]


# Experiments.


def test_each_remedy_has_a_student_of_its_own_and_the_defaults_are_in_no_key():
    gate = Settings.at("smoke", routing="gate-token")
    changes = [*REMEDIES, {"gate_start": "experts"}, {"gate_start": "nearest"}]
    changes += [{"balance_over": "sentences"}]
    keys = [student.student_key(Store(), gate.but(**change)) for change in changes]
    usual = student.student_key(Store(), gate)
    assert len({key.digest for key in (*keys, usual)}) == len(changes) + 1
    names = {name for change in changes for name in change}
    assert not names & {name.split(".")[-1] for name in usual.flat()}


def test_the_remedies_are_tried_alone_on_gates():
    grid = ablations.points("gate_remedies", Settings.at("small"))
    assert len(grid) == 2 * len(ablations.REMEDIES)
    assert all(len(points) == 3 for points in grid.values())
    brief = ablations.points("gate_remedies", Settings.at("smoke"))
    assert {point.routing for (point,) in brief.values()} == {"gate-token"}
