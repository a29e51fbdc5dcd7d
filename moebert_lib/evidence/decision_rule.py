"""The one rule by which the workbook compares two arms: estimate, interval, p-value and verdict.

What varies: another seed (with its teacher) gives another student, and another development set
would hold other examples. Both are part of every interval here.

What is compared: the mean difference of two arms on *these* tasks, for further seeds, teachers and
examples. Runs of one seed and answers to one example form pairs, so each task gives a table of
differences with a row for each run and a column for each example. Two-way analysis of variance
gives the variance of its mean in closed form (:func:`compare`). A few runs know little about
their own variance, so comparisons of one task share what they know (:func:`moderate`; Smyth 2004).
Over tasks the mean of the tasks' differences is taken (:func:`over_tasks`).

What is said: one of six verdicts (:func:`judge`). The p-values of the comparisons that were named
before the runs are corrected together (``statistics.holm``); all other comparisons are exploratory.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

LEVEL = 0.95  #: confidence level of every interval
ALPHA = 0.05  #: highest p-value of a verdict, after Holm's correction
POWER = 0.8  #: chance to see an effect that :func:`enough` plans for
#: Points within which two arms count as equal: half of the effect of importance over random in
#: the paper's Figure 3a. Fixed before any run.
MARGIN = 0.45
LEARNED = 0.01  #: highest McNemar p-value at which a teacher counts as better than guessing

REPRODUCED, OPPOSITE, SMALLER = "reproduced", "opposite", "smaller than the paper's"
EQUAL, NOT_EQUAL, NOT_ENOUGH = "equal", "not equal", "not enough evidence"
VERDICTS = (REPRODUCED, OPPOSITE, SMALLER, EQUAL, NOT_EQUAL, NOT_ENOUGH)


class Estimate(NamedTuple):
    """A mean difference of two arms and its error, in the unit of the scores.

    Attributes:
        mean: First minus second arm.
        run_part: Variance of ``mean`` that comes from seeds and teachers.
        run_df: Degrees of freedom of ``run_part``.
        example_part: Variance of ``mean`` that comes from the choice of examples.
        example_df: Degrees of freedom of ``example_part``.
        n_runs: Pairs of runs; over several tasks the fewest of a task.
        n_examples: Examples that were judged; over several tasks all of them.
    """

    mean: float
    run_part: float
    run_df: float
    example_part: float
    example_df: float
    n_runs: int
    n_examples: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(self.run_part + self.example_part)

    @property
    def df(self) -> float:
        """Degrees of freedom of the error (Satterthwaite 1946)."""
        parts = ((self.run_part, self.run_df), (self.example_part, self.example_df))
        if not all(df for _, df in parts):
            return math.nan
        below = sum(part**2 / df for part, df in parts)
        return self.error**4 / below if below else math.inf

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Lower and upper limit of Student's t interval; NaN where the error is not known."""
        reach = stats.t.ppf((1 + level) / 2, self.df) * self.error
        return self.mean - reach, self.mean + reach

    def p(self, null: float = 0.0) -> float:
        """Two-sided p-value of "the true difference is ``null``"; NaN where no error is known."""
        if self.error == 0:
            return float(self.mean == null)
        return float(2 * stats.t.sf(abs(self.mean - null) / self.error, self.df))

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit: 100 for points of scores between 0 and 1."""
        parts = {"run_part": self.run_part, "example_part": self.example_part}
        squared = {name: factor**2 * part for name, part in parts.items()}
        return self._replace(mean=factor * self.mean, **squared)


def compare(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Mean difference of two arms on one task, with the variance of both runs and examples.

    Args:
        first, second: :func:`contributions` of each run, ``(runs, examples)``; row ``i`` of both
            has the same seed and teacher.

    With a single run ``run_part`` is NaN until :func:`moderate` gives it the variance of
    comparable runs.

    Source: two-way random effects without replication. The expected mean squares give
    ``Var(mean) = MS_runs / (SE) + (MS_examples - MS_rest) / (SE)``.
    """
    gaps = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    S, E = gaps.shape
    mean, by_run, by_example = gaps.mean(), gaps.mean(1), gaps.mean(0)
    if S == 1:
        run_part, example_part = math.nan, gaps.var(ddof=1) / E
    else:
        rest = gaps - by_run[:, None] - by_example + mean
        rest_square = (rest**2).sum() / ((S - 1) * (E - 1))
        run_part = by_run.var(ddof=1) / S
        example_part = max(by_example.var(ddof=1) - rest_square / S, 0.0) / E
    return Estimate(float(mean), float(run_part), S - 1, float(example_part), E - 1, S, E)


def moderate(estimates: Sequence[Estimate]) -> list[Estimate]:
    """The same estimates, their variances over runs drawn towards what they have in common.

    Variances of comparable arms are taken as draws around a common one. How much they differ
    says how many degrees of freedom the common variance is worth; each estimate then uses the
    weighted mean of its own and the common variance, and the sum of their degrees of freedom, at
    most those of all comparisons together.

    Args:
        estimates: Comparisons on one task.

    Source: Smyth (2004), Linear models and empirical Bayes methods, section 6.2.
    """
    known = [e for e in estimates if e.run_df > 0 and e.run_part > 0]
    if len(known) < 3:
        return list(estimates)
    variances = np.array([e.run_part * e.n_runs for e in known])
    half = np.array([e.run_df for e in known]) / 2
    logs = np.log(variances) - special.digamma(half) + np.log(half)
    spread = logs.var(ddof=1) - special.polygamma(1, half).mean()
    prior = _degrees_of(spread)
    common = math.exp(logs.mean() + (special.digamma(prior / 2) - math.log(prior / 2)))
    pooled = sum(e.run_df for e in known)  # the common variance is no better known than this
    moderated = []
    for e in estimates:
        own = e.run_part * e.n_runs if e.run_df else 0.0
        variance = (prior * common + e.run_df * own) / (prior + e.run_df)
        df = min(prior + e.run_df, pooled)
        moderated.append(e._replace(run_part=variance / e.n_runs, run_df=df))
    return moderated


def _degrees_of(spread: float, most: float = 1e4) -> float:
    """Degrees of freedom at which the log of a variance varies by ``spread``."""
    if spread <= special.polygamma(1, most / 2):
        return most
    solve = optimize.brentq(lambda half: special.polygamma(1, half) - spread, 1e-3, most / 2)
    return 2 * float(solve)


def over_tasks(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of the tasks' differences: what these tasks say together.

    Tasks are not a sample of all tasks, so their scatter is no part of the error.
    """
    K = len(estimates)
    runs = [e.run_part / K**2 for e in estimates]
    examples = [e.example_part / K**2 for e in estimates]
    return Estimate(
        float(np.mean([e.mean for e in estimates])),
        sum(runs),
        _joint_df(runs, [e.run_df for e in estimates]),
        sum(examples),
        _joint_df(examples, [e.example_df for e in estimates]),
        min(e.n_runs for e in estimates),
        sum(e.n_examples for e in estimates),
    )


def _joint_df(parts: Sequence[float], dfs: Sequence[float]) -> float:
    below = sum(part**2 / df for part, df in zip(parts, dfs, strict=True) if part and df)
    return sum(parts) ** 2 / below if below else max(dfs)


def tested_p(estimate: Estimate, kind: str) -> float:
    """The p-value that decides a comparison of this kind, before Holm's correction.

    ``better``: of "no difference". ``equal``: the larger one of two one-sided tests against the
    margin (TOST). ``not worse``: of "worse by the margin".
    """
    if kind == "equal":
        ends = (estimate.mean + MARGIN, MARGIN - estimate.mean)
        if estimate.error == 0:
            return float(min(ends) <= 0)
        return float(max(stats.t.sf(end / estimate.error, estimate.df) for end in ends))
    return estimate.p(-MARGIN if kind == "not worse" else 0.0)


def judge(estimate: Estimate, kind: str, paper: float, p: float | None = None) -> str:
    """The verdict on one comparison, in points.

    1. *reproduced*: the difference has the claimed sign, and p < 0.05 after Holm's correction.
       A claim of "not worse" is reproduced if the difference lies above minus the margin.
    2. *opposite*: the same in the other direction.
    3. *smaller than the paper's*: the interval contains zero, and not the paper's difference.
    4. *equal*, for claims of equality: the difference lies within the margin (two one-sided tests).
    5. *not equal*, for claims of equality: the interval lies outside the margin.
    6. *not enough evidence*: anything else. :func:`enough` says what would be enough.

    Args:
        estimate: In points.
        kind: What the paper claims of the first arm: ``better``, ``equal`` or ``not worse``.
        paper: The paper's difference in points.
        p: :func:`tested_p` after Holm's correction; None for an exploratory comparison.
    """
    p = tested_p(estimate, kind) if p is None else p
    low, high = estimate.interval()
    if kind == "equal":
        if p < ALPHA:
            return EQUAL
        return NOT_EQUAL if low > MARGIN or high < -MARGIN else NOT_ENOUGH
    null = -MARGIN if kind == "not worse" else 0.0
    if p < ALPHA:
        return REPRODUCED if estimate.mean > null else OPPOSITE
    if kind == "better" and low <= 0 <= high and not low <= paper <= high:
        return SMALLER
    return NOT_ENOUGH


def enough(estimate: Estimate, kind: str, paper: float) -> str:
    """How many runs or examples would show an effect as large as the paper's, in words.

    "Would show" means with a chance of 80 %. For a claim of equality the effect is the margin.
    Where more runs alone or more examples alone cannot be enough, both are needed.
    """
    effect = abs(paper) if kind == "better" and paper else MARGIN
    reach = stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)
    allowed = (effect / reach) ** 2
    if not math.isfinite(estimate.run_part):
        return "more than one run"
    if estimate.run_part + estimate.example_part <= allowed:
        return "enough for an effect of the paper's size"
    ways = []
    if allowed > estimate.example_part:
        factor = estimate.run_part / (allowed - estimate.example_part)
        ways.append(f"{math.ceil(factor * estimate.n_runs)} runs")
    if allowed > estimate.run_part:
        factor = estimate.example_part / (allowed - estimate.run_part)
        ways.append(f"{math.ceil(factor * estimate.n_examples):,} examples")
    if ways:
        return " or ".join(ways)
    runs = math.ceil(2 * estimate.run_part / allowed * estimate.n_runs)
    examples = math.ceil(2 * estimate.example_part / allowed * estimate.n_examples)
    return f"{runs} runs and {examples:,} examples"


def contributions(answers: np.ndarray, truths: np.ndarray, metric: str) -> np.ndarray:
    """What each example contributes to a metric: values whose mean is the metric, ``(examples,)``.

    Their variance over the examples, divided by their number, is the metric's variance to first
    order (the influence function). For accuracy they are 1 for a right answer and 0 for another.

    Args:
        answers, truths: Classes, or values for correlations, ``(examples,)``.
        metric: ``accuracy``, ``f1`` (of class 1), ``matthews``, ``pearson`` or
            ``spearman``.

    Raises:
        ValueError: another metric.
    """
    answers, truths = np.asarray(answers), np.asarray(truths)
    if metric == "accuracy":
        return (answers == truths).astype(float)
    if metric == "f1":  # a ratio of two means
        p, q = (answers == 1).astype(float), (truths == 1).astype(float)
        size = (p + q).mean()
        if size == 0:
            return np.zeros(len(p))
        f1 = 2 * (p * q).mean() / size
        return f1 + (2 * p * q - f1 * (p + q)) / size
    if metric in ("matthews", "pearson", "spearman"):
        columns = [answers.astype(float), truths.astype(float)]
        if metric == "spearman":
            columns = [stats.rankdata(column) for column in columns]
        if any(np.ptp(column) == 0 for column in columns):
            return np.zeros(len(answers))
        a, b = ((column - column.mean()) / column.std() for column in columns)
        r = (a * b).mean()
        return r + a * b - r * (a**2 + b**2) / 2
    raise ValueError(f"no contributions to '{metric}'")


def has_learned(answers: np.ndarray, truths: np.ndarray, most_frequent: int) -> tuple[bool, float]:
    """Whether a teacher beats always giving the most frequent answer, and McNemar's exact p.

    Args:
        answers, truths: Classes, ``(examples,)``.
        most_frequent: The most frequent class of the training split.
    """
    right, guessed = np.asarray(answers) == truths, np.asarray(truths) == most_frequent
    better, worse = int((right & ~guessed).sum()), int((guessed & ~right).sum())
    if better + worse == 0:
        return False, 1.0
    p = float(stats.binomtest(better, better + worse).pvalue)
    return better > worse and p < LEARNED, p
