"""The page of findings: made from notebook 09, and in line with the committed tables."""

import re
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from checkout import ROOT
from PIL import Image, PngImagePlugin

from moebert_lib.evidence.verdicts import interval_text, judged_text
from moebert_lib.publish import report

FIGURES = ROOT / "figures"
PAGE = (FIGURES / report.FOUND).read_text("utf-8")


def executed(folder):
    """A run of a small notebook: a figure, a sentence, output of the run, cells left out."""
    (folder / "figures").mkdir(parents=True)
    title = PngImagePlugin.PngInfo()
    title.add_text("Title", "What it shows")
    Image.new("RGB", (2, 2)).save(folder / "figures" / "09_a.png", pnginfo=title)
    v4 = nbformat.v4
    picture = v4.new_output("display_data", data={"image/png": "aGk=", "text/plain": "<Axes>"})
    sentence = v4.new_output("execute_result", data={"text/markdown": "**1 of 3** hold."})
    noise = v4.new_output("stream", name="stdout", text="grid: 3 points")
    cells = [
        v4.new_markdown_cell("# Found\n\nAll.\n\n> **Time** long<br>\n> **Makes** `09_a`"),
        v4.new_code_cell("scale = 1", metadata={"tags": ["parameters"]}),
        v4.new_markdown_cell("See [6](06_results.ipynb#a) and [that](glossary.md#deal)."),
        v4.new_code_cell('plots.save(ax, "09_a")', outputs=[noise, picture, sentence]),
        v4.new_markdown_cell("Try it", metadata={"tags": ["notebook-only"]}),
    ]
    nbformat.write(v4.new_notebook(cells=cells), folder / "notebook.ipynb")
    return SimpleNamespace(folder=folder)


def test_the_page_has_the_results_and_no_code(tmp_path):
    entry = executed(tmp_path)
    report.write_found(entry, tmp_path / "figures")
    assert (tmp_path / "figures" / report.FOUND).read_text() == (
        "# Found\n\nAll.\n\n"
        "See [6](../notebooks/06_results.ipynb#a) and [that](../notebooks/glossary.md#deal).\n\n"
        "![What it shows](09_a.png)\n\n**1 of 3** hold.\n"
    )


@pytest.mark.parametrize("name", ["06_claims.csv", "06_comparisons.csv"])
def test_the_committed_page_has_the_verdicts_of_the_committed_tables(name):
    table = pd.read_csv(FIGURES / name)
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    rows = {tuple(map(str.strip, line.split("|")[1:-1])) for line in lines}
    for row in table.itertuples():
        if name == "06_claims.csv":
            assert [
                line for line in rows if line[0] == row.claim.rstrip(".") and row.verdict in line
            ]
        elif row.pairs:
            text = interval_text(row.mean, row.low, row.high)
            assert [line for line in rows if line[:3] == (row.comparison, row.verdict, text)]


def test_the_committed_page_refers_to_committed_pictures():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE)
    assert pictures and all((FIGURES / name).is_file() for name in pictures)


def test_a_decided_difference_is_bold_and_an_undecided_one_is_not():
    clear, open_ = pd.Series([2.0, 2.2, 1.8]), pd.Series([1.0, -1.0, 0.1])
    assert judged_text(clear) == "**+2.0 (+1.5 to +2.5)**"
    assert judged_text(clear, named=True) == "+2.0 (+1.5 to +2.5) **reproduced**"
    assert judged_text(open_) == "+0.0 (-2.5 to +2.5)"
    assert judged_text(pd.Series([1.0])) == "+1.0"
