"""What a teacher loses when neurons are silenced: does importance (Eq. 4) predict harm?

The same share of neurons is removed in every layer at once, in three orders or by other scores
(``scores``), without any training. The scores come from the split that ``importance_split``
names, the losses from validation. Not in the paper, which tests importance through the experts
it makes (Fig. 3a).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebert_lib import archive, experiment, scorings
from moebert_lib.adapters import ffns
from moebert_lib.evaluate import faster, predict
from moebert_lib.experts import random_ranking
from moebert_lib.scores import SCORES
from moebert_lib.settings import Settings
from moebert_lib.store import Entry, code_digest
from moebert_lib.teachers import FORWARD

FRACTIONS = (0.25, 0.5, 0.75, 0.875)  # of every layer's neurons
LEAST = "least important first"
#: Scores whose removal is not among the three orders.
OTHERS = [kind for kind in SCORES if kind not in ("importance", "random")]


@contextmanager
def without(model: nn.Module, neurons: Sequence[Tensor]) -> Iterator[None]:
    """Run a dense encoder with neurons cut out of its layers; whole again after the block.

    The same as zeros in their columns and rows, only faster: the matrices are smaller.

    Args:
        model: With or without a head.
        neurons: For each layer the indices to leave out: ``(L, n)``, int64, or ``L`` tensors.
    """
    parts = [(layer.up, layer.down) for layer in ffns(model)]
    whole = [(up.weight.data, up.bias.data, down.weight.data) for up, down in parts]
    try:
        for (up, down), gone in zip(parts, neurons, strict=True):
            kept = torch.ones_like(up.bias.data, dtype=torch.bool)
            kept[gone] = False
            up.weight.data, up.bias.data = up.weight.data[kept], up.bias.data[kept]
            down.weight.data = down.weight.data[:, kept]
        yield
    finally:
        for (up, down), (weight, bias, down_weight) in zip(parts, whole, strict=True):
            up.weight.data, up.bias.data, down.weight.data = weight, bias, down_weight


def orders(ranking: Tensor, n_random: int) -> list[tuple[str, int, Tensor]]:
    """The orders of removal: name, number of the draw, neurons ``(L, F)``, first to go first.

    Args:
        ranking: Neurons of each layer, most important first, ``(L, F)``.
        n_random: Random orders, drawn with seeds ``0 .. n_random - 1``.
    """
    drawn = [
        ("random", seed, random_ranking(*ranking.shape, seed=seed)) for seed in range(n_random)
    ]
    least, most = (LEAST, 0), ("most important first", 0)
    return [(*least, ranking.flip(-1)), *drawn, (*most, ranking)]


def curves(settings: Settings, *, n_examples: int) -> pd.DataFrame:
    """Task metrics and loss as neurons are removed; from the store or computed now.

    Args:
        settings: The experiment; ``n_random_splits`` random orders are tried.
        n_examples: At most that many validation examples, the same for every point.

    Returns:
        One row for each ``order``, ``draw`` and ``fraction`` removed (0 to 1), with the
        task's metrics (0 to 1), the mean ``loss``, and ``guessing``: the headline metric of
        always answering the label most frequent in training (NaN for regression).
    """

    def build(folder: Path) -> dict:
        ranking = experiment.importance(settings).ranking
        rows = _measure(settings, n_examples, orders(ranking, settings.n_random_splits))
        return _keep(rows, n_examples, folder)

    key = {
        "importance": experiment.importance_key(settings),
        "fractions": FRACTIONS,
        "n_examples": n_examples,
        "n_random": settings.n_random_splits,
        "code": _code(),
    }
    return _read("removal curves", archive.store().make("removal", key, build))


def by_score(settings: Settings, *, n_examples: int) -> pd.DataFrame:
    """:func:`curves` by each of :data:`scores.SCORES`, the neurons of the lowest score first.

    Those of importance and the random draws are :func:`curves`' own; the others come from the
    store or are computed now.

    Args:
        settings: The experiment.
        n_examples: As for :func:`curves`.

    Returns:
        The columns of :func:`curves`; ``order`` is the score's name.
    """

    def build(folder: Path) -> dict:
        found = scorings.scorings(settings)
        tried = [(kind, 0, lowest_first(found[kind])) for kind in OTHERS]
        return _keep(_measure(settings, n_examples, tried), n_examples, folder)

    key = {
        "scores": scorings.scorings_key(settings),
        "fractions": FRACTIONS,
        "n_examples": n_examples,
        "code": _code(),
    }
    own = curves(settings, n_examples=n_examples).replace({"order": {LEAST: "importance"}})
    others = _read("removal by score", archive.store().make("score_removal", key, build))
    return pd.concat([own[own["order"].isin(SCORES)], others], ignore_index=True)


def lowest_first(scores: Tensor) -> Tensor:
    """Neurons of each layer by rising score, ``(L, F)`` to ``(L, F)``, int64."""
    return scores.argsort(dim=-1, descending=True, stable=True).flip(-1)


def _code() -> str:
    return code_digest("removal", "experts", "evaluate", *FORWARD)


def _keep(rows: pd.DataFrame, n_examples: int, folder: Path) -> dict:
    rows.to_csv(folder / "curves.csv", index=False)
    return {"n_examples": n_examples, "points": len(rows)}


def _read(name: str, entry: Entry) -> pd.DataFrame:
    print(f"· {name}: {'reused' if entry.reused else f'made in {entry.seconds:.0f} s'}")
    return pd.read_csv(entry.folder / "curves.csv")


def _measure(
    settings: Settings, n_examples: int, tried: Sequence[tuple[str, int, Tensor]]
) -> pd.DataFrame:
    """The rows of :func:`curves` for some of :func:`orders`."""
    bundle, model = experiment.dataset(settings), experiment.teacher(settings).model
    guess = bundle.guessing(n_examples)

    def row(name: str, draw: int, fraction: float, neurons: Tensor) -> dict:
        batches = bundle.batches(
            "validation", batch_size=settings.eval_batch_size, limit=n_examples
        )
        with without(model, neurons):
            logits = predict(faster(model), batches)  # made here: it rearranges these weights
        metrics = bundle.score(logits, limit=n_examples)
        loss = _loss(logits, bundle.rows("validation", n_examples))
        about = {"order": name, "draw": draw, "fraction": fraction}
        return {**about, **metrics, "loss": loss, "guessing": guess}

    n_layers, width = tried[0][2].shape
    whole = row("", 0, 0.0, torch.empty(n_layers, 0, dtype=torch.int64))
    rows = []
    for name, draw, neurons in tried:
        rows.append({**whole, "order": name, "draw": draw})
        rows += [row(name, draw, part, neurons[:, : round(part * width)]) for part in FRACTIONS]
        print(f"· removal, {name} {draw + 1 if name == 'random' else ''}".rstrip(), flush=True)
    return pd.DataFrame(rows)


def _loss(logits: np.ndarray, rows) -> float:
    """Mean loss of predictions: cross-entropy, of start and end for spans; or squared error."""
    predicted = torch.as_tensor(logits)
    if predicted.dim() == 3:  # (n, 2, T)
        ends = (torch.as_tensor(rows[f"{end}_positions"][:]) for end in ("start", "end"))
        both = [F.cross_entropy(predicted[:, k], place) for k, place in enumerate(ends)]
        return float(sum(both) / 2)
    truth = torch.as_tensor(rows["labels"][:])
    if predicted.shape[1] == 1:
        return float(F.mse_loss(predicted[:, 0], truth.to(predicted)))
    return float(F.cross_entropy(predicted, truth))
