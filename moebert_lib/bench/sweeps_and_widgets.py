"""Time whole sweeps with one worker and with two, and the redrawing of the notebooks' widgets."""

import itertools
import os
import subprocess
import sys
import tempfile
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

from moebert_lib.bench.harness import Benchmark
from moebert_lib.bench.inference import moebert, sizes
from moebert_lib.config.errors import CHECKOUT, UserError, home
from moebert_lib.explore import widgets
from moebert_lib.explore.explorer import Explorer
from moebert_lib.explore.score_sources import EQ4, Source
from moebert_lib.training.evaluation import planes

BLOCK = 10  # runs in one timed sweep
LIMIT = 100  # milliseconds: what the eye takes for at once
L, F = 12, 3072  # layers and neurons of BERT-base


def sweeping(*, runs: int = 40) -> Benchmark:
    """``moebert bench batch``: sweeps of ten runs, Python's start included, and one reused.

    Each number of workers has a home of its own, where the untimed round makes what runs share.

    Args:
        runs: Runs of notebook 03 at scale smoke in all, for each number of workers.
    """
    folder = tempfile.TemporaryDirectory(prefix="moebert-bench-")
    seeds = {workers: itertools.count(step=BLOCK) for workers in (1, 2)}

    def fresh(workers: int) -> None:
        sweep(Path(folder.name) / str(workers), next(seeds[workers]), workers=workers)

    def calls() -> dict[str, Callable[[], None]]:
        return {
            "1 worker": partial(fresh, 1),
            "2 workers": partial(fresh, 2),
            "2 workers, all reused": partial(sweep, Path(folder.name) / "2", 0, workers=2),
        }

    return Benchmark(
        name="batch",
        title=f"notebook 03 at scale smoke, {BLOCK} runs in each sweep",
        settings={f"{BLOCK} runs": calls},
        baseline="1 worker",
        examples=BLOCK,
        repeats=max(runs // BLOCK, 1),
        finish=lambda *_: folder.cleanup() or {"block": BLOCK},
    )


def sweep(folder: Path, first_seed: int, *, workers: int) -> None:
    """Run ``moebert sweep`` over ten seeds, with this folder as its home.

    Raises:
        UserError: the sweep failed.
    """
    if not folder.exists():
        folder.mkdir()
        (folder / "notebooks").symlink_to(home() / "notebooks", target_is_directory=True)
    grid = folder / "grid.yaml"
    grid.write_text(f"scale: smoke\nseeds: {list(range(first_seed, first_seed + BLOCK))}\n")
    command = [sys.executable, "-m", "moebert_lib", "sweep", str(grid), "--workers", str(workers)]
    environment = {**os.environ, "MOEBERT_HOME": str(folder), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the sweep failed: {done.stderr.strip().splitlines()[-1:]}")


def redrawing(*, repeats: int = 11) -> Benchmark:
    """``moebert bench widgets``: from a control's move to the finished picture, in the kernel.

    Scores and weights are made up, of real sizes. One thread; the browser's own time is not in it.

    Args:
        repeats: Timed moves of each widget.
    """
    threads = torch.get_num_threads()

    def calls() -> dict[str, Callable[[], None]]:
        torch.set_num_threads(1)
        moves = {name: map(make(), itertools.count()) for name, make in WIDGETS.items()}
        return {name: partial(next, move) for name, move in moves.items()}

    def finish(timings: pd.DataFrame, _table: pd.DataFrame) -> dict[str, object]:
        torch.set_num_threads(threads)
        milliseconds = 1000 * timings.groupby("variant", sort=False)["seconds"].quantile(0.9)
        slow = milliseconds.index[milliseconds >= LIMIT].tolist()
        print(f"over {LIMIT} ms: {', '.join(slow)}" if slow else f"all within {LIMIT} ms")
        return {"limit_ms": LIMIT, "slow": slow}

    return Benchmark(
        name="widgets",
        title="from a control's move to the finished picture, one thread",
        settings={"one move": calls},
        baseline="",
        repeats=repeats,
        finish=finish,
    )


def explorer_moves(columns: int) -> Callable[[int], None]:
    """Moves of the explorer's slider of shared neurons, with so many scores side by side."""
    random = np.random.default_rng(0)
    scores = {name: random.lognormal(size=(L, F)) for name in (EQ4, "second", "third")}
    points = [(N, F // N, F // N * k // 3) for N in (2, 4, 8) for k in range(4)]
    accuracy = pd.DataFrame(points, columns=["n_experts", "expert_size", "n_shared"])
    source = Source(
        "made up", scores, accuracy=accuracy.assign(seed=0, value=0.5), metric="accuracy", dense=0.6
    )
    chosen = [(source, name) for name in list(scores)[:columns]]
    made = Explorer([source], chosen, layer=1, n_experts=4, expert_size=F // 4, n_shared=F // 6)

    def move(n: int) -> None:
        made.sliders["n_shared"].value = 100 + 37 * n % 600
        made.canvas.draw()  # what the browser's next request does

    return move


def deal_moves() -> Callable[[int], None]:
    """Moves of the deal's slider of shared neurons."""
    draw = widgets.deal_view(torch.randperm(F)).draw
    return lambda n: draw(n_experts=4, expert_size=F // 4, n_shared=100 + 37 * n % 600)


def states_moves() -> Callable[[int], None]:
    """Moves of the layer's slider beside a student's hidden states."""
    stages = ("teacher", "converted", "distilled")
    states = np.random.default_rng(0).normal(size=(3, L + 1, 64, 48))
    rows = [(layer, stage, 1.0 + layer) for layer in range(L + 1) for stage in stages[1:]]
    distances = pd.DataFrame(rows, columns=["layer", "stage", "distance"])
    draw = widgets.states_view(planes(dict(zip(stages, states, strict=True))), distances).draw
    return lambda n: draw(layer=n % (L + 1), stage="converted")


def routing_moves() -> Callable[[int], None]:
    """One letter more in a sentence of 24 words, for four gates of MiniLM's shape."""
    shape = sizes(384, layers=6, heads=12, width=1536, vocab=30522)
    models = {f"gate {n + 1}": moebert(shape, routing="gate-token") for n in range(4)}
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "neuron": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    loads = {name: np.full((6, 4), 0.25) for name in models}
    draw = widgets.routing_view(models, tokenizer, loads=loads).draw
    return lambda n: draw(sentence="a neuron " * 11 + "answers to" + "s" * n, layer=1 + n % 6)


WIDGETS: dict[str, Callable[[], Callable[[int], None]]] = {
    "explorer, 1 column": partial(explorer_moves, 1),
    "explorer, 2 columns": partial(explorer_moves, 2),
    "explorer, 3 columns": partial(explorer_moves, 3),
    "deal": deal_moves,
    "states": states_moves,
    "routing": routing_moves,
}
