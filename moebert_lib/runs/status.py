"""What is stored and what failed, in words: every run by what sets it apart."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moebert_lib.config import file_io
from moebert_lib.config.errors import UserError, home
from moebert_lib.config.presets import FFN_WIDTHS, MINILM, SCALES, defaults
from moebert_lib.config.provenance import to_json
from moebert_lib.config.settings import Settings
from moebert_lib.runs import local_pool
from moebert_lib.runs.execution import failed_in
from moebert_lib.store.store import Entry, StageKey, Store

SWEEP, TABLE, MEANS = "sweep.json", "table.csv", "means.csv"  # of a folder in runs/sweeps/
STATES = ("done", "running", "failed", "waiting")
NEWEST = 10  # entries that a short listing shows

#: Parts of a key that are digests or machinery, and no choice of a user.
UNSEEN = ("code", "versions", "weights", "data", "device", "cells", "inputs")


def lines(*, whole: bool = False) -> Iterator[str]:
    """The store as ``moebert status`` shows it; ``whole`` lists every run and point."""
    for record in recorded():
        yield from _sweep(record, whole=whole)
    entries, failed = Store().entries(), local_pool.failed_runs()
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
    settings = entry.key.choices.get("settings")
    if entry.kind == "notebook":
        words = [entry.key.choices["notebook"]]
        if settings:
            words += [settings["scale"], settings["task"]]
        changed = entry.row.get("changed") or unusual(settings or {})
    else:
        chosen = _choices(entry.key.values())
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
        record = file_io.read_json(path, {"grid": dict, "name": str, "points": list})
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
    if file_io.is_locked(store.root, point["entry"]):
        return "running", ""
    folder = store.root / "failed" / point["failed"]
    about = failed_in(folder)
    if about is None or about["run"] != point["key"]:
        return "waiting", ""
    cell = f"cell {about['cell']}: " if about["cell"] else ""
    return "failed", f"{cell}{about['error']}; copy: {folder}"


# Why a planned notebook is reused, or why it must run: its key beside those of stored runs.
# A key is what :meth:`planning.Job.key` returns. Nothing here reads the disk, and a stored key may
# be anything: one of an older layout is named as a whole, a malformed one raises nothing.

VALUE, NEW, GONE = "value changed", "value new", "value removed"
CHANGED, ADDED, REMOVED = "cell changed", "cell added", "cell removed"
MODULE, VERSION, INPUT, PART = "module", "version", "input", "part of a key as a whole"
VALUES = ("parameters", "settings")
PARTS = ("cells", "code", "versions", "inputs")
#: How a line names them where their own name says too little.
SAID = {"cells": "notebook code", "code": "library", "model": "weights"}
#: Values and modules that decide a digest of inputs: where one differs, the digest tells nothing
#: about the files. "code" and "settings" are those parts as a whole.
DECIDE = {
    "data": set(
        "settings scale task max_train_examples max_eval_examples "
        "code corpus data files tasks".split()
    ),
    "model": {"settings", "scale", "model"},
}
#: A line of each kind, in the order they are said.
LINES = {
    VALUE: "new value{s}: {new} (nearest run has {old})",
    NEW: "new setting{s} {new}",
    GONE: "setting{s} removed: {names}",
    CHANGED: "code cell{s} {numbers} changed",
    ADDED: "code cell{s} {numbers} added",
    REMOVED: "code cell{s} {numbers} removed",
    MODULE: "library changed: {modules}",
    VERSION: "{versions}",
    PART: "{parts}",
    INPUT: "{parts}",
}
#: What is printed as it is; all else as Python writes it: 3 is not '3', and a line stays one line.
NAME = re.compile(r"[\w./+-]+", re.ASCII)
WORD = re.compile(r"(?!(nan|inf)$)[a-z][\w./+-]*", re.ASCII)
MOST, WIDTH = 5, 40  # items of one list, characters of one value in :func:`why`


@dataclass(frozen=True)
class Difference:
    """One thing that differs: ``kind`` is a name of LINES; None where a side has no value."""

    kind: str
    name: str
    new: Any = None
    old: Any = None


@dataclass(frozen=True)
class Reason:
    """The nearest stored run, None where its notebook never ran, and all that differs from it."""

    entry: Entry | None
    differences: tuple[Difference, ...]

    @property
    def stored(self) -> bool:
        """Whether the run is there already."""
        return self.entry is not None and not self.differences

    @property
    def other_values(self) -> bool:
        """Whether a parameter or setting that both know has another value."""
        return any(
            one.kind == VALUE or (one.kind == PART and one.name in VALUES)
            for one in self.differences
        )


def compare(key: StageKey, entries: Iterable[Entry]) -> Reason:
    """The stored run of the same notebook that is nearest to ``key``, and what differs.

    Nearest: first those with the same parameters and settings, as far as both know them, then
    the fewest differences, then the newest.

    Args:
        key: Of a planned job.
        entries: Oldest first, as :meth:`store.Store.entries` returns them.
    """
    reasons = [
        Reason(entry, _differences(key.values(), entry.key.values()))
        for entry in entries
        if _equal(key.choices, entry.key.choices, "notebook")
    ]
    return min(
        reversed(reasons),
        key=lambda one: (one.other_values, len(one.differences)),
        default=Reason(None, ()),
    )


def why(key: StageKey, entries: Iterable[Entry], *, damaged: str = "") -> str:
    """One line: "stored", "never run", or what differs from the nearest run, shortened.

    Args:
        key: Of a planned job.
        entries: Oldest first.
        damaged: What is wrong with the stored run of this very key; "" where nothing is.

    Example:
        >>> why(StageKey("notebook", {"notebook": "01_importance"}), [])
        'never run'
    """
    reason = compare(key, entries)
    groups = [[one for one in reason.differences if one.kind == kind] for kind in LINES]
    lines = (_line(group, WIDTH) for group in groups if group)
    return _plainly(reason, damaged) or "; ".join(lines)


def details(key: StageKey, entries: Iterable[Entry], *, damaged: str = "") -> list[str]:
    """As :func:`why`, one reason a line and nothing shortened."""
    reason = compare(key, entries)
    plain = _plainly(reason, damaged)
    ordered = sorted(reason.differences, key=lambda one: list(LINES).index(one.kind))
    return [plain] if plain else [_line([one], None) for one in ordered]


def _plainly(reason: Reason, damaged: str) -> str:
    if damaged:
        return f"damaged: {damaged if damaged.isprintable() else repr(damaged)}"
    if reason.entry is None:
        return "never run"
    return "stored" if reason.stored else ""


def _differences(key: dict, old: dict) -> tuple[Difference, ...]:
    """Empty exactly where both keys are the same JSON."""
    changed = {name for name in {**key, **old} if not _equal(key, old, name)}
    found = _values(key, old) if changed & {*VALUES} else []
    if not found:
        found = [Difference(PART, name) for name in VALUES if name in changed]
    others = sorted(changed - {*VALUES, *PARTS})
    for name in (*(part for part in PARTS if part in changed), *others):
        found += _part(name, key.get(name), old.get(name))
    decided = {one.name for one in found if one.kind in (VALUE, NEW, GONE, MODULE, PART)}
    return tuple(
        one for one in found if one.kind != INPUT or not DECIDE.get(one.name, set()) & decided
    )


def _values(key: dict, old: dict) -> list[Difference]:
    """Parameters and settings under one name each; a part that only one side has, as a whole."""
    sides = {part: [isinstance(one.get(part), dict) for one in (key, old)] for part in VALUES}
    found = [Difference(PART, part) for part, (here, there) in sides.items() if here != there]
    shared = [part for part, both in sides.items() if all(both)]
    new, stored = _flat(key, shared), _flat(old, shared)
    for name in {**new, **stored}:
        if not _equal(new, stored, name):
            here, there = new.get(name), stored.get(name)
            usual = INPUT if _are_files(here) and _are_files(there) else VALUE
            kind = GONE if name not in new else NEW if name not in stored else usual
            found.append(Difference(kind, name, here, there))
    return found


def _flat(key: dict, parts: Sequence[str]) -> dict[str, Any]:
    """Values by name: those that were given first. Settings hold what the overrides say."""
    parameters, settings = (key[part] if part in parts else {} for part in VALUES)
    given = parameters.get("overrides")
    if settings and isinstance(given, dict):
        parameters = {name: parameters[name] for name in parameters if name != "overrides"} | given
    return parameters | settings


def _part(name: str, new: Any, old: Any) -> list[Difference]:
    kind = {"code": MODULE, "versions": VERSION, "inputs": INPUT}.get(name)
    if name == "cells" and isinstance(new, list) and isinstance(old, list):
        return _cells(new, old)
    if kind is None or not isinstance(new, dict) or not isinstance(old, dict):
        return [Difference(PART, name)]
    names = (each for each in {**new, **old} if not _equal(new, old, each))
    return [Difference(kind, each, new.get(each), old.get(each)) for each in names]


def _cells(new: list, old: list) -> list[Difference]:
    """Numbers from 1: where a changed or added cell stands now, where a removed one stood."""
    before, after = ([to_json(cell) for cell in cells] for cells in (old, new))
    found = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for tag, start, stop, first, last in matcher.get_opcodes():
        if tag != "equal":
            pairs = min(stop - start, last - first)
            found += [(CHANGED, number) for number in range(first, first + pairs)]
            found += [(ADDED, number) for number in range(first + pairs, last)]
            found += [(REMOVED, number) for number in range(start + pairs, stop)]
    return [Difference(kind, str(number + 1)) for kind, number in found]


def _line(group: list[Difference], width: int | None) -> str:
    """Differences of one kind in words; names and values cut to ``width`` characters."""

    def shown(value: Any, plain: re.Pattern = WORD) -> str:
        text = value if isinstance(value, str) and plain.fullmatch(value) else repr(value)
        return text if width is None or len(text) <= width else text[: width - 1] + "…"

    def version(value: Any) -> str:
        return "none" if value is None else shown(value, NAME)

    names = [shown(one.name, NAME) for one in group]
    pairs = list(zip(names, group, strict=True))
    text = LINES[group[0].kind]
    return text.format(
        s="s" if len(group) > 1 else "",
        names=_some(names),
        numbers=_some(names, last=" and "),
        new=_some([f"{name}={shown(one.new)}" for name, one in pairs], " "),
        old=_some([f"{name}={shown(one.old)}" for name, one in pairs], " "),
        modules=_some([name + _fate(one) for name, one in pairs]),
        versions=_some([f"{name} {version(one.old)} -> {version(one.new)}" for name, one in pairs]),
        parts=_some([f"{_named_part(name, one)} changed" for name, one in pairs], "; "),
    )


def _named_part(name: str, one: Difference) -> str:
    return f"files of {name}" if _are_files(one.new) else SAID.get(one.name, name)


def _are_files(value: Any) -> bool:
    """Whether a parameter's value in a key is the digests of a folder's files."""
    return isinstance(value, dict) and bool(value)


def _fate(one: Difference) -> str:
    return " (new)" if one.old is None else " (removed)" if one.new is None else ""


def _some(items: list[str], separator: str = ", ", *, last: str | None = None) -> str:
    """All of a list, or of a longer one the first and how many more."""
    rest = len(items) - MOST
    if rest > 1:
        return f"{separator.join(items[:MOST])} and {rest} more"
    return (last or separator).join(filter(None, [separator.join(items[:-1]), items[-1]]))


def _equal(one: dict, other: dict, name: str) -> bool:
    """Whether both hold a name with the same JSON value: 1 is not 1.0, as in a digest."""
    if (name in one) != (name in other):
        return False
    new, old = one.get(name), other.get(name)
    if type(new) is type(old) and isinstance(new, str | int | None):
        return new == old  # most of a key, and many times faster
    return to_json(new) == to_json(old)
