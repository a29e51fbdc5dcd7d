"""What the site shows of an executed notebook: the copy that Sphinx reads, and what it says.

The copy has its formulas as MathML, a sentence in place of each widget, which would need a
kernel, and under each picture the finding that ``plots.save`` wrote into it.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from moebert_lib import pages
from moebert_lib.errors import UserError

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
        cell.outputs = pages.without_widgets(cell.outputs)
        drawn = [one for one in cell.outputs if "image/png" in one.get("data", {})]
        shown = [name for name in dict.fromkeys(quoted(cell.source)) if name in findings]
        if len(shown) < len(drawn):
            title = pages.title(node)
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
    return pages.with_mathml(linked)


def slug(heading: str) -> str:
    """The anchor of a heading on the site, as on GitHub.

    Example:
        >>> slug("Which neurons matter?")
        'which-neurons-matter'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower().strip().replace(" ", "-"))


def summary(node: Any) -> Summary:
    """Number, question and box of a notebook's first cell."""
    number, _, question = pages.title(node).partition(" · ")
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
