"""What to run: notebooks by name, values fitted to their parameters, settings, data.

Everything that can be refused is refused here, before anything is computed or written.
A notebook has one cell tagged ``parameters`` with lines such as ``seed: int = 0``; its
``overrides`` dictionary takes every other setting by name.
"""

import ast
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moebert_lib.config.errors import UserError, home, nearest
from moebert_lib.config.presets import FFN_WIDTHS, MINILM, SCALES, TINY
from moebert_lib.config.provenance import (
    checksums,
    code_digests,
    digest,
    imported,
    input_digest,
    library_modules,
    reached,
    versions,
)
from moebert_lib.config.settings import Settings
from moebert_lib.data.tasks import TASKS
from moebert_lib.experiments import ablations
from moebert_lib.method.encoder_layouts import family, shape
from moebert_lib.store import committed_results
from moebert_lib.store.store import StageKey

EXERCISE = "exercise"  # tag of a notebook's cells that are left to the reader
MODEL = "model"  # and of those that need models or data, where results are drawn from
#: Notebooks' parameters that name a folder: a key holds the digests of its files.
FOLDERS = {"importance_dir"}
TIMED = {"07_speed"}  # measures time, and draws what benchmarks kept: nothing runs beside it


@dataclass(frozen=True)
class Job:
    """One notebook with validated values, ready to run.

    ``name`` is such as ``01_importance`` and ``source`` the file's text when it was planned.
    ``given`` is injected; ``parameters`` holds the notebook's defaults too. ``settings`` is
    None for a notebook that takes none. ``origin`` tells notebooks of one name in different
    folders apart, and ``place`` names a folder below ``figures/`` where it has to be another than
    the usual one; neither decides a result.
    """

    name: str
    source: str
    given: dict[str, Any]
    parameters: dict[str, Any]
    settings: Settings | None
    origin: str = ""
    place: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """The values that were given, overrides among them, by name."""
        own = {name: value for name, value in self.given.items() if name != "overrides"}
        return own | self.given.get("overrides", {})

    @property
    def chosen(self) -> dict[str, Any]:
        """The values that make it more than its scale; also what a folder's name holds.

        Of folders the last part of the name only: where they lie is one machine's affair.
        """
        given = {name: value for name, value in self.values.items() if name != "scale"}
        return {
            name: Path(value).name if name in FOLDERS else value for name, value in given.items()
        }

    def runs(self) -> str:
        """The notebook's text as it is executed: all of it, or what results are enough for."""
        if not committed_results.named():
            return self.source
        notebook = json.loads(self.source)
        notebook["cells"] = [
            cell for cell in notebook["cells"] if cell["cell_type"] != "code" or _decides(cell)
        ]
        return json.dumps(notebook)

    def key(self) -> StageKey:
        """Everything that decides the result: code cells and no prose, values, data by its digest
        and not by where it lies, each module of the library, versions."""
        settings = self.settings and self.settings.model_dump() | {"data_dir": ""}
        parameters = {name: value for name, value in self.parameters.items() if name != "data_dir"}
        for name in FOLDERS & parameters.keys():
            parameters[name] = checksums(Path(folder)) if (folder := parameters[name]) else {}
        cells = [
            digest("".join(cell["source"]))
            for cell in json.loads(self.source)["cells"]
            if _decides(cell)
        ]
        choices = {
            "notebook": self.name,
            "cells": cells,
            "parameters": parameters,
            "settings": settings,
        }
        origin = {
            "inputs": _inputs(self.settings) | _records(self.name),
            "code": code_digests(*_code_of(self.source)),
            "versions": versions(),
        }
        return StageKey("notebook", choices, origin)


def _code_of(source: str) -> list[str]:
    """The library's modules that a notebook's result can depend on: those its code cells reach.

    All of them where a cell is not plain Python.
    """
    sources = ["".join(cell["source"]) for cell in json.loads(source)["cells"] if _decides(cell)]
    try:
        trees = [ast.parse(text) for text in sources]
    except SyntaxError:  # IPython's magics
        return sorted(library_modules())
    return reached(*set().union(*(imported(tree) for tree in trees)))


def _decides(cell: dict[str, Any]) -> bool:
    """Whether a notebook's result depends on a cell: not on prose, nor on a reader's exercise."""
    return cell["cell_type"] == "code" and not set(cell["metadata"].get("tags", [])) & _left_out()


def _left_out() -> set[str]:
    return {EXERCISE, MODEL} if committed_results.named() else {EXERCISE}


def plan(
    paths: Sequence[Path],
    *,
    scale: str = "quick",
    parameters: dict[str, Any] | None = None,
    data_dir: str = "",
) -> list[Job]:
    """Validated jobs for notebooks at a scale; computes nothing and writes nothing.

    Args:
        paths: Notebooks, as :func:`select` returns them.
        scale: smoke, quick, small or paper.
        parameters: Values by name: a notebook's own parameter, or any setting.
        data_dir: Folder with GLUE-format files.

    Raises:
        UserError: unknown or ill-typed value, settings that do not fit, data not there.
    """
    values = {"scale": scale, **({"data_dir": data_dir} if data_dir else {}), **(parameters or {})}
    overrides = values.pop("overrides", {})
    if not isinstance(overrides, dict):
        raise UserError(
            f"overrides={overrides!r}: expected names and values, such as {{epochs: 2}}"
        )
    values |= overrides
    Settings.at(values["scale"])  # refuses an unknown scale
    for name in ("data_dir", *FOLDERS):
        if isinstance(values.get(name), str) and values[name]:
            values[name] = str(Path(values[name]).expanduser().resolve())
    own = {path: parameters_of(path) for path in paths}
    _check_names(values, own)
    jobs = [_job(path, own[path], values) for path in paths]
    _check_data(jobs)
    return jobs


def _check_names(values: dict[str, Any], own: dict[Path, dict]) -> None:
    usable = {name for names in own.values() for name in names} - {"overrides"}
    if any("overrides" in names for names in own.values()):
        usable |= set(Settings.model_fields)
    for name in values:
        if name not in usable and name != "scale":
            whose = "the notebooks" if len(own) > 1 else next(iter(own)).stem
            choices = sorted(usable)
            hint = nearest(name, choices) if choices else "it takes none"
            raise UserError(f"unknown parameter '{name}' of {whose}; {hint}")


def _job(path: Path, own: dict[str, tuple[Any, Any]], values: dict[str, Any]) -> Job:
    mine = {name: _typed(name, *own[name], values[name]) for name in values if name in own}
    if mine.get("task") == SCALES[values["scale"]]["task"]:
        del mine["task"]  # the scale's own, as when it is left empty
    rest = {name: value for name, value in values.items() if name not in own}
    if "overrides" not in own:  # takes no settings: what is left is for other notebooks
        rest = {}
    settings = None
    if "scale" in own:
        chosen = {name: default for name, (_, default) in own.items()} | mine
        chosen = {name: chosen[name] for name in chosen if name in ("scale", "task", "seed")}
        named = {name: mine[name] for name in mine if name in Settings.model_fields}
        settings, base = Settings.at(**(chosen | named | rest)), Settings.at(**chosen)
        rest = {name: _finite(name, getattr(settings, name)) for name in rest}
        rest = {name: value for name, value in rest.items() if value != getattr(base, name)}
    defaults = {name: default for name, (_, default) in own.items()}
    given = {name: value for name, value in mine.items() if value != defaults[name]}
    given |= {"overrides": {**defaults["overrides"], **rest}} if rest else {}
    parameters = defaults | given
    check(parameters, settings)
    own_folder = path.parent == home() / "notebooks"
    origin = "" if own_folder else digest(str(path.parent))[:8]
    return Job(path.stem, path.read_text("utf-8"), given, parameters, settings, origin)


def _typed(name: str, kind: Any, default: Any, value: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    if isinstance(value, str) and kind in (float, float | None):
        value = _number(value)  # YAML 1.1 reads 1e-4 as text
    try:
        value = TypeAdapter(kind).validate_python(value, strict=True)
        json.dumps(value)
    except (ValidationError, TypeError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        example = "[rte, cola]" if default == [] else repr(default)
        raise UserError(
            f"{name}={value!r}: {said[0].lower()}{said[1:]}, such as {example}"
        ) from None
    return _finite(name, value)


def _number(text: str) -> float | str:
    return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else text


def _finite(name: str, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value}: expected a finite number")
    return value


def _check_data(jobs: Sequence[Job]) -> None:
    """Refuse models, data and points of a grid that cannot be had; results need none."""
    if committed_results.named():
        return
    from moebert_lib.data import loading

    settings = dict.fromkeys(job.settings for job in jobs if job.settings)
    for one in settings:
        loading.check(one)
        _check_model(one)
    runs = itertools.chain.from_iterable(points for job in jobs for points in asked(job))
    for one in {_what_is_read(run): run for run in runs}.values():
        loading.check(one)


def describe(job: Job) -> str:
    """The values a job was given, for a line of text; "" where there are none."""
    return "".join(f" {name}={value}" for name, value in job.values.items())


def asked(job: Job) -> tuple[list[Settings], list[Settings]]:
    """Experiments of a job: those whose neurons are scored, and those of its students."""
    if job.settings is None:
        return [], []
    width = shape(job.settings.model).neurons
    return ablations.asked(job.name, job.settings, job.parameters, width)


def _what_is_read(settings: Settings) -> tuple:
    return settings.task, settings.data_dir, settings.max_length, settings.doc_stride


def _check_model(settings: Settings) -> None:
    """Refuse a model that cannot be had, is of no known family, or too narrow for experts."""
    folder = Path(settings.model).expanduser()
    if not folder.is_dir():
        if not settings.offline or settings.model in (MINILM, TINY):
            return
        if settings.model in FFN_WIDTHS:
            raise UserError(
                f"model '{settings.model}' comes from the hub, scale {settings.scale} "
                "is offline; take --scale small, or name a folder"
            )
        raise UserError(
            f"no folder '{settings.model}', and scale {settings.scale} is offline; "
            "name a folder that holds a saved BERT"
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no readable config.json; expected a saved BERT") from None
    try:
        settings.fit(config[family(config.get("model_type")).key("intermediate_size")])
    except ValueError as error:
        raise UserError(str(error)) from None
    if settings.cache_teacher and config["model_type"] != "bert":
        raise UserError(
            f"cache_teacher=True is for BERTs, and {folder} is a model of type "
            f"'{config['model_type']}'; expected cache_teacher=False"
        )


def _records(name: str) -> dict[str, str]:
    """Digests of the benchmarks' records that a notebook may draw."""
    if name not in TIMED:
        return {}
    own = [] if committed_results.named() else (home() / "runs").glob("bench-*.json")
    paths = [*(home() / "figures" / "bench").glob("*.json"), *own]
    return {path.name: input_digest(path) for path in sorted(paths)}


def _inputs(settings: Settings | None) -> dict[str, str]:
    """Digests of data and weights; of results where they are drawn from."""
    if committed_results.named():
        return committed_results.inputs()
    if settings is None:
        return {}
    from moebert_lib.data import loading, pretrained_weights

    model = settings.model
    found = {"data": loading.digest(settings)}
    if model == TINY:
        return found
    return {**found, "model": pretrained_weights.digest(model, hub=not settings.offline)}


# What the notebooks' own parameters may hold; settings have their limits in ``settings``.
# Each name means the same in every notebook that has it.

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
    n_layers = shape(settings.model).layers if settings else value
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
    width = shape(settings.model).neurons if settings else LONGEST
    return _points(value, 2, width, "whole numbers")


def _numbers(value: list[int], _: Mapping, settings: Settings | None) -> str:
    if not settings or not value:
        return _points(value, 1, LONGEST, "numbers of experts")
    width = shape(settings.model).neurons
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


# Notebooks as files: found by name, and their one cell of parameters read.


def notebooks() -> list[Path]:
    """The workbook's notebooks, in order."""
    return sorted((home() / "notebooks").glob("[0-9]*.ipynb"))


def select(names: Sequence[str] = ()) -> list[Path]:
    """Notebooks by number ("01"), name ("01_importance", "importance") or path; all by default.

    Raises:
        UserError: no such notebook; names the nearest one.
    """
    known = {path.stem: path for path in notebooks()}
    if not names and not known:
        raise UserError(
            f"no notebooks in {home() / 'notebooks'}; run from a checkout, or set "
            "MOEBERT_HOME to one"
        )
    return list(dict.fromkeys(_find(name, known) for name in names or known))


def parameters_of(path: Path) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of the one cell tagged ``parameters``."""
    tagged = [cell for cell in _cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) > 1:
        raise UserError(f"{path.name} has {len(tagged)} cells tagged 'parameters'; keep one")
    found = {}
    try:
        for node in ast.parse("".join(tagged[0]["source"])).body if tagged else []:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            default = ast.literal_eval(node.value)
            annotation = getattr(node, "annotation", None)
            found[target.id] = (_type(annotation, default), default)
    except (SyntaxError, ValueError, AttributeError, NameError, TypeError) as error:
        raise UserError(
            f"{path.name}: its parameters cell may hold only lines such as "
            f"'seed: int = 0' ({error})"
        ) from None
    return found


def takes_settings(path: Path) -> bool:
    """Whether a notebook takes every setting by name."""
    return "overrides" in parameters_of(path)


def _find(name: str, known: dict[str, Path]) -> Path:
    if name.endswith(".ipynb"):
        path = Path(name).expanduser().resolve()
        if path.is_file():
            return path
        raise UserError(f"no notebook '{name}'; {nearest(path.stem, known)}")
    for stem, path in known.items():
        number, _, words = stem.partition("_")
        if name in (stem, number, words) or (name.isdecimal() and name.zfill(2) == number):
            return path
    hint = nearest(name, known) if known else f"{home() / 'notebooks'} has none"
    raise UserError(f"no notebook '{name}'; {hint}")


def _cells(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text("utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a notebook (nbformat 4 with a list of cells)") from None


def _type(annotation: ast.expr | None, default: Any) -> Any:
    if annotation is None:
        return Any if default is None else type(default)
    plain = {kind.__name__: kind for kind in (str, int, float, bool, list, dict)}
    names = {"__builtins__": {}, "Literal": Literal, **plain}
    return eval(ast.unparse(annotation), names)  # of the notebook, which is about to be run
