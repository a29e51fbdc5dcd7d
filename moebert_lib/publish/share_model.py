"""Share a model: a folder with weights, tokenizer, scores and model card, and its upload.

:func:`from_task` takes teacher, scores and student of an experiment; :func:`from_scores` converts a
model with a file of scores, without data. :func:`write` makes the folder and checks the model in
it, :func:`push` uploads the folder to the hub.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moebert_lib.config.errors import UserError
from moebert_lib.config.presets import TINY
from moebert_lib.config.provenance import checksums, commit, versions
from moebert_lib.config.settings import Settings
from moebert_lib.data import loading, pretrained_weights, squad
from moebert_lib.data.batching import without_targets
from moebert_lib.data.tasks import TASKS
from moebert_lib.evidence.statistics import resampled
from moebert_lib.experiments import student, teacher
from moebert_lib.experiments.dataset import Dataset, dataset
from moebert_lib.experiments.stage_keys import CONVERSION, DATA, IMPORTANCE, TRAINING, chosen
from moebert_lib.method import encoder_layouts
from moebert_lib.method.importance import Importance
from moebert_lib.model.accelerate import accelerate
from moebert_lib.model.conversion import load_dense, to_moebert
from moebert_lib.model.moe_layer import parameter_counts
from moebert_lib.publish import onnx_export
from moebert_lib.store.committed_results import AnyStore
from moebert_lib.teaching import checks
from moebert_lib.training.evaluation import score

SCORES, CARD = "importance.safetensors", "README.md"
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
CHECKED = 16  #: validation sentences that the checks are run on
TOLERANCE = 1e-4  #: on logits of a few units, for two ways of computing in float32
THIS, ITS_CONVERSION = "this model", "its conversion"
#: What the checks are run on where there is no data.
SENTENCES = (
    "A sentence.",
    "Another one, which is a little longer than the first.",
    "Short",
    "A model without data is checked on these four sentences.",
)


@dataclass(frozen=True)
class ConvertedModel:
    """A MoEBERT to share, the dense model and scores that it was made from, and inputs for checks.

    ``untrained`` is the MoEBERT right after the conversion; if it was not trained, ``model`` is the
    same object. ``facts`` are what the card says, by the names in its template.
    """

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scores: Importance
    untrained: PreTrainedModel
    model: PreTrainedModel
    batch: dict[str, Tensor]
    facts: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class CheckResult:
    """A row of the card's table: a check, the model it was run on, and what came out.

    ``difference`` and ``tolerance`` are None where the check stopped before it had them.
    """

    claim: str
    on: str
    difference: float | None
    tolerance: float | None
    holds: bool


def from_scores(model: str, scores: Importance, **sizes: object) -> ConvertedModel:
    """A saved model converted with scores of its neurons, untrained.

    Args:
        model: A folder, or a name on the hub.
        scores: Of its neurons.
        sizes: ``n_experts``, ``expert_size``, ``n_shared``, ``routing`` and ``seed``.

    Raises:
        UserError: there is no such model, or the scores or sizes do not fit it.
    """
    dense, tokenizer = _read(pretrained_weights.find(model))
    try:
        untrained = to_moebert(dense, scores, **sizes)
    except ValueError as error:
        raise UserError(str(error)) from None
    spans = hasattr(dense, "qa_outputs")
    sentences = (SENTENCES, SENTENCES[::-1]) if spans else (SENTENCES,)
    longest = encoder_layouts.longest(dense)
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    batch = dict(tokenizer(*map(list, sentences), **options))
    digest = pretrained_weights.digest(model)
    facts = {"settings": sizes, "dense_digest": digest, "base": _name_on_hub(model)}
    return _converted(dense, tokenizer, scores, untrained, untrained, batch, facts)


def from_task(
    store: AnyStore, model: str, settings: Settings, *, train: bool = True
) -> ConvertedModel:
    """A fine-tuned model scored on a task's training data, converted, distilled and evaluated.

    Args:
        store: Where the experiment's stages are, or will be.
        model: A folder, or a name on the hub: the fine-tuned dense model, which is the teacher
            too. "" is the settings' model, fine-tuned first.
        settings: The experiment.
        train: Whether to distil; else the model is evaluated as converted.

    Raises:
        UserError: there is no such model, or it does not fit the task or the settings.
    """
    if (settings.ranking, settings.grouping) != ("importance", "deal"):
        raise UserError(
            f"ranking={settings.ranking}, grouping={settings.grouping}: a shared model is "
            "converted by importance and deal; leave them out"
        )
    if model:
        _read(pretrained_weights.find(model, hub=not settings.offline))  # refuse it before any work
        settings = settings.but(model=model, teacher_epochs=0)
    try:
        fine_tuned, scores = teacher.teacher(store, settings), teacher.importance(store, settings)
        untrained = student.converted(store, settings)
        trained = student.student(store, settings, keep_model=True) if train else None
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from None
    dense, moebert = fine_tuned.model, trained.model() if trained else untrained
    bundle = dataset(settings)
    answers = [teacher.evaluate_with_answers(settings, each)[1] for each in (dense, moebert)]
    names = (*DATA, *IMPORTANCE, *CONVERSION, *(TRAINING if train else ()))
    facts = {
        "settings": {"scale": settings.scale, **chosen(settings, names)},
        "task": settings.task,
        "steps": trained.row["steps"] if trained else None,
        "n_train": len(bundle.examples["train"]),
        "metrics": [_compared(bundle, metric, *answers) for metric in bundle.task.metrics],
        "n": len(answers[0]),
        "part": evaluated_part(settings, len(answers[0])),
        "guessing": bundle.guessing(),
        "data": bundle.digest,
        "dense_digest": pretrained_weights.digest(
            model or str(fine_tuned.entry.folder), hub=not settings.offline
        ),
        "base": _name_on_hub(settings.model),
        "fine_tuned": "" if model else settings.model,
    }
    batch = without_targets(next(iter(bundle.batches("validation", limit=CHECKED))))
    return _converted(dense, bundle.tokenizer, scores, untrained, moebert, batch, facts)


def write(
    converted: ConvertedModel, folder: Path, *, name: str, onnx: bool = False
) -> list[CheckResult]:
    """Write model, tokenizer, scores and card into a folder; returns the checks' results.

    Args:
        converted: The model.
        folder: A new or an empty folder.
        name: The model's name, the card's title.
        onnx: Also write ``model.onnx``.

    Raises:
        UserError: a package for ONNX is missing.
    """
    converted.model.save_pretrained(folder)
    converted.tokenizer.save_pretrained(folder)
    converted.scores.save(folder / SCORES)
    if onnx:
        onnx_export.export(converted.model, converted.batch, folder / onnx_export.FILE)
    results = run_checks(converted, folder)
    write_card(folder, {**converted.facts, "name": name}, results)
    return results


def push(folder: Path | str, repo: str) -> str:
    """Upload a folder to the hub; returns its address there.

    Args:
        folder: From :func:`write`.
        repo: ``OWNER/NAME``; made if it does not exist.

    Raises:
        UserError: there is no network or no token, or the hub refuses.
    """
    hub = HfApi()
    try:
        repo = hub.create_repo(repo, exist_ok=True).repo_id
        message = "MoEBERT with model card"
        sent = hub.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=message)
    except Exception as error:  # its HTTP library raises many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{folder} is written and could not be sent to {repo}: {reason}; "
            f"try again with: hf upload {repo} {folder}"
        ) from None
    return str(sent)


def _read(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fine-tuned model and its own tokenizer, from a folder or the hub."""
    if not Path(source).is_dir():
        print(f"no folder {source} here; asking the hub", flush=True)
    try:
        dense, tokenizer = load_dense(source), AutoTokenizer.from_pretrained(source)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"no model '{source}' could be read: {reason}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes an empty one up
        raise UserError(f"{source} holds no tokenizer; save it there too, with save_pretrained")
    known = dense.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise UserError(
            f"the tokenizer of {source} knows {len(tokenizer):,} tokens, the model "
            f"{known:,}; expected the tokenizer it was trained with"
        )
    return dense, tokenizer


def _name_on_hub(model: str) -> str:
    """The name of a dense model on the hub; "" of a folder, and of the tiny model of the tests."""
    return "" if model == TINY or Path(model).expanduser().is_dir() else model


def _converted(
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scores: Importance,
    untrained: PreTrainedModel,
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    facts: dict[str, Any],
) -> ConvertedModel:
    """All of it together, with those facts that the models and scores themselves give."""
    names = ("n_experts", "expert_size", "n_shared", "routing", "num_experts_per_tok")
    config = {name: getattr(model.config, name) for name in names}
    counts = parameter_counts(model)
    own = {
        "config": config,
        "spans": hasattr(model, "qa_outputs"),
        "score": scores.meta.get("score", "importance"),
        "scored_on": scores.meta.get("split", ""),
        "n_scored": scores.n_examples,
        "used": counts.effective,
        "stored": counts.stored,
        "n_sentences": len(batch["input_ids"]),
    }
    unknown = {"task": "", "steps": None, "metrics": [], "data": "", "fine_tuned": ""}
    batch = {name: torch.as_tensor(values).to(model.device) for name, values in batch.items()}
    facts = {**unknown, **own, **facts}
    return ConvertedModel(dense, tokenizer, scores, untrained, model, batch, facts)


def _compared(bundle: Dataset, metric: str, dense: np.ndarray, moebert: np.ndarray) -> dict:
    """A metric of both models and of their difference, 0 to 1: value, and ends of its interval."""
    of_dense, of_moebert = _measure(bundle, metric, dense), _measure(bundle, metric, moebert)
    measures = {
        "dense": of_dense,
        "moebert": of_moebert,
        "difference": lambda rows: of_moebert(rows) - of_dense(rows),
    }
    n = len(dense)
    values = {
        name: [float(measure(np.arange(n))), *resampled(measure, n)]
        for name, measure in measures.items()
    }
    return {"metric": metric, **values}


def _measure(bundle: Dataset, metric: str, answers: np.ndarray) -> Callable[[np.ndarray], float]:
    """A metric of a model's answers, as a function of the examples' numbers."""
    truths = bundle.truths()
    if bundle.task.kind != "span":
        right = np.asarray(truths)
        return lambda rows: score(answers[rows], right[rows], [metric])[metric]
    pairs = zip(answers, truths, strict=True)
    by_example = np.array([squad.score([answer], [truth])[metric] for answer, truth in pairs])
    return lambda rows: by_example[rows].mean()


def evaluated_part(settings: Settings, n: int) -> str:
    """Which ``n`` validation examples a model was evaluated on: a split's name, or a part of it."""
    task = TASKS[settings.task]
    split = loading.splits(task)["validation"]
    if n != settings.max_eval_examples:
        return split
    in_order = task.source == "built-in"
    return f"first {n} of {split}" if in_order else f"{n} of {split}, drawn at random"


def run_checks(converted: ConvertedModel, folder: Path) -> list[CheckResult]:
    """Run every check that fits the model, those that fail included.

    Args:
        converted: The model.
        folder: Where it was saved. If ``model.onnx`` is there, it is compared with the model.
    """
    dense, untrained, model = converted.dense, converted.untrained, converted.model
    batch, scores = converted.batch, converted.scores.scores
    single = to_moebert(dense, converted.scores, n_experts=1)
    saved = type(model).from_pretrained(folder).to(model.device)
    before = THIS if model is untrained else ITS_CONVERSION
    same = partial(_run, THIS, checks.same_logits)
    results = [
        _run("the dense model, as one expert", checks.one_expert_is_dense, dense, single, batch),
        _run("the dense model", checks.permuting_neurons_changes_nothing, dense, batch),
        _run(before, checks.experts_hold_the_dense_neurons, untrained, dense),
        _run(before, checks.deal_follows_scores, untrained, scores),
    ]
    if model is not untrained:
        results.append(_run(THIS, checks.deal_follows_scores, model, scores))
    results += [
        _run(THIS, checks.experts_serve_their_tokens, model, batch),
        _run(THIS, checks.padding_changes_nothing, model, batch),
        same("saved and loaded, the model gives the same logits", model, saved, batch, tolerance=0),
    ]
    if not model.config.padding_in_balance:
        claim, fast = "accelerated, the model gives the same logits", accelerate(model)
        results.append(same(claim, model, fast, batch, tolerance=TOLERANCE))
    if model.config.routing.startswith("hash"):
        results.append(_run(THIS, checks.same_token_same_expert, model, batch))
        results.append(_run(THIS, checks.training_leaves_tables, untrained, model))
    else:
        results.append(_run(THIS, checks.gate_takes_its_favourite, model, batch))
    if (folder / onnx_export.FILE).is_file():
        graph, cpu = onnx_export.OnnxModel(folder / onnx_export.FILE), copy.deepcopy(model).cpu()
        for n, sentences in ((len(batch["input_ids"]), "all"), (1, "one"), (2, "two")):
            claim = f"the ONNX graph gives the model's logits for {sentences} of the sentences"
            part = _first(batch, n)
            results.append(same(claim, cpu, graph, part, tolerance=TOLERANCE))
    return results


def _first(batch: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The first ``n`` sentences of a batch, as long as the longest of them, on the CPU."""
    longest = int(batch["attention_mask"][:n].sum(1).max())
    return {name: values[:n, :longest].cpu() for name, values in batch.items()}


def _run(
    on: str, check: Callable[..., checks.Check], *args: object, **options: object
) -> CheckResult:
    """The result of one check; a check that fails raises its result."""
    try:
        result, holds = check(*args, **options), True
    except AssertionError as error:
        result, holds = error.args[0], False
    if not isinstance(result, checks.Check):
        return CheckResult(str(result), on, None, None, holds)
    difference = result.difference if np.isfinite(result.difference) else None
    return CheckResult(result.claim, on, difference, result.tolerance, holds)


def write_card(folder: Path, facts: dict[str, Any], results: list[CheckResult]) -> None:
    """Write the model card of a folder, from :data:`TEMPLATE`.

    Args:
        folder: Where the model's files are; the card lists their digests.
        facts: ``ConvertedModel.facts``, and the model's ``name``.
        results: Of the checks.
    """
    files = {name: digest for name, digest in checksums(folder).items() if name != CARD}
    values = {
        **facts,
        "checks": [asdict(result) for result in results],
        "files": files,
        "scores_file": SCORES,
        "onnx": onnx_export.FILE if onnx_export.FILE in files else "",
        "commit": commit(),
        "versions": versions(),
    }
    ModelCard.from_template(_metadata(facts), template_path=TEMPLATE, **values).save(folder / CARD)


def _metadata(facts: dict[str, Any]) -> ModelCardData:
    """What the hub reads; without results no metric is named."""
    kind = "question-answering" if facts["spans"] else "text-classification"
    known: dict[str, Any] = {"base_model": facts["base"]} if facts["base"] else {}
    task = TASKS.get(facts["task"])
    source = task.source if task else ""
    hub = {"glue": "nyu-mll/glue", "squad": f"rajpurkar/{facts['task']}"}.get(source)
    if hub:
        known["datasets"] = [hub]
    if facts["metrics"]:
        known["model_name"] = facts["name"]
        known["metrics"] = [row["metric"] for row in facts["metrics"]]
        known["eval_results"] = [
            EvalResult(
                task_type=kind,
                dataset_type=hub or facts["task"],
                dataset_name=facts["task"],
                dataset_config=facts["task"] if source == "glue" else None,
                dataset_split=facts["part"],
                metric_type=row["metric"],
                metric_value=round(row["moebert"][0], 4),
            )
            for row in facts["metrics"]
        ]
    tags = ["moebert", "mixture-of-experts"]
    return ModelCardData(library_name="transformers", pipeline_tag=kind, tags=tags, **known)
