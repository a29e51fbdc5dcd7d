"""How fast: models timed side by side, interleaved, in one process.

Every repetition times each variant once, in turn, so drift of the machine hits all alike;
a ratio is the median of the repetitions' own ratios. Weights are random: speed does not
depend on them.
"""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from moebert_lib.modeling import MoEBertConfig, MoEBertForSequenceClassification
from moebert_lib.routing import random_table
from moebert_lib.settings import home
from moebert_lib.store import commit, machine, versions, write_json

#: BERT-base, the model of Fig. 4.
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072}  # fmt: skip
#: Two small layers: for tests.
TINY_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 64, "vocab_size": 99}  # fmt: skip


def models(shape: dict[str, int], *, seed: int = 0) -> dict[str, nn.Module]:
    """The variants of Fig. 4 and the limit, in eval mode, with random weights.

    ``dense`` is BERT; ``half depth`` has DistilBERT's shape (every other layer gone);
    ``equal FLOPs`` is BERT with an FFN as narrow as one expert, which no MoE of one active
    expert can beat by routing alone; the other two are MoEBERT, 4 experts of a quarter.
    """
    torch.manual_seed(seed)
    width, n_layers = shape["intermediate_size"], shape["num_hidden_layers"]
    dense = {
        "dense": shape,
        "equal FLOPs": {**shape, "intermediate_size": width // 4},
        "half depth": {**shape, "num_hidden_layers": n_layers // 2},
    }
    built = {
        name: BertForSequenceClassification(BertConfig(**kind)).eval()
        for name, kind in dense.items()
    }
    for routing in ("hash-random", "gate-sentence"):
        config = MoEBertConfig(
            **shape, expert_size=width // 4, n_shared=width // 6, routing=routing
        )
        model = MoEBertForSequenceClassification(config).eval()
        for index, layer in enumerate(model.bert.encoder.layer):
            if routing == "hash-random":
                table = random_table(config.vocab_size, 4, seed=index)
                layer.output.router.tid2eid.copy_(table.view(-1, 1))
        built[f"moebert {routing}"] = model
    return built


@torch.inference_mode()
def time_interleaved(calls: dict[str, Callable[[], Any]], *, repeats: int) -> pd.DataFrame:
    """Seconds of each call in every repetition, after one untimed round.

    Returns:
        Columns ``variant``, ``repeat``, ``seconds``.
    """
    for call in calls.values():
        call()
    rows = []
    for repeat in range(repeats):
        for variant, call in calls.items():
            start = time.perf_counter()
            call()
            _wait()
            rows.append((variant, repeat, time.perf_counter() - start))
    return pd.DataFrame(rows, columns=["variant", "repeat", "seconds"])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def inference(
    shape: dict[str, int] = BASE,
    *,
    batch: int = 1,
    length: int = 128,
    repeats: int = 11,
    built: dict[str, nn.Module] | None = None,
) -> pd.DataFrame:
    """Time a forward pass of every variant on the same random sentences, without padding.

    Args:
        shape: BERT's sizes.
        batch: Sentences at once (Fig. 4: 1).
        length: Tokens in each (Fig. 4: at most 128).
        repeats: Timed rounds.
        built: From :func:`models`, to time them again without building them again.

    Returns:
        As :func:`time_interleaved`.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = shape.get("vocab_size", BertConfig().vocab_size)
    ids = torch.randint(vocab, (batch, length), generator=generator)
    built = models(shape) if built is None else built
    return time_interleaved(
        {name: (lambda m=model: m(input_ids=ids)) for name, model in built.items()},
        repeats=repeats,
    )


def summary(timings: pd.DataFrame, *, against: str = "dense", units: int = 1) -> pd.DataFrame:
    """Per variant: units a second, and speed relative to one of them.

    Args:
        timings: From :func:`time_interleaved`.
        against: The variant whose speed is 1.
        units: Units (examples) in one call.

    Returns:
        One row a variant: ``median_ms``, ``low_ms``, ``high_ms`` (quartiles), ``per_second``,
        and ``ratio`` with its quartiles ``ratio_low``, ``ratio_high``: the median of the
        ratios within each repetition.
    """
    wide = timings.pivot(index="repeat", columns="variant", values="seconds")
    rows = []
    for variant in timings["variant"].unique():
        seconds, ratio = wide[variant], wide[against] / wide[variant]
        low, middle, high = seconds.quantile([0.25, 0.5, 0.75]) * 1000
        ratio_low, ratio_middle, ratio_high = ratio.quantile([0.25, 0.5, 0.75])
        rows.append({
            "variant": variant, "median_ms": middle, "low_ms": low, "high_ms": high,
            "per_second": units / (middle / 1000), "ratio": ratio_middle,
            "ratio_low": ratio_low, "ratio_high": ratio_high,
        })  # fmt: skip
    return pd.DataFrame(rows)


def main(*, batch: int = 1, length: int = 128, repeats: int = 11) -> None:
    """``moebert bench inference``: time, print the table, keep it as JSON under ``runs/``."""
    print(f"BERT-base shape, batch {batch}, {length} tokens, {repeats} interleaved rounds")
    timings = inference(batch=batch, length=length, repeats=repeats)
    table = summary(timings, units=batch)
    print(table.round(2).to_string(index=False))
    keep("inference", timings, table, batch=batch, length=length)


def keep(what: str, timings: pd.DataFrame, table: pd.DataFrame, **about: Any) -> Path:
    """Write a benchmark's timings and summary to ``runs/bench-<what>-<time>.json``; say where."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    path = home() / "runs" / f"bench-{what}-{created.replace(':', '')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "what": what, "created": created, **about, "machine": machine(), "versions": versions(),
        "commit": commit(), "summary": json.loads(table.to_json(orient="records")),
        "timings": json.loads(timings.to_json(orient="records")),
    })  # fmt: skip
    print(f"kept in {path}")
    return path
