"""The report: one HTML page of figures, tables and runs; and the committed figures drawn again.

``write_report`` makes ``runs/report.html``, one file with all pictures that needs no network, and a
page of each run's executed notebook. ``draw`` runs the notebooks on committed results, which gives
every committed figure and table without training; ``check`` compares them with ``figures/``.
"""

import base64
import copy
import dataclasses
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape, unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from moebert_lib.config.errors import UserError, home
from moebert_lib.config.file_io import write_bytes
from moebert_lib.config.provenance import file_digest
from moebert_lib.runs import execution, export, local_pool, status, sweep
from moebert_lib.runs.local_pool import side_by_side
from moebert_lib.runs.plan import Job
from moebert_lib.store import committed_results
from moebert_lib.store.run_outputs import read_provenance, run_of
from moebert_lib.store.store import Entry, Store

TEMPLATES = Path(__file__).parent / "templates"
MOST_ROWS = 40  # shown of a CSV file; the file has all
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MOVE = "Interactive: open the notebook in JupyterLab to use it."
CODE_OR_MATH = re.compile(
    r"(?P<code>```.*?```|`+[^`]*`+)|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?!\s)(?P<line>[^$\n]+?)(?<!\s)\$(?!\w)",
    re.DOTALL,
)
BOLD_LETTER = re.compile(r"\\(mathbf|mathcal|mathbb) (\w)")

WORKBOOK = "workbook.yaml"  # beside committed results: the notebook runs that draw them
UNDRAWN = {"runs", "bench"}  # folders of figures/ whose files no notebook draws
FINDINGS, FOUND = "09_what_we_found", "found.md"
#: Cells of the findings notebook that its page leaves out.
LEFT_OUT = ("exercise", "parameters", "notebook-only")
TABLE = re.compile(
    r"(?P<start><!-- table: (?P<file>\S+) -->)(?:(?!<!-- table:).)*?(?P<end><!-- end of table -->)",
    re.DOTALL,
)
NOTEBOOK_LINK = re.compile(r"\]\(([\w-]+\.(?:ipynb|md))")


def write_report(figures: Path | None = None) -> Path:
    """Write ``runs/report.html`` and return its path.

    Args:
        figures: The folder whose figures it shows; ``runs/figures`` by default.

    Raises:
        UserError: nothing has been run yet.
    """
    entries = Store().entries("notebook")
    if not entries:
        raise UserError("nothing to report yet; run moebert run first")
    figures = figures or figures_folder()
    folders = [figures, *sorted(path for path in figures.glob("*") if path.is_dir())]
    sections = [section for folder in folders for section in _sections(folder, entries)]
    counts = Counter(section["title"] for section in sections)
    for section in sections:
        if counts[section["title"]] > 1:  # several runs of one notebook
            section["title"] += f" · {section['about']}"
    n_results, results = _results()
    sweeps = [each for each in status.recorded() if (each["folder"] / status.TABLE).is_file()]
    helpers = {"link": _link, "label": label, "page_of": notebook_page, "changed": _changed}
    helpers |= {"csv_table": _csv_table, "markdown_table": _markdown_table}
    page = template("report.html.jinja").render(
        title="MoEBERT workbook",
        sections=sections,
        runs=[(entry, entry.record()) for entry in entries],
        failed=execution.failed_runs(),
        n_results=n_results,
        results=results,
        sweeps=sweeps,
        status=status,
        Path=Path,
        **helpers,
    )
    target = home() / "runs" / "report.html"
    write_bytes(target, page.encode())
    return target


def figures_folder() -> Path:
    """Where the figures and tables of this home's own runs are."""
    return home() / "runs" / "figures"


def _sections(folder: Path, entries: list[Entry]) -> Iterator[dict[str, Any]]:
    """For each notebook with files in ``folder``: its figures, tables and executed copy."""
    files = read_provenance(folder)
    where = Path(os.path.relpath(folder, home())).as_posix()
    for notebook in sorted({about["notebook"] for about in files.values()}):
        names = sorted(name for name, about in files.items() if about["notebook"] == notebook)
        names = [name for name in names if (folder / name).is_file()]
        about = files[names[0]] if names else {"run": "", "settings": {}}
        entry = next((entry for entry in entries if run_of(entry) == about["run"]), None)
        node = read(entry.folder / "notebook.ipynb") if entry else {"cells": []}
        yield {
            "id": f"{where}-{notebook}".replace("/", "-"),
            "folder": where,
            "title": title(node) if node["cells"] else notebook,
            "about": _variant(about["settings"], entry),
            "link": _link(notebook_page(entry)) if entry else "",
            "figures": [_figure(folder / name, node) for name in names if name.endswith(".png")],
            "tables": [folder / name for name in names if name.endswith(".md")],
        }


def _figure(png: Path, node: Any) -> dict[str, Any]:
    numbers, caption = png.with_suffix(".csv"), caption_of(png.stem, node)
    text = unescape(re.sub(r"<[^>]*>", "", caption))
    has_numbers = numbers.is_file()
    return {
        "png": png,
        "caption": trusted(caption),
        "alt": f"{label(png.stem)}. {text}" + " The numbers follow as a table." * has_numbers,
        "source": f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}",
        "numbers": numbers if has_numbers else None,
    }


def caption_of(name: str, node: Any) -> str:
    """HTML of the last paragraph before the cell that saves the figure ``name``."""
    cells = node["cells"]
    naming = [i for i, cell in enumerate(cells) if name in quoted("".join(cell["source"]))]
    code = [index for index in naming if cells[index]["cell_type"] == "code"]
    saving = [index for index in code if "save(" in "".join(cells[index]["source"])] or code
    before = reversed(cells[: saving[-1]]) if saving else ()
    prose = (_last_paragraph(cell) for cell in before if cell["cell_type"] == "markdown")
    return inline_html(next(filter(None, prose), ""))


def _last_paragraph(cell: Any) -> str:
    """The last paragraph of a markdown cell that is no heading, formula, table or note."""
    source = re.sub(r"<details>.*?</details>", "", "".join(cell["source"]), flags=re.DOTALL)
    blocks = re.split(r"\n\s*\n", source.strip())
    prose = [block for block in blocks if not block.startswith(("#", "<", "|", ">", "$$"))]
    return next((block for block in reversed(prose) if not block.startswith("Move the")), "")


def _markdown_table(path: Path) -> Any:
    """A file with a table in Markdown as HTML, what it says escaped."""
    return trusted(_html(escape(path.read_text("utf-8"), quote=False)))


def _csv_table(path: Path) -> Any:
    """The first rows of a CSV file as an HTML table, numbers with four digits."""
    frame = pd.read_csv(path)
    more = len(frame) - MOST_ROWS
    note = f"<p>... {more} more rows in the file</p>" if more > 0 else ""
    return trusted(_frame_html(frame.head(MOST_ROWS)) + note)


def _frame_html(frame: Any) -> str:
    """A table as HTML, its texts escaped, its numbers with four digits and set right."""
    frame = frame.rename(columns=_cell).astype(object).map(_cell)
    return _html(frame.where(frame.notna(), None).to_markdown(index=False, floatfmt=".4g"))


def _cell(value: Any) -> Any:
    return escape(value, quote=False).replace("|", "\\|") if isinstance(value, str) else value


def _results() -> tuple[int, Any]:
    """How many results of experiments are stored, and their table of what differs among them."""
    if not any(entry.kind != "notebook" for entry in Store().entries()):
        return 0, None
    frame = export.frame(kind="all").query("kind != 'notebook'").dropna(axis="columns", how="all")
    differing = [name for name in frame if frame[name].nunique(dropna=False) > 1]
    shown = frame[["kind", *(name for name in differing if name != "kind")]]
    return len(frame), trusted(_frame_html(frame if len(frame) == 1 else shown))


def _variant(settings: dict[str, Any], entry: Entry | None) -> str:
    """Scale, task and changed settings, as text."""
    usual = f"scale {settings['scale']}, task {settings['task']}" if settings else ""
    return ", ".join(filter(None, [usual, _changed(settings, entry)])) or "no settings"


def _changed(settings: dict[str, Any], entry: Entry | None) -> str:
    """What differs from the scale's own values, as text; of a run also notebook parameters."""
    changed = entry.row.get("changed") if entry else None
    changed = status.unusual(settings) if changed is None else changed
    return ", ".join(f"{name}={value}" for name, value in changed.items() if name != "task")


def label(stem: str) -> str:
    """``figure2a`` as "Figure 2a", ``01_removal_curves`` as "Removal curves"."""
    words = re.sub(r"^\d+_", "", stem).replace("_", " ").replace("-", " ")
    words = re.sub(r"^(figure|table)(?=\d)", r"\1 ", words)
    return words[:1].upper() + words[1:]


def _link(path: Path) -> str:
    """A link from ``runs/report.html`` to a file of this home."""
    return quote(Path(os.path.relpath(path, home() / "runs")).as_posix())


# Notebooks as pages: formulas become MathML, which browsers draw without a script, and a sentence
# stands for each widget, which would need a kernel.


def notebook_page(entry: Entry) -> Path:
    """The page of a run's executed notebook in ``runs/pages``, written if missing or older."""
    page, notebook = home() / "runs" / "pages" / f"{entry.folder.name}.html", "notebook.ipynb"
    if not page.is_file() or page.stat().st_mtime < (entry.folder / notebook).stat().st_mtime:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(entry.folder / notebook, page)
    return page


def write_page(notebook: Path, target: Path) -> None:
    """Write an executed ``.ipynb`` as one HTML file that asks nothing of other hosts."""
    from nbconvert import HTMLExporter

    def markdown(source: str) -> str:
        return with_mathml(NOTEBOOK_LINK.sub(r"](../../notebooks/\1", source))

    node = for_reading(read(notebook), markdown)
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(node)
    page = template("page.html.jinja").render(title=title(node), body=trusted(body))
    write_bytes(target, page.encode())


def for_reading(node: Any, markdown: Callable[[str], str]) -> Any:
    """An executed notebook without widgets, its text through ``markdown``; changed in place."""
    for cell in node.cells:
        if cell.cell_type == "markdown":
            cell.source = markdown(cell.source)
        elif cell.cell_type == "code":
            cell.outputs = without_widgets(cell.outputs)
    node.metadata.pop("widgets", None)
    return node


def read(notebook: Path) -> Any:
    """A notebook, as nbformat reads it."""
    import nbformat

    return nbformat.read(notebook, as_version=4)


def title(node: Any) -> str:
    """The first heading of a notebook, without its markup."""
    for cell in node["cells"]:
        for line in "".join(cell["source"]).splitlines():
            if cell["cell_type"] == "markdown" and line.startswith("# "):
                return re.sub(r"[*_`$]", "", line[2:]).strip()
    return "Notebook"


def quoted(source: str) -> list[str]:
    """The words in quotes in a piece of code, such as names that figures are saved under."""
    return re.findall(r"""["']([\w-]+)["']""", source)


def with_mathml(markdown: str) -> str:
    """Markdown with its ``$...$`` and ``$$...$$`` as MathML, outside of code."""
    return CODE_OR_MATH.sub(_mathml, markdown)


def _mathml(match: re.Match) -> str:
    from latex2mathml.converter import convert

    tex = match["block"] or match["line"]
    if tex is None:
        return match[0]
    tex = BOLD_LETTER.sub(r"\\\1{\2}", tex)  # the package sees bold letters only in braces
    display = "block" if match["block"] else "inline"
    try:
        return " ".join(convert(tex.strip(), display=display).split())
    except Exception:  # it raises many kinds; TeX is still readable
        return match[0]


def without_widgets(outputs: Sequence[Any]) -> list[Any]:
    """A cell's outputs with one sentence in place of its widgets.

    A widget that comes with a picture of itself is replaced by the picture.
    """
    kept, has_sentence = [], False
    for output in outputs:
        data = output.get("data", {})
        if WIDGET_VIEW in data and "image/png" in data:
            output["data"] = {"image/png": data["image/png"]}
        elif WIDGET_VIEW in data and has_sentence:
            continue
        elif WIDGET_VIEW in data:
            has_sentence = True
            output["data"] = {"text/html": f'<p class="meta">{MOVE}</p>', "text/plain": MOVE}
        kept.append(output)
    return kept


def with_saved_pictures(
    node: Any, names: Sequence[str], data: Callable[[str], dict[str, str]]
) -> Any:
    """A copy of an executed notebook that refers to the saved figures it shows.

    Args:
        node: The notebook.
        names: Of the figures that it saved.
        data: An output's data, by type, in place of the figure of that name.

    Raises:
        UserError: a cell shows more pictures than it saves.
    """
    node = copy.deepcopy(node)
    for number, cell in enumerate(node.cells):
        pictures = [out for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
        saved = [name for name in dict.fromkeys(quoted(cell.source)) if name in names]
        if len(saved) < len(pictures):
            raise UserError(f"cell {number} of '{title(node)}' shows a figure it does not save")
        for picture, name in zip(pictures, saved[len(saved) - len(pictures) :], strict=True):
            picture["data"] = data(name)
    return node


def figure_title(png: Path) -> str:
    """What a figure shows, as ``plots.save`` wrote it into the PNG.

    Raises:
        UserError: the file has no title.
    """
    from PIL import Image

    with Image.open(png) as image:
        text = " ".join(str(image.info.get("Title", "")).split())
    if not text:
        raise UserError(f"{png.name} has no title; make it again with plots.save")
    return text


def inline_html(markdown: str) -> str:
    """A paragraph of markdown as HTML, with MathML, without links, which start elsewhere."""
    unlinked = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown)
    return re.sub(r"^\s*<p>|</p>\s*$", "", _html(with_mathml(unlinked))).strip()


def _html(markdown: str) -> str:
    from nbconvert.filters import markdown2html

    return markdown2html(markdown)


def trusted(html: str) -> Any:
    """HTML that templates take as it is, without escaping it."""
    from markupsafe import Markup

    return Markup(html)


def template(name: str, *, autoescape: bool = True) -> Any:
    """A Jinja template of this room, by its path below ``templates``."""
    from jinja2 import Environment, FileSystemLoader

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    loader = FileSystemLoader(TEMPLATES)
    return Environment(loader=loader, autoescape=autoescape, **blocks).get_template(name)


# Committed figures and tables, drawn again from committed results (``store.committed_results``).
# The folder of results holds ``workbook.yaml`` too, a grid of ``moebert sweep`` with every notebook
# run that draws something. They run here without the cells that need a model. The first run of a
# notebook is drawn into ``figures/``, another one into the folder there that its task names.


def draw(
    results: Path,
    *,
    into: Path | None = None,
    vectors: str = "",
    echo: Callable[[str], Any] = print,
) -> Path:
    """Draw everything that a folder of results has; returns the folder of the drawings.

    Args:
        results: Results, and the grid of notebook runs.
        into: Where the drawings go; ``figures/`` of this home by default, and with ``vectors``
            ``runs/figures-pdf/`` or ``runs/figures-svg/``.
        vectors: "pdf" or "svg" to draw each figure in this format too.
        echo: Receives a line for each start and end.

    Raises:
        UserError: the folder holds no results, or they lack what a notebook asks for.
        NotebookFailed: a notebook does not run on them.
    """
    committed = home() / "figures"
    into = into or (home() / "runs" / f"figures-{vectors}" if vectors else committed)
    committed_results.verify(results, export.stage_table)  # once, and not in each kernel
    jobs = plan(results, into, formats=vectors)
    for entry in local_pool.run(jobs, engine=side_by_side(jobs), echo=echo):
        if entry.key.choices["notebook"] == FINDINGS:
            write_found(entry, into)
    if into == committed:
        for document, text in outdated_documents().items():
            write_bytes(document, text.encode())
    return into


def plan(results: Path, into: Path, *, formats: str = "") -> list[Job]:
    """The notebook runs of a folder of results, each with its place below ``into``."""
    store = committed_results.committed_results(str(results.resolve()))
    grid = results / WORKBOOK
    if not grid.is_file():
        raise UserError(f"no {WORKBOOK} in '{results}'; expected the grid of its notebook runs")
    jobs, seen = [], set()
    for job in sweep.read(grid, store=store).jobs:
        further = job.settings.task if job.name in seen and job.settings else ""
        place = str((into / further).resolve())
        jobs.append(dataclasses.replace(job, place=place, formats=formats))
        seen.add(job.name)
    return jobs


def write_found(entry: Entry, into: Path) -> None:
    """Write the findings notebook of a run as Markdown, its code hidden, into ``found.md``."""
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    def picture(name: str) -> dict[str, str]:
        return {"text/markdown": f"![{figure_title(into / f'{name}.png')}]({name}.png)"}

    names = [path.stem for path in (entry.folder / "figures").glob("*.png")]
    node = with_saved_pictures(read(entry.folder / "notebook.ipynb"), names, picture)
    node.cells[0].source = re.sub(
        r"^>.*\n?", "", node.cells[0].source, flags=re.MULTILINE
    )  # its box
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.output_type != "stream"]
    remove = {"enabled": True, "remove_cell_tags": LEFT_OUT}
    exporter = MarkdownExporter(exclude_input=True, config=Config(TagRemovePreprocessor=remove))
    text, _ = exporter.from_notebook_node(node)
    text = re.sub(r"\n{3,}", "\n\n", NOTEBOOK_LINK.sub(r"](../notebooks/\1", text))
    write_bytes(into / FOUND, f"{text.strip()}\n".encode())


def check(results: Path, *, echo: Callable[[str], Any] = print) -> list[str]:
    """Draw everything into another folder; returns what differs from ``figures/``.

    Each line names a file and says how: it has other bytes, is missing, or nothing draws it. A
    document is named whose tables are not those in ``figures/``.
    """
    with tempfile.TemporaryDirectory(prefix="moebert-") as place:
        drawn = digests(draw(results, into=Path(place), echo=echo))
    there = digests(home() / "figures")
    differing = {
        name: "other bytes" for name in drawn if there.get(name, drawn[name]) != drawn[name]
    }
    missing = dict.fromkeys(drawn.keys() - there.keys(), "missing from figures/")
    undrawn = dict.fromkeys(there.keys() - drawn.keys(), "nothing draws it")
    names = [document.name for document in outdated_documents()]
    outdated = dict.fromkeys(names, "its tables are not those in figures/")
    lines = differing | missing | undrawn | outdated
    return [f"{name}: {how}" for name, how in sorted(lines.items())]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that runs drew below a folder of figures, by relative path."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    drawn = [path for path in paths if path.parts[0] not in UNDRAWN]
    return {path.as_posix(): file_digest(folder / path) for path in drawn}


# Tables in documents: each stands between ``<!-- table: FILE -->`` and ``<!-- end of table -->``.


def outdated_documents() -> dict[Path, str]:
    """README and guides whose tables are not those in their files: by path, the text with these.

    Raises:
        UserError: a file that a marker names is missing, or a table has no end.
    """
    outdated = {}
    for path in [*home().glob("README.md"), *sorted((home() / "notebooks").glob("*.md"))]:
        text = path.read_text("utf-8")
        filled, n_tables = TABLE.subn(partial(_table_between, path), text)
        if n_tables != text.count("<!-- table:"):
            raise UserError(f"{path.name}: a table has no '<!-- end of table -->'")
        if filled != text:
            outdated[path] = filled
    return outdated


def _table_between(document: Path, match: re.Match) -> str:
    """A marker's table: the rows of a Markdown file, or a CSV file as Markdown."""
    file = home() / match["file"]
    if not file.is_file():
        raise UserError(f"{document.name}: no file {match['file']}; expected a table of a run")
    if file.suffix == ".csv":
        table = pd.read_csv(file).to_markdown(index=False)
    else:
        lines = file.read_text("utf-8").splitlines()
        table = "\n".join(line for line in lines if line.startswith("|"))
    return f"{match['start']}\n{table}\n{match['end']}"
