"""Checkpoints of a training: written every few minutes, so that a killed training resumes.

Trainer writes and reads weights, optimiser, schedule and random state. This file decides when,
adds what Trainer leaves out, and writes checksums last, by which a complete checkpoint is known.
A resumed training ends with the same bits as an uninterrupted one on the same machine with the
same number of threads.
"""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from moebert_lib.config.errors import UserError
from moebert_lib.config.file_io import write_json
from moebert_lib.config.provenance import checksums

CHECKPOINT_SECONDS = 300  # between two checkpoints, unless the environment says otherwise
VARIABLE = "MOEBERT_CHECKPOINT_SECONDS"
KEPT = 2
MARKER = "whole.json"  # SHA-256 of every other file
OURS = "moebert.safetensors"


def seconds() -> float:
    """Seconds between two checkpoints: ``MOEBERT_CHECKPOINT_SECONDS`` where it is set.

    Raises:
        UserError: it is not a number, or negative.
    """
    text = os.environ.get(VARIABLE) or str(CHECKPOINT_SECONDS)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise UserError(
            f"{VARIABLE}={text!r}: expected seconds, 0 or more, "
            f"as in {VARIABLE}={CHECKPOINT_SECONDS}"
        )
    return value


def keep(trainer: Trainer, folder: Path, *, terms: list[torch.Tensor] | None = None) -> Path | None:
    """Make a trainer write checkpoints; returns the one to resume from, if there is one.

    Args:
        trainer: Not yet trained. Its output folder and limit of checkpoints are changed.
        folder: For the checkpoints of this training only; made with the first of them.
        terms: Loss terms, one tensor a step. They are stored too, and read back on resuming.

    Raises:
        UserError: :func:`seconds` does.
    """
    trainer.args.output_dir = str(folder)  # set here, since Trainer's constructor would make it
    trainer.args.save_total_limit = KEPT
    trainer.add_callback(Checkpoints(terms))
    return latest(folder)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint; damaged ones are removed and named on standard error."""
    paths = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    newest = None
    for path in sorted(paths, key=lambda path: int(path.name.rpartition("-")[2])):
        damage = _damage(path)
        if damage:  # older ones too: Trainer would count them among those it keeps
            shutil.rmtree(path)
            print(f"moebert: {path}: {damage}; removed", file=sys.stderr)
        else:
            newest = path
    return newest


def clear(folder: Path) -> None:
    """Remove all checkpoints of a training, if there are any.

    Call it when the results of the trained model are stored, and not before: a process killed
    in between then repeats only the steps after the last checkpoint.
    """
    shutil.rmtree(folder, ignore_errors=True)


class Checkpoints(TrainerCallback):
    """Asks Trainer for a checkpoint every few minutes, and completes it.

    Trainer resumes inside an epoch by drawing the order of its batches again, but from the
    random state of a new process, which is right in the first epoch only. So the state at
    the start of the epoch is kept, and set before Trainer draws.

    Args:
        terms: As in :func:`keep`.
    """

    def __init__(self, terms: list[torch.Tensor] | None = None):
        self.terms = [] if terms is None else terms
        self.every, self.saved = seconds(), time.monotonic()
        self.epoch_state = torch.get_rng_state()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # resumed
            kept = load_file(_path(args, state) / OURS)
            self.terms[:] = kept["terms"].to(args.device) if "terms" in kept else []
            torch.set_rng_state(kept["epoch_state"])
        self.saved = time.monotonic()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch_state = torch.get_rng_state()

    def on_step_end(self, args, state, control, **kwargs):
        due = time.monotonic() - self.saved > self.every
        # not after the last step: if resumed there inside an epoch, Trainer would do one more
        if due and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """Trainer has written all of its files by now."""
        path = _path(args, state)
        between = state.epoch == int(state.epoch)  # the next epoch starts from here
        tensors = {"epoch_state": torch.get_rng_state() if between else self.epoch_state}
        if self.terms:
            tensors["terms"] = torch.stack(self.terms)
        save_file(tensors, path / OURS)
        write_json(path / MARKER, checksums(path))
        self.saved = time.monotonic()


def _path(args, state) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _damage(path: Path) -> str:
    """Why a checkpoint cannot be used, "" where it can."""
    try:
        expected = json.loads((path / MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return "it was not written to its end"
    actual = checksums(path)
    changed = [name for name, digest in expected.items() if actual.get(name) != digest]
    return f"{changed[0]} is missing or has changed" if changed else ""
