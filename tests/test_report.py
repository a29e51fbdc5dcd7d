"""The page stands alone, escapes what it shows, and says where everything came from."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import fixture_home
import nbformat
import pytest
from checkout import NOTEBOOKS

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.publish import report
from moebert_lib.store import run_outputs
from moebert_lib.store.store import StageKey, Store

DOT = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c63fccfc050"
    "0f0004850180842a9930000000000049454e44ae426082"
)
EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag, attribute):
        return [found[attribute] for name, found in self.tags if name == tag and attribute in found]


def executed(folder: Path) -> None:
    """A run's files, as execution would leave them."""
    source = fixture_home.FIXTURES / "settings.ipynb"
    (folder / "notebook.ipynb").write_text(source.read_text())
    figures = folder / "figures"
    figures.mkdir()
    (figures / "figure1.png").write_bytes(DOT)
    (figures / "figure1.csv").write_text(f"method,score\n{EVIL},0.123456\n")
    (figures / "table1.md").write_text(
        f"A caption.\n\n| method | score |\n|:--|--:|\n| {EVIL} | **5** |\n"
    )


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    folder = fixture_home.make(tmp_path / "home", fixture_home.WORKBOOK)
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    return folder


@pytest.fixture
def page(home) -> str:
    settings = Settings.at("quick", seed=3, task="follows").model_dump()
    choices = {"notebook": "01_importance", "settings": settings}
    key = StageKey("notebook", choices, {"inputs": {"data": "d"}})

    def build(folder):
        executed(folder)
        return {}

    run_outputs.publish(Store().make(key, build), home / "runs" / "figures")
    Store().make(
        StageKey("student", {"task": "follows", "seed": 3}), lambda folder: {"accuracy": 0.75}
    )
    return report.write_report().read_text()


def test_every_figure_is_embedded_with_caption_and_alternative_text(page):
    (source,), (alt,) = Page(page).all("img", "src"), Page(page).all("img", "alt")
    assert source.startswith("data:image/png;base64,")
    assert alt.startswith("Figure 1. The scores fall with depth, as s0>s1 says.")
    assert "<b>Figure 1.</b> The scores fall with <strong>depth</strong>" in page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_of_the_workbook_has_a_caption_from_before_its_cell(path):
    node = json.loads(path.read_text())
    sources = ["".join(cell["source"]) for cell in node["cells"]]
    sources = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", source) for source in sources]
    names = set(
        re.findall(
            r"[\"'](\d\d_\w+|figure\d\w?)[\"']",
            "\n".join(source for source in sources if "save(" in source or "draw(" in source),
        )
    )
    assert names
    for name in names:
        words = re.sub(r"<math .*?</math>|<[^>]*>", "\0", report.caption_of(name, node), flags=re.S)
        longest = max(map(unescape, words.split("\0")), key=len).strip()
        assert len(longest) > 20, name
        said = next(
            i
            for i, source in enumerate(sources)
            if longest in re.sub(r"\n", " ", source) or longest in source
        )
        assert said < max(i for i, source in enumerate(sources) if f'"{name}"' in source), name


def test_sections_of_one_notebook_say_which_run_they_show(home):
    for seed in (3, 4):
        settings = Settings.at("quick", seed=seed).model_dump()
        key = StageKey("notebook", {"notebook": "01_importance", "settings": settings})

        def build(folder, seed=seed):
            executed(folder)
            return {"changed": {"seed": seed, "layers": [seed]}}

        entry = Store().make(key, build)
        run_outputs.publish(entry, run_outputs.destination(settings, changed={"seed": seed}))
    page = report.write_report().read_text()
    for seed in (3, 4):
        told = f"· scale quick, task library, layers=[{seed}], seed={seed}</a>"
        assert page.count(told) == 1


def test_the_page_asks_for_nothing_from_anywhere(page, home):
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert re.match(r"data:|#|\.\./|[\w.-]+/|$", attributes.get(name) or ""), (tag, name)
    assert "http:" not in page.replace("http://www.w3.org/1998/Math/MathML", "")
    assert "https:" not in page and "@import" not in page and "url(" not in page
    assert "default-src 'none'" in page


def test_links_lead_to_files_that_are_there(page, home):
    links = [link for link in Page(page).all("a", "href") if not link.startswith("#")]
    assert len(links) >= 3
    assert all((home / "runs" / link).is_file() for link in links)


def test_each_run_has_a_page_that_is_written_once(page, home):
    (written,) = (home / "runs" / "pages").iterdir()
    before = written.stat().st_mtime_ns
    report.write_report()
    assert written.stat().st_mtime_ns == before and "<script" not in written.read_text()
    written.unlink()
    report.write_report()
    assert written.is_file()


def test_links_within_the_page_have_targets_and_ids_are_unique(page):
    ids = [found["id"] for _, found in Page(page).tags if "id" in found]
    inside = [link[1:] for link in Page(page).all("a", "href") if link.startswith("#")]
    assert len(ids) == len(set(ids)) and set(inside) <= set(ids) and inside


def test_what_files_hold_is_escaped(page):
    assert EVIL not in page and page.count("&lt;script&gt;") == 2


def test_a_run_shows_what_its_settings_change_and_the_numbers(page):
    assert "seed=3" in page and "follows" in page and ">0.75</td>" in page
    assert "0.1235" in page and "<strong>5</strong></td>" in page


def test_the_newest_state_replaces_the_page_whole(page, home):
    assert report.write_report().read_text() == page
    assert not list((home / "runs").glob("*.tmp"))


def test_nothing_to_report_is_said(home):
    with pytest.raises(UserError, match="moebert run first"):
        report.write_report()
    assert not (home / "runs").exists()


def test_a_figure_that_is_gone_does_not_break_the_page(page, home):
    (home / "runs" / "figures" / "figure1.png").unlink()
    assert Page(report.write_report().read_text()).all("img", "src") == []


@pytest.mark.parametrize(
    "stem, label",
    [("figure2a", "Figure 2a"), ("table3", "Table 3"), ("01_removal_curves", "Removal curves")],
)
def test_files_are_labelled_as_people_name_them(stem, label):
    assert report.label(stem) == label


def test_formulas_become_mathml_and_code_stays():
    pytest.importorskip("latex2mathml")
    text = report.with_mathml("cost $x_1$, `$y$`, 5 $ and 6 $\n```\n$z$\n```\n$$\\sum_j s_j$$")
    assert text.count("<math") == 2 and "`$y$`" in text and "\n$z$\n" in text
    assert "5 $ and 6 $" in text and 'display="block"' in text


def test_an_executed_notebooks_page_stands_alone_and_drops_widgets(tmp_path):
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A *title* <b>")])
    view = {report.WIDGET_VIEW: {"model_id": "x"}, "text/plain": "interactive(...)"}
    output = nbformat.v4.new_output("display_data", data=view)
    node.cells.append(nbformat.v4.new_code_cell("show()", outputs=[output]))
    (tmp_path / "a.ipynb").write_text(json.dumps(node))
    report.write_page(tmp_path / "a.ipynb", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "<title>A title &lt;b&gt;</title>" in text and "open the notebook" in text
    assert "<script" not in text and "https:" not in text and "interactive(...)" not in text
