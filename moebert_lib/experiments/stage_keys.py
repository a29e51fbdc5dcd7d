"""The settings that each stage of an experiment depends on beside the stage before it.

The store's keys are made of them, and a plan groups runs by them; no torch is needed.
"""

#: A dataset, and how answers are read off it.
DATA = (
    "task",
    "max_length",
    "max_train_examples",
    "max_eval_examples",
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
)
#: Settings younger than kept results, with the value that those had: no key holds that.
LATER = {"grouping": "deal", "gate_top_k": 1}


def told(values: dict) -> dict:
    """Settings as a key holds them.

    Example:
        >>> told({"seed": 0, "gate_top_k": 1}), told({"seed": 0, "gate_top_k": 2})
        ({'seed': 0}, {'seed': 0, 'gate_top_k': 2})
    """
    return {
        name: value for name, value in values.items() if name not in LATER or value != LATER[name]
    }
