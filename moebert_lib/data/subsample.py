"""Draw examples by their text, so that neither the order of a file nor its source matters.

An example's hash is computed from the letters and digits of its text columns, with a *salt* that
differs for each purpose. A draw of ``n`` takes the ``n`` lowest hashes: a smaller draw is a part
of a larger one, and draws with unlike salts are independent of each other. Punctuation, spaces,
capitals, accents and the column ``idx`` do not count, so copies of a dataset that differ in them
give the same examples.

A *manifest* lists the examples of the parts that results were made from, so that anyone can take
the same parts out of the hub's datasets (``loading.rebuild``).
"""

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from moebert_lib.config.errors import UserError
from moebert_lib.data.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset

#: Salts, one for each purpose.
CAP, HELD_OUT, SECOND_TEST = "subsample", "held out", "second test"


def normalised(text: str) -> str:
    """The letters and digits of a text, without capitals and accents.

    Example:
        >>> normalised("Café No. 5: isn't it?")
        'cafeno5isntit'
    """
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKD", text).casefold())


def text_hashes(examples: "Dataset", task: Task, salt: str) -> list[bytes]:
    """First 8 bytes of the SHA-256 of salt and :func:`normalised` text columns, by example."""
    columns = [[normalised(text) for text in examples[name]] for name in task.fields]
    texts = ("\n".join((salt, *parts)) for parts in zip(*columns, strict=True))
    return [hashlib.sha256(text.encode()).digest()[:8] for text in texts]


def draw(examples: "Dataset", n: int, salt: str, task: Task) -> "tuple[Dataset, Dataset]":
    """Draw ``n`` examples by their hash.

    Args:
        examples: With the task's columns.
        n: How many; all of them if there are fewer.
        salt: One of this module's constants.
        task: Whose text columns count.

    Returns:
        The drawn examples in the order of their hashes, and the rest in the order of ``examples``,
        without those whose letters and digits are the same as a drawn one's. A phrase and the
        sentence that contains it (SST-2) can be on both sides. Examples of the same text are
        ordered by label, then by their exact text.
    """
    hashes = text_hashes(examples, task, salt)
    columns = [examples[name][:] for name in reversed(task.columns)]
    contents = [json.dumps(values) for values in zip(*columns, strict=True)]
    order = sorted(range(len(hashes)), key=lambda place: (hashes[place], contents[place]))
    drawn = {hashes[place] for place in order[:n]}
    rest = [place for place, value in enumerate(hashes) if value not in drawn]
    select = examples.select
    return select(order[:n], keep_in_memory=True), select(rest, keep_in_memory=True)


# Manifests: which examples a part of a dataset has, as hashes and without their text.

MANIFEST = "examples.parquet"  # beside committed results
COLUMNS = ["task", "part", "split", "use", "hash", "changes"]
WITHOUT_FULL_STOPS = "full stops removed from the text columns"
OTHER_COLUMNS = "columns such as idx, id and title left out"


def row_hashes(examples: "Dataset", task: Task) -> list[bytes]:
    """8 bytes of each example's text and right answer: what a manifest knows it by."""
    texts = text_hashes(examples, task, "manifest")
    answers = map(_answer, examples[task.columns[-1]])
    pairs = (text + answer.encode() for text, answer in zip(texts, answers, strict=True))
    return [hashlib.sha256(pair).digest()[:8] for pair in pairs]


def _answer(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(sorted({normalised(text) for text in value["text"]}))
    return f"{value:.2f}"


def manifest(
    parts: "Mapping[str, Dataset]", splits: Mapping[str, str], task: Task, part: str
) -> pd.DataFrame:
    """One row an example, in the order of each part.

    Args:
        parts: Examples by use: ``train``, ``validation``, ``second_test``, ``mismatched``.
        splits: The hub's split by use.
        task: Of the examples.
        part: A name of these parts.

    Returns:
        :data:`COLUMNS`: ``hash`` of :func:`row_hashes`, and ``changes``, how the examples differ
        from the hub's rows.
    """
    frames = []
    for use, examples in parts.items():
        texts = [text for name in task.fields for text in examples[name]]
        changes = [OTHER_COLUMNS]
        if not any("." in text for text in texts):
            changes.append(WITHOUT_FULL_STOPS)
        values = {"task": task.name, "part": part, "split": splits[use], "use": use}
        frame = pd.DataFrame({"hash": row_hashes(examples, task)})
        frames.append(frame.assign(**values, changes="; ".join(changes)))
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def select(examples: "Dataset", wanted: pd.DataFrame, task: Task, source: str) -> "Dataset":
    """The examples that rows of a manifest name, in their order and changed as they say.

    Args:
        examples: All that the source has of a split.
        wanted: Rows of :func:`manifest` of one split.
        task: Of the examples.
        source: Name of the source, for the message.

    Raises:
        UserError: the source lacks some of them; it says how many.
    """
    places: dict[bytes, list[int]] = defaultdict(list)
    for place, value in reversed([*enumerate(row_hashes(examples, task))]):
        places[value].append(place)
    found = [places[value].pop() for value in wanted["hash"] if places[value]]
    if missing := len(wanted) - len(found):
        split = wanted["split"].iloc[0]
        raise UserError(
            f"{missing:,} of {len(wanted):,} examples of {task.name} are not in the "
            f"{len(examples):,} of {source}, split '{split}'; expected the same version of it"
        )
    chosen = examples.select(found, keep_in_memory=True).select_columns([*task.columns])
    if WITHOUT_FULL_STOPS not in wanted["changes"].iloc[0]:
        return chosen
    rows = chosen.to_list()
    cut = [{name: row[name].replace(".", "") for name in task.fields} for row in rows]
    return type(examples).from_list([row | texts for row, texts in zip(rows, cut, strict=True)])
