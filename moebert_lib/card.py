"""The model card of a shipped model: ``README.md`` with the metadata that the hub reads.

Everything in it comes from the run: settings, data, digests, metrics with their intervals and
the receipt's table. What it cannot know, such as a licence, it leaves out.
"""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from moebert_lib import files, receipt
from moebert_lib.onnx_file import FILE as ONNX
from moebert_lib.settings import Settings
from moebert_lib.tasks import TASKS

HEADS = {
    True: ("question-answering", "AutoModelForQuestionAnswering"),
    False: ("text-classification", "AutoModelForSequenceClassification"),
}


def write(folder: Path, told: dict, proof: dict) -> None:
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
        receipt.metrics(proof),
        "## How it was made",
        _made(told, proof),
        "## Equivalence receipt",
        _checked(told, proof),
        receipt.table(proof),
        "## Limits",
        _limits(told),
    ]
    text = "\n\n".join(sections)
    ModelCard(f"---\n{_metadata(told).to_yaml()}\n---\n\n{text}\n").save(folder / receipt.CARD)


def part(settings: Settings, n: int) -> str:
    """Which ``n`` validation examples a model was judged on: a split's name, or a part of it."""
    task = TASKS[settings.task]
    split = files.splits(task)["validation"]
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
    apart = any(row["on"] == receipt.CONVERSION for row in proof["checks"])
    again = " Its conversion was made again from the dense model and the scores." if apart else ""
    return (
        f"Each check was run on what its row names, and on {told['sentences']} sentences where it "
        f"needs any.{again} `{receipt.FILE}` has the SHA-256 of every file too."
    )


def _made(told: dict, proof: dict) -> str:
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
