"""Exercises: a reader's function is tried on cases, and one line says what came of it.

Nothing here raises, so a notebook whose exercises are not done yet runs to its end. The cases
of each notebook's exercises are in ``exercises_*``: some worked by hand, some drawn at random
and held to the library.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

TOLERANCE = 1e-6  # a reader computes in float32 or in float64


class Case(NamedTuple):
    """Arguments of the reader's function, and the value it should return."""

    arguments: tuple
    expected: Any


class Attempt(NamedTuple):
    """What came of trying a function; prints as its one line."""

    right: bool
    said: str

    def __repr__(self) -> str:
        return self.said


def attempt(mine: Callable[..., Any], cases: Iterable[Case]) -> Attempt:
    """Try a reader's function on each case, until one goes wrong.

    Args:
        mine: The function. Returning nothing means that it is not written yet.
        cases: At least one; arguments are copied, so that a case cannot be spoilt.

    Example:
        >>> attempt(lambda x: 2 * x, [Case((1,), 2), Case((3,), 7)])
        not yet: your function(x=3) gave 6, expected 7
    """
    name = getattr(mine, "__name__", "<lambda>").replace("<lambda>", "your function")
    n_cases = 0
    for n_cases, case in enumerate(cases, start=1):  # noqa: B007  counted for the last line
        asked = f"{name}({', '.join(_named(mine, case.arguments))})"
        try:
            found = mine(*copy.deepcopy(case.arguments))
        except Exception as error:  # noqa: BLE001  whatever a reader's code may raise
            return Attempt(False, f"not yet: {asked} raised {type(error).__name__}: {error}")
        if found is None:
            return Attempt(False, f"to do: {name} returns nothing yet")
        if difference := _difference(found, case.expected):
            return Attempt(False, f"not yet: {asked} {difference}")
    return Attempt(True, f"right: {name}, {n_cases} cases")


def _named(mine: Callable[..., Any], arguments: tuple) -> list[str]:
    """The arguments as a call has them, by the names that the reader gave."""
    try:
        names = list(inspect.signature(mine).bind(*arguments).arguments)
    except (TypeError, ValueError):  # too few or too many
        names = []
    said = map(_short, arguments)
    if len(names) != len(arguments):
        return list(said)
    return [f"{name}={value}" for name, value in zip(names, said, strict=True)]


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers of a generator of their own, for cases drawn at random."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _difference(found: Any, expected: Any) -> str:
    """How a value differs from the expected one; "" where they agree."""
    if isinstance(expected, str | bool | set | dict):
        return "" if found == expected else f"gave {_short(found)}, expected {_short(expected)}"
    try:
        left, right = (torch.as_tensor(value).double() for value in (found, expected))
    except (TypeError, ValueError, RuntimeError):
        return f"gave {_short(found)}, expected {_short(expected)}"
    if left.shape != right.shape:
        return f"gave shape {tuple(left.shape)}, expected {tuple(right.shape)}"
    if torch.allclose(left, right, rtol=TOLERANCE, atol=TOLERANCE):
        return ""
    return f"gave {_short(found)}, expected {_short(expected)}"


def _short(value: Any) -> str:
    """A value in a few words: small tensors as lists, large ones by their shape."""
    if isinstance(value, torch.Tensor):
        if value.numel() > 12:
            return f"tensor of shape {tuple(value.shape)}"
        return _short(value.tolist())
    if isinstance(value, list) and value:
        return f"[{', '.join(map(_short, value))}]" if len(value) <= 12 else f"{len(value)} values"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
