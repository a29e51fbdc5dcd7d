"""Commands about models and this machine: importance, convert, bench and doctor."""

import argparse
import importlib
import inspect
import os
from pathlib import Path
from typing import Any

from moebert_lib.cli.options import (
    EXPERIMENT,
    add_settings_options,
    choice,
    count,
    given_settings,
    refuse_useless,
    say,
)
from moebert_lib.config.errors import UserError

SIZES = ("n_experts", "expert_size", "n_shared", "routing", "seed")  # options of convert
ROUTINGS = ("hash-random", "hash-cluster", "gate-token", "gate-sentence", "hash-balance")
MAX_LENGTH = 512  # tokens that BERT takes

#: What ``moebert bench`` measures: the module and the function that declare it.
BENCHMARKS = {
    "inference": ("inference", "inference"),
    "training": ("training_and_importance", "training"),
    "importance": ("training_and_importance", "importance"),
    "scaling": ("inference", "scaling"),
    "widgets": ("sweeps_and_widgets", "redrawing"),
    "batch": ("sweeps_and_widgets", "sweeping"),
}


def add_commands(commands: Any) -> None:
    """Add the commands and their options to the parser of ``moebert``."""
    for add in (_add_importance, _add_convert, _add_bench, _add_doctor):
        add(commands)


def _add_importance(commands: Any) -> None:
    command = commands.add_parser(
        "importance",
        help="score a fine-tuned model's neurons on a task (Eq. 4)",
        description="Fine-tune the scale's model on a task, or reuse it, and score its neurons; "
        "or import a file of the paper's release.",
        example="moebert importance --task library --scale quick --out importance.safetensors\n"
        "  moebert importance --import importance_rte.pkl --out rte.safetensors",
    )
    add_settings_options(command, task=True)
    release = "a .pkl file of the release; code in it is not run"
    command.add_argument("--import", dest="release", type=Path, metavar="FILE", help=release)
    command.add_argument("--out", type=Path, required=True, metavar="FILE")
    command.set_defaults(run=importance)


def importance(args: argparse.Namespace) -> int:
    """Write the importance scores (Eq. 4) of a task's teacher, or of the release, to a file."""
    if args.release:
        return _import(args)
    settings = given_settings(args)
    _check_file(args.out)
    from moebert_lib.data import loading
    from moebert_lib.experiments import teacher
    from moebert_lib.store.committed_results import open_store

    loading.check(settings)
    scores = teacher.importance(open_store(), settings)
    scores.save(args.out)
    layers, neurons = scores.scores.shape
    say(
        f"{layers} layers of {neurons} neurons scored on {scores.n_examples} examples of "
        f"{settings.task}: {args.out}"
    )
    return 0


def _import(args: argparse.Namespace) -> int:
    """Write a file of the release in this library's format."""
    refuse_useless(args, "--import reads a file and scores nothing", "task", *EXPERIMENT)
    _check_file(args.out)
    from moebert_lib.method import release_files

    scores = release_files.read(args.release)
    scores.save(args.out)
    layers, width = scores.scores.shape
    n_shared, n_kept = release_files.proportions(width)
    shares = release_files.shares(scores)
    digest = scores.meta["sha256"]
    say(f"{layers} layers of {width:,} neurons, number of examples unknown; SHA-256 {digest}")
    say(
        f"share of importance: top {n_shared:,} neurons {shares.shared:.1%}, "
        f"kept {n_kept:,} neurons {shares.kept:.1%}: {args.out}"
    )
    return 0


def _check_file(out: Path) -> None:
    expected = "expected a file in an existing folder"
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; {expected}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: no folder {out.parent}; {expected}")


def _add_convert(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="turn a fine-tuned BERT into a MoEBERT to share, with a model card",
        description="Split a fine-tuned BERT's feed-forward layers into experts. With --task, "
        "its neurons are scored on the task's training data, the MoEBERT is trained by "
        "distillation, and both are evaluated. With --importance, it is converted with a file of "
        "scores and not trained.",
        example="moebert convert DIR/my-bert --task sst2 --data-dir DIR --scale small --out moe\n"
        "  moebert convert --task library --out moe --onnx\n"
        "  moebert convert DIR/my-bert --importance importance.safetensors --out moe",
    )
    option = command.add_argument
    model = "a folder with config.json, or a hub name; default with --task: the scale's teacher"
    option("model", nargs="?", default="", metavar="MODEL", help=model)
    add_settings_options(command, task=True)
    scores = "scores of the same model from moebert importance"
    option("--importance", type=Path, metavar="FILE", help=scores)
    option("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    option("--n-experts", type=count, metavar="N", help="default: 4")
    size = "neurons of an expert; default: width of the layer / N"
    option("--expert-size", type=count, metavar="K", help=size)
    shared = "neurons that all experts share; default: two thirds of K"
    option("--n-shared", type=int, metavar="S", help=shared)
    routings = f"{', '.join(ROUTINGS)} (only with --task); default: {ROUTINGS[0]}"
    option("--routing", type=choice(*ROUTINGS), metavar="R", help=routings)
    seed = "seed of the hash tables and the training; default: 0"
    option("--seed", type=int, metavar="N", help=seed)
    option("--untrained", action="store_true", help="with --task: do not train")
    option("--onnx", action="store_true", help="also write model.onnx (needs moebert[onnx])")
    hub = "then upload the folder to OWNER/NAME"
    option("--push-to-hub", default="", metavar="REPO", help=hub)
    command.set_defaults(run=convert)


def convert(args: argparse.Namespace) -> int:
    """Turn a fine-tuned BERT into a MoEBERT; return 1 where a check of the result fails."""
    _check_convert(args)
    from moebert_lib.config import file_io
    from moebert_lib.publish import share_model

    converted = _by_task(args) if args.task else _by_scores(args)
    with file_io.replacing(args.out) as temporary:
        results = share_model.write(converted, temporary, name=args.out.name, onnx=args.onnx)
    facts = converted.facts
    for row in facts["metrics"]:
        moebert, dense = (f"{100 * row[model][0]:.1f}" for model in ("moebert", "dense"))
        say(f"{row['metric']} {moebert}, dense {dense}, on {facts['n']:,} validation examples")
    failed = [result.claim for result in results if not result.holds]
    fails = "".join(f"; FAILS: {claim}" for claim in failed)
    say(f"checks: {len(results) - len(failed)} of {len(results)} hold{fails}")
    n_experts, todo = facts["config"]["n_experts"], ""
    used, stored = (
        f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,}" for n in (facts["used"], facts["stored"])
    )
    if facts["steps"] is None:
        todo = "; train it with distillation before use"
    say(f"{n_experts} experts a layer, {used} of {stored} parameters per token: {args.out}{todo}")
    if args.push_to_hub and failed:
        say("not sent: a model that fails a check is not shared")
    elif args.push_to_hub:
        say(f"sent: {share_model.push(args.out, args.push_to_hub)}")
    return 1 if failed else 0


def _check_convert(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is loaded."""
    if args.routing == "hash-balance" and not args.task:
        raise UserError(
            "routing 'hash-balance' needs the token counts of a training set; give --task instead "
            "of --importance"
        )
    if bool(args.task) == bool(args.importance):
        raise UserError("give --task T to score and train, or --importance FILE to convert only")
    if args.importance:
        refuse_useless(args, "--importance converts and trains nothing", "untrained", *EXPERIMENT)
        if not args.model:
            raise UserError("--importance FILE needs the MODEL that was scored")
        _check_scores(args.importance)
    if args.onnx:
        from moebert_lib.publish import onnx_export

        onnx_export.check()
    _check_new_folder(args.out)


def _check_scores(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no file {path}; make one with moebert importance")
    if path.suffix == ".pkl":
        command = f"moebert importance --import {path} --out FILE"
        raise UserError(f"{path} is a pickle; read it with {command} first")


def _check_new_folder(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} is there already; name a new folder")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{parent} is not a folder that can be written to; name another --out")


def _by_scores(args: argparse.Namespace) -> Any:
    from moebert_lib.method.importance import Importance
    from moebert_lib.publish import share_model

    options = {"n_experts": 4, "seed": 0, **_conversion_options(args)}
    return share_model.from_scores(args.model, Importance.load(args.importance), **options)


def _by_task(args: argparse.Namespace) -> Any:
    from moebert_lib.data import loading
    from moebert_lib.publish import share_model
    from moebert_lib.store.committed_results import open_store

    model = {"model": args.model} if args.model else {}
    settings = given_settings(args, **model, **_conversion_options(args))
    loading.check(settings)
    return share_model.from_task(open_store(), args.model, settings, train=not args.untrained)


def _conversion_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="measure speed beside the equal-FLOP limit (Fig. 4)",
        description="inference: a forward pass of dense BERT, MoEBERT and their limits. training: "
        "a step of distillation. importance: scoring neurons. scaling: cost by experts, tokens "
        "and layers. widgets: from a slider's move to the picture. batch: a sweep with one worker "
        "and with two. OMP_NUM_THREADS sets the threads; the record goes to runs/.",
        example="moebert bench inference\n  moebert bench inference --batch 8 --length 64",
    )
    option = command.add_argument
    usual, *others = BENCHMARKS
    what = {"type": choice(*BENCHMARKS), "nargs": "?", "default": usual, "metavar": "WHAT"}
    option("what", **what, help=f"{usual} (default), {', '.join(others)}")
    batch = "inference: sentences at once; default: full batches and batches of real sentences"
    option("--batch", type=count, metavar="N", help=batch)
    option("--length", type=count, metavar="N", help="inference: tokens of each")
    repeats = "timed rounds; default: what a minute allows"
    option("--repeats", type=count, metavar="N", help=repeats)
    option("--runs", type=count, metavar="N", help="batch: runs; default: 40")
    device = "inference: cpu (default) or cuda"
    option("--device", type=choice("cpu", "cuda"), metavar="D", help=device)
    option("--out", type=Path, metavar="FILE", help="JSON file of the record; default: in runs/")
    command.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> int:
    """Measure speed on this machine; return 130 where Ctrl-C ended it early."""
    module, function = BENCHMARKS[args.what]
    declare = getattr(importlib.import_module(f"moebert_lib.bench.{module}"), function)
    options = {}
    for name in ("batch", "length", "repeats", "runs", "device"):
        value = getattr(args, name)
        if value is not None and name not in inspect.signature(declare).parameters:
            raise UserError(f"moebert bench {args.what} has no option --{name}")
        if value is not None:
            options[name] = value
    if options.get("length", 1) > MAX_LENGTH:
        raise UserError(f"--length {args.length}: BERT takes at most {MAX_LENGTH} tokens")
    if args.out:
        _check_file(args.out)
    from moebert_lib.bench import harness

    try:
        complete = harness.run(declare(**options), out=args.out)
    except KeyboardInterrupt:
        say("stopped; nothing was kept")
        return 130
    return 0 if complete else 130


def _add_doctor(commands: Any) -> None:
    command = commands.add_parser(
        "doctor",
        help="check versions, processor, memory, disk, kernel, weights and data",
        description="Check what a run needs. Each line is ok or says what to do.",
        example="moebert doctor --data-dir DIR",
    )
    command.add_argument("--data-dir", default="", metavar="DIR", help="also check this folder")
    command.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> int:
    """Check this machine; return 1 where something needs doing."""
    from moebert_lib.cli.doctor import checks

    n_problems = 0
    for name, well, message in checks(args.data_dir):
        n_problems += not well
        say(f"{'ok' if well else 'PROBLEM':8}{name:12}{message}")
    return 1 if n_problems else 0
