"""What Eq. 4's scores cost: an example at a time, the release's way, and in one backward.

(a) The loop makes one backward an example and reads the gradients of W1 and W2, as one would
write it. (b) The release asks autograd for each layer's W1 and W2 separately, which walks the
graph anew each time, 24 times an example for 12 layers. The library asks for no parameter's
gradient, once for all examples; what it does once a run, a digest of the weights, is not timed.

Before anything is timed, all ways must give the same scores. How much bfloat16 moves ranks is
measured too, since ranks decide which neurons an expert holds.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from moebert_lib.bench import harness
from moebert_lib.bench.harness import BASE, VOCAB, glue_like, zipf
from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.experiments.dataset import dataset
from moebert_lib.experiments.teacher import teacher
from moebert_lib.method.encoder_layouts import ffns
from moebert_lib.method.importance import ffn_importance, frozen, of_eq4, score_batch
from moebert_lib.model.accelerate import accelerate, accelerate_if_possible

Inputs = dict[str, Tensor]

LOOP, RELEASE = "per-example loop", "release"
PADDED, PACKED, HALF = "one backward, padded", "packed", "packed bf16"
FORWARD, FORWARD_PACKED = "forward alone, padded", "forward alone, packed"

REPEATS = 3  # a round takes most of a minute
SLOW = 2  # examples of (b) that are run; its time is scaled to the tokens of all

#: Largest difference of scores from (a)'s, as a part of a layer's highest score.
TOLERANCE = {HALF: 0.1}

#: How many times as fast, on a CPU in float32. Scoring may cost 3.3 forward passes: 0.303.
WISHES: list[harness.Wish] = [
    (setting, variant, against, wanted)
    for setting in ("32 x 64", "GLUE-like")
    for variant, against, wanted in (
        (PACKED, LOOP, 2.2),
        (HALF, LOOP, None),
        (PACKED, RELEASE, None),
        (PACKED, PADDED, None),
        (PACKED, FORWARD, 0.303),
        (PACKED, FORWARD_PACKED, 0.303),
    )
]


def settings(vocab: int = VOCAB, *, scale: int = 1) -> dict[str, Inputs]:
    """The batches, with labels: 32 sentences of 64 tokens, and 32 of GLUE-like lengths.

    Args:
        vocab: Number of token ids.
        scale: Divides sentences and lengths; for tests.
    """
    n = 32 // scale
    full = zipf(vocab, n=n, length=64 // scale)
    full["attention_mask"] = torch.ones_like(full["input_ids"])
    batches = {"32 x 64": full, "GLUE-like": glue_like(vocab, n=n, longest=128 // scale)}
    return {name: {**batch, "labels": torch.arange(n) % 2} for name, batch in batches.items()}


def per_example(model: nn.Module, batch: Inputs) -> Tensor:
    """(a): Eq. 4 from the gradients of all parameters, one backward an example; ``(L, B, F)``."""
    rows = []
    for example in _alone(batch):
        model.zero_grad()
        model(**example).loss.backward()
        weights = [(w1, w1.grad, w2, w2.grad) for w1, w2 in _weights(model)]
        rows.append(torch.stack([_eq4(*one) for one in weights]))
    model.zero_grad()
    return torch.stack(rows, 1)


def release(model: nn.Module, batch: Inputs) -> Tensor:
    """(b): Eq. 4 as released, a walk through the retained graph for every W1 and every W2.

    Source: the release's ``modeling_bert.py``, which does so while it runs each example.
    """
    rows = []
    for example in _alone(batch):
        loss, row = model(**example).loss, []
        for w1, w2 in _weights(model):
            (g1,) = torch.autograd.grad(loss, w1, retain_graph=True)
            (g2,) = torch.autograd.grad(loss, w2, retain_graph=True)
            row.append(_eq4(w1, g1, w2, g2))
        rows.append(torch.stack(row))
    return torch.stack(rows, 1)


def _alone(batch: Inputs) -> Iterator[Inputs]:
    """Each example of a batch by itself, trimmed to its own length."""
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        yield {
            name: x[i : i + 1, :length] if x.dim() > 1 else x[i : i + 1]
            for name, x in batch.items()
        }


def _weights(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """W1 and W2 of each layer, as ``nn.Linear`` holds them: ``(F, D)`` and ``(D, F)``."""
    return [(layer.up.weight, layer.down.weight) for layer in ffns(model)]


def _eq4(w1: Tensor, g1: Tensor, w2: Tensor, g2: Tensor) -> Tensor:
    return ((w1 * g1).sum(1) + (w2 * g2).sum(0)).abs().detach()


def few(batch: Inputs, n: int = SLOW) -> tuple[Inputs, float]:
    """The examples whose lengths are nearest the mean, and how many times their tokens all have."""
    lengths = batch["attention_mask"].sum(1)
    chosen = (lengths - lengths.double().mean()).abs().argsort(stable=True)[:n].sort().values
    factor = float(lengths.sum() / lengths[chosen].sum())
    return {name: x[chosen] for name, x in batch.items()}, factor


def calls(model: nn.Module, batch: Inputs) -> dict[str, Callable[[], Tensor]]:
    """All that is timed, by variant; (b) on :func:`few` examples."""
    faster = accelerate(model)

    def scored(model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        with frozen(model):
            return score_batch(model, batch, {"scores": of_eq4}, dtype=dtype)["scores"]

    @torch.inference_mode()
    def forward(model: nn.Module) -> Tensor:
        return model(**batch).logits

    return {
        LOOP: partial(per_example, model, batch),
        RELEASE: partial(release, model, few(batch)[0]),
        PADDED: partial(scored, model),
        PACKED: partial(scored, faster),
        HALF: partial(scored, faster, torch.bfloat16),
        FORWARD: partial(forward, model),
        FORWARD_PACKED: partial(forward, faster),
    }


def agree(found: Mapping[str, Tensor], batch: Inputs) -> None:
    """Refuse scores that are not those of (a).

    Raises:
        UserError: a variant's scores are further away than :data:`TOLERANCE`.
    """
    few_of_all = (batch["input_ids"][None] == few(batch)[0]["input_ids"][:, None]).all(-1)
    for name in (RELEASE, PADDED, PACKED, HALF):
        slow = found[LOOP] if name != RELEASE else found[LOOP][:, few_of_all.int().argmax(1)]
        apart = (found[name] - slow).abs().amax((1, 2)) / slow.amax((1, 2))
        limit = TOLERANCE.get(name, 1e-4)
        if not float(apart.max()) <= limit:  # NaN too
            raise UserError(
                f"the scores of '{name}' are {float(apart.max()):.2g} of the highest "
                f"one away from those of '{LOOP}' (at most {limit}); nothing is "
                "timed that scores differently"
            )


def measure(
    shape: dict[str, int] = BASE, *, repeats: int | None = None, scale: int = 1
) -> Iterator[pd.DataFrame]:
    """Time every way to score a batch, in float32 on random weights.

    Args:
        shape: BERT's sizes.
        repeats: Timed rounds; 3 unless given.
        scale: As :func:`settings`.

    Yields:
        Of each setting a frame as :func:`bench.time_interleaved`'s, with ``setting``.

    Raises:
        UserError: the ways do not agree.
    """
    model = harness.models(shape, only=("dense",))["dense"]
    for setting, batch in settings(shape.get("vocab_size", VOCAB), scale=scale).items():
        print(f"· {setting}", flush=True)
        look = partial(agree, batch=batch)
        timings = harness.time_interleaved(
            calls(model, batch), repeats=repeats or REPEATS, look=look
        )
        timings.loc[timings["variant"] == RELEASE, "seconds"] *= few(batch)[1]
        yield timings.assign(setting=setting)


def rank_error(model: nn.Module, batches: Iterable[Inputs]) -> pd.DataFrame:
    """How much bfloat16 changes scores and ranks, with a sixth of the neurons shared, as the paper.

    Returns:
        A row a layer: ``shared``, the part of the shared set that stays in it; ``kept``, the
        same of the half of all neurons that any of 4 experts holds; ``spearman``, the ranks'
        correlation; ``error``, the median relative error of a score.
    """
    batches, model = list(batches), accelerate_if_possible(model)
    exact = ffn_importance(model, batches)
    half = ffn_importance(model, batches, dtype=torch.bfloat16)
    F, rows = exact.scores.shape[1], []
    for layer, (one, other) in enumerate(zip(exact.scores, half.scores, strict=True)):
        tops = {}
        for name, size in (("shared", F // 6), ("kept", F // 2)):
            both = torch.isin(exact.ranking[layer, :size], half.ranking[layer, :size])
            tops[name] = both.double().mean().item()
        error = ((other - one).abs() / one).median().item()
        rows.append(
            {"layer": layer, **tops, "spearman": spearmanr(one, other).statistic, "error": error}
        )
    return pd.DataFrame(rows)


def teacher_rank_error(scale: str = "quick", *, n_examples: int = 256) -> pd.DataFrame:
    """:func:`rank_error` of a scale's fine-tuned model, which is trained if it is not there."""
    at = Settings.at(scale)
    batches = dataset(at).batches("train", batch_size=32, limit=n_examples, shuffle=True)
    return rank_error(teacher(at).model, batches)


def main(
    *,
    repeats: int | None = None,
    out: Path | None = None,
    shape: dict[str, int] = BASE,
    scale: str = "quick",
) -> bool:
    """``moebert bench importance``: compare, time, print, keep the record as JSON.

    Args:
        repeats: Timed rounds; 3 unless given.
        out: The file to write instead of one under ``runs/``.
        shape: BERT's sizes.
        scale: Whose fine-tuned model the error of bfloat16 is measured on.

    Returns:
        Whether all was measured; False after Ctrl-C.
    """
    moved = _said_rank_error(scale)
    conditions = harness.prepare()
    print(
        f"BERT with hidden size {shape['hidden_size']} and {shape['num_hidden_layers']} layers, "
        f"{torch.get_num_threads()} threads, {repeats or REPEATS} interleaved rounds; "
        f"'{RELEASE}' on {SLOW} sentences, scaled by tokens",
        flush=True,
    )
    timings, complete = harness.gather(measure(shape, repeats=repeats))
    limits = {name: FORWARD_PACKED for name in (PADDED, PACKED, HALF)}
    table = harness.summary(timings, against=LOOP, limits=limits, units=32)
    targets = harness.judge(timings, WISHES)
    harness.show(table)
    harness.say(targets)
    harness.keep(
        "importance",
        timings,
        table,
        targets=targets,
        out=out,
        conditions=conditions,
        complete=complete,
        shape=shape,
        release_examples=SLOW,
        rank_error_scale=scale,
        rank_error=moved.to_dict("records"),
    )
    return complete


def _said_rank_error(scale: str) -> pd.DataFrame:
    """:func:`teacher_rank_error`, printed; empty where that model's weights are not there."""
    try:
        moved = teacher_rank_error(scale)
    except UserError as error:
        print(f"the error of bfloat16 is not measured: {error}", flush=True)
        return pd.DataFrame()
    print(
        f"bfloat16 beside float32, the fine-tuned model of scale {scale}: the part of shared and\n"
        "kept neurons that stay so, rank correlation, median relative error of a score"
    )
    print(moved.round(4).to_string(index=False), flush=True)
    return moved
