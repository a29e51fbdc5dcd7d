"""How fast a sweep is: the same runs with one worker and with two, and all of it reused.

Whole commands are timed, Python's start included. Blocks of runs alternate between the two,
each in a home of its own, so drift of the machine hits both alike.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from moebert_lib import bench
from moebert_lib.errors import CHECKOUT, UserError, home

BLOCK = 10  # runs in one timed command
WORKERS = (1, 2)


def main(*, runs: int = 40, out: Path | None = None) -> None:
    """``moebert bench batch``: time, print the table, keep it as JSON under ``runs/``.

    Args:
        runs: Notebook runs at scale smoke in all, for each number of workers.
        out: The record's file.
    """
    conditions = bench.prepare()
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
    table = bench.summary(timings, against=_name(WORKERS[0]), units=BLOCK)
    bench.show(table)
    print(f"{blocks * BLOCK} runs, all reused: {reused:.1f} s")
    bench.keep(
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
    environment = {**os.environ, "MOEBERT_HOME": str(where), "MOEBERT_STORE": ""}
    environment["PYTHONPATH"] = str(CHECKOUT)
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"the sweep failed: {done.stderr.strip().splitlines()[-1:]}")
    return seconds
