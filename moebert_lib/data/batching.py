"""Batches of tokenised examples, and taking the padding out of a batch.

A batch holds a number of examples or of tokens. :class:`Packing` makes a padded batch one row of
real tokens. Sentences follow one another, shortest first, so that those of one length are a plain
``(n, T, ...)`` view, and attention reads and writes the row without moving anything.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TARGETS = ("labels", "start_positions", "end_positions")  # what a model's loss is computed from


def without_targets(batch: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """What a model is given to predict from."""
    return {name: value for name, value in batch.items() if name not in (*TARGETS, "index")}


def batches(
    encoded: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    *,
    device: Any = "cpu",
    sort: bool = True,
    max_tokens: int | None = None,
) -> "Iterator[dict[str, Tensor]]":
    """Batches padded to their longest example, each example once.

    Args:
        encoded: From ``loading.encode``.
        tokenizer: Gives the padding token.
        batch_size: The last batch may be smaller.
        device: Where the tensors go.
        sort: Shortest first, which spares padding; else in the dataset's order.
        max_tokens: Tokens in a batch, padding not counted, instead of ``batch_size`` examples.

    Yields:
        ``input_ids``, ``attention_mask``, ``token_type_ids`` of shape ``(B, T)``; ``labels``, or
        ``start_positions`` and ``end_positions``, ``(B,)``, where the dataset has them; and
        ``index`` ``(B,)``, the positions in ``encoded``.
    """
    padding = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    order, tokens = list(range(len(encoded))), lengths(encoded)
    if sort:
        order.sort(key=tokens.__getitem__)  # stable: equal lengths keep their order
    starts = range(0, len(order), batch_size)
    parts = [order[start : start + batch_size] for start in starts]
    parts = within(order, tokens, max_tokens) if max_tokens else parts
    used = [name for name in encoded.column_names if name in (*padding, *TARGETS)]
    encoded = encoded.select_columns(used)
    for index in parts:
        rows = encoded[index]
        batch = {
            name: pad_sequence([torch.tensor(row) for row in rows[name]], True, value)
            for name, value in padding.items()
            if name in rows
        }
        batch |= {name: torch.tensor(rows[name]) for name in TARGETS if name in rows}
        batch["index"] = torch.tensor(index)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def lengths(encoded: "Dataset") -> list[int]:
    """Tokens of every example."""
    if "length" in encoded.column_names:
        return encoded["length"][:]
    return [len(ids) for ids in encoded["input_ids"][:]]


def within(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Examples one after another in batches of at most so many tokens.

    A longer example is a batch by itself.

    Example:
        >>> within([2, 0, 1], [4, 9, 3], max_tokens=8)
        [[2, 0], [1]]
    """
    parts, room = [], -1
    for example in order:
        room -= lengths[example]
        if room < 0:
            parts.append([])
            room = max_tokens - lengths[example]
        parts[-1].append(example)
    return parts


class TokenBatches:
    """A sampler of batches for training: examples of similar length up to a number of tokens.

    Every example is in one batch of an epoch. Examples of one length are mixed anew and batches
    are shuffled, from torch's random state; number and sizes of batches never change.

    Args:
        lengths: Tokens of every example.
        max_tokens: Of a batch, padding not counted.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int):
        self.lengths, self.max_tokens = lengths, max_tokens

    def __len__(self) -> int:
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        return len(within(order, self.lengths, self.max_tokens))

    def __iter__(self) -> Iterator[list[int]]:
        # A generator, so that random numbers are drawn with the first batch: torch's DataLoader
        # draws one of its own before it, also where a resumed training skips batches.
        shuffled = torch.randperm(len(self.lengths)).tolist()
        order = sorted(shuffled, key=self.lengths.__getitem__)
        parts = within(order, self.lengths, self.max_tokens)
        for place in torch.randperm(len(parts)).tolist():
            yield parts[place]


HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Packing:
    """Where the ``N`` real tokens of a padded batch ``(B, T)`` stand in the row.

    Attributes:
        places: Place of each in the flattened batch, ``(N,)``, int64.
        sentence: Row of the batch that each belongs to, ``(N,)``.
        position: Column of each, ``(N,)``: where position embeddings count from.
        order: Rows of the batch, shortest first, ``(B,)``.
        lengths: Real tokens of each, in that order; a list, since kernels want numbers.
        shape: ``(B, T)``.
    """

    places: Tensor
    sentence: Tensor
    position: Tensor
    order: Tensor
    lengths: list[int]
    shape: tuple[int, int]
    _kept: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, mask: Tensor) -> "Packing":
        """The packing of an attention mask ``(B, T)``, 1 for real tokens."""
        B, T = mask.shape
        mask = mask.bool()
        lengths, order = mask.sum(1).sort(stable=True)
        row, position = mask[order].nonzero(as_tuple=True)
        sentence = order[row]
        return cls(sentence * T + position, sentence, position, order, lengths.tolist(), (B, T))

    def __len__(self) -> int:
        return len(self.places)

    def pack(self, padded: Tensor) -> Tensor:
        """``(B, T, ...)`` to ``(N, ...)``."""
        return padded.flatten(0, 1).index_select(0, self.places)

    def unpack(self, packed: Tensor) -> Tensor:
        """``(N, ...)`` to ``(B, T, ...)``, with zeros at padding."""
        B, T = self.shape
        padded = packed.new_zeros(B * T, *packed.shape[1:])
        return padded.index_copy(0, self.places, packed).view(B, T, *packed.shape[1:])

    def sums(self, packed: Tensor) -> Tensor:
        """Sum over each sentence's tokens, in the batch's order: ``(N, D)`` to ``(B, D)``."""
        total = packed.new_zeros(self.shape[0], packed.shape[1])
        return total.index_add(0, self.sentence, packed)

    def means(self, packed: Tensor) -> Tensor:
        """Mean over each sentence's tokens: ``(N, D)`` to ``(B, D)``."""
        counts = torch.bincount(self.sentence, minlength=self.shape[0]).clamp(min=1)
        return self.sums(packed) / counts[:, None].to(packed.dtype)

    @property
    def starts(self) -> Tensor:
        """Where sentences begin in the row, and its end: ``(B + 1,)``, int32, shortest first."""
        if "starts" not in self._kept:
            ends = torch.tensor([0, *self.lengths], device=self.places.device).cumsum(0)
            self._kept["starts"] = ends.int()
        return self._kept["starts"]

    def to_batch_order(self, rows: Tensor) -> Tensor:
        """One row a sentence, shortest first, put into the batch's order."""
        return torch.empty_like(rows).index_copy(0, self.order, rows)

    def alike(self) -> list[tuple[int, int]]:
        """Runs of sentences of one length: how many, and the length."""
        if "alike" not in self._kept:
            runs = [(len([*run]), length) for length, run in groupby(self.lengths) if length]
            self._kept["alike"] = runs
        return self._kept["alike"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of every sentence to itself.

    On a GPU in half precision this is torch's kernel for sequences of several lengths; else, and
    with a bias, sentences of one length go together through ``scaled_dot_product_attention``.

    Args:
        q: Queries of ``H`` heads, ``(N, H, d)``; or of each sentence's first token alone,
            ``(B, H, d)``, shortest sentence first.
        k: Keys of all tokens, ``(N, H, d)``.
        v: Values, likewise.
        packing: Whose sentences.
        dropout: Of attention's probabilities.
        bias: Added to the scores of a query's and a key's place, ``(H, T, T)``.

    Returns:
        A row for each query, ``H * d`` wide.
    """
    first = len(q) != len(k)
    varlen = q.is_cuda and q.dtype in HALF and not dropout and bias is None
    if varlen and _has_varlen(q.device, q.shape[-1]):
        from torch.nn.attention.varlen import varlen_attn

        longest, starts = packing.lengths[-1], packing.starts
        asking = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) if first else starts
        return varlen_attn(q, k, v, asking, starts, 1 if first else longest, longest).flatten(1)
    pieces, asked, start = [], 0, 0
    for n, T in packing.alike():
        wide, end = 1 if first else T, start + n * T
        mine = q[asked : asked + n * wide].unflatten(0, (n, wide)).transpose(1, 2)  # (n, H, T, d)
        others = (x[start:end].unflatten(0, (n, T)).transpose(1, 2) for x in (k, v))
        added = None if bias is None else bias[None, :, :wide, :T].to(q.dtype)
        context = F.scaled_dot_product_attention(mine, *others, added, dropout_p=dropout)
        pieces.append(context.transpose(1, 2).reshape(n * wide, -1))
        asked, start = asked + n * wide, end
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@functools.cache
def _has_varlen(device: torch.device, head_size: int) -> bool:
    """Whether torch's kernel for several lengths runs there: flash attention's demands."""
    if not torch.backends.cuda.is_flash_attention_available():
        return False
    fits = head_size % 8 == 0 and head_size <= 256
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)
