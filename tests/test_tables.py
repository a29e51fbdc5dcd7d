"""Saved tables keep every digit, escape what they must, and never change by themselves."""

import pandas as pd
import pytest

from moebert_lib.store.run_outputs import as_text, save_table

FRAME = pd.DataFrame(
    {"accuracy": [89.0, float("nan")], "examples": [2490, 7]},
    index=pd.Index(["BERT_base", "50% | rest"], name="model"),
)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBERT_FIGURES", str(tmp_path))
    return tmp_path


def test_a_round_number_keeps_its_zero_in_markdown_and_latex(out):
    save_table(FRAME, "t", caption="Two models.")
    assert " 89.0 |" in (out / "t.md").read_text("utf-8")
    assert "& 89.0 &" in (out / "t.tex").read_text("utf-8")


def test_a_missing_value_is_a_dash_and_a_count_has_separators():
    assert as_text(FRAME).to_numpy().tolist() == [["89.0", "2,490"], ["–", "7"]]


def test_latex_has_rules_label_and_escaped_caption_and_cells(out):
    save_table(FRAME, "t", caption="Mean ± sd of 5 % & more.")
    text = (out / "t.tex").read_text("utf-8")
    rules = [r"\toprule", r"\midrule", r"\bottomrule", r"\label{tab:t}", "{lrr}"]
    words = [r"Mean $\pm$ sd of 5 \% \& more.", r"BERT\_base", r"50\% \textbar{} rest"]
    assert [part for part in rules + words if part not in text] == []


def test_markdown_escapes_what_would_break_the_table_and_starts_with_the_caption(out):
    save_table(FRAME, "t", caption="Two models.")
    text = (out / "t.md").read_text("utf-8")
    assert text.startswith("Two models.\n\n| model")
    assert r"BERT\_base" in text and r"50% \| rest" in text


def test_csv_holds_the_numbers_themselves(out):
    save_table(FRAME, "t", caption="")
    pd.testing.assert_frame_equal(pd.read_csv(out / "t.csv", index_col="model"), FRAME)


def test_row_numbers_are_not_a_column(out):
    chosen = pd.DataFrame({"a": [1.25, 2.0, 3.0]}).iloc[1:]
    save_table(chosen, "t", caption="")
    assert (out / "t.csv").read_text() == "a\n2\n3\n"
    assert "|   a |" in (out / "t.md").read_text("utf-8")


def test_a_column_can_have_its_own_format(out):
    save_table(FRAME, "t", caption="", formats={"accuracy": ".3f"})
    assert "89.000" in (out / "t.md").read_text("utf-8")


def test_saving_twice_gives_the_same_bytes(out):
    save_table(FRAME, "t", caption="Two models.")
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    save_table(FRAME, "t", caption="Two models.")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert set(first) == {"t.md", "t.tex", "t.csv"}


def test_the_table_on_screen_shows_caption_and_escapes_html(out):
    html = save_table(pd.DataFrame({"a": ["<b>"]}), "t", caption="One cell.").to_html()
    assert "One cell." in html and "&lt;b&gt;" in html


def test_a_format_for_no_column_is_refused(out):
    with pytest.raises(ValueError, match="no column 'acc'; the table has model, accuracy"):
        save_table(FRAME, "t", caption="", formats={"acc": ".2f"})


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a.md"])
def test_a_name_that_is_no_plain_name_is_refused(out, name):
    with pytest.raises(ValueError, match="must be a file name"):
        save_table(FRAME, name, caption="")
