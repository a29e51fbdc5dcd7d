"""The page of findings says what its tables say."""

import numpy as np
import pandas as pd
import pytest

from moebert_lib.config.errors import UserError
from moebert_lib.publish import findings
from moebert_lib.publish import findings as found_rows

COMPARED = pd.DataFrame(
    [
        (
            "importance",
            "importance > random",
            "better",
            4,
            4,
            2.0,
            1.0,
            3.04,
            0.92,
            0.04,
            "reproduced",
        ),
        (
            "inverse",
            "random > inverse",
            "better",
            1,
            3,
            -2.0,
            -3.0,
            -1.0,
            0.65,
            1.0,
            "not reproduced",
        ),
        (
            "skip",
            "every other layer ~ all layers",
            "equal",
            1,
            3,
            0.1,
            -0.9,
            1.1,
            -0.09,
            1.0,
            "undecided",
        ),
        (
            "more",
            "8 experts > 4 experts",
            "better",
            1,
            1,
            0.04,
            np.nan,
            np.nan,
            0.06,
            1.0,
            "undecided",
        ),
        ("large", "MoEBERT-large", "not worse", 0, 0, *[np.nan] * 5, "no runs"),
    ],
    columns="claim comparison kind tasks pairs mean low high paper p_holm verdict".split(),
)


def test_each_comparison_with_runs_stands_under_its_verdict():
    page = findings.lists(COMPARED, "sst2")
    yes, no, open_ = (
        page.index(f"**{word}**") for word in ("Reproduced", "Not reproduced", "Undecided")
    )
    rows = {
        "| A split by importance beats a random one (Figure 3a) | importance > random | "
        "+2.0 (+1.0 to +3.0) | +0.9 | 4 tasks |": (yes, no),
        "| random > inverse | -2.0 (-3.0 to -1.0) | +0.7 | 3 seeds, sst2 |": (no, open_),
        "| 8 experts > 4 experts | +0.0 | +0.1 | 1 seed, sst2 |": (open_, len(page)),
    }
    for row, (start, end) in rows.items():
        assert start < page.index(row) < end
    assert page.endswith("**No runs:** MoEBERT-large.\n") and page.count("MoEBERT-large") == 1
    assert "No runs" not in findings.lists(COMPARED.head(4), "sst2")


def test_the_claims_stand_first_with_what_luck_would_give():
    page = findings.claims(COMPARED)
    assert (
        "stands where all its comparisons do: 1 reproduced, 1 not reproduced, 2 undecided." in page
    )
    row = "| More experts are better | Figure 2b | 1 of 2 | undecided |"
    assert row in page.splitlines()
    assert "| MoEBERT-large keeps up with BERT-large | Table 4 | 0 of 1 | no runs |" in page
    text = " ".join(page.split())
    assert "Of 3 comparisons that claim a direction and have runs, 2 are decided one by one" in text
    assert "sign-flip test), 1 is. If no arm differed from any other, about 0.1 would" in text
    text = " ".join(findings.claims(COMPARED.assign(p_holm=1.0)).split())
    assert "0 are; it could not be otherwise, since so few pairs give no p below 0.125." in text


def test_a_switch_is_told_with_its_interval_and_every_seed():
    gaps = pd.DataFrame(
        {
            "switch": ["a"] * 3 + ["b"] * 3 + ["c"] * 3 + ["d"] * 3,
            "difference": [-2.0, -2.2, -1.8, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 2.0],
        }
    )
    first, second, third, fourth = findings.switches(gaps).splitlines()
    assert first == "| a | -2.0 (-2.5 to -1.5) | -2.0, -2.2, -1.8 | lower |"
    assert second == "| b | +0.0 (-2.5 to +2.5) | +1.0, -1.0, +0.0 | cannot tell |"
    assert third == "| c | +0.0 | +0.0, +0.0, +0.0 | no difference at all |"
    assert fourth.endswith("| higher with every seed, but the interval holds zero |")


def test_comparisons_of_several_tasks_are_judged_task_by_task():
    keeps, beats = "MoEBERT ≥ its BERT", "MoEBERT > its BERT"
    other = [("rte", 1.0), ("rte", 1.0), ("cola", 1.0), ("cola", 3.0)]
    both = [("rte", -2.0), ("rte", -2.1), ("cola", 1.0), ("cola", 3.0)]
    rows = [("importance > random", *one) for one in other]
    rows += [(name, *one) for name in (keeps, beats) for one in both]
    rows += [("random > inverse", "rte", 5.0)]
    pairs = pd.DataFrame(rows, columns=["comparison", "task", "difference"])
    head, _, first, second = findings.by_task(pairs).splitlines()
    assert head == "| comparison | rte | cola |"
    assert first == "| importance > random | +1.0 | +2.0 (-10.7 to +14.7) |"
    open_, told = "+2.0 (-10.7 to +14.7)", "-2.0 (-2.7 to -1.4) **not reproduced**"
    assert second == f"| {keeps}; {beats} | {told} | {open_} |"


def test_every_pair_of_routers_is_told_both_ways():
    rows = [
        (router, seed, score / 100, "here")
        for router, scores in {"a": (80, 81, 82), "b": (79, 79.9, 81.1), "c": (81, 80, 82)}.items()
        for seed, score in enumerate(scores)
    ]
    rows.append(("a", None, np.nan, "paper"))
    table = pd.DataFrame(rows, columns=["routing", "seed", "accuracy", "source"])
    head, _, *lines = findings.routers(table).splitlines()
    assert head == "| | a | b | c |"
    assert lines[0] == "| a |  | **+1.0 (+0.8 to +1.2)** | +0.0 (-2.5 to +2.5) |"
    assert lines[1].startswith("| b | **-1.0 (-1.2 to -0.8)** |  | ")


def test_a_page_without_its_tables_is_refused(tmp_path, monkeypatch):
    for name in ("provenance", "limits", "trained", "main_task"):
        monkeypatch.setattr(found_rows, name, lambda: "rte")
    (tmp_path / findings.METHODS).write_text("A caption.\n\n| method |\n|:--|\n| MoEBERT |\n")
    with pytest.raises(UserError, match=r"no 06_beside_paper\.csv"):
        findings.write(tmp_path)
    COMPARED.to_csv(tmp_path / findings.COMPARED, index=False)
    beside = pd.DataFrame({"task": ["rte", "rte"], "guessing": [52.7, np.nan]})
    beside.to_csv(tmp_path / findings.BESIDE, index=False)
    (tmp_path / "mrpc").mkdir()
    name, columns = "8 experts > 4 experts", ["comparison", "task", "seed", "difference"]
    for folder, task, gaps in ((".", "sst2", (-2.0, -2.1, -1.9)), ("mrpc", "mrpc", (2, -1, 0.5))):
        rows = [(name, task, seed, gap) for seed, gap in enumerate(gaps)]
        pd.DataFrame(rows, columns=columns).to_csv(tmp_path / folder / findings.PAIRS, index=False)
    findings.write(tmp_path)
    page = (tmp_path / findings.PAGE).read_text()
    assert "training set would score 52.7 on rte." in page
    assert "| MoEBERT |" in page and "1 reproduced, 1 not reproduced, 2 undecided" in page
    assert page.index("| claim | shown in |") < page.index("| MoEBERT |")
    assert f"| {name} | -2.0 (-2.2 to -1.8) **not reproduced** | +0.5 (-3.2 to +4.2) |" in page
    assert "## What the release's switches change" not in page
