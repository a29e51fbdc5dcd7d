"""Training through transformers' ``Trainer``: fine-tune the teacher, distil the student.

Optimiser, schedule, precision and devices are Trainer's. Ours are the loss, the progress line
and when to write a checkpoint. AdamW with betas 0.9 and 0.999, linear decay, no warm-up,
clipping 1.0 (the paper's appendix).
"""

import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from moebert_lib.checkpoints import keep
from moebert_lib.distill import distillation_terms
from moebert_lib.evaluate import without_targets
from moebert_lib.settings import Settings


class Progress(TrainerCallback):
    """A line now and then: plain text, since a progress bar is unreadable in a log."""

    def __init__(self, name: str, *, every_seconds: float = 15.0):
        self.name, self.every = name, every_seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.said = time.monotonic()
        self.first = state.global_step
        if self.first:
            print(f"· {self.name}: resumed at step {self.first}/{state.max_steps}", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        if now - self.said >= self.every or state.global_step == state.max_steps:
            self.said = now
            passed = f"{now - self.started:.0f} s"
            since = f" since step {self.first}" if self.first else ""
            print(
                f"· {self.name}: step {state.global_step}/{state.max_steps}, {passed}{since}",
                flush=True,
            )


class DistillationTrainer(Trainer):
    """Trainer with the paper's objective (Sec. 3.2): task loss plus weighted Eq. 7.

    The teacher is no part of the student: it is not trained, saved or counted. It runs
    without gradient and in eval mode unless ``teacher_dropout`` says otherwise.

    Args:
        teacher: The dense, fine-tuned model.
        distill: ``all``, ``skip``, ``last``, or ``none`` for plain fine-tuning (Table 3).
        weight: ``lambda_distill``.
        padding_in_loss: Count padding in Eq. 5, as the release does.
        teacher_dropout: Run the teacher in train mode, as the release does.
    """

    def __init__(
        self,
        *args,
        teacher: nn.Module,
        distill: str = "all",
        weight: float = 1.0,
        padding_in_loss: bool = False,
        teacher_dropout: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # our loss is a mean over the batch
        self.teacher = teacher.to(self.args.device).train(teacher_dropout)
        self.distill, self.weight, self.padding_in_loss = distill, weight, padding_in_loss
        self._terms: list[torch.Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective for one batch; its parts are kept for :meth:`curve`."""
        student = model(**inputs, output_hidden_states=self.distill != "none")
        task = loss = student.loss
        hidden = prediction = torch.zeros_like(loss)
        if self.distill != "none":
            with torch.no_grad():
                teacher = self.teacher(**without_targets(inputs), output_hidden_states=True)
            mask = None if self.padding_in_loss else inputs["attention_mask"]
            hidden, prediction = distillation_terms(
                student, teacher, mask=mask, layers=self.distill
            )
            loss = task + self.weight * (hidden + prediction)
        if model.training:
            self._terms.append(torch.stack([task, hidden, prediction, loss]).detach())
        return (loss, student) if return_outputs else loss

    def curve(self) -> pd.DataFrame:
        """Loss terms by training step: task, hidden (Eq. 5), prediction (Eq. 6), total."""
        values = torch.stack(self._terms).float().cpu().numpy()
        frame = pd.DataFrame(values, columns=["task", "hidden", "prediction", "total"])
        frame.insert(0, "step", range(1, len(frame) + 1))
        return frame


def fine_tune(
    model: nn.Module, encoded, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path,
    *, checkpoints: Path | None = None,
) -> None:  # fmt: skip
    """Fine-tune the dense teacher on the task, in place.

    Args:
        model: A dense model with a classification head.
        encoded: Training set from ``data.encode``.
        tokenizer: Pads batches.
        settings: ``teacher_*``, ``seed`` and ``max_grad_norm`` are used.
        folder: For Trainer's own files; nothing is left there.
        checkpoints: This training's own folder, to resume from and to write to every
            ``checkpoints.CHECKPOINT_SECONDS``; left for the caller to ``checkpoints.clear``
            once the result is stored. None: no checkpoints.
    """
    arguments = training_arguments(
        folder, seed=settings.dense_seed, epochs=settings.teacher_epochs,
        batch_size=settings.teacher_batch_size,
        learning_rate=settings.teacher_learning_rate, weight_decay=settings.teacher_weight_decay,
        settings=settings,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=encoded, callbacks=[Progress("teacher")],
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    _run(trainer, checkpoints)


def distil(
    student: nn.Module, teacher: nn.Module, encoded, tokenizer, settings: Settings, folder: Path,
    *, checkpoints: Path | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Train the student in place; returns the loss terms by step.

    Args:
        student: From ``convert.to_moebert``.
        teacher: The dense model it came from.
        encoded: Training set from ``data.encode``.
        tokenizer: Pads batches.
        settings: Training, distillation and switch settings.
        folder: For Trainer's own files; nothing is left there.
        checkpoints: As in :func:`fine_tune`.
    """
    arguments = training_arguments(
        folder, seed=settings.seed, epochs=settings.epochs, batch_size=settings.batch_size,
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
        settings=settings,
    )  # fmt: skip
    trainer = DistillationTrainer(
        student, arguments, train_dataset=encoded, callbacks=[Progress("student")],
        data_collator=_collator(tokenizer, settings), teacher=teacher,
        distill=settings.distill, weight=settings.distill_weight,
        padding_in_loss=settings.padding_in_loss, teacher_dropout=settings.teacher_dropout,
    )  # fmt: skip
    _run(trainer, checkpoints, terms=trainer._terms)
    teacher.eval()
    return trainer.curve()


def _collator(tokenizer, settings: Settings) -> DataCollatorWithPadding:
    """Pads to a batch's longest; where padding counts, to ``max_length``, as the release does."""
    if settings.padding_in_loss:
        return DataCollatorWithPadding(
            tokenizer, padding="max_length", max_length=settings.max_length
        )
    return DataCollatorWithPadding(tokenizer)


def training_arguments(
    folder: Path, *, seed: int, epochs: float, batch_size: int, learning_rate: float,
    weight_decay: float, settings: Settings,
) -> TrainingArguments:  # fmt: skip
    """Trainer's arguments for one of our runs: quiet, on one device, no warm-up.

    Batches hold examples of like length, which spares padding; the release mixes lengths.
    """
    arguments = TrainingArguments(
        output_dir=str(folder), seed=seed, data_seed=seed, num_train_epochs=epochs,
        per_device_train_batch_size=batch_size, learning_rate=learning_rate,
        weight_decay=weight_decay, max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="linear", warmup_steps=0, train_sampling_strategy="group_by_length",
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(), bf16=torch.cuda.is_available(),
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel's replicas would share routes
    return arguments


def _run(trainer: Trainer, checkpoints: Path | None, *, terms: list | None = None) -> None:
    """Train, or go on training, without Trainer's closing dictionary on standard output."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    last = keep(trainer, checkpoints, terms=terms) if checkpoints else None
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.model.eval()
