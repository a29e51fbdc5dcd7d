"""How fast: calls timed side by side, interleaved, in one process; the records of it.

Every repetition times each variant once, in turn, so drift of the machine hits all alike;
a ratio is the median of the repetitions' own ratios.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from moebert_lib.archive import named
from moebert_lib.bench_machine import machine, prepare
from moebert_lib.bench_models import BASE, LIMIT, TINY_SHAPE, VOCAB, glue_like, models
from moebert_lib.errors import UserError, home
from moebert_lib.store import commit, versions, write_bytes

__all__ = [
    "BASE",
    "LIMIT",
    "TINY_SHAPE",
    "VOCAB",
    "frame",
    "gather",
    "glue_like",
    "judge",
    "keep",
    "machine",
    "models",
    "paired",
    "prepare",
    "read",
    "say",
    "show",
    "summary",
    "time_interleaved",
]

#: Rounds where none are asked for: as many as fit in so many seconds, within these bounds.
SECONDS, LEAST, MOST = 60, 5, 21

#: A wish of :func:`judge`: setting, variant, what it is compared with, how many times as fast.
Wish = tuple[str, str, str, float | None]


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int | None = None,
    look: Callable[[dict[str, Any]], None] | None = None,
) -> pd.DataFrame:
    """Seconds of each call in every repetition, after one untimed round.

    Args:
        calls: What to time, by variant. Gradients are as the calls have them.
        repeats: Timed rounds; none: as many as fit in a minute, 5 to 21.
        look: Is given what each call returned in the untimed round, and raises if it is wrong.

    Returns:
        Columns ``variant``, ``repeat``, ``seconds``.
    """
    first = {variant: call() for variant, call in calls.items()}
    _wait()
    if look:
        look(first)
    del first
    rows: list[tuple[str, int, float]] = []
    repeat, begin = 0, time.perf_counter()
    while repeat < (repeats or _rounds(repeat, time.perf_counter() - begin)):
        for variant, call in calls.items():
            start = time.perf_counter()
            call()
            _wait()
            rows.append((variant, repeat, time.perf_counter() - start))
        repeat += 1
    return pd.DataFrame(rows, columns=["variant", "repeat", "seconds"])


def _rounds(done: int, seconds: float) -> int:
    """How many rounds to make, by what those that are done took."""
    return LEAST if done < LEAST else min(MOST, done + (seconds < SECONDS))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(
    timings: pd.DataFrame,
    *,
    against: str = "dense",
    limits: Mapping[str, str] | None = None,
    units: int | Mapping[str, int] = 1,
) -> pd.DataFrame:
    """Per setting and variant: units a second, and speed relative to others, within rounds.

    Args:
        timings: Columns ``variant``, ``repeat``, ``seconds``, and ``setting`` where there are
            several.
        against: The variant whose speed is 1.
        limits: What each variant could reach at best, another variant; by default ``equal
            FLOPs`` for every other one.
        units: Units (examples) in one call, or those of each setting.

    Returns:
        One row a setting and variant: ``median_ms``, ``low_ms``, ``high_ms`` (quartiles),
        ``per_second``, ``ratio`` with its quartiles ``ratio_low``, ``ratio_high``, the median
        of the ratios within each repetition, and likewise ``of_limit``, NaN without a limit.
    """
    rows = []
    settings = timings.get("setting", pd.Series("", index=timings.index))
    for setting, timed in timings.groupby(settings, sort=False):
        wide = timed.pivot(index="repeat", columns="variant", values="seconds")
        per_call = units if isinstance(units, int) else units[str(setting)]
        for variant in timed["variant"].unique():
            limit = LIMIT if limits is None else limits.get(variant)
            low, middle, high = 1000 * wide[variant].quantile([0.25, 0.5, 0.75])
            rows.append(
                {
                    "setting": setting,
                    "variant": variant,
                    "median_ms": middle,
                    "low_ms": low,
                    "high_ms": high,
                    "per_second": per_call / (middle / 1000),
                    **_named("ratio", paired(wide, variant, against)),
                    **_named("of_limit", paired(wide, variant, limit)),
                }
            )
    table = pd.DataFrame(rows)
    return table if "setting" in timings else table.drop(columns="setting")


def paired(wide: pd.DataFrame, variant: str, against: str | None) -> tuple[float, float, float]:
    """Quartile, median and quartile of how many times as fast, from rounds by variants."""
    if against not in wide:
        return (np.nan,) * 3
    return tuple((wide[against] / wide[variant]).quantile([0.25, 0.5, 0.75]))


def _named(name: str, quartiles: tuple[float, float, float]) -> dict[str, float]:
    low, middle, high = quartiles
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def judge(timings: pd.DataFrame, wishes: Iterable[Wish]) -> list[dict[str, Any]]:
    """What was wanted beside what was reached, of the settings and variants that were timed.

    Args:
        timings: As for :func:`summary`, with ``setting``.
        wishes: ``(setting, variant, against, wanted)``; ``wanted`` is None where a number is
            reported without one.

    Returns:
        Of each: ``setting``, ``variant``, ``against``, ``wanted``, ``reached`` with quartiles
        ``low`` and ``high``, and ``met``, None without a wanted value.
    """
    rounds = {
        setting: timed.pivot(index="repeat", columns="variant", values="seconds")
        for setting, timed in timings.groupby("setting")
    }
    judged = []
    for setting, variant, against, wanted in wishes:
        if {variant, against} <= set(rounds.get(setting, ())):
            low, reached, high = map(float, paired(rounds[setting], variant, against))
            met = None if wanted is None else reached >= wanted
            judged.append(
                {
                    "setting": setting,
                    "variant": variant,
                    "against": against,
                    "wanted": wanted,
                    "reached": reached,
                    "low": low,
                    "high": high,
                    "met": met,
                }
            )
    return judged


def show(table: pd.DataFrame) -> None:
    """Print a summary within 120 columns: milliseconds, and ratios with their quartiles."""
    shown = {"setting": table["setting"]} if "setting" in table else {}
    shown |= {"": table["variant"], "ms": table["median_ms"].map(_digits)}
    shown |= {"quartiles": _range(table, "low_ms", "high_ms")}
    shown |= {"a second": table["per_second"].map(_digits)}
    for name, title in (("ratio", "speed"), ("of_limit", "of limit")):
        if table[name].notna().any():
            shown[title] = table[name].map(_digits)
            shown[f"quartiles of {name}"] = _range(table, f"{name}_low", f"{name}_high")
    printed = pd.DataFrame(shown)
    printed.columns = [name.partition(" of ")[0] for name in printed]
    print(printed.to_string(index=False), flush=True)


def say(targets: Iterable[dict[str, Any]]) -> None:
    """Print each target: what was reached, and whether that is what was wanted."""
    for row in targets:
        verdict = "" if row["met"] is None else f"; wanted {row['wanted']}: "
        verdict += {None: "", True: "met", False: "NOT met"}[row["met"]]
        print(
            f"{row['setting']}: {row['variant']} is {_digits(row['reached'])} times as fast as "
            f"{row['against']} ({_digits(row['low'])} to {_digits(row['high'])}){verdict}",
            flush=True,
        )


def _range(table: pd.DataFrame, low: str, high: str) -> list[str]:
    ends = zip(table[low].map(_digits), table[high].map(_digits), strict=True)
    return ["-".join(pair) if all(pair) else "" for pair in ends]


def _digits(value: float) -> str:
    """Three digits, or all before the point: 0.93, 13.2, 1,348; nothing for NaN."""
    if np.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{1 if abs(value) >= 10 else 2}f}"


def gather(measured: Iterable[pd.DataFrame]) -> tuple[pd.DataFrame, bool]:
    """Frames as they are measured, joined, until the last or Ctrl-C; and whether all came.

    Raises:
        KeyboardInterrupt: before the first was done.
    """
    frames: list[pd.DataFrame] = []
    complete = False
    try:
        for timings in measured:
            frames.append(timings)
        complete = True
    except KeyboardInterrupt:
        if not frames:
            raise
        print("\nstopped; what was finished is kept", flush=True)
    return pd.concat(frames, ignore_index=True), complete


def keep(
    what: str,
    timings: pd.DataFrame,
    table: pd.DataFrame,
    *,
    targets: Sequence[dict[str, Any]] = (),
    out: Path | None = None,
    **about: Any,
) -> Path:
    """Write a benchmark's record to ``runs/bench-<what>-<time>.json``, or ``out``; say where.

    Args:
        what: The benchmark's name.
        timings: Every timing.
        table: Their summary.
        targets: From :func:`judge`.
        out: The file to write instead.
        about: What else to record, as JSON values.
    """
    now = datetime.now(UTC)
    path = out or home() / "runs" / f"bench-{what}-{now:%Y%m%dT%H%M%S%f}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "what": what,
        "created": now.isoformat(timespec="seconds"),
        **about,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "summary": _rows(table),
        "timings": _rows(timings),
        "targets": list(targets),
    }
    write_bytes(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"kept in {path}")
    return path


def read(what: str) -> dict[str, Any]:
    """The newest whole record of this home, else the one committed in ``figures/bench``.

    Where figures are drawn from committed results, the committed one.

    Raises:
        UserError: there is none; the message says which command makes it.
    """
    own = sorted((home() / "runs").glob(f"bench-{what}-[0-9]*.json")) if not named() else []
    committed = home() / "figures" / "bench" / f"{what}.json"
    for path in [*reversed(own), committed]:
        record = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if record.get("complete", bool(record)):  # not what was stopped half-way
            return record
    raise UserError(f"nothing was measured that is called '{what}'; make it with {command(what)}")


def command(what: str) -> str:
    """What makes a record.

    Example:
        >>> command("inference-cuda")
        'moebert bench inference --device cuda'
    """
    name, _, device = what.partition("-")
    return f"moebert bench {name}" + (f" --device {device}" if device else "")


def frame(record: dict[str, Any], part: str) -> pd.DataFrame:
    """A record's ``summary``, ``timings``, ``targets`` or any other table, as it was."""
    rows = pd.DataFrame(record[part])
    return rows.astype({name: float for name in rows if rows[name].isna().all()})


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records", double_precision=15))
