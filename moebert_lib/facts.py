"""What a notebook needs to know of a task's data, and the tables that it measures with models.

Both are kept beside the stages of an experiment, so that a figure can be drawn again where
neither data nor models are (``archive``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moebert_lib import archive, data, weights
from moebert_lib.inputs import chosen, dataset, device
from moebert_lib.provenance import versions
from moebert_lib.settings import Settings
from moebert_lib.stages import DATA, told
from moebert_lib.tasks import TASKS, Task

TABLE = "table.parquet"


@dataclass(frozen=True)
class About:
    """A task's data in numbers.

    Attributes:
        task: The task.
        n_train: Training examples, as text: a long context may be several rows for the model.
        n_examples: Validation examples, likewise.
        n_answers: Validation answers that are judged.
        guessing: The headline metric on validation of always giving training's most frequent
            answer, 0 to 1; NaN where answers are no classes.
        digest: Of the data.
    """

    task: Task
    n_train: int
    n_examples: int
    n_answers: int
    guessing: float
    digest: str

    @property
    def metric(self) -> str:
        """Name of the headline metric."""
        return self.task.metric


def about(settings: Settings) -> About:
    """The settings' data in numbers, kept with the stages of an experiment."""

    def build(folder: Path) -> dict:
        bundle = dataset(settings)
        guess = bundle.guessing()
        return {
            "n_train": len(bundle.examples["train"]),
            "n_examples": len(bundle.examples["validation"]),
            "n_answers": len(bundle.truths()),
            "guessing": guess if guess == guess else None,
            "digest": bundle.digest,
        }

    key = {**chosen(settings, DATA), "model": settings.model}
    if not archive.named():
        hub = not settings.offline
        key |= {"data": data.digest(settings), "weights": weights.digest(settings.model, hub=hub)}
        key |= {"versions": versions()}
    row = archive.store().make("about", key, build).row
    guess = float("nan") if row["guessing"] is None else row["guessing"]
    return About(TASKS[settings.task], **{**row, "guessing": guess})


def describe(settings: Settings) -> str:
    """One line of provenance for the top of a notebook."""
    known, made = about(settings), versions()
    libraries = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers"))
    where = f"drawn from {archive.named()}" if archive.named() else f"{libraries}, {device()}"
    return (
        f"{settings.scale}: {settings.model} on {settings.task}, "
        f"{known.n_train:,} training and {known.n_examples:,} validation examples "
        f"(data {known.digest[:8]}), seed {settings.seed}, {where}"
    )


def measured(name: str, of: Any, build: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A table that a notebook measures with models or data: now, and kept with its results.

    It is measured whenever the notebook runs; only where there are results and no models is the
    kept table read.

    Args:
        name: Of the table, unlike any other of the same ``of``.
        of: What it depends on: settings, or JSON values that hold some.
        build: Measures it.

    Returns:
        What ``build`` returned, as it comes back from parquet.
    """

    def keep(folder: Path) -> dict:
        table = build()
        table.to_parquet(folder / TABLE)
        return {"rows": len(table)}

    key = {"name": name, "of": _plain(of)}
    entry = archive.store().make("table", key, keep, force=True)
    return pd.read_parquet(entry.folder / TABLE)


def _plain(of: Any) -> Any:
    """Settings as values, without where data lies."""
    if isinstance(of, Settings):
        return told(of.model_dump(exclude={"data_dir"}))
    if isinstance(of, dict):
        return {name: _plain(value) for name, value in of.items()}
    return [_plain(value) for value in of] if isinstance(of, list | tuple) else of
