"""What is stored and what failed, in words: every run by what sets it apart."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from moebert_lib import batch, disk
from moebert_lib.errors import UserError, home
from moebert_lib.scales import FFN_WIDTHS, MINILM, SCALES, defaults
from moebert_lib.settings import Settings
from moebert_lib.store import Entry, Store
from moebert_lib.worker import failed_in

SWEEP, TABLE, MEANS = "sweep.json", "table.csv", "means.csv"  # of a folder in runs/sweeps/
STATES = ("done", "running", "failed", "waiting")
NEWEST = 10  # entries that a short listing shows

#: Parts of a key that are digests or machinery, and no choice of a user.
UNSEEN = ("code", "versions", "weights", "data", "device", "cells", "inputs")


def lines(*, whole: bool = False) -> Iterator[str]:
    """The store as ``moebert status`` shows it; ``whole`` lists every run and point."""
    for record in recorded():
        yield from _sweep(record, whole=whole)
    entries, failed = Store().entries(), batch.failed_runs()
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        kinds[entry.kind].append(entry)
    for kind, group in kinds.items():
        yield f"{kind:12}{len(group):5} stored  {_minutes(group):8.1f} min"
    shown = entries if whole else entries[-NEWEST:]
    if len(shown) < len(entries):
        yield f"the newest {len(shown)} (all of them: moebert status --all)"
    for entry in shown:
        created = entry.record()["created"].replace("T", " ")[:16]
        minutes = f"{entry.seconds / 60:6.1f} min"
        yield f"{entry.kind:12}{created}  {minutes}  {entry.digest[:8]}  {summary(entry)}"
    for run in failed:
        given = "".join(f" {name}={value}" for name, value in run.get("given", {}).items())
        cell = f", cell {run['cell']}" if run["cell"] else ""
        yield f"failed      {run['notebook']}{given}{cell}: {run['error']}; copy: {run['folder']}"
    yield (
        f"{len(entries)} stored, notebooks took {_minutes(kinds['notebook']):.1f} min, "
        f"{len(failed)} failed"
    )


def _sweep(record: dict[str, Any], *, whole: bool) -> Iterator[str]:
    """A sweep's counts, then its points: those that are not simply done or waiting, or all."""
    points = states(record)
    counts = Counter(state for _, state, _ in points)
    told = ", ".join(f"{counts[state]} {state}" for state in STATES)
    yield f"sweep       {record['folder'].name}: {len(points)} runs: {told}"
    for point, state, error in points:
        if whole or state in ("running", "failed"):
            values = "".join(f" {name}={value}" for name, value in point["values"].items())
            yield f"  {state:9} {point['name']}{values}{': ' * bool(error)}{error}"


def summary(entry: Entry) -> str:
    """An entry in a line: notebook, scale, task, and every choice that is not usual there.

    An experiment's key names no scale. It is described by the scale that leaves fewest choices
    to name, so that two different experiments never read alike.
    """
    settings = entry.key.get("settings")
    if entry.kind == "notebook":
        words = [entry.key["notebook"]]
        if settings:
            words += [settings["scale"], settings["task"]]
        changed = entry.row.get("changed") or unusual(settings or {})
    else:
        chosen = _choices(entry.key)
        told = {scale: _unlike(chosen, scale) for scale in SCALES}
        scale = min(told, key=lambda scale: len(told[scale]))
        words, changed = [scale, chosen.get("task", "")], told[scale]
    words += [f"{name}={value}" for name, value in changed.items() if name not in ("task", "scale")]
    return " ".join(word for word in words if word)


def unusual(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a notebook run's settings that differ from its scale's own for the task."""
    try:
        usual = Settings.at(settings["scale"], task=settings["task"]).model_dump()
    except (UserError, KeyError):  # none, or written by another version of the library
        return {}
    return {name: value for name, value in settings.items() if usual.get(name) != value}


def _choices(key: dict[str, Any]) -> dict[str, Any]:
    """Names and plain values of a key at any depth; the outer one where a name comes twice."""
    own: dict[str, Any] = {}
    for name, value in key.items():
        if isinstance(value, dict) and name not in UNSEEN:
            own |= _choices(value)
    plain = {name: value for name, value in key.items() if not isinstance(value, dict | list)}
    return own | {name: value for name, value in plain.items() if name not in UNSEEN}


def _unlike(chosen: dict[str, Any], scale: str) -> dict[str, Any]:
    """The choices that a scale would not have made for this task and model."""
    model = chosen.get("model") or SCALES[scale].get("model", MINILM)
    own = {name: field.default for name, field in Settings.model_fields.items()}
    own |= defaults(scale, chosen.get("task"), model)
    own |= {"model": SCALES[scale].get("model", MINILM), "keep_model": False}
    if own["teacher_seed"] is None:
        own["teacher_seed"] = chosen.get("seed", own["seed"])
    width = FFN_WIDTHS.get(model)
    if width:
        usual = Settings(model=model, n_shared=own["n_shared"])
        experts = chosen.get("n_experts", own["n_experts"])
        sizes = usual.model_copy(update={"n_experts": experts}).sizes(width)
        own |= dict(zip(("expert_size", "n_shared"), sizes, strict=True))
    return {
        name: value
        for name, value in chosen.items()
        if name != "task" and (name not in own or own[name] != value)
    }


def _minutes(entries: list[Entry]) -> float:
    return sum(entry.seconds for entry in entries) / 60


def recorded() -> list[dict[str, Any]]:
    """What is known of every sweep of this home: ``name``, ``grid``, ``points``, ``folder``."""
    found = []
    for path in sorted((home() / "runs" / "sweeps").glob(f"*/{SWEEP}")):
        record = disk.read_json(path, {"grid": dict, "name": str, "points": list})
        if record:
            found.append(record | {"folder": path.parent})
    return found


def states(record: Mapping[str, Any]) -> list[tuple[dict[str, Any], str, str]]:
    """Each point of a recorded sweep with its state now, and the error of a failed one.

    A state is done, running, failed, or waiting.
    """
    store = Store()
    return [(point, *_state(store, point)) for point in record["points"]]


def _state(store: Store, point: Mapping[str, Any]) -> tuple[str, str]:
    if (store.root / point["entry"] / "entry.json").is_file():
        return "done", ""
    if disk.is_locked(store.root, point["entry"]):
        return "running", ""
    folder = store.root / "failed" / point["failed"]
    about = failed_in(folder)
    if about is None or about["run"] != point["key"]:
        return "waiting", ""
    cell = f"cell {about['cell']}: " if about["cell"] else ""
    return "failed", f"{cell}{about['error']}; copy: {folder}"
