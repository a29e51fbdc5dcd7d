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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebert_lib import archive, estimate, grids, knobs
from moebert_lib.adapters import family
from moebert_lib.errors import UserError, home, nearest
from moebert_lib.notebook_files import parameters_of
from moebert_lib.provenance import (
    checksums,
    code_digests,
    digest,
    imported,
    input_digest,
    library_modules,
    reached,
    versions,
)
from moebert_lib.scales import FFN_WIDTHS, MINILM, SCALES, TINY
from moebert_lib.settings import Settings

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
        if not archive.named():
            return self.source
        notebook = json.loads(self.source)
        notebook["cells"] = [
            cell for cell in notebook["cells"] if cell["cell_type"] != "code" or _decides(cell)
        ]
        return json.dumps(notebook)

    def key(self) -> dict[str, Any]:
        """Everything that decides the result: code cells and no prose, values, data by its digest
        and not by where it lies, each module of the library, versions."""
        settings = self.settings and self.settings.model_dump() | {"data_dir": ""}
        parameters = {name: value for name, value in self.parameters.items() if name != "data_dir"}
        for name in FOLDERS & parameters.keys():
            parameters[name] = checksums(Path(folder)) if (folder := parameters[name]) else {}
        return {
            "notebook": self.name,
            "cells": [
                digest("".join(cell["source"]))
                for cell in json.loads(self.source)["cells"]
                if _decides(cell)
            ],
            "parameters": parameters,
            "settings": settings,
            "inputs": _inputs(self.settings) | _records(self.name),
            "code": code_digests(*_code_of(self.source)),
            "versions": versions(),
        }


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
    return {EXERCISE, MODEL} if archive.named() else {EXERCISE}


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
    knobs.check(parameters, settings)
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
    if archive.named():
        return
    from moebert_lib import data

    settings = dict.fromkeys(job.settings for job in jobs if job.settings)
    for one in settings:
        data.check(one)
        _check_model(one)
    runs = itertools.chain.from_iterable(points for job in jobs for points in asked(job))
    for one in {_what_is_read(run): run for run in runs}.values():
        data.check(one)


def describe(job: Job) -> str:
    """The values a job was given, for a line of text; "" where there are none."""
    return "".join(f" {name}={value}" for name, value in job.values.items())


def asked(job: Job) -> tuple[list[Settings], list[Settings]]:
    """Experiments of a job: those whose neurons are scored, and those of its students."""
    if job.settings is None:
        return [], []
    width = estimate.shape(job.settings.model).neurons
    return grids.asked(job.name, job.settings, job.parameters, width)


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
    own = [] if archive.named() else (home() / "runs").glob("bench-*.json")
    paths = [*(home() / "figures" / "bench").glob("*.json"), *own]
    return {path.name: input_digest(path) for path in sorted(paths)}


def _inputs(settings: Settings | None) -> dict[str, str]:
    """Digests of data and weights; of results where they are drawn from."""
    if archive.named():
        return archive.inputs()
    if settings is None:
        return {}
    from moebert_lib import data, weights

    model = settings.model
    found = {"data": data.digest(settings)}
    if model == TINY:
        return found
    return {**found, "model": weights.digest(model, hub=not settings.offline)}
