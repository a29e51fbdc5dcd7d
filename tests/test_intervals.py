"""Intervals over a few runs: hand cases, and what too few runs must not claim."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from moebert_lib.intervals import Interval, agreed, chain, differences, paired, steps, t_interval


def runs(**scores):
    rows = [(k, name, s) for name, values in scores.items() for k, s in enumerate(values)]
    return pd.DataFrame(rows, columns=["seed", "kind", "accuracy"])


def test_the_interval_is_student_s():
    values = [0.5, 0.52, 0.57, 0.49, 0.55, 0.61]
    low, high = stats.t.interval(0.95, 5, np.mean(values), stats.sem(values))
    assert t_interval(values)[:3] == pytest.approx((np.mean(values), low, high))


def test_fewer_than_five_runs_decide_nothing():
    few = t_interval([0.9, 0.9, 0.9, 0.9])
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


def test_an_order_is_compared_step_by_step_in_points():
    frame = runs(a=[0.5, 0.75], b=[0.25, 0.5], c=[0.25, 0.75])
    compared = steps(frame, "accuracy", column="kind", order=["a", "b", "c"])
    assert compared["mean"].tolist() == [25, -12.5] and compared["lowest"].tolist() == [25, -25]
    assert compared["pairs"].tolist() == [2, 2] and chain(compared) == "a > b ? c"
