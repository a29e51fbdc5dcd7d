"""The importance files of the paper's release, read without running anything in them.

They are pickles, and a pickle is a program: loading a file from elsewhere may run whatever it
names. So the program is read first, and only one that builds plain lists of numbers, of a
sensible size, is let through. A file holds a dictionary of ``importance``, for each layer its
scores from the highest to the lowest, and ``idx``, the neurons they belong to.
"""

import hashlib
import io
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moebert_lib.config.errors import UserError
from moebert_lib.config.paper_numbers import TABLE5, TABLE6
from moebert_lib.config.settings import Settings
from moebert_lib.method import rank_stability
from moebert_lib.method.importance import Importance

MAX_BYTES = 4_000_000  # BERT-large's 24 layers of 4096 neurons take 1.2 million
MAX_LISTS = 1000
MAX_CELLS = 200_000  # a list can stand in many places: a small file could fill memory
MAX_MEMO = 100_000

#: What a pickle needs for a dictionary of lists of numbers, and nothing else.
PLAIN = frozenset(
    "PROTO FRAME MARK STOP EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS BINFLOAT BININT "
    "BININT1 BININT2 BINUNICODE SHORT_BINUNICODE BINPUT LONG_BINPUT MEMOIZE BINGET "
    "LONG_BINGET".split()
)


class Shares(NamedTuple):
    """What the paper's proportions make of importance: parts of all layers' sum, 0 to 1."""

    shared: float  #: held by the neurons that all experts get, a sixth
    kept: float  #: held by these and the ones dealt out, half
    dropped: float  #: held by the rest


def shares(importance: Importance) -> Shares:
    """Importance held by the top sixth, the kept half and the dropped half (512 and 1536 of 3072).

    Neurons are chosen within each layer, and layers count by how much importance they hold.
    """
    weights = importance.scores.sum(-1) / importance.scores.sum()  # (L,)
    n_shared, n_kept = proportions(importance.scores.shape[1])
    shared, kept = (float(importance.mass(top) @ weights) for top in (n_shared, n_kept))
    return Shares(shared, kept, 1 - kept)


def mass_curves(files: Mapping[str, Importance]) -> pd.DataFrame:
    """Importance that the top neurons of every layer hold, for scores of any width.

    Args:
        files: Scores by name.

    Returns:
        101 rows, indexed by ``neurons, %``; a column for each name, in % of all layers' sum.
    """
    percent = np.arange(101)
    curves = {}
    for name, importance in files.items():
        ordered = importance.scores.sort(dim=1, descending=True).values.sum(0).numpy()  # (F,)
        held = np.r_[0, np.cumsum(ordered)] / ordered.sum()
        curves[name] = 100 * np.interp(percent, np.linspace(0, 100, len(held)), held)
    return pd.DataFrame(curves, pd.Index(percent, name="neurons, %"))


def overlaps(scored: Mapping[str, Importance]) -> tuple[pd.DataFrame, np.ndarray, float]:
    """How far the top sixths of all scores that have the first one's shape are the same neurons.

    Returns:
        :func:`~moebert_lib.stability.jaccard_table`, its pairs alone, and the overlap by chance.
    """
    shape = next(iter(scored.values())).scores.shape
    same = {name: one for name, one in scored.items() if one.scores.shape == shape}
    n_shared, _ = proportions(shape[1])
    square = rank_stability.jaccard_table(same, n_shared)
    pairs = square.to_numpy()[np.triu_indices(len(square), k=1)]
    return square, pairs, rank_stability.jaccard_chance(n_shared, shape[1])


def proportions(width: int) -> tuple[int, int]:
    """``(shared, kept)`` neurons of a layer of ``width`` at the paper's proportions.

    Four experts of a quarter of the layer, two thirds of each shared.

    Example:
        >>> proportions(3072)
        (512, 1536)
    """
    n_experts = Settings.model_fields["n_experts"].default
    size, shared = Settings().sizes(width)
    return shared, shared + n_experts * (size - shared)


def read(path: str | Path) -> Importance:
    """A file of the release as scores, in the neurons' own order; equal ones may swap ranks.

    How many examples were scored is not in the file: ``n_examples`` is ``None``, there are no
    blocks, and nothing can be resampled.

    Raises:
        UserError: no such file, one that is no plain dictionary of numbers or too large, or
            numbers that are no importance scores. Nothing in it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}; expected a pickle such as importance_rte.pkl")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    scores = _scores(_unpickle(content, path), path)
    empty = torch.zeros(0, *scores.shape, dtype=scores.dtype)
    meta = {"source": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    return Importance(scores, empty, torch.zeros(0, dtype=torch.int64), meta)


def read_folder(folder: str | Path) -> dict[str, Importance]:
    """All ``importance_TASK.pkl`` of a folder by task; an empty name is no folder, no files.

    Raises:
        UserError: no such folder, none of the files in it, or one that :func:`read` refuses.
    """
    if not str(folder):
        return {}
    paths = sorted(Path(folder).expanduser().glob("importance_*.pkl"))
    if not paths:
        raise UserError(f"no importance_*.pkl in {folder}; name the folder that holds them")
    return {path.stem.removeprefix("importance_"): read(path) for path in paths}


class _PlainUnpickler(pickle.Unpickler):
    """Knows no class and no function: the second lock, should the first one be wrong."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside")


def _unpickle(content: bytes, path: Path) -> Any:
    if len(content) > MAX_BYTES:
        raise UserError(
            f"{path} is larger than {MAX_BYTES / 1e6:.0f} MB; "
            "an importance file of BERT-large takes 1.2"
        )
    try:
        _check_program(content)
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # whatever a broken or hostile file provokes
        raise UserError(
            f"{path} was not read: {error}; expected a pickle of plain lists of numbers"
        ) from None


def _check_program(content: bytes) -> None:
    """Read the pickle's instructions without following them."""
    lists, end = 0, 0
    for opcode, argument, position in pickletools.genops(content):
        name = opcode.name
        if name not in PLAIN:
            named = f" {argument}" if isinstance(argument, str) else ""
            raise ValueError(f"it asks for more than numbers ({name}{named[:60]})")
        lists += name in ("EMPTY_LIST", "EMPTY_DICT")
        if lists > MAX_LISTS:
            raise ValueError(f"it holds more than {MAX_LISTS} lists")
        if name in ("BINPUT", "LONG_BINPUT") and argument > MAX_MEMO:
            raise ValueError(f"it numbers more than {MAX_MEMO:,} objects")
        end = position + 1
    if end != len(content):
        raise ValueError(f"{len(content) - end} bytes follow its end")


def _scores(found: Any, path: Path) -> Tensor:
    """Check what was read, and put each score at its neuron's place: ``(L, F)``, float64."""

    def refuse(why: str) -> NoReturn:
        raise UserError(f"{path} holds no importance scores: {why}")

    if not isinstance(found, dict) or set(found) != {"importance", "idx"}:
        refuse("expected a dictionary of 'importance' and 'idx'")
    for name, kind in (("importance", float), ("idx", int)):
        rows = found[name]
        if isinstance(rows, list) and sum(len(r) for r in rows if isinstance(r, list)) > MAX_CELLS:
            refuse(f"'{name}' has more than {MAX_CELLS:,} numbers")
        if not _is_table(rows, kind):
            refuse(f"'{name}' must be lists of {kind.__name__}s, all of one length")
    values = torch.tensor(found["importance"], dtype=torch.float64)  # (L, F)
    neurons = torch.tensor(found["idx"], dtype=torch.int64)
    if values.shape != neurons.shape:
        refuse(f"{tuple(values.shape)} scores for {tuple(neurons.shape)} neurons")
    if not values.isfinite().all() or (values < 0).any():
        refuse("a score is negative or not finite")
    if (values.diff(dim=1) > 0).any():
        refuse("scores must stand from the highest to the lowest")
    if not torch.equal(neurons.sort(1).values, torch.arange(values.shape[1]).expand_as(neurons)):
        refuse(f"'idx' must name each of the {values.shape[1]} neurons of a layer once")
    if not values[:, 0].all():
        refuse("a layer has no score above zero")
    return torch.zeros_like(values).scatter(1, neurons, values)


def _is_table(rows: Any, kind: type) -> bool:
    if not (isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)):
        return False
    same = len({len(row) for row in rows}) == 1 and len(rows[0]) > 0
    return same and all(type(value) is kind for row in rows for value in row)


def per_example(files: Mapping[str, Importance]) -> pd.DataFrame:
    """A file's sum of scores over the number of examples of its task (Tables 5 and 6).

    The files don't say which examples were scored. The mean score of an example should not
    differ wildly between tasks, so the split whose sizes make these numbers alike is the likelier.

    Args:
        files: Scores by task; tasks that the paper does not list are left out.

    Returns:
        Columns ``task``, ``training`` and ``development``.
    """
    sizes = TABLE6 | TABLE5
    known = {task: float(files[task].scores.sum()) for task in sizes if task in files}
    rows = [(task, *(total / n for n in sizes[task])) for task, total in known.items()]
    return pd.DataFrame(rows, columns=["task", "training", "development"])
