"""HTML pages that stand alone: one file, no request, light and dark.

``write_page`` turns an executed notebook into one. Formulas become MathML, which browsers
draw without a script. A widget needs a kernel, so the page shows a sentence and
the static figure that follows.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moebert_lib.store import write_bytes

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
