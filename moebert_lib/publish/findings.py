"""The page "What we found", written from the tables that lie beside it: no number by hand."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from moebert_lib.config.errors import UserError
from moebert_lib.config.file_io import write_bytes
from moebert_lib.config.settings import Settings
from moebert_lib.data.tasks import TASKS as METRICS
from moebert_lib.evidence import verdicts
from moebert_lib.evidence.claims import CLAIMS
from moebert_lib.evidence.statistics import agreed, student
from moebert_lib.evidence.verdicts import (
    CONTRADICTED,
    MARGIN,
    REPRODUCED,
    TOLD,
    UNDECIDED,
    judge,
)
from moebert_lib.runs import export
from moebert_lib.store.committed_results import open_store
from moebert_lib.training.routing_analysis import nearer

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
    guesses, epochs = guessing(_read(figures / BESIDE)), trained()
    compared, main = _read(figures / COMPARED), main_task()
    parts = [HEAD.format(provenance=provenance()), claims(compared)]
    parts.append(LEVELS.format(methods=methods, guesses=guesses, trained=epochs))
    parts.append(sides(compared, main))
    pairs = [_read(figures / PAIRS), *map(_read, sorted(figures.glob(f"*/{PAIRS}")))]
    parts.append(TASKS.format(rows=by_task(pd.concat(pairs).drop_duplicates())))
    if (figures / ROUTERS).is_file():
        parts.append(ROUTED.format(rows=routers(_read(figures / ROUTERS)), main=main))
    if (figures / SWITCHED).is_file():
        rows = switches(_read(figures / SWITCHED))
        parts.append(SWITCHES.format(rows=rows, cost=brief(), main=main))
    parts += [beyond(figures, main), limits()]
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


# What the page of findings says of its runs, from the rows that it is drawn from.

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
    records = list(open_store().records.values())
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
    records = open_store().records.values()
    students = [record for record in records if record["kind"] == "student"]
    if not students:
        raise UserError("the results hold no student; expected those of a workbook")
    return students


def _values(record: dict[str, Any]) -> dict[str, Any]:
    """Settings, seed, task and the data's digest of a run, by name."""
    named = export.row(record).items()
    return {name: value for (group, name), value in named if group in ("first", "setting", "last")}


def _scale() -> str:
    """The scale that the rows name."""
    records = open_store().records.values()
    return next((scale for record in records if (scale := _values(record)["scale"])), "small")


def _sizes() -> dict[str, int]:
    """Examples of each task's development set: the answers of one student."""
    store, sizes = open_store(), {}
    for record in _students():
        if (task := record["row"]["task"]) not in sizes:
            answers = dict(store.files_of(record))["answers.csv"]
            sizes[task] = len(answers.decode().split()) - 1
    return sizes


def _span(seconds: Iterable[float]) -> str:
    """The least and the most, in whole numbers."""
    ends: Iterator[float] = (f(list(seconds)) for f in (min, max))
    return " to ".join(dict.fromkeys(f"{end:.0f}" for end in ends))


# What the page of findings says of questions that the paper does not ask.

GAPS, BEYOND, ORACLE = "04_construction_gaps.csv", "05_beyond.csv", "05_oracle.csv"
AGREEMENT, REMOVAL = "01_score_agreement.csv", "01_score_removal.csv"
NAMED = "hash-random"  #: what other routers are held against

HEAD_found_beyond = """
## Beyond the paper

None of these comparisons is corrected for their number: of {n} intervals, {luck:.1f} would exclude
zero by chance.
"""

CONSTRUCTIONS = """
**Other ways to build experts** ([notebook 4](../notebooks/04_ablations.ipynb)). Points over the
deal with as many shared neurons, trained, paired by seed, with the 95% t interval; in bold where it
excludes zero.

{rows}
"""

ROUTERS_found_beyond = """
**Other routers** ([notebook 5](../notebooks/05_routing.ipynb)). Points over hash-random on {task},
paired by seed, with the 95% t interval: {rows}. With two experts a token uses {more:.0%} more
parameters.
"""

HINDSIGHT = """
**Routing in hindsight.** Where each token takes the expert that brings it nearest to its teacher,
layer by layer, the last layer's distance is {converted:.0%} smaller before training and
{distilled:.0%} after it, and the score rises by {before:+.1f} and {after:+.1f} points (one seed).
Another choice could be nearer still.
"""

SCORES = """
**Other scores** ([notebook 1](../notebooks/01_importance.ipynb)). Rank correlation with Eq. 4:
{rho}. Points over Eq. 4 with three quarters of the neurons removed, untrained, for one teacher on
the notebook's sample of sentences: {kept}.
"""


def beyond(figures: Path, task: str) -> str:
    """The section, from the tables that there are; "" where there is none.

    Args:
        figures: With the main task's tables, and folders of other tasks.
        task: The main one.
    """
    gaps = {task: figures / GAPS} | {p.parent.name: p for p in sorted(figures.glob(f"*/{GAPS}"))}
    tables = {name: pd.read_csv(path) for name, path in gaps.items() if path.is_file()}
    parts, n = [], sum(int(table["low"].notna().sum()) for table in tables.values())
    if tables:
        parts.append(CONSTRUCTIONS.format(rows=constructions(tables)))
    if (figures / BEYOND).is_file():
        runs = pd.read_csv(figures / BEYOND)
        parts.append(routers_found_beyond(runs, task))
        n += runs["name"].nunique() - 1
    if (figures / ORACLE).is_file():
        parts.append(hindsight(pd.read_csv(figures / ORACLE)))
    if (figures / REMOVAL).is_file() and (figures / AGREEMENT).is_file():
        parts.append(scores(pd.read_csv(figures / AGREEMENT), pd.read_csv(figures / REMOVAL)))
    return "".join([HEAD_found_beyond.format(n=n, luck=0.05 * n), *parts]) if parts else ""


def constructions(tables: dict[str, pd.DataFrame]) -> str:
    """A row for each construction, a column for each task: its difference to the deal."""
    lines = [f"| construction | {' | '.join(tables)} |", "|:--" + "|--:" * len(tables) + "|"]
    each = {task: table.set_index("name") for task, table in tables.items()}
    for name in next(iter(each.values())).index:
        rows = [table.loc[name] for table in each.values()]
        if not all(row.isna()["difference"] for row in rows):
            cells = (_cell_found_beyond(row["difference"], row["low"], row["high"]) for row in rows)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def routers_found_beyond(runs: pd.DataFrame, task: str) -> str:
    """Each router's difference to hash-random, and what a second expert costs."""
    metric = next(name for name in runs if name not in ("name", "seed", "effective_parameters"))
    wide = 100 * runs.pivot(index="seed", columns="name", values=metric)[runs["name"].unique()]
    gaps = wide.sub(wide.pop(NAMED), axis=0)
    told = (f"{name} {_cell_found_beyond(gap.mean(), *student(gap))}" for name, gap in gaps.items())
    size = runs.groupby("name")["effective_parameters"].first()
    return ROUTERS_found_beyond.format(
        task=task, rows="; ".join(told), more=size.max() / size[NAMED] - 1
    )


def hindsight(frame: pd.DataFrame) -> str:
    """What the oracle takes from the distance, and adds to the score."""
    score = 100 * frame.groupby(["model", "router"])["score"].first()
    rise = {name: score[name, "oracle"] - score[name, "own"] for name in ("converted", "distilled")}
    return HINDSIGHT.format(**nearer(frame), before=rise["converted"], after=rise["distilled"])


def scores(agreement: pd.DataFrame, removal: pd.DataFrame) -> str:
    """Who ranks like Eq. 4, and what is left of the model without the neurons ranked lowest."""
    rho = agreement[agreement["score"] == "importance"].set_index("other")["rho"].sort_values()
    metric = next(n for n in removal if n not in ("order", "draw", "fraction", "loss", "guessing"))
    left = removal[removal["fraction"] == 0.75].groupby("order")[metric].mean()
    over = 100 * (left - left["importance"]).drop("importance").sort_values(ascending=False)
    return SCORES.format(
        rho=", ".join(f"{name} {x:.2f}" for name, x in rho[::-1].items()),
        kept=", ".join(f"{name} {x:+.1f}" for name, x in over.items()),
    )


def _cell_found_beyond(mean: float, low: float, high: float) -> str:
    """A difference with its interval, in bold where that excludes zero."""
    text = interval(mean, low, high)
    return f"**{text}**" if low > 0 or high < 0 else text
