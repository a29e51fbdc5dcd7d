"""The page "What we found", written from the tables that lie beside it: no number by hand."""

import math
from pathlib import Path

import pandas as pd

from moebert_lib import archive
from moebert_lib.claims import CLAIMS
from moebert_lib.intervals import agreed
from moebert_lib.settings import UserError
from moebert_lib.store import write_bytes
from moebert_lib.verdicts import CONTRADICTED, MARGIN, REPRODUCED, UNDECIDED, judge

PAGE = "found.md"
NOTEBOOK = "06_results"  # draws the tables without which there is no page
COMPARED, SWITCHED = "06_comparisons.csv", "08_switches.csv"
METHODS, BESIDE, PAIRS = "06_methods.md", "06_beside_paper.csv", "06_forest.csv"

HEAD = """# What we found

{provenance}

## The methods side by side

{methods}

Always giving the most frequent answer of the training set would score {guesses}. Where a teacher is
hardly better than that, its students can keep up with it without having learned anything.
"""

CLAIMED = """
## Which of the paper's claims hold here

{counts} A comparison is *{reproduced}* where the interval of the mean difference lies wholly on the
claimed side of zero, *{contradicted}* where it lies wholly on the other, and *{undecided}* where it
holds zero; "equal" and "not worse" allow {margin:g} points ([the whole
rule](../notebooks/06_results.ipynb)). Differences are in points of a task's headline metric, with
the 95% interval that decides. Pairs are the seeds of one task, or where several tasks have the
comparison the tasks.
"""

TASKS = """
### Task by task

Where the tasks are the pairs above, few and unlike ones make a wide interval. Within a task the
pairs are its seeds, with one teacher: that says nothing about other tasks.

{rows}
"""

SWITCHES = """
## What the release's switches change

The paper's choice against what the released code does, one switch at a time, paired by seed: mean
difference in points with the 95% t interval, and each seed's. ([Notebook
8](../notebooks/08_release.ipynb) explains the switches; these students were trained on an eighth
of the data, since one that counts padding costs many times as much.)

| switch | difference | seeds | what the runs say |
|:--|--:|:--|:--|
{rows}
"""

LIMITS = """
## What these runs cannot say

- **One teacher per task.** Its seed is fixed, so no interval holds what another teacher would
  change; for RTE and MRPC that is often more than the differences above.
- **Three seeds.** With three pairs the t interval is wide and takes differences for normal.
  Undecided means that these runs cannot tell, not that there is no effect.
- **Many comparisons.** Some verdicts would come by luck alone; notebook 6 counts how many, and
  corrects by Holm.
- **Not the paper's model.** MiniLM has half of BERT-base's layers and width, and was distilled
  itself; the paper's ablations are on MNLI, and its students train four to ten epochs where ours
  train one.
- **The development set is small.** One example of RTE is 0.36 points, of MRPC's accuracy 0.25, of
  SST-2 0.11. Nothing was tuned on it: all hyper-parameters are the scale's.
"""


def write(figures: Path) -> None:
    """Write the page into a folder of figures, from its tables and those of its tasks' folders.

    Raises:
        UserError: a table that it needs was not drawn.
    """
    methods, guesses = (
        _drawn(figures / METHODS).read_text("utf-8").strip(),
        guessing(_read(figures / BESIDE)),
    )
    parts = [HEAD.format(provenance=provenance(), methods=methods, guesses=guesses)]
    compared = {"": _read(figures / COMPARED)}
    compared |= {f", {path.parent.name} alone": _read(path)
                 for path in sorted(figures.glob(f"*/{COMPARED}"))}  # fmt: skip
    for where, table in compared.items():
        parts.append(claims(table) if not where else f"\n### The same{where}\n{lists(table)}")
        parts += [TASKS.format(rows=by_task(_read(figures / PAIRS)))] if not where else []
    if (figures / SWITCHED).is_file():
        parts.append(SWITCHES.format(rows=switches(_read(figures / SWITCHED))))
    write_bytes(figures / PAGE, "".join([*parts, LIMITS]).encode())


def provenance() -> str:
    """What was run, how long it took, and with what, from the rows that all is drawn from."""
    records = list(archive.opened(archive.named()).records.values())
    students = [record for record in records if record["kind"] == "student"]
    if not students:
        raise UserError("the results hold no student; expected those of a workbook")
    hours = sum(record["seconds"] for record in records) / 3600
    days = sorted(record["created"][:10] for record in records)
    commits = sorted({str(record["commit"])[:8] for record in records})
    machines = sorted({f"{r['machine']['cpu']}, {r['machine']['cores']} cores" for r in records})
    versions = students[0]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers"))
    tasks = {record["row"]["task"]: record["key"] for record in students}
    data = ", ".join(f"{task} `{_leaf(key, 'data')[:8]}`" for task, key in sorted(tasks.items()))
    return (
        f"{len(students)} students and {sum(r['kind'] == 'teacher' for r in records)} teachers, "
        f"{hours:.1f} hours of single-threaded work ({days[0]} to {days[-1]}; "
        f"{'; '.join(machines)}; {named}; commits {', '.join(commits)}; data {data}). "
        "Every figure, every table and this page are drawn from committed "
        "[rows](runs/rows.parquet): `moebert report --from figures/runs` draws them again, and CI "
        "compares each byte. Scores are of the development sets."
    )


def guessing(beside: pd.DataFrame) -> str:
    """The headline metric of guessing on each task, in %."""
    rows = beside[beside["guessing"].notna()].itertuples()
    return ", ".join(f"{row.guessing:.1f} on {row.task}" for row in rows)


def claims(compared: pd.DataFrame) -> str:
    """The claims and their comparisons, grouped by what the runs say."""
    told = compared[compared["pairs"] > 0]["verdict"].value_counts()
    counts = ", ".join(f"{told.get(name, 0)} {name}" for name in (REPRODUCED, CONTRADICTED,
                                                                   UNDECIDED))  # fmt: skip
    words = {"reproduced": REPRODUCED, "contradicted": CONTRADICTED, "undecided": UNDECIDED}
    head = CLAIMED.format(counts=f"Of the comparisons with runs: {counts}.", margin=MARGIN, **words)
    return head + lists(compared)


def lists(compared: pd.DataFrame) -> str:
    """A table of comparisons for each verdict."""
    said = {claim.key: claim for claim in CLAIMS}
    parts = []
    for verdict in (REPRODUCED, CONTRADICTED, UNDECIDED):
        rows = compared[(compared["verdict"] == verdict) & (compared["pairs"] > 0)]
        lines = [f"| {said[row.claim].statement.rstrip('.')} ({said[row.claim].shown_in}) | "
                 f"{row.comparison} | {interval(row.mean, row.low, row.high)} | "
                 f"{row.paper:+.1f} | {row.pairs} {_unit(row)} |"
                 for row in rows.itertuples()]  # fmt: skip
        if lines:
            head = "| claim | comparison | here | paper | pairs |\n|:--|:--|--:|--:|:--|"
            parts.append("\n".join([f"\n**{verdict.capitalize()}**\n", head, *lines, ""]))
    return "\n".join(parts)


def by_task(pairs: pd.DataFrame) -> str:
    """Comparisons that several tasks have: a row each, a column for each task."""
    wide = pairs.groupby("comparison", sort=False).filter(lambda rows: rows["task"].nunique() > 1)
    tasks = list(dict.fromkeys(wide["task"]))
    lines = [f"| comparison | {' | '.join(tasks)} |", "|:--" + "|--:" * len(tasks) + "|"]
    for name, rows in wide.groupby("comparison", sort=False):
        gaps = {task: part["difference"] for task, part in rows.groupby("task")}
        cells = [interval(gaps[t].mean(), *judge(gaps[t], "better")[1:]) if t in gaps else ""
                 for t in tasks]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def switches(gaps: pd.DataFrame) -> str:
    """A row for each switch of notebook 8."""
    lines = []
    for name, rows in gaps.groupby("switch", sort=False):
        each = rows["difference"]
        _, low, high = judge(each, "better")
        said = "higher" if low > 0 else "lower" if high < 0 else "cannot tell"
        if said == "cannot tell" and (same := {"<": "lower", ">": "higher"}.get(agreed(each))):
            said = f"{same} with every seed, but the interval holds zero"
        said = "no difference at all" if not each.any() else said
        seeds = ", ".join(f"{value:+.1f}" for value in each)
        lines.append(f"| {name} | {interval(each.mean(), low, high)} | {seeds} | {said} |")
    return "\n".join(lines)


def interval(mean: float, low: float, high: float) -> str:
    """A difference with its interval, where it has one.

    Example:
        >>> interval(0.52, -0.1, 1.14)
        '+0.5 (-0.1 to +1.1)'
    """
    return f"{mean:+.1f}" + ("" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})")


def _unit(row: tuple) -> str:
    """What the pairs of a comparison are."""
    one = "task" if row.tasks > 1 else "seed"
    return one if row.pairs == 1 else f"{one}s"


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(_drawn(path))


def _drawn(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}; the results' workbook must draw it")
    return path


def _leaf(key: dict, name: str) -> str:
    """The first value of that name in a nested key."""
    if name in key:
        return str(key[name])
    inner = (value for value in key.values() if isinstance(value, dict))
    return next((found for value in inner if (found := _leaf(value, name))), "")
