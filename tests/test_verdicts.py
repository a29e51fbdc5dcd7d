"""Verdicts: planted effects are found, planted opposites contradicted, noise left undecided."""

import numpy as np
import pandas as pd
import pytest

from moebert_lib.config.paper_numbers import table
from moebert_lib.evidence import verdicts
from moebert_lib.evidence.claims import ARMS, CLAIMS
from moebert_lib.evidence.verdicts import CONTRADICTED, NO_RUNS, REPRODUCED, UNDECIDED, judge

NOISE = [0.4, -0.5, 0.1, -0.2, 0.3, -0.1, 0.2, -0.3]


def made(effects=(), *, n=8, noise=0.0, tasks=("library",), arms=tuple(ARMS)):
    """Scores around 60%, each arm moved by its effect in points, with noise of mean zero."""
    rng, effects, rows = np.random.default_rng(0), dict(effects), []
    for arm in arms:
        for task in tasks:
            luck = rng.normal(size=n)
            scores = 60 + effects.get(arm, 0.0) + noise * (luck - luck.mean())
            rows += [(arm, task, seed, score / 100) for seed, score in enumerate(scores)]
    return pd.DataFrame(rows, columns=["arm", "task", "seed", "score"])


def told(frame):
    return verdicts.verdicts(verdicts.compare(frame))["verdict"]


@pytest.mark.parametrize(
    "gaps, verdict",
    [
        (np.add(NOISE, 2), REPRODUCED),
        (np.add(NOISE, -2), CONTRADICTED),
        (NOISE, UNDECIDED),
        ([0.0] * 6, UNDECIDED),
        ([2.0, 2.1, 1.9], REPRODUCED),
        ([-2.0, -2.1, -1.9], CONTRADICTED),
        ([0.5, 2.0, 4.0], UNDECIDED),  # all of one sign; t = 2.1
        ([1.0, 1.0, 1.0], UNDECIDED),  # no spread to judge by
        ([0.0, 0.0], UNDECIDED),
        ([2.0] * 6, UNDECIDED),
        ([9.0], UNDECIDED),
        ([], NO_RUNS),
    ],
)
def test_a_claimed_direction(gaps, verdict):
    assert judge(gaps, "better")[0] == verdict


def test_gaps_that_are_equal_but_for_rounding_have_no_interval():
    for n in (277, 408, 600):
        right = np.array([[k, k + 1, k + 2] for k in range(100)])
        told = {judge(gaps, "better")[0] for gaps in 100 * ((right + 3) / n - right / n)}
        assert told == {UNDECIDED}, n


def test_seeds_of_few_tasks_do_not_pass_for_many_tasks():
    rng, n_decided = np.random.default_rng(0), 0
    for _ in range(60):
        rows = [
            (arm, task, seed, (60 + move * (arm == "distilled") + 0.1 * rng.normal()) / 100)
            for task, move in zip("abcd", rng.normal(size=4), strict=True)
            for arm in ("distilled", "not distilled")
            for seed in range(3)
        ]
        frame = pd.DataFrame(rows, columns=["arm", "task", "seed", "score"])
        compared = verdicts.compare(frame).set_index("claim").loc["distillation"]
        assert (compared["tasks"], compared["runs"], compared["pairs"]) == (4, 12, 4)
        n_decided += compared["verdict"] != UNDECIDED
    assert n_decided <= 9  # 3 by name; pooled, about 24 would be


@pytest.mark.parametrize(
    "gaps, verdict",
    [
        (np.multiply(NOISE, 0.5), REPRODUCED),
        (np.add(NOISE, 2), CONTRADICTED),
        (np.add(NOISE, -2), CONTRADICTED),
        (np.add(NOISE, 0.5), UNDECIDED),
        (np.multiply(NOISE, 9), UNDECIDED),  # too noisy to call equal
        ([0.1, 0.0, -0.1], REPRODUCED),
        ([2.0, 2.1, 1.9], CONTRADICTED),
    ],
)
def test_a_claimed_equality(gaps, verdict):
    assert judge(gaps, "equal")[0] == verdict


@pytest.mark.parametrize(
    "shift, verdict", [(3, REPRODUCED), (0, REPRODUCED), (-3, CONTRADICTED), (-0.5, UNDECIDED)]
)
def test_not_worse_allows_for_the_margin_and_for_any_gain(shift, verdict):
    assert judge(np.add(NOISE, shift), "not worse")[0] == verdict


def test_two_to_four_pairs_are_decided_by_the_paired_t_test():
    from scipy import stats

    rng, agreed = np.random.default_rng(0), []
    for n in (2, 3, 4):
        for _ in range(50):
            gaps = rng.normal(1, size=n)
            by_t = stats.ttest_1samp(gaps, 0).pvalue <= 0.05
            agreed.append(by_t == (judge(gaps, "better")[0] != UNDECIDED))
    assert all(agreed)


def test_planted_effects_are_found_and_planted_opposites_contradicted():
    right = told(made({"importance": 4, "random": 2, "inverse": 0}, noise=0.2))
    wrong = told(made({"importance": 0, "random": 2, "inverse": 4}, noise=0.2))
    assert right[["importance", "inverse"]].tolist() == [REPRODUCED] * 2
    assert wrong[["importance", "inverse"]].tolist() == [CONTRADICTED] * 2


def test_a_claim_of_several_comparisons_needs_all_and_falls_with_one():
    wide = {"1/2 wide": 9, "1/4 wide": 6, "1/8 wide": 3}
    assert told(made(wide, noise=0.2))["width"] == REPRODUCED
    assert told(made({**wide, "1/2 wide": 6}, noise=0.2))["width"] == UNDECIDED
    assert told(made({**wide, "1/2 wide": 0}, noise=0.2))["width"] == CONTRADICTED


def test_comparisons_without_runs_are_left_out_and_counted():
    frame = made({"1/2 wide": 9, "1/4 wide": 6, "1/8 wide": 3}, noise=0.2)
    compared = verdicts.compare(frame[frame["arm"] != "1/24 wide"])
    row = verdicts.verdicts(compared).loc["width"]
    assert row[["comparisons", "tested", "verdict"]].tolist() == [3, 2, UNDECIDED]


def test_equal_arms_support_equalities_and_nothing_else():
    verdict = told(made(noise=0.1))
    assert verdict[["routers", "skip", "keeps up"]].tolist() == [REPRODUCED] * 3
    assert CONTRADICTED not in set(verdict[["width", "several", "last", "distillation", "spans"]])


def test_no_runs_and_no_comparisons_are_said():
    verdict = told(made(arms=()))
    assert verdict["speed"] == verdicts.ELSEWHERE
    assert set(verdict.drop("speed")) == {NO_RUNS}


def test_every_comparison_has_a_row_with_its_pairs_and_tests():
    compared = verdicts.compare(made({"random": -2}, n=3, noise=0.3, tasks=("library", "follows")))
    assert len(compared) == sum(len(claim.comparisons) for claim in CLAIMS)
    own = compared[compared["tasks"] == 2]
    assert len(own) and set(own["pairs"]) == {2} and set(own["runs"]) == {6}
    compared = verdicts.compare(made({"random": -2}, n=6, noise=0.3))
    assert compared["p"].between(2**-5, 1).all() and (compared["p_holm"] >= compared["p"]).all()
    row = compared.set_index("comparison").loc["importance > random"]
    assert row["lowest"] <= row["low"] < row["mean"] < row["high"] <= row["highest"]
    assert (row["p"], row["p_holm"]) == (2**-5, pytest.approx(min(1, 2**-5 * len(compared))))


def test_decisions_are_counted_against_luck():
    compared = verdicts.compare(made({"random": -5, "inverse": -9}, n=3, noise=0.3))
    n = (compared["kind"] == "better").sum()
    decided, after_holm, luck = verdicts.by_chance(compared)
    assert decided >= 2 and luck == pytest.approx(0.05 * n)
    assert after_holm == 0  # three pairs: p is 0.25 at least
    many = verdicts.compare(made({"random": -5}, n=12, noise=0.3, arms=("importance", "random")))
    assert verdicts.by_chance(many)[:2] == (1, 1)


def test_the_rule_is_written_where_the_notebook_prints_it():
    assert "BCa" in judge.__doc__ and "Student's t" in judge.__doc__
    assert verdicts.MARGIN == 0.5 and "half a point" in judge.__doc__


def runs(task, model="tiny", **scores):
    n = len(next(iter(scores.values())))
    also = {
        "seed": range(n),
        "teacher_seed": 0,
        "steps": 9,
        "batch_size": 8,
        "teacher_batch_size": 8,
    }
    return pd.DataFrame({"task": [task] * n, "model": model, **also, **scores})


def test_runs_beside_the_paper_are_in_percent_with_every_metric():
    scores = dict(
        accuracy=[0.7, 0.8, 0.9], teacher_accuracy=[0.75] * 3, f1=[0.5] * 3, teacher_f1=[0.5] * 3
    )
    other = runs("library", accuracy=[0.5], teacher_accuracy=[0.25])
    rows = verdicts.beside_paper(pd.concat([runs("mrpc", **scores), other]))
    assert rows[["task", "metric"]].values.tolist() == [
        ["mrpc", "f1"],
        ["mrpc", "accuracy"],
        ["library", "accuracy"],
    ]
    printed = table(1)["MRPC Acc"]
    row = rows.iloc[1]
    assert row[["ours", "low", "high", "n", "teacher", "gap"]].tolist() == pytest.approx(
        [80, 70, 90, 3, 75, 5]
    )
    assert row[["paper", "over paper", "paper gap"]].tolist() == pytest.approx(
        [printed["MoEBERT"], 80 - printed["MoEBERT"], printed["MoEBERT"] - printed["BERT-base"]]
    )
    assert np.isnan(rows.iloc[2]["paper"])


def test_five_runs_have_an_interval_and_bert_large_stands_beside_table_4():
    values = [0.6, 0.7, 0.65, 0.62, 0.68]
    frame = runs("rte", "bert-large-uncased", accuracy=values, teacher_accuracy=[0.7] * 5)
    (row,) = verdicts.beside_paper(frame).itertuples()
    assert 59 < row.low < 60 and 70 < row.high < 71 and row.n == 5
    assert row.paper == table(4).loc["MoEBERT-large", "RTE"]


def test_tables_quote_the_paper_and_end_with_ours():
    mnli = dict(
        accuracy=[0.75],
        teacher_accuracy=[0.5],
        accuracy_mismatched=[0.25],
        teacher_accuracy_mismatched=[0.125],
    )
    span = dict(f1=[0.5], teacher_f1=[0.75], exact_match=[0.25], teacher_exact_match=[0.5])
    frame = pd.concat([runs("mnli", **mnli), runs("squad", **span), runs("passage", **span)])
    beside = verdicts.beside_paper(frame)
    one, two, four = (verdicts.beneath(n, beside, source="here") for n in (1, 2, 4))
    assert one.loc[("quoted", "PKD"), "CoLA Mcc"] == table(1).loc["PKD", "CoLA Mcc"]
    assert one.loc[("here", "MoEBERT"), ["MNLI m", "MNLI mm"]].tolist() == [75, 25]
    assert one.loc[("here", "dense teacher"), ["MNLI m", "MNLI mm"]].tolist() == [50, 12.5]
    assert one.loc["here"].notna().sum().sum() == 4  # no spans among them
    assert two.loc[("here", "MoEBERT"), ["v1.1 F1", "v1.1 EM"]].tolist() == [50, 25]
    assert list(two)[4:] == ["passage f1, here only"]
    assert list(four.index) == [("quoted", "BERT-large"), ("quoted", "MoEBERT-large")]


def test_the_second_test_set_has_its_own_column_and_is_called_phrases():
    scores = dict(accuracy=[0.75], accuracy_second_test=[0.5])
    frame = runs("sst2", **scores, **{f"teacher_{name}": [0.5] for name in scores})
    beside = verdicts.beside_paper(frame)
    assert beside["metric"].tolist() == ["accuracy", "accuracy, second test set (phrases)"]
    one = verdicts.beneath(1, beside, source="here").loc[("here", "MoEBERT")]
    assert one["SST-2 Acc"] == 75
    assert one["sst2 accuracy, second test set (phrases), here only"] == 50
    gaps = verdicts.gaps(frame).query("source == 'here'").set_index("task")["gap"]
    assert gaps["sst2 accuracy, second test set (phrases), here"] == 0


def test_bert_large_has_a_table_of_its_own():
    frame = runs("rte", "bert-large-uncased", accuracy=[0.5], teacher_accuracy=[0.75])
    beside = verdicts.beside_paper(frame)
    assert verdicts.beneath(4, beside, source="here").loc[("here", "MoEBERT"), "RTE"] == 50
    assert "here" not in verdicts.beneath(1, beside, source="here").index


def test_gaps_are_the_papers_and_every_run_s_under_one_name():
    frame = verdicts.gaps(runs("rte", accuracy=[0.5, 0.75], teacher_accuracy=[0.25, 0.75]))
    rte = frame[frame["task"] == "RTE Acc"]
    assert rte[["source", "gap"]].values.tolist() == [["paper", 10.5], ["here", 25], ["here", 0]]
    assert len(frame) == 14 + 2
    span = verdicts.gaps(runs("squad", f1=[0.5], teacher_f1=[0.25]))
    assert span.loc[span["task"] == "SQuAD v1.1 F1", "gap"].tolist() == pytest.approx([-0.5, 25])


def test_methods_are_levels_of_the_headline_metric_and_a_shared_teacher_counts_once():
    teacher = dict(teacher_f1=[0.9, 0.9], converted_f1=[0.2, 0.3])
    on_mrpc = [
        ("importance", "all", [0.8, 0.84]),
        ("importance", "none", [0.7, 0.72]),
        ("random", "all", [0.6, 0.64]),
    ]
    frames = [
        runs("mrpc", f1=f1, accuracy=[0.1, 0.1], **teacher).assign(ranking=deal, distill=how)
        for deal, how, f1 in on_mrpc
    ]
    five = [0.6, 0.7, 0.65, 0.62, 0.68]
    alone = dict(accuracy=five, teacher_accuracy=five, converted_accuracy=five)
    rte = runs("rte", **alone).assign(ranking="importance", distill="all", teacher_seed=None)
    table = verdicts.methods(pd.concat([*frames, rte, rte])).set_index(["task", "method"])
    numbers = table[["mean", "low", "high", "n"]]
    expected = {
        "dense teacher": [90, 90, 90, 1],
        "converted by importance, untrained": [25, 20, 30, 2],
        "MoEBERT": [82, 80, 84, 2],
        "MoEBERT without distillation": [71, 70, 72, 2],
        "random split, distilled": [62, 60, 64, 2],
    }
    assert list(numbers.loc["mrpc"].index) == list(expected)  # inverse has no runs
    assert numbers.loc["mrpc"].values.ravel() == pytest.approx(sum(expected.values(), []))
    assert set(table.loc["mrpc", "metric"]) == {"f1"} and len(table) == 5 + 3
    reach = 2.776 * (68 / 4) ** 0.5 / 5**0.5  # squares of -5, 5, 0, -3, 3 sum to 68
    own = numbers.loc[("rte", "dense teacher")].tolist()
    assert own == pytest.approx([65, 65 - reach, 65 + reach, 5], abs=1e-2)


def test_a_figures_points_are_matched_by_proportion_and_compared_with_the_default():
    scores = {192: 0.5, 384: 0.75, 768: 0.8}
    rows = [{"expert_size": k, "accuracy": v + d} for k, v in scores.items() for d in (0, 0.01)]
    table = verdicts.points(pd.DataFrame(rows), "figure2a", "accuracy", 1536).set_index("value")
    assert table["paper"].tolist() == [84.36, 84.70, 84.90] and set(table["n"]) == {2}
    assert table.loc["192", ["ours", "low", "high"]].tolist() == pytest.approx([50.5, 50, 51])
    assert table.loc["192", "over default"] == pytest.approx(-25)
    assert table.loc["192", "gap"] == pytest.approx(-25 - (84.36 - 84.70))
    assert table.loc["384", ["over default", "paper over default", "gap"]].abs().max() < 1e-9
