"""What each scale decides: model, task, sizes, and how long to train.

Everything that is not named here keeps the default of ``settings.Settings``.
"""

from typing import Any, NamedTuple

from moebert_lib.config.paper_numbers import TABLE7

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MPNET = "sentence-transformers/all-mpnet-base-v2"  # of BERT-base's size
TINY = "tiny"  # a random two-layer BERT: exercises the code, knows nothing
BASE, LARGE = "bert-base-uncased", "bert-large-uncased"


class Shape(NamedTuple):
    """Sizes of an encoder: ``L``, ``D``, ``F``, attention heads, and two tables of embeddings."""

    layers: int
    hidden: int
    neurons: int
    heads: int
    vocabulary: int = 30_522
    positions: int = 512


#: Sizes of the models that the scales name, so that settings are checked before anything loads.
SHAPES = {
    TINY: Shape(2, 32, 64, 4),
    MINILM: Shape(6, 384, 1536, 12),
    MPNET: Shape(12, 768, 3072, 12, 30_527, 514),
    BASE: Shape(12, 768, 3072, 12),
    LARGE: Shape(24, 1024, 4096, 16),
}
FFN_WIDTHS = {name: shape.neurons for name, shape in SHAPES.items()}

SCALES: dict[str, dict[str, Any]] = {
    "smoke": dict(  # tests: runs every line, teaches nothing
        task="library",
        model=TINY,
        max_length=16,
        max_train_examples=64,
        max_eval_examples=48,
        importance_examples=32,
        teacher_epochs=1.0,
        n_random_splits=2,
        n_seeds=2,
        teacher_seed=0,
    ),
    "quick": dict(  # offline, two CPU cores, minutes
        task="library",
        max_length=48,  # the pairs of "follows" need it; batches are padded to their longest
        max_train_examples=4000,
        max_eval_examples=500,
        importance_examples=1000,
        teacher_epochs=1.0,
        teacher_learning_rate=1e-4,
        epochs=0.064,  # 256 sentences a student: what a hundred students in minutes allow
        learning_rate=1e-4,
        batch_size=32,
        teacher_seed=0,  # one teacher serves all seeds: intervals leave its variation out
    ),
    "small": dict(  # MiniLM on real GLUE: a GPU hour or a CPU night
        task="sst2",
        max_length=128,
        importance_examples=2000,
        epochs=3.0,
        n_seeds=3,  # as the paper
        batch_size=32,
    ),
    "base": dict(  # offline, the paper's sizes: each task some CPU hours, minutes on a GPU
        task="sst2",
        model=MPNET,
        max_length=128,
        held_out=0.1,  # chooses the recipe, and gives the importance scores
        importance_split="held-out",
        importance_examples=2000,
        teacher_batch_size=16,
        teacher_warmup=0.1,
        batch_size=16,
        warmup=0.1,
        n_seeds=3,
    ),
    "paper": dict(task="mnli", model=BASE, n_seeds=3),
}


def _at_base(
    examples: int | None, teacher_epochs: float, epochs: float, weight: float, **others: Any
) -> dict[str, Any]:
    """What a task changes at scale ``base``: training examples, epochs, Table 7's lambda."""
    recipe = dict(teacher_epochs=teacher_epochs, epochs=epochs, distill_weight=weight)
    return {"max_train_examples": examples, **recipe, **others}


_SHORT = dict(max_length=64, teacher_batch_size=32, batch_size=32)  # tasks of one sentence
_SPANS = dict(max_length=384, max_eval_examples=2000, n_seeds=1)

#: What a task changes at a scale: the paper's Table 7, and contexts that need more tokens.
BY_TASK: dict[str, dict[str, dict[str, Any]]] = {
    "smoke": {task: dict(max_length=48, doc_stride=8) for task in ("passage", "squad", "squad_v2")},
    "quick": {
        **{task: dict(max_length=192, doc_stride=64) for task in ("squad", "squad_v2")},
        "passage": dict(  # a span head learns from many small steps, not from a few large ones
            max_length=64,
            doc_stride=16,
            teacher_batch_size=8,
            teacher_learning_rate=2e-4,
            teacher_epochs=1.5,
        ),
    },
    "small": {
        "sst2": dict(max_length=64, max_train_examples=8000),  # of 67,349; null: all
        **{task: dict(max_length=384) for task in ("squad", "squad_v2")},
    },
    "base": {
        "sst2": _at_base(8000, 3.0, 2.0, 1.0, **_SHORT),
        "cola": _at_base(None, 5.0, 3.0, 3.0, n_seeds=1, **_SHORT),
        "qnli": _at_base(2000, 3.0, 2.0, 2.0, n_seeds=2),
        "mnli": _at_base(6000, 2.0, 1.0, 5.0, n_seeds=1),
        "qqp": _at_base(5000, 2.0, 1.0, 1.0, n_seeds=1),
        "mrpc": _at_base(None, 4.0, 2.0, 2.0, n_seeds=1),
        "stsb": _at_base(None, 4.0, 2.0, 1.0, n_seeds=1),  # not in Table 7
        "rte": _at_base(None, 6.0, 2.0, 1.0, n_seeds=1),
        "squad": _at_base(2500, 2.0, 1.0, 2.0, **_SPANS),
        "squad_v2": _at_base(2500, 2.0, 1.0, 1.0, **_SPANS),
    },
    "paper": TABLE7,
}

#: What a model changes at scale ``paper``: MoEBERT-large shares 512 of 1024 neurons (Table 4).
BY_MODEL: dict[str, dict[str, Any]] = {LARGE: dict(n_shared=512)}

#: The switches as the released code has them (preset ``release``): importance scored on the
#: validation split, a teacher with dropout, copies of shared neurons that drift apart, a
#: LayerNorm for each expert, gates that scale outside the residual, padding in the losses.
RELEASE: dict[str, Any] = dict(
    importance_split="validation",
    teacher_dropout=True,
    shared_neurons="copied",
    expert_layer_norm="per-expert",
    gate_scaling="outside",
    padding_in_loss=True,
)


def defaults(scale: str, task: object, model: object) -> dict[str, Any]:
    """What a scale decides for a task and a model; a name it does not know changes nothing."""
    by_task = BY_TASK.get(scale, {}).get(task, {}) if isinstance(task, str) else {}
    by_model = BY_MODEL.get(model, {}) if scale == "paper" and isinstance(model, str) else {}
    return {**SCALES[scale], **by_task, **by_model}
