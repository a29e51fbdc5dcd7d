"""The paper's numbers agree with themselves where it prints them twice."""

from math import isnan

import pytest

from moebert_lib.config import paper_numbers
from moebert_lib.config.settings import Settings
from moebert_lib.data.tasks import TASKS

METRICS = ("accuracy", "accuracy_mismatched", "f1", "matthews", "exact_match")


def test_moebert_beats_bert_base_on_every_glue_metric_or_ties_as_table_1_prints():
    table = paper_numbers.table(1)
    assert (table.loc["MoEBERT"] >= table.loc["BERT-base"]).all()
    assert table.shape == (10, 10)


def test_table_3_repeats_the_moebert_row_of_tables_1_and_2():
    row = paper_numbers.table(3).loc["MoEBERT"]
    assert row["RTE Acc"] == paper_numbers.moebert("rte")["accuracy"]
    assert [row["MNLI m"], row["MNLI mm"]] == list(paper_numbers.moebert("mnli").values())
    assert [row["SQuAD v2.0 EM"], row["SQuAD v2.0 F1"]] == list(
        paper_numbers.moebert("squad_v2").values()
    )


@pytest.mark.parametrize(
    "task, bert, moebert",
    [
        ("cola", {"matthews": 54.7}, {"matthews": 55.4}),
        ("qqp", {"f1": 88.3, "accuracy": 90.9}, {"f1": 88.4, "accuracy": 91.4}),
        ("squad", {"exact_match": 80.7, "f1": 88.4}, {"exact_match": 80.4, "f1": 87.9}),
        ("library", {}, {}),
    ],
)
def test_scores_of_a_task_are_the_printed_ones(task, bert, moebert):
    assert paper_numbers.bert_base(task) == bert
    assert paper_numbers.moebert(task) == moebert


def test_all_figures_agree_on_the_default_configuration_within_the_papers_own_noise():
    default = [
        paper_numbers.FIGURES["figure2a"][768],
        paper_numbers.FIGURES["figure2b"][4],
        paper_numbers.FIGURES["figure2c"][512],
        paper_numbers.FIGURES["figure3a"]["importance"],
        paper_numbers.FIGURES["figure3b"]["all"],
        paper_numbers.FIGURES["figure3c"]["hash-random"],
        sum(paper_numbers.moebert("mnli").values()) / 2,
    ]
    assert max(default) - min(default) <= 0.11


def test_every_figure_names_its_axis_and_varies_a_setting_by_values_that_settings_accepts():
    # A model of unknown width: 1536 neurons do not fit BERT-base, though Figure 2a shows them.
    settings = Settings.at("paper", model="wider")
    for figure, name in paper_numbers.FIGURE_SETTINGS.items():
        assert paper_numbers.FIGURE_AXES[figure]
        for value in paper_numbers.FIGURES[figure]:
            assert getattr(settings.but(**{name: value}), name) == value


def test_table_7_is_the_settings_of_the_scale_paper():
    assert Settings.at("paper", task="mnli").distill_weight == 5.0
    rows = paper_numbers.table(7)
    assert list(rows.loc["rte"]) == [1e-5, 8, 10, 0.01, 1.0, 512]
    assert set(rows.columns) <= set(Settings.model_fields)


def test_speedups_are_ratios_of_figure_4():
    assert paper_numbers.SPEEDUPS["moebert gate-sentence"] == pytest.approx(1.84, abs=0.005)
    assert paper_numbers.SPEEDUPS["half depth"] == pytest.approx(1.92, abs=0.005)


def test_a_table_the_paper_has_no_numbers_for_is_refused():
    with pytest.raises(ValueError, match="no Table 5 here; choose from 1, 2, 3, 4, 7"):
        paper_numbers.table(5)


@pytest.mark.parametrize(
    "method, task, metric, value",
    [
        ("PKD", "mnli", "accuracy_mismatched", 81.0),
        ("BERT-base", "squad_v2", "exact_match", 74.5),
        ("-distill", "squad_v2", "f1", 76.0),
        ("MoEBERT-large", "mnli", "accuracy_mismatched", 86.5),
    ],
)
def test_a_cell_is_found_in_whichever_table_prints_it(method, task, metric, value):
    assert paper_numbers.printed(method, task, metric) == value


def test_cells_that_the_paper_has_not_are_nan():
    assert isnan(paper_numbers.printed("DistilBERT", "mrpc", "accuracy"))  # a dash
    assert isnan(paper_numbers.printed("MoEBERT-large", "cola", "matthews"))
    assert isnan(paper_numbers.printed("MoEBERT", "library", "accuracy"))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_column_is_some_task_s_metric(n):
    pairs = [(task, metric) for task in TASKS for metric in METRICS]
    named = {paper_numbers.column(task, metric, table=n) for task, metric in pairs} - {""}
    assert named == set(paper_numbers.table(n).columns)


def test_the_noise_floor_is_the_distance_of_one_configuration_from_itself():
    assert paper_numbers.DEFAULT_TWICE == (84.60, 84.70)
    assert pytest.approx(0.1) == paper_numbers.NOISE_FLOOR
