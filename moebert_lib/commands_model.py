"""What the commands about models and this machine do: importance, convert, doctor."""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from moebert_lib.commands import given, say
from moebert_lib.settings import Settings, UserError, nearest

ROUTINGS = ("hash-random", "hash-cluster", "gate-token", "gate-sentence")


def importance(args: argparse.Namespace) -> int:
    """``moebert importance``: Eq. 4's scores of a task's teacher, or of the release, as a file."""
    if args.release:
        return _import(args)
    scale, values = given(args)
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
    say(f"{layers} layers of {neurons} neurons scored on {scores.n_examples} examples of "
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
    say(f"{layers} layers of {width:,} neurons, examples unknown; SHA-256 {scores.meta['sha256']}")
    say(f"importance held by the top {n_shared:,} {held.shared:.1%}, by the kept {n_kept:,} "
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
    say(f"{args.n_experts} experts a layer, {kept}: {args.out}; train it with distillation "
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
        say(f"no folder {found} here; asking the hub")
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


def doctor(args: argparse.Namespace) -> int:
    """``moebert doctor``: exit status 1 where something needs doing."""
    from moebert_lib.doctor import checks

    failures = 0
    for name, problem, fact in checks(args.data_dir):
        failures += bool(problem)
        say(f"{'PROBLEM' if problem else 'ok':8}{name:12}{problem or fact}")
    return 1 if failures else 0
