"""What a run needs of this machine, checked: each line is a fact, or says what to do."""

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from moebert_lib.config.errors import UserError, home
from moebert_lib.config.presets import MINILM
from moebert_lib.config.provenance import cores
from moebert_lib.config.settings import Settings
from moebert_lib.data import tasks

WANTED_MEMORY = 6  # GiB, the most that a quick run takes


class Check(NamedTuple):
    """One line: what was looked at, what to do about it ("" if nothing), what was found."""

    name: str
    problem: str
    fact: str


def checks(data_dir: str = "") -> Iterator[Check]:
    """All checks, one at a time; ``data_dir`` adds one for that folder."""
    yield _python()
    yield _versions()
    yield _weights()
    yield _kernel()
    yield Check("cores", "", f"{cores()}; {platform.machine()}, {platform.system()}")
    yield _memory()
    yield _runs()
    if data_dir:
        yield _data(data_dir)


def _python() -> Check:
    old = sys.version_info < (3, 11)
    return Check("python", "install Python 3.11 or newer" if old else "", platform.python_version())


def _versions() -> Check:
    path = home() / "constraints.txt"
    if not path.is_file():
        return Check("versions", f"no {path}; run from a checkout", "")
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text("utf-8"), re.MULTILINE))
    differ, matching = [], 0
    for name, pinned in pins.items():
        try:
            installed = metadata.version(name).partition("+")[0]  # local tag: how torch was built
        except metadata.PackageNotFoundError:
            continue
        matching += installed == pinned
        differ += [f"{name} {installed}, pinned {pinned}"] if installed != pinned else []
    problem = f"{'; '.join(differ[:4])}: numbers may differ; make run installs the pins"
    return Check("versions", problem if differ else "", f"{matching} as pinned in constraints.txt")


def _weights() -> Check:
    try:
        from moebert_lib.data import pretrained_weights

        pretrained_weights.find(MINILM)
        return Check("weights", "", f"{MINILM}, digest as pinned")
    except UserError as error:
        return Check("weights", str(error), "")


def _kernel() -> Check:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    before = os.environ.get("JUPYTER_PREFER_ENV_PATH")
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # as the kernels of a run are found
    try:
        argv = KernelSpecManager().get_kernel_spec("python3").argv
    except NoSuchKernel:
        return Check("kernel", "python -m ipykernel install --sys-prefix", "")
    finally:
        del os.environ["JUPYTER_PREFER_ENV_PATH"]
        if before is not None:
            os.environ["JUPYTER_PREFER_ENV_PATH"] = before
    ours = Path(argv[0]).name.startswith("python") and (
        not Path(argv[0]).is_absolute() or Path(argv[0]) == Path(sys.executable)
    )
    problem = f"python3 is {argv[0]}; run python -m ipykernel install --sys-prefix"
    return Check("kernel", "" if ours else problem, "python3, of this environment")


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return Check("memory", "", "not known on this system")
    short = total < WANTED_MEMORY
    problem = f"{total:.0f} GiB; a quick run takes up to {WANTED_MEMORY} GiB: close other programs"
    return Check("memory", problem if short else "", f"{total:.0f} GiB")


def _runs() -> Check:
    folder = home() / "runs"
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check("runs", f"{existing} is not writable; set MOEBERT_HOME to one that is", "")
    space = os.statvfs(existing) if hasattr(os, "statvfs") else None
    free = f", {space.f_bavail * space.f_frsize / 2**30:.0f} GiB free" if space else ""
    return Check("runs", "", f"{folder}{free}")


def _data(data_dir: str) -> Check:
    from moebert_lib.data import loading

    folder = Path(data_dir).expanduser().resolve()
    if not folder.is_dir():
        return Check("data", f"no folder {folder}", "")
    found, said = [], ""
    for name, task in tasks.TASKS.items():
        if task.source == "built-in" or not (folder / name).is_dir():
            continue
        try:
            loading.check(Settings.at("small", task=name, data_dir=str(folder)))
            found.append(name)
        except UserError as error:
            said = said or str(error)
    nothing = f"{folder} holds no GLUE task; expected {folder}/sst2/train.jsonl and the like"
    return Check("data", said or ("" if found else nothing), f"{folder}: {', '.join(found)}")
