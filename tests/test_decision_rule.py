"""The rule of comparison: slow references, and its rate of false decisions by simulation."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from moebert_lib.evidence import decision_rule as rule
from moebert_lib.evidence.statistics import holm
from moebert_lib.training.evaluation import score

METRICS = ["accuracy", "f1", "matthews", "pearson", "spearman"]


def crossed(random, *, runs, examples, mean=0.0, by_run=0.004, by_example=0.0, rest=0.2, times=1):
    """Draws of differences ``(times, runs, examples)`` whose parts have these deviations."""
    a = random.normal(scale=by_run, size=(times, runs, 1))
    b = random.normal(scale=by_example, size=(times, 1, examples))
    return mean + a + b + random.normal(scale=rest, size=(times, runs, examples))


@pytest.mark.parametrize("metric", METRICS)
def test_contributions_have_the_metric_as_mean_and_its_bootstrap_variance(metric, rng):
    truths = rng.integers(2, size=600) if metric in METRICS[:3] else rng.normal(size=600)
    flipped = rng.random(600) < 0.2
    answers = np.where(flipped, 1 - truths, truths) if metric in METRICS[:3] else truths
    answers = answers + (0.7 * rng.normal(size=600) if metric in METRICS[3:] else 0)
    values = rule.contributions(answers, truths, metric)
    assert values.mean() == pytest.approx(score(answers, truths, [metric])[metric], abs=1e-12)
    rows = [rng.integers(600, size=600) for _ in range(400)]
    drawn = [score(answers[row], truths[row], [metric])[metric] for row in rows]
    assert values.std() / math.sqrt(600) == pytest.approx(np.std(drawn), rel=0.15)


def test_contributions_of_a_model_with_one_answer_are_zero_correlation():
    answers, truths = np.zeros(10, int), np.arange(10) % 2
    assert rule.contributions(answers, truths, "matthews").tolist() == [0.0] * 10
    with pytest.raises(ValueError, match="bleu"):
        rule.contributions(answers, truths, "bleu")


def test_error_is_that_of_a_two_way_bootstrap(rng):
    """The Multi-Bootstrap (Sellam et al. 2022): runs and examples are both drawn again."""
    (gaps,) = crossed(rng, runs=40, examples=400, by_run=0.02, by_example=0.3, rest=0.3)
    estimate = rule.compare(gaps, np.zeros_like(gaps))
    means = []
    for _ in range(2000):
        rows, columns = rng.integers(40, size=40), rng.integers(400, size=400)
        means.append(gaps[rows][:, columns].mean())
    assert estimate.error == pytest.approx(np.std(means), rel=0.06)


def test_parts_are_those_of_a_crossed_mixed_model(rng):
    from statsmodels.formula.api import mixedlm as mixed

    (gaps,) = crossed(rng, runs=8, examples=30, mean=0.1, by_run=0.3, by_example=0.4, rest=0.2)
    estimate = rule.compare(gaps, np.zeros_like(gaps))
    run, example = np.indices(gaps.shape).reshape(2, -1)
    frame = pd.DataFrame({"gap": gaps.ravel(), "run": run, "example": example, "all": 1})
    parts = {"run": "0 + C(run)", "example": "0 + C(example)"}
    fitted = mixed("gap ~ 1", frame, groups="all", vc_formula=parts).fit()
    assert estimate.mean == pytest.approx(fitted.params["Intercept"], abs=1e-4)
    assert estimate.error == pytest.approx(fitted.bse["Intercept"], rel=0.02)


def test_one_run_has_no_interval_until_comparable_runs_lend_their_variance(rng):
    drawn = crossed(rng, runs=3, examples=200, by_run=0.02, times=6)
    several = [rule.compare(gaps, 0 * gaps) for gaps in drawn]
    single = rule.compare(drawn[0][:1], 0 * drawn[0][:1])
    assert all(map(math.isnan, single.interval())) and math.isnan(single.p())
    assert rule.judge(single, "better", 0.02) == rule.NOT_ENOUGH
    lent = rule.moderate([*several, single])[-1]
    assert lent.run_part > 0 and not math.isnan(lent.p())


def test_moderation_keeps_order_and_total_and_needs_three(rng):
    estimates = [
        rule.compare(gaps, 0 * gaps) for gaps in crossed(rng, runs=4, examples=50, times=9)
    ]
    moderated = rule.moderate(estimates)
    before = np.array([e.run_part for e in estimates])
    after = np.array([e.run_part for e in moderated])
    assert (np.argsort(before) == np.argsort(after)).all()
    assert np.ptp(np.log(after)) < np.ptp(np.log(before))
    assert all(m.run_df > e.run_df for m, e in zip(moderated, estimates, strict=True))
    assert rule.moderate(estimates[:2]) == estimates[:2]


def test_mean_over_tasks_is_that_of_its_tasks(rng):
    estimates = [
        rule.compare(gaps, 0 * gaps)
        for gaps in crossed(rng, runs=5, examples=80, mean=0.3, times=4)
    ]
    joint = rule.over_tasks(estimates)
    assert joint.mean == pytest.approx(np.mean([e.mean for e in estimates]))
    assert joint.error**2 == pytest.approx(sum(e.error**2 for e in estimates) / 16)
    assert max(e.df for e in estimates) < joint.df
    assert rule.over_tasks(estimates[:1]).df == pytest.approx(estimates[0].df)


@pytest.mark.parametrize(
    "mean, error, kind, paper, verdict",
    [
        (2.0, 0.3, "better", 0.9, rule.REPRODUCED),
        (-2.0, 0.3, "better", 0.9, rule.OPPOSITE),
        (0.1, 0.2, "better", 0.9, rule.SMALLER),
        (0.4, 0.4, "better", 0.9, rule.NOT_ENOUGH),
        (0.1, 0.1, "equal", 0.0, rule.EQUAL),
        (2.0, 0.3, "equal", 0.0, rule.NOT_EQUAL),
        (0.4, 0.3, "equal", 0.0, rule.NOT_ENOUGH),
        (0.3, 0.1, "not worse", 0.4, rule.REPRODUCED),
        (-2.0, 0.1, "not worse", 0.4, rule.OPPOSITE),
        (-0.4, 0.3, "not worse", 0.4, rule.NOT_ENOUGH),
    ],
)
def test_each_verdict_in_a_plain_case(mean, error, kind, paper, verdict):
    estimate = rule.Estimate(mean, error**2, 30.0, 0.0, 500.0, 5, 872)
    assert rule.judge(estimate, kind, paper) == verdict


def test_a_larger_effect_on_one_task_takes_no_verdict_away():
    """Four tasks at +2.4, +2.5, +2.3, +1.2 and with the second at +7.5: both are decided."""

    def verdict(*means):
        tasks = [rule.Estimate(m, 0.3, 6.0, 0.4, 800.0, 3, 800) for m in means]
        return rule.judge(rule.over_tasks(tasks), "better", 0.9)

    assert verdict(2.4, 2.5, 2.3, 1.2) == verdict(2.4, 7.5, 2.3, 1.2) == rule.REPRODUCED


def test_correction_decides_and_never_brings_a_verdict():
    estimate = rule.Estimate(1.0, 0.16, 40.0, 0.0, 500.0, 5, 872)
    assert rule.judge(estimate, "better", 0.9) == rule.REPRODUCED
    corrected = holm([rule.tested_p(estimate, "better")] * 9)[0]
    assert rule.judge(estimate, "better", 0.9, corrected) == rule.NOT_ENOUGH


def test_what_is_planned_as_enough_is_enough(rng):
    """As many runs as advised see the paper's effect in about four of five draws."""
    pilot = rule.Estimate(0.5, 0.3**2, 200.0, 0.05**2, 5000.0, 5, 5000)
    n = int(rule.enough(pilot, "better", 0.6).split()[0])
    error = math.sqrt(0.3**2 * 5 / n + 0.05**2)
    shown = stats.norm.sf((stats.norm.ppf(0.975) * error - 0.6) / error)
    assert 0.78 < shown < 0.86
    assert rule.enough(pilot._replace(run_part=math.nan), "better", 0.6) == "more than one run"
    both = rule.enough(pilot._replace(example_part=0.3**2), "better", 0.6)
    assert "runs and" in both and "examples" in both


@pytest.mark.parametrize("right, expected", [(0.9, True), (0.56, False), (0.3, False)])
def test_a_teacher_counts_if_it_beats_the_most_frequent_answer(right, expected, rng):
    truths = (rng.random(277) < 0.47).astype(int)
    answers = np.where(rng.random(277) < right, truths, 1 - truths)
    learned, p = rule.has_learned(answers, truths, 0)
    assert learned is expected and 0 <= p <= 1
    assert rule.has_learned(np.zeros(277, int), truths, 0) == (False, 1.0)


# False decisions, by simulation: 400 draws of each cell.

N_DRAWS, N_EXAMPLES, N_ARMS = 400, 300, 6
SPREAD = 0.45  # of a paired difference of two students on one example: 20 % of answers differ


def simulated(random, *, seeds, tasks, truth):
    """Estimates in points of one comparison whose true difference is ``truth``, of each draw.

    Five more arms, without an effect, are what its variance over seeds is moderated with.
    """
    drawn = []
    for _ in range(N_DRAWS):
        parts = []
        for _ in range(tasks):
            spread = 0.01 * math.sqrt(random.chisquare(8) / 8)  # tasks differ in their seeds' noise
            gaps = crossed(
                random,
                runs=seeds,
                examples=N_EXAMPLES,
                by_run=spread,
                by_example=SPREAD / 2,
                rest=SPREAD,
                times=N_ARMS,
            )
            gaps[0] += truth / 100
            estimates = rule.moderate([rule.compare(arm, 0 * arm) for arm in gaps])
            parts.append(estimates[0].scaled(100))
        drawn.append(rule.over_tasks(parts))
    return drawn


@pytest.mark.parametrize("seeds, tasks", [*itertools.product([3, 5, 10], [1, 4])])
def test_false_decisions_are_at_most_five_in_a_hundred(seeds, tasks, rng, record_property):
    none = simulated(rng, seeds=seeds, tasks=tasks, truth=0.0)
    shift = {"paper": 3.0, "margin": rule.MARGIN}
    real = {name: [e._replace(mean=e.mean + by) for e in none] for name, by in shift.items()}

    def rate(estimates, kind, *verdicts):
        judged = [rule.judge(e, kind, shift["paper"]) for e in estimates]
        return sum(verdict in verdicts for verdict in judged) / N_DRAWS

    false = {
        "decided without an effect": rate(none, "better", rule.REPRODUCED, rule.OPPOSITE),
        "smaller at the paper's effect": rate(real["paper"], "better", rule.SMALLER),
        "equal or not at the margin": rate(real["margin"], "equal", rule.EQUAL, rule.NOT_EQUAL),
    }
    power = rate(real["paper"], "better", rule.REPRODUCED)
    record_property("power", power)
    print(f"{seeds} seeds, {tasks} tasks: {false}, power at {shift['paper']} points {power:.2f}")
    most = stats.binom.ppf(0.999, N_DRAWS, 0.05) / N_DRAWS  # the simulation's own error
    assert max(false.values()) <= most, false
