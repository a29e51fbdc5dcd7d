"""How far the mean of a few runs can be trusted, and what it lets one say.

Fewer than five runs get no interval: their points are the evidence.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

FEWEST = 5  #: runs below which an interval says more about its formula than about the runs
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over ``n`` runs and its 95% interval, in the unit of the runs; NaN where none."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def sign(self) -> str:
        """``>`` or ``<`` where the interval excludes zero, else ``?``: these runs cannot tell."""
        if self.low > 0:
            return ">"
        return "<" if self.high < 0 else "?"

    def points(self, digits: int = 1) -> str:
        """In percentage points, for values between 0 and 1.

        Example:
            >>> Interval(0.031, 0.012, 0.05, 5).points()
            '+3.1 points, 95% interval +1.2 to +5.0, n = 5'
        """
        mean, low, high = (f"{100 * value:+.{digits}f}" for value in self[:3])
        between = f"95% interval {low} to {high}" if self.low == self.low else "no interval"
        return f"{mean} points, {between}, n = {self.n}"


def t_interval(values: Iterable[float]) -> Interval:
    """Mean and Student's t interval of independent runs.

    Example:
        >>> [round(number, 2) for number in t_interval([1, 2, 3, 4, 5])]
        [3.0, 1.04, 4.96, 5]
        >>> t_interval([1.0, 3.0])
        Interval(mean=2.0, low=nan, high=nan, n=2)
    """
    runs = np.asarray(list(values), dtype=float)
    mean, n = float(runs.mean()), len(runs)
    if n < FEWEST:
        return Interval(mean, float("nan"), float("nan"), n)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * runs.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - reach, mean + reach, n)


def differences(
    frame: pd.DataFrame,
    metric: str,
    *,
    column: str,
    better: object,
    worse: object,
    by: str = "seed",
) -> pd.Series:
    """``better`` minus ``worse``, run by run: what a pair shares cancels out.

    Args:
        frame: One row per run.
        metric: The column compared.
        column: The setting that differs, with ``better`` and ``worse`` among its values.
        better: Counts positive.
        worse: Counts negative.
        by: What makes two runs a pair.

    Raises:
        ValueError: a run without its partner.
    """
    wide = frame.pivot(index=by, columns=column, values=metric)[[better, worse]]
    if wide.isna().any(axis=None):
        raise ValueError(f"{by} {wide[wide.isna().any(axis=1)].index[0]} has no pair")
    return wide[better] - wide[worse]


def paired(frame: pd.DataFrame, metric: str, **pair: object) -> Interval:
    """Interval of the mean of :func:`differences`, which says what ``pair`` may hold."""
    return t_interval(differences(frame, metric, **pair))


def agreed(values: Iterable[float]) -> str:
    """``>`` or ``<`` where paired differences agree on a sign, else ``?``: they cannot tell.

    Five or more agree where their interval excludes zero; two to four where all have the same
    sign, which ``n`` runs without any effect do with probability ``2 ** (1 - n)``.

    Example:
        >>> agreed([0.01, 0.04, 0.02]), agreed([0.01, -0.04]), agreed([0.01])
        ('>', '?', '?')
    """
    runs = np.asarray(list(values), dtype=float)
    if len(runs) >= FEWEST:
        return t_interval(runs).sign
    if len(runs) < 2:
        return "?"
    return ">" if (runs > 0).all() else "<" if (runs < 0).all() else "?"


def steps(frame: pd.DataFrame, metric: str, *, column: str, order: Sequence) -> pd.DataFrame:
    """Neighbours of a claimed order, compared seed by seed: one row per step.

    Args:
        frame: One row per run, with ``seed``.
        metric: The column compared, 0 to 1.
        column: The setting that differs.
        order: Its values, the one claimed to be best first.

    Returns:
        Columns ``better``, ``worse``, then in points ``mean``, ``lowest`` and ``highest``, then
        ``pairs`` and ``sign`` (see :func:`agreed`).
    """
    rows = []
    for better, worse in itertools.pairwise(order):
        gap = 100 * differences(frame, metric, column=column, better=better, worse=worse)
        rows.append((better, worse, gap.mean(), gap.min(), gap.max(), len(gap), agreed(gap)))
    names = ["better", "worse", "mean", "lowest", "highest", "pairs", "sign"]
    return pd.DataFrame(rows, columns=names)


def chain(compared: pd.DataFrame) -> str:
    """:func:`steps` in one line, such as ``8 > 4 ? 1``."""
    first = "".join(f"{row.better} {row.sign} " for row in compared.itertuples())
    return f"{first}{compared['worse'].iloc[-1]}"
