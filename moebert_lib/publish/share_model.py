"""A MoEBERT made ready to be given away: model, tokenizer, scores, card and receipt in a folder.

``from_task`` scores a fine-tuned BERT's neurons, converts it, distils it and judges both, by the
experiment's own code and settings, each made once and kept in the store. ``from_scores`` converts
by a file of scores, without data. ``write`` makes the folder, ``push`` sends it to the hub.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from yaml import YAMLError

from moebert_lib.config.errors import UserError
from moebert_lib.config.file_io import write_json
from moebert_lib.config.presets import TINY
from moebert_lib.config.provenance import (
    checksums,
    code_digest,
    commit,
    file_digest,
    reached,
    versions,
)
from moebert_lib.config.settings import Settings
from moebert_lib.data import loading, pretrained_weights, squad
from moebert_lib.data.batching import without_targets
from moebert_lib.data.tasks import TASKS, Task
from moebert_lib.evidence.statistics import resampled
from moebert_lib.experiments.dataset import Dataset, chosen, dataset, device, load
from moebert_lib.experiments.stage_keys import CONVERSION, DATA, IMPORTANCE, TRAINING
from moebert_lib.experiments.student import turned
from moebert_lib.experiments.teacher import judge, place, teacher
from moebert_lib.method import encoder_layouts
from moebert_lib.method.importance import Importance, ffn_importance
from moebert_lib.model.accelerate import accelerate
from moebert_lib.model.conversion import load_dense, to_moebert
from moebert_lib.model.moe_layer import parameter_counts
from moebert_lib.publish import onnx_export
from moebert_lib.publish.onnx_export import FILE as ONNX
from moebert_lib.store import committed_results
from moebert_lib.store.store import Entry, StageKey
from moebert_lib.teaching import checks, model_checks
from moebert_lib.training import checkpoints
from moebert_lib.training.evaluation import score
from moebert_lib.training.trainer import distil

SCORES = "importance.safetensors"
AFTER = (
    "publish.share_model",
    "publish.onnx_export",
    "publish.share_model",
)  # what a trained model does not depend on
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
    dense, tokenizer = _read(pretrained_weights.find(model))
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
            max_length=encoder_layouts.longest(dense),
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
    dense, tokenizer = _read(pretrained_weights.find(model, hub=not settings.offline))
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
        "part": part(settings, entry.row["n"]),
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
        onnx_export.export(made.model, made.batch, folder / onnx_export.FILE)
    rows = checked(made.dense, made.scores, made.untrained, made.model, folder, made.batch)
    proof = write_receipt(
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
    write_card(folder, {**made.told, "name": name}, proof)
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

    proof, hub = verify(folder), HfApi()
    try:
        repo = hub.create_repo(repo, exist_ok=True).repo_id  # with its owner
        sent = hub.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=[*proof["files"], *BESIDE],
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
    if settings.max_length > encoder_layouts.longest(dense):
        raise UserError(
            f"max_length={settings.max_length}: the model takes at most "
            f"{encoder_layouts.longest(dense)} tokens"
        )
    if (settings.ranking, settings.grouping) != ("importance", "deal"):
        raise UserError(
            f"ranking={settings.ranking}, grouping={settings.grouping}: a model is "
            "shipped by importance and deal; leave them out"
        )


def _stage(dense: PreTrainedModel, settings: Settings, *, train: bool) -> Entry:
    """Scored, converted, distilled, judged and saved: an entry of the store."""
    store, bundle = committed_results.open_store(), dataset(settings)
    expert_size, n_shared = settings.sizes(encoder_layouts.width(dense.config))
    names = (*DATA, *IMPORTANCE, *CONVERSION, *TRAINING)
    choices = {
        **chosen(settings, names),
        "expert_size": expert_size,
        "n_shared": n_shared,
        "train": train,
    }
    origin = {
        "weights": pretrained_weights.digest(settings.model, hub=not settings.offline),
        "data": bundle.digest,
        "device": device().type,
        "versions": versions(),
        "code": code_digest(*reached("publish.share_model", but=AFTER)),
    }
    key = StageKey("shipped", choices, origin)

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
                    checkpoints=place(store, store.folder(key)),
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

    entry = store.make(key, build)
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
                    squad.score([one], [truth])[metric]
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
    return Made(
        dense, tokenizer, scores, untrained, model, batch, pretrained_weights.digest(name), told
    )


# The model card of a shipped model: ``README.md`` with the metadata that the hub reads.
# Everything in it comes from the run: settings, data, digests, metrics with their intervals and
# the receipt's table. What it cannot know, such as a licence, it leaves out.

HEADS = {
    True: ("question-answering", "AutoModelForQuestionAnswering"),
    False: ("text-classification", "AutoModelForSequenceClassification"),
}


def write_card(folder: Path, told: dict, proof: dict) -> None:
    """Write the card of a folder.

    Args:
        folder: Where model and receipt lie.
        told: ``ship.Made.told``.
        proof: The receipt.
    """
    sections = [
        _title(told),
        "## Load it",
        _load(folder, told),
        "## How good it is",
        metrics(proof),
        "## How it was made",
        _made_card(told, proof),
        "## Equivalence receipt",
        _checked(told, proof),
        table(proof),
        "## Limits",
        _limits(told),
    ]
    text = "\n\n".join(sections)
    ModelCard(f"---\n{_metadata(told).to_yaml()}\n---\n\n{text}\n").save(folder / CARD)


def part(settings: Settings, n: int) -> str:
    """Which ``n`` validation examples a model was judged on: a split's name, or a part of it."""
    task = TASKS[settings.task]
    split = loading.splits(task)["validation"]
    if n != settings.max_eval_examples:
        return split
    first = task.source == "built-in"
    return f"first {n} of {split}" if first else f"{n} of {split}, drawn at random"


def _metadata(told: dict) -> ModelCardData:
    """Nothing but what is known: a base model only where it has a name on the hub."""
    task, kind = TASKS.get(told["task"]), HEADS[told["spans"]][0]
    known = {"base_model": told["base"]} if told["base"] else {}
    hub = {"glue": "nyu-mll/glue", "squad": f"rajpurkar/{told['task']}"}.get(task and task.source)
    if task and task.source != "built-in":
        known["datasets"] = [hub]
    if told["metrics"]:
        known |= {"model_name": told["name"], "metrics": [row["metric"] for row in told["metrics"]]}
        known["eval_results"] = [
            EvalResult(
                task_type=kind,
                dataset_type=hub or told["task"],
                dataset_name=told["task"],
                dataset_config=told["task"] if task.source == "glue" else None,
                dataset_split=told["part"],
                metric_type=row["metric"],
                metric_value=round(row["moebert"][0], 4),
            )
            for row in told["metrics"]
        ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=kind,
        tags=["moebert", "mixture-of-experts"],
        **known,
    )


def _title(told: dict) -> str:
    config, trained = told["config"], told["steps"] is not None
    n_experts, size, shared = (config[name] for name in ("n_experts", "expert_size", "n_shared"))
    how = "then distilled from it" if trained else "**untrained: distil it before use**"
    k = config["num_experts_per_tok"]
    serving = "One expert serves" if k == 1 else f"{k} experts serve"
    return (
        f"# {told['name']}\n\n"
        f"{told['source']}, its feed-forward layers split into {n_experts} experts of {size:,} "
        f"neurons, {shared:,} of them in every expert, by {_score(told)} (MoEBERT, NAACL 2022), "
        f"{how}. {shared + n_experts * (size - shared):,} neurons of a layer are kept. "
        f"{serving} a token (`{config['routing']}`): {told['used']:,} of "
        f"{told['stored']:,} parameters per token."
    )


def _load(folder: Path, told: dict) -> str:
    kind, auto = HEADS[told["spans"]]
    pair = f"from transformers import AutoTokenizer, {auto}\n\nmodel = {auto}.from_pretrained(NAME)"
    one = 'from transformers import pipeline\n\nclassify = pipeline("{}", model=NAME)'
    lines = pair + "\ntokenizer = AutoTokenizer.from_pretrained(NAME)"
    code = lines if told["spans"] else one.format(kind)
    also = f" `{ONNX}` needs ONNX Runtime alone." if (folder / ONNX).is_file() else ""
    return (
        "The architecture is in the library `moebert`, which registers it with transformers; no "
        "code comes with the model, so `trust_remote_code` is neither needed nor of use. NAME is "
        f"this repository, or a folder with its files.{also}\n\n"
        f"```python\nimport moebert_lib  # registers MoEBERT\n{code}\n```"
    )


def _score(told: dict) -> str:
    paper = told["score"] == "importance"
    return "importance (Eq. 4)" if paper else f"`{told['score']}`, not the paper's score"


def _checked(told: dict, proof: dict) -> str:
    apart = any(row["on"] == ITS_CONVERSION for row in proof["checks"])
    again = " Its conversion was made again from the dense model and the scores." if apart else ""
    return (
        f"Each check was run on what its row names, and on {told['sentences']} sentences where it "
        f"needs any.{again} `{FILE}` has the SHA-256 of every file too."
    )


def _made_card(told: dict, proof: dict) -> str:
    trained = told["steps"] is not None
    learned = "nothing since conversion"
    if trained:
        learned = (
            f"{told['n_train']:,} training examples of `{told['task']}`, {told['steps']:,} steps"
        )
    lines = [
        f"- Trained on: {learned}",
        f"- Scored by {_score(told)}: {told['scored']}, `importance.safetensors`, SHA-256 "
        f"`{proof['files']['importance.safetensors']}`",
        f"- Dense model: `{proof['dense']}`",
    ]
    if told["data"]:
        lines.append(f"- Data: SHA-256 `{told['data']}`")
    lines.append(
        f"- Code: commit {proof['commit'] or 'unknown'}; "
        + ", ".join(
            f"{name} {proof['versions'][name]}"
            for name in ("moebert", "torch", "transformers")
            if name in proof["versions"]
        )
    )
    rows = [f"| {name} | {value} |" for name, value in told["settings"].items()]
    return "\n".join([*lines, "", "| setting | value |", "|---|---|", *rows])


def _limits(told: dict) -> str:
    lines = ["- It answers what its dense model was trained for, and keeps that model's biases."]
    if told["steps"] is None:
        lines.append("- Untrained: experts hold a part of the neurons; expect worse answers.")
    if told["metrics"]:
        lines.append("- One seed, and its metrics are on the split that its makers could look at.")
    if told["config"]["routing"].startswith("hash"):
        lines.append("- A token's expert follows from its id alone: `inputs_embeds` is refused.")
    if told["scored_on"] == "validation":
        lines.append(
            "- Its neurons were chosen on validation examples, of which its metrics "
            "are too: expect less elsewhere."
        )
    k = told["config"]["num_experts_per_tok"]
    lines.append(
        "- All experts are in memory; only the work of a token is that of "
        f"{'one' if k == 1 else k}."
    )
    return "\n".join(lines)


# The equivalence receipt beside a shipped model: what was checked on it, and its digests.
# The checks are those of the notebooks, on sentences of the model's task. The file ``receipt.json``
# names each with what it was run on (the model that is shipped, its conversion made again, the
# dense
# model) and the largest difference found; the metrics; and the SHA-256 of everything that lies
# beside it, so that a model or a card that was changed later no longer fits. It is not signed: who
# rewrites receipt, card and model together is found by running the checks again.

FILE, CARD = "receipt.json", "README.md"
FLOAT32 = 1e-4  # two ways of computing in float32, on logits of a few units
#: Written after the receipt, or not by us.
BESIDE = (FILE, CARD, ".gitattributes")
THIS, ITS_CONVERSION = "this model", "its conversion"


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
    same = partial(model_checks.same_logits, batch=batch)
    before = [
        lambda: model_checks.experts_hold_the_dense_neurons(untrained, dense),
        lambda: model_checks.deal_follows_scores(untrained, scores.scores),
    ]
    runs = [
        lambda: model_checks.experts_serve_their_tokens(model, batch),
        lambda: checks.padding_changes_nothing(model, batch),
        lambda: same("saved and loaded, the model answers bit for bit", model, saved, tolerance=0),
    ]
    if model is not untrained:
        runs.insert(0, lambda: model_checks.deal_follows_scores(model, scores.scores))
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
            lambda: model_checks.same_token_same_expert(model, batch),
            lambda: model_checks.training_leaves_tables(untrained, model),
        ]
    else:
        runs.append(lambda: model_checks.gate_takes_its_favourite(model, batch))
    if (folder / onnx_export.FILE).is_file():
        runs.append(lambda: _onnx_agrees(model, folder / onnx_export.FILE, batch))
    return [
        *_of_the_dense(dense, scores, batch),
        *(_row(THIS if model is untrained else ITS_CONVERSION, run) for run in before),
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


def write_receipt(folder: Path, rows: list[dict], **about: object) -> dict:
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
        apart = (onnx_export.answers(path, some) - ours.cpu()).abs()
        real = some["attention_mask"].bool().cpu()
        gaps.append(float((apart if "logits" in output else apart[real]).max()))
    claim = "the ONNX graph answers as the model, whatever the batch and its length"
    return checks.equal(claim, gaps, [0.0] * len(gaps), tolerance=FLOAT32)
