"""The site: the executed notebooks, a guide, a glossary, all figures, and the reference.

Sphinx builds it from what lies in this home and in the checkout, without a network, and no
page asks another host for anything. A site with a missing run, a picture that says nothing or
a link that leads nowhere is not written at all.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import io
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from moebert_lib.config.errors import CHECKOUT, LIBRARY, UserError, home
from moebert_lib.publish import findings, report
from moebert_lib.publish.report import label
from moebert_lib.runs import local_pool
from moebert_lib.runs.plan import notebooks
from moebert_lib.store.store import Store

LEAD = "02_after_conversion"  # the figure on the front page
NEEDED = {"sphinx": "sphinx", "myst_nb": "myst-nb", "furo": "furo"}
GUIDES = ("your_bert", "glossary")  # markdown beside the notebooks
FROM_README = {"many_runs": "Many runs", "differences": "Differences from the paper"}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MARK = "objects.inv"  # every site has one, and little else does
ORDER = """
```{toctree}
:hidden:
:caption: The notebooks

%s
```

```{toctree}
:hidden:
:caption: Guides

%s
many_runs
differences
CONTRIBUTING
```

```{toctree}
:hidden:
:caption: Look up

%s
figures
reference/index
```
"""


def build(target: Path | None = None, *, figures: Path | None = None) -> Path:
    """Make the site and return its first page.

    Args:
        target: Folder to write; default ``runs/site`` of this home. A site that is there
            already is replaced when the new one is complete.
        figures: Folder whose figures, and the runs that made them, are shown; default
            ``figures`` of this home, another one for another scale.

    Raises:
        UserError: a notebook has not been run, a package is missing, ``target`` holds
            something else, or Sphinx warns of something.
    """
    target = Path(target or home() / "runs" / "site").absolute()
    missing = [NEEDED[name] for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        told = ", ".join(missing)
        raise UserError(
            f"the site needs {told}; make site installs them, or pip install 'moebert[site]'"
        )
    if target.exists() and any(target.iterdir()) and not (target / MARK).is_file():
        raise UserError(f"{target} holds something that is no site; name another folder")
    ran = executed(figures or home() / "runs" / "figures")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        source, made = Path(scratch, "source"), Path(scratch, "html")
        _prepare(source, Path(scratch, "extra"), ran)
        _sphinx(source, made, settings(Path(scratch, "static"), Path(scratch, "extra")))
        _swap(made, target, Path(scratch, "old"))
    return target / "index.html"


def executed(figures: Path) -> list[Ran]:
    """Every notebook of this home, with the run that made its files in ``figures``.

    A notebook without settings is the same at every scale: its files lie in the home's own
    folder of figures.

    Raises:
        UserError: some have not been run, or what they made is no longer there.
    """
    own = local_pool.read_provenance(home() / "runs" / "figures")
    same = {name: about for name, about in own.items() if not about["settings"]}
    here = local_pool.read_provenance(figures)
    runs = {local_pool.run_of(entry): entry.folder for entry in Store().entries("notebook")}
    ran, missing = [], []
    for path in notebooks():
        folder, known = figures, _of(here, path.stem)
        if not known:
            folder, known = home() / "runs" / "figures", _of(same, path.stem)
        run = runs.get(next(iter(known.values()))["run"]) if known else None
        if run is None or not all((folder / name).is_file() for name in known):
            missing.append(path.stem)
        else:
            ran.append(Ran(path.stem, _read(run / "notebook.ipynb"), folder, known))
    if missing:
        numbers = " ".join(name.partition("_")[0] for name in missing)
        raise UserError(
            f"the site shows runs, and {figures} has none of {', '.join(missing)}; "
            f"run: moebert run {numbers}{_scale(here)}"
        )
    return ran


def _of(known: dict[str, dict], notebook: str) -> dict[str, dict]:
    return {name: about for name, about in known.items() if about["notebook"] == notebook}


def _scale(known: dict[str, dict]) -> str:
    scales = {about["settings"].get("scale", "quick") for about in known.values()} - {"quick"}
    return f" --scale {min(scales)}" if scales else ""


def _read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def _prepare(source: Path, extra: Path, ran: list[Ran]) -> None:
    """Write what Sphinx reads into ``source``, and what it copies as it is into ``extra``."""
    import nbformat

    checkout = CHECKOUT
    if not (checkout / "README.md").is_file():
        raise UserError("the site is made from a checkout, with its README.md; this is none")
    readme = (checkout / "README.md").read_text("utf-8")
    write(source / "reference", readme)
    pages = {"index": front(ran, readme, LEAD), "figures": gallery(ran)}
    names = [*(one.name for one in ran), *GUIDES]
    notebooks, guides = names[: len(ran)], names[len(ran) :]
    listed = ("\n".join(f"notebooks/{name}" for name in part) for part in (notebooks, guides))
    page = checkout / "figures" / findings.PAGE
    pages["index"] += "\n" + ORDER % (*listed, "found" * page.is_file())
    for name, heading in FROM_README.items():
        pages[name] = f"# {heading}\n\n{part_of(readme, heading)}"
    if page.is_file():
        pages["found"] = found(page.read_text("utf-8"))
    pages["CONTRIBUTING"] = (checkout / "CONTRIBUTING.md").read_text("utf-8")
    for name in GUIDES:
        guide = (home() / "notebooks" / f"{name}.md").read_text("utf-8")
        pages[f"notebooks/{name}"] = markdown(guide)
    (source / "notebooks").mkdir(parents=True)
    for name, text in pages.items():
        (source / f"{name}.md").write_text(text + "\n", "utf-8")
    (extra / "figures").mkdir(parents=True)
    for one in ran:
        shown = prepare(one.node, one.findings())
        nbformat.write(shown, source / "notebooks" / f"{one.name}.ipynb")
        for name in one.known:
            shutil.copyfile(one.folder / name, extra / "figures" / name)


def _sphinx(source: Path, made: Path, settings: dict[str, Any]) -> None:
    """Build ``source`` into ``made``; what Sphinx warns of is an error."""
    from sphinx.application import Sphinx

    told = io.StringIO()
    work = made.with_name("doctrees")
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, PendingDeprecationWarning):  # Sphinx to its extensions
            warnings.simplefilter("ignore", kind)
        app = Sphinx(
            source,
            None,
            made,
            work,
            "html",
            confoverrides=settings,
            status=None,
            warning=told,
            freshenv=True,
        )
        app.build()
    faults = [line for line in COLOUR.sub("", told.getvalue()).splitlines() if line.strip()]
    if faults:
        first = faults[0].replace(f"{source}{os.sep}", "")
        more = f" (and {len(faults) - 1} more lines)" if len(faults) > 1 else ""
        raise UserError(f"the site is not written: {first}{more}")


def _swap(made: Path, target: Path, old: Path) -> None:
    """Put ``made`` where ``target`` is; what was there goes to ``old``."""
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(made, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise


# What the site shows of an executed notebook: the copy that Sphinx reads, and what it says.
# The copy has its formulas as MathML, a sentence in place of each widget, which would need a
# kernel, and under each picture the finding that ``plots.save`` wrote into it.

NOTEBOOK_LINK = re.compile(r"(\]\([\w./]+\.ipynb#)([^)\s]+)\)")
BOX = re.compile(r"\*\*(You will see|Needs|Makes|Time)\*\*\s*(.*?)\s*(?:<br>|$)", re.MULTILINE)


class Summary(NamedTuple):
    """What the first cell of a notebook says of it, as markdown."""

    number: str
    question: str
    box: dict[str, str]


def finding(png: Path) -> str:
    """What a figure shows, as ``plots.save`` wrote it into the PNG.

    Raises:
        UserError: the file says nothing.
    """
    from PIL import Image

    with Image.open(png) as image:
        title = " ".join(str(image.info.get("Title", "")).split())
    if not title:
        raise UserError(f"{png.name} does not say what it shows; make it again with plots.save")
    return title


def prepare(node: Any, findings: Mapping[str, str]) -> Any:
    """An executed notebook as the site shows it; ``node`` itself is changed.

    Args:
        node: The notebook, as nbformat reads it.
        findings: What each figure shows, by the name it was saved under.

    Raises:
        UserError: a cell shows a picture and names no figure of ``findings``.
    """
    cells = []
    for number, cell in enumerate(node.cells):
        cell.metadata = type(cell.metadata)(tags=cell.metadata.get("tags", []))
        cells.append(cell)
        if cell.cell_type == "markdown":
            cell.source = markdown(cell.source)
            continue
        cell.outputs = report.without_widgets(cell.outputs)
        drawn = [one for one in cell.outputs if "image/png" in one.get("data", {})]
        shown = [name for name in dict.fromkeys(quoted(cell.source)) if name in findings]
        if len(shown) < len(drawn):
            title = report.title(node)
            raise UserError(f"cell {number} of '{title}' shows a figure it does not save")
        if drawn:
            said = [findings[name] for name in shown[-len(drawn) :]]
            cells[-1:] = _by_picture(cell, drawn, said)
    node.cells = cells
    node.metadata.pop("widgets", None)
    node.metadata.pop("papermill", None)
    return node


def _by_picture(cell: Any, drawn: list[Any], said: list[str]) -> list[Any]:
    """The cell, and one without input for each further picture: Sphinx has one text a cell."""
    outputs = [[one for one in cell.outputs if one not in drawn[1:]], *([one] for one in drawn[1:])]
    parts = []
    for number, words in enumerate(said):
        part = deepcopy(cell)
        part.outputs, part.metadata["mystnb"] = outputs[number], {"image": {"alt": words}}
        if number:
            part.id = f"{cell.id}-{number}"
            part.metadata["tags"] = [*cell.metadata["tags"], "remove-input"]
        parts.append(part)
    return parts


def markdown(source: str) -> str:
    """Markdown as the site reads it: formulas drawn, links to a notebook's heading by its slug."""
    linked = NOTEBOOK_LINK.sub(lambda m: f"{m[1]}{slug(unquote(m[2]))})", source)
    return report.with_mathml(linked)


def slug(heading: str) -> str:
    """The anchor of a heading on the site, as on GitHub.

    Example:
        >>> slug("Which neurons matter?")
        'which-neurons-matter'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower().strip().replace(" ", "-"))


def summary(node: Any) -> Summary:
    """Number, question and box of a notebook's first cell."""
    number, _, question = report.title(node).partition(" · ")
    lines = "\n".join(line.lstrip("> ") for line in node["cells"][0]["source"].splitlines())
    return Summary(number, question or number, dict(BOX.findall(lines)))


def section(node: Any, name: str) -> str:
    """The last heading above the cell that saves the figure or table ``name``, "" for none."""
    last = ""
    for cell in node["cells"]:
        source = cell["source"]
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^#{2,3} (.+)$", source, re.MULTILINE)
            last = headings[-1] if headings else last
        elif name in quoted(source):
            return last
    return ""


def quoted(source: str) -> list[str]:
    """The words in quotes in a piece of code, such as the names that figures are saved under."""
    return re.findall(r"""["']([\w-]+)["']""", source)


# The pages that the site adds to the notebooks: the front page, and figures and tables.

FRONT = """# MoEBERT workbook

{{ intro }}

<figure class="lead"><a href="figures.html"><img src="figures/{{ lead.name }}.png"
 alt="{{ lead.finding }}" width="{{ lead.width }}" height="{{ lead.height }}"></a>
<figcaption>{{ lead.finding }}. From <a href="{{ lead.link }}">{{ lead.title }}</a>;
{{ lead.origin }}.</figcaption></figure>

{{ start }}

## The notebooks, in order

<ol class="ladder">
{% for one in ladder %}<li><span class="number" aria-hidden="true">{{ one.number }}</span><div>
<a href="{{ one.link }}">{{ one.question }}</a>
<p>You will see {{ one.see }}</p><p class="meta">{{ one.time }}</p></div></li>
{% endfor %}</ol>

## Where to go from here

<div class="ways">
{% for title, link, about in ways %}<a href="{{ link }}"><b>{{ title }}</b>{{ about }}</a>
{% endfor %}</div>
"""

WAYS = (
    ("Use it on your BERT", "notebooks/your_bert.html", "Score, convert, distil, save, share."),
    ("What we found", "found.html", "Which claims hold on real data, and which do not."),
    ("Glossary", "notebooks/glossary.html", "The words of the field and of the paper."),
    ("Figures and tables", "figures.html", "All of them, with their numbers and origin."),
    ("Many runs", "many_runs.html", "Grids, sweeps, clusters, one table of all."),
    ("Differences from the paper", "differences.html", "What we do otherwise, and why."),
    ("Reference", "reference/index.html", "Every public name of the library."),
)

GALLERY = """# Figures and tables

What the runs of this site drew. Each figure leads to the place in its notebook that makes it,
and to the numbers behind it.

{% for part in parts %}
## {{ part.title }}

<p class="meta">{{ part.origin }}</p>

{% if part.figures %}<div class="gallery">
{% for one in part.figures %}<figure id="{{ one.name }}">
<a class="thumb" href="figures/{{ one.name }}.png"><img src="figures/{{ one.name }}.png"
 alt="{{ one.finding }}" loading="lazy" width="{{ one.width }}" height="{{ one.height }}"></a>
<figcaption><b>{{ one.finding }}</b><span>{{ one.label }}:
<a href="{{ one.link }}">where it is made</a>
{% for ending in one.endings %} · <a href="figures/{{ one.name }}.{{ ending }}"
 download>{{ ending.upper() }}</a>{% endfor %}</span></figcaption></figure>
{% endfor %}</div>{% endif %}

{% for one in part.tables %}<h3 id="{{ one.name }}">{{ one.label }}</h3>

<p class="meta"><a href="{{ one.link }}">where it is made</a>
{% for ending in one.endings %} · <a href="figures/{{ one.name }}.{{ ending }}"
 download>{{ ending.upper() }}</a>{% endfor %}</p>

{{ one.text }}

{% endfor %}{% endfor %}"""


class Ran(NamedTuple):
    """A notebook that was run: its name, executed copy, and what is known of its files.

    ``folder`` holds the files and ``known`` says for each where it came from, as in
    ``figures/provenance.json``.
    """

    name: str
    node: Any
    folder: Path
    known: dict[str, dict[str, Any]]

    def names(self, ending: str) -> list[str]:
        """Names of its files with an ending, such as ``.png``, without it."""
        return sorted(Path(name).stem for name in self.known if name.endswith(ending))

    def findings(self) -> dict[str, str]:
        """What each of its figures shows, by name."""
        return {name: finding(self.folder / f"{name}.png") for name in self.names(".png")}

    def link(self, name: str) -> str:
        """Address of the section that makes a figure or table, from the top of the site."""
        heading = section(self.node, name)
        return f"notebooks/{self.name}.html" + (f"#{slug(heading)}" if heading else "")

    def origin(self) -> str:
        """Run, scale, task, seed, commit and versions of its files, as one line."""
        about = next(iter(self.known.values()))
        settings = about["settings"]
        told = [f"{name} {settings[name]}" for name in ("scale", "task", "seed") if settings]
        if "versions" not in about:
            return f"run {about['run'][:12]}, {', '.join([*told, 'drawn from figures/runs'])}"
        commit = about["commit"] or "not under git"
        commit = re.sub(r"^([0-9a-f]{8})[0-9a-f]*", r"\1", commit)
        told += [f"commit {commit}", f"torch {about['versions']['torch']}"]
        return f"run {about['run'][:12]}, {', '.join(told)}"


def found(page: str) -> str:
    """The page "What we found": its links to notebooks lead to those of the site."""
    page = page.replace("](../notebooks/", "](notebooks/")
    return re.sub(r"\[(\w+)\]\(runs/[^)]*\)", r"\1", page)


def front(ran: list[Ran], readme: str, lead: str) -> str:
    """The front page, as MyST: what this is, one figure, how to start, the notebooks in order."""
    owner = next(one for one in ran if lead in one.names(".png"))
    shown = _figure(owner, lead) | {"title": report.title(owner.node), "origin": owner.origin()}
    intro = readme.partition("\n")[2].strip().partition("\n\n")[0]
    start = "## Two commands\n\n" + part_of(readme, "Two commands")
    return _render(
        FRONT, intro=intro, start=start, lead=shown, ways=WAYS, ladder=[_rung(one) for one in ran]
    )


def gallery(ran: list[Ran]) -> str:
    """The page of all figures and tables, as MyST."""
    parts = [
        {
            "title": report.title(one.node),
            "origin": one.origin(),
            "figures": [_figure(one, name) for name in one.names(".png")],
            "tables": [_table(one, name) for name in one.names(".md")],
        }
        for one in ran
        if one.known
    ]
    return _render(GALLERY, parts=parts)


def part_of(readme: str, heading: str) -> str:
    """What a file of markdown says under a heading of the second level.

    Raises:
        UserError: it has no such heading.
    """
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", readme, re.M | re.S)
    if found is None:
        raise UserError(f"README has no section '{heading}'")
    return found[1].strip()


def _rung(one: Ran) -> dict[str, Any]:
    about = summary(one.node)
    return {
        "number": about.number,
        "question": about.question,
        "link": f"notebooks/{one.name}.html",
        "see": _inline(about.box["You will see"]),
        "time": _inline(about.box["Time"]),
    }


def _figure(one: Ran, name: str) -> dict[str, Any]:
    from PIL import Image

    with Image.open(one.folder / f"{name}.png") as image:
        width, height = image.size
    return {
        "width": width,
        "height": height,
        "finding": finding(one.folder / f"{name}.png"),
        **_entry(one, name, ("png", "csv")),
    }


def _table(one: Ran, name: str) -> dict[str, Any]:
    text = markdown((one.folder / f"{name}.md").read_text("utf-8"))
    return {"text": text, **_entry(one, name, ("csv", "tex", "md"))}


def _entry(one: Ran, name: str, endings: tuple[str, ...]) -> dict[str, Any]:
    there = [ending for ending in endings if f"{name}.{ending}" in one.known]
    return {"name": name, "label": label(name), "link": one.link(name), "endings": there}


def _inline(text: str) -> Any:
    """A line of markdown as HTML, without its links, which start from another folder."""
    from markupsafe import Markup
    from nbconvert.filters import markdown2html

    unlinked = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    html = markdown2html(report.with_mathml(unlinked)).strip()
    return Markup(re.sub(r"^<p>|</p>$", "", html))


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    trusted = {
        name: Markup(value) if isinstance(value, str) else value for name, value in values.items()
    }
    return Environment(autoescape=True).from_string(template).render(**trusted)


# The reference: every public name of the library, by room, from its docstring.
# The rooms and their order are those of the table in the README. Names are found in the
# source, so that a module's page lists what it defines and nothing that it imports.

LONGEST_VALUE = 60  # characters of a constant that its entry repeats
ROLES = {"autofunction": "func", "autoclass": "class"}  # how a name's entry is linked to
ROW = re.compile(r"^\| ([^|]+?) \| (`.+`.*?) \|$", re.MULTILINE)


class Name(NamedTuple):
    """A public name: the directive that documents it, and what it says of itself at once."""

    name: str
    directive: str
    about: str  # the first paragraph of a docstring; of a constant, its comment ``#:``
    options: tuple[str, ...] = ()


def rooms(readme: str) -> dict[str, list[str]]:
    """Modules by room, from the table "The library" of the README; ``plots_*`` is a pattern.

    Raises:
        UserError: the table names a module that is not there.
    """
    there = sorted(path.stem for path in LIBRARY.glob("*.py"))
    found: dict[str, list[str]] = {}
    _, _, rest = readme.partition("## The library")
    for room, cell in ROW.findall(rest.partition("\n## ")[0]):
        found[room] = []
        for pattern in re.findall(r"`([\w*]+)`", cell):
            modules = fnmatch.filter(there, pattern)
            if not modules and "*" not in pattern:
                raise UserError(f"README's table names the module {pattern}, which is not there")
            found[room] += [name for name in modules if name not in found[room]]
    if not found:
        raise UserError("README has no table of rooms under 'The library'")
    return found


def names(module: str) -> list[Name]:
    """The public names that a module defines, in the order of its source."""
    source = (LIBRARY / f"{module}.py").read_text("utf-8")
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            about = (ast.get_docstring(node) or "").partition("\n\n")[0]
            is_class = isinstance(node, ast.ClassDef)
            options = (":members:",) if is_class else ()
            options += (":show-inheritance:",) if is_class and node.bases else ()
            directive = "autoclass" if is_class else "autofunction"
            found.append(Name(node.name, directive, about, options))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = ast.get_source_segment(source, node.value) if node.value else ""
            plain = [name.id for target in targets for name in _names(target)]
            short = len(plain) == 1 and 0 < len(value) <= LONGEST_VALUE and "\n" not in value
            options = (f":value: {value}",) if short else ()
            found += [Name(name, "py:data", _comment(source, node), options) for name in plain]
    return [name for name in found if not name.name.startswith("_")]


def write(folder: Path, readme: str) -> None:
    """Write the pages, in reStructuredText: one for each room, and the map of them all."""
    folder.mkdir(parents=True)
    by_room = rooms(readme)
    lines = [_title("Reference", "="), _intro()]
    for room, modules in by_room.items():
        lines += [f":doc:`{room} <{_file(room)}>`", ""]
        lines += [f"* :py:mod:`~moebert_lib.{name}`: {_first(name)}" for name in modules] + [""]
        (folder / f"{_file(room)}.rst").write_text(_room(room, modules), "utf-8")
    lines += [".. toctree::", "   :hidden:", "", *(f"   {_file(room)}" for room in by_room), ""]
    (folder / "index.rst").write_text("\n".join(lines), "utf-8")


def _intro() -> str:
    return (
        "Every public name, by room. A module imports from its own room and from those below it: "
        "the last room is the ground on which the others stand. Shapes are written in one "
        "alphabet: ``B`` batch, ``T`` tokens, ``D`` hidden size, ``F`` neurons of a dense FFN, "
        "``E`` experts, ``K`` neurons of an expert, ``L`` layers.\n"
    )


def _room(room: str, modules: list[str]) -> str:
    lines = [_title(room[0].upper() + room[1:], "=")]
    lines += [f"* :py:mod:`~moebert_lib.{name}`: {_first(name)}" for name in modules] + [""]
    for module in modules:
        lines += [_title(module, "-"), f".. py:module:: moebert_lib.{module}", ""]
        lines += [_drawn(_docstring(module)), ""]
        public = names(module)
        for name in (name for name in public if name.directive in ROLES):
            role = ROLES[name.directive]
            link = f":py:{role}:`~moebert_lib.{module}.{name.name}`"
            lines.append(f"* {link}: {' '.join(name.about.split())}")
        lines.append("")
        for name in public:
            at = f"moebert_lib.{module}." if name.directive in ROLES else ""  # autodoc's are whole
            lines.append(f".. {name.directive}:: {at}{name.name}")
            lines += [*(f"   {option}" for option in name.options), ""]
            if name.directive not in ROLES:
                lines += [f"   {name.about}", ""]
    return "\n".join(lines)


def _first(module: str) -> str:
    """The first paragraph of a module's docstring, as one line."""
    return " ".join(_docstring(module).partition("\n\n")[0].split())


def _docstring(module: str) -> str:
    tree = ast.parse((LIBRARY / f"{module}.py").read_text("utf-8"))
    return ast.get_docstring(tree) or ""


def _drawn(docstring: str) -> str:
    """A docstring with its formulas line by line: paragraphs set in, or in columns."""
    paragraphs = docstring.split("\n\n")
    for place, text in enumerate(paragraphs):
        announced = place and paragraphs[place - 1].endswith("::")
        if not announced and re.search(r"^ {4}|\S {2,}\S", text):
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            paragraphs[place] = f".. code-block:: text\n\n{indented}"
    return "\n\n".join(paragraphs)


def _names(target: ast.expr) -> list[ast.Name]:
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    return [part for part in parts if isinstance(part, ast.Name)]


def _comment(source: str, node: ast.stmt) -> str:
    """The comment ``#:`` above a constant, or behind it."""
    lines = source.splitlines()
    above = node.lineno - 1
    while above and lines[above - 1].startswith("#:"):
        above -= 1
    told = lines[above : node.lineno - 1] or re.findall(r"  #: .*", lines[node.end_lineno - 1])
    return " ".join(line.strip(" #:") for line in told)


def _title(text: str, rule: str) -> str:
    return f"{text}\n{rule * len(text)}\n"


def _file(room: str) -> str:
    return re.sub(r"\W+", "-", room)


# How the site looks, and what Sphinx is told.
# Everything a page needs lies beside it: the fonts are the reader's own, and formulas need no
# script. The colours are those of ``pages``.

SANS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif'
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"

STYLE = """
.content { width: 50em; }  /* a hundred letters of code */
.content p, .content li { max-width: 46rem; }
.content h1 { font-size: 2.1em; letter-spacing: -.015em; }
.content h2 { font-size: 1.5em; margin-top: 2em; margin-bottom: .6em; }
.content h3 { font-size: 1.15em; margin-top: 1.6em; margin-bottom: .5em; }
section#glossary h2 { font-size: 1.1em; margin-top: 1.4em; margin-bottom: 0; }
section#glossary h2 + p { margin-top: .2em; }
.sidebar-brand-text { font-size: 1.15rem; font-weight: 600; }
a:focus-visible, summary:focus-visible, input:focus-visible, button:focus-visible,
[tabindex]:focus-visible { outline: 2px solid var(--color-link); outline-offset: 2px; }
.meta, figcaption, .content summary { color: var(--color-foreground-secondary); font-size: .88em; }
.content summary { cursor: pointer; }
math[display="block"] { margin: 1rem 0; overflow: auto hidden; font-size: 1.1em; }
.content img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.cell_output img { padding: .6rem; border: 1px solid var(--color-background-border);
  box-sizing: border-box; }
.content pre { line-height: 1.5; }
.content .highlight .nn { text-decoration: none !important; }  /* the theme's, by night */
.cell { margin: 1.1rem 0; }
div.cell > div.cell_input { border: 0; background: none; }
.cell_input .highlight pre { border-left: 3px solid var(--color-link); border-radius: 0 4px 4px 0;
  background: var(--color-background-secondary); }
.cell_output .highlight, .cell_output .highlight pre { background: none; }
.cell_output .highlight pre { padding: .2rem 0 .2rem 1rem; white-space: pre-wrap;
  color: var(--color-foreground-secondary); border-radius: 0;
  border-left: 3px solid var(--color-background-border); }
.cell_output, .table-wrapper, .scroll { overflow-x: auto; }
.content .table-wrapper { margin-left: 0; }
.content table { margin-left: 0; border-collapse: collapse; font-size: .84em; line-height: 1.45;
  font-variant-numeric: tabular-nums; border: 0; box-shadow: none;
  border-bottom: 1.5px solid currentColor; }
.content th, .content td { padding: .34rem .8rem .34rem 0; border: 0; text-align: left;
  border-top: 1px solid var(--color-background-border); vertical-align: top; }
.content table.dataframe td, .content th.text-right, .content td.text-right {
  text-align: right; }
.content thead th { background: none; font-weight: 600; border-top: 1.5px solid currentColor;
  border-bottom: 1px solid currentColor; }
.content td p, .content th p { margin: 0; }
.ladder { list-style: none; padding: 0; margin: 1.5rem 0; }
.ladder li { display: grid; grid-template-columns: 2.4rem 1fr; padding: .8rem 0; margin: 0;
  border-top: 1px solid var(--color-background-border); }
.ladder li:last-child { border-bottom: 1px solid var(--color-background-border); }
.ladder .number { font-size: 1.5rem; line-height: 1.2; color: var(--color-foreground-secondary);
  font-variant-numeric: tabular-nums; }
.ladder a { font-weight: 600; font-size: 1.05rem; }
.ladder p { margin: .15rem 0 0; }
.ways { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr));
  margin: 1.5rem 0; }
.ways a { display: block; padding: .9rem 1.1rem; border-radius: 8px; text-decoration: none;
  border: 1px solid var(--color-background-border); color: var(--color-foreground-primary); }
.ways a:hover { border-color: var(--color-link); }
.ways b { display: block; color: var(--color-link); }
figure.lead { max-width: 38rem; margin: 1.75rem 0; }
figure.lead img { display: block; padding: .75rem; box-sizing: border-box;
  border: 1px solid var(--color-background-border); }
.gallery { display: grid; gap: 1.5rem; margin: 1rem 0 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.gallery figure { margin: 0; display: flex; flex-direction: column; }
.gallery .thumb { display: block; background: #fff; border-radius: 6px; padding: .5rem;
  border: 1px solid var(--color-background-border); }
.gallery img { display: block; width: 100%; height: 11.5rem; object-fit: contain; }
.gallery figcaption b { display: block; color: var(--color-foreground-primary);
  margin-top: .5rem; }
.gallery figcaption span { display: block; margin-top: .2rem; }
@media (max-width: 63em) {  /* the drawer's switch, for those who have no mouse */
  .sidebar-toggle { display: block; position: fixed; opacity: 0; pointer-events: none; }
  #__navigation:focus-visible ~ .page .nav-overlay-icon,
  #__navigation:focus-visible ~ .mobile-header .nav-overlay-icon {
    outline: 2px solid var(--color-link); }
}
"""


#: Four experts, one of them at work.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<path fill="#3D52B5" d="M2 2h12v12H2z"/>
<path fill="#A9B5E3" d="M18 2h12v12H18zM2 18h12v12H2zM18 18h12v12H18z"/></svg>
"""


def settings(static: Path, extra: Path) -> dict[str, Any]:
    """What a ``conf.py`` would hold.

    Args:
        static: Folder to write the style into.
        extra: Folder whose content goes to the top of the site as it is.
    """
    static.mkdir(parents=True)
    (static / "site.css").write_text(STYLE, "utf-8")
    (static / "icon.svg").write_text(ICON, "utf-8")
    return {
        "project": "MoEBERT workbook",
        "html_title": "MoEBERT workbook",
        "language": "en",
        "extensions": ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"],
        "nb_execution_mode": "off",
        "nb_ipywidgets_js": {},
        "myst_enable_extensions": ["colon_fence"],
        "myst_heading_anchors": 3,
        "myst_heading_slug_func": "github",
        "autodoc_member_order": "bysource",
        "autodoc_typehints_format": "short",
        "autodoc_preserve_defaults": True,
        "napoleon_numpy_docstring": False,
        "napoleon_use_ivar": True,
        "python_maximum_signature_line_length": 80,
        "toc_object_entries_show_parents": "hide",
        "html_theme": "furo",
        "html_show_copyright": False,
        "html_copy_source": False,
        "html_static_path": [str(static)],
        "html_css_files": ["site.css"],
        "html_extra_path": [str(extra)],
        "html_favicon": str(static / "icon.svg"),
        "html_theme_options": {
            "light_css_variables": _variables(report.LIGHT)
            | {"font-stack": SANS, "font-stack--monospace": MONO},
            "dark_css_variables": _variables(report.DARK),
            "top_of_page_buttons": [],
        },
    }


def _variables(colours: dict[str, str]) -> dict[str, str]:
    """The theme's names for the colours of ``pages``."""
    theirs = {
        "ink": ["foreground-primary", "content-foreground", "sidebar-link-text--top-level"],
        "soft": ["foreground-secondary", "api-pre-name"],
        "line": ["background-border", "sidebar-background-border"],
        "paper": ["background-primary"],
        "wash": [
            "background-secondary",
            "sidebar-background",
            "inline-code-background",
            "code-background",
        ],
        "link": [
            "brand-primary",
            "brand-content",
            "link",
            "link--visited",
            "link--hover",
            "brand-visited",
            "link--visited--hover",
            "api-name",
        ],
    }
    return {f"color-{name}": colours[ours] for ours, names in theirs.items() for name in names}
