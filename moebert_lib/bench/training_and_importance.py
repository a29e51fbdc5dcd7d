"""Time a step of distillation, and the scoring of neurons by Eq. 4, each against the paper's code.

A step is the student forward and backward and the teacher forward: task loss plus Eq. 7 over all
layers, no optimiser; the teacher is in eval mode. Scoring is timed an example at a time, as the
paper's code does it, and in one backward for all examples.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from moebert_lib.bench.harness import Benchmark, as_json, check_equal
from moebert_lib.bench.inference import (
    BASE,
    LIMIT,
    RELEASE,
    Inputs,
    Sizes,
    bert,
    forward,
    glue_like,
    moebert,
    reference_release,
    zipf,
)
from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.data.batching import without_targets
from moebert_lib.experiments.dataset import dataset
from moebert_lib.experiments.teacher import teacher
from moebert_lib.method.distillation_loss import distillation_terms
from moebert_lib.method.encoder_layouts import ffns
from moebert_lib.method.importance import ffn_importance, frozen, of_eq4, score_batch
from moebert_lib.method.rank_stability import rank_correlation, top_overlap
from moebert_lib.model.accelerate import accelerate, accelerate_if_possible
from moebert_lib.store.store import Store
from moebert_lib.training.teacher_states import STATES, TeacherStates

PADDED, PACKED, HALF = VARIANTS = ("ordinary, padded", "packed", "packed bf16")
LIMITS = tuple(f"{LIMIT}, {how}" for how in ("padded", "packed", "packed bf16"))
CACHED = "packed, cached teacher"
DRY, WET = "GLUE-like, dropout 0", "GLUE-like, dropout 0.1"
WITH_DROPOUT = (RELEASE, PACKED, HALF)  # few: attention with dropout has no fast kernel on a CPU


def training(*, shape: Sizes = BASE, repeats: int = 5, scale: int = 1) -> Benchmark:
    """``moebert bench training``: all variants without dropout, and some with it.

    Args:
        shape: BERT's sizes.
        repeats: Timed rounds.
        scale: Divides sentences and lengths; for tests.
    """
    batch = with_labels(glue_like(shape["vocab_size"], n=32 // scale, longest=128 // scale))
    n, tokens = len(batch["labels"]), int(batch["attention_mask"].sum())

    @cache
    def built() -> dict[str, Step]:
        with tempfile.TemporaryDirectory() as folder:
            return steps(shape, batch, folder=Path(folder))

    def dry() -> dict[str, Step]:
        check_losses(built())
        return built()

    def wet() -> dict[str, Step]:
        chosen = {name: built()[name] for name in WITH_DROPOUT}
        for step in chosen.values():
            set_dropout(step.student, 0.1)
        return chosen

    return Benchmark(
        name="training",
        title=f"a step of distillation, hidden size {shape['hidden_size']}, {n} sentences, "
        f"{tokens} tokens, {torch.get_num_threads()} threads",
        settings={DRY: dry, WET: wet},
        baseline=RELEASE,
        limits={RELEASE: LIMITS[0], **dict(zip(VARIANTS, LIMITS, strict=True))},
        main=PACKED,
        examples=n,
        repeats=repeats,
        facts={"shape": shape, "tokens": {DRY: tokens, WET: tokens}},
    )


@dataclass(frozen=True)
class Step:
    """One variant of a step.

    Attributes:
        student: In train mode.
        teacher: Returns the teacher's output for the batch.
        batch: ``input_ids``, ``attention_mask`` ``(B, T)``, ``labels`` and ``index`` ``(B,)``.
        states: Form of the hidden states, ``"packed"`` or ``True`` for padded ones.
        half: Run the student in bfloat16 by autocast, as ``Trainer(bf16=True)`` does.
        padding: Count padding in Eq. 5, as the paper's code does.
    """

    student: nn.Module
    teacher: Callable[[], SimpleNamespace]
    batch: Inputs
    states: str | bool = True
    half: bool = False
    padding: bool = False

    def loss(self, *, padding: bool) -> Tensor:
        """The objective, with or without padding in Eq. 5."""
        inputs = {name: value for name, value in self.batch.items() if name != "index"}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            output = self.student(**inputs, output_hidden_states=self.states)
        with torch.no_grad():
            teacher_output = self.teacher()
        hidden = [state.float() for state in output.hidden_states]
        student = SimpleNamespace(hidden_states=hidden, logits=output.logits.float())
        mask = None if padding else self.batch["attention_mask"]
        return output.loss.float() + sum(distillation_terms(student, teacher_output, mask=mask))

    def __call__(self) -> None:
        self.student.zero_grad()
        self.loss(padding=self.padding).backward()


def steps(shape: Sizes, batch: Inputs, *, folder: Path) -> dict[str, Step]:
    """All steps by variant, without dropout; packed models share the ordinary ones' parameters.

    Args:
        shape: BERT's sizes.
        batch: As for :class:`Step`.
        folder: For the file of the cached teacher, which is opened and unlinked at once.
    """
    torch.manual_seed(0)
    dense, moe = bert(shape), moebert(shape)
    narrow = bert({**shape, "intermediate_size": shape["intermediate_size"] // 4})
    fast = accelerate(dense)
    plain, packed, half = (
        partial(ask, model, batch, states)
        for model, states in (
            (dense, True),
            (fast, "packed"),
            (accelerate(dense, dtype=torch.bfloat16), "packed"),
        )
    )
    made = {RELEASE: Step(reference_release(moe), plain, batch, padding=True)}
    for student, (padded_name, packed_name, half_name) in ((moe, VARIANTS), (narrow, LIMITS)):
        quick = accelerate(student)
        made[padded_name] = Step(student, plain, batch)
        made[packed_name] = Step(quick, packed, batch, "packed")
        made[half_name] = Step(quick, half, batch, "packed", half=True)
    made[CACHED] = Step(made[PACKED].student, cached(fast, batch, folder), batch, "packed")
    for step in made.values():
        set_dropout(step.student, 0.0)
    return made


def ask(teacher_model: nn.Module, batch: Inputs, states: str | bool) -> Any:
    """A teacher's output for a batch."""
    return teacher_model(**without_targets(batch), output_hidden_states=states)


def cached(teacher_model: nn.Module, batch: Inputs, folder: Path) -> Callable[[], Any]:
    """A call that reads the teacher's output from a file."""
    states = TeacherStates(
        folder / STATES,
        batch["attention_mask"].sum(1).tolist(),
        layers=list(range(teacher_model.config.num_hidden_layers + 1)),
        width=teacher_model.config.hidden_size,
        dtype=torch.float32,
    )
    with torch.no_grad():
        states.fill(lambda part: ask(teacher_model, part, "packed"), [batch])
    return lambda: states.output(batch, teacher_model)


def set_dropout(student: nn.Module, dropout: float) -> None:
    """Put a student into train mode with this dropout everywhere."""
    for module in student.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


def with_labels(batch: Inputs) -> Inputs:
    """Add ``labels`` and ``index`` ``(B,)``, and a mask where there is no padding."""
    index = torch.arange(len(batch["input_ids"]))
    mask = torch.ones_like(batch["input_ids"])
    return {"attention_mask": mask, **batch, "labels": index % 2, "index": index}


def check_losses(made: Mapping[str, Step]) -> dict[str, float]:
    """Losses of all variants without padding and dropout: the same for the same student.

    Raises:
        UserError: as :func:`~moebert_lib.bench.harness.check_equal`.
    """
    losses = {name: step.loss(padding=False).detach() for name, step in made.items()}
    origins = {name: LIMITS[0] if name in LIMITS else RELEASE for name in made}
    check_equal("losses", losses, origins, exact=1e-3, half=2e-2)
    return {name: float(loss) for name, loss in losses.items()}


# Scoring neurons by Eq. 4. A loop makes one backward for each example and reads the gradients of
# W1 and W2. The paper's code asks autograd for each of them separately, 24 walks through the graph
# for 12 layers. The library asks for no parameter's gradient, once for all examples.

LOOP, WALKS, ONE_BACKWARD = "per-example loop", "release", "one backward, padded"
FORWARD, FORWARD_PACKED = "forward alone, padded", "forward alone, packed"


def importance(
    *, shape: Sizes = BASE, repeats: int = 3, preset: str = "quick", scale: int = 1
) -> Benchmark:
    """``moebert bench importance``: 32 sentences, full and of GLUE-like lengths.

    Args:
        shape: BERT's sizes.
        repeats: Timed rounds.
        preset: Whose fine-tuned model the ranks in bfloat16 are measured on.
        scale: Divides sentences and lengths; for tests.
    """
    model, n, vocab = bert(shape), 32 // scale, shape["vocab_size"]
    batches = {
        "32 x 64": with_labels(zipf(vocab, n=n, length=64 // scale)),
        "GLUE-like": with_labels(glue_like(vocab, n=n, longest=128 // scale)),
    }
    return Benchmark(
        name="importance",
        title=f"scoring neurons, hidden size {shape['hidden_size']}, {torch.get_num_threads()} "
        "threads",
        settings={setting: partial(scorings, model, batch) for setting, batch in batches.items()},
        baseline=LOOP,
        limits={name: FORWARD_PACKED for name in (ONE_BACKWARD, PACKED, HALF)},
        main=PACKED,
        check=check_scores,
        examples=n,
        repeats=repeats,
        facts={"shape": shape, "rank_error_scale": preset, "rank_error": rank_error(preset)},
    )


def scorings(model: nn.Module, batch: Inputs) -> dict[str, Callable[[], Tensor]]:
    """All ways to score a batch, each returning ``(L, B, F)``, and forward passes; by variant."""
    fast, inputs = accelerate(model), without_targets(batch)

    def score(model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        with frozen(model):
            return score_batch(model, batch, {"scores": of_eq4}, dtype=dtype)["scores"]

    return {
        LOOP: partial(per_example, model, batch, all_gradients),
        WALKS: partial(per_example, model, batch, gradients_by_walks),
        ONE_BACKWARD: partial(score, model),
        PACKED: partial(score, fast),
        HALF: partial(score, fast, torch.bfloat16),
        FORWARD: forward(model, inputs),
        FORWARD_PACKED: forward(fast, inputs),
    }


def per_example(
    model: nn.Module, batch: Inputs, gradients: Callable[[nn.Module, Tensor], list[Tensor]]
) -> Tensor:
    """Eq. 4 for one example after the other, each trimmed to its length: ``(L, B, F)``.

    Args:
        model: A dense BERT.
        batch: With ``attention_mask`` and ``labels``.
        gradients: Returns a loss's gradients for each :func:`ffn_weights`.
    """
    examples = []
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        example = {
            name: x[i : i + 1, :length] if x.dim() > 1 else x[i : i + 1]
            for name, x in batch.items()
        }
        loss = model(**example).loss
        pairs = zip(ffn_weights(model), gradients(model, loss), strict=True)
        flows = [(weight * gradient).detach() for weight, gradient in pairs]
        layers = zip(flows[::2], flows[1::2], strict=True)
        examples.append(torch.stack([(up.sum(1) + down.sum(0)).abs() for up, down in layers]))
    model.zero_grad()
    return torch.stack(examples, 1)


def ffn_weights(model: nn.Module) -> list[Tensor]:
    """W1 ``(F, D)`` and W2 ``(D, F)`` of each layer in turn."""
    return [weight for ffn in ffns(model) for weight in (ffn.up.weight, ffn.down.weight)]


def all_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """One backward for all parameters of the model."""
    model.zero_grad()
    loss.backward()
    return [weight.grad for weight in ffn_weights(model)]


def gradients_by_walks(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """A walk through the graph for every weight. Source: the paper's ``modeling_bert.py``."""
    walks = (torch.autograd.grad(loss, w, retain_graph=True) for w in ffn_weights(model))
    return [gradient for (gradient,) in walks]


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Refuse scores that differ from those of the loop, as parts of each layer's highest score.

    Raises:
        UserError: as :func:`~moebert_lib.bench.harness.check_equal`.
    """
    highest = scores[LOOP].amax((1, 2), keepdim=True)
    others = (WALKS, ONE_BACKWARD, PACKED, HALF)
    parts = {name: scores[name] / highest for name in (LOOP, *others)}
    check_equal("the scores", parts, dict.fromkeys(others, LOOP), exact=1e-4, half=0.1)


def rank_error(preset: str, *, n_examples: int = 256) -> list[dict[str, float]]:
    """How much bfloat16 changes the scores of a preset's teacher; printed, and returned by layer.

    Returns:
        ``shared`` and ``kept``, the parts of the top sixth and of the top half that stay there;
        ``spearman``, the rank correlation; ``error``, a score's median relative error. Nothing
        where the teacher's weights are missing.
    """
    settings = Settings.at(preset)
    try:
        model = accelerate_if_possible(teacher(Store(), settings).model)
    except UserError as error:
        print(f"the error of bfloat16 is not measured: {error}", flush=True)
        return []
    batches = dataset(settings).batches("train", batch_size=32, limit=n_examples, shuffle=True)
    batches = list(batches)
    exact = ffn_importance(model, batches).scores
    half = ffn_importance(model, batches, dtype=torch.bfloat16).scores
    width = exact.shape[1]
    columns = {
        "shared": top_overlap(exact, half, width // 6),
        "kept": top_overlap(exact, half, width // 2),
        "spearman": rank_correlation(exact, half),
        "error": ((half - exact).abs() / exact).median(1).values,
    }
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    print(f"bfloat16 beside float32, by layer of the fine-tuned model at scale {preset}")
    print(table.round(4).to_string(), flush=True)
    return as_json(table)
