"""The settings that each stage of an experiment depends on, beside the stages before it.

Keys of stored results are made of them, and a plan groups runs by them. Importing this file
imports no torch.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moebert_lib.config.provenance import code_of
from moebert_lib.config.settings import Settings
from moebert_lib.store.committed_results import AnyStore

#: A dataset, and how predictions are read from logits.
DATA = (
    "task",
    "max_length",
    "max_train_examples",
    "max_eval_examples",
    "subsample",
    "second_test",
    "held_out",
    "evaluate_on",
    "doc_stride",
    "n_best",
    "max_answer_length",
    "null_threshold",
)
TEACHER = (
    "teacher_epochs",
    "teacher_learning_rate",
    "teacher_batch_size",
    "teacher_weight_decay",
    "max_grad_norm",
    "dropout",
    "dtype",
    "teacher_warmup",
)
IMPORTANCE = ("importance_examples", "importance_split")
CONVERSION = (
    "n_experts",
    "routing",
    "ranking",
    "seed",
    "shared_neurons",
    "expert_layer_norm",
    "gate_scaling",
    "gate_top_k",
    "gate_start",
    "student",
)
TRAINING = (
    "distill",
    "distill_weight",
    "epochs",
    "learning_rate",
    "batch_size",
    "weight_decay",
    "max_grad_norm",
    "padding_in_loss",
    "teacher_dropout",
    "balance_weight",
    "dtype",
    "tokens_per_batch",
    "cache_teacher",
    "balance_over",
    "gate_noise",
    "gate_capacity",
    "gate_assignment",
    "warmup",
    "schedule",
    "score_at",
    "student_dropout",
    "hidden_loss_mean",
)
#: Settings that are younger than stored results, each with the value that those results had.
#: No key has a setting at this value, so a new setting leaves every older key as it was. Give the
#: value that was in force before the setting existed, even where the default is another.
LATER: dict[str, Any] = {
    "grouping": "deal",
    "gate_top_k": 1,
    "subsample": "position",
    "second_test": 0,
    "gate_start": "random",
    "gate_noise": 0.0,
    "gate_capacity": None,
    "gate_assignment": "argmax",
    "balance_over": "tokens",
    "held_out": 0.0,
    "evaluate_on": "validation",
    "student": "experts",
    "teacher_warmup": 0.0,
    "warmup": 0.0,
    "schedule": "linear",
    "score_at": (),
    "student_dropout": None,
    "hidden_loss_mean": "tokens",
}


def without_later(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name as a key has them: without those of :data:`LATER` at their old values.

    Example:
        >>> without_later({"seed": 0, "gate_top_k": 1})
        {'seed': 0}
        >>> without_later({"seed": 0, "gate_top_k": 2})
        {'seed': 0, 'gate_top_k': 2}
    """
    return {
        name: value for name, value in values.items() if name not in LATER or value != LATER[name]
    }


def chosen(settings: Settings, names: Iterable[str]) -> dict[str, Any]:
    """Those settings by name, as a key has them."""
    return without_later({name: getattr(settings, name) for name in names})


def made_with(store: AnyStore, build: Callable, **more: Any) -> dict[str, Any]:
    """The origin of a stage: the code that its build function runs, and more by name.

    Empty where results are only read: those are found by their choices.
    """
    return {"code": code_of(build), **more} if store.makes else {}


def dataset_settings(choices: Mapping[str, Any], data_dir: str) -> Settings:
    """Settings with the dataset of a stored stage, and all else at its default.

    Args:
        choices: Of the stage and of those before it, by the names of settings.
        data_dir: Where the data lies.
    """
    old = {name: value for name, value in LATER.items() if name in DATA}
    there = {name: choices[name] for name in DATA if name in choices}
    return Settings.at("small", data_dir=data_dir, **old | there)
