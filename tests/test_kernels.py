"""Rearranged weights: they compute F.linear, and follow the parameters whatever happens."""

import copy
import platform
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import batch, dense, moebert
from torch import nn

from moebert_lib import accelerate
from moebert_lib.method.routing import ROUTINGS
from moebert_lib.model import cpu_kernels
from moebert_lib.model.cpu_kernels import Kernels, PreparedLayer

INPUTS = batch([7, 12, 3, 7])
sizes = st.integers(1, 70)


@given(sizes, sizes, sizes, st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_rearranged_weight_gives_the_linear_layer(n, d_in, d_out, gelu, prepack, seed):
    noise = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(rows, d_in, generator=noise) for rows in (n, d_out))
    bias = torch.randn(d_out, generator=noise)
    own = Kernels(prepack=prepack)
    with torch.no_grad():
        y = own.linear(weight, bias, gelu=gelu)(x)
    expected = F.linear(x.double(), weight.double(), bias.double())
    expected = F.gelu(expected) if gelu else expected
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)


@given(st.lists(sizes, min_size=1, max_size=3), st.integers(0, 99))
def test_layers_side_by_side_are_one_product(widths, seed):
    torch.manual_seed(seed)
    x, layers = torch.randn(5, 9), [nn.Linear(9, width) for width in widths]
    with torch.no_grad():
        y = Kernels().layers(*layers)(x)
        expected = torch.cat([layer(x) for layer in layers], 1)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)


@given(sizes, sizes, sizes, st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_rerouted_linear_layer_has_the_same_gradients(n, d_in, d_out, deep, frozen, seed):
    noise = torch.Generator().manual_seed(seed)
    shapes = (((2, n, d_in) if deep else (n, d_in)), (d_out, d_in), (d_out,))
    x, weight, bias = (torch.randn(*shape, generator=noise) for shape in shapes)

    def all_of(x, weight, bias):
        wanted = [t.requires_grad_() for t in ((x,) if frozen else (x, weight, bias))]
        y = F.linear(x, weight, bias)
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        return y, *first, *second

    with cpu_kernels.OneDNNLinear():
        found = all_of(x.clone(), weight.clone(), bias.clone())
    expected = all_of(x.double(), weight.double(), bias.double())
    for one, other in zip(found, expected, strict=True):
        near = 1e-5 * other.detach().abs().max().item()
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=near)


def step(model):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.enable_grad():
        model(**INPUTS, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    optimiser.step()


def in_place(model):
    for values in model.parameters():
        values.mul_(1.5)


def other_values(model):
    return {
        name: 1.5 * values if values.is_floating_point() else values
        for name, values in model.state_dict().items()
    }


def swap_data(model):
    for values in model.parameters():
        values.data = 1.5 * values.data


def turn(model):
    """A square weight read in the other direction: the same memory, another matrix."""
    weight = model.bert.encoder.layer[0].attention.output.dense.weight
    weight.data = weight.data.t()


def new_layer(model):
    attention = model.bert.encoder.layer[0].attention.output
    attention.dense = nn.Linear(32, 32)


CHANGES = {
    "a step of an optimiser": step,
    "a change in place": in_place,
    "a loaded state": lambda model: model.load_state_dict(other_values(model)),
    "an assigned state": lambda model: model.load_state_dict(other_values(model), assign=True),
    "other memory": swap_data,
    "a turned weight": turn,
    "swapped tensors": lambda model: [
        torch.utils.swap_tensors(p, nn.Parameter(1.5 * p)) for p in [*model.parameters()]
    ],
    "double precision": lambda model: model.double(),
    "half precision and back": lambda model: model.bfloat16().float(),
    "a new layer": new_layer,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("routing", [None, "hash-random", "gate-token"])
def test_results_follow_the_parameters(change, routing, mode):
    model = (moebert(routing=routing) if routing else dense()).float()
    faster = accelerate(model)
    with mode():
        before = faster(**INPUTS).logits
    with torch.no_grad():
        CHANGES[change](model)
    with mode():
        after, expected = faster(**INPUTS).logits, model(**INPUTS).logits
    assert torch.allclose(after, expected, rtol=1e-4, atol=1e-4)
    moved = (after - before).abs().max()
    assert moved > (1e-3 if "precision" not in change else 0)


def test_parameters_without_a_version_are_not_trusted():
    with torch.inference_mode():
        model = dense().float()
        faster = accelerate(model)
        faster(**INPUTS)
        in_place(model)
        assert torch.allclose(faster(**INPUTS).logits, model(**INPUTS).logits, atol=1e-4)


def test_a_layer_is_prepared_once_and_again_when_it_changed(monkeypatch):
    built, prepare = [], PreparedLayer.__init__

    def counted(self, layer, *others):
        built.append(layer)
        prepare(self, layer, *others)

    monkeypatch.setattr(PreparedLayer, "__init__", counted)
    model = moebert().float()
    layers, faster = [*model.bert.encoder.layer], accelerate(model)
    with torch.no_grad():
        for _ in range(2):
            faster(**INPUTS)
            assert built == layers
        layers[1].attention.output.dense.weight.mul_(2)
        faster(**INPUTS)
        assert built[len(layers) :] == [layers[1]]
        faster.eval()  # for what is not counted
        faster(**INPUTS)
    assert built[len(layers) + 1 :] == layers


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")),
    reason="torch comes without oneDNN here",
)
def test_where_there_is_onednn_it_is_used():
    """Or else the fallback would stand in unnoticed, since its results are the same."""
    for make in (dense, moebert):
        faster = accelerate(make(dtype=torch.float32))
        with torch.no_grad(), torch.profiler.profile() as profile:
            faster(**INPUTS)
        assert counts(profile)["mkldnn::_linear_pointwise"] >= 8
        assert counts(profile)["aten::linear"] == 2  # the pooler and the head
        with torch.profiler.profile() as profile:
            faster.train()(**INPUTS, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        assert counts(profile)["_LinearBackward"] >= 8


def counts(profile):
    return {event.key: event.count for event in profile.key_averages()}


def missing(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(), raising=False)


def refusing(monkeypatch):
    def refuse(*args):
        raise RuntimeError("not on this processor")

    pointwise = types.SimpleNamespace(default=refuse, binary=refuse)
    both = dict(_linear_pointwise=pointwise, _reorder_linear_weight=refuse)
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**both), raising=False)


def wrong(monkeypatch):
    """An operator that takes the inputs in another order."""
    real = torch.ops.mkldnn._linear_pointwise
    turned = types.SimpleNamespace(
        default=lambda x, *others: real.default(x.flip(-1).contiguous(), *others),
        binary=lambda x, *others: real.binary(x.flip(-1).contiguous(), *others),
    )
    both = dict(
        _linear_pointwise=turned, _reorder_linear_weight=torch.ops.mkldnn._reorder_linear_weight
    )
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**both), raising=False)


@pytest.mark.parametrize("fault", [missing, refusing, wrong])
@pytest.mark.parametrize("make", [dense, moebert])
def test_without_the_private_operators_results_are_the_same(monkeypatch, fault, make):
    if fault is wrong and not cpu_kernels._packable("cpu", torch.float32):
        pytest.skip("this torch does not rearrange weights")
    model = make(dtype=torch.float32)
    monkeypatch.setattr(cpu_kernels, "_KNOWN", {})
    fault(monkeypatch)
    with torch.no_grad():
        faster = accelerate(model)(**INPUTS).logits
        assert torch.allclose(faster, model(**INPUTS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", [None, *ROUTINGS])
@pytest.mark.parametrize("prepack", [True, False])
def test_in_bfloat16_it_is_close(routing, prepack):
    """About one per cent of the norm: 8 bits of mantissa, a few layers."""
    model = (moebert(routing=routing) if routing else dense()).float()
    faster = accelerate(model, dtype=torch.bfloat16, prepack=prepack)
    inputs = batch([7, 12, 3] * 8)
    with torch.no_grad():
        one = model(**inputs, output_hidden_states=True)
        other = faster(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    assert other.logits.dtype == torch.float32
    for x, y in zip(one.hidden_states, other.hidden_states, strict=True):
        assert y.dtype == torch.float32
        error = (x[real] - y[real]).norm(dim=-1) / x[real].norm(dim=-1)
        assert error.median() < 0.02  # single tokens at a gate's border may change expert
    error = (one.logits - other.logits).norm(dim=-1) / one.logits.norm(dim=-1)
    assert 0 < error.median() < 0.03  # a sentence gate moves whole sentences


class Adapted(nn.Module):
    """A linear layer with something added, that shows the linear layer's weight as its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.added = inner, nn.Linear(inner.in_features, inner.out_features)

    @property
    def weight(self):
        return self.inner.weight

    @property
    def bias(self):
        return self.inner.bias

    def forward(self, x):
        return self.inner(x) + self.added(x)


@pytest.mark.parametrize("place", ["query", "value", "intermediate", "output"])
def test_a_layer_that_is_more_than_linear_runs_as_it_is(place):
    model = dense().float()
    layer = model.bert.encoder.layer[0]
    parent, name = {
        "query": (layer.attention.self, "query"),
        "value": (layer.attention.self, "value"),
        "intermediate": (layer.intermediate, "dense"),
        "output": (layer.output, "dense"),
    }[place]
    plain = copy.deepcopy(model)
    setattr(parent, name, Adapted(getattr(parent, name)))
    with torch.no_grad():
        expected = model(**INPUTS).logits
        assert torch.allclose(accelerate(model)(**INPUTS).logits, expected, atol=1e-5)
        assert not torch.allclose(plain(**INPUTS).logits, expected, atol=1e-3)
