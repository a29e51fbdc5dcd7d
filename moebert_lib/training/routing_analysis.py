"""Routing analysis: loads of experts, gate probabilities, a sentence's experts, best routing."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moebert_lib.data.batching import without_targets
from moebert_lib.method.routing import Route, SentenceGate, fit_gate, loads
from moebert_lib.model.moe_layer import MoEOutput, moe_layers, record_routes
from moebert_lib.training.evaluation import predict, state_distances


def expert_loads(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> np.ndarray:
    """Share of the real tokens that each expert serves; padding is left out.

    Args:
        model: A MoEBERT model.
        batches: From ``batching.batches``.

    Returns:
        Shape ``(L, E)``; rows sum to 1.
    """
    layers, mask = _routes(model, batches)
    n_experts = model.config.n_experts
    shares = [loads(torch.cat([r.experts for r in layer]), n_experts, mask) for layer in layers]
    return torch.stack(shares).cpu().numpy()


def mean_factor(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """Eq. 3's ``p`` of the chosen expert averaged over real tokens and layers; 1 for a hash.

    With several experts a token, their ``p`` are added.
    """
    layers, mask = _routes(model, batches)
    weights = [torch.cat([route.weights for route in layer])[mask] for layer in layers]
    return float(torch.stack([p.sum(1).mean() for p in weights]).mean())


def factors(models: Iterable[nn.Module], batches: Iterable[dict[str, Tensor]]) -> pd.DataFrame:
    """:func:`mean_factor` of each model, as column ``p``."""
    batches = list(batches)
    return pd.DataFrame({"p": [mean_factor(model, batches) for model in models]})


def count(models: Mapping[str, nn.Module], batches: Iterable[dict[str, Tensor]]) -> pd.DataFrame:
    """:func:`expert_loads` of each model, as :func:`load_frame`'s rows."""
    batches = list(batches)
    return load_frame({name: expert_loads(model, batches) for name, model in models.items()})


def _routes(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> tuple[list, Tensor]:
    batches = list(batches)
    with record_routes(model) as layers:
        predict(model, batches)
    return layers, torch.cat([batch["attention_mask"].flatten() for batch in batches]).bool()


class Ways(NamedTuple):
    """The experts that serve a sentence in several models."""

    tokens: list[str]  #: the ``T`` tokens; words that the vocabulary lacks are in pieces
    experts: dict[str, np.ndarray]  #: model's name to the expert of each token, ``(T, L)``
    cut: bool  #: whether the sentence was longer than ``max_length``


@torch.inference_mode()
def sentence_ways(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    max_length: int = 512,
) -> Ways:
    """The expert of each of a sentence's tokens in each layer; one pass through each model.

    Args:
        models: By name, MoEBERT models with one vocabulary.
        tokenizer: Theirs.
        text: The sentence.
        max_length: Tokens that are read; a longer sentence is cut.
    """
    inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
    cut = any(encoding.overflowing for encoding in inputs.encodings or ())
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    experts = {}
    for name, model in models.items():
        with record_routes(model) as layers:
            model.eval().base_model(**inputs.to(next(model.parameters()).device))
        first = [layer[0].experts[:, :1] for layer in layers]  # L times (T, 1)
        experts[name] = torch.cat(first, dim=1).cpu().numpy()
    return Ways(tokens, experts, cut)


def follow(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_length: int,
) -> pd.DataFrame:
    """:func:`sentence_ways`, as :func:`way_frame`'s rows."""
    way = sentence_ways(models, tokenizer, text, max_length=max_length)
    return way_frame(way.tokens, way.experts)


def load_frame(shares: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Loads by router as one row per ``router``, ``layer`` and ``expert``, counted from 1."""
    rows = [
        (router, layer + 1, expert + 1, float(share))
        for router, table in shares.items()
        for (layer, expert), share in np.ndenumerate(table)
    ]
    return pd.DataFrame(rows, columns=["router", "layer", "expert", "share"])


def shares(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Loads by router, ``(L, E)``, from :func:`load_frame`'s rows."""
    return {
        router: rows.pivot(index="layer", columns="expert", values="share").to_numpy()
        for router, rows in frame.groupby("router", sort=False)
    }


def way_frame(tokens: Sequence[str], ways: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Ways by router as one row per ``router``, ``layer`` and token, counted from 1."""
    rows = [
        (router, layer + 1, place + 1, tokens[place], int(expert) + 1)
        for router, experts in ways.items()
        for (place, layer), expert in np.ndenumerate(experts)
    ]
    return pd.DataFrame(rows, columns=["router", "layer", "position", "token", "expert"])


def ways(frame: pd.DataFrame) -> tuple[list[str], dict[str, np.ndarray]]:
    """The tokens, and ways by router, ``(T, L)``, from :func:`way_frame`'s rows."""
    parts = frame.groupby("router", sort=False)
    experts = {
        router: rows.pivot(index="position", columns="layer", values="expert").to_numpy() - 1
        for router, rows in parts
    }
    first = frame[frame["router"] == frame["router"].iloc[0]].drop_duplicates("position")
    return first.sort_values("position")["token"].tolist(), experts


def busiest(shares: Mapping[str, np.ndarray]) -> pd.Series:
    """Load of the busiest expert over the mean load, in each router's least even layer."""
    return pd.Series({name: float((t.max(1) / t.mean(1)).max()) for name, t in shares.items()})


class Evenness(NamedTuple):
    """How evenly a model uses its experts, as means over its layers."""

    busiest: float  #: load of the busiest expert over the mean load: 1 if even, E if it takes all
    entropy: float  #: of the loads, over log E: 1 if even, 0 if one expert takes all


def evenness(shares: np.ndarray) -> Evenness:
    """How far a router has collapsed, from the loads of its experts, ``(L, E)``."""
    n_experts = shares.shape[1]
    logs = np.log(np.where(shares > 0, shares, 1.0))
    entropy = -(shares * logs).sum(1).mean()
    most = np.log(n_experts) if n_experts > 1 else 1.0
    return Evenness(n_experts * float(shares.max(1).mean()), float(entropy / most))


# The best routing of given experts, in hindsight. Layer by layer, every token goes to the expert
# whose output is nearest to the dense teacher's state. This needs the teacher's states of the input
# that is to be predicted, so it can be measured but not used. It is greedy: the nearest state need
# not be the best one for later layers or for the answer, so it is not a strict bound on a metric.


class Oracle(nn.Module):
    """A MoEBERT routed in hindsight, with the inputs and outputs of the model.

    Args:
        model: A MoEBERT with one expert a token. It and the teacher are put into eval mode.
        teacher: The dense model it came from.

    Raises:
        ValueError: no expert layers, or several experts a token.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module):
        super().__init__()
        layers = moe_layers(model)
        if not layers or any(layer.top_k != 1 for layer in layers):
            raise ValueError(
                "an oracle chooses one expert a token; expected a MoEBERT with "
                "num_experts_per_tok=1"
            )
        self.model, self.teacher = model, teacher
        self.eval()

    def forward(self, **batch: Tensor | bool):
        """The model's output for a batch; the teacher's states are computed first."""
        targets = self.teacher(**{**batch, "output_hidden_states": True}).hidden_states[1:]
        with hindsight(self.model, targets):
            return self.model(**batch)


@contextmanager
def hindsight(
    model: nn.Module, targets: Sequence[Tensor], *, whole: bool = False
) -> Iterator[None]:
    """Inside the block each token goes to the expert nearest to its target.

    Args:
        model: A MoEBERT, not accelerated.
        targets: The states wanted after each layer, ``(B, T, D)``.
        whole: Take each expert's output whole, with p = 1 as behind a hash, also behind a gate.
    """
    hooks = []
    for layer, target in zip(moe_layers(model), targets, strict=True):

        def reroute(_module, args, route, layer=layer, target=target) -> Route:
            route = route._replace(probabilities=None) if whole else route
            return nearest(layer, target, args[0], route)

        hooks.append(layer.router.register_forward_hook(reroute))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def nearest(layer: MoEOutput, target: Tensor, hidden: Tensor, route: Route) -> Route:
    """The route of each token to the expert whose output is nearest to its target.

    Behind a gate an expert's factor is its p (Eq. 3), as in training.

    Args:
        layer: With its experts; in eval mode.
        target: Wanted states, ``(B, T, D)``.
        hidden: The layer's input, ``(B, T, D)``.
        route: The router's.
    """
    distances = []
    for expert in range(layer.experts.num_experts):
        all_tokens = torch.full_like(route.experts, expert)
        state = layer.serve(hidden, _through(route, all_tokens))
        distances.append((state - target).square().sum(-1).flatten())  # (B*T,)
    return _through(route, torch.stack(distances, -1).argmin(-1, keepdim=True))


def _through(route: Route, experts: Tensor) -> Route:
    p = route.probabilities
    weights = torch.ones_like(route.weights) if p is None else p.gather(-1, experts)
    return Route(experts, weights, p)


@torch.no_grad()
def fit_gates(model: nn.Module, teacher: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
    """Set each gate to predict which expert comes nearest to the teacher, in place.

    The right expert of a token is that of :func:`hindsight`, with experts taken whole, and the
    right expert of a sentence is that of most of its tokens. ``routing.fit_gate`` then fits the
    gate of each layer to the states that it sees.

    Args:
        model: A MoEBERT with one expert a token behind gates.
        teacher: The dense model that it came from.
        batches: From ``batching.batches``.
    """
    layers, n_experts = moe_layers(model), model.config.n_experts
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]

    def keep(router: nn.Module, args: tuple, route: Route, *, rows: list) -> None:
        hidden, _, mask = args
        votes = F.one_hot(route.experts[:, 0], n_experts).view(*mask.shape, -1).to(hidden.dtype)
        real = mask.bool()
        if isinstance(router, SentenceGate):
            share = (real / real.sum(1, keepdim=True))[..., None].to(hidden.dtype)
            rows.append(((hidden * share).sum(1), (votes * share).sum(1)))
        else:
            rows.append((hidden[real], votes[real]))

    for batch in batches:
        inputs = without_targets(batch)
        targets = teacher.eval()(**inputs, output_hidden_states=True).hidden_states[1:]
        with hindsight(model.eval(), targets, whole=True):
            hooks = [
                layer.router.register_forward_hook(functools.partial(keep, rows=rows))
                for layer, rows in zip(layers, seen, strict=True)
            ]
            model(**inputs)
            for hook in hooks:
                hook.remove()
    for layer, rows in zip(layers, seen, strict=True):
        states, votes = (torch.cat(parts) for parts in zip(*rows, strict=True))
        weight = layer.router.gate.weight
        weight.copy_(fit_gate(states, votes.argmax(-1), n_experts))


def compare(models: Mapping[str, nn.Module], bundle: Any, **which: Any) -> pd.DataFrame:
    """Each model with its own router and with the oracle, and the teacher itself.

    Args:
        models: By name; ``teacher`` is the dense model that the others came from.
        bundle: A ``dataset.Dataset``; its task's metric is the score.
        which: Which of its examples, as for its ``batches``.

    Returns:
        A row for each ``model``, ``router`` (own or oracle) and ``layer``, from 0 for the
        embeddings: the ``distance`` to the teacher (Eq. 5's term), and the run's ``score``.
    """
    batches, rows = list(bundle.batches(**which)), []
    teacher = models["teacher"]
    for name, model in models.items():
        routed = {"own": model}
        if model is not teacher:
            routed["oracle"] = Oracle(model, teacher)
        for router, network in routed.items():
            logits = predict(network, batches)
            score = bundle.score(logits, which["split"], which.get("limit"))[bundle.task.metric]
            distances = state_distances(network, teacher, batches).tolist()
            rows += [(name, router, layer, x, score) for layer, x in enumerate(distances)]
    return pd.DataFrame(rows, columns=["model", "router", "layer", "distance", "score"])


def nearer(frame: pd.DataFrame) -> pd.Series:
    """By model, the share of the last layer's distance that the oracle saves."""
    last = frame[frame["layer"] == frame["layer"].max()]
    table = last.pivot(index="model", columns="router", values="distance")
    return (1 - table["oracle"] / table["own"]).dropna()  # the teacher has no oracle
