"""What the page of findings says of questions that the paper does not ask."""

from pathlib import Path

import pandas as pd

from moebert_lib.found_rows import interval
from moebert_lib.intervals import student
from moebert_lib.oracle import nearer

GAPS, BEYOND, ORACLE = "04_construction_gaps.csv", "05_beyond.csv", "05_oracle.csv"
AGREEMENT, REMOVAL = "01_score_agreement.csv", "01_score_removal.csv"
NAMED = "hash-random"  #: what other routers are held against

HEAD = """
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

ROUTERS = """
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
        parts.append(routers(runs, task))
        n += runs["name"].nunique() - 1
    if (figures / ORACLE).is_file():
        parts.append(hindsight(pd.read_csv(figures / ORACLE)))
    if (figures / REMOVAL).is_file() and (figures / AGREEMENT).is_file():
        parts.append(scores(pd.read_csv(figures / AGREEMENT), pd.read_csv(figures / REMOVAL)))
    return "".join([HEAD.format(n=n, luck=0.05 * n), *parts]) if parts else ""


def constructions(tables: dict[str, pd.DataFrame]) -> str:
    """A row for each construction, a column for each task: its difference to the deal."""
    lines = [f"| construction | {' | '.join(tables)} |", "|:--" + "|--:" * len(tables) + "|"]
    each = {task: table.set_index("name") for task, table in tables.items()}
    for name in next(iter(each.values())).index:
        rows = [table.loc[name] for table in each.values()]
        if not all(row.isna()["difference"] for row in rows):
            cells = (_cell(row["difference"], row["low"], row["high"]) for row in rows)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def routers(runs: pd.DataFrame, task: str) -> str:
    """Each router's difference to hash-random, and what a second expert costs."""
    metric = next(name for name in runs if name not in ("name", "seed", "effective_parameters"))
    wide = 100 * runs.pivot(index="seed", columns="name", values=metric)[runs["name"].unique()]
    gaps = wide.sub(wide.pop(NAMED), axis=0)
    told = (f"{name} {_cell(gap.mean(), *student(gap))}" for name, gap in gaps.items())
    size = runs.groupby("name")["effective_parameters"].first()
    return ROUTERS.format(task=task, rows="; ".join(told), more=size.max() / size[NAMED] - 1)


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


def _cell(mean: float, low: float, high: float) -> str:
    """A difference with its interval, in bold where that excludes zero."""
    text = interval(mean, low, high)
    return f"**{text}**" if low > 0 or high < 0 else text
