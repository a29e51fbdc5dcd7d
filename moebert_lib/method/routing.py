"""Routing: which expert serves each token, and experts applied to their tokens (Sec. 2, Eqs. 1-3).

The paper's four routers under the release's names, and one beyond the paper, a hash by clusters
of words. In the paper each token has one expert; a gate may choose the ``k`` most probable ones.
A hash router looks the token id up in a table that is drawn once and saved with the model. A gate
is a small linear layer that is trained with the model. All routers have one signature: states
``(B, T, D)``, token ids and mask ``(B, T)``; or of a packed batch ``(1, N, D)``, ``(1, N)`` and
its ``Packing``.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
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


class Gate(nn.Module):
    """Eq. 3: a trained linear layer whose softmax gives the probability of each expert.

    Nothing in Eq. 3 keeps a gate from sending everything to one expert. Three remedies against
    this collapse act while it is trained. At inference none of them does: each row, a token or a
    sentence, goes to its most probable expert, whatever else is in the batch.

    Args:
        hidden_size: Width of a state ``D``.
        n_experts: Number of experts ``E``.
        top_k: Experts that serve each row.
        noise: Standard deviation of Gaussian noise on the logits, from torch's own generator
            (noisy top-k gating, Shazeer et al. 2017; a fixed deviation, as here, in V-MoE,
            Riquelme et al. 2021, with ``1 / E``).
        capacity: Each expert takes at most ``ceil(capacity * n / E)`` of a batch's ``n`` real
            rows (:func:`within_capacity`); None: any number.
        assignment: ``argmax``, or ``balanced`` (:func:`balanced_assignment`).
    """

    def __init__(
        self,
        hidden_size: int,
        n_experts: int,
        top_k: int = 1,
        *,
        noise: float = 0.0,
        capacity: float | None = None,
        assignment: str = "argmax",
    ):
        super().__init__()
        self.top_k, self.noise, self.capacity = top_k, noise, capacity
        self.assignment = assignment
        self.gate = nn.Linear(hidden_size, n_experts, bias=False)  # W_g

    def choose(self, states: Tensor, real: Tensor | None = None) -> Route:
        """The route of each row.

        Args:
            states: Shape ``(n, D)``.
            real: Which rows are no padding, ``(n,)``, bool; None: all. Padding takes no place.
        """
        logits = self.gate(states)  # (n, E)
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        route = gate_route(logits, self.top_k)
        if not self.training or (self.capacity is None and self.assignment == "argmax"):
            return route
        rows = torch.arange(len(logits), device=logits.device)
        rows = rows if real is None else rows[real]
        limited = self._limited(logits.detach()[rows].log_softmax(-1))
        experts = route.experts.index_copy(0, rows, limited[:, None])
        return Route(experts, route.probabilities.gather(-1, experts), route.probabilities)

    def _limited(self, scores: Tensor) -> Tensor:
        n, n_experts = scores.shape
        if self.assignment == "balanced":
            return balanced_assignment(scores)
        return within_capacity(scores, math.ceil(self.capacity * n / n_experts))


class TokenGate(Gate):
    """``gate-token``: Eq. 3 for each token, its ``top_k`` most probable experts."""

    def forward(
        self, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | Packing | None
    ) -> Route:
        all_real = mask is None or isinstance(mask, Packing)
        real = None if all_real else mask.reshape(-1).bool()
        return self.choose(hidden.flatten(0, 1), real)


class SentenceGate(Gate):
    """``gate-sentence``: Eq. 3 on the mean token state; the whole sentence goes together.

    The mean leaves padding out, so a sentence's route does not depend on its batch.
    """

    def forward(
        self, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | Packing | None
    ) -> Route:
        if isinstance(mask, Packing):
            route = self.choose(mask.means(hidden[0]))  # of B sentences
            # for tokens; as an index its gradient would not be deterministic
            return Route(*(F.embedding(mask.sentence, rows) for rows in route))
        B, T, _ = hidden.shape
        real = hidden.new_ones(B, T) if mask is None else mask.to(hidden.dtype)
        total = (hidden * real[..., None]).sum(1)  # (B, D)
        mean = total / real.sum(1, keepdim=True).clamp(min=1)
        route = self.choose(mean)
        return Route(*(rows[:, None].expand(B, T, -1).flatten(0, 1) for rows in route))


#: The gates by their names.
GATES: dict[str, type[Gate]] = {"gate-token": TokenGate, "gate-sentence": SentenceGate}


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


def within_capacity(scores: Tensor, capacity: int) -> Tensor:
    """The most probable expert of each row that still has room for it.

    Every row asks its first choice; an expert that too many ask takes those with the highest
    scores. Rows that were refused ask their next choice, and so on, so that no row goes without
    an expert ("No-Token-Left-Behind", Fedus et al. 2022, appendix B; the highest scores first as
    in Riquelme et al. 2021). Switch Transformers as published leave such a row its residual alone.

    Args:
        scores: A gate's probabilities or their logarithms, ``(n, E)``.
        capacity: Rows that an expert may have, at least ``n / E``.

    Returns:
        Shape ``(n,)``, int64.
    """
    n, n_experts = scores.shape
    expert_of = torch.full((n,), -1, device=scores.device)
    room = [capacity] * n_experts
    choices = scores.argsort(dim=-1, descending=True, stable=True)  # (n, E)
    for choice in choices.T:  # first choices, then second choices, ...
        for expert in range(n_experts):
            asking = ((choice == expert) & (expert_of < 0)).nonzero()[:, 0]
            best_first = scores[asking, expert].argsort(descending=True, stable=True)
            taken = asking[best_first[: room[expert]]]
            expert_of[taken] = expert
            room[expert] -= len(taken)
    return expert_of


#: Rows for each expert that are assigned together. The time grows faster than the square of their
#: number: 512 rows to four experts take 0.03 s on a CPU, 4,000 would take 3 to 18 s.
ASSIGNED_TOGETHER = 128


def balanced_assignment(scores: Tensor) -> Tensor:
    """The assignment with the largest total score that gives all experts equally many rows.

    BASE layers (Lewis et al. 2021) assign so while they train. Where the rows cannot be divided
    evenly, some experts have one row more, whichever gives the largest total. Many rows are
    assigned in parts of :data:`ASSIGNED_TOGETHER` for each expert, in their order.

    Logits and log-probabilities give the same assignment: they differ by a constant in each row.

    Args:
        scores: A gate's logits, ``(n, E)``.

    Returns:
        Shape ``(n,)``, int64.
    """
    parts = scores.split(ASSIGNED_TOGETHER * scores.shape[1])
    return torch.cat([_assigned(part) for part in parts])


def _assigned(scores: Tensor) -> Tensor:
    n, n_experts = scores.shape
    each, over = divmod(n, n_experts)
    # An expert has ``each`` places that must be filled and one more that may stay empty: rows of
    # score 0, which can take such a last place only, fill those that no real row takes.
    places = np.repeat(scores.double().cpu().numpy(), each + 1, axis=1)  # (n, E * (each + 1))
    empty = np.tile([-np.inf] * each + [0.0], (n_experts - over, n_experts))
    _, place_of = linear_sum_assignment(np.concatenate([places, empty]), maximize=True)
    return torch.from_numpy(place_of[:n] // (each + 1)).to(scores.device)


def expert_directions(up: Tensor) -> Tensor:
    """Rows of a gate without any training: the mean weights of each expert's own neurons.

    Eq. 3's logit is then the mean of what these neurons compute before their bias and activation.
    MoEfication's selection by similarity (Zhang et al. 2022) uses the same centres of parameters,
    and CMoE (Pei et al. 2025) the neuron nearest to the centre of each expert.

    Args:
        up: First layer of each expert without the shared neurons, ``(E, K - s, D)``.

    Returns:
        Shape ``(E, D)``.
    """
    return up.mean(1)


def fit_gate(states: Tensor, experts: Tensor, n_experts: int, *, decay: float = 1e-3) -> Tensor:
    """Rows of a gate that predict given experts: multinomial logistic regression without a bias.

    MoEfication (Zhang et al. 2022) and D2DMoE (Szatkowski et al. 2024) train small networks to
    predict which experts contribute most; with a linear gate the problem is convex.

    Args:
        states: Shape ``(n, D)``.
        experts: The right expert of each, ``(n,)``, int64.
        n_experts: Number of experts ``E``.
        decay: Weight of the squared norm of the rows.

    Returns:
        Shape ``(E, D)``.
    """
    states = states.double()
    rows = states.new_zeros(n_experts, states.shape[1]).requires_grad_()
    solver = torch.optim.LBFGS([rows], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(states @ rows.T, experts) + decay * rows.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return rows.detach()


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


def balance_loss(
    route: Route, mask: Tensor | Packing | None = None, *, over: str = "tokens"
) -> Tensor:
    """Load-balance penalty of a gate: ``E * sum_e f_e P_e``, 1 when perfectly even.

    ``f`` is the share of tokens whose most probable expert it is, before any limit, and ``P`` the
    mean probability it was given (Switch Transformer's auxiliary loss, which the release uses;
    the paper names none).

    Args:
        route: Of a gate.
        mask: 1 for real tokens, ``(B, T)``, or their packing; None: every row is real.
        over: ``tokens``, which all count alike, so that a long sentence weighs more; or
            ``sentences``, which all count alike, as in the release's sentence gate.

    Raises:
        ValueError: the route came from a hash, which has nothing to train.
    """
    p = route.probabilities
    if p is None:
        raise ValueError("a hash route has no probabilities to balance")
    n_experts, k = p.shape[-1], route.experts.shape[-1]
    weight = _weights_of_rows(len(p), mask, over).to(p)  # (N,), sum 1
    favourites = F.one_hot(p.topk(k).indices, n_experts).sum(1).to(p)  # (N, E)
    f, P = weight @ favourites / k, weight @ p  # (E,)
    return n_experts * (f * P).sum()


def _weights_of_rows(n: int, mask: Tensor | Packing | None, over: str) -> Tensor:
    """The weight of each row in a mean over tokens or over sentences, ``(n,)``; 0 for padding."""
    if mask is None:  # all rows are real, and all sentences of one length
        return torch.full((n,), 1 / n, dtype=torch.float64)
    if isinstance(mask, Packing):
        lengths = torch.bincount(mask.sentence, minlength=mask.shape[0])
        real, length = torch.ones_like(mask.sentence), lengths[mask.sentence]
    else:
        real = mask.bool().reshape(-1)
        length = mask.bool().sum(1, keepdim=True).expand_as(mask).reshape(-1)
    weight = real.double() / (length.clamp(min=1) if over == "sentences" else 1)
    return weight / weight.sum()
