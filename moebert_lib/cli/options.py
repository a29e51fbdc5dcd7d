"""Parse command lines: error messages, the options that several commands share, output lines."""

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moebert_lib.config.errors import UserError, nearest

EXPERIMENT = ("scale", "values", "data_dir")  # what add_settings_options adds, but the task


class CommandParser(argparse.ArgumentParser):
    """A parser whose help ends with an example and whose errors are :class:`UserError`."""

    def __init__(self, *args: Any, example: str = "", description: str = "", **kwargs: Any):
        super().__init__(
            *args,
            description=textwrap.fill(description, 80),
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the message as an error that names the command's help."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse options and other words in any order.

        Raises:
            UserError: unknown option, with the nearest known one; a word too many; a wrong value.
        """
        known = [name for action in self._actions for name in action.option_strings]
        for word in words:  # before parsing: a misspelt option's value is not the mistake
            option = word.partition("=")[0]
            if option.startswith("--") and option not in (*known, "--"):
                long_names = [name for name in known if name.startswith("--")]
                suggestion = nearest(option, long_names)
                raise UserError(f"unknown option '{option}' of {self.prog}; {suggestion}")
        args, left_over = self.parse_known_intermixed_args(words)
        if left_over:
            raise UserError(f"{self.prog} does not take '{left_over[0]}' (see {self.prog} --help)")
        return args


def count(text: str) -> int:
    """Option type: a whole number from 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: '{text}'") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def choice(*names: str) -> Callable[[str], str]:
    """Option type: one of ``names``; the error suggests the nearest."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown value '{text}'; {nearest(text, names)}")
        return text

    return check


def add_settings_options(command: argparse.ArgumentParser, *, task: bool = False) -> None:
    """Add ``--scale``, ``-p`` and ``--data-dir``, and ``--task`` on request."""
    option = command.add_argument
    if task:
        option("--task", metavar="T", help="the task; the default depends on the scale")
    option("--scale", metavar="S", help="smoke, quick (default), small, base, paper")
    values = "set a setting or a notebook's parameter; repeatable"
    option("-p", dest="values", action="append", default=[], metavar="NAME=VALUE", help=values)
    data = "folder with GLUE data: DIR/TASK/train.jsonl and validation.jsonl, or .parquet"
    option("--data-dir", default="", metavar="DIR", help=data)


def given_values(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the scale and the values of ``-p`` by name.

    Raises:
        UserError: text without ``=``, a name given twice, two scales.
    """
    from moebert_lib.config import file_io

    values: dict[str, Any] = {}
    for text in args.values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"-p {text}: expected NAME=VALUE, such as -p seed=1")
        if name in values:
            raise UserError(f"-p {name} is given twice; keep one")
        values[name] = file_io.parse(value, f"-p {text}") if value else ""
    if "scale" in values and args.scale not in (None, values["scale"]):
        raise UserError(f"--scale {args.scale} and -p scale={values['scale']} differ; keep one")
    scale = "quick" if args.scale is None else args.scale
    return values.pop("scale", scale), values


def given_settings(args: argparse.Namespace, **options: Any) -> Any:
    """Return the :class:`Settings` that ``--scale``, ``--task``, ``--data-dir``, ``-p`` and the
    command's other ``options`` choose.

    Raises:
        UserError: a name given twice, or values that are not valid settings.
    """
    from moebert_lib.config.settings import Settings

    scale, values = given_values(args)
    if args.task:
        options["task"] = args.task
    if args.data_dir:
        options["data_dir"] = str(Path(args.data_dir).expanduser().resolve())
    for name in values.keys() & options.keys():
        raise UserError(f"{name} is given twice, once as -p {name}; keep one")
    return Settings.at(scale, **values, **options)


def refuse_useless(args: argparse.Namespace, why: str, *names: str) -> None:
    """Refuse the first of these options that was given and would have no effect."""
    for name in names:
        if getattr(args, name):
            option = "-p" if name == "values" else f"--{name.replace('_', '-')}"
            raise UserError(f"{why}; leave {option} out")


def near(path: Path) -> Path:
    """Return the path relative to the current folder where it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def say(line: str) -> None:
    """Print a line on standard output at once."""
    print(line, flush=True)


def fail(error: object, status: int) -> int:
    """Print an error as one line on standard error; return the exit status."""
    sys.stdout.flush()
    print("moebert:", " ".join(str(error).split()), file=sys.stderr)
    return status
