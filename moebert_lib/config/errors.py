"""The error that a user's mistake raises, and the folders that the library works in."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

LIBRARY = Path(__file__).parents[1]  # the folder of this package
CHECKOUT = LIBRARY.parent


class UserError(ValueError):
    """Something the user asked for cannot be had: one line, exit status 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the line alone, without the library's frames."""
        return [f"{type(self).__name__}: {self}"]


def nearest(name: str, choices: Iterable[str]) -> str:
    """End of an error message: the closest choice, or all of them.

    Example:
        >>> nearest("sst-2", ["sst2", "rte"])
        "did you mean 'sst2'?"
        >>> nearest("zebra", ["sst2", "rte"])
        'choose from sst2, rte'
    """
    choices = list(choices)
    lowered = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.6)
    return f"did you mean '{lowered[close[0]]}'?" if close else f"choose from {', '.join(choices)}"


def home() -> Path:
    """The folder that holds ``notebooks/``, ``figures/`` and ``runs/``.

    ``MOEBERT_HOME`` where it is set, else the checkout that this library lies in, else, where the
    library was installed from a wheel, the current folder.
    """
    checkout = CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()
    return Path(os.environ.get("MOEBERT_HOME") or checkout).resolve()
