"""The site: executed notebooks, guides, all figures and tables, and the reference.

Sphinx builds it from this home's runs, the guides beside the notebooks, and ``templates/site``. No
page asks another host for anything. If a run is missing, a picture has no title, or Sphinx warns
of anything, such as a broken link, no site is written.
"""

import importlib.util
import io
import os
import re
import shutil
import tempfile
import warnings
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from moebert_lib.config.errors import CHECKOUT, UserError, home
from moebert_lib.config.file_io import replacing
from moebert_lib.config.provenance import library_modules
from moebert_lib.publish import report
from moebert_lib.runs.plan import notebooks
from moebert_lib.store.run_outputs import read_provenance, run_of
from moebert_lib.store.store import Store

TEMPLATES = report.TEMPLATES / "site"
LEAD = "02_after_conversion"  # the figure on the front page
NEEDED = {"sphinx": "sphinx", "myst_nb": "myst-nb", "furo": "furo"}
MARK = "objects.inv"  # every site has this file, and little else does
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of Sphinx's messages
NOTEBOOK_LINK = re.compile(r"(\]\([\w./]+\.ipynb#)([^)\s]+)\)")
BOX = re.compile(r"\*\*([\w ]+)\*\*\s*(.*?)\s*(?:<br>|$)", re.MULTILINE)
ZOOM = 0.55  # width of a picture on a notebook's page, of its 200 dots an inch


class Run(NamedTuple):
    """An executed notebook with its figures and tables, as the templates ask for them.

    ``files`` are those in ``folder``, each with its record in ``provenance.json``.
    """

    name: str
    node: Any
    folder: Path
    files: dict[str, dict[str, Any]]

    @property
    def title(self) -> str:
        """The notebook's title, such as "1 · Which neurons matter?"."""
        return report.title(self.node)

    @property
    def origin(self) -> str:
        """Run, scale, task, seed and commit of the files, in one line."""
        record = next(iter(self.files.values()))
        settings = record["settings"]
        parts = [f"{name} {settings[name]}" for name in ("scale", "task", "seed") if settings]
        parts += [f"commit {record['commit'][:8]}"] if record.get("commit") else []
        return ", ".join([f"run {record['run'][:12]}", *parts])

    def box(self, label: str) -> Any:
        """What the box in the first cell says under a label, such as "Time", as HTML."""
        lines = [line.lstrip("> ") for line in self.node["cells"][0]["source"].splitlines()]
        return report.trusted(
            report.inline_html(dict(BOX.findall("\n".join(lines))).get(label, ""))
        )

    def names(self, ending: str) -> list[str]:
        """Names of the files with an ending, such as ``.png``, without the ending."""
        return sorted(Path(name).stem for name in self.files if name.endswith(ending))

    def figure(self, name: str) -> dict[str, Any]:
        """A figure's title and size in pixels, its files, and its place in the notebook."""
        from PIL import Image

        path = self.folder / f"{name}.png"
        with Image.open(path) as image:
            width, height = image.size
        title = report.figure_title(path)
        return {"title": title, "width": width, "height": height, **self._about(name)}

    def table(self, name: str) -> dict[str, Any]:
        """A table as Markdown, its files, and its place in the notebook."""
        text = (self.folder / f"{name}.md").read_text("utf-8")
        return {"text": report.trusted(markdown(text)), **self._about(name)}

    def _about(self, name: str) -> dict[str, Any]:
        kinds = ("png", "csv", "tex", "md")
        endings = [ending for ending in kinds if f"{name}.{ending}" in self.files]
        heading = ""
        for cell in self.node["cells"]:
            if cell["cell_type"] == "markdown":
                heading = (re.findall(r"^#{2,3} (.+)$", cell["source"], re.M) or [heading])[-1]
            elif name in report.quoted(cell["source"]):
                break
        link = f"notebooks/{self.name}.html" + (f"#{slug(heading)}" if heading else "")
        return {"name": name, "label": report.label(name), "link": link, "endings": endings}


def build(target: Path | None = None, *, figures: Path | None = None) -> Path:
    """Make the site and return its first page.

    Args:
        target: Folder to write; default ``runs/site`` of this home. A site that is there
            already is replaced when the new one is complete.
        figures: Folder whose figures are shown, with the runs that made them; default
            ``runs/figures`` of this home.

    Raises:
        UserError: a notebook has not been run, a package is missing, ``target`` holds
            something else, or Sphinx warns of something.
    """
    target = Path(target or home() / "runs" / "site").absolute()
    missing = [NEEDED[name] for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the site needs {', '.join(missing)}; pip install 'moebert[site]'")
    if target.exists() and any(target.iterdir()) and not (target / MARK).is_file():
        raise UserError(f"{target} holds something that is no site; name another folder")
    runs = executed(figures or report.figures_folder())
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, replacing(target) as pages:
        source = Path(scratch, "source")
        write_source(source, Path(scratch, "files"), runs)
        _run_sphinx(source, Path(scratch, "pages"))  # myst-nb writes beside the pages too
        shutil.move(Path(scratch, "pages"), pages)
    return target / "index.html"


def executed(figures: Path) -> list[Run]:
    """Every notebook of this home, with the run that made its files in ``figures``.

    A notebook without settings is the same at every scale, so its files may also be in the
    usual folder of figures.

    Raises:
        UserError: some have not been run, or their files are gone.
    """
    entries = {run_of(entry): entry.folder for entry in Store().entries("notebook")}
    usual, runs, missing = report.figures_folder(), [], []
    for path in notebooks():
        folder, files = figures, _files_of(path.stem, figures)
        if not files:
            folder, files = usual, _files_of(path.stem, usual, same_everywhere=True)
        entry = entries.get(next(iter(files.values()))["run"]) if files else None
        if entry is None or not all((folder / name).is_file() for name in files):
            missing.append(path.stem)
        else:
            runs.append(Run(path.stem, report.read(entry / "notebook.ipynb"), folder, files))
    if missing:
        settings = [about["settings"] for about in read_provenance(figures).values()]
        scales = {each["scale"] for each in settings if each} - {"quick"}
        option = "".join(f" --scale {scale}" for scale in sorted(scales)[:1])
        raise UserError(
            f"the site shows runs, and {figures} has none of {', '.join(missing)}; "
            f"run: moebert run {' '.join(name[:2] for name in missing)}{option}"
        )
    return runs


def _files_of(
    notebook: str, folder: Path, *, same_everywhere: bool = False
) -> dict[str, dict[str, Any]]:
    files = read_provenance(folder).items()
    own = {name: about for name, about in files if about["notebook"] == notebook}
    return {} if same_everywhere and any(about["settings"] for about in own.values()) else own


def write_source(source: Path, files: Path, runs: list[Run]) -> None:
    """Write what Sphinx reads into ``source``, and what it copies unchanged into ``files``."""
    import nbformat

    guides, rooms = sorted((home() / "notebooks").glob("*.md")), {}
    for module in sorted(library_modules().keys() - {"__main__"}):
        rooms.setdefault(module.partition(".")[0], []).append(module)
    found, contributing = CHECKOUT / "figures" / report.FOUND, CHECKOUT / "CONTRIBUTING.md"
    values = {
        "runs": runs,
        "lead": next(run for run in runs if LEAD in run.names(".png")),
        "lead_name": LEAD,
        "guides": [_guide(path) for path in guides],
        "has_found": found.is_file(),
        "rooms": rooms,
        "templates": str(TEMPLATES),
        "files": str(files),
    }
    pages = {
        "conf.py": _render("conf.py", autoescape=False, **values),
        "index.md": _render("index.md", **values),
        "figures.md": _render("figures.md", **values),
        "reference/index.rst": _render("reference.rst", autoescape=False, **values),
        "CONTRIBUTING.md": contributing.read_text("utf-8") if contributing.is_file() else "",
    }
    pages |= {f"notebooks/{path.name}": markdown(path.read_text("utf-8")) for path in guides}
    for folder in (source / "notebooks", source / "reference", source / "found", files / "figures"):
        folder.mkdir(parents=True)
    if found.is_file():
        text = re.sub(r"\[(\w+)\]\(runs/[^)]*\)", r"\1", found.read_text("utf-8"))
        pages["found/index.md"] = text
        for name in re.findall(r"!\[[^]]*\]\(([\w.-]+\.png)\)", text):
            shutil.copyfile(found.with_name(name), source / "found" / name)
    for name, text in pages.items():
        (source / name).write_text(text + "\n", "utf-8")
    for run in runs:
        nbformat.write(shown(run), source / "notebooks" / f"{run.name}.ipynb")
        for name in run.files:
            shutil.copyfile(run.folder / name, files / "figures" / name)


def _run_sphinx(source: Path, pages: Path) -> None:
    """Build ``source`` into ``pages``; a warning of Sphinx is an error."""
    from sphinx.application import Sphinx

    messages, work = io.StringIO(), source.with_name("doctrees")
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, PendingDeprecationWarning):  # Sphinx to its extensions
            warnings.simplefilter("ignore", kind)
        Sphinx(source, source, pages, work, "html", status=None, warning=messages).build()
    lines = [line for line in COLOUR.sub("", messages.getvalue()).splitlines() if line.strip()]
    if lines:
        first = lines[0].replace(f"{source}{os.sep}", "")
        more = f" (and {len(lines) - 1} more lines)" if len(lines) > 1 else ""
        raise UserError(f"the site is not written: {first}{more}")


def shown(run: Run) -> Any:
    """A run's notebook as the site shows it: saved pictures with their titles, no widgets.

    Raises:
        UserError: a cell shows a picture that it does not save, or a picture has no title.
    """
    node = report.with_saved_pictures(run.node, run.names(".png"), partial(_picture, run))
    for cell in node.cells:
        cell.metadata = type(cell.metadata)(tags=cell.metadata.get("tags", []))
    node.metadata.pop("papermill", None)
    return report.for_reading(node, markdown)


def _picture(run: Run, name: str) -> dict[str, str]:
    figure = run.figure(name)
    words, width = escape(figure["title"]), ZOOM * figure["width"]
    return {"text/html": f'<img src="../figures/{name}.png" alt="{words}" width="{width:.0f}">'}


def markdown(source: str) -> str:
    """Markdown for Sphinx: formulas as MathML, links to a notebook's heading by its slug."""
    slugs = NOTEBOOK_LINK.sub(lambda match: f"{match[1]}{slug(unquote(match[2]))})", source)
    return report.with_mathml(slugs)


def slug(heading: str) -> str:
    """The anchor of a heading on the site, as on GitHub.

    Example:
        >>> slug("Which neurons matter?")
        'which-neurons-matter'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower().strip().replace(" ", "-"))


def _guide(path: Path) -> dict[str, Any]:
    """A guide's name, title and first sentence."""
    title, _, text = path.read_text("utf-8").lstrip("# ").partition("\n")
    sentence = re.split(r"(?<=[.:])\s", text.strip(), maxsplit=1)[0]
    return {
        "name": path.stem,
        "title": title,
        "about": report.trusted(report.inline_html(sentence)),
    }


def _render(name: str, *, autoescape: bool = True, **values: Any) -> str:
    return report.template(f"site/{name}.jinja", autoescape=autoescape).render(**values)
