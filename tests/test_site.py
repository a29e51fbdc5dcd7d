"""The site, from real runs at scale smoke: whole, offline, and readable by everyone."""

import ast
import re
from copy import copy
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import smoke_runs
from browser import controls, tabbed
from bs4 import BeautifulSoup
from checkout import NOTEBOOKS
from PIL import Image

from moebert_lib.config.errors import UserError
from moebert_lib.config.provenance import library_modules
from moebert_lib.publish import site
from moebert_lib.runs import local_pool, plan
from moebert_lib.store import run_outputs

FIGURES = "smoke-library"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home in which every notebook has been run at scale smoke."""
    with pytest.MonkeyPatch.context() as patch:
        folder = smoke_runs.home(tmp_path_factory.mktemp("site") / "home", tmp_path_factory)
        patch.setenv("MOEBERT_HOME", str(folder))
        local_pool.run(plan.plan(NOTEBOOKS, scale="smoke"))
        yield folder


@pytest.fixture(scope="module")
def made(home, tmp_path_factory) -> Path:
    """The site's folder."""
    target = tmp_path_factory.mktemp("made") / "site"
    return site.build(target, figures=home / "runs" / "figures" / FIGURES).parent


@pytest.fixture(scope="module")
def pages(made) -> dict[str, BeautifulSoup]:
    """Every page of the site, parsed, by its address from the top."""
    found = sorted(made.rglob("*.html"))
    return {
        path.relative_to(made).as_posix(): BeautifulSoup(path.read_text(), "html.parser")
        for path in found
    }


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Maker of an address for a folder: ``serve(folder)``."""
    running = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


PICTURES = """async () => {
    const all = [...document.images];
    all.forEach((one) => { one.loading = 'eager'; });
    await Promise.all(all.map((one) => one.decode().catch(() => null)));
    return all.map((one) => [one.src, one.naturalWidth, one.alt.trim()]);
}"""


def faults(page, watch, address: str) -> list[str]:
    """What a reader of a page would miss or leak: errors, requests, pictures."""
    watch.errors.clear(), watch.failed.clear(), watch.foreign.clear()
    page.goto(address, wait_until="load")
    shown = page.evaluate(PICTURES)
    lost = [f"not loaded: {source}" for source, width, _ in shown if not width]
    mute = [f"no alt: {source}" for source, _, alt in shown if not alt]
    return watch.problems() + lost + mute


def dead(pages: dict[str, BeautifulSoup], folder: Path) -> list[str]:
    """Links between pages that lead to no file or to no place in it."""
    ids = {name: {tag["id"] for tag in soup.select("[id]")} for name, soup in pages.items()}
    found = []
    for name, soup in pages.items():
        for link in [tag["href"] for tag in soup.select("a[href]")]:
            parts = urlsplit(urljoin(f"http://site/{name}", link))
            target = unquote(parts.path).lstrip("/")
            target += "index.html" if target.endswith("/") or not target else ""
            if parts.netloc != "site":
                continue
            there = (folder / target).is_file()
            if not there or (parts.fragment and unquote(parts.fragment) not in ids[target] | {"#"}):
                found.append(f"{name}: {link}")
    return found


def test_every_page_loads_whole_and_asks_no_other_host(made, pages, serve, page, watch):
    address = serve(made)
    told = {name: faults(page, watch, address + name) for name in pages}
    assert {name: lines for name, lines in told.items() if lines} == {}


def test_it_opens_from_a_folder_without_a_server(made, page, watch):
    for name in ("index.html", "notebooks/02_experts.html", "figures.html"):
        assert faults(page, watch, (made / name).as_uri()) == []


def test_all_links_between_pages_lead_somewhere(made, pages):
    assert dead(pages, made) == []


@pytest.mark.parametrize(
    "body, said",
    [
        ('<img src="gone.png" alt="a">', ["status 404", "not loaded"]),
        ('<script src="http://cdn.invalid/x.js"></script>', ["another host: http://cdn.invalid"]),
        ('<img src="there.png" alt=" ">', ["no alt"]),
        ("<script>lost()</script>", ["uncaught"]),
    ],
)
def test_planted_faults_are_found(tmp_path, serve, page, watch, body, said):
    Image.new("RGB", (2, 2)).save(tmp_path / "there.png")
    (tmp_path / "favicon.ico").touch()
    (tmp_path / "a.html").write_text(f"<!DOCTYPE html><title>a</title>{body}")
    told = "\n".join(faults(page, watch, serve(tmp_path) + "a.html"))
    assert [part for part in said if part not in told] == []


def test_planted_dead_links_are_found(tmp_path):
    html = '<p id="a"><a href="#a"></a><a href="#b"></a><a href="c.html"></a></p>'
    (tmp_path / "a.html").write_text(html)
    told = dead({"a.html": BeautifulSoup(html, "html.parser")}, tmp_path)
    assert told == ["a.html: #b", "a.html: c.html"]


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_a_keyboard_reaches_every_control_and_the_navigation(made, serve, page, size):
    page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
    page.goto(serve(made) + "index.html")
    reached = set(tabbed(page, at_most=400))
    assert controls(page) <= reached
    assert size[0] < 1000 or controls(page, ".sidebar-tree") <= reached


def test_a_phone_opens_the_navigation_by_keyboard(made, serve, page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(serve(made) + "index.html")
    page.focus("#__navigation")
    page.keyboard.press("Space")
    page.wait_for_function(
        "document.querySelector('.sidebar-drawer').getBoundingClientRect().x >= 0"
    )
    assert "glossary" in " ".join(controls(page, ".sidebar-drawer")).lower()


def test_no_page_is_wider_than_a_phone(made, pages, serve, page):
    page.set_viewport_size({"width": 390, "height": 844})
    address, wide = serve(made), []
    for name in [name for name in pages if not name.startswith(("genindex", "py-modindex"))]:
        page.goto(address + name)
        wide += [name] * (page.evaluate("document.documentElement.scrollWidth") > 390)
    assert wide == []


def test_alt_texts_are_the_figures_findings(home, pages):
    said = {tag["alt"] for tag in pages["figures.html"].select("img")}
    figures = home / "runs" / "figures"
    pngs = [*figures.glob("00_*.png"), *(figures / FIGURES).glob("*.png")]
    titles = {Image.open(path).text["Title"] for path in pngs}
    assert said == titles and len(titles) > 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebooks_page_shows_each_of_its_figures_and_says_what_it_shows(home, pages, path):
    folders = home / "runs" / "figures", home / "runs" / "figures" / FIGURES
    known = [(folder, run_outputs.read_provenance(folder)) for folder in folders]
    drawn = [
        folder / name
        for folder, files in known
        for name, about in files.items()
        if about["notebook"] == path.stem and name.endswith(".png")
    ]
    shown = [tag["alt"] for tag in pages[f"notebooks/{path.stem}.html"].select("article img")]
    assert drawn and sorted(shown) == sorted(Image.open(png).text["Title"] for png in drawn)


def test_every_figure_and_table_is_offered_with_its_files(home, pages):
    offered = {tag["href"] for tag in pages["figures.html"].select("a[href^='figures/']")}
    known = run_outputs.read_provenance(home / "runs" / "figures" / FIGURES)
    assert {f"figures/{name}" for name in [*known, "00_deal.png", "00_deal.csv"]} == offered


def test_every_public_function_and_class_has_an_entry(pages):
    ids = {
        tag["id"]
        for name, soup in pages.items()
        if name.startswith("reference/")
        for tag in soup.select("[id]")
    }
    names = [
        f"moebert_lib.{module}.{node.name}"
        for module, path in library_modules().items()
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if module != "__main__" and ast.get_docstring(node)
    ]
    assert [name for name in names if name not in ids] == [] and len(names) > 300


def test_formulas_are_drawn_and_no_tex_is_left(pages):
    left = {}
    for name, soup in pages.items():
        article = copy(soup).select_one("article")
        for drawn in article.select("pre, code, math") if article else []:
            drawn.extract()
        left[name] = re.findall(r"\$\S.*?\$|\\[a-z]+\{", article.get_text()) if article else []
    assert {name: tex for name, tex in left.items() if tex} == {}


def test_a_notebook_that_was_not_run_is_named_with_its_command(home, tmp_path, monkeypatch):
    empty = smoke_runs.make_home(tmp_path / "empty")
    monkeypatch.setenv("MOEBERT_HOME", str(empty))
    with pytest.raises(UserError, match=r"has none of 00_the_idea, .*run: moebert run 00 01 02"):
        site.build(tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_folder_that_is_no_site_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something that is no site"):
        site.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_warning_of_sphinx_leaves_the_old_site_as_it_was(home, tmp_path, monkeypatch):
    old = tmp_path / "site"
    old.mkdir()
    (old / site.MARK).write_text("old")
    usual = site._render

    def broken(name, **values):
        return "# A\n\n[b](gone.md)" if name == "figures.md" else usual(name, **values)

    monkeypatch.setattr(site, "_render", broken)
    monkeypatch.setattr(site, "library_modules", lambda: {"config.errors": None})
    with pytest.raises(UserError, match="not written: .*"):
        site.build(old, figures=home / "runs" / "figures" / FIGURES)
    assert [path.name for path in old.iterdir()] == [site.MARK] and len([*tmp_path.iterdir()]) == 1
