"""The neurons of each expert by setting: same neurons, other company; kept, and told apart."""

import itertools

import pytest
import torch

from moebert_lib import archive, constructions, experiment, groups
from moebert_lib.adapters import ffns
from moebert_lib.convert import to_moebert
from moebert_lib.experts import deal_layers, random_ranking
from moebert_lib.moe_layer import moe_layers
from moebert_lib.settings import Settings, UserError

GROUPED = groups.GROUPINGS[1:]


@pytest.fixture
def settings(moebert_home) -> Settings:
    return Settings.at("smoke")


@pytest.mark.parametrize("n_shared", [0, None])
@pytest.mark.parametrize("how", GROUPED)
def test_a_grouping_keeps_the_neurons_that_the_deal_keeps(settings, how, n_shared):
    dealt = constructions.neurons(settings.but(n_shared=n_shared))
    grouped = constructions.neurons(settings.but(n_shared=n_shared, grouping=how))
    assert grouped.shape == dealt.shape and not torch.equal(grouped, dealt)
    for mine, other in zip(grouped, dealt, strict=True):
        assert sorted(mine.flatten().tolist()) == sorted(other.flatten().tolist())
        assert len({*map(len, map(set, mine.tolist()))}) == 1


def test_the_converted_model_holds_them_and_says_so(settings):
    grouped = settings.but(grouping="coactivation")
    model = experiment.converted(grouped)
    held = torch.stack([layer.neurons for layer in moe_layers(model)])
    assert torch.equal(held, constructions.neurons(grouped))


def test_activations_are_those_of_real_tokens(settings):
    found = constructions.activations(settings)
    bundle, model = experiment.dataset(settings), experiment.teacher(settings).model
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


def test_more_company_is_in_the_experts_of_the_coactivation_graph(settings):
    h = constructions.activations(settings)
    graphs = [groups.coactivation(layer > 0) for layer in h]

    def within(how: str) -> float:
        total = 0.0
        neurons = constructions.neurons(settings.but(grouping=how, n_shared=0))
        for graph, experts in zip(graphs, neurons.tolist(), strict=True):
            pairs = (pair for hand in experts for pair in itertools.combinations(hand, 2))
            total += sum(graph[pair] for pair in pairs)
        return total

    assert within("coactivation") > max(within("deal"), within("kmeans-weights"))


def test_keys_hold_what_a_grouping_depends_on_and_nothing_for_a_deal(settings):
    def key(**changes):
        return archive.choices(experiment.conversion_key(settings.but(**changes)))

    assert key() == key(split_seed=7) and "grouping" not in key()
    for how in GROUPED[:2]:
        assert key(grouping=how) != key(grouping=how, split_seed=7)
    assert key(grouping="coactivation") == key(grouping="coactivation", split_seed=7)
    assert len({str(key(grouping=how)) for how in groups.GROUPINGS}) == 4


def test_a_grouping_is_made_once(settings, monkeypatch):
    one = constructions.neurons(settings.but(grouping="coactivation"))
    monkeypatch.setattr(groups, "partition", None)
    assert torch.equal(constructions.neurons(settings.but(grouping="coactivation", seed=1)), one)


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
