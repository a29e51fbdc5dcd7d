"""Several experts a token behind a gate, against loops over tokens and experts, in float64."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch, moebert, real

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import student
from moebert_lib.method.routing import Route, TokenGate, balance_loss, loads
from moebert_lib.model.accelerate import accelerate_if_exact
from moebert_lib.model.modeling import MoEBertForSequenceClassification
from moebert_lib.model.moe_layer import RoutingCall, moe_layers, parameter_counts, record_routes
from moebert_lib.store.store import Store

GATES = ["gate-token", "gate-sentence"]


def gated(k, **changes):
    return moebert(**{"routing": "gate-token", "num_experts_per_tok": k, **changes})


def slow(layer, x, route):
    """One token at a time, one expert at a time: sum of p E(x), residual, mixed LayerNorm."""
    w1, b1, w2, b2 = (stack for stack in layer.experts.unbound())
    rows = []
    for token, chosen, p in zip(x, route.experts.tolist(), route.weights, strict=True):
        total, gain, bias = token.clone(), 0, 0
        for e, p_e in zip(chosen, p, strict=True):
            total = total + p_e * (w2[e] @ F.gelu(w1[e] @ token + b1[e]) + b2[e])
            share = p_e / p.sum()
            own = layer.LayerNorm
            gain = gain + share * (own.weight[e] if layer.per_expert else own.weight)
            bias = bias + share * (own.bias[e] if layer.per_expert else own.bias)
        centred = total - total.mean()
        rows.append(centred / (centred.square().mean() + own.eps).sqrt() * gain + bias)
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("routing", GATES)
@pytest.mark.parametrize("norm", ["per-expert", "shared"])
@pytest.mark.parametrize("how", ["copied", "tied"])
def test_a_layer_equals_a_loop_over_tokens_and_experts(k, routing, norm, how):
    model = gated(k, routing=routing, expert_layer_norm=norm, shared_neurons=how)
    layer, hidden = moe_layers(model)[1], torch.randn(3, 6, 32).double()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    route = layer.router(hidden, None, mask)
    assert route.experts.shape == (18, k)
    expected = slow(layer, hidden.flatten(0, 1), route)
    assert torch.allclose(layer(hidden, RoutingCall(mask=mask)).flatten(0, 1), expected, atol=1e-12)


def test_the_chosen_are_the_most_probable_and_all_of_them_sum_to_one():
    gate, hidden = TokenGate(8, 4, 3).double(), torch.randn(2, 5, 8).double()
    route = gate(hidden, None, None)
    p = (hidden.flatten(0, 1) @ gate.gate.weight.T).softmax(-1)
    for row, chosen, weights in zip(p, route.experts, route.weights, strict=True):
        order = sorted(range(4), key=lambda e: -row[e])[:3]
        assert chosen.tolist() == order and torch.allclose(weights, row[order])
    gate.top_k = 4
    assert torch.allclose(gate(hidden, None, None).weights.sum(-1), torch.ones(10).double())


def test_one_of_several_is_the_gate_as_it_was():
    gate, hidden = TokenGate(8, 4), torch.randn(2, 5, 8)
    route, p = gate(hidden, None, None), gate.gate(hidden.flatten(0, 1)).softmax(-1)
    weights, experts = p.max(-1, keepdim=True)
    assert torch.equal(route.weights, weights) and torch.equal(route.experts, experts)


def test_the_gates_gradient_flows_from_every_chosen_expert():
    model = gated(2)
    layer, hidden = moe_layers(model)[0], torch.randn(1, 1, 32).double()
    route = layer.router(hidden, None, None)
    p = route.probabilities.detach().requires_grad_()
    again = route._replace(weights=p.gather(-1, route.experts))
    layer.serve(hidden, again).square().sum().backward()
    touched = (p.grad[0] != 0).nonzero().flatten().tolist()
    assert touched == sorted(route.experts[0].tolist())


@pytest.mark.parametrize("routing", GATES)
@pytest.mark.parametrize("training", [False, True])
def test_the_accelerated_model_says_the_same(routing, training):
    model, inputs = gated(2, routing=routing), batch([7, 12, 3, 7, 1])
    quick = accelerate_if_exact(model)
    assert quick is not model
    with torch.set_grad_enabled(training):
        one = model(**inputs, output_hidden_states=True)
        other = quick(**inputs, output_hidden_states=True)
    assert torch.allclose(one.logits, other.logits, atol=1e-12)
    mask = real(inputs)
    for x, y in zip(one.hidden_states, other.hidden_states, strict=True):
        assert torch.allclose(x[mask], y[mask], atol=1e-12)


def test_a_saved_model_routes_as_it_did(tmp_path):
    model, inputs = gated(2), batch([5, 3])
    model.save_pretrained(tmp_path)
    again = MoEBertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    with record_routes(model) as one, record_routes(again) as other:
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    assert all(torch.equal(a.experts, b.experts) for (a,), (b,) in zip(one, other, strict=True))


def test_each_further_expert_adds_its_own_parameters():
    counts = [parameter_counts(gated(k)) for k in (1, 2, 4)]
    steps = [b.effective - a.effective for a, b in zip(counts, counts[1:], strict=False)]
    assert steps[1] == 2 * steps[0] > 0
    assert counts[2].effective == counts[2].stored == counts[0].stored


def test_loads_and_balance_count_every_chosen_expert():
    gate, hidden = TokenGate(8, 4, 2), torch.randn(2, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    route = gate(hidden, None, mask)
    kept = [row for row, one in zip(route.experts.tolist(), mask.flatten(), strict=True) if one]
    counts = [sum(row.count(e) for row in kept) / 6 for e in range(4)]
    assert loads(route.experts, 4, mask).tolist() == pytest.approx(counts)
    even = route._replace(
        experts=torch.tensor([[0, 1], [2, 3]]), probabilities=torch.full((2, 4), 0.25)
    )
    assert float(balance_loss(even)) == pytest.approx(1.0)


def test_balance_of_two_experts_a_token_by_hand():
    # of four choices expert 0 has two, 1 and 2 one each: 3 (0.55 / 2 + 0.2 / 4 + 0.25 / 4)
    p = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]).double()
    route = Route(torch.tensor([[0, 1], [0, 2]]), torch.ones(2, 2).double(), p)
    assert float(balance_loss(route)) == pytest.approx(1.1625)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"routing": "hash-random"}, "needs a gate"),
        ({"num_experts_per_tok": 5}, "expected 1 to n_experts=4"),
        ({"num_experts_per_tok": 0}, "expected 1 to n_experts=4"),
        ({"gate_scaling": "outside"}, "scales one expert's state"),
    ],
)
def test_what_nobody_has_defined_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        moebert(**{"routing": "gate-token", "num_experts_per_tok": 2, **changes})


def test_settings_refuse_two_experts_of_a_hash_and_a_change_to_a_hash_takes_one():
    with pytest.raises(UserError, match="gate_top_k=2 needs a gate"):
        Settings.at("smoke", gate_top_k=2)
    two = Settings.at("smoke", gate_top_k=2, routing="gate-token")
    assert two.but(seed=1).gate_top_k == 2
    assert two.but(routing="hash-cluster").gate_top_k == 1


def test_the_default_is_in_no_key():
    one = Settings.at("smoke", routing="gate-token")
    assert "gate_top_k" not in student.conversion_key(Store(), one).choices
    assert student.conversion_key(Store(), one.but(gate_top_k=2)).choices["gate_top_k"] == 2
