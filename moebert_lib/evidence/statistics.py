"""Intervals and tests for the means and the paired differences of a few runs.

The mean of runs gets Student's t interval, the mean of paired differences a BCa bootstrap
interval. Fewer than five runs get no interval: their points are shown instead. For many
comparisons at once there are sign-flip permutation tests and Holm's correction.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

FEWEST = 5  #: runs that an interval needs; below, it depends more on its formula than on the runs
LEVEL = 0.95  #: confidence level of every interval
RESAMPLES = 9999  #: of a bootstrap, and of a permutation test that is too large to enumerate
ENUMERATED = 12  #: pairs up to which a permutation test tries every pattern of signs


class Interval(NamedTuple):
    """A mean of ``n`` runs and its 95% interval (NaN without one), in the unit of the runs."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def sign(self) -> str:
        """``>`` or ``<`` if the interval excludes zero, ``?`` otherwise."""
        if self.low > 0:
            return ">"
        return "<" if self.high < 0 else "?"

    def points(self) -> str:
        """The interval in percentage points, for values between 0 and 1.

        Example:
            >>> Interval(0.031, 0.012, 0.05, 5).points()
            '+3.1 points, 95% interval +1.2 to +5.0, n = 5'
        """
        mean, low, high = (f"{100 * value:+.1f}" for value in self[:3])
        between = "no interval" if np.isnan(self.low) else f"95% interval {low} to {high}"
        return f"{mean} points, {between}, n = {self.n}"


def t_interval(values: Iterable[float]) -> Interval:
    """Mean and Student's t interval of independent runs; no interval below five runs.

    Example:
        >>> [round(number, 2) for number in t_interval([1, 2, 3, 4, 5])]
        [3.0, 1.04, 4.96, 5]
        >>> t_interval([1.0, 3.0])
        Interval(mean=2.0, low=nan, high=nan, n=2)
    """
    runs = np.asarray(list(values), dtype=float)
    low, high = student(runs) if len(runs) >= FEWEST else (np.nan, np.nan)
    return Interval(float(runs.mean()), low, high, len(runs))


def student(values: Iterable[float]) -> tuple[float, float]:
    """Lower and upper limit of Student's t interval of the mean, from two values on.

    The interval assumes normal values, which two to four values cannot show. One value gives NaN,
    equal values their mean twice.
    """
    runs = np.asarray(list(values), dtype=float)
    if len(runs) < 2:
        return float("nan"), float("nan")
    mean, error = float(runs.mean()), float(stats.sem(runs))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(LEVEL, len(runs) - 1, mean, error)
    return float(low), float(high)


def bca_interval(values: Iterable[float]) -> Interval:
    """Mean and BCa bootstrap interval (bias-corrected and accelerated; Efron 1987).

    The bootstrap assumes no distribution, but it can only resample the values given. With five
    normal values the interval covers the true mean in about 82 of 100 samples, with twelve in
    about 90 (see :func:`chance`). Equal values give an interval of no width, fewer than five none.
    The same values always give the same interval.

    Example:
        >>> [round(number, 2) for number in bca_interval([1, 2, 3, 4, 5])]
        [3.0, 1.8, 4.2, 5]
    """
    runs = np.asarray(list(values), dtype=float)
    mean, n = float(runs.mean()), len(runs)
    if n < FEWEST:
        return Interval(mean, float("nan"), float("nan"), n)
    if np.ptp(runs) == 0:
        return Interval(mean, mean, mean, n)
    low, high = _bca(runs, RESAMPLES)
    return Interval(mean, float(low), float(high), n)


def _bca(samples: np.ndarray, n_resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limits of the mean along the last axis."""
    return stats.bootstrap(
        (samples,),
        np.mean,
        axis=-1,
        confidence_level=LEVEL,
        method="BCa",
        n_resamples=n_resamples,
        rng=np.random.default_rng(0),
    ).confidence_interval


def resampled(measure: Callable[[np.ndarray], float], n: int) -> tuple[float, float]:
    """Limits of a metric's 95% percentile bootstrap interval over ``n`` examples of one run.

    ``measure`` takes row numbers ``(n,)``, repeats included. The same ``n`` always draws the same
    rows, so the difference of two models is paired. Fewer than five examples give NaN.
    """
    if n < FEWEST:
        return float("nan"), float("nan")
    random = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sample with a single class has no correlation
        values = [measure(random.integers(n, size=n)) for _ in range(1000)]
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@functools.cache
def chance(n: int, *, n_samples: int = 1000) -> float:
    """How often the interval of ``n`` differences excludes zero when there is no effect.

    Nominally 5 in 100. :func:`student` (two to four normal values) keeps to that; the rate of BCa
    is measured on ``n_samples`` samples of normal values. One difference has no interval: 0.
    """
    if n < FEWEST:
        return (1 - LEVEL) * (n > 1)
    noise = np.random.default_rng(n).normal(size=(n_samples, n))
    low, high = _bca(noise, 999)
    return float(((low > 0) | (high < 0)).mean())


def differences(
    frame: pd.DataFrame,
    metric: str,
    *,
    column: str,
    better: object,
    worse: object,
    by: str = "seed",
) -> pd.Series:
    """``better`` minus ``worse``, run by run.

    Args:
        frame: One row per run.
        metric: The column compared.
        column: The setting that differs, with ``better`` and ``worse`` among its values.
        better, worse: Its value whose metric counts positive, and negative.
        by: The column whose value two runs of a pair share; ValueError for a run without partner.
    """
    wide = frame.pivot(index=by, columns=column, values=metric)[[better, worse]]
    if wide.isna().any(axis=None):
        raise ValueError(f"{by} {wide[wide.isna().any(axis=1)].index[0]} has no pair")
    return wide[better] - wide[worse]


def paired(frame: pd.DataFrame, metric: str, **pair: object) -> Interval:
    """BCa interval of the mean of :func:`differences`, which describes ``pair``."""
    return bca_interval(differences(frame, metric, **pair))


def permutation_p(values: Iterable[float], alternative: str = "two-sided") -> float:
    """p of a sign-flip permutation test of paired differences: is their mean zero?

    Without an effect each difference could as well have the other sign. ``p`` is the share of
    sign patterns whose mean is at least as extreme as the observed mean: exact up to twelve
    pairs, from a seeded sample beyond. The observed pattern and its mirror image always count, so
    a two-sided ``p`` of ``n`` pairs is at least ``2 ** (1 - n)``: fewer than six pairs cannot
    reach 0.05.

    Args:
        values: Differences, one per pair; no values give NaN.
        alternative: ``two-sided``, ``greater`` (the mean is above zero) or ``less``.

    Example:
        >>> permutation_p([0.5, 0.25, 0.75])
        0.25
    """
    gaps = np.asarray(list(values), dtype=float)
    if len(gaps) == 0:
        return float("nan")
    scaled = gaps / max(np.abs(gaps).max(), np.finfo(float).tiny)
    test = stats.permutation_test(
        (scaled if len(gaps) > 1 else [*scaled, 0.0],),  # scipy wants two; a zero changes no share
        lambda flipped, axis: flipped.sum(axis=axis).round(9),  # sums equal but for rounding tie
        permutation_type="samples",
        alternative=alternative,
        n_resamples=np.inf if len(gaps) <= ENUMERATED else RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p_values: Iterable[float]) -> np.ndarray:
    """Holm's step-down correction: adjusted p-values that can each be compared with 0.05.

    The smallest of ``m`` is multiplied by ``m``, the next by ``m - 1`` and so on. Adjusted values
    keep their order and do not exceed 1. NaN stays NaN and is not counted.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(list(p_values), dtype=float)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: int(np.isfinite(p).sum())]  # NaN is sorted last
    multiplied = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(multiplied), 1.0)
    return adjusted


def agreed(values: Iterable[float]) -> str:
    """The common sign of paired differences, ``>`` or ``<``; ``?`` if they have none.

    Five or more differences have a sign if their interval excludes zero, two to four if all of
    them have it, one never.

    Example:
        >>> agreed([0.01, 0.04, 0.02]), agreed([0.01, -0.04]), agreed([0.01])
        ('>', '?', '?')
    """
    runs = np.asarray(list(values), dtype=float)
    if len(runs) >= FEWEST:
        return bca_interval(runs).sign
    if len(runs) < 2:
        return "?"
    return ">" if (runs > 0).all() else "<" if (runs < 0).all() else "?"


def luck(n: int) -> float:
    """How often :func:`agreed` finds a sign in ``n`` differences without any effect."""
    return chance(n) if n >= FEWEST else (n > 1) * 2.0 ** (1 - n)


def rule(n: int) -> str:
    """The condition under which :func:`agreed` finds a sign in ``n`` differences."""
    return f"all {n} seeds agree" if n < FEWEST else f"{LEVEL:.0%} interval excludes zero"


def steps(frame: pd.DataFrame, metric: str, *, column: str, order: Sequence) -> pd.DataFrame:
    """Neighbours of a claimed order, compared seed by seed: one row per comparison.

    Args:
        frame: One row per run, with ``seed``.
        metric: The column compared, 0 to 1.
        column: The setting that differs.
        order: Its values, the one claimed to be best first.

    Returns:
        Columns ``better``, ``worse``, ``mean``, ``lowest`` and ``highest`` (in points), ``pairs``
        and ``sign`` (:func:`agreed`).
    """
    rows = []
    for better, worse in itertools.pairwise(order):
        gap = 100 * differences(frame, metric, column=column, better=better, worse=worse)
        rows.append((better, worse, gap.mean(), gap.min(), gap.max(), len(gap), agreed(gap)))
    return pd.DataFrame(rows, columns="better worse mean lowest highest pairs sign".split())


def over(frame: pd.DataFrame, metric: str, *, column: str, base: Mapping) -> pd.DataFrame:
    """Each value of a setting compared with a base value, seed by seed, with t intervals.

    Args:
        frame: One row per run, with ``seed``.
        metric: The column compared, 0 to 1.
        column: The setting that differs.
        base: For each value, the value it is compared with; itself for no comparison.

    Returns:
        Indexed by value, in points: ``mean`` (of the metric), ``difference``, and the limits
        ``low`` and ``high`` of its 95% interval (:func:`student`; NaN for one pair).
    """
    rows = {}
    for value, other in base.items():
        level = 100 * frame.loc[frame[column] == value, metric].mean()
        gap, limits = float("nan"), (float("nan"), float("nan"))
        if value != other:
            gaps = 100 * differences(frame, metric, column=column, better=value, worse=other)
            gap, limits = gaps.mean(), student(gaps)
        rows[value] = (level, gap, *limits)
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.set_axis(["mean", "difference", "low", "high"], axis=1).rename_axis(column)
