"""Excitation: means, magnitudes and best tokens against slow loops; kept in the store."""

import torch

from moebert_lib.config.settings import Settings
from moebert_lib.data import tasks
from moebert_lib.experiments import neuron_measurements
from moebert_lib.experiments.neuron_measurements import Excitation, excite
from moebert_lib.store.store import Store


def activations(model, batch):
    """Of every layer, ``(L, B, T, F)``, one example at a time and without its padding as NaN."""
    n, length = batch["input_ids"].shape
    found = torch.full((2, n, length, 64), torch.nan, dtype=torch.float64)
    for row in range(n):
        size = int(batch["attention_mask"][row].sum())
        one = {name: batch[name][row : row + 1, :size] for name in ("input_ids", "attention_mask")}
        states = model(**one, output_hidden_states=True, output_attentions=False)
        for layer, module in enumerate(model.bert.encoder.layer):
            seen = module.attention(states.hidden_states[layer])[0]
            found[layer, row, :size] = module.intermediate(seen)[0].detach()
    return found


def test_means_and_best_tokens_equal_a_slow_loop(tiny_bert, tiny_batch):
    model, batch = tiny_bert(), tiny_batch(n=9)
    halves = [
        {name: value[part] for name, value in batch.items()} | {"index": torch.arange(9)[part]}
        for part in (slice(0, 5), slice(5, 9))
    ]
    found = excite(model, halves, top=3)
    h = activations(model, batch)
    torch.testing.assert_close(found["mean"], h.abs().nanmean((1, 2)))
    best = h.nan_to_num(-torch.inf).amax(2)  # (L, B, F)
    torch.testing.assert_close(found["top"], best.topk(3, dim=1).values.transpose(1, 2))
    layer, neuron, k = 1, 17, 2
    example, token = (int(found[name][layer, neuron, k]) for name in ("example", "token"))
    assert torch.isclose(h[layer, example, token, neuron], found["top"][layer, neuron, k])


def test_padding_excites_nobody(tiny_bert, tiny_batch):
    batch = tiny_batch(n=8)
    found = excite(tiny_bert(), [{**batch, "index": torch.arange(8)}], top=8)
    lengths = batch["attention_mask"].sum(1)
    assert (found["token"] < lengths[found["example"].long()]).all()


def test_each_example_comes_once_and_the_strongest_first(tiny_bert, tiny_batch):
    batches = [{**tiny_batch(n=4, seed=s), "index": torch.arange(4) + 4 * s} for s in range(3)]
    found = excite(tiny_bert(), batches, top=6)
    assert (found["top"].diff(dim=-1) <= 0).all()
    assert all(len(set(row.tolist())) == 6 for row in found["example"].view(-1, 6))


def test_the_model_is_left_as_it_was(tiny_bert, tiny_batch):
    model = tiny_bert().train()
    excite(model, [{**tiny_batch(), "index": torch.arange(4)}])
    assert model.training
    assert not any(layer.intermediate._forward_hooks for layer in model.bert.encoder.layer)


def test_a_word_in_pieces_is_shown_whole_between_its_neighbours():
    one = torch.zeros(1, 1, 1)
    tokens = [["[CLS]", "an", "im", "##port", "##ance", "score", "is", "summed", "[SEP]"]]
    found = Excitation(one[0], one[0], one + 2.5, one.int(), one.short() + 3, tokens)
    assert found.contexts(0, 0, around=2) == [(2.5, "[CLS] an", "importance", "score is ...")]


def test_the_pass_is_made_once_over_scored_examples(moebert_home, capsys):
    settings = Settings.at("smoke")
    first = neuron_measurements.excitation(Store(), settings)
    assert len(first.tokens) == settings.importance_examples
    assert tasks.TASKS[settings.task] and first.mean.shape == (2, 64)
    again = neuron_measurements.excitation(Store(), settings)
    assert torch.equal(again.top, first.top) and again.tokens == first.tokens
    assert "excitation for library: reused" in capsys.readouterr().out


def test_what_is_shown_is_what_the_example_says(moebert_home):
    found = neuron_measurements.excitation(Store(), Settings.at("smoke"))
    for _, before, token, after in found.contexts(1, 9, around=100):
        text = " ".join(filter(None, (before, token, after)))
        assert text in [neuron_measurements.joined(pieces) for pieces in found.tokens]
