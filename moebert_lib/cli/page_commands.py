"""What the commands about pages do: explore and site."""

import argparse
from pathlib import Path

from moebert_lib.cli.run_commands import given, near, say
from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings

PAGE = """\
import contextlib, io
from moebert_lib import explorer, sources
from moebert_lib.settings import Settings

with contextlib.redirect_stdout(io.StringIO()):  # what is reused was said in the terminal
    shown = {shown}
explorer.explore(shown)
"""


def explore(args: argparse.Namespace) -> int:
    """``moebert explore``: everything is checked and made first, then the page is served."""
    from moebert_lib.explore import explorer_page

    if not 1 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: expected 1 to 65535")
    files = [_readable(path) for path in args.files]
    settings = _settings(args)
    explorer_page.check_voila()
    port = explorer_page.free_port(args.ip, args.port)
    code = PAGE.format(shown=_made(files, settings))
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


def site(args: argparse.Namespace) -> int:
    """``moebert site``: build it and say where it is."""
    from moebert_lib.publish import site as module

    say(f"site      {near(module.build(args.out, figures=args.figures))}")
    return 0


def _readable(path: Path) -> Path:
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"{path} {why}; expected a file from moebert importance, or a .pkl of the release"
        )
    return path.resolve()


def _settings(args: argparse.Namespace) -> Settings | None:
    """The experiment that was asked for; ``None`` where no option names one."""
    if not (args.scale or args.task or args.values or args.data_dir):
        return None
    scale, values = given(args)
    values |= {"task": args.task} if args.task else {}
    values |= {"data_dir": str(Path(args.data_dir).expanduser().resolve())} if args.data_dir else {}
    settings = Settings.at(scale, **values)
    from moebert_lib.data import loading

    loading.check(settings)
    return settings


def _made(files: list[Path], settings: Settings | None) -> str:
    """Read or make everything that the page shows; returns the code that finds it again."""
    from moebert_lib.explore import score_sources

    for path in files:
        score_sources.from_file(path)
    if settings is None and not files and not score_sources.from_store():
        settings = Settings.at()
        say(
            f"nothing is scored here yet: training and scoring {settings.model} on "
            f"{settings.task}, about two minutes on two cores"
        )
    if settings is None and not files:
        return "sources.from_store()"
    shown = [f"sources.from_file({str(path)!r})" for path in files]
    if settings is not None:
        score_sources.from_settings(settings)
        shown.append(f"sources.from_settings(Settings(**{settings.model_dump()!r}))")
    return f"[{', '.join(shown)}]"
