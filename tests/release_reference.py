"""The released code's formulas, written slowly and plainly: a second opinion on preset release.

One module for each expert, one token or sentence at a time. Embeddings, attention and heads
are the dense model's own, since the release leaves them as they are; nothing of this library is
used. The sentence gate is that of batches of two and more: the release takes another path for a
batch of one, which leaves the gate's probability out.
"""

import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Expert(nn.Module):
    """Two linear layers, residual, and a LayerNorm of its own: ``LN(fc2(act(fc1 x)) + x)``."""

    def __init__(self, layer: nn.Module, neurons: list[int]):
        super().__init__()
        up, down, width = layer.intermediate.dense, layer.output.dense, len(neurons)
        self.fc1 = nn.Linear(up.in_features, width, dtype=up.weight.dtype)
        self.fc2 = nn.Linear(width, up.in_features, dtype=up.weight.dtype)
        for j, neuron in enumerate(neurons):
            self.fc1.weight.data[j] = up.weight.data[neuron]
            self.fc1.bias.data[j] = up.bias.data[neuron]
            self.fc2.weight.data[:, j] = down.weight.data[:, neuron]
        self.fc2.bias.data = down.bias.data.clone()
        self.dropout = nn.Dropout(layer.output.dropout.p)
        self.norm = copy.deepcopy(layer.output.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.fc2(F.gelu(self.fc1(x)))) + x)


def split(ranking: list[int], *, n_experts: int, expert_size: int, n_shared: int):
    """Neurons of each expert: the shared ones, then every ``n_experts``-th of the others."""
    shared, rest = ranking[:n_shared], ranking[n_shared:]
    return [(shared + rest[e::n_experts])[:expert_size] for e in range(n_experts)]


class ReleasedModel(nn.Module):
    """A dense BERT whose FFNs became experts, as the release computes it.

    Args:
        dense: The fine-tuned model, for classification, regression or spans.
        ranking: ``(L, F)``, most important neuron first.
        routing: The release's name of the router.
        routers: For each layer a table ``(vocab,)`` or a gate's weight ``(E, D)``.
        sizes: ``n_experts``, ``expert_size``, ``n_shared``.
    """

    def __init__(self, dense: nn.Module, ranking: Tensor, routing: str, routers: list, **sizes):
        super().__init__()
        self.dense, self.routing = copy.deepcopy(dense), routing
        self.dense.set_attn_implementation("eager")
        self.layers = nn.ModuleList()
        for layer, order in zip(dense.bert.encoder.layer, ranking.tolist(), strict=True):
            hands = split(order, **sizes)
            self.layers.append(nn.ModuleList(Expert(layer, hand) for hand in hands))
        if routing.startswith("hash"):
            self.tables = routers
        else:
            self.gates = nn.ParameterList(routers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **targets) -> SimpleNamespace:
        """Hidden states, logits (of start and end for spans), balance loss and task loss."""
        bert = self.dense.bert
        x = bert.embeddings(input_ids)
        padding = (1 - attention_mask[:, None, None, :]).to(x.dtype) * -1e9
        states, balance = [x], torch.zeros((), dtype=x.dtype)
        for index, layer in enumerate(bert.encoder.layer):
            x = layer.attention(x, padding)[0]
            x, penalty = self._serve(index, x, input_ids, attention_mask)
            states.append(x)
            balance = balance + penalty
        out = SimpleNamespace(states=states, balance=balance, **self._head(x))
        out.task = task_loss(out, **targets)
        return out

    def _serve(self, index: int, x: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        experts = self.layers[index]
        if self.routing.startswith("hash"):
            table = self.tables[index]
            rows = [
                [experts[table[token]](state) for token, state in zip(*row, strict=True)]
                for row in zip(ids.tolist(), x, strict=True)
            ]
            return _stacked(rows), torch.zeros((), dtype=x.dtype)
        if self.routing == "gate-token":
            p = (x @ self.gates[index].T).softmax(-1)  # (B, T, E)
            best = p.argmax(-1)
            rows = [
                [experts[best[b, t]](x[b, t]) * p[b, t].max() for t in range(x.shape[1])]
                for b in range(len(x))
            ]
            return _stacked(rows), balance_loss(p.flatten(0, 1), best.flatten())
        return self._serve_sentences(index, x, mask)

    def _serve_sentences(self, index: int, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) == 1:
            raise ValueError("the release takes another path for a batch of one")
        means = [state[real.bool()].mean(0) for state, real in zip(x, mask, strict=True)]
        p = (torch.stack(means) @ self.gates[index].T).softmax(-1)  # (B, E)
        best = p.argmax(-1)
        served = [self.layers[index][best[b]](x[b]) * p[b].max() for b in range(len(x))]
        return torch.stack(served), balance_loss(p, best)

    def _head(self, x: Tensor) -> dict[str, Tensor]:
        if hasattr(self.dense, "qa_outputs"):
            start, end = self.dense.qa_outputs(x).unbind(-1)
            return {"start": start, "end": end}
        return {"logits": self.dense.classifier(self.dense.bert.pooler(x))}


def _stacked(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row) for row in rows])


def balance_loss(p: Tensor, best: Tensor) -> Tensor:
    """``E * sum_e f_e P_e`` over all rows of ``p``: share sent to, and mean probability of."""
    n_experts = p.shape[-1]
    return n_experts * sum(
        (best == e).to(p.dtype).mean() * p[:, e].mean() for e in range(n_experts)
    )


def task_loss(out: SimpleNamespace, labels=None, start_positions=None, end_positions=None):
    """Cross-entropy, squared error for a single logit, or the mean of start's and end's."""
    if labels is None:
        both = F.cross_entropy(out.start, start_positions), F.cross_entropy(out.end, end_positions)
        return sum(both) / 2
    if out.logits.shape[-1] == 1:
        return ((out.logits[:, 0] - labels) ** 2).mean()
    return F.cross_entropy(out.logits, labels)


def hidden_loss(states: list[Tensor], other: list[Tensor]) -> Tensor:
    """Plain MSE of each state, embeddings and padding included, summed."""
    return sum(((x - y) ** 2).mean() for x, y in zip(states, other, strict=True))


def symmetric_kl(logits: Tensor, other: Tensor) -> Tensor:
    """``0.5 * sum((p - q) (log p - log q)) / B``."""
    p, q = logits.softmax(-1), other.softmax(-1)
    return 0.5 * ((p - q) * (p.log() - q.log())).sum() / len(p)


def prediction_loss(out: SimpleNamespace, teacher) -> Tensor:
    """Between our output and a dense transformers model's."""
    if hasattr(out, "start"):
        start = symmetric_kl(out.start, teacher.start_logits)
        return (start + symmetric_kl(out.end, teacher.end_logits)) / 2
    if out.logits.shape[-1] == 1:
        return ((out.logits - teacher.logits) ** 2).mean()
    return symmetric_kl(out.logits, teacher.logits)
