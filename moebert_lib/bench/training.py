"""How fast a step of distillation is: the release's way, and ours, beside their limits.

A step is the student forward and backward and the teacher forward: task loss plus Eq. 7 over all
layers, gradients for all parameters, no optimiser. The teacher is in eval mode everywhere.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from moebert_lib.bench import harness
from moebert_lib.bench.harness import BASE, LIMIT, VOCAB, as_released, glue_like, moebert
from moebert_lib.config.errors import UserError
from moebert_lib.data.batching import without_targets
from moebert_lib.method.distillation_loss import distillation_terms
from moebert_lib.model.accelerate import accelerate
from moebert_lib.training.teacher_states import STATES, TeacherStates

RELEASE, PACKED = "release style", "packed"
HALF, CACHED = f"{PACKED} bf16", f"{PACKED}, cached teacher"
PADDED_LIMIT, PACKED_LIMIT = f"{LIMIT}, padded", f"{LIMIT}, packed"
HALF_LIMIT = f"{PACKED_LIMIT} bf16"
#: What each variant could reach at best: a dense student as wide as one expert, the same way.
LIMITS = {
    RELEASE: PADDED_LIMIT,
    "ordinary, padded": PADDED_LIMIT,
    PACKED: PACKED_LIMIT,
    HALF: HALF_LIMIT,
}

DRY, WET = "GLUE-like, dropout 0", "GLUE-like, dropout 0.1"
#: Attention with dropout has no fast kernel on a CPU: few variants, about half the rounds.
WITH_DROPOUT = (RELEASE, PACKED, HALF)
REPEATS = 5

#: How many times as fast as the release's step, on a CPU.
WISHES: list[harness.Wish] = [
    (DRY, PACKED, RELEASE, 3.0),
    (DRY, HALF, RELEASE, 4.5),
    (DRY, CACHED, RELEASE, None),
    (DRY, PACKED, PACKED_LIMIT, None),
    (DRY, HALF, HALF_LIMIT, None),
    (WET, PACKED, RELEASE, None),
    (WET, HALF, RELEASE, None),
]

#: Largest difference of losses, relative, between variants of one student.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Step:
    """One variant of a step.

    Attributes:
        student: In train mode.
        teacher: Gives the teacher's output for the batch.
        batch: ``input_ids``, ``attention_mask`` ``(B, T)``, ``labels`` and ``index`` ``(B,)``.
        states: What the student is asked for, ``"packed"`` or ``True`` for padded ones.
        half: Run the student in bfloat16 by autocast, as ``Trainer(bf16=True)`` does.
        padding: Count padding in Eq. 5, as the release does.
    """

    student: nn.Module
    teacher: Callable[[], SimpleNamespace]
    batch: dict[str, Tensor]
    states: str | bool = True
    half: bool = False
    padding: bool = False

    def loss(self, *, padding: bool) -> Tensor:
        """The objective; ``padding`` counts in Eq. 5."""
        given = {name: value for name, value in self.batch.items() if name != "index"}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            own = self.student(**given, output_hidden_states=self.states)
        with torch.no_grad():
            teacher = self.teacher()
        hidden = [state.float() for state in own.hidden_states]  # as Trainer's bf16 does
        student = SimpleNamespace(hidden_states=hidden, logits=own.logits.float())
        mask = None if padding else self.batch["attention_mask"]
        return own.loss.float() + sum(distillation_terms(student, teacher, mask=mask))

    def __call__(self) -> None:
        self.student.zero_grad()
        self.loss(padding=self.padding).backward()


def variants(
    shape: dict[str, int], batch: dict[str, Tensor], *, dropout: float, folder: Path
) -> dict[str, Step]:
    """All steps by name; a packed model shares its parameters with the ordinary one.

    Args:
        shape: BERT's sizes.
        batch: As for :class:`Step`.
        dropout: Of students, everywhere in them.
        folder: Where the cached teacher's states lie; its steps need the file to stay.
    """
    built = harness.models(shape, only=("dense", LIMIT))
    dense, narrow, moe = built["dense"], built[LIMIT], moebert(shape)
    fast, fast_half = accelerate(dense), accelerate(dense, dtype=torch.bfloat16)
    plain, packed = partial(ask, dense, batch, True), partial(ask, fast, batch, "packed")
    half = partial(ask, fast_half, batch, "packed")
    released, quick, quick_narrow = as_released(moe), accelerate(moe), accelerate(narrow)
    ours = {"batch": batch, "states": "packed"}
    steps = {
        RELEASE: Step(released, plain, batch, padding=True),
        PADDED_LIMIT: Step(narrow, plain, batch),
        "ordinary, padded": Step(moe, plain, batch),
        PACKED: Step(quick, packed, **ours),
        PACKED_LIMIT: Step(quick_narrow, packed, **ours),
        HALF: Step(quick, half, **ours, half=True),
        HALF_LIMIT: Step(quick_narrow, half, **ours, half=True),
    }
    if not dropout:
        steps[CACHED] = Step(quick, _cached(fast, batch, folder), **ours)
    for step in steps.values():
        wet(step.student, dropout)
    return steps


def ask(teacher: nn.Module, batch: dict[str, Tensor], states: str | bool) -> Any:
    """What a teacher says to a batch."""
    return teacher(**without_targets(batch), output_hidden_states=states)


def wet(student: nn.Module, dropout: float) -> None:
    """Put a student into train mode with that dropout."""
    for module in student.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


def _cached(teacher: nn.Module, batch: dict[str, Tensor], folder: Path) -> Callable[[], Any]:
    lengths, config = batch["attention_mask"].sum(1).tolist(), teacher.config
    layers = list(range(config.num_hidden_layers + 1))
    told = TeacherStates(
        folder / STATES, lengths, layers=layers, width=config.hidden_size, dtype=torch.float32
    )
    with torch.no_grad():
        told.fill(lambda asked: ask(teacher, asked, "packed"), [batch])
    return lambda: told.of(batch, teacher)


def glue(vocab: int, *, scale: int = 1) -> dict[str, Tensor]:
    """32 sentences of GLUE-like lengths, at most 128 tokens, with labels and numbers."""
    batch = glue_like(vocab, n=32 // scale, longest=128 // scale)
    index = torch.arange(len(batch["input_ids"]))
    return {**batch, "labels": index % 2, "index": index}


def agree(steps: Mapping[str, Step]) -> dict[str, float]:
    """Losses of all variants without padding, the same for the same student, without dropout.

    Raises:
        UserError: they are not; nothing is timed that computes something else.
    """
    losses = {name: float(step.loss(padding=False).detach()) for name, step in steps.items()}
    for name, step in steps.items():
        origin = PADDED_LIMIT if name.startswith(LIMIT) else RELEASE
        close = TOLERANCE[torch.bfloat16 if step.half else torch.float32] * abs(losses[origin])
        if not abs(losses[name] - losses[origin]) <= close:  # NaN too
            raise UserError(
                f"the loss of '{name}' is {losses[name]:.6g}, that of '{origin}' "
                f"{losses[origin]:.6g}; nothing is timed that differs"
            )
    return losses


def measured(
    shape: dict[str, int], *, repeats: int = REPEATS, scale: int = 1
) -> Iterator[pd.DataFrame]:
    """Timings of one setting after another: without dropout, once losses agree, and with it."""
    batch = glue(shape.get("vocab_size", VOCAB), scale=scale)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        steps = variants(shape, batch, dropout=0.0, folder=folder)
        losses = agree(steps)
        print(
            f"losses agree: {losses[PACKED]:.5f} packed, {losses[RELEASE]:.5f} release style, "
            f"{losses[HALF]:.5f} in bf16",
            flush=True,
        )
        yield harness.time_interleaved(steps, repeats=repeats).assign(setting=DRY)
        for name in WITH_DROPOUT:
            wet(steps[name].student, 0.1)
        chosen = {name: steps[name] for name in WITH_DROPOUT}
        rounds = (repeats + 1) // 2
        yield harness.time_interleaved(chosen, repeats=rounds).assign(setting=WET)


def measure(
    shape: dict[str, int] = BASE, *, repeats: int = REPEATS, scale: int = 1
) -> pd.DataFrame:
    """All timings: columns ``setting``, ``variant``, ``repeat``, ``seconds``.

    Args:
        shape: BERT's sizes.
        repeats: Timed rounds; about half as many with dropout.
        scale: Divides sentences and lengths; for tests.
    """
    frames = pd.concat([*measured(shape, repeats=repeats, scale=scale)], ignore_index=True)
    return frames[["setting", "variant", "repeat", "seconds"]]


def main(*, shape: dict[str, int] = BASE, repeats: int = REPEATS, out: Path | None = None) -> bool:
    """``moebert bench training``: time, print the table and the targets, keep the record.

    Returns:
        Whether all settings were timed; Ctrl-C keeps those that were.

    Raises:
        UserError: variants disagree about the loss.
    """
    conditions = harness.prepare()
    batch = glue(shape.get("vocab_size", VOCAB))
    n, tokens = len(batch["input_ids"]), int(batch["attention_mask"].sum())
    print(
        f"a step of distillation: hidden size {shape['hidden_size']}, "
        f"{shape['num_hidden_layers']} layers, {n} sentences, {tokens} tokens, float32 unless it "
        f"says bf16, {torch.get_num_threads()} threads; {repeats} rounds, about half as many "
        "with dropout",
        flush=True,
    )
    timings, complete = harness.gather(measured(shape, repeats=repeats))
    timings = timings[["setting", "variant", "repeat", "seconds"]]
    table = harness.summary(timings, against=RELEASE, limits=LIMITS, units=n)
    targets = harness.judge(timings, WISHES)
    for setting, rows in table.groupby("setting", sort=False):
        print(
            f"\n{setting}: speed over '{RELEASE}', and of the equal-FLOP student computed alike, "
            "with quartiles"
        )
        harness.show(rows.drop(columns="setting"))
    print()
    harness.say(targets)
    harness.keep(
        "training",
        timings,
        table,
        targets=targets,
        out=out,
        complete=complete,
        shape=shape,
        tokens={DRY: tokens, WET: tokens},
        device="cpu",
        conditions=conditions,
    )
    return complete
