"""What to run: notebooks found by name, checked values, and the experiments they ask for.

Everything that can be refused is refused here, before anything is computed or written. A notebook
has one cell tagged ``parameters`` with lines such as ``seed: int = 0``; its ``overrides``
dictionary takes every other setting by name. Its experiments are its calls of
``ablations.points``. Notebooks are only read, as syntax trees: none of their code, annotations
and defaults is evaluated. Nothing here imports torch, so a plan takes a second.
"""

import ast
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from moebert_lib.config.errors import UserError, home, nearest
from moebert_lib.config.presets import SCALES, TINY
from moebert_lib.config.provenance import (
    checksums,
    code_digests,
    digest,
    dotted,
    imported,
    input_digest,
    library_modules,
    local_names,
    parse,
    reached,
    versions,
)
from moebert_lib.config.settings import Settings
from moebert_lib.data import loading, pretrained_weights
from moebert_lib.experiments import ablations
from moebert_lib.experiments.stage_keys import without_later
from moebert_lib.method import encoder_layouts
from moebert_lib.method.encoder_layouts import shape
from moebert_lib.store.committed_results import AnyStore, committed_results, open_store
from moebert_lib.store.run_outputs import FORMATS
from moebert_lib.store.store import StageKey

EXERCISE = "exercise"  # tag of a notebook's cells that are left to the reader
MODEL = "model"  # tag of cells that need models or data, left out when drawing from results
POINTS = "moebert_lib.experiments.ablations.points"
#: What Python raises for text that it cannot read as code; the last two where it nests too deeply.
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Job:
    """One notebook with checked values, ready to run.

    Attributes:
        name: The file's name without ending, such as ``01_importance``.
        source: The file's text when it was planned.
        given: Values to inject.
        parameters: All parameters: the given values, and defaults for the others.
        settings: As the notebook makes them; None for a notebook that takes none.
        origin: Tells notebooks of one name in different folders apart; decides no result.
        place: A folder below ``figures/`` where it is not the usual one; decides no result.
        results: The folder of committed results that it is drawn from; "" where it makes its own.
        formats: Vector formats that its figures are written in too, such as "pdf".
    """

    name: str
    source: str
    given: dict[str, Any]
    parameters: dict[str, Any]
    settings: Settings | None
    origin: str = ""
    place: str = ""
    results: str = ""
    formats: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """The given values by name, those in ``overrides`` among them."""
        direct = {name: value for name, value in self.given.items() if name != "overrides"}
        return direct | self.given.get("overrides", {})

    @property
    def chosen(self) -> dict[str, Any]:
        """The given values but the scale, to name a folder; of a path the last part only."""
        return {
            name: Path(value).name if name in self.folders else value
            for name, value in self.values.items()
            if name != "scale"
        }

    @functools.cached_property
    def notebook(self) -> dict[str, Any]:
        """The notebook as JSON."""
        return json.loads(self.source)

    @property
    def timed(self) -> bool:
        """Whether it measures time, so that nothing may run beside it.

        A notebook says so in its metadata: ``"moebert": {"timed": true}``.
        """
        return bool(_metadata(self.notebook).get("timed"))

    @property
    def folders(self) -> set[str]:
        """Parameters that name a folder whose files decide the result.

        A notebook lists them in its metadata: ``"moebert": {"folders": ["importance_dir"]}``.
        """
        return {*_metadata(self.notebook).get("folders", [])}

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The code cells that decide the result: neither text nor exercises."""
        left_out = {EXERCISE, MODEL} if self.results else {EXERCISE}
        code = [cell for cell in self.notebook["cells"] if cell["cell_type"] == "code"]
        return [cell for cell in code if not left_out & {*_tags(cell)}]

    @functools.cached_property
    def trees(self) -> list[ast.Module | None]:
        """The syntax tree of each of :attr:`cells`; None for a cell that is not Python."""
        return [_parsed("".join(cell["source"])) for cell in self.cells]

    def runs(self) -> str:
        """The notebook's text as it is executed: without models where results are drawn from."""
        if not self.results:
            return self.source
        cells = self.notebook["cells"]
        kept = [cell for cell in cells if cell["cell_type"] != "code" or cell in self.cells]
        return json.dumps({**self.notebook, "cells": kept})

    def key(self) -> StageKey:
        """Everything that decides the result: code cells, values, the digest of the data (not its
        folder), the library's modules, versions."""
        settings = self.settings and without_later(self.settings.model_dump()) | {"data_dir": ""}
        parameters = {name: value for name, value in self.parameters.items() if name != "data_dir"}
        for name in self.folders & parameters.keys():
            parameters[name] = checksums(Path(folder)) if (folder := parameters[name]) else {}
        all_python = None not in self.trees
        modules = reached(*imported(_joined(self.trees))) if all_python else library_modules()
        choices = {
            "notebook": self.name,
            "cells": [digest("".join(cell["source"])) for cell in self.cells],
            "parameters": parameters,
            "settings": settings,
        }
        origin = {
            "inputs": _inputs(self.settings, self.results)
            | (_benchmarks(self.results) if self.timed else {}),
            "code": code_digests(*sorted(modules)),
            "versions": versions(),
        }
        if self.formats:
            origin["formats"] = self.formats
        return StageKey("notebook", choices, origin)


def _inputs(settings: Settings | None, results: str) -> dict[str, str]:
    """Digests of data and weights; of results where they are drawn from."""
    if results:
        return committed_results(results).inputs()
    if settings is None:
        return {}
    digests = {"data": loading.digest(settings)}
    if settings.model != TINY:
        weights = pretrained_weights.digest(settings.model, hub=not settings.offline)
        digests["model"] = weights
    return digests


def _benchmarks(results: str) -> dict[str, str]:
    """Digests of benchmark records, which figures of a notebook that measures time may show."""
    local = [] if results else (home() / "runs").glob("bench-*.json")
    paths = [*(home() / "figures" / "bench").glob("*.json"), *local]
    return {path.name: input_digest(path) for path in sorted(paths)}


def describe(job: Job) -> str:
    """The values a job was given, for a line of text; "" where there are none."""
    return text_of(job.values)


def text_of(values: Mapping[str, Any]) -> str:
    """Values by name as text, such as `` seed=1 n_experts=2``."""
    return "".join(f" {name}={value}" for name, value in values.items())


def plan(
    paths: Sequence[Path],
    *,
    scale: str = "quick",
    parameters: dict[str, Any] | None = None,
    data_dir: str = "",
    store: AnyStore | None = None,
) -> list[Job]:
    """Validated jobs for notebooks at a scale; computes nothing and writes nothing.

    Args:
        paths: Notebooks, as :func:`select` returns them.
        scale: smoke, quick, small, base or paper.
        parameters: Values by name: a notebook's own parameter, or any setting.
        data_dir: Folder with GLUE-format files.
        store: Where the experiments are; by default what :func:`open_store` returns.

    Raises:
        UserError: unknown or ill-typed value, settings that do not fit, data that is not there,
            or a notebook that asks for experiments that do not exist.
    """
    values = {"scale": scale, **({"data_dir": data_dir} if data_dir else {}), **(parameters or {})}
    overrides = values.pop("overrides", {})
    if not isinstance(overrides, dict):
        raise UserError(
            f"overrides={overrides!r}: expected names and values, such as {{epochs: 2}}"
        )
    values |= overrides
    Settings.at(values["scale"])  # refuses an unknown scale
    known = {path: parameters_of(path) for path in paths}
    _check_names(values, known)
    jobs = [_job(path, known[path], values) for path in paths]
    store = store or open_store()
    if store.makes:
        _check_inputs(jobs)
    results = "" if store.makes else str(store.source)
    formats = os.environ.get(FORMATS, "")
    return [replace(job, results=results, formats=formats) for job in jobs]


def _check_names(values: dict[str, Any], known: dict[Path, dict]) -> None:
    """Refuse a name that none of the notebooks takes."""
    usable = {"scale"}.union(*known.values())
    if "overrides" in usable:
        usable |= set(Settings.model_fields)
    choices = sorted(usable - {"overrides"})
    for name in values:
        if name not in choices:
            notebooks = "the notebooks" if len(known) > 1 else next(iter(known)).stem
            takes_any = any(known.values())
            hint = nearest(name, choices) if takes_any else "it takes none"
            raise UserError(f"unknown parameter '{name}' of {notebooks}; {hint}")


def _job(path: Path, known: "dict[str, Parameter]", values: dict[str, Any]) -> Job:
    """A notebook with those of the values that it takes."""
    source = path.read_text("utf-8")
    folders = {"data_dir", *_metadata(json.loads(source)).get("folders", [])}
    values = {
        name: str(Path(value).expanduser().resolve())
        if name in folders and isinstance(value, str) and value
        else value
        for name, value in values.items()
    }
    direct = {name: known[name].checked(name, values[name]) for name in values if name in known}
    if direct.get("task") == SCALES[values["scale"]]["task"]:
        del direct["task"]  # the scale's own, as when it is left empty
    defaults = {name: parameter.default for name, parameter in known.items()}
    settings, overrides = None, {}
    if "scale" in known:
        others = {name: value for name, value in values.items() if name not in known}
        others = others if "overrides" in known else {}  # they are for other notebooks
        settings, overrides = _settings(defaults, direct, others)
    given = {name: value for name, value in direct.items() if value != defaults[name]}
    given |= {"overrides": {**defaults["overrides"], **overrides}} if overrides else {}
    parameters = defaults | given
    _check_layer(parameters, settings)
    in_workbook = path.parent == home() / "notebooks"
    origin = "" if in_workbook else digest(str(path.parent))[:8]
    return Job(path.stem, source, given, parameters, settings, origin)


def _settings(defaults: dict, direct: dict, others: dict) -> tuple[Settings, dict[str, Any]]:
    """A notebook's settings, and those of ``others`` that change them."""
    basic = {
        name: (defaults | direct)[name] for name in ("scale", "task", "seed") if name in defaults
    }
    named = {name: direct[name] for name in direct if name in Settings.model_fields}
    settings, usual = Settings.at(**(basic | named | others)), Settings.at(**basic)
    values, before = (each.model_dump(mode="json") for each in (settings, usual))  # as cells write
    return settings, {name: values[name] for name in others if values[name] != before[name]}


def _check_inputs(jobs: Sequence[Job]) -> None:
    """Refuse experiments, models and data that cannot be had."""
    reading = [job for job in jobs if job.parameters.keys() & {"task", "data_dir"}]
    for settings in dict.fromkeys(job.settings for job in reading if job.settings):
        loading.check(settings)  # others read no data
    for settings in dict.fromkeys(job.settings for job in jobs if job.settings):
        encoder_layouts.check(settings)
    points = [point for job in jobs for _, point in asked(job)]
    data = {(p.task, p.data_dir, p.max_length, p.doc_stride): p for p in points}
    for point in data.values():
        loading.check(point)


# A notebook's parameters: names, types and ranges, read from its syntax tree.

#: Names that an annotation may be made of, beside ``list[...]``, ``dict[...]``, ``Literal[...]``
#: and ``... | None``. With any other annotation a parameter takes every value.
TYPES = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "list": list,
    "dict": dict,
    "None": None,
}
TOY_WIDTH = 6  # neurons of the layer in notebook 0


def _ascending(values: list[int]) -> list[int]:
    if not values or values != sorted({*values}):
        raise ValueError("expected ascending numbers, such as [16, 64]")
    return values


def _importance_files(folder: str) -> str:
    if folder and not any(Path(folder).glob("importance_*.pkl")):
        raise ValueError("expected a folder that holds importance_*.pkl")
    return folder


_COUNT = Annotated[int, Field(ge=1)]
_LENGTHS = list[Annotated[int, Field(ge=1, le=512)]]  # tokens: BERT has 512 positions
#: Ranges of the notebooks' own values; a name means the same in every notebook. What describes
#: experiments has its ranges in ``ablations``, and settings have theirs in ``Settings``.
RANGES = {
    "batch": _COUNT,
    "repeats": _COUNT,
    "removal_examples": _COUNT,
    "n_resamples": _COUNT,
    "layer": _COUNT,
    "n_experts": _COUNT,
    "expert_size": _COUNT,
    "n_shared": Annotated[int, Field(ge=0)],
    "lengths": Annotated[_LENGTHS, AfterValidator(_ascending)],
    "importance_dir": Annotated[str, AfterValidator(_importance_files)],
}


class Parameter(NamedTuple):
    """A notebook's parameter: its type as pydantic takes it, its default, the line's comment."""

    kind: Any
    default: Any
    help: str

    def checked(self, name: str, value: Any) -> Any:
        """A value for this parameter, as it is.

        Raises:
            UserError: it is of another type, or outside the range of this name.
        """
        kind = RANGES.get(name, self.kind)
        typed = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
        number_as_text = isinstance(value, str) and kind in (float, float | None)  # YAML's 1e-4
        try:
            value = typed.validate_python(value, strict=not number_as_text)
            json.dumps(value)
        except (ValidationError, TypeError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            reason = reason.removeprefix("Value error, ")
            example = "[rte, cola]" if self.default == [] else repr(self.default)
            hint = f"such as {example}" + (f" ({self.help})" if self.help else "")
            line = f"{name}={value!r}: {reason[0].lower()}{reason[1:]}, {hint}"
            raise UserError(line) from None
        return value


def parameters_of(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name: the lines of its one cell tagged ``parameters``.

    Raises:
        UserError: two such cells, or a line that gives no name a plain value.
    """
    cells = [cell for cell in read(path)["cells"] if "parameters" in _tags(cell)]
    if len(cells) > 1:
        raise UserError(f"{path.name} has {len(cells)} cells tagged 'parameters'; keep one")
    source = "".join(cells[0]["source"]) if cells else ""
    lines = source.splitlines()
    try:
        return dict(_parameter(statement, lines) for statement in parse(source).body)
    except (*UNREADABLE, TypeError, AttributeError) as error:
        raise UserError(
            f"{path.name}: its parameters cell may hold only lines such as "
            f"'seed: int = 0' ({error})"
        ) from None


def _parameter(statement: Any, lines: Sequence[str]) -> tuple[str, Parameter]:
    """The name and the parameter of ``name: type = value  # comment``; nothing is evaluated."""
    default = ast.literal_eval(statement.value)
    json.dumps(default)  # as runs are stored
    if isinstance(statement, ast.AnnAssign):
        target, kind = statement.target, _type(statement.annotation)
    else:
        (target,) = statement.targets
        kind = Any if default is None else type(default)
    last_line = lines[statement.end_lineno - 1].encode()
    comment = last_line[statement.end_col_offset :].decode().strip("# ")
    return target.id, Parameter(kind, default, comment)


def _type(annotation: ast.expr) -> Any:
    """The type that an annotation names; Any for all but the few kinds of :data:`TYPES`."""
    match annotation:
        case ast.Name(id=name):
            return TYPES.get(name, Any)
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_type(left), _type(right)]  # noqa: UP007  of values
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[_type(item)]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[name, value])):
            return dict[_type(name), _type(value)]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            values = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            if all(isinstance(value, ast.Constant) for value in values):
                return Literal[tuple(value.value for value in values)]
    return Any


def _check_layer(parameters: Mapping[str, Any], settings: Settings | None) -> None:
    """Refuse a layer that the model does not have, and experts that the toy cannot fill."""
    layer, n_layers = parameters.get("layer", 1), shape(settings.model).layers if settings else 1
    if layer > n_layers:
        raise UserError(f"layer={layer}: expected 1 to {n_layers}, counted from 1")
    n_experts, n_shared = parameters.get("n_experts", 0), parameters.get("n_shared", 1)
    if settings is None and n_shared == 0 and n_experts > TOY_WIDTH:
        raise UserError(f"n_experts={n_experts}: expected 1 to {TOY_WIDTH} if nothing is shared")


# The experiments of a notebook.


def asked(job: Job) -> list[tuple[str, Settings]]:
    """The experiments that a notebook asks for, each with the stage that it is taken to.

    Raises:
        UserError: a set that does not exist, or a call that a plan cannot read.
    """
    code = _joined(job.trees)
    names, experiments = local_names(code), []
    for node in ast.walk(code):
        if isinstance(node, ast.Call) and dotted(node.func, names) == POINTS:
            name, parameters = _arguments(node, job)
            try:
                grid = ablations.points(name, job.settings, **parameters)
            except (UserError, TypeError) as error:
                raise UserError(f"{job.name}: {error}") from None
            stage = ablations.SETS[name].stage
            experiments += [(stage, point) for points in grid.values() for point in points]
    return experiments


def _arguments(call: ast.Call, job: Job) -> tuple[str, dict[str, Any]]:
    """The name and the parameters in a call of ``ablations.points``, as they will be."""
    try:
        name, settings = call.args
        if job.settings is None or settings.id != "settings":
            raise ValueError("not the notebook's own settings")
        given = {word.arg: word.value for word in call.keywords}
        values = {
            name: job.parameters[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)
            for name, node in given.items()
        }
        return ast.literal_eval(name), values
    except (ValueError, AttributeError, KeyError):
        raise UserError(
            f"{job.name}: a plan cannot read '{ast.unparse(call)}'; expected a name as text, "
            "the notebook's settings, and its parameters by keyword, such as "
            "points('ablations', settings, numbers=numbers)"
        ) from None


def _joined(trees: Sequence[ast.Module | None]) -> ast.Module:
    """One syntax tree of many; None is left out."""
    return ast.Module([statement for tree in trees if tree for statement in tree.body], [])


def _parsed(source: str) -> ast.Module | None:
    """A cell's syntax tree, IPython's commands as calls; None where it is not Python."""
    try:
        return parse(source)
    except UNREADABLE:
        from IPython.core.inputtransformer2 import TransformerManager

    body = re.sub(r"\A\s*%%.*", "", source)  # as of %%time
    try:
        return parse(TransformerManager().transform_cell(body))
    except UNREADABLE:
        return None


# Notebooks as files.


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


def read(path: Path) -> dict[str, Any]:
    """A notebook as JSON.

    Raises:
        UserError: the file is no notebook.
    """
    try:
        notebook = json.loads(path.read_text("utf-8"))
        texts = [*_metadata(notebook).get("folders", [])]
        for cell in notebook["cells"]:
            texts += [cell["cell_type"], "".join(cell["source"]), *_tags(cell)]
        if all(isinstance(text, str) for text in texts):
            return notebook
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path} is not a notebook (nbformat 4 with a list of cells)")


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])


def _metadata(notebook: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook says to this library in its metadata."""
    return notebook.get("metadata", {}).get("moebert", {})
