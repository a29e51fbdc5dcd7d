"""What is told beyond the paper is what the tables hold, worked by hand."""

import pandas as pd
import pytest

from moebert_lib.publish import findings

NONE = float("nan")


@pytest.fixture
def figures(tmp_path):
    (tmp_path / "mrpc").mkdir()
    names = ["deal", "random", "k-means"]
    for folder, gaps in ((tmp_path, [NONE, -2.0, 0.5]), (tmp_path / "mrpc", [NONE, -1.0, 0.25])):
        table = pd.DataFrame({"name": names, "untrained": 1.0, "mean": 2.0, "difference": gaps})
        table["low"], table["high"] = table["difference"] - 1, table["difference"] + 1
        table.to_csv(folder / findings.GAPS, index=False)
    rows = [
        (name, seed, 0.5 + gap * (1 + seed), size)
        for name, gap, size in (("hash-random", 0.0, 100), ("gate, k = 2", 0.01, 125))
        for seed in (0, 1, 2)
    ]
    columns = ["name", "seed", "accuracy", "effective_parameters"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / findings.BEYOND, index=False)
    return tmp_path


def test_constructions_of_all_tasks_stand_side_by_side_in_bold_where_zero_is_excluded(figures):
    page = findings.beyond(figures, "sst2")
    assert "| construction | sst2 | mrpc |" in page and "| deal |" not in page
    assert "| random | **-2.0 (-3.0 to -1.0)** | -1.0 (-2.0 to +0.0) |" in page
    assert "| k-means | +0.5 (-0.5 to +1.5) | +0.2 (-0.8 to +1.2) |" in page
    assert "of 5 intervals, 0.2 would exclude" in page  # four constructions, one router


def test_a_router_is_told_by_its_mean_with_the_t_interval_and_its_cost(figures):
    page = " ".join(findings.beyond(figures, "sst2").split())
    # 1, 2 and 3 points: mean 2, half-width 4.303 / sqrt(3)
    assert "on sst2, paired by seed" in page and "gate, k = 2 +2.0 (-0.5 to +4.5)" in page
    assert "uses 25% more parameters" in page


def test_the_oracles_gain_is_told_before_and_after_training():
    rows = [
        (m, r, layer, d * layer, s)
        for m, r, d, s in (
            ("converted", "own", 4.0, 0.5),
            ("converted", "oracle", 3.0, 0.52),
            ("distilled", "own", 2.0, 0.8),
            ("distilled", "oracle", 1.0, 0.79),
            ("teacher", "own", 0.0, 0.9),
        )
        for layer in (0, 1)
    ]
    frame = pd.DataFrame(rows, columns=["model", "router", "layer", "distance", "score"])
    text = " ".join(findings.hindsight(frame).split())
    assert "25% smaller before training and 50% after it" in text
    assert "rises by +2.0 and -1.0 points" in text


def test_scores_are_told_from_the_best_to_the_worst():
    agreement = pd.DataFrame(
        [("importance", "taylor", 0.8), ("importance", "weight", -0.1), ("taylor", "weight", 0.9)],
        columns=["score", "other", "rho"],
    )
    removal = pd.DataFrame(
        [
            ("importance", 0, 0.75, 0.8, 1.0, 0.5),
            ("weight", 0, 0.75, 0.6, 1.0, 0.5),
            ("random", 0, 0.75, 0.5, 1.0, 0.5),
            ("random", 1, 0.75, 0.7, 1.0, 0.5),
            ("taylor", 0, 0.75, 0.81, 1.0, 0.5),
            ("taylor", 0, 0.5, 0.1, 1.0, 0.5),
        ],
        columns=["order", "draw", "fraction", "accuracy", "loss", "guessing"],
    )
    text = " ".join(findings.scores(agreement, removal).split())
    assert "Eq. 4: taylor 0.80, weight -0.10." in text
    assert "taylor +1.0, " in text and text.endswith("-20.0.") and "random -20.0" in text


def test_a_folder_without_such_tables_says_nothing(tmp_path):
    assert findings.beyond(tmp_path, "sst2") == ""
