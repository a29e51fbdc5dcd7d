"""A teacher's hidden states on disk, computed once for all epochs and students of a process.

A teacher without dropout gives the same states for a sentence every time. Its logits are not
stored: they are computed by its head from the last state, which is always stored.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_lib.config.errors import UserError
from moebert_lib.data.batching import Packing, lengths

STATES = "teacher_states.bin"  # usual name of the file


class TeacherStates:
    """States ``X^l`` of the tokens of a dataset, at some layers, in a file.

    They are stored in ``dtype``. In another batch the teacher would add numbers in another order,
    so its states differ from these by rounding: about 1e-6 of a state's size in float32, and
    1e-2 (two steps of its 8 bits) in bfloat16.

    Args:
        path: A new file; its name is removed as soon as it is mapped.
        lengths: Tokens of every example.
        layers: Which states ``X^0 .. X^L``, the last among them.
        width: ``D``.
        dtype: Of the stored states.

    Raises:
        UserError: the disk has no room for it.
    """

    def __init__(
        self,
        path: Path,
        lengths: Sequence[int],
        *,
        layers: list[int],
        width: int,
        dtype: torch.dtype,
    ):
        self.layers = layers
        self.starts = torch.tensor([0, *lengths]).cumsum(0)
        n = int(self.starts[-1]) * len(layers) * width
        _reserve(path, n * dtype.itemsize)
        values = torch.from_file(str(path), shared=True, size=n, dtype=dtype)
        with suppress(PermissionError):  # Windows, while it is mapped; its folder goes later
            path.unlink()  # the disk space is free as soon as the states are no longer used
        self.rows = values.view(-1, len(layers), width)  # (tokens, layers, D)

    def fill(self, run_teacher: Callable[[dict], SimpleNamespace], batches: Iterable[dict]) -> None:
        """Store a teacher's states for all batches, which have an ``index``.

        Args:
            run_teacher: From a batch to ``hidden_states``, the packed states ``X^0 .. X^L``.
            batches: From ``batching.batches``.
        """
        for batch in batches:
            hidden = run_teacher(batch).hidden_states
            rows = torch.stack([hidden[layer].to(self.rows.dtype) for layer in self.layers], 1)
            self.rows[self._places(batch, Packing.of(batch["attention_mask"]))] = rows.cpu()

    @torch.no_grad()
    def output(self, batch: dict[str, Tensor], teacher: PreTrainedModel) -> SimpleNamespace:
        """The teacher's output for a batch: ``hidden_states`` by layer, packed, and ``logits``.

        Args:
            batch: ``attention_mask`` ``(B, T)`` and ``index`` ``(B,)``, the examples' numbers.
            teacher: Its head gives the logits; in eval mode, and it classifies sentences.
        """
        mask = batch["attention_mask"]
        packing = Packing.of(mask)
        rows = self.rows[self._places(batch, packing)].to(mask.device)
        hidden = dict(zip(self.layers, rows.unbind(1), strict=True))
        last = hidden[self.layers[-1]].to(next(teacher.parameters()).dtype)
        return SimpleNamespace(hidden_states=hidden, logits=_logits(teacher, packing, last))

    def _places(self, batch: dict[str, Tensor], packing: Packing) -> Tensor:
        """Where the file holds a batch's packed tokens, ``(N,)``."""
        examples = batch["index"][packing.sentence]
        return self.starts[examples.cpu()] + packing.position.cpu()


#: Dataset and states of each teacher that is still in use, for the next students.
_cached: WeakKeyDictionary[nn.Module, tuple[str, TeacherStates]] = WeakKeyDictionary()


def cached_states(
    teacher: nn.Module, encoded, folder: Path | str, *, half: bool
) -> tuple[TeacherStates | None, bool]:
    """A teacher's states of all layers for all examples, and whether they are new and empty.

    Args:
        teacher: A dense model.
        encoded: Training set from ``data.encode``.
        folder: For the file.
        half: Whether to store bfloat16.
    """
    dtype = torch.bfloat16 if half else torch.float32
    fingerprint, states = _cached.get(teacher, ("", None))
    if states and fingerprint == encoded._fingerprint and states.rows.dtype == dtype:
        return states, False
    del states
    _cached.pop(teacher, None)  # its disk space is free before new space is reserved
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = teacher.config
    layers = list(range(config.num_hidden_layers + 1))
    size = {"layers": layers, "width": config.hidden_size, "dtype": dtype}
    return TeacherStates(folder / STATES, lengths(encoded), **size), True


def keep_states(teacher: nn.Module, encoded, states: TeacherStates) -> None:
    """Keep filled states as long as the teacher is in use."""
    _cached[teacher] = (encoded._fingerprint, states)


def _reserve(path: Path, n_bytes: int) -> None:
    """Make a file and reserve its disk space: a write to a mapped file on a full disk is fatal."""
    free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        raise UserError(
            f"cache_teacher=True needs {n_bytes / 1e9:,.2f} GB in {path.parent}, where "
            f"{free / 1e9:,.2f} GB are free; expected cache_teacher=False or "
            "fewer examples"
        )
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate") and n_bytes:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        else:
            file.truncate(n_bytes)


def _logits(teacher: PreTrainedModel, packing: Packing, last: Tensor) -> Tensor:
    """The head's logits ``(B, C)`` from the last packed state ``(N, D)``."""
    first = packing.to_batch_order(last[packing.starts[:-1].long()])[:, None]  # (B, 1, D)
    if pooler := getattr(teacher.base_model, "pooler", None):  # BERT
        return teacher.classifier(pooler(first))
    if hasattr(teacher, "pre_classifier"):  # DistilBERT
        return teacher.classifier(teacher.pre_classifier(first[:, 0]).relu())
    return teacher.classifier(first)  # RoBERTa, ELECTRA, MPNet
