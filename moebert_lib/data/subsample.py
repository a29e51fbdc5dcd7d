"""Draw examples by their text, so that neither the order of a file nor its source matters.

An example's hash is computed from the letters and digits of its text columns, with a *salt* that
differs for each purpose. A draw of ``n`` takes the ``n`` lowest hashes: a smaller draw is a part
of a larger one, and draws with unlike salts are independent of each other. Punctuation, spaces,
capitals, accents and the column ``idx`` do not count, so copies of a dataset that differ in them
give the same examples.
"""

import hashlib
import json
import re
import unicodedata
from typing import TYPE_CHECKING

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
        without those whose text was drawn: near-duplicates are never on both sides. Examples of
        the same text are ordered by label, then by their exact text.
    """
    hashes = text_hashes(examples, task, salt)
    columns = [examples[name][:] for name in reversed(task.columns)]
    contents = [json.dumps(values) for values in zip(*columns, strict=True)]
    order = sorted(range(len(hashes)), key=lambda place: (hashes[place], contents[place]))
    drawn = {hashes[place] for place in order[:n]}
    rest = [place for place, value in enumerate(hashes) if value not in drawn]
    select = examples.select
    return select(order[:n], keep_in_memory=True), select(rest, keep_in_memory=True)
