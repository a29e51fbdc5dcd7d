"""A sweep as a process of its own, in a home of its own, with all that it leaves in view."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import fixture_home
import psutil
from conftest import SCRATCH

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds for what takes a few on an idle machine
LEAVING = 10  # seconds in which all processes of a sweep that ended must be gone
MARK = "MOEBERT_MARK"  # in the environment of every process of a home
GRID = {"notebook": "06_slow", "scale": "smoke", "seeds": [0, 1, 2]}
#: What a whole sweep of GRID executes, each once: runs and stages, "shared 0" for two runs.
ALL = {f"{what} {n}" for what in ("run", "own") for n in range(3)} | {"shared 0", "shared 1"}


@dataclass
class Ended:
    """A command that ended, and what it said."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """What it said on stderr, which must be one line."""
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        return self.err


class Home:
    """A MOEBERT_HOME with fixture notebooks; beside it a temporary folder and a log.

    Commands run behind ``prefix``. Where that takes them to other mounts, ``root`` is their
    root folder as this process sees it.
    """

    def __init__(self, base: Path, *, notebooks=None, prefix=(), root: Path = Path("/")):
        self.base, self.prefix = base, prefix
        self.folder = root / (base / "home").relative_to("/")
        self.runs, self.mark = self.folder / "runs", uuid4().hex
        self.temporary, self.log_file = base / "tmp", base / "log.txt"
        self.temporary.mkdir(parents=True)
        fixture_home.make(self.folder, {"06_slow": "slow"} if notebooks is None else notebooks)
        self.grid()

    def grid(self, **changes: Any) -> None:
        """Write ``grid.yaml``: GRID but for these names."""
        (self.folder / "grid.yaml").write_text(json.dumps(GRID | changes))  # JSON is YAML

    def start(self, *words: str) -> "Command":
        """Start ``moebert WORDS``, by default the sweep with two workers."""
        words = words or ("sweep", f"{self.base}/home/grid.yaml", "--workers", "2")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        own = {
            MARK: self.mark,
            "MOEBERT_HOME": f"{self.base}/home",
            "MOEBERT_LOG": str(self.log_file),
            "TMPDIR": str(self.temporary),
            "JUPYTER_RUNTIME_DIR": str(self.base / "runtime"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
        }
        return Command(
            [*self.prefix, sys.executable, "-m", "moebert_lib", *words],
            os.environ | own,
            self.base,
        )

    def run(self, *words: str) -> Ended:
        """The same, waited for; leaves no process."""
        ended = self.start(*words).end()
        self.alone()
        return ended

    def sweep(self) -> Ended:
        """A sweep that must go well."""
        ended = self.run()
        assert ended.status == 0, ended
        return ended

    def log(self) -> list[str]:
        """What notebooks logged: a line for each execution of a run or a stage."""
        return self.log_file.read_text().splitlines() if self.log_file.exists() else []

    def entries(self) -> dict[str, dict[str, str]]:
        """Digests of all files of each complete entry, by what it logged as."""
        return {what: digests(folder) for what, folder in self.places().items()}

    def places(self) -> dict[str, Path]:
        """The folder of each complete entry, by what it logged as."""
        found = {}
        for path in self.runs.glob("*/entry.json"):
            record = json.loads(path.read_text())
            run = record["kind"] == "notebook"
            what = f"run {record['key']['settings']['seed']}" if run else record["row"]["what"]
            found[what] = path.parent
        return found

    def table(self) -> bytes:
        """The table of its latest sweep."""
        tables = self.runs.glob("sweeps/*/table.csv")
        return max(tables, key=lambda path: path.stat().st_mtime_ns).read_bytes()

    def alone(self) -> None:
        """Wait until no process of this home is left."""
        until(lambda: not self.processes(), LEAVING)

    def processes(self) -> list[psutil.Process]:
        """Processes that run for this home now."""
        return [process for process in psutil.process_iter() if _marked(process, self.mark)]

    def check_complete(self, table: bytes) -> None:
        """All points are done and in the table; nothing is left over, locked or half made."""
        status = self.run("status")
        assert ": 3 of 3 done\n" in status.out, status
        assert self.entries().keys() == ALL and self.table() == table
        self.check_tidy()

    def check_tidy(self) -> None:
        """Nothing is left over, locked or half made."""
        left = [*(self.runs / "tmp").glob("*"), *self.temporary.iterdir()]
        left += [*self.runs.rglob("*.tmp"), *(self.runs / "figures").rglob("*.tmp")]
        assert not left, left
        locks = list((self.runs / "locks").glob("*.lock"))
        held = [path.name for path in locks if _held(path)]
        assert locks and not held, held


class Command:
    """A ``moebert`` command while it runs, in a process group of its own, as in a terminal."""

    def __init__(self, words: list[str], environment: dict[str, str], folder: Path):
        self.out, self.err = (folder / f"{name}-{uuid4().hex}.txt" for name in ("out", "err"))
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                words,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def end(self) -> Ended:
        """Wait for its end."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)
            raise AssertionError(f"does not end: {self.out.read_text()}") from None
        return Ended(status, self.out.read_text(), self.err.read_text())

    def find(self, word: str) -> psutil.Process | None:
        """A process below it whose command line holds a word; None where there is none."""
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                if word in " ".join(process.cmdline()):
                    return process
        except psutil.Error:  # it ended meanwhile
            pass
        return None


def until(true: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until something is true, and return it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not so within {seconds} seconds"
        time.sleep(0.02)
    return found


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@cache
def undisturbed() -> Home:
    """The home of a sweep that nothing happened to, made once."""
    home = Home(SCRATCH / "undisturbed")
    home.sweep()
    home.check_complete(home.table())
    return home


def copied(home: Home, base: Path) -> Home:
    """A home that has what another has."""
    copy = Home(base)
    shutil.copytree(home.folder, copy.folder, dirs_exist_ok=True)
    return copy


def _held(path: Path) -> bool:
    """Whether a process has locked a file; filelock would take it for one of our own root."""
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:  # it ended meanwhile, is a zombie, or is not ours
        return False
