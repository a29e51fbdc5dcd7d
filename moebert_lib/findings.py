"""The page "What we found", written from the tables that lie beside it: no number by hand."""

from pathlib import Path

import pandas as pd

from moebert_lib import found_rows, verdicts
from moebert_lib.claims import CLAIMS
from moebert_lib.errors import UserError
from moebert_lib.found_beyond import beyond
from moebert_lib.found_rows import interval
from moebert_lib.intervals import agreed
from moebert_lib.store import write_bytes
from moebert_lib.tasks import TASKS as METRICS
from moebert_lib.verdicts import CONTRADICTED, MARGIN, REPRODUCED, TOLD, UNDECIDED, judge

PAGE = "found.md"
NOTEBOOK = "06_results"  # draws the tables without which there is no page
COMPARED, SWITCHED = "06_comparisons.csv", "08_switches.csv"
METHODS, BESIDE, PAIRS = "06_methods.md", "06_beside_paper.csv", "06_forest.csv"
ROUTERS = "figure3c.csv"

HEAD = """# What we found

{provenance}
"""

LEVELS = """
## The methods side by side

{methods}

{trained} Always giving the most frequent answer of the training set would score {guesses}. Where
a teacher is hardly better than that, its students keep up with it without having learned anything.
"""

CLAIMED = """
## Which of the paper's claims hold here

A claim stands where all its comparisons do: {claims}.

{table}

Of {asked} comparisons that claim a direction and have runs, {decided} are decided one by one;
corrected for their number (Holm, over the p of a sign-flip test), {after} {are}{floor}. If no arm
differed from any other, about {luck:.1f} would be decided all the same.
"""

SIDES = """
## Comparison by comparison

{counts} A comparison is *{reproduced}* where the interval of the mean difference lies wholly on the
claimed side of zero, *{contradicted}* where it lies wholly on the other, and *{undecided}* where it
holds zero; "equal" and "not worse" allow {margin:g} points ([the whole
rule](../notebooks/06_results.ipynb)). Differences are in points of a task's headline metric, with
the 95% interval that decides. Pairs are seeds of {main}; where this run has a comparison on several
tasks they are the tasks.
"""

TASKS = """
### Task by task

All comparisons that several tasks have, the ablations of a task's own folder too.
Where the tasks are the pairs above, few and unlike ones make a wide interval. Within a task the
pairs are its seeds, with one teacher: that says nothing about other tasks, and what holds on one
need not hold on the next. The same rule gives each cell a verdict, uncorrected; where it is none,
these runs cannot tell.

{rows}
"""

ROUTED = """
### Every pair of routers

Row minus column in points on {main}, paired by seed, with the 95% t interval; in bold where it
excludes zero, which without any difference one pair in twenty would.

{rows}
"""

SWITCHES = """
## What the release's switches change

What the released code does against the paper's choice (the gate outside against the gate inside),
one switch at a time, on {main}, paired by seed: mean difference in points with the 95% t interval,
uncorrected, and each seed's. {cost} ([Notebook 8](../notebooks/08_release.ipynb) explains the
switches. It names those where all seeds agree on a sign, which chance does more often than an
interval excludes zero.)

| switch | difference | seeds | what the runs say |
|:--|--:|:--|:--|
{rows}
"""


def write(figures: Path) -> None:
    """Write the page into a folder of figures, from its tables and those of its tasks' folders.

    Raises:
        UserError: a table that it needs was not drawn.
    """
    methods = _drawn(figures / METHODS).read_text("utf-8").strip()
    guesses, trained = guessing(_read(figures / BESIDE)), found_rows.trained()
    compared, main = _read(figures / COMPARED), found_rows.main_task()
    parts = [HEAD.format(provenance=found_rows.provenance()), claims(compared)]
    parts.append(LEVELS.format(methods=methods, guesses=guesses, trained=trained))
    parts.append(sides(compared, main))
    pairs = [_read(figures / PAIRS), *map(_read, sorted(figures.glob(f"*/{PAIRS}")))]
    parts.append(TASKS.format(rows=by_task(pd.concat(pairs).drop_duplicates())))
    if (figures / ROUTERS).is_file():
        parts.append(ROUTED.format(rows=routers(_read(figures / ROUTERS)), main=main))
    if (figures / SWITCHED).is_file():
        rows = switches(_read(figures / SWITCHED))
        parts.append(SWITCHES.format(rows=rows, cost=found_rows.brief(), main=main))
    parts += [beyond(figures, main), found_rows.limits()]
    write_bytes(figures / PAGE, "".join(parts).encode())


def guessing(beside: pd.DataFrame) -> str:
    """The headline metric of guessing on each task, in %."""
    rows = beside[beside["guessing"].notna()].itertuples()
    return ", ".join(f"{row.guessing:.1f} on {row.task}" for row in rows)


def claims(compared: pd.DataFrame) -> str:
    """A row for each claim; how many comparisons are decided, and would be by luck."""
    table = verdicts.verdicts(compared)
    lines = [
        f"| {row.claim.rstrip('.')} | {row[2]} | {row.tested} of {row.comparisons} | "
        f"{row.verdict} |"
        for row in table.itertuples()
    ]
    head = "| claim | shown in | comparisons with runs | verdict |\n|:--|:--|:--|:--|"
    asked = ((compared["kind"] == "better") & (compared["pairs"] > 0)).sum()
    decided, after, luck = verdicts.by_chance(compared)
    least = 2.0 ** (1 - compared.loc[compared["pairs"] > 0, "pairs"].max())
    floor = f"; it could not be otherwise, since so few pairs give no p below {least:g}"
    return CLAIMED.format(
        claims=_counted(table["verdict"]),
        table="\n".join([head, *lines]),
        asked=asked,
        decided=decided,
        after=after,
        are="is" if after == 1 else "are",
        luck=luck,
        floor=floor if least > 0.05 and not after else "",
    )


def sides(compared: pd.DataFrame, main: str) -> str:
    """The rule, and every comparison under its verdict."""
    told = compared.loc[compared["pairs"] > 0, "verdict"]
    words = {"reproduced": REPRODUCED, "contradicted": CONTRADICTED, "undecided": UNDECIDED}
    counts = f"Of the comparisons with runs: {_counted(told)}."
    return SIDES.format(counts=counts, margin=MARGIN, main=main, **words) + lists(compared, main)


def _counted(told: pd.Series) -> str:
    """How many have each verdict that runs can give."""
    return ", ".join(f"{(told == verdict).sum()} {verdict}" for verdict in TOLD)


def lists(compared: pd.DataFrame, main: str) -> str:
    """A table of comparisons for each verdict, and the names of those without runs."""
    said = {claim.key: claim for claim in CLAIMS}
    parts = []
    for verdict in TOLD:
        rows = compared[(compared["verdict"] == verdict) & (compared["pairs"] > 0)]
        lines = [
            f"| {said[row.claim].statement.rstrip('.')} ({said[row.claim].shown_in}) | "
            f"{row.comparison} | {interval(row.mean, row.low, row.high)} | "
            f"{row.paper:+.1f} | {_pairs(row, main)} |"
            for row in rows.itertuples()
        ]
        if lines:
            head = "| claim | comparison | here | paper | pairs |\n|:--|:--|--:|--:|:--|"
            parts.append("\n".join([f"\n**{verdict.capitalize()}**\n", head, *lines, ""]))
    without = compared.loc[compared["pairs"] == 0, "comparison"]
    if len(without):
        parts.append(f"\n**No runs:** {', '.join(without)}.\n")
    return "\n".join(parts)


def by_task(pairs: pd.DataFrame) -> str:
    """Comparisons that several tasks have: a row each, a column for each task.

    Comparisons that say the same of the same pairs share a row.
    """
    wide = pairs.groupby("comparison", sort=False).filter(lambda rows: rows["task"].nunique() > 1)
    tasks = list(dict.fromkeys(wide["task"]))
    kinds = {str(one): one.kind for claim in CLAIMS for one in claim.comparisons}
    named: dict[tuple[str, ...], list[str]] = {}
    for name, rows in wide.groupby("comparison", sort=False):
        gaps = {task: part["difference"] for task, part in rows.groupby("task")}
        cells = [_cell(gaps[task], kinds[name]) if task in gaps else "" for task in tasks]
        named.setdefault(tuple(cells), []).append(name)
    lines = [f"| comparison | {' | '.join(tasks)} |", "|:--" + "|--:" * len(tasks) + "|"]
    lines += [f"| {'; '.join(names)} | {' | '.join(cells)} |" for cells, names in named.items()]
    return "\n".join(lines)


def _cell(gaps: pd.Series, kind: str) -> str:
    """Mean and interval of one task's seeds, and their verdict where they have one."""
    told, low, high = judge(gaps, kind)
    return interval(gaps.mean(), low, high) + f" **{told}**" * (told != UNDECIDED)


def routers(scores: pd.DataFrame) -> str:
    """Each router against each other one: rows of Figure 3c's table, those from here."""
    here = scores[scores["source"] == "here"].set_index(["routing", "seed"])
    metric = next(name for name in here if name in {task.metric for task in METRICS.values()})
    wide = 100 * here[metric].unstack("routing", sort=False)
    lines = [f"| | {' | '.join(wide)} |", "|:--" + "|--:" * len(wide.columns) + "|"]
    for one in wide:
        gaps = {other: (wide[one] - wide[other]).dropna() for other in wide if other != one}
        cells = [_bold(gaps[other]) if other in gaps else "" for other in wide]
        lines.append(f"| {one} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bold(gaps: pd.Series) -> str:
    """A difference with its interval, in bold where that excludes zero."""
    told, low, high = judge(gaps, "better")
    text = interval(gaps.mean(), low, high)
    return f"**{text}**" if told in (REPRODUCED, CONTRADICTED) else text


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


def _pairs(row: tuple, main: str) -> str:
    """How many pairs a comparison has, and of what: tasks, or one task's seeds."""
    one, of = ("task", "") if row.tasks > 1 else ("seed", f", {main}")
    return f"{row.pairs} {one}{'s' * (row.pairs > 1)}{of}"


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(_drawn(path))


def _drawn(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}; the results' workbook must draw it")
    return path
