"""Training through transformers' ``Trainer``: fine-tune the teacher, distil the student.

Optimiser, schedule, precision and devices are Trainer's. Ours are the loss, the progress line
and when to write a checkpoint. AdamW with betas 0.9 and 0.999, linear decay, clipping 1.0, and no
warm-up unless it is asked for (the paper's appendix).
"""

import functools
import gc
import inspect
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from moebert_lib.config.provenance import has_bfloat16
from moebert_lib.config.settings import Settings
from moebert_lib.data.batching import HALF, TokenBatches, batches, lengths, without_targets
from moebert_lib.method.distillation_loss import distillation_terms, total_loss
from moebert_lib.method.encoder_layouts import set_dropout
from moebert_lib.model.accelerate import accelerate, accelerate_if_exact
from moebert_lib.training.checkpoints import keep
from moebert_lib.training.teacher_states import TeacherStates, cached_states, keep_states

FILL = 4096  # tokens in a batch of a teacher whose states are cached


class Progress(TrainerCallback):
    """Prints a line every few seconds: plain text, since a progress bar is unreadable in a log."""

    def __init__(self, name: str, *, every_seconds: float = 15.0):
        self.name, self.every = name, every_seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.printed = time.monotonic()
        self.first = state.global_step
        if self.first:
            print(f"· {self.name}: resumed at step {self.first}/{state.max_steps}", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        if now - self.printed >= self.every or state.global_step == state.max_steps:
            self.printed = now
            passed = f"{now - self.started:.0f} s"
            since = f" since step {self.first}" if self.first else ""
            print(
                f"· {self.name}: step {state.global_step}/{state.max_steps}, {passed}{since}",
                flush=True,
            )


class ScoreAt(TrainerCallback):
    """Calls ``score(epoch, model)`` in the course of a training, with the model in eval mode.

    Args:
        epochs: After how many epochs, parts of one too: at the nearest step, the first at least.
        score: It must not draw random numbers, so that the training stays as it is without it.
    """

    def __init__(self, epochs: Iterable[float], score: Callable[[float, nn.Module], None]):
        self.epochs, self.score = epochs, score

    def on_step_end(self, args, state, control, model=None, **kwargs):
        steps_per_epoch = state.max_steps / args.num_train_epochs
        for epoch in self.epochs:
            if state.global_step == max(1, round(epoch * steps_per_epoch)):
                self.score(epoch, model.eval())
                model.train()


class DistillationTrainer(Trainer):
    """Trainer with the paper's objective (Sec. 3.2): task loss plus weighted Eq. 7.

    The teacher is not part of the student: it is not trained, saved or counted. It runs without
    gradient, and in eval mode unless ``teacher_dropout`` is set.

    Both run without padding (``packed``): ``trainer.model`` is an accelerated model that shares
    its parameters with the given one, and Eq. 5 compares real tokens only. Where padding counts,
    as in the logits of spans, or with gradient checkpointing or NEFTune's noise, both run as they
    are. Label smoothing changes the task loss. The loss is a mean over each device's batch, so
    ``average_tokens_across_devices`` has nothing to average. Evaluation gives logits, and the
    same loss.

    Args:
        model: The student, in float32.
        args: ``TrainingArguments``; with ``bf16`` the teacher computes in bfloat16 too.
        teacher: The dense, fine-tuned model.
        distill: ``all``, ``skip``, ``last``, or ``none`` for plain fine-tuning (Table 3).
        weight: ``lambda_distill``.
        hidden_loss_mean: Of Eq. 5, over ``tokens`` or ``examples``.
        padding_in_loss: Count padding in Eq. 5, as the release does.
        teacher_dropout: Run the teacher in train mode, as the release does.
        max_tokens: Tokens in a batch, instead of the arguments' number of examples.
        teacher_states: The teacher's cached states; batches then need an ``index``.

    Raises:
        ValueError: ``teacher_states`` where padding counts or the teacher has dropout; a student in
            half precision; ``model_init``; or what would put another loss in the objective's
            place: ``compute_loss_func``, ``use_liger_kernel``, or label smoothing for a head
            without classes.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *others,
        teacher: nn.Module,
        distill: str = "all",
        weight: float = 1.0,
        hidden_loss_mean: str = "tokens",
        padding_in_loss: bool = False,
        teacher_dropout: bool = False,
        max_tokens: int | None = None,
        teacher_states: TeacherStates | None = None,
        **kwargs,
    ):
        given = inspect.signature(Trainer.__init__).bind_partial(None, model, args, *others)
        _refuse_other_losses(model, args, {**given.arguments, **kwargs})
        check_precision(model)
        ordinary = padding_in_loss or _looks_at_layers(args)
        student = model if ordinary else accelerate_if_exact(model)
        super().__init__(student, args, *others, **kwargs)
        self.model_accepts_loss_kwargs = False  # our loss is a mean over the batch
        self.packed, self.max_tokens = student is not model, max_tokens
        self.teacher_states = teacher_states
        if teacher_states and (teacher_dropout or not self.packed):
            raise ValueError(
                "teacher_states are cached without padding and without dropout; "
                "this training has one of them"
            )
        teacher = teacher.to(self.args.device)
        half = torch.bfloat16 if self.args.bf16 else None
        teacher = accelerate(teacher, dtype=half) if self.packed else teacher
        self.teacher = teacher.train(teacher_dropout)
        self.distill, self.weight, self.padding_in_loss = distill, weight, padding_in_loss
        self.hidden_loss_mean = hidden_loss_mean
        self._terms: list[torch.Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective for one batch; its parts are kept for :meth:`curve`."""
        states = self.distill != "none" and self._states
        given = {**_without_index(inputs), "output_hidden_states": states}
        task, student = super().compute_loss(model, given, return_outputs=True)
        if student.loss is None and getattr(student, "aux_loss", None) is not None:  # smoothed
            task = task + self.model.config.router_aux_loss_coef * student.aux_loss
        loss = task
        hidden = prediction = torch.zeros_like(loss)
        if self.distill != "none":
            cached = self.teacher_states if "index" in inputs else None
            teacher = cached.output(inputs, self.teacher) if cached else self.run_teacher(inputs)
            mask = None if self.padding_in_loss else inputs["attention_mask"]
            hidden, prediction = distillation_terms(
                student, teacher, mask=mask, layers=self.distill, mean=self.hidden_loss_mean
            )
            loss = total_loss(task, hidden, prediction, self.weight)
        if model.training:
            self._terms.append(torch.stack([task, hidden, prediction, loss]).detach())
        predicted = {name: value for name, value in student.items() if name != "hidden_states"}
        return (loss, type(student)(**predicted)) if return_outputs else loss

    def prediction_step(self, model, inputs, *others, **kwargs):
        """As Trainer's; numbers of examples are those of the training set, and are left out."""
        return super().prediction_step(model, _without_index(inputs), *others, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.teacher_states and "index" not in self._signature_columns:
            self._signature_columns.append("index")

    @property
    def _states(self) -> str | bool:
        return "packed" if self.packed else True

    @torch.no_grad()
    def run_teacher(self, inputs):
        """The teacher's output for a batch."""
        device = self.args.device.type
        own_dtype = self.packed and device == "cpu" and not self.teacher.training
        with torch.autocast(device, torch.bfloat16, enabled=self.args.bf16 and not own_dtype):
            return self.teacher(**without_targets(inputs), output_hidden_states=self._states)

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's, or in batches of at most ``max_tokens`` tokens."""
        if self.max_tokens is None:
            return super().get_train_dataloader()
        batches = TokenBatches(lengths(self.train_dataset), self.max_tokens)
        rows = self._remove_unused_columns(self.train_dataset, description="training")
        loader = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def curve(self) -> pd.DataFrame:
        """Loss terms by training step: task, hidden (Eq. 5), prediction (Eq. 6), total."""
        values = torch.stack(self._terms).float().cpu().numpy()
        frame = pd.DataFrame(values, columns=["task", "hidden", "prediction", "total"])
        frame.insert(0, "step", range(1, len(frame) + 1))
        return frame


def _without_index(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name != "index"}


def _looks_at_layers(args: TrainingArguments | None) -> bool:
    """Whether the arguments change the model's own layers or embeddings as they run."""
    checkpointing = ("gradient_checkpointing", "activation_checkpointing")  # one after the other
    asked = any(getattr(args, name, False) for name in checkpointing)
    return asked or getattr(args, "neftune_noise_alpha", None) is not None


def _refuse_other_losses(model: nn.Module, args: TrainingArguments | None, given: dict) -> None:
    """Refuse what Trainer's arguments would do to the loss, and the objective cannot have."""
    for name, instead in (
        ("compute_loss_func", "a subclass with its own compute_loss"),
        ("model_init", "the student itself, which the teacher belongs to"),
    ):
        if given.get(name) is not None:
            raise ValueError(f"{name} would replace a part of the objective; expected {instead}")
    if getattr(args, "use_liger_kernel", False):
        raise ValueError("use_liger_kernel=True: Liger has no MoEBERT; expected False")
    config, smoothing = model.config, getattr(args, "label_smoothing_factor", 0)
    classes = not hasattr(model, "qa_outputs") and config.num_labels > 1
    if smoothing and not (classes and config.problem_type != "multi_label_classification"):
        raise ValueError(
            f"label_smoothing_factor={smoothing} needs a head with one right class of several, "
            f"not {type(model).__name__} with {config.num_labels} outputs; expected 0"
        )


def check_precision(model: nn.Module) -> None:
    """Refuse to train parameters in half precision, where most small steps change nothing.

    Raises:
        ValueError: naming the parameter's dtype.
    """
    half = {p.dtype for p in model.parameters() if p.requires_grad} & set(HALF)
    if half:
        raise ValueError(
            f"the model's parameters are {half.pop()}, in which most steps of training are lost; "
            "expected model.float(), with TrainingArguments(bf16=True) to compute in bfloat16"
        )


def fine_tune(
    model: nn.Module,
    encoded,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    folder: Path,
    *,
    checkpoints: Path | None = None,
) -> None:
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
    check_precision(model)
    trainer = Trainer(
        accelerate_if_exact(model),
        training_arguments(folder, settings, of="teacher_", seed=settings.dense_seed),
        train_dataset=encoded,
        callbacks=[Progress("teacher")],
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    _run(trainer, checkpoints)
    model.eval()  # its own flags: what was trained is the accelerated one


def distil(
    student: nn.Module,
    teacher: nn.Module,
    encoded,
    tokenizer,
    settings: Settings,
    folder: Path,
    *,
    checkpoints: Path | None = None,
    score: Callable[[float, nn.Module], None] | None = None,
) -> pd.DataFrame:
    """Train the student in place; returns the loss terms by step.

    Args:
        student: From ``conversion.to_moebert``, or ``half_depth``.
        teacher: The dense model it came from.
        encoded: Training set from ``data.encode``.
        tokenizer: Pads batches.
        settings: Training, distillation and switch settings.
        folder: For Trainer's own files; nothing is left there.
        checkpoints: As in :func:`fine_tune`.
        score: As in :class:`ScoreAt`, for the epochs of ``score_at``. A training that resumes
            does not call it again for what was scored before its checkpoint.
    """
    if settings.student_dropout is not None:
        set_dropout(student, settings.student_dropout)
    states, is_new = None, False
    if settings.cache_teacher and settings.distill != "none":
        states, is_new = cached_states(teacher, encoded, folder, half=in_half(settings))
    trainer = DistillationTrainer(
        student,
        training_arguments(folder, settings, seed=settings.seed),
        callbacks=[Progress("student"), *([ScoreAt(settings.score_at, score)] if score else [])],
        train_dataset=_numbered(encoded) if states else encoded,
        data_collator=_collator(tokenizer, settings),
        teacher=teacher,
        distill=settings.distill,
        weight=settings.distill_weight,
        hidden_loss_mean=settings.hidden_loss_mean,
        padding_in_loss=settings.padding_in_loss,
        teacher_dropout=settings.teacher_dropout,
        max_tokens=settings.tokens_per_batch,
        teacher_states=states,
    )
    if is_new:  # filled before the first step, so that a resumed training has the same bytes
        rows = batches(encoded, tokenizer, 1, device=trainer.args.device, max_tokens=FILL)
        states.fill(trainer.run_teacher, rows)
        keep_states(teacher, encoded, states)
    _run(trainer, checkpoints, terms=trainer._terms)
    student.eval()  # its own flags: what was trained is the accelerated one
    teacher.eval()
    return trainer.curve()


def _numbered(encoded):
    return encoded.add_column("index", list(range(len(encoded))))


def _collator(tokenizer, settings: Settings) -> DataCollatorWithPadding:
    """Pads to a batch's longest; where padding counts, to ``max_length``, as the release does."""
    if settings.padding_in_loss:
        return DataCollatorWithPadding(
            tokenizer, padding="max_length", max_length=settings.max_length
        )
    return DataCollatorWithPadding(tokenizer)


def in_half(settings: Settings) -> bool:
    """Whether trainings compute in bfloat16: as asked, or by default on a GPU that has it."""
    if settings.dtype == "auto":
        return torch.cuda.is_available() and has_fast_bfloat16()
    return settings.dtype == "bfloat16"


def has_fast_bfloat16() -> bool:
    """Whether the device that trainings run on computes in bfloat16, rather than emulating it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_bfloat16()


def training_arguments(
    folder: Path, settings: Settings, *, seed: int, of: str = ""
) -> TrainingArguments:
    """Trainer's arguments for a teacher or a student: quiet, on one device.

    Batches are of examples of similar length, which spares padding; the release mixes lengths.

    Args:
        folder: For Trainer's own files.
        settings: The experiment.
        seed: Of data order and dropout.
        of: ``teacher_`` for the settings of the teacher's training, empty for the student's.
    """
    constant = not of and settings.schedule == "constant"
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        num_train_epochs=getattr(settings, f"{of}epochs"),
        per_device_train_batch_size=getattr(settings, f"{of}batch_size"),
        learning_rate=getattr(settings, f"{of}learning_rate"),
        weight_decay=getattr(settings, f"{of}weight_decay"),
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="constant_with_warmup" if constant else "linear",
        warmup_steps=getattr(settings, f"{of}warmup"),
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=in_half(settings),
        use_cpu=not torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel cannot gather packed states
    return arguments


def _run(trainer: Trainer, checkpoints: Path | None, *, terms: list | None = None) -> None:
    """Train, or go on training, without Trainer's closing dictionary on standard output."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    _freeze()
    last = keep(trainer, checkpoints, terms=terms) if checkpoints else None
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.model.eval()


@functools.cache
def _freeze() -> None:
    """Spare Trainer's garbage collections what was there before the first training."""
    gc.freeze()
