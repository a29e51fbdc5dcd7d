"""What routing could gain with given experts: the best one for each token, in hindsight.

Layer by layer, every token goes to the expert whose output is nearest to the dense teacher's
state of that token at that layer. It asks the teacher about the very input that is to be
predicted, so it can be measured and never used. And it is greedy: the nearest state is not the
best one for the layers above, nor for the answer, so it is no strict bound on a metric.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from moebert_lib.evaluate import predict, state_distances
from moebert_lib.moe_layer import MoEOutput, moe_layers
from moebert_lib.routing import Route


class Oracle(nn.Module):
    """A MoEBERT routed in hindsight; it takes and gives what the model does.

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
        """The model's output for a batch, whose states the teacher is asked for first."""
        targets = self.teacher(**{**batch, "output_hidden_states": True}).hidden_states[1:]
        with hindsight(self.model, targets):
            return self.model(**batch)


@contextmanager
def hindsight(model: nn.Module, targets: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block each token goes to the expert nearest to its target.

    Args:
        model: A MoEBERT, not accelerated.
        targets: Of each layer the wanted states after it, ``(B, T, D)``.
    """
    hooks = [
        layer.router.register_forward_hook(
            lambda _m, args, route, own=(layer, target): nearest(*own, args[0], route)
        )
        for layer, target in zip(moe_layers(model), targets, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def nearest(layer: MoEOutput, target: Tensor, hidden: Tensor, route: Route) -> Route:
    """The way of each token through the expert whose output is nearest to its target.

    An expert behind a gate keeps its own p (Eq. 3) as factor, as in training.

    Args:
        layer: With its experts; in eval mode.
        target: Wanted states, ``(B, T, D)``.
        hidden: The layer's input, ``(B, T, D)``.
        route: The router's own.
    """
    apart = []
    for expert in range(layer.experts.num_experts):
        every = torch.full_like(route.experts, expert)
        state = layer.serve(hidden, hidden, _through(route, every))
        apart.append((state - target).square().sum(-1).flatten())  # (B*T,)
    return _through(route, torch.stack(apart, -1).argmin(-1, keepdim=True))


def _through(route: Route, experts: Tensor) -> Route:
    p = route.probabilities
    weights = torch.ones_like(route.weights) if p is None else p.gather(-1, experts)
    return Route(experts, weights, p)


def compare(models: Mapping[str, nn.Module], bundle: Any, **which: Any) -> pd.DataFrame:
    """Each model by its own router and by the oracle, and the teacher itself.

    Args:
        models: By name; ``teacher`` is the dense model that the others came from.
        bundle: An ``inputs.Dataset``, whose task's metric is the score.
        which: Of its examples, as for its ``batches``.

    Returns:
        A row for each ``model``, ``router`` (own or oracle) and ``layer``, from 0 for the
        embeddings: the ``distance`` to the teacher (Eq. 5's term), and the run's ``score``.
    """
    batches, rows = list(bundle.batches(**which)), []
    teacher = models["teacher"]
    for name, model in models.items():
        ways = {"own": model}
        if model is not teacher:
            ways["oracle"] = Oracle(model, teacher)
        for router, way in ways.items():
            logits = predict(way, batches)
            reached = bundle.score(logits, which["split"], which.get("limit"))[bundle.task.metric]
            apart = state_distances(way, teacher, batches).tolist()
            rows += [(name, router, layer, x, reached) for layer, x in enumerate(apart)]
    return pd.DataFrame(rows, columns=["model", "router", "layer", "distance", "score"])


def nearer(frame: pd.DataFrame) -> pd.Series:
    """Of :func:`compare`'s rows, by model: the share of the last distance that the oracle saves."""
    last = frame[frame["layer"] == frame["layer"].max()]
    table = last.pivot(index="model", columns="router", values="distance")
    return (1 - table["oracle"] / table["own"]).dropna()  # the teacher has no oracle
