"""The claims are the paper's, and their runs are those that the notebooks ask for."""

import numpy as np
import pandas as pd
import pytest

from moebert_lib.config import paper_numbers
from moebert_lib.config.settings import Settings
from moebert_lib.evidence import claims
from moebert_lib.evidence.claims import ARMS, CLAIMS, CONTROLS, PRIMARY, Comparison
from moebert_lib.experiments import ablations

COMPARISONS = [one for claim in CLAIMS for one in claim.comparisons]
SETTINGS = Settings.at("quick")
WIDTH = 1536
SCORES = {"accuracy": 0.5, "teacher_accuracy": 0.75, "f1": 0.25, "teacher_f1": 1.0}


def test_there_are_at_least_twelve_claims_each_with_a_key_of_its_own():
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS) >= 12


def test_every_arm_is_compared_and_every_comparison_names_two_arms():
    assert {arm for one in COMPARISONS for arm in one[:2]} == set(ARMS)
    assert len({str(one) for one in COMPARISONS}) == len(COMPARISONS)


@pytest.mark.parametrize("one", COMPARISONS, ids=str)
def test_the_papers_own_numbers_say_what_it_claims(one):
    bounds = {"better": (0, np.inf), "equal": (-0.5, 0.5), "not worse": (-0.5, np.inf)}[one.kind]
    assert bounds[0] < one.printed < bounds[1]


def test_printed_steps_by_hand():
    steps = {str(one): one.printed for one in COMPARISONS}
    assert steps["importance > random"] == pytest.approx(84.70 - 83.78)
    assert steps["1/2 wide > 1/4 wide"] == pytest.approx(84.90 - 84.70)
    assert steps["distilled > not distilled"] == pytest.approx((0.7 + 1.3 + 0.8) / 3)
    assert steps["its BERT (spans) > MoEBERT (spans)"] == pytest.approx((0.5 + 0.9) / 2)
    assert steps["MoEBERT-large ≥ its BERT-large"] == pytest.approx((1.1 + 0.0) / 2)


def test_every_arm_is_a_run_that_some_notebook_asks_for():
    sweeps = dict(fractions=[24, 8, 4, 2], numbers=[1, 2, 4, 8], thirds=[0, 1, 2, 3])
    asked = [*ablations.ablations(SETTINGS, **sweeps).values()]
    asked += [
        *ablations.routers(SETTINGS).values(),
        *ablations.results(SETTINGS, ["library"]).values(),
    ]
    size, shared = SETTINGS.sizes(WIDTH)
    full = {"expert_size": size, "n_shared": shared}
    points = {run if run.expert_size else run.but(**full) for runs in asked for run in runs}
    mine = [claims.point(arm, SETTINGS, WIDTH) for arm in ARMS if "large" not in arm]
    assert set(mine) <= points


def test_sizes_are_the_papers_at_the_papers_width():
    base = Settings.at("paper", model="wide")  # an unknown width is checked here alone
    default = claims.point("MoEBERT", base, 3072)
    assert (default.expert_size, default.n_shared) == (768, 512)
    assert claims.point("1/3 shared", base, 3072).n_shared == 256
    assert claims.point("1/24 wide", base, 3072).expert_size == 128
    large = claims.point("MoEBERT-large", Settings.at("paper", task="rte"), 3072)
    assert (large.expert_size, large.n_shared) == (1024, 512)


def test_an_arm_that_the_layer_cannot_hold_has_no_point():
    assert claims.point("8 experts", Settings.at("quick", n_shared=0), WIDTH) is None


def test_pairs_share_task_and_seed_and_lonely_runs_drop_out():
    one = [("a", 0, 0.5), ("b", 0, 0.75), ("b", 1, 0.9)]
    other = [("b", 0, 0.25), ("a", 0, 0.375), ("a", 2, 0.1)]
    rows = [("importance", *run) for run in one] + [("random", *run) for run in other]
    frame = pd.DataFrame(rows, columns=["arm", "task", "seed", "score"])
    gaps = claims.differences(frame, Comparison("importance", "random"))
    assert gaps.to_dict() == {("a", 0): 12.5, ("b", 0): 50.0}


def test_without_runs_there_are_no_pairs():
    nothing = pd.DataFrame(columns=["arm", "task", "seed", "score"])
    assert len(claims.differences(nothing, COMPARISONS[0])) == 0
    assert list(claims.pairs(nothing)) == ["claim", "comparison", "task", "seed", "difference"]


def test_runs_are_collected_by_arm_whether_or_not_their_sizes_are_spelled_out():
    sized = SETTINGS.but(expert_size=WIDTH // 4, n_shared=SETTINGS.sizes(WIDTH)[1])
    spans = ablations.on_task(SETTINGS, "passage")
    points = [
        SETTINGS.but(seed=1, split_seed=1),
        spans.but(seed=1, split_seed=1),
        sized.but(seed=0, split_seed=0, distill="last"),
    ]
    runs = pd.DataFrame([{**p.model_dump(), **SCORES} for p in points])
    frame = claims.collect(SETTINGS, ["library", "passage"], WIDTH, points=points, runs=runs)
    rows = set(frame[["arm", "task", "seed", "score"]].itertuples(index=False, name=None))
    assert {("importance", "library", 1, 0.5), ("its BERT (spans)", "passage", 1, 1.0)} <= rows
    assert {row[:3] for row in rows if row[0] == "last layer"} == {("last layer", "library", 0)}
    assert ("MoEBERT", "passage") not in {row[:2] for row in rows}
    assert not {"random", "MoEBERT-large", "its BERT-large"} & set(frame["arm"])


def test_every_claim_says_where_it_is_shown():
    shown = {claim.shown_in for claim in CLAIMS}
    figures = {name.replace("figure", "Figure ") for name in paper_numbers.FIGURES}
    assert shown == figures | {"Table 1", "Table 2", "Table 3", "Table 4"}


def test_runs_whose_teacher_is_no_better_than_guessing_do_not_count():
    points = [SETTINGS.but(seed=k, split_seed=k) for k in range(2)]
    guesses = (0.75, 0.5)  # the first teacher, at 0.75, has learned nothing
    rows = zip(points, guesses, strict=True)
    runs = pd.DataFrame([{**p.model_dump(), **SCORES, "guessing": g} for p, g in rows])
    frame = claims.collect(SETTINGS, ["library"], WIDTH, points=points, runs=runs)
    assert set(frame["seed"]) == {1}


def test_primary_comparisons_name_arms_tasks_and_claims_that_there_are():
    comparisons = {str(one) for one in COMPARISONS}
    for comparison, tasks, claim in PRIMARY:
        if claim:
            assert str(comparison) in comparisons
            one = next(each for each in CLAIMS if each.key == claim)
            assert comparison in one.comparisons
        else:
            assert comparison.second in CONTROLS and comparison.first in ARMS
        assert tasks and {*tasks} <= paper_numbers.TABLE7.keys()
    assert len({str(one.comparison) for one in PRIMARY}) == len(PRIMARY)
    table = claims.primary_table()
    assert len(table) == len(PRIMARY) and {*table["margin"]} == {0.45}
    assert table["comparison"].iloc[0] == "importance > random"


def test_the_margin_is_half_of_the_papers_step_by_importance():
    step = Comparison("importance", "random").printed
    assert claims.MARGIN == pytest.approx(step / 2, abs=0.02)


def test_controls_are_experiments_of_scale_base():
    base = Settings.at("base")
    trained_on = claims.point("dense trained on", base, 3072)
    assert (trained_on.n_experts, trained_on.expert_size, trained_on.distill) == (1, 3072, "none")
    half = claims.point("half depth", base, 3072)
    assert half.student == "half-depth" and half.distill == base.distill
    made = ablations.controls(base)
    assert trained_on == made["dense trained on"][0]
    assert half == ablations.with_sizes(made["half depth"][0])
    assert np.isnan(Comparison("MoEBERT", "half depth").printed)
    with pytest.raises(KeyError):
        claims.point("no such arm", base, 3072)
