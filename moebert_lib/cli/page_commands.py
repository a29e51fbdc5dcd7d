"""Commands about pages: report, explore and site."""

import argparse
from pathlib import Path
from typing import Any

from moebert_lib.cli.options import add_settings_options, given_settings, near, say
from moebert_lib.config.errors import UserError

# The notebook cell that shows the explorer; messages about reused stages went to the terminal.
EXPLORER_CELL = """\
import contextlib, io
from moebert_lib.config.settings import Settings
from moebert_lib.explore import explorer, score_sources
from moebert_lib.store.committed_results import open_store

store = open_store()
with contextlib.redirect_stdout(io.StringIO()):
    sources = {sources}
explorer.explore(sources)
"""


def add_commands(commands: Any) -> None:
    """Add the commands and their options to the parser of ``moebert``."""
    for add in (_add_report, _add_explore, _add_site):
        add(commands)


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="gather figures, tables and runs in one HTML page",
        description="Write runs/report.html, one file that needs no network. With --from, first "
        "draw all figures and tables from committed results, and fill the marked tables of the "
        "README and the guides; no model is needed or trained.",
        example="moebert report\n  moebert report --from figures/runs\n"
        "  moebert report --from figures/runs --format pdf",
    )
    option = command.add_argument
    results = "results of moebert export --results, with a workbook.yaml"
    option("--from", dest="results", type=Path, metavar="DIR", help=results)
    check = "with --from: compare with figures/, README and guides; write nothing"
    option("--check", action="store_true", help=check)
    vectors = "with --from: draw the figures as vectors too, into runs/figures-pdf or -svg"
    option("--format", choices=("pdf", "svg"), help=vectors)
    command.set_defaults(run=report)


def report(args: argparse.Namespace) -> int:
    """Write the report page; with ``--from``, first draw or compare the committed figures."""
    from moebert_lib.publish import report as reports

    if args.check and not args.results:
        raise UserError("--check compares what --from draws; give both")
    if args.format and (args.check or not args.results):
        raise UserError("--format draws figures from --from; give both, and no --check")
    if args.check:
        differences = reports.check(args.results, echo=say)
        for line in differences:
            say(line)
        n = len(differences)
        say(f"{n} files differ" if n else "figures/ matches what the results draw")
        return 1 if n else 0
    figures = None
    if args.results:
        figures = reports.draw(args.results, vectors=args.format or "", echo=say)
        say(f"figures   {near(figures)}")
    say(f"page      {near(reports.write_report(figures))}")
    return 0


def _add_explore(commands: Any) -> None:
    command = commands.add_parser(
        "explore",
        help="open the explorer of importance as a page, for a classroom",
        description="Serve the explorer of notebook 01 as a page without code, until Ctrl-C. It "
        "shows the files and the experiment that are named, otherwise all stored scores. Where "
        "nothing is stored, the scale's model is trained and scored first.",
        example="moebert explore\n  moebert explore importance_rte.pkl importance_cola.pkl\n"
        "  moebert explore --task acceptability --ip 0.0.0.0 --no-browser",
    )
    option = command.add_argument
    files = "scores from moebert importance, or a .pkl file of the paper's release"
    option("files", nargs="*", type=Path, metavar="FILE", help=files)
    add_settings_options(command, task=True)
    option("--port", type=int, default=8866, metavar="N", help="first port to try; default: 8866")
    address = "localhost (default, this machine only), or 0.0.0.0 (all who can reach this machine)"
    option("--ip", default="localhost", metavar="A", help=address)
    option("--no-browser", action="store_true", help="only print the address")
    command.set_defaults(run=explore)


def explore(args: argparse.Namespace) -> int:
    """Check and compute what the page shows, then serve it until Ctrl-C."""
    from moebert_lib.explore import explorer_page

    if not 1 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: expected 1 to 65535")
    files = [_readable(path) for path in args.files]
    settings = None
    if args.scale or args.task or args.values or args.data_dir:
        from moebert_lib.data import loading

        settings = given_settings(args)
        loading.check(settings)
    explorer_page.check_voila()
    port = explorer_page.free_port(args.ip, args.port)
    code = EXPLORER_CELL.format(sources=_sources(files, settings))
    if port != args.port:
        say(f"port {args.port} is taken; using {port}")
    explorer_page.serve(
        code,
        ip=args.ip,
        port=port,
        browser=not args.no_browser,
        opened=lambda address: say(f"page      {address}  (Ctrl-C ends it)"),
    )
    say("page closed")
    return 0


def _readable(path: Path) -> Path:
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        expected = "a file from moebert importance, or a .pkl of the release"
        raise UserError(f"{path} {problem}; expected {expected}")
    return path.resolve()


def _sources(files: list[Path], settings: Any) -> str:
    """Read or compute everything that the page shows; return the code that loads it again."""
    from moebert_lib.config.settings import Settings
    from moebert_lib.explore import score_sources
    from moebert_lib.store.committed_results import open_store

    store = open_store()
    for path in files:
        score_sources.from_file(path)
    if settings is None and not files:
        if score_sources.from_store(store):
            return "score_sources.from_store(store)"
        settings = Settings.at()
        say(
            f"no stored scores: training and scoring {settings.model} on {settings.task}, "
            "about two minutes on two cores"
        )
    sources = [f"score_sources.from_file({str(path)!r})" for path in files]
    if settings is not None:
        score_sources.from_settings(store, settings)
        sources.append(f"score_sources.from_settings(store, Settings(**{settings.model_dump()!r}))")
    return f"[{', '.join(sources)}]"


def _add_site(commands: Any) -> None:
    command = commands.add_parser(
        "site",
        help="build the site: notebooks, figures, guide and reference",
        description="Build a site that needs no network from the executed notebooks; run the "
        "workbook first.",
        example="moebert site --out public",
    )
    out = "default: runs/site; an earlier site there is replaced"
    command.add_argument("--out", type=Path, metavar="DIR", help=out)
    figures = "folder of the figures and executed notebooks; default: runs/figures/"
    command.add_argument("--figures", type=Path, metavar="DIR", help=figures)
    command.set_defaults(run=site)


def site(args: argparse.Namespace) -> int:
    """Build the site and print where it is."""
    from moebert_lib.publish import site as sites

    say(f"site      {near(sites.build(args.out, figures=args.figures))}")
    return 0
