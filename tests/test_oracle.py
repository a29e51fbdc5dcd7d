"""Routing in hindsight, against brute force over experts, in float64."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny_models import batch, dense, moebert, perturbed

from moebert_lib.data.batching import without_targets
from moebert_lib.method.routing import Route
from moebert_lib.model.moe_layer import moe_layers
from moebert_lib.training.routing_analysis import Oracle, compare, nearer, nearest

ROUTERS = ["hash-random", "gate-token", "gate-sentence"]


def distance(layer, hidden, target, route):
    return (layer.serve(hidden, route) - target).square().sum(-1).flatten()


@pytest.mark.parametrize("routing", ROUTERS)
def test_no_choice_of_experts_is_nearer_to_the_teacher(routing):
    layer = moe_layers(moebert(routing=routing))[1]
    hidden, target = torch.randn(2, 1, 2, 32, dtype=torch.float64)
    own = layer.router(hidden, torch.tensor([[5, 9]]), None)
    found = nearest(layer, target, hidden, own)
    best = distance(layer, hidden, target, found)
    for pair in itertools.product(range(4), repeat=2):
        experts = torch.tensor(pair)[:, None]
        p = own.probabilities
        weights = torch.ones(2, 1).double() if p is None else p.gather(-1, experts)
        tried = distance(layer, hidden, target, Route(experts, weights, p))
        assert (best <= tried + 1e-12).all()
        if pair == tuple(found.experts.flatten().tolist()):
            assert torch.allclose(best, tried)


@pytest.mark.parametrize("routing", ROUTERS)
@torch.no_grad()
def test_on_the_same_inputs_it_is_never_farther_than_the_models_router(routing):
    model, teacher, inputs = moebert(routing=routing), dense(), batch([6, 4])
    targets = teacher(**inputs, output_hidden_states=True).hidden_states[1:]
    for layer, target in zip(moe_layers(model), targets, strict=True):
        hidden = torch.randn(2, 6, 32).double()
        own = layer.router(hidden, inputs["input_ids"], inputs["attention_mask"])
        best = nearest(layer, target, hidden, own)
        ours, theirs = (distance(layer, hidden, target, way) for way in (best, own))
        assert (ours <= theirs + 1e-12).all() and (ours < theirs).any()


@torch.no_grad()
def test_it_goes_layer_by_layer_along_its_own_states():
    model, teacher, inputs = moebert(), dense(), batch([6, 4])
    targets = teacher(**inputs, output_hidden_states=True).hidden_states[1:]
    seen, layers = [], moe_layers(model)
    hooks = [
        layer.register_forward_hook(lambda m, a, out: seen.append((a[0], out))) for layer in layers
    ]
    Oracle(model, teacher)(**inputs)
    [hook.remove() for hook in hooks]
    for layer, target, (hidden, out) in zip(layers, targets, seen, strict=True):
        every = [
            layer.serve(hidden, Route(torch.full((12, 1), e), torch.ones(12, 1), None))
            for e in range(4)
        ]
        apart = torch.stack([(x - target).square().sum(-1) for x in every])
        assert torch.allclose((out - target).square().sum(-1), apart.min(0).values)


@torch.no_grad()
def test_afterwards_the_model_is_what_it_was():
    model, inputs = moebert(), batch([6, 4])
    before = model(**inputs).logits
    between = Oracle(model, dense())(**inputs).logits
    assert torch.equal(model(**inputs).logits, before) and not torch.equal(between, before)


def test_a_row_for_each_model_router_and_layer():
    inputs = {**batch([6, 4]), "index": torch.arange(2)}
    models = {"teacher": dense(), "converted": moebert(), "distilled": perturbed(moebert(), seed=3)}
    bundle = SimpleNamespace(
        task=SimpleNamespace(metric="sum"),
        batches=lambda split, limit: [inputs],
        score=lambda logits, split, limit: {"sum": float(logits.sum())},
    )
    frame = compare(models, bundle, split="validation", limit=2)
    assert len(frame) == 2 * 2 * 3 + 3
    itself = frame[frame["model"] == "teacher"]
    assert (itself["distance"] == 0).all()
    teacher, asked = models["teacher"].eval(), without_targets(inputs)
    ways = {("teacher", "own"): teacher} | {
        (name, router): way
        for name, model in list(models.items())[1:]
        for router, way in (("own", model), ("oracle", Oracle(model, teacher)))
    }
    scores = frame.groupby(["model", "router"])["score"].first().to_dict()
    with torch.no_grad():
        assert scores == pytest.approx(
            {k: float(way(**asked).logits.sum()) for k, way in ways.items()}
        )
    assert len(set(scores.values())) == 5
    first = frame.query("layer == 1 and model != 'teacher'").pivot(
        index="model", columns="router", values="distance"
    )
    assert (first["oracle"] < first["own"]).all()
    own, best = frame.query("model == 'converted' and layer == 2")["distance"]
    assert list(nearer(frame).index) == ["converted", "distilled"]
    assert nearer(frame)["converted"] == pytest.approx(1 - best / own)


def test_several_experts_a_token_or_none_are_refused():
    with pytest.raises(ValueError, match="one expert a token"):
        Oracle(moebert(routing="gate-token", num_experts_per_tok=2), dense())
    with pytest.raises(ValueError, match="one expert a token"):
        Oracle(dense(), dense())
