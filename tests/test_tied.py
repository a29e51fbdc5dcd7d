"""Tied shared neurons: as copies until training, and one set of parameters ever after."""

import pytest
import torch

from moebert_lib.method.partition import random_ranking
from moebert_lib.method.routing import ROUTINGS
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.moe_layer import TiedExperts, moe_layers, parameter_counts
from moebert_lib.teaching import checks

RANKING = random_ranking(2, 64, seed=0)
SHARED = 8


@pytest.fixture
def pair(tiny_bert):
    """Maker of (copied, tied): conversions of one BERT that differ in nothing else."""

    def make(n_shared=SHARED, **changes):
        options = {"routing": "hash-random", "token_frequencies": torch.arange(99), **changes}
        sizes = dict(n_experts=4, expert_size=16, n_shared=n_shared, allow_identical=True)
        return tuple(
            to_moebert(tiny_bert(), RANKING, shared_neurons=how, **sizes, **options)
            for how in ("copied", "tied")
        )

    return make


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("norm", ["per-expert", "shared"])
def test_tied_and_copied_start_as_the_same_model(pair, tiny_batch, routing, norm):
    copied, tied = pair(routing=routing, expert_layer_norm=norm)
    batch = tiny_batch()
    assert torch.allclose(copied(**batch).logits, tied(**batch).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_shared", [0, 15, 16])
def test_none_nearly_all_and_all_may_be_tied(pair, tiny_batch, n_shared):
    copied, tied = pair(n_shared=n_shared)
    batch = tiny_batch()
    assert torch.allclose(copied(**batch).logits, tied(**batch).logits, rtol=0, atol=1e-12)
    checks.saving_changes_nothing(tied, batch)


def test_gradients_are_the_sum_over_the_copies(pair, tiny_batch):
    copied, tied = pair()
    for model in (copied, tied):
        model(**tiny_batch()).loss.backward()
    for one, all_of_it in zip(moe_layers(tied), moe_layers(copied), strict=True):
        own, copies = one.experts, all_of_it.experts
        for shared, rest, whole in (
            (own.shared_up.grad, own.own_up.grad, copies.up_proj.grad),
            (own.shared_up_bias.grad, own.own_up_bias.grad, copies.up_proj_bias.grad),
            (own.shared_down.grad.T, own.own_down.grad.mT, copies.down_proj.grad.mT),
        ):
            assert whole[:, :SHARED].abs().max() > 1e-4
            assert torch.allclose(shared, whole[:, :SHARED].sum(0), rtol=0, atol=1e-12)
            assert torch.allclose(rest, whole[:, SHARED:], rtol=0, atol=1e-12)


def test_training_moves_copies_apart_and_tied_neurons_together(pair, tiny_batch):
    copied, tied = pair()
    before = moe_layers(tied)[0].experts.shared_up.detach().clone()
    for model in (copied, tied):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for seed in range(3):
            optimiser.zero_grad()
            model(**tiny_batch(seed=seed)).loss.backward()
            optimiser.step()
    apart = spread(copied)
    assert min(apart) > 1e-3 and max(spread(tied)) == 0
    assert (moe_layers(tied)[0].experts.shared_up - before).abs().max() > 1e-3


@torch.no_grad()
def spread(model):
    """How far the shared neurons of two experts lie apart at most: layers times kinds."""
    found = []
    for layer in moe_layers(model):
        experts = layer.experts
        for whole in (experts.up_proj, experts.up_proj_bias, experts.down_proj.mT):
            shared = whole[:, :SHARED]
            found.append(float((shared - shared[:1]).abs().max()))
    return found


def test_shared_neurons_are_stored_once_and_used_as_before(pair):
    copied, tied = (parameter_counts(model) for model in pair())
    spared = 2 * (4 - 1) * SHARED * (32 + 1 + 32)  # layers, further experts, one neuron's size
    assert tied.effective == copied.effective
    assert tied.stored == copied.stored - spared


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_tied_model_is_saved_whole(pair, tiny_batch, routing):
    _, tied = pair(routing=routing)
    checks.saving_changes_nothing(tied, tiny_batch())
    assert all(isinstance(layer.experts, TiedExperts) for layer in moe_layers(tied))
    assert not any("up_proj" in name and "bias" not in name for name in tied.state_dict())


def test_other_implementations_serve_tied_experts_too(pair, tiny_batch):
    _, tied = pair()
    tied, batch = tied.float(), tiny_batch()
    loop = tied(**batch).logits
    for name in ("grouped_mm", "batched_mm"):
        tied.set_experts_implementation(name)
        output = tied(**batch)
        assert torch.allclose(output.logits, loop, atol=1e-5)
        output.loss.backward()
        assert moe_layers(tied)[0].experts.shared_up.grad.abs().max() > 0
        tied.zero_grad()
