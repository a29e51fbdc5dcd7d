"""The pages that the site adds to the notebooks: the front page, and figures and tables."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from moebert_lib import pages
from moebert_lib.errors import UserError
from moebert_lib.report import label
from moebert_lib.site_notebooks import finding, markdown, section, slug, summary

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
<a class="thumb" href="figures/{{ one.name }}.svg"><img src="figures/{{ one.name }}.png"
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
    shown = _figure(owner, lead) | {"title": pages.title(owner.node), "origin": owner.origin()}
    intro = readme.partition("\n")[2].strip().partition("\n\n")[0]
    start = "## Two commands\n\n" + part_of(readme, "Two commands")
    return _render(
        FRONT, intro=intro, start=start, lead=shown, ways=WAYS, ladder=[_rung(one) for one in ran]
    )


def gallery(ran: list[Ran]) -> str:
    """The page of all figures and tables, as MyST."""
    parts = [
        {
            "title": pages.title(one.node),
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
        **_entry(one, name, ("svg", "png", "csv")),
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
    html = markdown2html(pages.with_mathml(unlinked)).strip()
    return Markup(re.sub(r"^<p>|</p>$", "", html))


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    trusted = {
        name: Markup(value) if isinstance(value, str) else value for name, value in values.items()
    }
    return Environment(autoescape=True).from_string(template).render(**trusted)
