"""One HTML page with everything the runs made: figures, tables, runs, where each came from.

The page is one file that needs no network: figures are embedded. It links to the executed
notebooks and to the CSV behind each figure, which lie beside it.
"""

import base64
import json
import os
import re
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moebert_lib import batch, inventory, pages, publish
from moebert_lib.errors import UserError, home
from moebert_lib.report_tables import Grid, read_csv, read_markdown
from moebert_lib.store import Entry, Store, write_bytes

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


def write_report() -> Path:
    """Write ``runs/report.html`` and return its path.

    Raises:
        UserError: nothing has been run yet.
    """
    from jinja2 import Environment

    entries = Store().entries("notebook")
    if not entries:
        raise UserError("nothing to report yet; run moebert run first")
    parts = _distinct([part for folder in _folders() for part in _parts(folder, entries)])
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
    write_bytes(target, pages.page("MoEBERT workbook", body).encode())
    return target


def _folders() -> list[Path]:
    figures = home() / "figures"
    below = sorted(path for path in figures.glob("*") if path.is_dir())
    return [folder for folder in (figures, *below) if publish.read_provenance(folder)]


def _parts(folder: Path, entries: list[Entry]) -> list[dict[str, Any]]:
    """One section for each notebook whose files lie in ``folder``, in notebook order."""
    known = publish.read_provenance(folder)
    where = folder.relative_to(home()).as_posix()
    parts = []
    for notebook in sorted({about["notebook"] for about in known.values()}):
        names = sorted(name for name in known if known[name]["notebook"] == notebook)
        names = [name for name in names if (folder / name).is_file()]
        digest = known[names[0]]["run"] if names else ""
        entry = next((entry for entry in entries if publish.run_of(entry) == digest), None)
        node = _notebook(entry)
        settings = known[names[0]]["settings"] if names else {}
        parts.append(
            {
                "id": f"{where}-{notebook}".replace("/", "-"),
                "where": where,
                "title": pages.title(node) if node["cells"] else notebook,
                "about": _variant(settings, _changed(settings, entry)),
                "link": _link(entry.folder / "notebook.html") if entry else "",
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

    said, svg, numbers = label(png.stem), png.with_suffix(".svg"), png.with_suffix(".csv")
    caption = _caption(png.stem, node)
    drawn = svg if svg.is_file() and svg.stat().st_size < png.stat().st_size else png
    kind = "svg+xml" if drawn is svg else "png"
    plain = unescape(re.sub(r"<[^>]*>", "", caption))
    has_numbers = numbers.is_file()
    return {
        "id": f"{png.parent.name}-{png.stem}",
        "label": said,
        "caption": Markup(caption),
        "alt": f"{said}. {plain}" + (" The numbers follow as a table." if has_numbers else ""),
        "source": f"data:image/{kind};base64,{base64.b64encode(drawn.read_bytes()).decode()}",
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
    html = markdown2html(pages.with_mathml(text))
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
    for record in inventory.recorded():
        table, means = record["folder"] / inventory.TABLE, record["folder"] / inventory.MEANS
        if table.is_file():
            counts = Counter(state for _, state, _ in inventory.states(record))
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
                    inventory.summary(entry),
                    shown,
                    entry.digest[:8],
                    f"{entry.seconds / 60:.1f}",
                ]
            )
    head = ["Kind", "What", "Result", "Run", "Minutes"]
    return Grid(head, rows, [False, False, False, False, True]) if rows else None


def _run(entry: Entry) -> dict[str, str]:
    settings, record = entry.key.get("settings") or {}, entry.record()
    return {
        "notebook": entry.key["notebook"],
        "link": _link(entry.folder / "notebook.html"),
        "scale": settings.get("scale", ""),
        "task": settings.get("task", ""),
        "changed": _changed(settings, entry),
        "created": _minute(record["created"]),
        "minutes": f"{entry.seconds / 60:.1f}",
        "commit": _commit(record["commit"]),
    }


def _failed() -> list[dict[str, Any]]:
    found = []
    for run in batch.failed_runs():
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
    changed = inventory.unusual(settings) if changed is None else changed
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
