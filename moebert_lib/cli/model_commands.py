"""What the commands about models and this machine do: importance, convert, doctor."""

import argparse
import importlib
import os
import shutil
from pathlib import Path
from typing import Any, get_args

from moebert_lib.cli.run_commands import given, say
from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.settings import Routing, Settings
from moebert_lib.experiments import teacher


def importance(args: argparse.Namespace) -> int:
    """``moebert importance``: Eq. 4's scores of a task's teacher, or of the release, as a file."""
    if args.release:
        return _import(args)
    settings = _settings(args)
    _check_out(args.out)
    from moebert_lib.data import loading

    loading.check(settings)

    scores = teacher.importance(settings)
    scores.save(args.out)
    layers, neurons = scores.scores.shape
    say(
        f"{layers} layers of {neurons} neurons scored on {scores.n_examples} examples of "
        f"{settings.task}: {args.out}"
    )
    return 0


def _import(args: argparse.Namespace) -> int:
    """``moebert importance --import``: a file of the release in this library's own format."""
    given = {
        "--task": args.task,
        "--scale": args.scale,
        "-p": args.values,
        "--data-dir": args.data_dir,
    }
    _leave_out("--import reads a file and scores nothing", given)
    _check_out(args.out)
    from moebert_lib.method import release_files

    scores = release_files.read(args.release)
    scores.save(args.out)
    layers, width = scores.scores.shape
    n_shared, n_kept = release_files.proportions(width)
    held = release_files.shares(scores)
    say(f"{layers} layers of {width:,} neurons, examples unknown; SHA-256 {scores.meta['sha256']}")
    say(
        f"importance held by the top {n_shared:,} {held.shared:.1%}, by the kept {n_kept:,} "
        f"{held.kept:.1%}: {args.out}"
    )
    return 0


def _leave_out(why: str, given: dict[str, Any]) -> None:
    """Refuse the first option that was given a value and would not count."""
    for option, value in given.items():
        if value:
            raise UserError(f"{why}; leave {option} out")


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise UserError(f"no folder {out.parent} to write {out.name} in; make it first")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file, such as {out}/scores.safetensors")


def convert(args: argparse.Namespace) -> int:
    """``moebert convert``: a fine-tuned BERT becomes a MoEBERT; status 1 where a check fails."""
    _check_convert(args)
    from moebert_lib.publish import share_model

    converted = _by_task(args) if args.task else _by_scores(args)
    facts = converted.facts
    scratch = args.out.with_name(f".{args.out.name}.{os.getpid()}.tmp")
    try:
        results = share_model.write(converted, scratch, name=args.out.name, onnx=args.onnx)
        os.rename(scratch, args.out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    used, stored = (
        f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,}" for n in (facts["used"], facts["stored"])
    )
    for row in facts["metrics"]:
        say(
            f"{row['metric']} {100 * row['moebert'][0]:.1f}, dense {100 * row['dense'][0]:.1f}, on "
            f"{facts['n']:,} validation examples"
        )
    failed = [result.claim for result in results if not result.holds]
    say(
        f"checks: {len(results) - len(failed)} of {len(results)} hold"
        + "".join(f"; FAILS: {claim}" for claim in failed)
    )
    todo = "; train it with distillation before use" if facts["steps"] is None else ""
    say(
        f"{facts['config']['n_experts']} experts a layer, {used} of {stored} parameters per "
        f"token: {args.out}{todo}"
    )
    if failed:
        if args.push_to_hub:
            say("not sent: a model that fails a check is not shared")
        return 1
    if args.push_to_hub:
        say(f"sent: {share_model.push(args.out, args.push_to_hub)}")
    return 0


def _check_convert(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is loaded."""
    if args.routing == "hash-balance" and not args.task:
        raise UserError(
            "routing 'hash-balance' needs a training set's token counts; give --task "
            "in place of --importance"
        )
    if args.routing and args.routing not in get_args(Routing):
        raise UserError(f"no routing '{args.routing}'; {nearest(args.routing, get_args(Routing))}")
    for name in ("n_experts", "expert_size"):
        size = getattr(args, name)
        if size is not None and size < 1:
            raise UserError(f"--{name.replace('_', '-')} {size}: expected at least 1")
    if bool(args.task) == bool(args.importance):
        raise UserError("give --task T, to score and distil, or --importance FILE, to convert only")
    if args.importance:
        _check_scores(args)
    if args.onnx:
        from moebert_lib.publish import onnx_export

        onnx_export.check()
    _check_new(args.out)


def _check_scores(args: argparse.Namespace) -> None:
    given = {
        "--scale": args.scale,
        "-p": args.values,
        "--data-dir": args.data_dir,
        "--untrained": args.untrained,
    }
    _leave_out("--importance converts and trains nothing", given)
    if not args.model:
        raise UserError("--importance FILE needs the MODEL that was scored")
    if not args.importance.is_file():
        raise UserError(f"no file {args.importance}; make one with moebert importance")
    if args.importance.suffix == ".pkl":
        raise UserError(
            f"{args.importance} is a pickle; read it with moebert importance --import "
            f"{args.importance} --out FILE first"
        )


def _by_scores(args: argparse.Namespace) -> Any:
    from moebert_lib.method.importance import Importance
    from moebert_lib.publish import share_model

    try:
        scores = Importance.load(args.importance)
    except ValueError as error:
        raise UserError(str(error)) from None
    return share_model.from_scores(
        args.model, scores, **{"n_experts": 4, "seed": 0, **_sizes(args)}
    )


def _by_task(args: argparse.Namespace) -> Any:
    own = {"model": args.model} if args.model else {}
    settings = _settings(args, **own, **_sizes(args))
    from moebert_lib.data import loading
    from moebert_lib.publish import share_model

    loading.check(settings)
    return share_model.from_task(args.model, settings, train=not args.untrained)


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    names = ("n_experts", "expert_size", "n_shared", "routing", "seed")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _settings(args: argparse.Namespace, **chosen: Any) -> Settings:
    """The settings that --scale, --task, --data-dir and -p name."""
    scale, values = given(args)
    chosen |= {"task": args.task} if args.task else {}
    chosen |= {"data_dir": str(Path(args.data_dir).expanduser().resolve())} if args.data_dir else {}
    for name in values.keys() & chosen.keys():
        raise UserError(f"{name} is given twice, once as -p {name}; keep one")
    return Settings.at(scale, **{**values, **chosen})


def _check_new(out: Path) -> None:
    """Refuse a folder that is there, or that cannot be made."""
    if out.exists():
        raise UserError(f"{out} is there already; name a new folder")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{above} is no folder that can be written to; name another --out")


def doctor(args: argparse.Namespace) -> int:
    """``moebert doctor``: exit status 1 where something needs doing."""
    from moebert_lib.cli.doctor import checks

    failures = 0
    for name, problem, fact in checks(args.data_dir):
        failures += bool(problem)
        say(f"{'PROBLEM' if problem else 'ok':8}{name:12}{problem or fact}")
    return 1 if failures else 0


# What ``moebert bench`` does: find the benchmark, check what was asked, run it.

#: The options that each benchmark has a use for, beside ``--out``.
TAKES = {
    "inference": ("batch", "length", "repeats", "device"),
    "training": ("repeats",),
    "importance": ("repeats",),
    "scaling": ("repeats",),
    "widgets": ("repeats",),
    "batch": ("runs",),
}
OPTIONS = ("batch", "length", "repeats", "runs", "device")
#: The function that each benchmark runs.
MAINS = {
    "inference": ("inference", "main"),
    "cuda": ("inference", "main_bench_cuda"),
    "training": ("training", "main"),
    "importance": ("importance", "main"),
    "scaling": ("inference", "main_bench_scaling"),
    "widgets": ("workflow", "main_bench_widgets"),
    "batch": ("workflow", "main"),
}


def bench(args: argparse.Namespace) -> int:
    """``moebert bench``: speed on this machine; 130 where Ctrl-C left some of it out."""
    if args.what not in TAKES:
        raise UserError(f"nothing to measure called '{args.what}'; {nearest(args.what, TAKES)}")
    given = _given(args)
    what = "cuda" if given.pop("device", "cpu") == "cuda" else args.what
    module, main = MAINS[what]
    try:
        complete = getattr(importlib.import_module(f"moebert_lib.bench.{module}"), main)(**given)
    except KeyboardInterrupt:
        say("stopped; nothing was kept")
        return 130
    return 130 if complete is False else 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Options as typed, those that were; refuses what this benchmark has no use for."""
    given = {name: getattr(args, name) for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name != "device" and value < 1:
            raise UserError(f"--{name} {value}: expected at least 1")
    if given.get("length", 1) > 512:
        raise UserError(f"--length {args.length}: BERT takes at most 512 tokens")
    if "device" in given and args.device not in ("cpu", "cuda"):
        raise UserError(f"no device '{args.device}'; {nearest(args.device, ('cpu', 'cuda'))}")
    for name in given:
        if name not in TAKES[args.what]:
            raise UserError(f"bench {args.what} has no use for --{name}")
    if args.out is not None:
        if args.out.is_dir() or not args.out.absolute().parent.is_dir():
            raise UserError(f"{args.out} cannot be written: name a file in a folder that is there")
        given["out"] = args.out
    return given
