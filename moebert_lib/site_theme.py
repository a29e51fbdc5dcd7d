"""How the site looks, and what Sphinx is told.

Everything a page needs lies beside it: the fonts are the reader's own, and formulas need no
script. The colours are those of ``pages``.
"""

from pathlib import Path
from typing import Any

from moebert_lib import pages

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
            "light_css_variables": _variables(pages.LIGHT)
            | {"font-stack": SANS, "font-stack--monospace": MONO},
            "dark_css_variables": _variables(pages.DARK),
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
