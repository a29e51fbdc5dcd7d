"""A teacher's states on disk, for students that meet its sentences several times.

The teacher says the same about a sentence in every epoch and to every student, so it is asked
once a process. Its answers
(logits) are those of its head on the last state, which is always kept.
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

    They are what the teacher gives in ``dtype``, the embeddings rounded to it. In another batch
    the teacher itself adds in another order, so its states differ from these by rounding: about
    1e-6 of a state's size in float32, and 1e-2, two steps of its 8 bits, in bfloat16.

    Args:
        path: A file that is made, and has no name any more once it is mapped.
        lengths: Tokens of every example.
        layers: Which states ``X^0 .. X^L``, the last among them.
        width: ``D``.
        dtype: Of what is kept.

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
        found = torch.from_file(str(path), shared=True, size=n, dtype=dtype)
        with suppress(PermissionError):  # Windows, while it is mapped; its folder goes later
            path.unlink()  # the room is free as soon as nobody holds the states
        self.rows = found.view(-1, len(layers), width)  # (tokens, layers, D)

    def fill(self, ask: Callable[[dict], SimpleNamespace], batches: Iterable[dict]) -> None:
        """Keep what a teacher says to all batches, which have an ``index``.

        Args:
            ask: Gives the packed states ``X^0 .. X^L`` of a batch, as ``hidden_states``.
            batches: From ``data.batches``.
        """
        for batch in batches:
            hidden = ask(batch).hidden_states
            rows = torch.stack([hidden[layer].to(self.rows.dtype) for layer in self.layers], 1)
            self.rows[self._places(batch, Packing.of(batch["attention_mask"]))] = rows.cpu()

    @torch.no_grad()
    def of(self, batch: dict[str, Tensor], teacher: PreTrainedModel) -> SimpleNamespace:
        """What the teacher says to a batch: ``hidden_states`` by layer, packed, and its logits.

        Args:
            batch: ``attention_mask`` ``(B, T)`` and ``index`` ``(B,)``, the examples' numbers.
            teacher: Whose head answers; in eval mode, and it classifies sentences.
        """
        mask = batch["attention_mask"]
        packing = Packing.of(mask)
        rows = self.rows[self._places(batch, packing)].to(mask.device)
        hidden = dict(zip(self.layers, rows.unbind(1), strict=True))
        last = hidden[self.layers[-1]].to(next(teacher.parameters()).dtype)
        return SimpleNamespace(hidden_states=hidden, logits=_answers(teacher, packing, last))

    def _places(self, batch: dict[str, Tensor], packing: Packing) -> Tensor:
        """Where the file holds a batch's packed tokens, ``(N,)``."""
        examples = batch["index"][packing.sentence]
        return self.starts[examples.cpu()] + packing.position.cpu()


#: What each teacher that is still in use says to a dataset, for the students to come.
_known: WeakKeyDictionary[nn.Module, tuple[str, TeacherStates]] = WeakKeyDictionary()


def known(
    teacher: nn.Module, encoded, folder: Path | str, *, half: bool
) -> tuple[TeacherStates | None, bool]:
    """A teacher's states of all layers for all examples, and whether they are still to be filled.

    Args:
        teacher: A dense model.
        encoded: Training set from ``data.encode``.
        folder: Where there is room on the disk.
        half: Whether bfloat16 is kept.
    """
    dtype = torch.bfloat16 if half else torch.float32
    what, told = _known.get(teacher, ("", None))
    if told and what == encoded._fingerprint and told.rows.dtype == dtype:
        return told, False
    del told
    _known.pop(teacher, None)  # its room on the disk is free before new room is asked for
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = teacher.config
    layers = list(range(config.num_hidden_layers + 1))
    size = {"layers": layers, "width": config.hidden_size, "dtype": dtype}
    return TeacherStates(folder / STATES, lengths(encoded), **size), True


def remember(teacher: nn.Module, encoded, told: TeacherStates) -> None:
    """Keep what was filled as long as the teacher is in use."""
    _known[teacher] = (encoded._fingerprint, told)


def _reserve(path: Path, n_bytes: int) -> None:
    """A file of that size whose room on the disk is its own: a full disk kills who writes to it."""
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


def _answers(teacher: PreTrainedModel, packing: Packing, last: Tensor) -> Tensor:
    """The head's logits ``(B, C)`` from the last packed state ``(N, D)``."""
    first = packing.to_batch_order(last[packing.starts[:-1].long()])[:, None]  # (B, 1, D)
    return teacher.classifier(teacher.base_model.pooler(first))
