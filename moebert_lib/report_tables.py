"""The tables of a report: what CSV and markdown files hold, as rows of text."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

MOST_ROWS = 40  # shown of a CSV; the file has all


@dataclass(frozen=True)
class Grid:
    """A table of strings; ``right`` says which columns hold numbers."""

    head: list[str]
    rows: list[list[str]]
    right: list[bool]


def read_markdown(path: Path) -> tuple[str, Grid]:
    """The prose around a markdown file's table, and the table."""
    lines = path.read_text("utf-8").splitlines()
    cells = [
        [cell.strip().replace("**", "") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in lines
        if line.lstrip().startswith("|")
    ]
    prose = " ".join(line.strip("*# ") for line in lines if line and not line.startswith("|"))
    rule = cells[1] if len(cells) > 1 else []
    right = [mark.endswith(":") for mark in rule]
    return prose, Grid(cells[0] if cells else [], cells[2:], right)


def read_csv(path: Path) -> Grid:
    """The first rows of a CSV, numbers shortened to four digits."""
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    right = [all(_is_number(row[i]) for row in rows if len(row) > i) for i in range(len(head))]
    shown = [[_short(cell) for cell in row] for row in rows[:MOST_ROWS]]
    if len(rows) > MOST_ROWS:
        shown.append([f"... {len(rows) - MOST_ROWS} more rows in the file"])
    return Grid(head, shown, right)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*([eE][-+]?\d+)?|nan|inf)?", text) is not None


def _short(text: str) -> str:
    return f"{float(text):.4g}" if "." in text and _is_number(text) else text
