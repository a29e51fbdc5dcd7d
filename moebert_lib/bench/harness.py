"""Time calls side by side, print their speeds, and keep the raw seconds as a JSON record.

Each round calls every variant once, in turn, so that a machine that slows down for a while slows
all of them. Speeds are compared within rounds: the median of the rounds' own ratios.
"""

import ctypes
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils import collect_env

from moebert_lib.config import provenance
from moebert_lib.config.errors import UserError, home
from moebert_lib.config.file_io import write_bytes
from moebert_lib.store.committed_results import AnyStore

#: Rounds by default: as many as fit in so many seconds, within these bounds.
SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 60, 5, 21
SLOW_CALL = 5  # seconds; slower calls are printed as they finish
BUSY = 0.5  # load of a core by other programs that makes timings doubtful
QUARTILES = [0.5, 0.25, 0.75]

Calls = Mapping[str, Callable[[], Any]]  # by variant
Check = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to time, and what to compare it with.

    Attributes:
        name: Of the record.
        title: The line that is printed first.
        settings: By name, what builds a setting's calls when its turn comes.
        baseline: The variant whose speed is 1.
        limits: By variant, the variant that bounds its speed.
        main: The variant whose speed the title of a figure states.
        check: Gets what each call of the untimed round returned; raises UserError if it is wrong.
        examples: Examples in one call, by setting where they differ.
        repeats: Timed rounds; by default 5 to 21, about a minute.
        facts: More entries of the record.
        finish: Gets timings and summary, prints what follows from them, returns more entries.
    """

    name: str = ""
    title: str = ""
    settings: Mapping[Any, Callable[[], Calls]]
    baseline: str = "dense"
    limits: Mapping[str, str] = field(default_factory=dict)
    main: str = ""
    check: Check | None = None
    examples: int | Mapping[Any, int] = 1
    repeats: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[pd.DataFrame, pd.DataFrame], Mapping[str, Any]] | None = None

    def measure(self, setting: Any) -> pd.DataFrame:
        """Time one setting: columns ``setting``, ``variant``, ``repeat``, ``seconds``."""
        timings = time_interleaved(self.settings[setting](), repeats=self.repeats, check=self.check)
        timings.insert(0, "setting", setting)
        return timings


def run(benchmark: Benchmark, *, out: Path | None = None) -> bool:
    """Time all settings, print their tables, and save the record.

    Args:
        benchmark: What to time.
        out: The record's file; by default a new one in ``runs/``.

    Returns:
        Whether all settings were timed. After Ctrl-C those that were finished are kept.

    Raises:
        KeyboardInterrupt: no setting was finished.
        UserError: a variant computes something wrong.
    """
    summarise = partial(
        summary,
        baseline=benchmark.baseline,
        limits=benchmark.limits,
        examples=benchmark.examples,
    )
    conditions = prepare()
    print(benchmark.title, flush=True)
    frames: list[pd.DataFrame] = []
    try:
        for setting in benchmark.settings:
            frames.append(benchmark.measure(setting))
            print(f"\n{setting}, {frames[-1]['repeat'].nunique()} rounds")
            show(summarise(frames[-1]))
    except KeyboardInterrupt:
        if not frames:
            raise
        print("\nstopped; the finished settings are kept", flush=True)
    timings = pd.concat(frames, ignore_index=True)
    table = summarise(timings)
    record = {
        "what": benchmark.name,
        "main": benchmark.main,
        "complete": len(frames) == len(benchmark.settings),
        "conditions": conditions,
        **benchmark.facts,
        "summary": as_json(table),
        "timings": as_json(timings),
        **(benchmark.finish(timings, table) if benchmark.finish else {}),
    }
    save(record, out=out)
    return record["complete"]


def time_interleaved(
    calls: Calls, *, repeats: int | None = None, check: Check | None = None
) -> pd.DataFrame:
    """Time each call in every round, after an untimed round.

    Args:
        calls: What to time. Gradients are recorded or not as the calls decide.
        repeats: As in :class:`Benchmark`.
        check: As in :class:`Benchmark`.

    Returns:
        Columns ``variant``, ``repeat``, ``seconds``.
    """
    outputs = {variant: call() for variant, call in calls.items()}
    _wait_for_gpu()
    if check:
        check(outputs)
    del outputs
    timed: list[tuple[str, int, float]] = []
    repeat, begin = 0, time.perf_counter()
    while repeat < (repeats or _rounds(repeat, time.perf_counter() - begin)):
        for variant, call in calls.items():
            start = time.perf_counter()
            call()
            _wait_for_gpu()
            seconds = time.perf_counter() - start
            timed.append((variant, repeat, seconds))
            if seconds > SLOW_CALL:
                print(f"· round {repeat + 1}, {variant}: {seconds:.1f} s", flush=True)
        repeat += 1
    return pd.DataFrame(timed, columns=["variant", "repeat", "seconds"])


def check_equal(
    what: str,
    values: Mapping[str, torch.Tensor],
    origins: Mapping[str, str],
    *,
    exact: float,
    half: float,
) -> None:
    """Refuse a variant that computes something else than the variant that it should equal.

    Args:
        what: What the values are, such as "logits".
        values: By variant.
        origins: By variant, the one that it should equal.
        exact: The largest difference in float32, as a part of the origin's largest value.
        half: The same in bfloat16, as in variants with "bf16" in their names.

    Raises:
        UserError: they differ by more, or are NaN.
    """
    for name, origin in origins.items():
        in_half = "bf16" in name or values[origin].dtype == torch.bfloat16
        tolerance, expected = half if in_half else exact, values[origin].float()
        difference = float((values[name].float() - expected).abs().max() / expected.abs().max())
        if not difference <= tolerance:  # or NaN
            raise UserError(
                f"{what} of '{name}' differ from those of '{origin}' by {difference:.2g} of the "
                f"largest, expected at most {tolerance}; nothing is timed that computes otherwise"
            )


def _rounds(done: int, seconds: float) -> int:
    """How many rounds to make in all, when ``done`` of them took ``seconds``."""
    if done < FEWEST_ROUNDS:
        return FEWEST_ROUNDS
    return min(MOST_ROUNDS, done + (seconds < SECONDS))


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(
    timings: pd.DataFrame,
    *,
    baseline: str = "dense",
    limits: Mapping[str, str] | None = None,
    examples: int | Mapping[Any, int] = 1,
) -> pd.DataFrame:
    """Time and relative speed of each variant in each setting, medians with quartiles.

    Args:
        timings: Columns ``setting``, ``variant``, ``repeat``, ``seconds``.
        baseline: As in :class:`Benchmark`; ``limits`` and ``examples`` likewise.

    Returns:
        Columns ``setting``, ``variant``; ``median_ms``, ``low_ms``, ``high_ms``; ``per_second``,
        examples; ``ratio``, ``ratio_low``, ``ratio_high``, speed over the baseline's; and
        likewise ``of_limit``. NaN where there is nothing to compare with.
    """
    table = []
    for setting, part in timings.groupby("setting", sort=False):
        rounds = part.pivot(index="repeat", columns="variant", values="seconds")
        count = examples if isinstance(examples, int) else examples[setting]
        for variant in part["variant"].unique():
            median, low, high = 1000 * rounds[variant].quantile(QUARTILES)
            row = {"setting": setting, "variant": variant}
            row |= {"median_ms": median, "low_ms": low, "high_ms": high}
            row["per_second"] = count / (median / 1000)
            others = {"ratio": baseline, "of_limit": (limits or {}).get(variant)}
            for name, other in others.items():
                median, low, high = speed_ratio(rounds, variant, other)
                row |= {name: median, f"{name}_low": low, f"{name}_high": high}
            table.append(row)
    return pd.DataFrame(table)


def speed_ratio(rounds: pd.DataFrame, variant: str, other: str | None) -> tuple[float, ...]:
    """How many times as fast as ``other``: median, lower and upper quartile over rounds.

    Args:
        rounds: Seconds, a row for each round and a column for each variant.
        variant: The variant in question.
        other: NaN where it is not among the columns.
    """
    if other not in rounds:
        return (math.nan,) * 3
    return tuple((rounds[other] / rounds[variant]).quantile(QUARTILES))


#: Names of the variants that :func:`speedups` compares with.
COMPARED = {
    "dense BERT": "dense",
    "dense BERT, accelerated": "dense, accelerated",
    "equal-FLOP limit, accelerated": "equal FLOPs, accelerated",
}


def speedups(record: Mapping[str, Any], variant: str) -> pd.DataFrame:
    """How many times as fast a variant is as others, as text: a column for each setting.

    Each cell has the median over rounds with its quartiles, such as "1.72 (1.71 to 1.75)".
    """
    columns = {}
    for setting, timed in pd.DataFrame(record["timings"]).groupby("setting", sort=False):
        rounds = timed.pivot(index="repeat", columns="variant", values="seconds")
        ratios = [speed_ratio(rounds, variant, other) for other in COMPARED.values()]
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*ratio) for ratio in ratios]
        columns[setting.replace(" x ", " × ")] = cells
    return pd.DataFrame(columns, index=pd.Index(COMPARED, name="how many times as fast as"))


def show(table: pd.DataFrame) -> None:
    """Print a summary of one setting within 120 columns, quartiles in brackets."""
    text = pd.DataFrame({"variant": table["variant"]})
    text["ms"] = _cells(table, "median_ms", "low_ms", "high_ms")
    text["per second"] = table["per_second"].map(_digits)
    for title, name in {"times as fast": "ratio", "of the limit": "of_limit"}.items():
        if table[name].notna().any():
            text[title] = _cells(table, name, f"{name}_low", f"{name}_high")
    print(text.to_string(index=False), flush=True)


def _cells(table: pd.DataFrame, *columns: str) -> list[str]:
    values = zip(*(table[column].map(_digits) for column in columns), strict=True)
    return [f"{median} ({low}-{high})" if median else "" for median, low, high in values]


def _digits(value: float) -> str:
    """Three digits, or all before the point: 0.93, 13.2, 1,348; nothing for NaN."""
    if math.isnan(value):
        return ""
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{places}f}"


def save(record: Mapping[str, Any], *, out: Path | None = None) -> None:
    """Add machine, versions and commit, and write ``out`` or ``runs/bench-NAME-TIME.json``."""
    now = datetime.now(UTC)
    path = out or home() / "runs" / f"bench-{record['what']}-{now:%Y%m%dT%H%M%S%f}.json"
    origin = {
        "created": now.isoformat(timespec="seconds"),
        "machine": machine(),
        "processor": (collect_env.get_cpu_info(collect_env.run) or "").splitlines(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps({**record, **origin}, indent=1) + "\n").encode())
    print(f"saved as {path}")


def read(store: AnyStore, name: str) -> dict[str, Any]:
    """The newest complete record in ``runs/``, else the committed one in ``figures/bench/``.

    Where figures are drawn from committed results, the committed one.

    Raises:
        UserError: there is none; the message names the command that makes it.
    """
    paths = [] if not store.makes else sorted((home() / "runs").glob(f"bench-{name}-[0-9]*.json"))
    for path in [*reversed(paths), home() / "figures" / "bench" / f"{name}.json"]:
        record = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if record.get("complete", bool(record)):
            return record
    benchmark, _, device = name.partition("-")
    option = f" --device {device}" if device else ""
    raise UserError(f"there is no record '{name}'; make it with moebert bench {benchmark}{option}")


def as_json(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as JSON values, null for NaN."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def machine() -> dict[str, Any]:
    """CPU, cores, threads, the instruction set that torch uses, and the GPU or "none"."""
    instructions = torch.backends.cpu.get_cpu_capability()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {**provenance.machine(), "instructions": instructions, "gpu": gpu}


def prepare() -> dict[str, Any]:
    """Let glibc keep freed memory, and warn where other programs are busy.

    Otherwise large buffers go back to the system after each layer and are mapped and zeroed anew,
    a cost of the allocator and not of the model.

    Returns:
        ``load`` of a core over the last minute, None where the system does not know it; and
        ``memory_kept``, whether that was possible.
    """
    cores = provenance.cores()
    load = os.getloadavg()[0] / cores if hasattr(os, "getloadavg") else None
    if load is not None and load > BUSY:
        print(f"other programs are busy: load {load * cores:.1f} on {cores} cores", flush=True)
    kept = False
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        kept = bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))
    return {"load": load, "memory_kept": kept}
