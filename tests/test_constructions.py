"""The neurons of each expert by setting: same neurons, other company; kept, and told apart."""

import itertools
from typing import get_args

import pytest
import torch
from conftest import make_home

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Grouping, Settings
from moebert_lib.experiments import dataset, expert_partitions, student, teacher
from moebert_lib.method import partition
from moebert_lib.method.encoder_layouts import ffns
from moebert_lib.method.partition import deal_layers, random_ranking
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.moe_layer import moe_layers
from moebert_lib.store.store import Store

GROUPED = get_args(Grouping)[1:]  # the first is the deal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One for all tests of this file, so that its teacher is trained once."""
    return make_home(tmp_path_factory.mktemp("constructions") / "home")


@pytest.fixture
def settings(home, monkeypatch) -> Settings:
    monkeypatch.setenv("MOEBERT_HOME", str(home))
    return Settings.at("smoke")


@pytest.mark.parametrize("n_shared", [0, None])
@pytest.mark.parametrize("how", GROUPED)
def test_a_grouping_keeps_the_neurons_that_the_deal_keeps(settings, how, n_shared):
    dealt = expert_partitions.neurons(Store(), settings.but(n_shared=n_shared))
    grouped = expert_partitions.neurons(Store(), settings.but(n_shared=n_shared, grouping=how))
    assert grouped.shape == dealt.shape and not torch.equal(grouped, dealt)
    for mine, other in zip(grouped, dealt, strict=True):
        assert sorted(mine.flatten().tolist()) == sorted(other.flatten().tolist())
        assert len({*map(len, map(set, mine.tolist()))}) == 1


@pytest.mark.parametrize("how", GROUPED)
def test_each_layer_is_grouped_by_its_own_weights_or_activations(settings, how):
    ways = settings.but(grouping=how, split_seed=3)
    n_shared = ways.sizes(64)[1]
    layers = [*ffns(teacher.teacher(Store(), settings).model)]
    parts = zip(
        layers,
        expert_partitions.activations(Store(), settings),
        expert_partitions.neurons(Store(), settings),
        expert_partitions.neurons(Store(), ways),
        strict=True,
    )
    for layer, h, dealt, grouped in parts:
        own = dealt[:, n_shared:].T.flatten()
        rows = layer.up.weight.detach()[own] if how == "kmeans-weights" else h.T[own]
        if how == "coactivation":
            labels = partition.partition_graph(partition.coactivation(rows.T > 0), 4)
        else:
            points = rows.double() / rows.double().norm(dim=1, keepdim=True)
            labels = partition.balanced_kmeans(points.numpy(), 4, seed=3)
        found = [{*hand[n_shared:]} for hand in grouped.tolist()]
        assert found == [{*own[labels == e].tolist()} for e in range(4)]


@pytest.mark.parametrize("how", GROUPED)
def test_where_all_is_shared_there_is_nothing_to_group(settings, how):
    shared = settings.but(expert_size=16, n_shared=16)
    grouped = expert_partitions.neurons(Store(), shared.but(grouping=how))
    assert torch.equal(grouped, expert_partitions.neurons(Store(), shared))


def test_the_converted_model_holds_them_and_says_so(settings):
    grouped = settings.but(grouping="coactivation")
    model = student.converted(Store(), grouped)
    held = torch.stack([layer.neurons for layer in moe_layers(model)])
    assert torch.equal(held, expert_partitions.neurons(Store(), grouped))


def test_activations_are_those_of_real_tokens(settings):
    found = expert_partitions.activations(Store(), settings)
    bundle, model = dataset.dataset(settings), teacher.teacher(Store(), settings).model
    rows = bundle.rows("train", settings.importance_examples, shuffle=True)["input_ids"][:]
    assert found.shape[:2] == (2, sum(map(len, rows)))
    seen = []
    first = next(ffns(model)).act
    hook = first.register_forward_hook(lambda _m, _i, h: seen.append(h[0].detach()))
    with torch.inference_mode():
        for row in sorted(rows, key=len):  # one by one, so there is no padding
            model(torch.tensor([row]))
    hook.remove()
    assert torch.allclose(torch.cat(seen), found[0], atol=1e-6)


def test_of_many_tokens_some_are_drawn_the_same_ones_in_each_layer(settings, monkeypatch):
    longer = settings.but(max_train_examples=96, importance_examples=96)  # two batches

    def drawn(most: int) -> torch.Tensor:
        expert_partitions._activations.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(expert_partitions, "TOKENS", most)
            return expert_partitions.activations(Store(), longer)

    whole, some = drawn(10**6), drawn(50)
    expert_partitions._activations.cache_clear()
    assert some.shape == (2, 50, 64) and not torch.equal(some, whole[:, :50])
    places = [
        (rows[:, None] == everywhere).all(-1).int().argmax(1).tolist()
        for rows, everywhere in zip(some, whole, strict=True)
    ]
    assert torch.equal(some[0], whole[0, places[0]]) and places[0] == places[1]
    assert places[0] == sorted({*places[0]})


def test_more_company_is_in_the_experts_of_the_coactivation_graph(settings):
    h = expert_partitions.activations(Store(), settings)
    graphs = [partition.coactivation(layer > 0) for layer in h]

    def within(how: str) -> float:
        total = 0.0
        neurons = expert_partitions.neurons(Store(), settings.but(grouping=how, n_shared=0))
        for graph, experts in zip(graphs, neurons.tolist(), strict=True):
            pairs = (pair for hand in experts for pair in itertools.combinations(hand, 2))
            total += sum(graph[pair] for pair in pairs)
        return total

    assert within("coactivation") > max(within("deal"), within("kmeans-weights"))


def test_keys_hold_what_a_grouping_depends_on_and_nothing_for_a_deal(settings):
    def key(**changes):
        return student.conversion_key(Store(), settings.but(**changes)).flat(origin=False)

    assert key() == key(split_seed=7) and "grouping.how" not in key()
    for how in GROUPED[:2]:
        assert key(grouping=how) != key(grouping=how, split_seed=7)
    assert key(grouping="coactivation") == key(grouping="coactivation", split_seed=7)
    assert len({str(key(grouping=how)) for how in get_args(Grouping)}) == 4


def test_a_grouping_is_made_once(settings, monkeypatch):
    one = expert_partitions.neurons(Store(), settings.but(grouping="coactivation"))
    monkeypatch.setattr(partition, "partition_graph", None)
    assert torch.equal(
        expert_partitions.neurons(Store(), settings.but(grouping="coactivation", seed=1)), one
    )


def test_an_unknown_grouping_names_the_nearest():
    with pytest.raises(UserError, match="grouping='kmeans': did you mean 'kmeans-weights'"):
        Settings.at("smoke", grouping="kmeans")


SIZES = dict(n_experts=4, expert_size=16, n_shared=8)


def test_an_assignment_converts_as_its_ranking_does(tiny_bert, tiny_batch):
    ranking, dense = random_ranking(2, 64, seed=0), tiny_bert()
    one = to_moebert(dense, ranking, **SIZES)
    two = to_moebert(dense, deal_layers(ranking, **SIZES), **SIZES)
    assert torch.equal(one(**tiny_batch()).logits, two(**tiny_batch()).logits)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda n: n[:, :3], r"shape \(2, 3, 16\) .*, expected \(2, 4, 16\)"),
        (lambda n: n + 40, "names neuron 79 or 40; expected 0..63"),
        (lambda n: n.index_fill(2, torch.tensor([15]), int(n[0, 0, 0])), "same neuron twice"),
        (lambda n: n.flip(-1), "the first n_shared=8 neurons differ between experts"),
    ],
)
def test_an_assignment_that_does_not_fit_is_refused(tiny_bert, spoil, said):
    neurons = deal_layers(torch.arange(64).expand(2, -1), **SIZES)
    with pytest.raises(ValueError, match=said):
        to_moebert(tiny_bert(), spoil(neurons), **SIZES)
