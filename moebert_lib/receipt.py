"""The equivalence receipt beside a shipped model: what was checked on it, and its digests.

The checks are those of the notebooks, on sentences of the model's task. The file ``receipt.json``
names each with what it was run on (the model that is shipped, its conversion made again, the dense
model) and the largest difference found; the metrics; and the SHA-256 of everything that lies
beside it, so that a model or a card that was changed later no longer fits. It is not signed: who
rewrites receipt, card and model together is found by running the checks again.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import metadata_load
from torch import Tensor
from transformers import BertModel, PreTrainedModel
from yaml import YAMLError

from moebert_lib import checks, checks_model, onnx_file
from moebert_lib.convert import to_moebert
from moebert_lib.disk import write_json
from moebert_lib.errors import UserError
from moebert_lib.importance import Importance
from moebert_lib.packed import accelerate
from moebert_lib.provenance import checksums, commit, file_digest, versions

FILE, CARD = "receipt.json", "README.md"
FLOAT32 = 1e-4  # two ways of computing in float32, on logits of a few units
#: Written after the receipt, or not by us.
BESIDE = (FILE, CARD, ".gitattributes")
THIS, CONVERSION = "this model", "its conversion"


def checked(
    dense: PreTrainedModel,
    scores: Importance,
    untrained: PreTrainedModel,
    model: PreTrainedModel,
    folder: Path,
    batch: dict[str, Tensor],
) -> list[dict]:
    """Run every check that fits the model; a row each, also of those that fail.

    Args:
        dense: The model that was converted.
        scores: Of its neurons.
        untrained: Its conversion.
        model: What is shipped, trained or not.
        folder: Where it was saved; ``model.onnx`` is held against it where it is there.
        batch: Inputs of at least two sentences of several lengths.

    Returns:
        Rows with ``claim``, ``on``, ``difference``, ``tolerance`` and ``holds``.
    """
    saved = type(model).from_pretrained(folder).to(model.device)
    same = partial(checks_model.same_logits, batch=batch)
    before = [
        lambda: checks_model.experts_hold_the_dense_neurons(untrained, dense),
        lambda: checks_model.deal_follows_scores(untrained, scores.scores),
    ]
    runs = [
        lambda: checks_model.experts_serve_their_tokens(model, batch),
        lambda: checks.padding_changes_nothing(model, batch),
        lambda: same("saved and loaded, the model answers bit for bit", model, saved, tolerance=0),
    ]
    if model is not untrained:
        runs.insert(0, lambda: checks_model.deal_follows_scores(model, scores.scores))
    packs = isinstance(dense.base_model, BertModel) and not model.config.padding_in_balance
    if packs:  # else packing knows no way, or would leave padding out
        runs.append(
            lambda: same(
                "accelerated, the model answers the same",
                model,
                accelerate(model),
                tolerance=FLOAT32,
            )
        )
    if model.config.routing.startswith("hash"):
        runs += [
            lambda: checks_model.same_token_same_expert(model, batch),
            lambda: checks_model.training_leaves_tables(untrained, model),
        ]
    else:
        runs.append(lambda: checks_model.gate_takes_its_favourite(model, batch))
    if (folder / onnx_file.FILE).is_file():
        runs.append(lambda: _onnx_agrees(model, folder / onnx_file.FILE, batch))
    return [
        *_of_the_dense(dense, scores, batch),
        *(_row(THIS if model is untrained else CONVERSION, run) for run in before),
        *(_row(THIS, run) for run in runs),
    ]


def _of_the_dense(dense: PreTrainedModel, scores: Importance, batch: dict) -> list[dict]:
    one = partial(to_moebert, dense, scores, n_experts=1)
    return [
        _row(
            "the dense model, as one expert",
            lambda: checks.one_expert_is_dense(dense, one(), batch),
        ),
        _row("the dense model", lambda: checks.permuting_neurons_changes_nothing(dense, batch)),
    ]


def write(folder: Path, rows: list[dict], **about: object) -> dict:
    """Write the receipt of a folder's files, but of the card, which shows it.

    Args:
        folder: Where they lie.
        rows: From :func:`checked`.
        about: What they were made from, and what :func:`metrics` tells: ``metrics``, ``n``,
            ``task``, ``part`` and ``guessing``.

    Returns:
        What was written.
    """
    held = {name: sha for name, sha in checksums(folder).items() if name not in BESIDE}
    receipt = {
        "checks": rows,
        **about,
        "files": held,
        "versions": versions(),
        "commit": commit(),
    }
    write_json(folder / FILE, receipt)
    return receipt


def verify(folder: Path | str) -> dict:
    """The receipt of a folder, if all of its checks hold and its files are those it names.

    The card may say more than it did, but must show the receipt's checks and metrics. Hidden
    folders are not looked at.

    Raises:
        UserError: naming the check or the file.
    """
    folder = Path(folder)
    try:
        receipt = json.loads((folder / FILE).read_text("utf-8"))
        rows, files = receipt["checks"], dict(receipt["files"])
        parts = [table(receipt), metrics(receipt)]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} holds no {FILE} that can be read; expected a folder that "
            "moebert convert wrote"
        ) from None
    if not rows or not files:
        raise UserError(f"{folder / FILE} has no checks or no files; convert again")
    for row in rows:
        if not row["holds"]:
            raise UserError(
                f"{folder} fails its receipt: {row['claim']} (largest difference "
                f"{row['difference']}, tolerance {row['tolerance']})"
            )
    for name, expected in files.items():
        found = file_digest(folder / name) if (folder / name).is_file() else "missing"
        if found != expected:
            raise UserError(
                f"{folder / name} is not the file of its receipt: {found[:12]}, "
                f"expected SHA-256 {expected[:12]}; convert again"
            )
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parent.parts)
        if not hidden and name.as_posix() not in (*files, *BESIDE):
            raise UserError(f"{path} is not in the receipt; remove it, or convert again")
    _check_card(folder / CARD, receipt, parts)
    return receipt


def _check_card(card: Path, receipt: dict, parts: list[str]) -> None:
    """Refuse a card that does not show these parts, or has other metrics for the hub to read."""
    expected = [[row["metric"], str(round(row["moebert"][0], 4))] for row in receipt["metrics"]]
    try:
        text, (index,) = card.read_text("utf-8"), metadata_load(card).get("model-index", [{}])
        shown = [metric for result in index.get("results", []) for metric in result["metrics"]]
        found = [[metric["type"], str(metric["value"])] for metric in shown]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, YAMLError):
        raise UserError(f"{card} cannot be read as a model card; convert again") from None
    if found != expected or not all(part in text for part in parts):
        raise UserError(f"{card} shows other checks or metrics than the receipt; convert again")


def table(receipt: dict) -> str:
    """The checks as a Markdown table."""
    lines = ["| check | run on | largest difference | tolerance | |", "|---|---|---|---|---|"]
    for row in receipt["checks"]:
        apart = "unknown" if row["difference"] is None else f"{row['difference']:.1e}"
        allowed = "" if row["tolerance"] is None else f"{row['tolerance']:.0e}"
        verdict = "holds" if row["holds"] else "**FAILS**"
        lines.append(f"| {row['claim']} | {row['on']} | {apart} | {allowed} | {verdict} |")
    return "\n".join(lines)


def metrics(receipt: dict) -> str:
    """Both models' metrics, and what they were measured on, in Markdown."""
    if not receipt["metrics"]:
        return "Not measured: it was converted from a file of scores, without data."
    lines = ["| metric | dense | MoEBERT | difference |", "|---|---|---|---|"]
    for row in receipt["metrics"]:
        cells = [
            _between(*row[name], sign=sign)
            for name, sign in (("dense", ""), ("moebert", ""), ("difference", "+"))
        ]
        lines.append(f"| {row['metric']} | {' | '.join(cells)} |")
    guess = receipt["guessing"]
    base = "" if guess is None else f" Always giving the most frequent class: {100 * guess:.1f}."
    return "\n".join(lines) + (
        f"\n\nOn {receipt['n']:,} examples of `{receipt['task']}` ({receipt['part']}), %. In "
        "brackets the 95% percentile bootstrap interval over these examples, of the difference "
        f"paired by example; it leaves out what another seed would change.{base}"
    )


def _between(value: float, low: float, high: float, *, sign: str) -> str:
    middle, low, high = (f"{100 * number:{sign}.1f}" for number in (value, low, high))
    return middle if low == "nan" else f"{middle} ({low} to {high})"


def _row(on: str, run: Callable[[], checks.Check]) -> dict:
    """A check's result; a failing one says the same in what it raises."""
    try:
        found, holds = run(), True
    except AssertionError as error:
        found, holds = error.args[0], False
    if not isinstance(found, checks.Check):
        return {
            "claim": str(found),
            "on": on,
            "difference": None,
            "tolerance": None,
            "holds": holds,
        }
    finite = found.difference if found.difference < float("inf") else None
    return {
        "claim": found.claim,
        "on": on,
        "difference": finite,
        "tolerance": found.tolerance,
        "holds": holds,
    }


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
