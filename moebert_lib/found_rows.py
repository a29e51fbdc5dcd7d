"""What the page of findings says of its runs, from the rows that it is drawn from."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from moebert_lib import archive, columns
from moebert_lib.errors import UserError
from moebert_lib.settings import Settings

#: Settings that a scale leaves to the model's width.
BY_WIDTH = {"expert_size", "n_shared"}
TEN = "zero one two three four five six seven eight nine ten".split()

LIMITS = """
## What these runs cannot say

- **{teachers}** No interval holds what another teacher would change.
- **{seeds} of each setting.** With so few pairs the t interval is wide and takes differences for
  normal. Undecided means that these runs cannot tell, not that there is no effect.
- **Not the paper's model.** MiniLM has half of BERT-base's layers and width, and was distilled
  itself; the paper's ablations are on MNLI, and its students train four to ten epochs.
- **The development set is small.** One example is worth, in points of accuracy: {examples}.
- **Nothing was tuned.** All hyper-parameters are those of scale {scale}, but for {departs}.
"""


def interval(mean: float, low: float, high: float) -> str:
    """A difference with its interval, where it has one.

    Example:
        >>> interval(0.52, -0.1, 1.14)
        '+0.5 (-0.1 to +1.1)'
    """
    return f"{mean:+.1f}" + ("" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})")


def provenance() -> str:
    """What was run, how long it took, and with what.

    Raises:
        UserError: the results hold no student.
    """
    records = list(archive.opened(archive.named()).records.values())
    students = _students()
    teachers = sum(record["kind"] == "teacher" for record in records)
    hours = sum(record["seconds"] for record in records) / 3600
    days = sorted({record["created"][:10] for record in records})
    machines = sorted(
        {
            f"{one['cpu']}, {one['cores']} cores, {one['torch_threads']} thread"
            f"{'s' * (one['torch_threads'] > 1)} a run"
            for one in (r["machine"] for r in records)
        }
    )
    tasks = {of["task"]: of["data"] for of in map(_values, students)}
    data = ", ".join(f"{task} `{digest[:8]}`" for task, digest in sorted(tasks.items()))
    return (
        f"{len(students)} students and {teachers} teachers, {hours:.1f} hours of work, added up "
        f"({' to '.join(dict.fromkeys([days[0], days[-1]]))}; {'; '.join(machines)}; "
        f"{_versions(students)}; commits {', '.join(_commits(records))}; data {data}). "
        "Every figure, every table and this page are drawn from committed "
        "[rows](runs/rows.parquet): `moebert report --from figures/runs` draws them again, and CI "
        "compares each byte. Scores are of the development sets."
    )


def _versions(records: Iterable[dict[str, Any]]) -> str:
    """Each version of the main libraries that any of these runs had."""
    named = {
        name: sorted({str(record["versions"][name]) for record in records})
        for name in ("python", "torch", "transformers")
    }
    return ", ".join(f"{name} {' and '.join(each)}" for name, each in named.items())


def _commits(records: Iterable[dict[str, Any]]) -> list[str]:
    """Commits in short, each with what is said of it after a dash: "-dirty"."""
    whole = (str(record["commit"]).partition("-") for record in records)
    return sorted({commit[:8] + dash + state for commit, dash, state in whole})


def brief() -> str:
    """How long the shortest students of all were trained, and what padding cost them."""
    students = _students()
    steps = min(record["row"]["steps"] for record in students)
    short = [record for record in students if record["row"]["steps"] == steps]
    spent: dict[bool, list[float]] = {True: [], False: []}
    for record in short:
        spent[_values(record)["padding_in_loss"]].append(record["seconds"])
    text = f"These students had {steps} steps of {_values(short[0])['batch_size']} sentences"
    if all(spent.values()):
        text += (
            f"; one that counts padding took {_span(spent[True])} seconds, any other "
            f"{_span(spent[False])}"
        )
    worth = 100 / _sizes()[_values(short[0])["task"]]
    return f"{text}. One sentence of the development set is {worth:.2f} points."


def trained() -> str:
    """For how long teachers and most students were trained."""
    each = [_values(record) for record in _students()]
    teachers, students = (
        Counter(of[name] for of in each).most_common(1)[0][0]
        for name in ("teacher_epochs", "epochs")
    )
    return f"Teachers were trained for {teachers:g} epochs, students for {students:g}."


def main_task() -> str:
    """The task that most students were trained on: the notebooks' own."""
    return Counter(_values(record)["task"] for record in _students()).most_common(1)[0][0]


def limits() -> str:
    """The page's last section: what comes from one teacher, few seeds, few examples."""
    each = [_values(record) for record in _students()]
    teachers = {(of["task"], of["teacher_seed"]) for of in each}
    one = len(teachers) == len({task for task, _ in teachers})
    seeds = len({of["seed"] for of in each})
    examples = (f"{100 / size:.2f} on {task}" for task, size in sorted(_sizes().items()))
    number = (TEN[seeds] if seeds < len(TEN) else str(seeds)).capitalize()
    return LIMITS.format(
        teachers="One teacher per task." if one else f"{len(teachers)} teachers.",
        seeds=f"{number} seed{'s' * (seeds != 1)}",
        examples=", ".join(examples),
        scale=_scale(),
        departs=departs(),
    )


def departs() -> str:
    """Settings that in every student are others than their scale's, with both values."""
    scale, each = _scale(), [_values(record) for record in _students()]
    names = [name for name in Settings.model_fields if name not in {"scale", *BY_WIDTH}]
    usual = {of["task"]: Settings.at(scale, task=of["task"]).model_dump() for of in each}
    pairs = {
        name: Counter((of[name], usual[of["task"]][name]) for of in each)
        for name in names
        if all(name in of for of in each)
    }
    told = []
    for name, values in pairs.items():
        if all(mine != scales for mine, scales in values):
            mine = " or ".join(dict.fromkeys(str(mine) for (mine, _), _ in values.most_common()))
            told.append(
                f"`{name}`: {mine} ({', '.join(sorted({str(s) for _, s in values}))} there)"
            )
    return "; ".join(told) or "none"


def _students() -> list[dict[str, Any]]:
    records = archive.opened(archive.named()).records.values()
    students = [record for record in records if record["kind"] == "student"]
    if not students:
        raise UserError("the results hold no student; expected those of a workbook")
    return students


def _values(record: dict[str, Any]) -> dict[str, Any]:
    """Settings, seed, task and the data's digest of a run, by name."""
    named = columns.row(record).items()
    return {name: value for (group, name), value in named if group in ("first", "setting", "last")}


def _scale() -> str:
    """The scale that the rows name."""
    records = archive.opened(archive.named()).records.values()
    return next((scale for record in records if (scale := _values(record)["scale"])), "small")


def _sizes() -> dict[str, int]:
    """Examples of each task's development set: the answers of one student."""
    store, sizes = archive.opened(archive.named()), {}
    for record in _students():
        if (task := record["row"]["task"]) not in sizes:
            answers = dict(store.files_of(record))["answers.csv"]
            sizes[task] = len(answers.decode().split()) - 1
    return sizes


def _span(seconds: Iterable[float]) -> str:
    """The least and the most, in whole numbers."""
    ends: Iterator[float] = (f(list(seconds)) for f in (min, max))
    return " to ".join(dict.fromkeys(f"{end:.0f}" for end in ends))
