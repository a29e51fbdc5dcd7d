"""The equivalence receipt beside a shipped model: what was checked on it, and its digests.

The checks are those of the notebooks, run on this very model and on sentences of its task. The
file ``receipt.json`` names each with the largest difference found, and the SHA-256 of everything
that lies beside it, so that a model that was changed later no longer fits its receipt.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertModel, PreTrainedModel

from moebert_lib import checks, checks_model, onnx_file
from moebert_lib.convert import to_moebert
from moebert_lib.disk import write_json
from moebert_lib.importance import Importance
from moebert_lib.packed import accelerate
from moebert_lib.provenance import checksums, commit, file_digest, versions
from moebert_lib.settings import UserError

FILE = "receipt.json"
FLOAT32 = 1e-4  # two ways of computing in float32, on logits of a few units
#: Written after the receipt, or not by us.
BESIDE = (FILE, "README.md", ".gitattributes")


def checked(
    dense: PreTrainedModel, scores: Importance, untrained: PreTrainedModel,
    model: PreTrainedModel, folder: Path, batch: dict[str, Tensor],
) -> list[dict]:  # fmt: skip
    """Run every check that fits the model; a row each, also of those that fail.

    Args:
        dense: The model that was converted.
        scores: Of its neurons.
        untrained: Its conversion.
        model: What is shipped, trained or not.
        folder: Where it was saved; ``model.onnx`` is held against it where it is there.
        batch: Inputs of at least two sentences of several lengths.

    Returns:
        Rows with ``claim``, ``difference``, ``tolerance`` and ``holds``.
    """
    saved = type(model).from_pretrained(folder).to(model.device)
    same = partial(checks_model.same_logits, batch=batch)
    runs = [
        lambda: checks.one_expert_is_dense(dense, to_moebert(dense, scores, n_experts=1), batch),
        lambda: checks.permuting_neurons_changes_nothing(dense, batch),
        lambda: checks_model.experts_hold_the_dense_neurons(untrained, dense),
        lambda: checks.padding_changes_nothing(model, batch),
        lambda: same("saved and loaded, the model answers bit for bit", model, saved, tolerance=0),
    ]
    packs = isinstance(dense.base_model, BertModel) and not model.config.padding_in_balance
    if packs:  # else packing knows no way, or would leave padding out
        runs.append(lambda: same("accelerated, the model answers the same", model,
                                 accelerate(model), tolerance=FLOAT32))  # fmt: skip
    if model.config.routing.startswith("hash"):
        runs += [lambda: checks_model.same_token_same_expert(model, batch),
                 lambda: checks_model.training_leaves_tables(untrained, model)]  # fmt: skip
    else:
        runs.append(lambda: checks_model.gate_takes_its_favourite(model, batch))
    if (folder / onnx_file.FILE).is_file():
        runs.append(lambda: _onnx_agrees(model, folder / onnx_file.FILE, batch))
    return [_row(run) for run in runs]


def write(folder: Path, rows: list[dict], **about: object) -> dict:
    """Write the receipt of a folder's files; ``about`` says what they were made from.

    Returns:
        What was written.
    """
    held = {name: sha for name, sha in checksums(folder).items() if name not in BESIDE}
    receipt = {
        "checks": rows, **about, "files": held, "versions": versions(), "commit": commit(),
    }  # fmt: skip
    write_json(folder / FILE, receipt)
    return receipt


def verify(folder: Path | str) -> dict:
    """The receipt of a folder, if all of its checks hold and its files are those it names.

    Raises:
        UserError: naming the check or the file.
    """
    folder = Path(folder)
    try:
        receipt = json.loads((folder / FILE).read_text("utf-8"))
        rows, files = receipt["checks"], receipt["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} holds no {FILE} that can be read; expected a folder that "
                        "moebert convert wrote") from None  # fmt: skip
    for row in rows:
        if not row["holds"]:
            raise UserError(f"{folder} fails its receipt: {row['claim']} (largest difference "
                            f"{row['difference']}, tolerance {row['tolerance']})")  # fmt: skip
    for name, expected in files.items():
        found = file_digest(folder / name) if (folder / name).is_file() else "missing"
        if found != expected:
            raise UserError(f"{folder / name} is not the file of its receipt: {found[:12]}, "
                            f"expected SHA-256 {expected[:12]}; convert again")  # fmt: skip
    return receipt


def table(receipt: dict) -> str:
    """The checks as a Markdown table."""
    lines = ["| check | largest difference | tolerance | |", "|---|---|---|---|"]
    for row in receipt["checks"]:
        apart = "unknown" if row["difference"] is None else f"{row['difference']:.1e}"
        allowed = "" if row["tolerance"] is None else f"{row['tolerance']:.0e}"
        verdict = "holds" if row["holds"] else "**FAILS**"
        lines.append(f"| {row['claim']} | {apart} | {allowed} | {verdict} |")
    return "\n".join(lines)


def _row(run: Callable[[], checks.Check]) -> dict:
    """A check's result; a failing one says the same in what it raises."""
    try:
        found, holds = run(), True
    except AssertionError as error:
        found, holds = error.args[0], False
    if not isinstance(found, checks.Check):
        return {"claim": str(found), "difference": None, "tolerance": None, "holds": holds}
    finite = found.difference if found.difference < float("inf") else None
    return {
        "claim": found.claim, "difference": finite, "tolerance": found.tolerance, "holds": holds,
    }  # fmt: skip


def _onnx_agrees(model: PreTrainedModel, path: Path, batch: dict[str, Tensor]) -> checks.Check:
    """ONNX Runtime against PyTorch: the whole batch, its first sentence alone, and two of them."""
    mask, gaps = batch["attention_mask"].bool(), []
    for n in (len(mask), 1, 2):
        longest = int(mask[:n].sum(1).max())
        some = {name: values[:n, :longest] for name, values in batch.items()}
        with torch.no_grad():
            output = model(**some)
        ours = output.get("logits")
        if ours is None:
            ours = torch.stack([output["start_logits"], output["end_logits"]], -1)
        apart = (onnx_file.answers(path, some) - ours.cpu()).abs()
        real = some["attention_mask"].bool().cpu()
        gaps.append(float((apart if "logits" in output else apart[real]).max()))
    claim = "the ONNX graph answers as the model, whatever the batch and its length"
    return checks.equal(claim, gaps, [0.0] * len(gaps), tolerance=FLOAT32)
