"""What the commands about runs do: run, sweep, status, report and export."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moebert_lib.config import file_io
from moebert_lib.config.errors import UserError, nearest
from moebert_lib.runs import local_pool, plan

ENGINES = ("local", "ray")


def run(args: argparse.Namespace) -> int:
    """``moebert run``: plan, execute, publish, and write the report."""
    paths = plan.select(args.notebooks)
    scale, values = given(args)
    jobs = plan.plan(paths, scale=scale, parameters=values, data_dir=args.data_dir)
    _check_engine(args)
    if args.plan or args.why:
        return _plan(jobs, why=args.why)
    from moebert_lib.runs.local_pool import side_by_side

    engine = side_by_side(jobs, args.workers) if args.engine == "local" else _engine(args)
    local_pool.run(jobs, engine=engine, force=args.force, echo=say)
    return _finish(jobs)


def sweep(args: argparse.Namespace) -> int:
    """``moebert sweep``: one notebook over the points of a grid; status 1 where some failed."""
    from moebert_lib.runs import status as inventory
    from moebert_lib.runs import sweep as sweeps

    if args.grid is None and not args.retry_failed:
        raise UserError("name a grid, such as grid.yaml (see moebert sweep --help)")
    grid = args.grid and sweeps.read(args.grid, data_dir=args.data_dir)
    planned = [grid] if grid else sweeps.with_failures()
    _check_engine(args)
    if args.dry_run or args.why:
        for one in planned:
            _preview(one, args)
        return 0
    engine, failed = _engine(args), 0
    for one in planned:
        how = dict(engine=engine, force=args.force, retry_failed=args.retry_failed, echo=say)
        results = sweeps.run(one, **how)
        failures = [result for result in results if isinstance(result, Exception)]
        failed += len(failures)
        where = f", {len(failures)} failed; moebert status says where" if failures else ""
        say(f"{len(results) - len(failures)} of {len(results)} done{where}")
        say(f"table     {near(one.folder / inventory.TABLE)}")
    from moebert_lib.publish.report import write_report
    from moebert_lib.store.store import Store

    if Store().entries("notebook"):
        say(f"page      {near(write_report())}")
    return 1 if failed else 0


def status(args: argparse.Namespace) -> int:
    """``moebert status``: sweeps, counts, the newest runs or all of them, the failed ones."""
    from moebert_lib.runs import status as inventory

    for line in inventory.lines(whole=args.all):
        say(line)
    return 0


def report(args: argparse.Namespace) -> int:
    """``moebert report``: write the page and say where it is; first draw it from results."""
    from moebert_lib.publish.report import write_report

    if args.results:
        return _redraw(args)
    if args.check:
        raise UserError("--check compares what --from draws; give both")
    say(f"page      {near(write_report())}")
    return 0


def _redraw(args: argparse.Namespace) -> int:
    """Figures and tables drawn from a folder of results, or compared with those that are here."""
    from moebert_lib.publish import report as redraw
    from moebert_lib.publish.report import write_report

    if args.check:
        apart = redraw.check(args.results, echo=say)
        for line in apart:
            say(line)
        say(f"{len(apart)} files differ" if apart else "figures/ holds what the results draw")
        return 1 if apart else 0
    say(f"figures   {near(redraw.draw(args.results, echo=say))}")
    say(f"page      {near(write_report())}")
    return 0


def export(args: argparse.Namespace) -> int:
    """``moebert export``: one row per run, of one store or several, as a file; or results."""
    from moebert_lib.runs import export as module

    if args.results:
        from moebert_lib.runs import export as results

        n_rows, n_files = results.write_results(args.out, args.stores)
        say(f"{n_rows} stages, {n_files} small files: {args.out}")
        return 0
    frame = module.frame(args.stores, kind=args.kind)
    module.write(frame, args.out)
    say(f"{len(frame)} runs, {len(frame.columns)} columns: {args.out}")
    return 0


def given(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The scale, and the values of ``-p`` by name."""
    values: dict[str, Any] = {}
    for text in args.values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"-p {text}: expected NAME=VALUE, such as -p seed=1")
        if name in values:
            raise UserError(f"-p {name} is given twice; keep one")
        values[name] = file_io.parse(value, f"-p {text}") if value else ""
    if "scale" in values and args.scale not in (None, values["scale"]):
        raise UserError(f"--scale {args.scale} and -p scale={values['scale']} differ; keep one")
    scale = "quick" if args.scale is None else args.scale
    return values.pop("scale", scale), values


def _plan(jobs: Sequence[plan.Job], *, why: bool) -> int:
    """What ``moebert run`` would do, and its cost or its reasons; nothing is executed."""
    from moebert_lib.runs import cost
    from moebert_lib.runs import sweep as sweeps

    states = list(sweeps.preview(jobs, retry_failed=True))
    if why:
        for job, _, reason in states:
            say(f"{job.name}{plan.describe(job)}: {reason}")
    else:
        told = ["to run" if does == "run" else reason for _, does, reason in states]
        for line in cost.lines(jobs, told):
            say(line)
    say(f"{len(jobs)} notebook runs planned, nothing was executed")
    return 0


def _preview(one: Any, args: argparse.Namespace) -> None:
    """What ``moebert sweep`` would do with each point, and why; then the cost of it all."""
    from moebert_lib.runs import cost
    from moebert_lib.runs import sweep as sweeps
    from moebert_lib.runs.local_pool import fitting

    retry = args.retry_failed or args.force
    states = list(sweeps.preview(one.jobs, retry_failed=retry, force=args.force, whole=args.why))
    for number, (job, does, reason) in enumerate(states, start=1):
        say(f"[{number}/{len(states)}] {does:6} {job.name}{plan.describe(job)}: {reason}")
    todo = [job for job, does, _ in states if does == "run"]
    for line in cost.summary(todo):
        say(line)
    counts = Counter(does for _, does, _ in states)
    where = f", {fitting(todo).workers} at a time here" if todo else ""
    say(
        f"{counts['run']} to run{where}, {counts['reuse']} reused, {counts['skip']} skipped; "
        "nothing was executed"
    )


def _check_engine(args: argparse.Namespace) -> None:
    if args.engine not in ENGINES:
        raise UserError(f"no engine '{args.engine}'; {nearest(args.engine, ENGINES)}")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected at least 1")
    if args.engine == "ray" and args.workers is not None:
        raise UserError(
            "--workers is for the local engine; a Ray cluster says itself how many runs fit"
        )
    if args.engine != "ray" and args.address is not None:
        raise UserError("--address is for --engine ray; give both, or neither")


def _engine(args: argparse.Namespace) -> Any:
    """The engine that was asked for, None where none was."""
    if args.engine == "ray":
        from moebert_lib.runs.ray_cluster import Ray

        return Ray(args.address)
    from moebert_lib.runs.local_pool import Local, gpus

    return Local(args.workers, gpus=gpus()) if args.workers else None


def _finish(jobs: Sequence[plan.Job]) -> int:
    from moebert_lib.publish.report import write_report

    page = write_report()
    for folder in dict.fromkeys(local_pool.published(job) for job in jobs):
        files = list(folder.glob("*.*"))
        figures = sum(path.suffix == ".png" for path in files)
        tables = sum(path.suffix == ".tex" for path in files)
        say(f"figures   {near(folder)}  ({figures} figures, {tables} tables)")
    say(f"page      {near(page)}")
    return 0


def near(path: Path) -> Path:
    """The path as seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def say(line: str) -> None:
    """A line on standard output, at once."""
    print(line, flush=True)
