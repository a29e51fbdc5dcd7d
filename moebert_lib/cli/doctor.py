"""Check what a run needs of this machine, one line for each check."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

from moebert_lib.config.errors import CHECKOUT, UserError, home
from moebert_lib.config.presets import MINILM, MPNET
from moebert_lib.config.provenance import cores, has_bfloat16
from moebert_lib.config.settings import Settings

MEMORY = 6  # GiB, the most that a run at scale quick takes


def checks(data_dir: str = "") -> Iterator[tuple[str, bool, str]]:
    """Name, whether all is well, and the fact or what to do; ``data_dir`` adds a check."""
    made = [versions, bfloat16, machine, disk, kernel, weights, hub]
    for check in made + [partial(data, Path(data_dir))] * bool(data_dir):
        name = getattr(check, "__name__", "data")
        try:
            yield name, True, check()
        except UserError as problem:
            yield name, False, str(problem)


def versions() -> str:
    """Installed packages beside the pins of constraints.txt."""
    path = CHECKOUT / "constraints.txt"
    if not path.is_file():
        raise UserError("not installed from a checkout, whose constraints.txt pins the versions")
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text("utf-8"), re.MULTILINE)
    installed = {part.metadata["Name"].lower(): part.version for part in metadata.distributions()}
    installed = {name: installed[name].partition("+")[0] for name, _ in pins if name in installed}
    differ = [f"{n} {installed[n]}, not {v}" for n, v in pins if installed.get(n, v) != v]
    if differ:
        raise UserError(f"{'; '.join(differ[:4])}: results may differ; make run installs the pins")
    python = platform.python_version()
    return f"Python {python}, {len(installed)} packages as pinned in constraints.txt"


def bfloat16() -> str:
    """Whether the processor computes in bfloat16 or emulates it."""
    import torch

    in_hardware = has_bfloat16()
    advice = "-p dtype=bfloat16 is faster" if in_hardware else "leave dtype at float32"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"processor {'has' if in_hardware else 'lacks'} it: {advice}; GPU: {gpu}"


def machine() -> str:
    """Cores and threads of a run, and memory."""
    import psutil

    total = psutil.virtual_memory().total / 2**30
    if total < MEMORY:
        raise UserError(f"{total:.0f} GiB of memory; scale quick takes up to {MEMORY} GiB")
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return f"{cores()} cores, threads of each run: {threads}, {total:.0f} GiB of memory"


def disk() -> str:
    """Whether results can be written, and the free space."""
    folder = home() / "runs"
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not writable; set MOEBERT_HOME to a folder that is")
    return f"{folder}, {shutil.disk_usage(existing).free / 2**30:.0f} GiB free"


def kernel() -> str:
    """Whether notebooks run in this environment."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # as runs look for kernels
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        program = "missing"
    if Path(program).name.startswith("python") and program in (Path(program).name, sys.executable):
        return "python3, of this environment"
    raise UserError(f"python3 is {program}; run python -m ipykernel install --sys-prefix")


def weights() -> str:
    """Whether the weights of scale quick are there, with the right digest, and those of base."""
    from moebert_lib.data import pretrained_weights

    pretrained_weights.find(MINILM)
    try:
        pretrained_weights.find(MPNET)
    except UserError as problem:
        return f"{MINILM}, digest as pinned; only for --scale base: {problem}"
    return f"{MINILM} and {MPNET}, digests as pinned"


def hub() -> str:
    """Whether the Hugging Face hub answers; only scale paper and its tasks need it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "not used: HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception as error:
        return f"no answer ({type(error).__name__}); only downloads need it, such as scale paper's"
    return f"{constants.ENDPOINT} answers"


def data(folder: Path) -> str:
    """Whether the tasks in a folder can be read."""
    from moebert_lib.data import loading, tasks

    folder = folder.expanduser().resolve()
    readable = []
    for name, task in tasks.TASKS.items():
        if task.source != "built-in" and (folder / name).is_dir():
            loading.check(Settings.at("small", task=name, data_dir=str(folder)))
            readable.append(name)
    if not readable:
        raise UserError(f"no task in {folder}; expected {folder}/sst2/train.jsonl and the like")
    return f"{folder}: {', '.join(readable)}"
