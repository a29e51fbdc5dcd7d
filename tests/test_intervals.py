"""Intervals over a few runs: hand cases, and what too few runs must not claim."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from moebert_lib.evidence.statistics import (
    Interval,
    agreed,
    bca_interval,
    chance,
    differences,
    holm,
    luck,
    over,
    paired,
    permutation_p,
    resampled,
    steps,
    student,
    t_interval,
)


def runs(**scores):
    rows = [(k, name, s) for name, values in scores.items() for k, s in enumerate(values)]
    return pd.DataFrame(rows, columns=["seed", "kind", "accuracy"])


def test_the_interval_is_student_s():
    values = [0.5, 0.52, 0.57, 0.49, 0.55, 0.61]
    low, high = stats.t.interval(0.95, 5, np.mean(values), stats.sem(values))
    assert t_interval(values)[:3] == pytest.approx((np.mean(values), low, high))


@pytest.mark.parametrize("interval", [t_interval, bca_interval])
def test_fewer_than_five_runs_decide_nothing(interval):
    few = interval([0.9, 0.9, 0.9, 0.8])
    assert np.isnan([few.low, few.high]).all()
    assert few.sign == "?" and "no interval, n = 4" in few.points()


@pytest.mark.parametrize(
    "low, high, sign", [(0.1, 0.2, ">"), (-0.2, -0.1, "<"), (-0.1, 0.1, "?"), (0.0, 0.1, "?")]
)
def test_the_sign_is_claimed_only_where_zero_is_excluded(low, high, sign):
    assert Interval((low + high) / 2, low, high, 5).sign == sign


def test_pairing_cancels_what_the_runs_share():
    shared = np.array([0.1, 0.5, 0.3, 0.9, 0.7])
    gap = paired(runs(a=shared + 0.02, b=shared), "accuracy", column="kind", better="a", worse="b")
    assert gap[:3] == pytest.approx((0.02, 0.02, 0.02)) and gap.sign == ">"


def test_a_run_without_its_partner_is_refused():
    with pytest.raises(ValueError, match="seed 2 has no pair"):
        paired(runs(a=[1, 2, 3], b=[1, 2]), "accuracy", column="kind", better="a", worse="b")


def test_differences_are_paired_by_seed_whatever_the_order_of_rows():
    frame = runs(a=[0.25, 0.75], b=[0.5, 0.5]).iloc[::-1]
    gap = differences(frame, "accuracy", column="kind", better="a", worse="b")
    assert gap.to_dict() == {0: -0.25, 1: 0.25}


@pytest.mark.parametrize(
    "values, sign",
    [
        ([0.1], "?"),
        ([0.1, 0.2], ">"),
        ([-0.1, -0.2, -0.3], "<"),
        ([0.1, 0.0], "?"),
        ([0.1, float("nan")], "?"),
        ([0.1, 0.2, 0.3, 0.1, -0.6], "?"),
        ([0.3, 0.2, 0.3, 0.3, 0.2], ">"),
    ],
)
def test_runs_agree_by_sign_while_they_are_few_and_by_interval_from_five_on(values, sign):
    assert agreed(values) == sign


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_runs_without_any_effect_agree_as_often_as_luck_says(n):
    noise = np.random.default_rng(0).normal(size=(400, n))
    found = np.mean([agreed(row) != "?" for row in noise])
    assert abs(found - luck(n)) < 3 * math.sqrt(0.25 / 400)


def test_an_order_is_compared_step_by_step_in_points():
    frame = runs(a=[0.5, 0.75], b=[0.25, 0.5], c=[0.25, 0.75])
    compared = steps(frame, "accuracy", column="kind", order=["a", "b", "c"])
    assert compared["mean"].tolist() == [25, -12.5] and compared["lowest"].tolist() == [25, -25]
    assert compared["pairs"].tolist() == [2, 2] and compared["sign"].tolist() == [">", "?"]


def test_student_s_interval_of_two_values_is_the_hand_worked_one():
    # mean 2, standard error 1, t of one degree of freedom 12.706
    assert student([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    assert np.isnan(student([1.0])).all()


def test_a_paired_interval_is_scipy_s_bca_and_the_same_every_time():
    one = np.array([0.1, 0.5, 0.3, 0.9, 0.7, 0.2])
    gaps = np.array([0.01, 0.04, -0.01, 0.03, 0.02, 0.09])
    pair = dict(column="kind", better="a", worse="b")
    mine = paired(runs(a=one + gaps, b=one), "accuracy", **pair)
    theirs = stats.bootstrap((gaps,), np.mean, method="BCa", rng=7).confidence_interval
    assert mine[1:3] == pytest.approx(tuple(theirs), abs=0.005)
    assert mine == paired(runs(a=one + gaps, b=one), "accuracy", **pair)


def test_bca_leans_to_the_side_of_the_long_tail_as_student_s_does_not():
    mean, low, high, _ = bca_interval([0, 0, 0, 0, 1, 1, 2, 9])
    assert high - mean > 1.5 * (mean - low)


@pytest.mark.parametrize("n, least, most", [(5, 0.77, 0.87), (12, 0.86, 0.94)])
def test_bca_of_few_values_covers_less_than_it_says(n, least, most):
    samples = np.random.default_rng(1).normal(size=(300, n))
    covered = [low <= 0 <= high for _, low, high, _ in map(bca_interval, samples)]
    assert least < np.mean(covered) < most
    assert 1 - chance(n) == pytest.approx(np.mean(covered), abs=0.05)


def test_chance_is_the_nominal_rate_for_student_s_and_none_for_one_pair():
    assert [chance(n) for n in (0, 1, 2, 4)] == pytest.approx([0, 0, 0.05, 0.05])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_least_p_of_a_permutation_test_is_two_to_the_one_minus_n(n):
    assert permutation_p(np.arange(1, n + 1)) == 2 ** (1 - n)


def test_a_permutation_test_by_hand():
    # Sums of (1, 2, -4) over all signs: 7, 5, 3, 1 and their opposites, -1, -1 ... observed -1.
    assert permutation_p([1, 2, -4]) == 1.0
    assert permutation_p([1, -2, 4]) == 0.75  # 3; as extreme: 3, 5, 7 and their opposites
    assert permutation_p([1, -2, 4], "greater") == 3 / 8
    assert permutation_p([1, -2, 4], "less") == 6 / 8


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_permutation_tests_are_scipy_s(alternative, rng):
    gaps = rng.normal(0.4, size=9)
    theirs = stats.permutation_test(
        (gaps,), np.mean, permutation_type="samples", alternative=alternative, n_resamples=np.inf
    )
    assert permutation_p(gaps, alternative) == pytest.approx(theirs.pvalue)


def test_beyond_twelve_pairs_the_test_is_sampled_reproducibly_and_never_zero(rng):
    gaps = rng.normal(0.5, size=14)
    signs = np.array(np.meshgrid(*[[1, -1]] * 14)).reshape(14, -1).T
    exact = (np.abs(signs @ gaps) >= abs(gaps.sum()) - 1e-9).mean()
    assert permutation_p(gaps) == pytest.approx(exact, abs=0.01)
    assert permutation_p(gaps) == permutation_p(gaps)
    assert permutation_p(np.full(20, 1.0)) > 0


def test_patterns_whose_sums_are_equal_but_for_rounding_count_as_ties():
    assert permutation_p([0.1, 0.2, -0.3]) == 1.0
    assert permutation_p([0.1, 0.2, 0.3]) == 0.25  # 0.1 + 0.2 is not quite 0.3


def test_a_permutation_test_of_nothing_is_nan_and_of_zeros_is_one():
    assert np.isnan(permutation_p([])) and permutation_p([0.0, 0.0, 0.0]) == 1


def test_an_unknown_alternative_is_refused():
    with pytest.raises(ValueError, match="alternative"):
        permutation_p([1.0], "bigger")


def test_holm_by_hand():
    # 0.01 x 4, then 0.02 x 3, then 0.03 x 2 which may not fall below 0.06, then 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])


def test_holm_leaves_tests_without_runs_out_of_its_count():
    assert holm([np.nan, 0.04, 0.01]) == pytest.approx([np.nan, 0.04, 0.02], nan_ok=True)
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_over_holds_each_value_against_its_own_base_seed_by_seed():
    rows = [
        ("a", 0, 0.5),
        ("a", 1, 0.7),
        ("b", 1, 0.8),
        ("b", 0, 0.5),
        ("c", 0, 0.1),
        ("c", 1, 0.4),
    ]
    frame = pd.DataFrame(rows, columns=["way", "seed", "accuracy"])
    told = over(frame, "accuracy", column="way", base={"a": "a", "b": "a", "c": "b"})
    assert told["mean"].tolist() == pytest.approx([60, 65, 25])
    assert told["difference"].tolist()[1:] == pytest.approx([5, -40])
    half = stats.t.ppf(0.975, 1) * np.std([0, 10], ddof=1) / np.sqrt(2)
    assert told.loc["b", ["low", "high"]].tolist() == pytest.approx([5 - half, 5 + half])
    assert told.loc["a"].isna().tolist() == [False, True, True, True]


def test_examples_drawn_again_spread_as_a_binomial_count():
    right = np.arange(500) < 400  # 80 of 100
    low, high = resampled(lambda rows: right[rows].mean(), 500)
    expected = stats.binom(500, 0.8).ppf([0.025, 0.975]) / 500
    assert [low, high] == pytest.approx(expected, abs=0.006)
    assert (low, high) == resampled(lambda rows: right[rows].mean(), 500)


def test_two_models_are_resampled_on_the_same_examples():
    right = np.random.default_rng(1).random(300) < 0.7
    apart = resampled(lambda rows: right[rows].mean() - right[rows].mean(), 300)
    assert apart == (0.0, 0.0)
    assert np.isnan(resampled(lambda rows: 1.0, 4)).all()
