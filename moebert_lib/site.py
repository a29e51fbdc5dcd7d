"""The site: the executed notebooks, a guide, a glossary, all figures, and the reference.

Sphinx builds it from what lies in this home and in the checkout, without a network, and no
page asks another host for anything. A site with a missing run, a picture that says nothing or
a link that leads nowhere is not written at all.
"""

import importlib.util
import io
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from moebert_lib import findings, publish, site_notebooks, site_pages, site_reference, site_theme
from moebert_lib.errors import CHECKOUT, UserError, home
from moebert_lib.notebook_files import notebooks
from moebert_lib.site_pages import Ran
from moebert_lib.store import Store

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
    ran = executed(figures or home() / "figures")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        source, made = Path(scratch, "source"), Path(scratch, "html")
        _prepare(source, Path(scratch, "extra"), ran)
        _sphinx(source, made, site_theme.settings(Path(scratch, "static"), Path(scratch, "extra")))
        _swap(made, target, Path(scratch, "old"))
    return target / "index.html"


def executed(figures: Path) -> list[Ran]:
    """Every notebook of this home, with the run that made its files in ``figures``.

    A notebook without settings is the same at every scale: its files lie in the home's own
    folder of figures.

    Raises:
        UserError: some have not been run, or what they made is no longer there.
    """
    own = publish.read_provenance(home() / "figures")
    same = {name: about for name, about in own.items() if not about["settings"]}
    here = publish.read_provenance(figures)
    runs = {publish.run_of(entry): entry.folder for entry in Store().entries("notebook")}
    ran, missing = [], []
    for path in notebooks():
        folder, known = figures, _of(here, path.stem)
        if not known:
            folder, known = home() / "figures", _of(same, path.stem)
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
    site_reference.write(source / "reference", readme)
    pages = {"index": site_pages.front(ran, readme, LEAD), "figures": site_pages.gallery(ran)}
    names = [*(one.name for one in ran), *GUIDES]
    notebooks, guides = names[: len(ran)], names[len(ran) :]
    listed = ("\n".join(f"notebooks/{name}" for name in part) for part in (notebooks, guides))
    found = checkout / "figures" / findings.PAGE
    pages["index"] += "\n" + ORDER % (*listed, "found" * found.is_file())
    for name, heading in FROM_README.items():
        pages[name] = f"# {heading}\n\n{site_pages.part_of(readme, heading)}"
    if found.is_file():
        pages["found"] = site_pages.found(found.read_text("utf-8"))
    pages["CONTRIBUTING"] = (checkout / "CONTRIBUTING.md").read_text("utf-8")
    for name in GUIDES:
        guide = (home() / "notebooks" / f"{name}.md").read_text("utf-8")
        pages[f"notebooks/{name}"] = site_notebooks.markdown(guide)
    (source / "notebooks").mkdir(parents=True)
    for name, text in pages.items():
        (source / f"{name}.md").write_text(text + "\n", "utf-8")
    (extra / "figures").mkdir(parents=True)
    for one in ran:
        shown = site_notebooks.prepare(one.node, one.findings())
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
