"""Remove neurons from a teacher, and measure how active each neuron is.

Removal tests whether importance (Eq. 4) predicts harm: the same share of neurons is removed in
every layer at once, in three orders or by other scores, without any training. The scores come from
the split that ``importance_split`` names, the losses from validation. This is not in the paper,
which tests importance through the experts it makes (Fig. 3a).
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moebert_lib.config.settings import Settings
from moebert_lib.data.batching import without_targets
from moebert_lib.experiments.dataset import dataset
from moebert_lib.experiments.stage_keys import made_with
from moebert_lib.experiments.teacher import (
    all_scores,
    importance,
    importance_key,
    scores_key,
    teacher,
)
from moebert_lib.method.encoder_layouts import ffns, watching
from moebert_lib.method.other_scores import SCORES, magnitudes
from moebert_lib.method.partition import random_ranking
from moebert_lib.model.accelerate import accelerate_if_exact
from moebert_lib.store.committed_results import AnyStore
from moebert_lib.store.store import Entry, StageKey
from moebert_lib.training.evaluation import predict

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


def removal_key(store: AnyStore, settings: Settings, n_examples: int) -> StageKey:
    """What :func:`removal_curves` depends on."""
    choices = {
        "importance": importance_key(store, settings),
        "fractions": FRACTIONS,
        "n_examples": n_examples,
        "n_random": settings.n_random_splits,
    }
    return StageKey("removal", choices, made_with(store, _remove_in_order))


def removal_curves(store: AnyStore, settings: Settings, *, n_examples: int) -> pd.DataFrame:
    """Task metrics and loss as neurons are removed; from the store or computed now.

    Args:
        store: Where the stages are, or will be.
        settings: The experiment; ``n_random_splits`` random orders are tried.
        n_examples: At most that many validation examples, the same for every point.

    Returns:
        One row for each ``order``, ``draw`` and ``fraction`` removed (0 to 1), with the
        task's metrics (0 to 1), the mean ``loss``, and ``guessing``: the headline metric of
        always answering the label most frequent in training (NaN for regression).
    """
    build = partial(_remove_in_order, store, settings, n_examples)
    return _read("removal curves", store.make(removal_key(store, settings, n_examples), build))


def _remove_in_order(store: AnyStore, settings: Settings, n_examples: int, folder: Path) -> dict:
    ranking = importance(store, settings).ranking
    tried = orders(ranking, settings.n_random_splits)
    return _measure(store, settings, n_examples, tried, folder)


def score_removal_key(store: AnyStore, settings: Settings, n_examples: int) -> StageKey:
    """What :func:`removal_by_score` depends on beyond :func:`removal_curves`."""
    choices = {
        "scores": scores_key(store, settings),
        "fractions": FRACTIONS,
        "n_examples": n_examples,
    }
    return StageKey("score_removal", choices, made_with(store, _remove_by_score))


def removal_by_score(store: AnyStore, settings: Settings, *, n_examples: int) -> pd.DataFrame:
    """:func:`removal_curves` by each of ``other_scores.SCORES``, lowest scores first.

    Importance and the random draws are taken from :func:`removal_curves`; the others come from
    the store or are computed now.

    Args:
        store: Where the stages are, or will be.
        settings: The experiment.
        n_examples: As for :func:`removal_curves`.

    Returns:
        The columns of :func:`removal_curves`; ``order`` is the score's name.
    """
    build = partial(_remove_by_score, store, settings, n_examples)
    by_order = removal_curves(store, settings, n_examples=n_examples)
    by_order = by_order.replace({"order": {LEAST: "importance"}})
    entry = store.make(score_removal_key(store, settings, n_examples), build)
    others = _read("removal by score", entry)
    return pd.concat([by_order[by_order["order"].isin(SCORES)], others], ignore_index=True)


def _remove_by_score(store: AnyStore, settings: Settings, n_examples: int, folder: Path) -> dict:
    scores = all_scores(store, settings)
    tried = []
    for kind in OTHERS:
        highest_first = scores[kind].argsort(dim=-1, descending=True, stable=True)
        tried.append((kind, 0, highest_first.flip(-1)))
    return _measure(store, settings, n_examples, tried, folder)


def _read(name: str, entry: Entry) -> pd.DataFrame:
    print(f"· {name}: {'reused' if entry.reused else f'made in {entry.seconds:.0f} s'}")
    return pd.read_csv(entry.folder / "curves.csv")


def _measure(
    store: AnyStore,
    settings: Settings,
    n_examples: int,
    tried: Sequence[tuple[str, int, Tensor]],
    folder: Path,
) -> dict:
    """Store the rows of :func:`removal_curves` for some of :func:`orders`."""
    bundle, model = dataset(settings), teacher(store, settings).model
    guess = bundle.guessing(n_examples)

    def row(name: str, draw: int, fraction: float, neurons: Tensor) -> dict:
        batches = bundle.batches(
            "validation", batch_size=settings.eval_batch_size, limit=n_examples
        )
        with without(model, neurons):
            logits = predict(
                accelerate_if_exact(model), batches
            )  # made here: it rearranges these weights
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
    pd.DataFrame(rows).to_csv(folder / "curves.csv", index=False)
    return {"n_examples": n_examples, "points": len(rows)}


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


# How active each neuron is, how large its weights are, and which tokens excite it most.
# One forward pass of the teacher over the scored examples. With activation ``h_tj`` of neuron
# ``j`` at token ``t``, two further scores stand beside Eq. 4's: the mean of ``|h_tj|`` over real
# tokens, and ``|w1_j| |w2_j|``, the norms of the neuron's column of W1 and row of W2. Neither knows
# the loss, and the paper uses neither: they show that being active or large is not being important.

EXAMPLES = 400  # at most; enough that most neurons meet something they answer to
TOP = 6  # examples kept for each neuron, at its best token of each


@dataclass(frozen=True)
class Excitation:
    """What one forward pass says of ``L`` layers of ``F`` neurons.

    Attributes:
        mean: Mean of ``|h|`` over real tokens, ``(L, F)``.
        magnitude: ``|w1| |w2|``, ``(L, F)``.
        top: Highest activation in each of the ``k`` examples that excite a neuron most,
            highest first, ``(L, F, k)``; ``k`` is at most :data:`TOP`.
        example: Which example that was, ``(L, F, k)``: a row of ``tokens``.
        token: And which of its tokens, ``(L, F, k)``.
        tokens: The examples as lists of word pieces.
    """

    mean: Tensor
    magnitude: Tensor
    top: Tensor
    example: Tensor
    token: Tensor
    tokens: list[list[str]]

    def contexts(self, layer: int, neuron: int, *, around: int = 6) -> list[tuple]:
        """The tokens that excite a neuron, each between what stands before and after it.

        Args:
            layer: Counted from 0.
            neuron: Counted from 0.
            around: Word pieces on either side.

        Returns:
            ``(activation, before, token, after)`` for each of the ``k`` examples.
        """
        contexts = []
        for value, row, place in zip(
            self.top[layer, neuron].tolist(),
            self.example[layer, neuron].tolist(),
            self.token[layer, neuron].tolist(),
            strict=True,
        ):
            pieces, end = self.tokens[row], place + 1
            while place > 0 and pieces[place].startswith("##"):
                place -= 1
            while end < len(pieces) and pieces[end].startswith("##"):
                end += 1  # a word is shown whole
            start = max(0, place - around)
            before = ("... " if start else "") + joined(pieces[start:place])
            after = joined(pieces[end : end + around])
            after += " ..." if end + around < len(pieces) else ""
            contexts.append((value, before, joined(pieces[place:end]), after))
        return contexts


def joined(pieces: list[str]) -> str:
    """Word pieces as text.

    Example:
        >>> joined(["the", "im", "##port", "works"])
        'the import works'
    """
    return " ".join(pieces).replace(" ##", "").removeprefix("##")


def excite(model: nn.Module, batches, *, top: int = TOP) -> dict[str, Tensor]:
    """The tensors of an :class:`Excitation`, whose examples are numbered by ``index``.

    Args:
        model: An encoder with dense feed-forward layers; used in eval mode.
        batches: From ``data.batches``.
        top: Examples to keep for each neuron; fewer where there are fewer.
    """
    layers, training = [*ffns(model)], model.training
    flows: dict[int, Tensor] = {}
    totals, n_tokens, best = [0] * len(layers), 0, [None] * len(layers)
    try:
        for batch in batches:
            with watching(model.eval(), flows.__setitem__), torch.inference_mode():
                model(**without_targets(batch))
            real = batch["attention_mask"].bool()[..., None]  # (B, T, 1)
            n_tokens += int(real.sum())
            for n, h in flows.items():  # (B, T, F)
                totals[n] = totals[n] + (h.abs() * real).sum((0, 1), dtype=torch.float64).cpu()
                best[n] = _merge(best[n], h.masked_fill(~real, -torch.inf), batch["index"], top)
    finally:
        model.train(training)
    value, example, token = (torch.stack(layers) for layers in zip(*best, strict=True))
    return {
        "mean": torch.stack(totals) / n_tokens,
        "magnitude": magnitudes(layers),
        "top": value,
        "example": example.int(),
        "token": token.short(),
    }


def _merge(best: tuple | None, h: Tensor, index: Tensor, top: int) -> tuple[Tensor, ...]:
    """The ``top`` examples so far, by each one's best token: three tensors ``(F, k)``."""
    value, token = (part.T.cpu() for part in h.max(1))  # (F, B)
    new = (value, index.cpu().expand_as(token), token)
    if best is not None:
        new = tuple(torch.cat(pair, -1) for pair in zip(best, new, strict=True))
    value, order = new[0].topk(min(top, new[0].shape[-1]))
    return value, new[1].gather(-1, order), new[2].gather(-1, order)


def excitation_key(store: AnyStore, settings: Settings) -> StageKey:
    """What :func:`excitation` depends on."""
    scored = importance_key(store, settings)
    choices = {"importance": scored, "examples": EXAMPLES, "top": TOP}
    return StageKey("excitation", choices, made_with(store, _excite))


def excitation(store: AnyStore, settings: Settings) -> Excitation:
    """How active the teacher's neurons are, from the store or measured now.

    The examples are the first :data:`EXAMPLES` of those that Eq. 4 was scored on.
    """
    entry = store.make(excitation_key(store, settings), partial(_excite, store, settings))
    print(f"· excitation for {settings.task}: {entry.origin}", flush=True)
    return read_excitation(entry.folder)


def _excite(store: AnyStore, settings: Settings, folder: Path) -> dict:
    dense, bundle = teacher(store, settings).model, dataset(settings)
    n = min(EXAMPLES, settings.importance_examples or EXAMPLES)
    rows = bundle.rows(settings.importance_split, n, shuffle=True)
    batches = bundle.batches(settings.importance_split, batch_size=32, limit=n, shuffle=True)
    save_file(excite(dense, batches), folder / "excitation.safetensors")
    pieces = [bundle.tokenizer.convert_ids_to_tokens(ids) for ids in rows["input_ids"][:]]
    (folder / "tokens.json").write_text(json.dumps(pieces), "utf-8")
    return {"n_examples": len(pieces)}


def read_excitation(folder: Path) -> Excitation:
    """The measurements in a stored entry's folder."""
    tokens = json.loads((folder / "tokens.json").read_text("utf-8"))
    return Excitation(**load_file(folder / "excitation.safetensors"), tokens=tokens)
