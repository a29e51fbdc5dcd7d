"""How active each neuron is, how large its weights are, and which tokens excite it most.

One forward pass of the teacher over the scored examples. With activation ``h_tj`` of neuron
``j`` at token ``t``, two further scores stand beside Eq. 4's: the mean of ``|h_tj|`` over real
tokens, and ``|w1_j| |w2_j|``, the norms of the neuron's column of W1 and row of W2. Neither knows
the loss, and the paper uses neither: they show that being active or large is not being important.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moebert_lib import archive
from moebert_lib.adapters import ffns, watching
from moebert_lib.batching import without_targets
from moebert_lib.inputs import dataset
from moebert_lib.scores import magnitudes
from moebert_lib.settings import Settings
from moebert_lib.store import code_digest
from moebert_lib.teachers import importance_key, teacher

EXAMPLES = 400  # at most; enough that most neurons meet something they answer to
TOP = 6  # examples kept for each neuron, at its best token of each


@dataclass(frozen=True)
class Excitation:
    """What one forward pass says of ``L`` layers of ``F`` neurons.

    Attributes:
        mean: Mean of ``|h|`` over real tokens, ``(L, F)``.
        magnitude: ``|w1| |w2|``, ``(L, F)``.
        top: Highest activation in each of the ``k`` examples that excite a neuron most,
            highest first, ``(L, F, k)``; ``k`` is at most :data:`TOP`.
        example: Which example that was, ``(L, F, k)``: a row of ``tokens``.
        token: And which of its tokens, ``(L, F, k)``.
        tokens: The examples as lists of word pieces.
    """

    mean: Tensor
    magnitude: Tensor
    top: Tensor
    example: Tensor
    token: Tensor
    tokens: list[list[str]]

    def contexts(self, layer: int, neuron: int, *, around: int = 6) -> list[tuple]:
        """The tokens that excite a neuron, each between what stands before and after it.

        Args:
            layer: Counted from 0.
            neuron: Counted from 0.
            around: Word pieces on either side.

        Returns:
            ``(activation, before, token, after)`` for each of the ``k`` examples.
        """
        found = []
        for value, row, place in zip(
            self.top[layer, neuron].tolist(),
            self.example[layer, neuron].tolist(),
            self.token[layer, neuron].tolist(),
            strict=True,
        ):
            pieces, end = self.tokens[row], place + 1
            while place > 0 and pieces[place].startswith("##"):
                place -= 1
            while end < len(pieces) and pieces[end].startswith("##"):
                end += 1  # a word is shown whole
            start = max(0, place - around)
            before = ("... " if start else "") + joined(pieces[start:place])
            after = joined(pieces[end : end + around])
            after += " ..." if end + around < len(pieces) else ""
            found.append((value, before, joined(pieces[place:end]), after))
        return found


def joined(pieces: list[str]) -> str:
    """Word pieces as text.

    Example:
        >>> joined(["the", "im", "##port", "works"])
        'the import works'
    """
    return " ".join(pieces).replace(" ##", "").removeprefix("##")


def excite(model: nn.Module, batches, *, top: int = TOP) -> dict[str, Tensor]:
    """The tensors of an :class:`Excitation`, whose examples are numbered by ``index``.

    Args:
        model: An encoder with dense feed-forward layers; used in eval mode.
        batches: From ``data.batches``.
        top: Examples to keep for each neuron; fewer where there are fewer.
    """
    layers, training = [*ffns(model)], model.training
    flows: dict[int, Tensor] = {}
    totals, n_tokens, best = [0] * len(layers), 0, [None] * len(layers)
    try:
        for batch in batches:
            with watching(model.eval(), flows.__setitem__), torch.inference_mode():
                model(**without_targets(batch))
            real = batch["attention_mask"].bool()[..., None]  # (B, T, 1)
            n_tokens += int(real.sum())
            for n, h in flows.items():  # (B, T, F)
                totals[n] = totals[n] + (h.abs() * real).sum((0, 1), dtype=torch.float64).cpu()
                best[n] = _merge(best[n], h.masked_fill(~real, -torch.inf), batch["index"], top)
    finally:
        model.train(training)
    value, example, token = (torch.stack(found) for found in zip(*best, strict=True))
    return {
        "mean": torch.stack(totals) / n_tokens,
        "magnitude": magnitudes(layers),
        "top": value,
        "example": example.int(),
        "token": token.short(),
    }


def _merge(best: tuple | None, h: Tensor, index: Tensor, top: int) -> tuple[Tensor, ...]:
    """The ``top`` examples so far, by each one's best token: three tensors ``(F, k)``."""
    value, token = (found.T.cpu() for found in h.max(1))  # (F, B)
    new = (value, index.cpu().expand_as(token), token)
    if best is not None:
        new = tuple(torch.cat(pair, -1) for pair in zip(best, new, strict=True))
    value, order = new[0].topk(min(top, new[0].shape[-1]))
    return value, new[1].gather(-1, order), new[2].gather(-1, order)


def excitation_key(scored: dict) -> dict:
    """What the pass depends on, given what the importance scores depend on."""
    return {
        "importance": scored,
        "examples": EXAMPLES,
        "top": TOP,
        "code": code_digest("excitation", "scores"),
    }


def excitation(settings: Settings) -> Excitation:
    """What excites the teacher's neurons, from the store or found now.

    The examples are the first :data:`EXAMPLES` of those that Eq. 4 was scored on.
    """

    def build(folder: Path) -> dict:
        dense, bundle = teacher(settings).model, dataset(settings)
        n = min(EXAMPLES, settings.importance_examples or EXAMPLES)
        rows = bundle.rows(settings.importance_split, n, shuffle=True)
        batches = bundle.batches(settings.importance_split, batch_size=32, limit=n, shuffle=True)
        save_file(excite(dense, batches), folder / "excitation.safetensors")
        pieces = [bundle.tokenizer.convert_ids_to_tokens(ids) for ids in rows["input_ids"][:]]
        (folder / "tokens.json").write_text(json.dumps(pieces), "utf-8")
        return {"n_examples": len(pieces)}

    entry = archive.store().make("excitation", excitation_key(importance_key(settings)), build)
    print(f"· excitation for {settings.task}: {entry.origin}", flush=True)
    return read(entry.folder)


def read(folder: Path) -> Excitation:
    """A stored pass."""
    tokens = json.loads((folder / "tokens.json").read_text("utf-8"))
    return Excitation(**load_file(folder / "excitation.safetensors"), tokens=tokens)
