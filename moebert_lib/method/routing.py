"""Routing: which expert serves each token, and experts applied to their tokens (Sec. 2, Eqs. 1-3).

The paper's four routers under the release's names, and one beyond the paper, a hash by clusters
of words. In the paper each token has one expert; a gate may choose the ``k`` most probable ones.
A hash router looks the token id up in a table that is drawn once and saved with the model. A gate
is a small linear layer that is trained with the model. All routers have one signature: states
``(B, T, D)``, token ids and mask ``(B, T)``; or of a packed batch ``(1, N, D)``, ``(1, N)`` and
its ``Packing``.
"""

from collections.abc import Callable, Sequence
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


def experts_forward(
    A: Tensor,
    expert_of: Tensor,
    p: Tensor,
    W1: Sequence[Tensor],
    b1: Sequence[Tensor],
    W2: Sequence[Tensor],
    b2: Sequence[Tensor],
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Apply to each token the feed-forward network of its expert: ``x_t = p_t E_i(a_t)``.

    The tokens of an expert are gathered, pass through its two layers together, and go back to
    their places.

    Args:
        A: Tokens ``a_t``, ``(N, D)``.
        expert_of: The expert ``i`` of each token, ``(N,)``, int64.
        p: Factor on its output, ``(N, 1)``; 1 for a hash.
        W1: First layer of each expert, ``E`` times ``(K, D)``, as ``nn.Linear`` keeps weights.
        b1: Its bias, ``E`` times ``(K,)``.
        W2: Second layer, ``E`` times ``(D, K)``.
        b2: Its bias, ``E`` times ``(D,)``.
        act: Activation function.

    Returns:
        Shape ``(N, D)``, tokens in the order of ``A``.

    Source: Eq. 1 for each expert, and Eq. 2 with one expert a token.
    """
    order, places, counts = by_expert(expert_of, len(W1))
    gathered = A.index_select(0, order).split(counts)  # E times (n_e, D)
    X = []
    for A_e, w1, c1, w2, c2 in zip(gathered, W1, b1, W2, b2, strict=True):
        H = act(F.linear(A_e, w1, c1))  # (n_e, K), Eq. 1
        X.append(F.linear(H, w2, c2))  # (n_e, D)
    return torch.cat(X).index_select(0, places) * p  # (N, D), Eq. 2


def by_expert(expert_of: Tensor, n_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens sorted by expert.

    Args:
        expert_of: The expert of each token, ``(N,)``, int64.
        n_experts: Number of experts ``E``.

    Returns:
        The tokens in the order of their experts, ``(N,)``; each token's place in that order,
        ``(N,)``; and the number of each expert's tokens, a list of ``E``.
    """
    order = expert_of.argsort(stable=True)
    numbers = torch.arange(len(order), device=order.device)
    places = torch.empty_like(order).index_copy_(0, order, numbers)
    return order, places, torch.bincount(expert_of, minlength=n_experts).tolist()


class HashRouter(nn.Module):
    """``hash-...``: the expert of a token id stands in a table (hash layers; the paper's default).

    ``tid2eid`` has shape ``(vocab, 1)``, int64. It is a persistent buffer, so a saved model
    routes exactly as it did.

    Args:
        table: Of :func:`random_table`, :func:`balanced_table` or :func:`clustered_table`.
    """

    def __init__(self, table: Tensor):
        super().__init__()
        self.register_buffer("tid2eid", table.view(-1, 1).clone(), persistent=True)

    def forward(self, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Route:
        if input_ids is None:
            raise ValueError("hash routing needs input_ids; inputs_embeds alone name no token")
        experts = self.tid2eid[input_ids.reshape(-1)]  # (B*T, 1)
        return Route(experts, torch.ones_like(experts, dtype=hidden.dtype), None)

    @torch.no_grad()
    def resize(self, embeddings: Tensor, routing: str, n_experts: int, *, seed: int) -> None:
        """Cut the table, or give experts to new token ids; known ids keep theirs.

        Args:
            embeddings: Of the new vocabulary, ``(vocab, D)``.
            routing: The rule for new ids: ``hash-random``, ``hash-balance``, or ``hash-cluster``.
            n_experts: Number of experts.
            seed: Of random experts, and of the order of equals.
        """
        old, n_old, size = self.tid2eid[:, 0], len(self.tid2eid), len(embeddings)
        if routing == "hash-random":
            new = random_table(size, n_experts, seed=seed)[n_old:]
        elif routing == "hash-balance":  # none of them was ever counted
            counts = torch.zeros(max(size - n_old, 0), dtype=torch.int64)
            new = balanced_table(counts, n_experts, seed=seed)
        else:
            new = nearest_cluster(embeddings[n_old:], embeddings[:n_old], old[:size])
        self.tid2eid = torch.cat([old[:size], new.to(old)])[:, None]


class TokenGate(nn.Module):
    """``gate-token``: Eq. 3 for each token, its ``top_k`` most probable experts."""

    def __init__(self, hidden_size: int, n_experts: int, top_k: int = 1):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden_size, n_experts, bias=False)  # W_g

    def forward(self, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Route:
        return gate_route(self.gate(hidden.flatten(0, 1)), self.top_k)


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
            return gate_route(rows, self.top_k)
        B, T, _ = hidden.shape
        real = hidden.new_ones(B, T) if mask is None else mask.to(hidden.dtype)
        total = (hidden * real[..., None]).sum(1)  # (B, D)
        mean = total / real.sum(1, keepdim=True).clamp(min=1)
        logits = self.gate(mean)[:, None].expand(B, T, -1)
        return gate_route(logits.flatten(0, 1), self.top_k)  # of (B*T, E)


def gate_route(logits: Tensor, k: int) -> Route:
    """The ``k`` most probable experts, with their gate probabilities, not renormalised (Eq. 3).

    If the chosen probabilities were made to sum to 1, as Mixtral does, p would be 1 for the
    paper's one expert, and the gate would have no gradient.

    Args:
        logits: ``a_t W_g`` of each token, ``(B*T, E)``.
        k: Experts that serve each token.
    """
    probabilities = logits.softmax(-1)  # (B*T, E), Eq. 3
    best = probabilities.max(-1, keepdim=True) if k == 1 else probabilities.topk(k)
    weights, experts = best
    return Route(experts, weights, probabilities)


def random_table(vocab_size: int, n_experts: int, *, seed: int) -> Tensor:
    """``hash-random``: a uniformly random expert for each vocabulary entry, ``(vocab,)``, int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n_experts, (vocab_size,), generator=generator)


def balanced_table(frequencies: Tensor, n_experts: int, *, seed: int) -> Tensor:
    """``hash-balance``: the most frequent token first, each to the least loaded expert.

    Tokens that never occur are spread evenly in a random order, since they may occur later.
    Where every token occurs, the table does not depend on the seed.

    Args:
        frequencies: Occurrences of each vocabulary entry, ``(vocab,)``, non-negative integers.
        n_experts: Number of experts.
        seed: Order of the tokens that never occur.

    Returns:
        Shape ``(vocab,)``, int64. Two experts' loads differ by at most the largest frequency.
    """
    order = frequencies.argsort(descending=True, stable=True)  # token ids
    table, load = torch.empty_like(order), [0] * n_experts
    n_seen = int((frequencies > 0).sum())
    for token in order[:n_seen].tolist():
        expert = load.index(min(load))
        table[token] = expert
        load[expert] += int(frequencies[token])
    unseen, generator = order[n_seen:], torch.Generator().manual_seed(seed)
    shuffled = unseen[torch.randperm(len(unseen), generator=generator)]
    table[shuffled] = torch.arange(len(unseen)) % n_experts
    return table


def clustered_table(embeddings: Tensor, n_experts: int, *, seed: int) -> Tensor:
    """``hash-cluster``, beyond the paper: words of one cluster of embeddings share an expert.

    k-means; cluster ``e`` goes to expert ``e``. Clusters are not of one size, neither in words
    nor in how often these occur.

    Args:
        embeddings: One row for each vocabulary entry, ``(vocab, D)``.
        n_experts: Number of experts, and of clusters.
        seed: Of the first centres; another seed may end in other clusters.

    Returns:
        Shape ``(vocab,)``, int64.
    """
    from sklearn.cluster import KMeans  # here: it takes a second, and no other router needs it

    points = embeddings.detach().float().cpu().numpy()
    clusters = KMeans(n_experts, n_init=1, random_state=seed).fit(points)
    return torch.from_numpy(clusters.labels_).long()


def nearest_cluster(new: Tensor, known: Tensor, clusters: Tensor) -> Tensor:
    """The cluster with the nearest centre, of word embeddings that joined later: ``(n,)``, int64.

    Args:
        new: Embeddings ``(n, D)``.
        known: Embeddings of words that have a cluster, ``(m, D)``.
        clusters: The cluster of each, ``(m,)``.
    """
    used = clusters.unique()
    centres = [known[clusters == cluster].double().mean(0) for cluster in used]
    return used[torch.cdist(new.double(), torch.stack(centres)).argmin(1)]


def loads(experts: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
    """Share of the tokens that each expert serves, ``(E,)``, summing to 1.

    Args:
        experts: Chosen experts, any shape, int64; several of one token count alike.
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
