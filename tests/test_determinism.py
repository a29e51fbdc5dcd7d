"""Same seed, same machine, same threads: the same bits."""

import pytest
import torch

from moebert_lib.model.modeling import MoEBertConfig, MoEBertForSequenceClassification


@pytest.mark.parametrize("routing", ["hash-random", "gate-token"])
def test_gradients_are_the_same_bits_every_time(routing):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # where an index's gradient varies
    try:
        check_gradients(routing)
    finally:
        torch.set_num_threads(threads)


def check_gradients(routing):
    config = MoEBertConfig(
        vocab_size=99,
        hidden_size=384,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=256,
        n_experts=4,
        expert_size=64,
        n_shared=32,
        routing=routing,
    )
    model = MoEBertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(99, (32, 64)), "labels": torch.randint(2, (32,))}
    seen = []
    for _ in range(5):
        model.zero_grad()
        model(**batch).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        seen.append({name: grad.clone() for name, grad in grads.items()})
    assert all(torch.equal(one[name], seen[0][name]) for one in seen for name in one)
