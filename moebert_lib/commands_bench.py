"""What ``moebert bench`` does: find the benchmark, check what was asked, run it."""

import argparse
import importlib
from typing import Any

from moebert_lib.commands import say
from moebert_lib.errors import UserError, nearest

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


def bench(args: argparse.Namespace) -> int:
    """``moebert bench``: speed on this machine; 130 where Ctrl-C left some of it out."""
    if args.what not in TAKES:
        raise UserError(f"nothing to measure called '{args.what}'; {nearest(args.what, TAKES)}")
    given = _given(args)
    module = "bench_cuda" if given.pop("device", "cpu") == "cuda" else f"bench_{args.what}"
    try:
        complete = importlib.import_module(f"moebert_lib.{module}").main(**given)
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
