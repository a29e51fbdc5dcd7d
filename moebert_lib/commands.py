"""What each command does, between the parsed arguments and the library."""

import argparse
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moebert_lib import batch
from moebert_lib.settings import Settings, UserError, nearest
from moebert_lib.store import Store

GRID_NAMES = ("notebook", "scale", "data_dir", "tasks", "seeds", "settings")
ROUTINGS = ("hash-random", "gate-token", "gate-sentence")


def run(args: argparse.Namespace) -> int:
    """``moebert run``: plan, execute, publish, and write the report."""
    paths = batch.select(args.notebooks)
    scale, values = _given(args)
    jobs = batch.plan(paths, scale=scale, parameters=values, data_dir=args.data_dir)
    if args.plan:
        return _show(jobs)
    batch.run(jobs, force=args.force, echo=_say)
    return _finish(jobs)


def sweep(args: argparse.Namespace) -> int:
    """``moebert sweep``: one notebook over the points of a grid."""
    jobs = grid_jobs(args.grid)
    if args.dry_run:
        return _show(jobs)
    batch.run(jobs, keep_going=True, echo=_say)
    return _finish(jobs)


def grid_jobs(path: Path) -> list[batch.Job]:
    """The jobs of a grid file, each validated, doubles left out.

    Raises:
        UserError: unreadable file, unknown name, or a point whose values do not fit.
    """
    grid = _read_yaml(path)
    for name in grid:
        if name not in GRID_NAMES:
            raise UserError(f"{path}: unknown name '{name}'; {nearest(name, GRID_NAMES)}")
    settings = grid.get("settings") or {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings must hold names with lists of values, "
                        "such as 'n_shared: [0, 256]'")  # fmt: skip
    axes = {"tasks": grid.get("tasks"), "seeds": grid.get("seeds"), **settings}
    axes = {name: value if isinstance(value, list) else [value]
            for name, value in axes.items() if value is not None}  # fmt: skip
    for name, value in axes.items():
        if not value:
            raise UserError(f"{path}: '{name}' has no values; give at least one")
    names = [{"tasks": "task", "seeds": "seed"}.get(name, name) for name in axes]
    chosen = batch.select([str(grid.get("notebook", "03_distillation"))])
    common = {"scale": grid.get("scale", "quick"), "data_dir": str(grid.get("data_dir") or "")}
    jobs = []
    for point in itertools.product(*axes.values()):
        values = dict(zip(names, point, strict=True))
        jobs += [job for job in batch.plan(chosen, parameters=values, **common) if job not in jobs]
    return jobs


def status(args: argparse.Namespace) -> int:
    """``moebert status``: counts, the newest runs or all of them, then the failed ones."""
    from moebert_lib import inventory

    for line in inventory.lines(whole=args.all):
        _say(line)
    return 0


def report(args: argparse.Namespace) -> int:
    """``moebert report``: write the page and say where it is."""
    from moebert_lib.report import write_report

    _say(f"page      {_near(write_report())}")
    return 0


def importance(args: argparse.Namespace) -> int:
    """``moebert importance``: Eq. 4's scores of a task's teacher, or of the release, as a file."""
    if args.release:
        return _import(args)
    scale, values = _given(args)
    values |= {"task": args.task} if args.task else {}
    values |= {"data_dir": str(Path(args.data_dir).expanduser().resolve())} if args.data_dir else {}
    settings = Settings.at(scale, **values)
    _check_out(args.out)
    from moebert_lib import data

    data.check(settings)
    from moebert_lib import experiment

    scores = experiment.importance(settings)
    scores.save(args.out)
    layers, neurons = scores.scores.shape
    _say(f"{layers} layers of {neurons} neurons scored on {scores.n_examples} examples of "
         f"{settings.task}: {args.out}")  # fmt: skip
    return 0


def _import(args: argparse.Namespace) -> int:
    """``moebert importance --import``: a file of the release in this library's own format."""
    given = {"--task": args.task, "--scale": args.scale, "-p": args.values,
             "--data-dir": args.data_dir}  # fmt: skip
    for option, value in given.items():
        if value:
            raise UserError(f"--import reads a file and scores nothing; leave {option} out")
    _check_out(args.out)
    from moebert_lib import release

    scores = release.read(args.release)
    scores.save(args.out)
    layers, width = scores.scores.shape
    n_shared, n_kept = release.proportions(width)
    held = release.shares(scores)
    _say(f"{layers} layers of {width:,} neurons, examples unknown; SHA-256 {scores.meta['sha256']}")
    _say(f"importance held by the top {n_shared:,} {held.shared:.1%}, by the kept {n_kept:,} "
         f"{held.kept:.1%}: {args.out}")  # fmt: skip
    return 0


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise UserError(f"no folder {out.parent} to write {out.name} in; make it first")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file, such as {out}/scores.safetensors")


def convert(args: argparse.Namespace) -> int:
    """``moebert convert``: a saved BERT becomes a saved MoEBERT, untrained."""
    if args.routing not in ROUTINGS:
        hint = nearest(args.routing, ROUTINGS)
        if args.routing == "hash-balance":
            hint = "it needs a training set's token counts: call moebert_lib.to_moebert in Python"
        raise UserError(f"routing '{args.routing}' is not for this command; {hint}")
    for name in ("n_experts", "expert_size"):
        size = getattr(args, name)
        if size is not None and size < 1:
            raise UserError(f"--{name.replace('_', '-')} {size}: expected at least 1")
    if not args.importance.is_file():
        raise UserError(f"no file {args.importance}; make one with moebert importance")
    if args.importance.suffix == ".pkl":
        raise UserError(f"{args.importance} is a pickle; read it with moebert importance --import "
                        f"{args.importance} --out FILE first")  # fmt: skip
    _check_new(args.out)
    from moebert_lib import weights
    from moebert_lib.importance import Importance

    found = weights.find(args.model)
    scratch = args.out.with_name(f".{args.out.name}.{os.getpid()}.tmp")
    try:
        kept = _convert(found, Importance.load(args.importance), args, scratch)
        os.rename(scratch, args.out)
    except ValueError as error:
        raise UserError(str(error)) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _say(f"{args.n_experts} experts a layer, {kept}: {args.out}; train it with distillation "
         "before use")  # fmt: skip
    return 0


def _check_new(out: Path) -> None:
    """Refuse a folder that is there, or that cannot be made."""
    if out.exists():
        raise UserError(f"{out} is there already; name a new folder")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{above} is no folder that can be written to; name another --out")


def _convert(found: str, scores: Any, args: argparse.Namespace, folder: Path) -> str:
    if not Path(found).is_dir():
        _say(f"no folder {found} here; asking the hub")
    from transformers import AutoTokenizer

    from moebert_lib.convert import load_dense, to_moebert
    from moebert_lib.moe_layer import parameter_counts

    try:
        dense, tokenizer = load_dense(found), AutoTokenizer.from_pretrained(found)
    except OSError as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"no model '{found}' could be read: {why}") from None
    model = to_moebert(
        dense, scores, n_experts=args.n_experts, expert_size=args.expert_size,
        n_shared=args.n_shared, routing=args.routing, seed=args.seed,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    counts = parameter_counts(model)
    used, stored = (f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,}"
                    for n in (counts.effective, counts.stored))  # fmt: skip
    return f"{used} of {stored} parameters per token"


def bench(args: argparse.Namespace) -> int:
    """``moebert bench``: speed on this machine."""
    if args.what != "inference":
        raise UserError(
            f"nothing to measure called '{args.what}'; {nearest(args.what, ['inference'])}"
        )
    for name in ("batch", "length", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.length > 512:
        raise UserError(f"--length {args.length}: BERT takes at most 512 tokens")
    from moebert_lib import bench as module

    module.main(args.what, batch=args.batch, length=args.length, repeats=args.repeats)
    return 0


def doctor(args: argparse.Namespace) -> int:
    """``moebert doctor``: exit status 1 where something needs doing."""
    from moebert_lib.doctor import checks

    failures = 0
    for name, problem, fact in checks(args.data_dir):
        failures += bool(problem)
        _say(f"{'PROBLEM' if problem else 'ok':8}{name:12}{problem or fact}")
    return 1 if failures else 0


def _given(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The scale, and the values of ``-p`` by name."""
    values: dict[str, Any] = {}
    for text in args.values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"-p {text}: expected NAME=VALUE, such as -p seed=1")
        if name in values:
            raise UserError(f"-p {name} is given twice; keep one")
        values[name] = _parse_yaml(value, f"-p {text}") if value else ""
    if "scale" in values and args.scale not in (None, values["scale"]):
        raise UserError(f"--scale {args.scale} and -p scale={values['scale']} differ; keep one")
    scale = "quick" if args.scale is None else args.scale
    return values.pop("scale", scale), values


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no file {path}; expected a YAML grid (see moebert sweep --help)")
    grid = _parse_yaml(path.read_text("utf-8", errors="replace"), str(path))
    if not isinstance(grid, dict):
        raise UserError(f"{path}: expected names and values, such as 'seeds: [0, 1, 2]'")
    return grid


def _parse_yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from None


def _show(jobs: Sequence[batch.Job]) -> int:
    from moebert_lib import forecast

    kept = {entry.key.get("notebook") for entry in Store().entries("notebook")}
    states = []
    for job in jobs:  # a key takes a while, and is of no use where nothing can match it
        entry = Store().find("notebook", job.key()) if job.name in kept else None
        states.append(f"stored, {entry.seconds / 60:.1f} min" if entry else "to run")
    for line in forecast.lines(jobs, states):
        _say(line)
    _say(f"{len(jobs)} notebook runs planned, nothing was executed")
    return 0


def _finish(jobs: Sequence[batch.Job]) -> int:
    from moebert_lib.report import write_report

    page = write_report()
    for folder in dict.fromkeys(batch.published(job) for job in jobs):
        files = list(folder.glob("*.*"))
        figures = sum(path.suffix == ".png" for path in files)
        tables = sum(path.suffix == ".tex" for path in files)
        _say(f"figures   {_near(folder)}  ({figures} figures, {tables} tables)")
    _say(f"page      {_near(page)}")
    return 0


def _near(path: Path) -> Path:
    """The path as seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _say(line: str) -> None:
    print(line, flush=True)
