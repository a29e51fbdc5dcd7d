"""How fast a sweep is: the same runs with one worker and with two, and all of it reused.

Whole commands are timed, Python's start included. Blocks of runs alternate between the two,
each in a home of its own, so drift of the machine hits both alike.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from moebert_lib.bench import harness
from moebert_lib.config.errors import CHECKOUT, UserError, home
from moebert_lib.config.presets import BASE
from moebert_lib.experiments.neuron_measurements import Excitation
from moebert_lib.explore import explorer, widgets
from moebert_lib.explore.explorer import COLUMNS, Explorer
from moebert_lib.explore.score_sources import EQ4, Source
from moebert_lib.model.modeling import MoEBertConfig, MoEBertForSequenceClassification
from moebert_lib.runs.cost import SHAPES
from moebert_lib.training.evaluation import planes

BLOCK = 10  # runs in one timed command
WORKERS = (1, 2)


def main(*, runs: int = 40, out: Path | None = None) -> None:
    """``moebert bench batch``: time, print the table, keep it as JSON under ``runs/``.

    Args:
        runs: Notebook runs at scale smoke in all, for each number of workers.
        out: The record's file.
    """
    conditions = harness.prepare()
    blocks = max(runs // BLOCK, 1)
    print(
        f"03_distillation at scale smoke, {blocks} interleaved blocks of {BLOCK} runs", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="moebert-bench-") as folder:
        homes = {n: _home(Path(folder) / f"{n}") for n in WORKERS}
        rows = []
        for block in range(blocks):
            for n, where in homes.items():
                seconds = _sweep(where, range(block * BLOCK, (block + 1) * BLOCK), workers=n)
                rows.append((_name(n), block, seconds))
                print(f"· block {block + 1}/{blocks}, {_name(n)}: {seconds:.1f} s", flush=True)
        reused = _sweep(homes[WORKERS[-1]], range(blocks * BLOCK), workers=WORKERS[-1])
    timings = pd.DataFrame(rows, columns=["variant", "repeat", "seconds"])
    table = harness.summary(timings, against=_name(WORKERS[0]), units=BLOCK)
    harness.show(table)
    print(f"{blocks * BLOCK} runs, all reused: {reused:.1f} s")
    harness.keep(
        "batch", timings, table, block=BLOCK, reused_seconds=reused, out=out, conditions=conditions
    )


def _name(workers: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}"


def _home(folder: Path) -> Path:
    folder.mkdir()
    (folder / "notebooks").symlink_to(home() / "notebooks", target_is_directory=True)
    return folder


def _sweep(where: Path, seeds: range, *, workers: int) -> float:
    """Seconds that a whole ``moebert sweep`` over these seeds takes."""
    grid = where / "grid.yaml"
    grid.write_text(f"scale: smoke\nseeds: {list(seeds)}\n")
    command = [sys.executable, "-m", "moebert_lib", "sweep", str(grid), "--workers", str(workers)]
    environment = {**os.environ, "MOEBERT_HOME": str(where)}
    environment["PYTHONPATH"] = str(CHECKOUT)
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"the sweep failed: {done.stderr.strip().splitlines()[-1:]}")
    return seconds


# How fast every widget redraws: from a control's move to the finished picture, in the kernel.
# The scores are made up, of real size: BERT-base's layers for importance and deals, MiniLM's shape
# with random weights for sentences. Speed does not depend on what they are. One thread, a screen of
# one dot for each pixel; the browser's own time is not in it (the tests in a browser wait for
# that).

LIMIT = 100  # milliseconds: what the eye takes for at once
L, F = 12, 3072  # BERT-base
SMALL = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)

Move = Callable[[int], None]  # the n-th move of a control, finished when it returns


def main_bench_widgets(*, repeats: int = 11, out: Path | None = None) -> None:
    """``moebert bench widgets``: time, print the table, keep it as JSON under ``runs/``."""
    conditions = harness.prepare()
    print(f"from a control's move to the finished picture, {repeats} moves each, one thread")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = measure(repeats=repeats)
    finally:
        torch.set_num_threads(threads)
    table = summary(timings)
    print(table.round(1).to_string(index=False))
    slow = table.loc[~table["within"], "widget"].tolist()
    print(f"over {LIMIT} ms: {', '.join(slow)}" if slow else f"all within {LIMIT} ms")
    harness.keep("widgets", timings, table, limit_ms=LIMIT, out=out, conditions=conditions)


def measure(*, repeats: int) -> pd.DataFrame:
    """Milliseconds of each move of every widget, after one untimed: ``widget``, ``ms``."""
    rows = []
    for name, make in WIDGETS.items():
        move = make()
        for n in range(repeats + 1):
            start = time.perf_counter()
            move(n)
            rows += [(name, 1000 * (time.perf_counter() - start))] if n else []
    return pd.DataFrame(rows, columns=["widget", "ms"])


def summary(timings: pd.DataFrame) -> pd.DataFrame:
    """Median and 90th percentile of each widget beside the limit, and whether both are within."""
    found = timings.groupby("widget", sort=False)["ms"].quantile([0.5, 0.9]).unstack()
    table = pd.DataFrame({"median_ms": found[0.5], "p90_ms": found[0.9], "limit_ms": LIMIT})
    return table.assign(within=table["p90_ms"] < LIMIT).reset_index()


def _explorer(columns: int) -> Move:
    """The slider of shared neurons, with the accuracy and the tokens of a real source beside it."""
    source = _source()
    shown = [(source.name, score) for score in source.scores][:columns]
    chosen = explorer.chosen_columns(source, shown)
    sizes = dict(n_experts=4, expert_size=F // 4, n_shared=F // 6)
    made = Explorer([source], chosen, layer=1, **sizes)

    def move(n: int) -> None:
        made.sliders["n_shared"].value = 100 + 37 * n % 600
        made.canvas.draw()  # what the browser's next request does, its picture included

    return move


def _source() -> Source:
    rng = np.random.default_rng(0)
    scores = dict(zip((EQ4, "second", "third"), rng.lognormal(size=(COLUMNS, L, F)), strict=True))
    sizes = [(n, F // n, F // n * k // 3) for n in (2, 4, 8) for k in range(4)]
    judged = pd.DataFrame(sizes, columns=["n_experts", "expert_size", "n_shared"])
    shape = (L, F, 6)
    excited = Excitation(
        *torch.rand(2, L, F),
        torch.rand(shape),
        torch.randint(100, shape),
        torch.randint(20, shape),
        [["word"] * 20] * 100,
    )
    return Source(
        "made up",
        scores,
        accuracy=judged.assign(seed=0, value=0.5),
        metric="accuracy",
        sizes=SHAPES[BASE],
        dense=0.6,
        excited=excited,
    )


def _deal() -> Move:
    draw = widgets.deal_view(torch.randperm(F)).draw
    return lambda n: draw(n_experts=4, expert_size=F // 4, n_shared=100 + 37 * n % 600)


def _states() -> Move:
    stages = ("teacher", "converted", "distilled")
    states = np.random.default_rng(0).normal(size=(len(stages), L + 1, 64, 48))
    frame = planes(dict(zip(stages, states, strict=True)))
    rows = [(layer, stage, 1.0 + layer) for layer in range(L + 1) for stage in stages[1:]]
    distances = pd.DataFrame(rows, columns=["layer", "stage", "distance"])
    draw = widgets.states_view(frame, distances).draw
    return lambda n: draw(layer=n % (L + 1), stage="converted")


def _routing() -> Move:
    """A letter more in a sentence of 24 words: a pass through four routers of MiniLM's shape."""
    models = {f"gate {n + 1}": _gated(seed=n) for n in range(4)}
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "neuron": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    loads = {name: np.full((6, 4), 0.25) for name in models}
    draw = widgets.routing_view(models, fast, loads=loads).draw
    return lambda n: draw(sentence="a neuron " * 11 + "answers to" + "s" * n, layer=1 + n % 6)


def _gated(*, seed: int) -> MoEBertForSequenceClassification:
    torch.manual_seed(seed)
    config = MoEBertConfig(**SMALL, expert_size=384, n_shared=256, routing="gate-token")
    return MoEBertForSequenceClassification(config).eval()


WIDGETS: dict[str, Callable[[], Move]] = {
    **{f"explorer, {n} column{'s' * (n > 1)}": partial(_explorer, n) for n in (1, 2, 3)},
    "deal": _deal,
    "states": _states,
    "routing": _routing,
}
