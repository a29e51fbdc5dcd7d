"""Run the ``moebert`` command: choose the subcommand, report errors in one line.

A user's mistake ends with exit status 2, a notebook that fails with 1, Ctrl-C with 130.
Commands import what they need when they run, so that ``--help`` answers at once.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from moebert_lib.cli import model_commands, page_commands, run_commands
from moebert_lib.cli.options import CommandParser, fail
from moebert_lib.config.errors import UserError, home, nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _stop_on_sigterm():
            return _run_command(words)
    except UserError as error:
        return fail(error, 2)
    except BrokenPipeError:  # the reader, such as head, has closed its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return fail(_disk_error(error), 2)
    except KeyboardInterrupt:
        return fail("stopped; finished results are kept and will be reused", 130)


def command_parsers() -> tuple[CommandParser, dict[str, CommandParser]]:
    """Return the parser of ``moebert`` and those of its commands by name."""
    top = CommandParser(
        prog="moebert",
        description="MoEBERT (NAACL 2022): run the notebooks, explore importance, convert a BERT.",
        example="moebert run --scale quick",
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND")
    for module in (run_commands, page_commands, model_commands):
        module.add_commands(commands)
    return top, commands.choices


def _run_command(words: list[str]) -> int:
    top, commands = command_parsers()
    first = words[0].partition("=")[0] if words else "--help"
    if first in ("-h", "--help"):
        top.print_help()
        return 0
    if first.startswith("-"):
        names = ", ".join(commands)
        raise UserError(f"unknown option '{first}' of moebert; give a command first: {names}")
    if first not in commands:
        raise UserError(f"unknown command '{first}'; {nearest(first, commands)}")
    try:
        args = commands[first].parse_words(words[1:])
    except SystemExit as end:  # argparse has printed the help
        return int(end.code or 0)
    return args.run(args) or 0


def _disk_error(error: OSError) -> Exception:
    """Return a readable error for a full or forbidden disk, otherwise the error itself."""
    from moebert_lib.config import file_io

    try:
        with file_io.writing(home()):
            raise error
    except (OSError, UserError) as readable:
        return readable


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that kernels are stopped and locks released."""
    try:
        before = signal.signal(signal.SIGTERM, _interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
