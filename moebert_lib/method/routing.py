"""Which expert each token goes to (Sec. 2, Eq. 2-3; Fig. 3c): one, or k behind a gate.

Four routers under the release's names, and one beyond the paper: a hash by clusters of words.
In the paper each token has one expert; a gate may ask for ``k`` of them, the most probable ones.
A hash router looks the token id up in a table drawn once and saved with the model; a gate is a
small linear layer trained with it. All share one signature, so a layer does not know which it
has: states ``(B, T, D)``, token ids and mask ``(B, T)``; or of a packed batch ``(1, N, D)``,
``(1, N)`` and its ``Packing``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebert_lib.data.batching import Packing

#: The paper's four, and with those that are not in it.
ROUTINGS = ("hash-random", "hash-balance", "gate-token", "gate-sentence")
ALL_ROUTINGS = (*ROUTINGS, "hash-cluster")


class Route(NamedTuple):
    """Where ``B * T`` tokens go, in the order of the flattened batch."""

    experts: Tensor  #: (B*T, k) int64, the chosen experts, most probable first; k = 1 in the paper
    weights: Tensor  #: (B*T, k), the factors on their outputs: Eq. 3's p, or 1 for a hash
    probabilities: Tensor | None  #: (B*T, E) the gate's distribution; None for a hash


class HashRouter(nn.Module):
    """Token id to expert through a table (hash layers; the paper's default).

    ``tid2eid`` has shape ``(vocab, 1)``, int64. It is a persistent buffer, so a saved model
    routes exactly as it did.
    """

    def __init__(self, table: Tensor):
        super().__init__()
        self.register_buffer("tid2eid", table.view(-1, 1).clone(), persistent=True)

    def forward(self, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Route:
        if input_ids is None:
            raise ValueError("hash routing needs input_ids; inputs_embeds alone name no token")
        experts = self.tid2eid[input_ids.reshape(-1)]  # (B*T, 1)
        return Route(experts, torch.ones_like(experts, dtype=hidden.dtype), None)


class RandomHash(HashRouter):
    """``hash-random``: every vocabulary entry gets an expert at random."""

    def __init__(self, vocab_size: int, n_experts: int, *, seed: int = 0):
        super().__init__(random_table(vocab_size, n_experts, seed=seed))


class BalancedHash(HashRouter):
    """``hash-balance``: entries are assigned so that the experts' loads are close.

    The seed places only tokens that never occur: where every token occurs, all layers of a
    model have the same table, unlike those of ``hash-random``.

    Args:
        frequencies: How often each token occurs in the training set, ``(vocab,)``.
        n_experts: Number of experts.
        seed: Order of the tokens that never occur.
    """

    def __init__(self, frequencies: Tensor, n_experts: int, *, seed: int = 0):
        super().__init__(balanced_table(frequencies, n_experts, seed=seed))


class ClusteredHash(HashRouter):
    """``hash-cluster``: words of one cluster of embeddings share an expert; beyond the paper.

    Args:
        embeddings: Of the vocabulary, ``(vocab, D)``.
        n_experts: Number of experts.
        seed: Of k-means.
    """

    def __init__(self, embeddings: Tensor, n_experts: int, *, seed: int = 0):
        super().__init__(clustered_table(embeddings, n_experts, seed=seed))


class TokenGate(nn.Module):
    """``gate-token``: Eq. 3 for each token, its ``top_k`` most probable experts."""

    def __init__(self, hidden_size: int, n_experts: int, top_k: int = 1):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden_size, n_experts, bias=False)  # W_g

    def forward(self, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Route:
        return _top(self.gate(hidden.flatten(0, 1)), self.top_k)


class SentenceGate(nn.Module):
    """``gate-sentence``: Eq. 3 on the mean token state; the whole sentence goes together.

    The mean leaves padding out, so a sentence's route does not depend on its batch.
    """

    def __init__(self, hidden_size: int, n_experts: int, top_k: int = 1):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden_size, n_experts, bias=False)

    def forward(
        self, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | Packing | None
    ) -> Route:
        if isinstance(mask, Packing):
            logits = self.gate(mask.means(hidden[0]))  # (B, E)
            rows = F.embedding(mask.sentence, logits)  # as an index it is not deterministic
            return _top(rows, self.top_k)
        B, T, _ = hidden.shape
        real = hidden.new_ones(B, T) if mask is None else mask.to(hidden.dtype)
        total = (hidden * real[..., None]).sum(1)  # (B, D)
        mean = total / real.sum(1, keepdim=True).clamp(min=1)
        logits = self.gate(mean)[:, None].expand(B, T, -1)
        return _top(logits.flatten(0, 1), self.top_k)  # of (B*T, E)


def _top(logits: Tensor, k: int) -> Route:
    """Eq. 3's ``k`` largest p as they are: all N of them sum to 1, fewer to less.

    To make the chosen ones sum to 1, as Mixtral does, would give p = 1 for the paper's one
    expert, and the gate no gradient.
    """
    probabilities = logits.softmax(-1)  # (B*T, E), Eq. 3
    best = probabilities.max(-1, keepdim=True) if k == 1 else probabilities.topk(k)
    weights, experts = best
    return Route(experts, weights, probabilities)


def random_table(vocab_size: int, n_experts: int, *, seed: int) -> Tensor:
    """Uniform random expert per vocabulary entry. Shape ``(vocab,)``, int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n_experts, (vocab_size,), generator=generator)


def balanced_table(frequencies: Tensor, n_experts: int, *, seed: int) -> Tensor:
    """Greedy balance: the most frequent token first, each to the least loaded expert.

    Tokens that never occur are spread evenly in a random order, since they too may come.

    Args:
        frequencies: Occurrences of each vocabulary entry, ``(vocab,)``, non-negative.
        n_experts: Number of experts.
        seed: Order of the tokens that never occur.

    Returns:
        Shape ``(vocab,)``, int64. Two experts' loads differ by at most the largest frequency.
    """
    table = torch.empty(len(frequencies), dtype=torch.int64)
    load = [0] * n_experts
    order = frequencies.argsort(descending=True, stable=True)
    seen = order[frequencies[order] > 0]
    for token in seen.tolist():
        expert = min(range(n_experts), key=load.__getitem__)
        table[token] = expert
        load[expert] += int(frequencies[token])
    unseen = order[len(seen) :]
    generator = torch.Generator().manual_seed(seed)
    shuffled = unseen[torch.randperm(len(unseen), generator=generator)]
    table[shuffled] = torch.arange(len(unseen)) % n_experts
    return table


def clustered_table(embeddings: Tensor, n_experts: int, *, seed: int) -> Tensor:
    """k-means over the words' embeddings; cluster ``e`` goes to expert ``e``.

    Nothing makes the clusters even, neither in words nor in how often these occur.

    Args:
        embeddings: One row for each vocabulary entry, ``(vocab, D)``.
        n_experts: Number of experts, and of clusters.
        seed: Of the first centres; another seed may end in other clusters.

    Returns:
        Shape ``(vocab,)``, int64.
    """
    from sklearn.cluster import KMeans  # here: it takes a second, and no other router needs it

    points = embeddings.detach().float().cpu().numpy()
    found = KMeans(n_experts, n_init=1, random_state=seed).fit(points)
    return torch.from_numpy(found.labels_).long()


def loads(experts: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
    """Share of the tokens each expert serves, ``(E,)``, summing to 1.

    Args:
        experts: Chosen experts, any shape, int64; of several a token, each counts alike.
        n_experts: Number of experts.
        mask: 1 for real tokens, 0 for padding; ``B*T`` elements.
    """
    if mask is not None:
        experts = experts.reshape(mask.numel(), -1)[mask.reshape(-1).bool()]
    chosen = experts.reshape(-1)
    return torch.bincount(chosen, minlength=n_experts).double() / max(len(chosen), 1)


def balance_loss(route: Route, mask: Tensor | None = None) -> Tensor:
    """Load-balance penalty of a gate: ``E * sum_e f_e P_e``, 1 when perfectly even.

    ``f`` is the share of tokens sent to each expert, ``P`` the mean probability it was given
    (Switch Transformer's auxiliary loss, which the release uses; the paper names none).

    Raises:
        ValueError: the route came from a hash, which has nothing to train.
    """
    if route.probabilities is None:
        raise ValueError("a hash route has no probabilities to balance")
    n_experts = route.probabilities.shape[-1]
    probabilities = route.probabilities
    if mask is not None:
        probabilities = probabilities[mask.reshape(-1).bool()]
    share = loads(route.experts, n_experts, mask).to(probabilities.dtype)
    return n_experts * (share * probabilities.mean(0)).sum()
