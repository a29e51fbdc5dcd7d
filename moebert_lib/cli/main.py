"""Run the ``moebert`` command: choose the subcommand, report every error in one line.

Exit status 2: bad input, or a disk that cannot be used. 1: a notebook or a check failed, or a fault
of this library, whose traceback is saved. 130: Ctrl-C.
Commands import what they need when they run, so that ``--help`` answers at once.
"""

import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import NoReturn

from moebert_lib import __version__
from moebert_lib.cli import model_commands, page_commands, run_commands
from moebert_lib.cli.options import CommandParser, fail
from moebert_lib.config.errors import LIBRARY, UserError, home, nearest

STOPPED = "stopped; finished results are kept and will be reused"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status. No exception but SystemExit leaves it."""
    words = list(sys.argv[1:] if argv is None else argv)
    with _stop_signals() as stopped:
        try:
            return _run_command(words)
        except BrokenPipeError:  # the reader, such as head, has closed its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt:
            return fail(STOPPED, 130)
        except Exception as error:
            if stopped.is_set():  # an import that is interrupted may raise anything
                return fail(STOPPED, 130)
            return _report(error, words)


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


def _report(error: Exception, words: list[str]) -> int:
    """Print an error as one line; return the exit status."""
    from moebert_lib.config import file_io

    try:
        with file_io.writing(home()):  # a full or forbidden disk has a clearer message
            raise error
    except (OSError, UserError) as refused:
        return fail(refused, 2)
    except Exception:
        pass
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, ValueError) and Path(innermost).is_relative_to(LIBRARY):
        return fail(error, 2)  # raised on purpose: this library refuses bad values with it

    from moebert_lib.runs.execution import NotebookFailed

    if isinstance(error, NotebookFailed):
        return fail(f"{error}; executed copy: {error.copy}", 1)
    line = f"{words[0]}: {type(error).__name__}: {error}"
    place = _save_traceback(error, words)
    return fail(f"{line}; this is a fault of moebert, please report it with {place}", 1)


def _save_traceback(error: Exception, words: list[str]) -> Path:
    """Write the traceback and the command to a file in ``runs/errors``, else a temporary folder."""
    lines = traceback.format_exception(error)
    text = f"moebert {__version__}: moebert {shlex.join(words)}\n\n{''.join(lines)}"
    name = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.txt"
    for folder in (home() / "runs" / "errors", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8", errors="replace")
            break
        except OSError:
            continue
    return folder / name


@contextmanager
def _stop_signals() -> Iterator[Event]:
    """Treat SIGTERM like Ctrl-C, so that kernels are stopped and locks released; remember both."""
    stopped = Event()

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        stopped.set()
        raise KeyboardInterrupt

    before = {}
    usual = (signal.SIG_DFL, signal.default_int_handler)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in usual:  # not where nohup ignores it
                before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread
        pass
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
