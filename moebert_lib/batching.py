"""Encoded examples in batches: by number or by tokens, in order or drawn anew every epoch."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

# datasets and torch take seconds to import; a refusal should not wait for them.
if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
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
        encoded: From ``data.encode``.
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
    import torch
    from torch.nn.utils.rnn import pad_sequence

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
    """A sampler of batches for training: examples of like length up to a number of tokens.

    Every example is in one batch of an epoch. Examples of one length are dealt anew and batches
    are shuffled, from torch's random state; number and sizes of batches never change.

    Args:
        lengths: Tokens of every example.
        max_tokens: Of a batch, padding not counted.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int):
        self.lengths, self.max_tokens = lengths, max_tokens

    def __len__(self) -> int:
        return len(
            within(
                sorted(range(len(self.lengths)), key=self.lengths.__getitem__),
                self.lengths,
                self.max_tokens,
            )
        )

    def __iter__(self) -> Iterator[list[int]]:
        import torch

        # A generator, so that random numbers are drawn with the first batch: torch's DataLoader
        # draws one of its own before it, also where a resumed training skips batches.
        shuffled = torch.randperm(len(self.lengths)).tolist()
        order = sorted(shuffled, key=self.lengths.__getitem__)
        parts = within(order, self.lengths, self.max_tokens)
        for place in torch.randperm(len(parts)).tolist():
            yield parts[place]
