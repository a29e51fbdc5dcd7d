"""The command line: ``moebert run``, ``sweep``, ``status``, ``report`` and the rest.

Whatever a user can get wrong is one line on stderr that names the nearest valid choice, and
exit status 2, before any compute. A notebook that fails is one line and status 1.
Each command imports what it needs when it runs, so that ``--help`` is instant.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from moebert_lib.cli import model_commands, page_commands, run_commands
from moebert_lib.config.errors import UserError, home, nearest
from moebert_lib.runs.execution import NotebookFailed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _stop)
    except ValueError:  # not in the main thread: leave signals alone
        before = None
    try:
        return _dispatch(argv)
    except UserError as error:
        return _fail(error, 2)
    except NotebookFailed as failure:
        return _fail(f"{failure}; executed copy: {failure.copy}", 1)
    except BrokenPipeError:  # of a pager or head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(_of_the_disk(error), 2)
    except KeyboardInterrupt:
        return _fail("stopped; what was finished is kept and will be reused", 130)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _dispatch(argv: list[str]) -> int:
    top, choices = parser()
    if not argv:
        top.print_help()
        return 0
    if argv[0].startswith("-"):
        option = argv[0].partition("=")[0]
        if option not in ("-h", "--help"):
            raise UserError(
                f"unknown option '{option}' of moebert; give a command first: {', '.join(choices)}"
            )
        top.print_help()
        return 0
    if argv[0] not in choices:
        raise UserError(f"unknown command '{argv[0]}'; {nearest(argv[0], choices)}")
    try:
        args = choices[argv[0]].parse_all(argv[1:])
    except SystemExit as end:  # after --help
        return int(end.code or 0)
    return args.function(args) or 0


def _fail(error: object, status: int) -> int:
    sys.stdout.flush()
    print("moebert:", " ".join(str(error).split()), file=sys.stderr)
    return status


def _of_the_disk(error: OSError) -> Exception:
    """What a full or forbidden disk's error means here; another error as it is."""
    from moebert_lib.config import file_io

    try:
        with file_io.writing(home()):
            raise error
    except (OSError, UserError) as told:
        return told


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


# The command line's grammar: every command, its options, their help and an example.

SCALE_HELP = "smoke, quick (the default), small or paper"


class Parser(argparse.ArgumentParser):
    """Raises :class:`UserError` where argparse prints its usage and leaves."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any):
        kwargs |= {
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "epilog": f"example:\n  {example}" if example else None,
        }
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """One line that says which command's help has more."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse options and positionals in any order; refuse what is left over."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for word in argv:  # first, so that a misspelt option is not blamed on its value
            option = word.partition("=")[0]
            if option.startswith("--") and option not in (*known, "--"):
                raise UserError(
                    f"unknown option '{option}' of {self.prog}; {nearest(option, known)}"
                )
        args, left = self.parse_known_intermixed_args(argv)
        if left:
            raise UserError(f"{self.prog} has no use for '{left[0]}' (see {self.prog} --help)")
        return args


def parser() -> tuple[Parser, dict[str, Parser]]:
    """The command's parser and those of its commands by name."""
    top = Parser(
        prog="moebert",
        description="MoEBERT (NAACL 2022) as a workbook: run it, look at it, use it.",
        example="moebert run --scale quick",
    )
    kinds = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    own = (
        _run,
        _sweep,
        _status,
        _report,
        _export,
        _explore,
        _site,
        _importance,
        _convert,
        _bench,
        _doctor,
    )
    for add in own:
        add(kinds)
    return top, kinds.choices


def _values(command: Parser) -> None:
    command.add_argument("--scale", default=None, metavar="S", help=SCALE_HELP)
    command.add_argument(
        "-p",
        dest="values",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a notebook's parameter or any setting (moebert_lib/settings.py); repeatable",
    )
    command.add_argument(
        "--data-dir",
        default="",
        metavar="DIR",
        help="GLUE-format files, DIR/TASK/train.jsonl and validation.jsonl, or .parquet",
    )


def _run(kinds: Any) -> None:
    command = kinds.add_parser(
        "run",
        help="run notebooks, all by default, and write the report",
        description="Run notebooks; what is done already is reused.",
        example="moebert run 01 02 03 --scale small --data-dir DIR -p task=sst2",
    )
    command.add_argument(
        "notebooks",
        nargs="*",
        metavar="NOTEBOOK",
        help="number, name or path: 01, 01_importance, mine.ipynb",
    )
    _values(command)
    command.add_argument(
        "--plan", action="store_true", help="only list what would run, and its time and memory"
    )
    command.add_argument(
        "--why", action="store_true", help="only say of each notebook why it would run, or not"
    )
    _where(command, "one by default")
    command.set_defaults(function=run_commands.run)


def _sweep(kinds: Any) -> None:
    command = kinds.add_parser(
        "sweep",
        help="run a notebook over a grid of settings, tasks and seeds",
        description="Run 03_distillation, or another notebook, once for each point of the grid in "
        "a YAML file with the names notebook, scale, data_dir, tasks, seeds, settings (each a "
        "list of values: all combinations) and points (a list of sets of values).",
        example="moebert sweep grid.yaml --dry-run",
    )
    command.add_argument("grid", type=Path, nargs="?", default=None, metavar="GRID.yaml")
    command.add_argument(
        "--data-dir",
        default="",
        metavar="DIR",
        help="GLUE-format files, in place of the grid's data_dir",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="only list what would run, what is reused, and why"
    )
    command.add_argument("--why", action="store_true", help="the same with every reason in full")
    command.add_argument(
        "--retry-failed",
        action="store_true",
        help="also what failed before; without a grid, of all sweeps",
    )
    _where(command, "as many as cores and memory allow by default")
    command.set_defaults(function=run_commands.sweep)


def _where(command: Parser, usual: str) -> None:
    command.add_argument("--force", action="store_true", help="run even what is stored")
    command.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help=f"runs at once on this machine; {usual}",
    )
    command.add_argument(
        "--engine",
        default="local",
        metavar="E",
        help="local (the default), or ray from moebert[cluster]",
    )
    command.add_argument(
        "--address", default=None, metavar="A", help="of a Ray cluster: auto or HOST:PORT"
    )


def _status(kinds: Any) -> None:
    command = kinds.add_parser(
        "status",
        help="what is stored, what failed and where",
        description="Count the stored runs by kind, and list the newest, and the failed ones.",
        example="moebert status --all",
    )
    command.add_argument("--all", action="store_true", help="list all stored runs")
    command.set_defaults(function=run_commands.status)


def _report(kinds: Any) -> None:
    command = kinds.add_parser(
        "report",
        help="gather figures, tables and runs in one HTML page",
        description="Write runs/report.html: one file that needs no network. With --from, first "
        "draw all figures and tables from committed results; no model is needed or trained.",
        example="moebert report\n  moebert report --from figures/runs",
    )
    command.add_argument(
        "--from",
        dest="results",
        type=Path,
        default=None,
        metavar="DIR",
        help="results of moebert export, with a workbook.yaml",
    )
    command.add_argument(
        "--check", action="store_true", help="only compare what they draw with figures/"
    )
    command.set_defaults(function=run_commands.report)


def _export(kinds: Any) -> None:
    command = kinds.add_parser(
        "export",
        help="one table of all runs, of this store or of several",
        description="Write one row per run with its settings, results and origin. A run that "
        "several stores hold is one row. With --results: all stages of experiments with the small "
        "files that figures are drawn from, added to a folder, for moebert report --from.",
        example="moebert export runs.parquet\n"
        "  moebert export --results figures/runs\n"
        "  moebert export runs.csv runs/ other-machine/runs/ --kind student",
    )
    command.add_argument("out", type=Path, metavar="RUNS.parquet", help="or .csv, or .json")
    command.add_argument(
        "stores",
        nargs="*",
        metavar="STORE",
        help="a home or its runs/; here by default",
    )
    command.add_argument(
        "--kind",
        default="notebook",
        metavar="K",
        help="notebook (the default), student, teacher, ... or all",
    )
    command.add_argument(
        "--results", action="store_true", help="RUNS names a folder of results to add to"
    )
    command.set_defaults(function=run_commands.export)


def _explore(kinds: Any) -> None:
    command = kinds.add_parser(
        "explore",
        help="open the explorer of importance as a page, for a classroom",
        description="Serve the explorer of notebook 01 as a page without code, until Ctrl-C: the "
        "files and the experiment that are named, else all that is scored here. Where nothing is, "
        "the scale's model is trained and scored first.",
        example="moebert explore\n  moebert explore importance_rte.pkl importance_cola.pkl\n"
        "  moebert explore --task acceptability --ip 0.0.0.0 --no-browser",
    )
    command.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="from moebert importance, or a pickle of the release",
    )
    command.add_argument("--task", default=None, metavar="T", help="the scale's own by default")
    _values(command)
    command.add_argument(
        "--port",
        type=int,
        default=8866,
        metavar="N",
        help="8866 by default, or the next that is free",
    )
    command.add_argument(
        "--ip",
        default="localhost",
        metavar="A",
        help="whose visitors are let in: localhost, this machine only (the "
        "default); 0.0.0.0, all that reach it",
    )
    command.add_argument("--no-browser", action="store_true", help="only print the address")
    command.set_defaults(function=page_commands.explore)


def _site(kinds: Any) -> None:
    command = kinds.add_parser(
        "site",
        help="build the site: notebooks, figures, guide and reference",
        description="Build a site that needs no network from the executed notebooks; run the "
        "workbook first.",
        example="moebert site --out public",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="runs/site by default; an earlier site is replaced",
    )
    command.add_argument(
        "--figures",
        type=Path,
        default=None,
        metavar="DIR",
        help="whose figures and notebooks; figures/ by default",
    )
    command.set_defaults(function=page_commands.site)


def _importance(kinds: Any) -> None:
    command = kinds.add_parser(
        "importance",
        help="score a fine-tuned model's neurons on a task (Eq. 4)",
        description="Fine-tune the scale's model on a task, or reuse it, and score its neurons; "
        "or import a file of the paper's release.",
        example="moebert importance --task library --scale quick --out importance.safetensors\n"
        "  moebert importance --import importance_rte.pkl --out rte.safetensors",
    )
    command.add_argument("--task", default=None, metavar="T", help="the scale's own by default")
    command.add_argument(
        "--import",
        dest="release",
        type=Path,
        default=None,
        metavar="FILE",
        help="a pickle of the release; nothing in it is run",
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE")
    _values(command)
    command.set_defaults(function=model_commands.importance)


def _convert(kinds: Any) -> None:
    command = kinds.add_parser(
        "convert",
        help="turn a fine-tuned BERT into a MoEBERT to share, with a model card",
        description="Split a fine-tuned BERT's feed-forward layers into experts. With --task its "
        "neurons are scored on the task's training data, the experts distilled from it, and both "
        "judged; with --importance it is converted by a file of scores, untrained.",
        example="moebert convert DIR/my-bert --task sst2 --data-dir DIR --scale small --out moe\n"
        "  moebert convert --task library --out moe --onnx\n"
        "  moebert convert DIR/my-bert --importance importance.safetensors --out moe",
    )
    command.add_argument(
        "model",
        nargs="?",
        default="",
        metavar="MODEL",
        help="a folder with config.json, or a hub name; with --task the scale's "
        "own teacher by default",
    )
    command.add_argument("--task", default=None, metavar="T", help="what MODEL was fine-tuned on")
    command.add_argument(
        "--importance",
        type=Path,
        default=None,
        metavar="FILE",
        help="from moebert importance, for the same model",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    command.add_argument("--n-experts", type=int, default=None, metavar="N", help="4 by default")
    command.add_argument(
        "--expert-size",
        type=int,
        default=None,
        metavar="K",
        help="neurons each; the layer's width / N by default",
    )
    command.add_argument(
        "--n-shared",
        type=int,
        default=None,
        metavar="S",
        help="neurons in all of them; two thirds of K by default",
    )
    command.add_argument(
        "--routing",
        default=None,
        metavar="R",
        help="hash-random (the default), hash-cluster, gate-token or "
        "gate-sentence; with --task also hash-balance",
    )
    command.add_argument(
        "--seed",
        type=int,
        default=None,
        metavar="N",
        help="of the routing tables, and of training; 0 by default",
    )
    _values(command)
    command.add_argument("--untrained", action="store_true", help="with --task: do not distil")
    command.add_argument("--onnx", action="store_true", help="also model.onnx; needs moebert[onnx]")
    command.add_argument(
        "--push-to-hub",
        default="",
        metavar="REPO",
        help="OWNER/NAME to send the folder to, when it is written",
    )
    command.set_defaults(function=model_commands.convert)


def _bench(kinds: Any) -> None:
    command = kinds.add_parser(
        "bench",
        help="measure speed beside the equal-FLOP limit (Fig. 4)",
        description="inference: a forward pass of dense BERT, MoEBERT and their limits. training: "
        "a step of distillation. importance: scoring neurons. scaling: cost by experts, tokens "
        "and layers. widgets: from a slider's move to the picture. batch: a sweep with one worker "
        "and with two. OMP_NUM_THREADS sets the threads; the record goes to runs/.",
        example="moebert bench inference\n  moebert bench inference --batch 8 --length 64",
    )
    command.add_argument(
        "what",
        nargs="?",
        default="inference",
        metavar="WHAT",
        help="inference (the default), training, importance, scaling, widgets or batch",
    )
    for name, told in (
        ("batch", "sentences at once, of inference; full and real batches by default"),
        ("length", "tokens of each, likewise"),
        ("repeats", "timed rounds; by default as many as a minute holds"),
        ("runs", "notebook runs, of batch; 40 by default"),
    ):
        command.add_argument(f"--{name}", type=int, default=None, metavar="N", help=told)
    command.add_argument(
        "--device", default=None, metavar="D", help="of inference: cpu (the default) or cuda"
    )
    command.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FILE",
        help="the record's file, JSON; in runs/ by default",
    )
    command.set_defaults(function=model_commands.bench)


def _doctor(kinds: Any) -> None:
    command = kinds.add_parser(
        "doctor",
        help="check Python, versions, weights, kernel, memory and folders",
        description="Check what a run needs; each line is ok or says what to do.",
        example="moebert doctor --data-dir DIR",
    )
    command.add_argument("--data-dir", default="", metavar="DIR", help="also check this folder")
    command.set_defaults(function=model_commands.doctor)
