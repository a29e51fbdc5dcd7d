"""What is stored, what failed, and why a planned run is not stored: lines of text."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from moebert_lib.config import file_io
from moebert_lib.config.errors import UserError, home
from moebert_lib.config.presets import FFN_WIDTHS, MINILM, SCALES, defaults
from moebert_lib.config.settings import Settings, proportions
from moebert_lib.runs import execution
from moebert_lib.runs.export import stage_choices
from moebert_lib.runs.plan import text_of
from moebert_lib.store.store import Entry, StageKey, Store

SWEEP, TABLE, MEANS = "sweep.json", "table.csv", "means.csv"  # of a folder in runs/sweeps/
STATES = ("done", "running", "failed", "died", "not run")
NEWEST = 10  # entries that a short listing shows


def lines(*, whole: bool = False) -> Iterator[str]:
    """The store as ``moebert status`` prints it; ``whole`` lists every run and point."""
    for record in recorded():
        points = states(record)
        counts = count_states(state for _, state, _ in points)
        yield f"sweep       {record['folder'].name}: {counts}"
        for point, state, error in points:
            if whole or state in ("running", "failed", "died"):
                ending = f": {error}" if error else ""
                yield f"  {state:9} {point['name']}{text_of(point['values'])}{ending}"
    entries, failures = Store().entries(), execution.failed_runs()
    minutes = Counter({"notebook": 0.0})
    for entry in entries:
        minutes[entry.kind] += entry.seconds / 60
    for kind, number in Counter(entry.kind for entry in entries).items():
        yield f"{kind:12}{number:5} stored  {minutes[kind]:8.1f} min"
    shown = entries if whole else entries[-NEWEST:]
    if len(shown) < len(entries):
        yield f"the newest {len(shown)} (all of them: moebert status --all)"
    for entry in shown:
        created = entry.record()["created"].replace("T", " ")[:16]
        took = f"{entry.seconds / 60:6.1f} min"
        yield f"{entry.kind:12}{created}  {took}  {entry.digest[:8]}  {summary(entry)}"
    for run in failures:
        about = f"{run['notebook']}{text_of(run['given'])}"
        about += f", cell {run['cell']}" if run["cell"] else ""
        yield f"failed      {about}: {run['error']}; copy: {run['folder']}"
    took = f"{minutes['notebook']:.1f} min"
    yield f"{len(entries)} stored, notebooks took {took}, {len(failures)} failed"


def count_states(names: Iterable[str]) -> str:
    """How many points are done, and how many are in each other state.

    Example:
        >>> count_states(["done", "failed", "done", "not run"])
        '2 of 4 done, 1 failed, 1 not run'
    """
    counts = Counter(names)
    others = [f", {counts[state]} {state}" for state in STATES[1:] if counts[state]]
    return f"{counts['done']} of {counts.total()} done{''.join(others)}"


def recorded() -> list[dict[str, Any]]:
    """What is known of every sweep of this home: ``name``, ``grid``, ``points``, ``folder``."""
    paths = sorted((home() / "runs" / "sweeps").glob(f"*/{SWEEP}"))
    types = {"points": list, "grid": dict, "name": str}
    records = [(path.parent, file_io.read_json(path, types)) for path in paths]
    return [record | {"folder": folder} for folder, record in records if record]


def states(record: Mapping[str, Any]) -> list[tuple[dict[str, Any], str, str]]:
    """Each point of a recorded sweep with its state now, and the error of a failed one."""
    store = Store()
    return [(point, *_state(store, point)) for point in record["points"]]


def _state(store: Store, point: Mapping[str, Any]) -> tuple[str, str]:
    if (store.root / point["entry"] / "entry.json").is_file():
        return "done", ""
    if file_io.is_locked(store.root, point["entry"]):
        return "running", ""
    folder = store.root / "failed" / point["failed"]
    failure = execution.read_failure(folder)
    if failure is None or failure["run"] != point["key"]:
        return "not run", ""
    cell = f"cell {failure['cell']}: " if failure["cell"] else ""
    return "died" if failure["died"] else "failed", f"{cell}{failure['error']}; copy: {folder}"


# A stored run in a line: what sets it apart from its scale's usual run.


def summary(entry: Entry) -> str:
    """An entry in a line: notebook, scale, task, and every choice that is not usual there.

    An experiment's key names no scale. It is described by the scale that leaves fewest choices
    to name, so that two different experiments never read alike.
    """
    settings = entry.key.choices.get("settings") or {}
    if entry.kind == "notebook":
        changed = entry.row.get("changed") or unusual(settings)
        words = [entry.key.choices["notebook"], settings.get("scale"), settings.get("task")]
    else:
        leaves = stage_choices(entry.key.values())
        choices = {name: value for name, value in leaves.items() if not isinstance(value, list)}
        by_scale = {scale: _unusual_at(scale, choices) for scale in SCALES}
        scale = min(by_scale, key=lambda scale: len(by_scale[scale]))
        changed, words = by_scale[scale], [scale, choices.get("task")]
    words += [f"{name}={value}" for name, value in changed.items() if name not in ("task", "scale")]
    return " ".join(word for word in words if word)


def unusual(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a notebook run's settings that differ from its scale's own for the task."""
    try:
        usual = Settings.at(settings["scale"], task=settings["task"]).model_dump()
    except (UserError, KeyError):  # none, or written by another version of the library
        return {}
    usual |= {name: [*value] for name, value in usual.items() if isinstance(value, tuple)}
    return {
        name: value
        for name, value in settings.items()
        if usual.get(name) != ([*value] if isinstance(value, tuple) else value)
    }


def _unusual_at(scale: str, choices: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of a stage that a scale would not have made for this task and model."""
    usual_model = SCALES[scale].get("model", MINILM)
    model = choices.get("model") or usual_model
    usual = {name: field.default for name, field in Settings.model_fields.items()}
    usual |= defaults(scale, choices.get("task"), model) | {"model": usual_model}
    usual["keep_model"] = False
    if usual["teacher_seed"] is None:
        usual["teacher_seed"] = choices.get("seed", usual["seed"])
    if model in FFN_WIDTHS:
        n_experts = choices.get("n_experts", usual["n_experts"])
        sizes = proportions(FFN_WIDTHS[model], n_experts, n_shared=usual["n_shared"])
        usual |= dict(zip(("expert_size", "n_shared"), sizes, strict=True))
    return {
        name: value
        for name, value in choices.items()
        if name != "task" and (name not in usual or usual[name] != value)
    }


# Why a planned run is not stored: its key beside the nearest stored key.

MOST, WIDTH = 5, 40  # items of a list and characters of a value in a short line
PLAIN = re.compile(r"(?!(nan|inf)$)[a-z][\w./+-]*", re.ASCII)  # text that needs no quotes


def why(
    key: StageKey, entries: Iterable[Entry], *, damaged: str = "", whole: bool = False
) -> list[str]:
    """Why a run is stored or must run: "stored", "never run", or what differs from the nearest.

    The nearest is the stored run of the same notebook with the fewest other values, then the
    fewest differences, then the newest.

    Args:
        key: Of a planned job.
        entries: Oldest first, as :meth:`store.Store.entries` returns them.
        damaged: What is wrong with the stored run of this key; "" where nothing is.
        whole: Shorten nothing.

    Example:
        >>> why(StageKey("notebook", {"notebook": "01_importance"}), [])
        ['never run']
    """
    if damaged:
        return [f"damaged: {damaged if damaged.isprintable() else repr(damaged)}"]
    name = key.choices.get("notebook")
    same = [entry.key for entry in entries if entry.key.choices.get("notebook") == name]
    if not same:
        return ["never run"]
    if any(other.digest == key.digest for other in same):
        return ["stored"]
    differences = [key.difference(other) for other in reversed(same)]
    nearest = min(differences, key=lambda pairs: (len(_values(pairs)), len(pairs)))
    return list(_reasons(nearest, whole)) or ["a value of another type"]


def _values(pairs: Mapping[str, tuple]) -> dict[str, tuple]:
    """Parameters and settings that differ, by name; a setting may be given as both."""
    parts = ("parameters.", "settings.")
    return {name.split(".")[-1]: pair for name, pair in pairs.items() if name.startswith(parts)}


def _reasons(pairs: Mapping[str, tuple], whole: bool) -> Iterator[str]:
    """The differences of two keys in words: values, code cells, the library, versions and data."""
    values, cells, modules, others = _values(pairs), [], [], []
    changed = [
        f"{name}={_shown(new, whole)} (nearest run: {_shown(old, whole)})"
        for name, (new, old) in values.items()
    ]
    for name, (new, old) in pairs.items():
        part, _, rest = name.partition(".")
        if name == "cells" and isinstance(new, list) and isinstance(old, list):
            cells = _changed_cells(new, old)
        elif part == "code":
            modules.append(rest)
        elif part == "versions":
            others.append(f"{rest} {old} -> {new}")
        elif part == "inputs" and not values:  # else the inputs follow from the values
            others.append(f"{'weights' if rest == 'model' else rest} changed")
        elif part not in ("parameters", "settings", "inputs"):
            others.append(f"{_shown(name, whole)} changed")
    starts = ("", "code cells changed: ", "library changed: ", "")
    for start, items in zip(starts, (changed, cells, modules, others), strict=True):
        if items:
            shown = items if whole else items[:MOST]
            more = f" and {len(items) - MOST} more" if len(shown) < len(items) else ""
            yield start + ", ".join(shown) + more


def _changed_cells(new: list, old: list) -> list[str]:
    """Numbers of the code cells that the stored notebook lacks; removed ones as "3 removed"."""
    numbers = []
    for tag, start, stop, first, last in SequenceMatcher(None, old, new, False).get_opcodes():
        if tag != "equal":
            numbers += [str(number + 1) for number in range(first, last)]
            numbers += [f"{number + 1} removed" for number in range(start + last - first, stop)]
    return numbers


def _shown(value: Any, whole: bool) -> str:
    """A value on one line; text in quotes where it could be taken for something else."""
    text = value if isinstance(value, str) and PLAIN.fullmatch(value) else repr(value)
    return text if whole or len(text) <= WIDTH else text[: WIDTH - 1] + "…"
