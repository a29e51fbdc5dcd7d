"""A MoEBERT made ready to be given away: model, tokenizer, scores, card and receipt in a folder.

``from_task`` scores a fine-tuned BERT's neurons, converts it, distils it and judges both, by the
experiment's own code and settings, each made once and kept in the store. ``from_scores`` converts
by a file of scores, without data. ``write`` makes the folder, ``push`` sends it to the hub.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from moebert_lib import adapters, archive, card, checkpoints, onnx_file, receipt, spans, weights
from moebert_lib.batching import without_targets
from moebert_lib.convert import load_dense, to_moebert
from moebert_lib.errors import UserError
from moebert_lib.evaluate import score
from moebert_lib.experiment import turned
from moebert_lib.importance import Importance, ffn_importance
from moebert_lib.inputs import Dataset, chosen, dataset, device, load
from moebert_lib.intervals import resampled
from moebert_lib.moe_layer import parameter_counts
from moebert_lib.provenance import reached
from moebert_lib.scales import TINY
from moebert_lib.settings import Settings
from moebert_lib.stages import CONVERSION, DATA, IMPORTANCE, TRAINING
from moebert_lib.store import Entry, code_digest, versions
from moebert_lib.tasks import TASKS, Task
from moebert_lib.teachers import judge, place, teacher
from moebert_lib.train import distil

SCORES = "importance.safetensors"
AFTER = ("card", "onnx_file", "receipt")  # what a trained model does not depend on
CHECKED = 16  #: validation sentences that the receipt is run on
SENTENCES = (
    "A sentence.",
    "Another one, which is a little longer than the first.",
    "Short",
    "The receipt of a model without data is run on these four sentences.",
)


@dataclass(frozen=True)
class Made:
    """A model to ship and what is known of it; ``told`` is what the card says."""

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scores: Importance
    untrained: PreTrainedModel
    model: PreTrainedModel
    batch: dict[str, Tensor]
    dense_digest: str
    told: dict


def from_scores(model: str, scores: Importance, **sizes: object) -> Made:
    """A saved BERT converted by scores, untrained.

    Args:
        model: A folder, or a name on the hub.
        scores: Of its neurons.
        sizes: ``n_experts``, ``expert_size``, ``n_shared``, ``routing`` and ``seed``.

    Raises:
        UserError: no such model, or it does not fit.
    """
    dense, tokenizer = _read(weights.find(model))
    try:
        untrained = to_moebert(dense, scores, **sizes)
    except ValueError as error:
        raise UserError(str(error)) from None
    sentences = (SENTENCES, SENTENCES[::-1]) if hasattr(dense, "qa_outputs") else (SENTENCES,)
    batch = dict(
        tokenizer(
            *map(list, sentences),
            padding=True,
            truncation=True,
            max_length=adapters.longest(dense),
            return_tensors="pt",
        )
    )
    told = {"settings": sizes, "task": "", "steps": None, "metrics": [], "data": ""}
    return _made(model, dense, tokenizer, scores, untrained, untrained, batch, told)


def from_task(model: str, settings: Settings, *, train: bool = True) -> Made:
    """A saved BERT scored on a task's training data, converted, distilled and judged.

    Args:
        model: A folder, or a name on the hub: the fine-tuned dense model, and the teacher. "" is
            the experiment's own teacher, fine-tuned first where it is not in the store.
        settings: The experiment; with a model its own and its teacher's settings do not count.
        train: Whether to distil; else the model is judged as converted.

    Raises:
        UserError: no such model, or it does not fit the task or the settings.
    """
    base, model = ("", model) if model else (settings.model, str(teacher(settings).entry.folder))
    settings = settings.but(model=model)
    dense, tokenizer = _read(weights.find(model, hub=not settings.offline))
    _check_fit(dense, TASKS[settings.task], settings)
    bundle = dataset(settings)
    try:
        entry = _stage(dense.to(device()).eval(), settings, train=train)
        scores = Importance.load(entry.folder / SCORES)
        untrained = turned(settings, dense, scores)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from None
    batch = without_targets(next(iter(bundle.batches("validation", limit=CHECKED))))
    names = (*DATA, *IMPORTANCE, *CONVERSION, *(TRAINING if train else ()))
    told = {
        **entry.row,
        "settings": {"scale": settings.scale, **chosen(settings, names)},
        "task": settings.task,
        "data": bundle.digest,
        "part": card.part(settings, entry.row["n"]),
    }
    if base:
        told |= {
            "base": "" if base == TINY else base,
            "source": f"`{base}` fine-tuned on this task",
        }
    moebert = load(entry.folder, bundle.task).eval()
    return _made(model, dense, tokenizer, scores, untrained, moebert, batch, told)


def write(made: Made, folder: Path, *, name: str, onnx: bool = False) -> dict:
    """Write model, tokenizer, scores, receipt and card into a folder.

    Args:
        made: The model.
        folder: New, or empty.
        name: Of the model, as the card's title.
        onnx: Also write ``model.onnx``.

    Returns:
        The receipt; the card shows it, failures too.

    Raises:
        UserError: a package for ONNX is missing.
    """
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    made.scores.save(folder / SCORES)
    if onnx:
        onnx_file.export(made.model, made.batch, folder / onnx_file.FILE)
    rows = receipt.checked(made.dense, made.scores, made.untrained, made.model, folder, made.batch)
    proof = receipt.write(
        folder,
        rows,
        dense=made.dense_digest,
        **{
            name: made.told[name]
            for name in (
                "data",
                "settings",
                "sentences",
                "task",
                "metrics",
                "n",
                "part",
                "guessing",
            )
        },
    )
    card.write(folder, {**made.told, "name": name}, proof)
    return proof


def push(folder: Path | str, repo: str) -> str:
    """Send a shipped folder to the hub, if its receipt still holds; returns the address.

    Args:
        folder: From :func:`write`.
        repo: ``OWNER/NAME``; made where it is not there.

    Raises:
        UserError: the folder does not fit its receipt, or the hub refuses.
    """
    from huggingface_hub import HfApi

    proof, hub = receipt.verify(folder), HfApi()
    try:
        repo = hub.create_repo(repo, exist_ok=True).repo_id  # with its owner
        sent = hub.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=[*proof["files"], *receipt.BESIDE],
            commit_message="MoEBERT with card and receipt",
        )
    except Exception as error:  # no network, token or owner, in the words of its HTTP library
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{folder} is written and could not be sent to {repo}: {why}; try again "
            f"with moebert_lib.ship.push('{folder}', '{repo}')"
        ) from None
    return str(sent)


def _read(found: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not Path(found).is_dir():
        print(f"no folder {found} here; asking the hub", flush=True)
    try:
        dense, tokenizer = load_dense(found), AutoTokenizer.from_pretrained(found)
    except OSError as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"no model '{found}' could be read: {why}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made up, where none was saved
        raise UserError(f"{found} holds no tokenizer; save it there too, with save_pretrained")
    known = dense.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise UserError(
            f"the tokenizer of {found} knows {len(tokenizer):,} tokens, the model "
            f"{known:,}; expected the tokenizer it was trained with"
        )
    return dense, tokenizer


def _check_fit(dense: PreTrainedModel, task: Task, settings: Settings) -> None:
    """Refuse a model of another kind of task, other classes, or fewer tokens."""
    config, spans_found = dense.config, hasattr(dense, "qa_outputs")
    if spans_found != (task.kind == "span"):
        raise UserError(
            f"task '{task.name}' is a {task.kind} task, the model is a "
            f"{type(dense).__name__}; give the model of this task"
        )
    expected = list(task.labels) or ["score"]
    if not spans_found and config.num_labels != len(expected):
        raise UserError(
            f"the model has {config.num_labels} outputs, task '{task.name}' needs "
            f"{len(expected)}: {', '.join(expected)}"
        )
    own = [str(config.id2label[i]).lower() for i in range(len(expected))] if task.labels else []
    if sorted(own) == sorted(task.labels) and own != list(task.labels):
        raise UserError(
            f"the model's classes are {', '.join(own)}; task '{task.name}' has them as "
            f"{', '.join(expected)}: reorder the classifier"
        )
    if settings.max_length > adapters.longest(dense):
        raise UserError(
            f"max_length={settings.max_length}: the model takes at most "
            f"{adapters.longest(dense)} tokens"
        )
    if (settings.ranking, settings.grouping) != ("importance", "deal"):
        raise UserError(
            f"ranking={settings.ranking}, grouping={settings.grouping}: a model is "
            "shipped by importance and deal; leave them out"
        )


def _stage(dense: PreTrainedModel, settings: Settings, *, train: bool) -> Entry:
    """Scored, converted, distilled, judged and saved: an entry of the store."""
    store, bundle = archive.store(), dataset(settings)
    expert_size, n_shared = settings.sizes(adapters.width(dense.config))
    names = (*DATA, *IMPORTANCE, *CONVERSION, *TRAINING)
    key = {
        **chosen(settings, names),
        "expert_size": expert_size,
        "n_shared": n_shared,
        "train": train,
        "weights": weights.digest(settings.model, hub=not settings.offline),
        "data": bundle.digest,
        "device": device().type,
        "versions": versions(),
        "code": code_digest(*reached("ship", but=AFTER)),
    }

    def build(folder: Path) -> dict:
        scores = _scored(dense, bundle, settings)
        scores.save(folder / SCORES)
        model = turned(settings, dense, scores)
        set_seed(settings.seed)
        steps = None
        if train:
            steps = len(
                distil(
                    model,
                    dense,
                    bundle.train,
                    bundle.tokenizer,
                    settings,
                    folder,
                    checkpoints=place(store, store.folder("shipped", key)),
                )
            )
        model.save_pretrained(folder)
        guess = bundle.guessing()
        said = [judge(settings, one)[1] for one in (dense, model)]
        return {
            "metrics": _metrics(bundle, *said),
            "steps": steps,
            "n": len(said[0]),
            "n_train": len(bundle.examples["train"]),
            "guessing": guess if guess == guess else None,
        }

    entry = store.make("shipped", key, build)
    checkpoints.clear(place(store, entry.folder))
    return entry


def _scored(dense: PreTrainedModel, bundle: Dataset, settings: Settings) -> Importance:
    print(f"· scoring {dense.config.num_hidden_layers} layers on {settings.task}", flush=True)
    batches = bundle.batches(
        settings.importance_split,
        batch_size=32,
        limit=settings.importance_examples,
        shuffle=True,
    )
    meta = {"task": settings.task, "split": settings.importance_split, "data": bundle.digest}
    return ffn_importance(dense, batches, meta=meta)


def _metrics(bundle: Dataset, dense: np.ndarray, moebert: np.ndarray) -> list[dict]:
    """Each metric of both models and of their difference: value, and ends of its interval."""
    truths, rows, found = bundle.truths(), np.arange(len(dense)), []

    def measure(metric: str, said: np.ndarray):
        if bundle.task.kind == "span":  # a mean over examples
            each = np.array(
                [
                    spans.score([one], [truth])[metric]
                    for one, truth in zip(said, truths, strict=True)
                ]
            )
            return lambda some: each[some].mean()
        right = np.asarray(truths)
        return lambda some: score(said[some], right[some], [metric])[metric]

    for metric in bundle.task.metrics:
        own, other = (measure(metric, said) for said in (moebert, dense))
        apart = partial(lambda some, a, b: a(some) - b(some), a=own, b=other)
        found.append(
            {
                "metric": metric,
                **{
                    name: [float(one(rows)), *resampled(one, len(rows))]
                    for name, one in (("dense", other), ("moebert", own), ("difference", apart))
                },
            }
        )
    return found


def _made(
    name: str,
    dense: PreTrainedModel,
    tokenizer,
    scores: Importance,
    untrained,
    model,
    batch: dict[str, Tensor],
    told: dict,
) -> Made:
    counts, config, here = parameter_counts(model), model.config, Path(name).expanduser().is_dir()
    n = scores.n_examples
    told = {
        "n": 0,
        "n_train": 0,
        "guessing": None,
        "part": "",
        "base": "" if here else name,
        "source": f"A fine-tuned {type(dense).__name__}" if here else f"`{name}`",
        **told,
        "config": {
            key: getattr(config, key)
            for key in ("n_experts", "expert_size", "n_shared", "routing", "num_experts_per_tok")
        },
        "spans": hasattr(model, "qa_outputs"),
        "scored_on": scores.meta.get("split", ""),
        "score": scores.meta.get("score", "importance"),
        "scored": "of a file, examples unknown" if n is None else f"{n:,} examples",
        "used": counts.effective,
        "stored": counts.stored,
        "sentences": len(batch["input_ids"]),
    }
    batch = {key: torch.as_tensor(values).to(model.device) for key, values in batch.items()}
    return Made(dense, tokenizer, scores, untrained, model, batch, weights.digest(name), told)
