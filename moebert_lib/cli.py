"""The command line: ``moebert run``, ``sweep``, ``status``, ``report`` and the rest.

Whatever a user can get wrong is one line on stderr that names the nearest valid choice, and
exit status 2, before any compute. A notebook that fails is one line and status 1.
Each command imports what it needs when it runs, so that ``--help`` is instant.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from moebert_lib.errors import UserError, home, nearest
from moebert_lib.execution import NotebookFailed
from moebert_lib.options import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _stop)
    except ValueError:  # not in the main thread: leave signals alone
        before = None
    try:
        return _dispatch(argv)
    except UserError as error:
        return _fail(error, 2)
    except NotebookFailed as failure:
        return _fail(f"{failure}; executed copy: {failure.copy}", 1)
    except BrokenPipeError:  # of a pager or head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(_of_the_disk(error), 2)
    except KeyboardInterrupt:
        return _fail("stopped; what was finished is kept and will be reused", 130)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _dispatch(argv: list[str]) -> int:
    top, choices = parser()
    if not argv:
        top.print_help()
        return 0
    if argv[0].startswith("-"):
        option = argv[0].partition("=")[0]
        if option not in ("-h", "--help"):
            raise UserError(
                f"unknown option '{option}' of moebert; give a command first: {', '.join(choices)}"
            )
        top.print_help()
        return 0
    if argv[0] not in choices:
        raise UserError(f"unknown command '{argv[0]}'; {nearest(argv[0], choices)}")
    try:
        args = choices[argv[0]].parse_all(argv[1:])
    except SystemExit as end:  # after --help
        return int(end.code or 0)
    return args.function(args) or 0


def _fail(error: object, status: int) -> int:
    sys.stdout.flush()
    print("moebert:", " ".join(str(error).split()), file=sys.stderr)
    return status


def _of_the_disk(error: OSError) -> Exception:
    """What a full or forbidden disk's error means here; another error as it is."""
    from moebert_lib import disk

    try:
        with disk.writing(home()):
            raise error
    except (OSError, UserError) as told:
        return told


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
