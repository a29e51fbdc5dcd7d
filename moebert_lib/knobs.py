"""What the notebooks' own parameters may hold; settings have their limits in ``settings``.

Each name means the same in every notebook that has it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moebert_lib import estimate
from moebert_lib.errors import UserError, nearest
from moebert_lib.settings import Settings
from moebert_lib.tasks import TASKS

TOY_WIDTH = 6  # neurons of the layer in notebook 0
LONGEST = 512  # tokens BERT has positions for

Check = Callable[[Any, Mapping[str, Any], Settings | None], str]


def check(parameters: Mapping[str, Any], settings: Settings | None) -> None:
    """Refuse a value outside its range, before anything is run.

    Args:
        parameters: A notebook's parameters by name, of the right types.
        settings: As the notebook makes them; None where it takes none.

    Raises:
        UserError: naming the value and what was expected.
    """
    for name, value in parameters.items():
        if name in CHECKS and (expected := CHECKS[name](value, parameters, settings)):
            raise UserError(f"{name}={value!r}: expected {expected}")


def _at_least_one(value: Any, *_: Any) -> str:
    return "" if value >= 1 else "at least 1"


def _layer(value: int, _: Mapping, settings: Settings | None) -> str:
    n_layers = estimate.shape(settings.model).layers if settings else value
    return "" if 1 <= value <= n_layers else f"1 to {n_layers}, counted from 1"


def _lengths(value: list[int], *_: Any) -> str:
    fine = bool(value) and value == sorted(set(value)) and 1 <= value[0] and value[-1] <= LONGEST
    return "" if fine else f"tokens from 1 to {LONGEST}, ascending, such as [16, 64]"


def _points(value: list[int], low: int, high: int, what: str) -> str:
    if not value:  # the scale's own
        return ""
    fine = len(set(value)) == len(value) >= 2 and all(low <= one <= high for one in value)
    return "" if fine else f"two or more different {what} from {low} to {high:,}"


def _fractions(value: list[int], _: Mapping, settings: Settings | None) -> str:
    width = estimate.shape(settings.model).neurons if settings else LONGEST
    return _points(value, 2, width, "whole numbers")


def _numbers(value: list[int], _: Mapping, settings: Settings | None) -> str:
    if not settings or not value:
        return _points(value, 1, LONGEST, "numbers of experts")
    width = estimate.shape(settings.model).neurons
    size, shared = settings.sizes(width)
    most = (width - shared) // (size - shared) if size > shared else width
    fitting = [n for n in value if n <= most]
    if len(fitting) >= 2:  # larger ones are left out
        return _points(fitting, 1, most, "numbers of experts")
    return f"two or more different numbers of experts from 1 to {most:,}, which is what fits"


def _thirds(value: list[int], *_: Any) -> str:
    return _points(value, 0, 3, "thirds")


def _tasks(value: list[str], *_: Any) -> str:
    unknown = [name for name in value if name not in TASKS]
    if not unknown:
        return ""
    return f"names of tasks; '{unknown[0]}' is none, {nearest(unknown[0], TASKS)}"


def _toy_experts(value: int, parameters: Mapping, settings: Settings | None) -> str:
    if value < 1:
        return "at least 1"
    alone = settings is None and parameters.get("n_shared") == 0
    return f"1 to {TOY_WIDTH} if nothing is shared" if alone and value > TOY_WIDTH else ""


def _not_negative(value: int, *_: Any) -> str:
    return "" if value >= 0 else "at least 0"


def _importance_folder(value: str, *_: Any) -> str:
    there = not value or any(Path(value).glob("importance_*.pkl"))
    return "" if there else "a folder that holds importance_*.pkl"


CHECKS: dict[str, Check] = {
    "importance_dir": _importance_folder,
    "layer": _layer,
    "fractions": _fractions,
    "numbers": _numbers,
    "thirds": _thirds,
    "lengths": _lengths,
    "batch": _at_least_one,
    "repeats": _at_least_one,
    "removal_examples": _at_least_one,
    "n_resamples": _at_least_one,
    "tasks": _tasks,
    "other_tasks": _tasks,
    "n_experts": _toy_experts,
    "expert_size": _at_least_one,
    "n_shared": _not_negative,
}
