"""Commands about runs: run, sweep, status and export."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_lib.cli.options import (
    add_settings_options,
    choice,
    count,
    given_values,
    near,
    say,
)
from moebert_lib.config.errors import UserError

if TYPE_CHECKING:
    from moebert_lib.runs.plan import Job


def add_commands(commands: Any) -> None:
    """Add the commands and their options to the parser of ``moebert``."""
    for add in (_add_run, _add_sweep, _add_status, _add_export):
        add(commands)


def _add_run(commands: Any) -> None:
    command = commands.add_parser(
        "run",
        help="run notebooks, by default all, and write the report",
        description="Run notebooks. Stored results are reused.",
        example="moebert run 01 02 03 --scale small --data-dir DIR -p task=sst2",
    )
    option = command.add_argument
    names = "number, name or path: 01, 01_importance, mine.ipynb"
    option("notebooks", nargs="*", metavar="NOTEBOOK", help=names)
    add_settings_options(command)
    plan = "list what would run, with time and memory; run nothing"
    option("--plan", action="store_true", help=plan)
    why = "list why each notebook would run or not; run nothing"
    option("--why", action="store_true", help=why)
    _add_execution_options(command, workers="default: 1")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run notebooks and write the report."""
    from moebert_lib.publish.report import write_report
    from moebert_lib.runs import local_pool, plan

    _check_engine(args)
    scale, values = given_values(args)
    paths = plan.select(args.notebooks)
    jobs = plan.plan(paths, scale=scale, parameters=values, data_dir=args.data_dir)
    if args.plan or args.why:
        return _print_plan(jobs, why=args.why)
    local = args.engine == "local"
    engine = local_pool.side_by_side(jobs, args.workers) if local else _engine(args)
    local_pool.run(jobs, engine=engine, force=args.force, echo=say)
    page = write_report()
    for folder in dict.fromkeys(local_pool.published(job) for job in jobs):
        n_files = Counter(path.suffix for path in folder.glob("*.*"))
        say(f"figures   {near(folder)}  ({n_files['.png']} figures, {n_files['.tex']} tables)")
    say(f"page      {near(page)}")
    return 0


def _print_plan(jobs: "Sequence[Job]", *, why: bool) -> int:
    """Print what ``moebert run`` would do with its cost, or its reasons; run nothing."""
    from moebert_lib.runs import cost, plan
    from moebert_lib.runs import sweep as sweeps

    preview = list(sweeps.preview(jobs, retry_failed=True))
    if why:
        for job, _, reason in preview:
            say(f"{job.name}{plan.describe(job)}: {reason}")
    else:
        states = ["to run" if action == "run" else reason for _, action, reason in preview]
        for line in cost.lines(jobs, states):
            say(line)
        if any(job.settings and job.settings.dtype == "bfloat16" for job in jobs):
            say(_bfloat16_line())
    say(f"{len(jobs)} notebook runs planned, nothing was executed")
    return 0


def _bfloat16_line() -> str:
    """What bfloat16 means on the device that trainings run on."""
    from moebert_lib.training.trainer import has_fast_bfloat16  # torch takes seconds to import

    if has_fast_bfloat16():
        return "dtype=bfloat16: this device computes in it"
    return "dtype=bfloat16: this device emulates it, about 9 times slower than float32"


def _add_sweep(commands: Any) -> None:
    command = commands.add_parser(
        "sweep",
        help="run a notebook over a grid of settings, tasks and seeds",
        description="Run 03_distillation, or another notebook, once for each point of a grid. The "
        "grid is a YAML file with the names notebook, scale, data_dir, tasks, seeds, settings "
        "(each a list of values: all combinations are run) and points (a list of sets of values).",
        example="moebert sweep grid.yaml --dry-run\n"
        "  moebert sweep grid.yaml --only $SLURM_ARRAY_TASK_ID",
    )
    option = command.add_argument
    option("grid", type=Path, nargs="?", metavar="GRID.yaml")
    data = "folder with GLUE data, instead of the grid's data_dir"
    option("--data-dir", default="", metavar="DIR", help=data)
    option("--dry-run", action="store_true", help="list what would run or be reused, and why")
    option("--why", action="store_true", help="the same, with all reasons")
    only = "run only the points with these numbers, from 0: 7, 0-9 or 0,3,5-7; for array jobs"
    option("--only", metavar="N", help=only)
    option("--count", action="store_true", help="print the number of points; run nothing")
    retry = "run points that failed or died before again; without a grid, those of all sweeps"
    option("--retry-failed", action="store_true", help=retry)
    _add_execution_options(command, workers="default: as many as cores and memory allow")
    command.set_defaults(run=sweep)


def sweep(args: argparse.Namespace) -> int:
    """Run a notebook over the points of a grid; return 1 where some failed."""
    from moebert_lib.publish.report import write_report
    from moebert_lib.runs import status as inventory
    from moebert_lib.runs import sweep as sweeps
    from moebert_lib.store.store import Store

    if args.grid is None and (args.only or args.count or not args.retry_failed):
        raise UserError("name a grid, such as grid.yaml (see moebert sweep --help)")
    _check_engine(args)
    grid = args.grid and sweeps.read(args.grid, data_dir=args.data_dir)
    planned = [grid] if grid else sweeps.with_failures()
    only = sweeps.chosen_points(args.only, len(grid.jobs)) if args.only else None
    if args.count:
        say(str(len(grid.jobs if only is None else only)))
        return 0
    if args.dry_run or args.why:
        for grid in planned:
            _print_preview(grid, args, only)
        return 0
    engine = _engine(args)
    how = {"force": args.force, "retry_failed": args.retry_failed}
    all_done = True
    for grid in planned:
        results = sweeps.run(grid, only=only, engine=engine, echo=say, **how)
        states = [sweeps.state(result) for result in results]
        all_done &= set(states) == {"done"}
        say(inventory.count_states(states))
        if only is None:
            say(f"table     {near(grid.folder / inventory.TABLE)}")
        else:
            say(f"table     once all {len(grid.jobs)} points are done: moebert sweep {args.grid}")
    if only is None and Store().entries("notebook"):
        say(f"page      {near(write_report())}")
    return 0 if all_done else 1


def _print_preview(grid: Any, args: argparse.Namespace, only: Sequence[int] | None) -> None:
    """Print what ``moebert sweep`` would do with each point and why, then the cost in all."""
    from moebert_lib.runs import cost, plan
    from moebert_lib.runs import sweep as sweeps
    from moebert_lib.runs.local_pool import fitting

    retry = args.retry_failed or args.force
    numbers = range(len(grid.jobs)) if only is None else only
    jobs = [grid.jobs[number] for number in numbers]
    preview = list(sweeps.preview(jobs, retry_failed=retry, force=args.force, whole=args.why))
    for number, (job, action, reason) in zip(numbers, preview, strict=True):
        say(f"{number:4} {action:6} {job.name}{plan.describe(job)}: {reason}")
    to_run = [job for job, action, _ in preview if action == "run"]
    for line in cost.summary(to_run):
        say(line)
    counts = Counter(action for _, action, _ in preview)
    parallel = f", {fitting(to_run).workers} at a time here" if to_run else ""
    say(
        f"{counts['run']} to run{parallel}, {counts['reuse']} reused, {counts['skip']} skipped; "
        "nothing was executed"
    )


def _add_status(commands: Any) -> None:
    command = commands.add_parser(
        "status",
        help="list stored and failed runs",
        description="Count the stored runs by kind; list the newest and the failed runs.",
        example="moebert status --all",
    )
    command.add_argument("--all", action="store_true", help="list all stored runs")
    command.set_defaults(run=status)


def status(args: argparse.Namespace) -> int:
    """Print sweeps, counts of stored runs, the newest or all runs, and the failed ones."""
    from moebert_lib.runs import status as inventory

    for line in inventory.lines(whole=args.all):
        say(line)
    return 0


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write one table of all runs",
        description="Write one row per run with its settings, results and origin. A run stored in "
        "several homes is one row. With --results, write all stages of experiments and the small "
        "files from which figures are drawn into a folder for moebert report --from.",
        example="moebert export runs.parquet\n"
        "  moebert export --results figures/runs\n"
        "  moebert export --results figures/runs --data-dir DIR\n"
        "  moebert export runs.csv runs/ other-machine/runs/ --kind student",
    )
    option = command.add_argument
    option("out", type=Path, metavar="RUNS.parquet", help="or .csv or .json")
    option("stores", nargs="*", metavar="HOME", help="a home or its runs/; default: this one")
    kinds = "notebook (default), student, teacher and so on, or all"
    option("--kind", default="notebook", metavar="K", help=kinds)
    option("--results", action="store_true", help="add the results to the folder named first")
    data = "with --results: add the right classes of the examples, from the data of the results"
    option("--data-dir", metavar="DIR", help=data)
    command.set_defaults(run=export)


def export(args: argparse.Namespace) -> int:
    """Write one row per run of one home or several; with ``--results``, a folder of results."""
    from moebert_lib.runs import export as exports

    if args.data_dir:
        if not args.results:
            raise UserError("--data-dir is for results; expected --results beside it")
        n_added = exports.add_right_answers(args.out, args.data_dir)
        say(f"right answers of {n_added} more datasets: {args.out}")
        return 0
    if args.results:
        n_rows, n_files = exports.write_results(args.out, args.stores)
        say(f"{n_rows} stages, {n_files} small files: {args.out}")
        return 0
    frame = exports.frame(args.stores, kind=args.kind)
    exports.write(frame, args.out)
    say(f"{len(frame)} runs, {len(frame.columns)} columns: {args.out}")
    return 0


# Where runs are executed: the options and the engine that run and sweep share.


def _add_execution_options(command: argparse.ArgumentParser, *, workers: str) -> None:
    option = command.add_argument
    option("--force", action="store_true", help="run again what is stored")
    option("--workers", type=count, metavar="N", help=f"runs at the same time; {workers}")
    engines = "local (default), or ray (needs moebert[cluster])"
    option("--engine", type=choice("local", "ray"), default="local", metavar="E", help=engines)
    option("--address", metavar="A", help="of a Ray cluster: auto or HOST:PORT")


def _check_engine(args: argparse.Namespace) -> None:
    if args.engine != "ray" and args.address is not None:
        raise UserError("--address is for --engine ray; give both, or neither")


def _engine(args: argparse.Namespace) -> Any:
    """Return the engine that the options choose; ``None`` for the default."""
    if args.engine == "ray":
        from moebert_lib.runs.ray_cluster import Ray

        return Ray(args.address, workers=args.workers)
    from moebert_lib.runs.local_pool import Local, gpus

    return Local(args.workers, gpus=gpus()) if args.workers else None
