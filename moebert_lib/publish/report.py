"""One HTML page with everything the runs made: figures, tables, runs, where each came from.

The page is one file that needs no network: figures are embedded. It links to the executed
notebooks and to the CSV behind each figure, which lie beside it.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moebert_lib.config.errors import UserError, home
from moebert_lib.config.file_io import write_bytes
from moebert_lib.config.provenance import file_digest
from moebert_lib.publish import findings
from moebert_lib.runs import execution, export, local_pool, status, sweep
from moebert_lib.runs.local_pool import side_by_side
from moebert_lib.runs.plan import Job
from moebert_lib.store import committed_results
from moebert_lib.store.store import Entry, Store

BODY = """
{% macro grid(table) %}<div class="scroll"><table><thead><tr>
{% for name in table.head %}
<th{% if table.right[loop.index0] %} class="num"{% endif %}>{{ name }}</th>
{% endfor %}</tr></thead><tbody>{% for row in table.rows %}<tr>{% for cell in row %}
<td{% if table.right[loop.index0] %} class="num"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro %}
<header><h1>MoEBERT workbook</h1>
<p class="meta">{{ runs|length }} notebook runs, {{ n_figures }} figures, {{ n_tables }} tables.
The newest run is of {{ newest }} UTC.</p>
<nav aria-label="Contents"><ul>{% for part in parts %}
<li><a href="#{{ part.id }}">{{ part.title }}</a></li>{% endfor %}
{% for sweep in sweeps %}<li><a href="#{{ sweep.id }}">{{ sweep.title }}</a></li>{% endfor %}
<li><a href="#runs">Runs</a></li></ul></nav></header>
<main>
{% if failed %}<section aria-label="Failed runs"><h2>Failed</h2><ul>{% for run in failed %}
<li><b class="bad">{{ run.notebook }}{% if run.cell %}, cell {{ run.cell }}{% endif %}</b>
{{ run.values }}: {{ run.error }}{% if run.link %} (<a href="{{ run.link }}">executed copy</a>)
{% endif %}</li>{% endfor %}</ul></section>
{% endif %}
{% for part in parts %}
<section id="{{ part.id }}"><h2>{{ part.title }}</h2>
<p class="meta"><span class="pill">{{ part.where }}</span> {{ part.about }}
{% if part.link %}<a href="{{ part.link }}">Executed notebook</a>{% endif %}</p>
{% for figure in part.figures %}
<figure id="{{ figure.id }}"><img src="{{ figure.source }}" alt="{{ figure.alt }}" loading="lazy">
<figcaption><b>{{ figure.label }}.</b> {{ figure.caption }}
{% if figure.numbers %}<details><summary>Numbers behind it</summary>{{ grid(figure.numbers) }}
<a href="{{ figure.csv }}">{{ figure.csv }}</a></details>{% endif %}</figcaption></figure>
{% endfor %}
{% for table in part.tables %}
<section id="{{ table.id }}"><h3>{{ table.label }}</h3>
<p class="meta">{{ table.caption }}</p>{{ grid(table.grid) }}</section>{% endfor %}
</section>{% endfor %}
{% for sweep in sweeps %}<section id="{{ sweep.id }}"><h2>{{ sweep.title }}</h2>
<p class="meta">{{ sweep.about }} <a href="{{ sweep.link }}">{{ sweep.link }}</a></p>
{% if sweep.means %}<p class="meta">The mean over runs; low and high are the ends of its 95 %
interval by Student's t.</p>{{ grid(sweep.means) }}{% endif %}
<details><summary>All runs</summary>{{ grid(sweep.table) }}</details></section>{% endfor %}
<section id="runs"><h2>Runs</h2>
<p>Each row is one executed notebook. A run is used again as long as its notebook, settings,
library, data and weights stay as they were.</p>
<div class="scroll"><table><thead><tr><th>Notebook</th><th>Scale</th><th>Task</th>
<th>Changed settings</th><th>Made (UTC)</th><th class="num">Minutes</th><th>Commit</th></tr></thead>
<tbody>{% for run in runs %}<tr><td><a href="{{ run.link }}">{{ run.notebook }}</a></td>
<td>{{ run.scale }}</td><td>{{ run.task }}</td><td>{{ run.changed }}</td><td>{{ run.created }}</td>
<td class="num">{{ run.minutes }}</td><td><code>{{ run.commit }}</code></td></tr>
{% endfor %}</tbody></table></div>
{% if experiments %}<h3>Experiments behind them</h3>
<details><summary>{{ experiments.rows|length }} stored results</summary>{{ grid(experiments) }}
</details>{% endif %}
<h3>Made with</h3><p class="meta">{{ versions }}<br>{{ machine }}</p>
</section></main>
"""


def write_report(figures: Path | None = None) -> Path:
    """Write ``runs/report.html`` and return its path.

    Args:
        figures: The folder whose figures it shows; ``runs/figures`` by default.

    Raises:
        UserError: nothing has been run yet.
    """
    from jinja2 import Environment

    entries = Store().entries("notebook")
    if not entries:
        raise UserError("nothing to report yet; run moebert run first")
    parts = _distinct([part for folder in _folders(figures) for part in _parts(folder, entries)])
    record = entries[-1].record()
    body = (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(BODY)
        .render(
            parts=parts,
            runs=[_run(entry) for entry in entries],
            failed=_failed(),
            n_figures=sum(len(part["figures"]) for part in parts),
            n_tables=sum(len(part["tables"]) for part in parts),
            newest=_minute(record["created"]),
            experiments=_experiments(),
            sweeps=_sweeps(),
            versions=", ".join(f"{name} {value}" for name, value in record["versions"].items()),
            machine=", ".join(
                f"{name} {value}" for name, value in record["machine"].items() if value
            ),
        )
    )
    target = home() / "runs" / "report.html"
    write_bytes(target, page("MoEBERT workbook", body).encode())
    return target


def notebook_page(entry: Entry) -> Path:
    """The page of a run's executed notebook, in ``runs/pages``; written where it is missing."""
    page = home() / "runs" / "pages" / f"{entry.folder.name}.html"
    notebook = entry.folder / "notebook.ipynb"
    if not page.is_file() or page.stat().st_mtime < notebook.stat().st_mtime:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(notebook, page)
    return page


def _folders(figures: Path | None) -> list[Path]:
    figures = figures or home() / "runs" / "figures"
    below = sorted(path for path in figures.glob("*") if path.is_dir())
    return [folder for folder in (figures, *below) if local_pool.read_provenance(folder)]


def _parts(folder: Path, entries: list[Entry]) -> list[dict[str, Any]]:
    """One section for each notebook whose files lie in ``folder``, in notebook order."""
    known = local_pool.read_provenance(folder)
    where = folder.relative_to(home()).as_posix()
    parts = []
    for notebook in sorted({about["notebook"] for about in known.values()}):
        names = sorted(name for name in known if known[name]["notebook"] == notebook)
        names = [name for name in names if (folder / name).is_file()]
        digest = known[names[0]]["run"] if names else ""
        entry = next((entry for entry in entries if local_pool.run_of(entry) == digest), None)
        node = _notebook(entry)
        settings = known[names[0]]["settings"] if names else {}
        parts.append(
            {
                "id": f"{where}-{notebook}".replace("/", "-"),
                "where": where,
                "title": title(node) if node["cells"] else notebook,
                "about": _variant(settings, _changed(settings, entry)),
                "link": _link(notebook_page(entry)) if entry else "",
                "figures": [
                    _figure(folder / name, node) for name in names if name.endswith(".png")
                ],
                "tables": [_table(folder / name) for name in names if name.endswith(".md")],
            }
        )
    return parts


def _distinct(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sections, with what was run in the title where another has the same one."""
    titles = [part["title"] for part in parts]
    for part in parts:
        if titles.count(part["title"]) > 1:
            part["title"] += f" · {part['about']}"
    return parts


def _figure(png: Path, node: dict[str, Any]) -> dict[str, Any]:
    from markupsafe import Markup

    said, numbers = label(png.stem), png.with_suffix(".csv")
    caption = _caption(png.stem, node)
    plain = unescape(re.sub(r"<[^>]*>", "", caption))
    has_numbers = numbers.is_file()
    return {
        "id": f"{png.parent.name}-{png.stem}",
        "label": said,
        "caption": Markup(caption),
        "alt": f"{said}. {plain}" + (" The numbers follow as a table." if has_numbers else ""),
        "source": f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}",
        "numbers": read_csv(numbers) if has_numbers else None,
        "csv": _link(numbers),
    }


def _caption(name: str, node: dict[str, Any]) -> str:
    """HTML of the last thing the notebook says before the cell that makes the figure."""
    from nbconvert.filters import markdown2html

    cells, quoted = node["cells"], re.compile(rf"[\"']{re.escape(name)}[\"']")
    sources = ["".join(cell["source"]) if cell["cell_type"] == "code" else "" for cell in cells]
    naming = [index for index, source in enumerate(sources) if quoted.search(source)]
    saving = [index for index in naming if "save(" in sources[index]] or naming
    before = cells[saving[-1] :: -1] if saving else []
    prose = (_last_paragraph(cell) for cell in before if cell["cell_type"] == "markdown")
    text = next(filter(None, prose), "")
    html = markdown2html(with_mathml(text))
    return re.sub(r"^\s*<p>|</p>\s*$", "", html).strip()


def _last_paragraph(cell: dict[str, Any]) -> str:
    """The last paragraph of prose in a markdown cell: no heading, formula, table or aside."""
    source = re.sub(r"<details>.*?</details>", "", "".join(cell["source"]), flags=re.DOTALL)
    blocks = re.split(r"\n\s*\n", source.strip())
    prose = [block for block in blocks if not block.startswith(("#", "<", "|", ">", "$$"))]
    return next((block for block in reversed(prose) if not block.startswith("Move the")), "")


def _table(path: Path) -> dict[str, Any]:
    prose, grid = read_markdown(path)
    return {
        "id": f"{path.parent.name}-{path.stem}",
        "label": label(path.stem),
        "caption": prose,
        "grid": grid,
    }


def _sweeps() -> list[dict[str, Any]]:
    """One section for each sweep that has come to its end once."""
    found = []
    for record in status.recorded():
        table, means = record["folder"] / status.TABLE, record["folder"] / status.MEANS
        if table.is_file():
            counts = Counter(state for _, state, _ in status.states(record))
            told = ", ".join(f"{n} {state}" for state, n in counts.items())
            found.append(
                {
                    "id": f"sweep-{record['folder'].name}",
                    "title": f"Sweep {record['folder'].name}",
                    "about": f"{len(record['points'])} runs: {told}.",
                    "link": _link(table),
                    "means": read_csv(means) if means.is_file() else None,
                    "table": read_csv(table),
                }
            )
    return found


def _experiments() -> Grid | None:
    rows = []
    for entry in Store().entries():
        if entry.kind != "notebook":
            values = {name: value for name, value in entry.row.items() if isinstance(value, float)}
            shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            rows.append(
                [
                    entry.kind,
                    status.summary(entry),
                    shown,
                    entry.digest[:8],
                    f"{entry.seconds / 60:.1f}",
                ]
            )
    head = ["Kind", "What", "Result", "Run", "Minutes"]
    return Grid(head, rows, [False, False, False, False, True]) if rows else None


def _run(entry: Entry) -> dict[str, str]:
    settings, record = entry.key.choices.get("settings") or {}, entry.record()
    return {
        "notebook": entry.key.choices["notebook"],
        "link": _link(notebook_page(entry)),
        "scale": settings.get("scale", ""),
        "task": settings.get("task", ""),
        "changed": _changed(settings, entry),
        "created": _minute(record["created"]),
        "minutes": f"{entry.seconds / 60:.1f}",
        "commit": _commit(record["commit"]),
    }


def _failed() -> list[dict[str, Any]]:
    found = []
    for run in execution.failed_runs():
        copy = Path(run["folder"]) / "notebook.ipynb"
        values = " ".join(f"{name}={value}" for name, value in run["given"].items())
        found.append(run | {"values": values, "link": _link(copy) if copy.is_file() else ""})
    return found


def _variant(settings: dict[str, Any], changed: str) -> str:
    """Scale, task and what was changed, as text."""
    usual = f"scale {settings['scale']}, task {settings['task']}" if settings else ""
    return ", ".join(filter(None, [usual, changed])) or "no settings"


def _changed(settings: dict[str, Any], entry: Entry | None) -> str:
    """What differs from the scale's own, as text; of a stored run, also notebook parameters."""
    changed = entry.row.get("changed") if entry else None
    changed = status.unusual(settings) if changed is None else changed
    return ", ".join(f"{name}={value}" for name, value in changed.items() if name != "task")


def _notebook(entry: Entry | None) -> dict[str, Any]:
    if entry is None:
        return {"cells": []}
    return json.loads((entry.folder / "notebook.ipynb").read_text("utf-8"))


def label(stem: str) -> str:
    """``figure2a`` as "Figure 2a", ``01_removal_curves`` as "Removal curves"."""
    words = re.sub(r"^\d+_", "", stem).replace("_", " ").replace("-", " ")
    words = re.sub(r"^(figure|table)(?=\d)", r"\1 ", words)
    return words[:1].upper() + words[1:]


def _link(path: Path) -> str:
    """A link from ``runs/report.html`` to a file of this home."""
    return quote(Path(os.path.relpath(path, home() / "runs")).as_posix())


def _minute(created: str) -> str:
    return created.replace("T", " ")[:16]


def _commit(commit: str | None) -> str:
    return re.sub(r"^(.{8})[^-]*", r"\1", commit) if commit else ""


# The tables of a report: what CSV and markdown files hold, as rows of text.

MOST_ROWS = 40  # shown of a CSV; the file has all


@dataclass(frozen=True)
class Grid:
    """A table of strings; ``right`` says which columns hold numbers."""

    head: list[str]
    rows: list[list[str]]
    right: list[bool]


def read_markdown(path: Path) -> tuple[str, Grid]:
    """The prose around a markdown file's table, and the table."""
    lines = path.read_text("utf-8").splitlines()
    cells = [
        [cell.strip().replace("**", "") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in lines
        if line.lstrip().startswith("|")
    ]
    prose = " ".join(line.strip("*# ") for line in lines if line and not line.startswith("|"))
    rule = cells[1] if len(cells) > 1 else []
    right = [mark.endswith(":") for mark in rule]
    return prose, Grid(cells[0] if cells else [], cells[2:], right)


def read_csv(path: Path) -> Grid:
    """The first rows of a CSV, numbers shortened to four digits."""
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    right = [all(_is_number(row[i]) for row in rows if len(row) > i) for i in range(len(head))]
    shown = [[_short(cell) for cell in row] for row in rows[:MOST_ROWS]]
    if len(rows) > MOST_ROWS:
        shown.append([f"... {len(rows) - MOST_ROWS} more rows in the file"])
    return Grid(head, shown, right)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*([eE][-+]?\d+)?|nan|inf)?", text) is not None


def _short(text: str) -> str:
    return f"{float(text):.4g}" if "." in text and _is_number(text) else text


# Committed figures and tables drawn again from committed results: nothing is trained.
# A folder of results (``archive``) also holds ``workbook.yaml``: the grid of ``moebert sweep``
# whose
# points are all notebook runs that figures and tables come from. Each is executed here without the
# cells that need a model. The first run of a notebook goes to ``figures/``, a further one to the
# folder there that is named after its task.

WORKBOOK = "workbook.yaml"
#: Folders of ``figures/`` whose files no notebook draws.
GIVEN = {"runs", "bench"}


def draw(folder: Path, *, into: Path | None = None, echo: Callable[[str], Any] = print) -> Path:
    """Draw everything that a folder of results holds; returns where it lies.

    Args:
        folder: Results, and the grid of notebook runs.
        into: Where figures go; ``figures/`` of this home by default.
        echo: Receives a line for each start and end.

    Raises:
        UserError: the folder holds no results, or they lack what a notebook asks for.
        NotebookFailed: a notebook does not run on them.
    """
    into = into or home() / "figures"
    with _from(folder):
        export.verify(folder)  # refused here, once, and not in each kernel
        jobs = plan(folder, into)
        local_pool.run(jobs, engine=side_by_side(jobs), echo=echo)
        if findings.NOTEBOOK in {job.name for job in jobs}:
            findings.write(into)
    return into


def plan(folder: Path, into: Path) -> list[Job]:
    """The notebook runs of a folder of results, each with its place below ``into``."""
    grid = folder / WORKBOOK
    if not grid.is_file():
        raise UserError(f"no {WORKBOOK} in '{folder}'; expected the grid of its notebook runs")
    jobs, seen = [], set()
    for job in sweep.read(grid).jobs:
        further = job.settings.task if job.name in seen and job.settings else ""
        jobs.append(dataclasses.replace(job, place=str((into / further).resolve())))
        seen.add(job.name)
    return jobs


def check(folder: Path, *, echo: Callable[[str], Any] = print) -> list[str]:
    """Draw everything into a folder of its own; returns what differs from ``figures/``.

    Each line names a file and says how: it has other bytes, is missing, or nothing draws it.
    """
    with tempfile.TemporaryDirectory(prefix="moebert-") as place:
        drawn = digests(draw(folder, into=Path(place), echo=echo))
    there = digests(home() / "figures")
    told = {
        **{name: "other bytes" for name in drawn if there.get(name, drawn[name]) != drawn[name]},
        **{name: "missing from figures/" for name in drawn.keys() - there.keys()},
        **{name: "nothing draws it" for name in there.keys() - drawn.keys()},
    }
    return [f"{name}: {told[name]}" for name in sorted(told)]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that runs drew below a folder of figures, by relative path."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        path.as_posix(): file_digest(folder / path)
        for path in sorted(found)
        if path.parts[0] not in GIVEN
    }


@contextmanager
def _from(folder: Path) -> Iterator[None]:
    """Results instead of the store, here and in the kernels that are started in the block."""
    before = os.environ.get(committed_results.FROM)
    os.environ[committed_results.FROM] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ[committed_results.FROM]
        if before is not None:
            os.environ[committed_results.FROM] = before


# HTML pages that stand alone: one file, no request, light and dark.
# ``write_page`` turns an executed notebook into one. Formulas become MathML, which browsers
# draw without a script. A widget needs a kernel, so the page shows a sentence and
# the static figure that follows.

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MOVE = "Interactive: open the notebook in JupyterLab to move it."
CODE_OR_MATH = re.compile(
    r"(?P<code>```.*?```|`+[^`]*`+)|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?!\s)(?P<line>[^$\n]+?)(?<!\s)\$(?!\w)",
    re.DOTALL,
)

LETTER = re.compile(r"\\(mathbf|mathcal|mathbb) (\w)")

#: What colours mean on every page, by day and by night.
LIGHT = {
    "ink": "#1c2024",
    "soft": "#60656c",
    "line": "#e0e3e7",
    "paper": "#ffffff",
    "wash": "#f6f7f9",
    "link": "#0b5cad",
    "good": "#18794e",
    "word": "#8a2f82",
    "bad": "#b3261e",
}
DARK = {
    "ink": "#e6e8eb",
    "soft": "#a0a6ad",
    "line": "#33383e",
    "paper": "#15181b",
    "wash": "#1d2125",
    "link": "#7cb8f5",
    "good": "#5bd6a0",
    "word": "#e39bdc",
    "bad": "#ff8f86",
}


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = (
    f"""
:root {{ {_variables(LIGHT)} color-scheme: light; }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} color-scheme: dark; }} }}
"""
    + """
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 56rem; color: var(--ink);
  background: var(--paper); font: 17px/1.6 Charter, "Bitstream Charter", Cambria, Georgia, serif; }
h1, h2, h3, h4, nav, table, figcaption, .meta, summary, .pill { font-family: system-ui,
  -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 3.25rem 0 .75rem; padding-top: 1.25rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p, li, blockquote { max-width: 42rem; }
a { color: var(--link); text-underline-offset: .15em; }
.meta, figcaption, summary { color: var(--soft); font-size: .85rem; line-height: 1.5; }
figure { margin: 1.75rem 0 2.25rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: .75rem;
  border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin-top: .6rem; max-width: 46rem; }
figcaption b { color: var(--ink); }
.scroll { overflow-x: auto; margin: 1rem 0 1.5rem; }
table { border-collapse: collapse; font-size: .84rem; line-height: 1.45;
  font-variant-numeric: tabular-nums; border-bottom: 1.5px solid var(--ink); }
th, td { padding: .34rem .8rem .34rem 0; text-align: left; vertical-align: top;
  border-top: 1px solid var(--line); }
thead th { border-top: 1.5px solid var(--ink); border-bottom: 1px solid var(--ink);
  font-weight: 600; white-space: nowrap; }
td.num, th.num { text-align: right; }
caption { caption-side: top; text-align: left; color: var(--soft); padding-bottom: .5rem; }
pre, code { font: .84em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { overflow-x: auto; margin: .75rem 0; padding: .75rem 1rem; background: var(--wash);
  border-radius: 6px; }
p code, li code, td code { background: var(--wash); padding: .1em .3em; border-radius: 3px; }
blockquote { margin: 1rem 0; padding: 0 1rem; border-left: 3px solid var(--line);
  color: var(--soft); }
math[display="block"] { margin: 1rem 0; overflow: auto hidden; font-size: 1.1em; }
.pill { display: inline-block; font-size: .75rem; padding: .05rem .5rem; border-radius: 1rem;
  border: 1px solid var(--line); color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media print { body { max-width: none; font-size: 11pt; } details > * { display: block; } }
"""
)

NOTEBOOK_STYLE = """
.prompt, .anchor-link { display: none; }
.output_subarea { overflow-x: auto; margin: .5rem 0; }
.output_stream pre, .output_text pre { background: none; padding: 0 0 0 1rem; margin: 0;
  color: var(--soft); border-left: 2px solid var(--line); border-radius: 0;
  white-space: pre-wrap; }
.output_subarea img, .output_subarea svg { max-width: 100%; height: auto; background: #fff;
  border-radius: 6px; padding: .5rem; }
.highlight .k, .highlight .kn, .highlight .kc, .highlight .ow { color: var(--word); }
.highlight .s1, .highlight .s2, .highlight .sa, .highlight .sd { color: var(--good); }
.highlight .c1 { color: var(--soft); font-style: italic; }
.highlight .mi, .highlight .mf, .highlight .nb { color: var(--link); }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{{ body }}
</body>
</html>
"""


def page(title: str, body: str, *, style: str = STYLE) -> str:
    """A whole page around a body of trusted HTML; the title is escaped."""
    from jinja2 import Environment
    from markupsafe import Markup

    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(title=title, body=Markup(body), style=Markup(style)) + "\n"


def write_page(notebook: Path, target: Path) -> None:
    """Write an executed notebook as one HTML page.

    Args:
        notebook: The executed ``.ipynb``.
        target: The page, written whole or not at all.
    """
    import nbformat
    from nbconvert import HTMLExporter

    node = nbformat.read(notebook, as_version=4)
    for cell in node.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
        elif cell.cell_type == "code":
            cell.outputs = without_widgets(cell.outputs)
    node.metadata.pop("widgets", None)
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(node)
    write_bytes(target, page(title(node), body, style=STYLE + NOTEBOOK_STYLE).encode())


def title(node: Any) -> str:
    """The first heading of a notebook, without its markup."""
    for cell in node["cells"]:
        for line in "".join(cell["source"]).splitlines():
            if cell["cell_type"] == "markdown" and line.startswith("# "):
                return re.sub(r"[*_`$]", "", line[2:]).strip()
    return "Notebook"


def with_mathml(markdown: str) -> str:
    """Markdown with its ``$...$`` and ``$$...$$`` as MathML; code is left alone.

    Without the package latex2mathml the formulas stay TeX.
    """
    try:
        from latex2mathml.converter import convert
    except ImportError:
        return markdown

    def draw(match: re.Match) -> str:
        tex = match["block"] or match["line"]
        if tex is None:
            return match[0]
        tex = LETTER.sub(r"\\\1{\2}", tex)  # the package sees bold letters only in braces
        display = "block" if match["block"] else "inline"
        try:
            return " ".join(convert(tex.strip(), display=display).split())
        except Exception:  # noqa: BLE001  the library raises many kinds; TeX is still readable
            return match[0]

    return CODE_OR_MATH.sub(draw, markdown)


def without_widgets(outputs: Sequence[Any]) -> list[Any]:
    """A cell's outputs with one sentence in place of its widgets, which would need a kernel.

    Of a widget that comes with a picture of itself the picture stays.
    """
    kept, told = [], False
    for output in outputs:
        data = output.get("data", {})
        if WIDGET_VIEW not in data:
            kept.append(output)
        elif "image/png" in data:
            output["data"] = {"image/png": data["image/png"]}
            kept.append(output)
        elif not told:
            told = True
            output["data"] = {"text/html": f'<p class="meta">{MOVE}</p>', "text/plain": MOVE}
            kept.append(output)
    return kept
