"""Real Ray nodes on this machine, and which of their processes are there."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from moebert_lib.runs.ray_cluster import LOOPBACK


def start(place: Path, name: str, *options: str) -> None:
    """Start a Ray node with one core and no home of its own.

    Its processes and what they start have ``CLUSTER_MARK`` in their environment.
    """
    own = {"NODE_NAME": name, "CLUSTER_MARK": f"{place} {name}"}
    environment = {name: value for name, value in os.environ.items() if name != "MOEBERT_HOME"}
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--num-cpus=1",
        f"--node-ip-address={LOOPBACK}",
        f"--temp-dir={place}/ray",
        "--disable-usage-stats",
        "--object-store-memory=100000000",
        "--include-log-monitor=false",
        *options,
    ]
    subprocess.run(command, env={**environment, **own}, check=True, capture_output=True)


def marked(mark: str) -> list[psutil.Process]:
    """The processes whose mark contains this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.environ().get("CLUSTER_MARK", ""):
                found.append(process)
        except psutil.Error:
            pass
    return found


def kernels(mark: object) -> list[psutil.Process]:
    """Of these the kernels of notebooks."""
    found = []
    for process in marked(str(mark)):
        try:
            told = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "ipykernel" in told:
            found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> None:
    """Kill -9 and wait."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(processes, 10)


def gone(find: Callable[[str], list], mark: object, seconds: float) -> bool:
    """Whether ``find`` finds no process any more, at the latest after some seconds."""
    until = time.monotonic() + seconds
    while find(str(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    return not find(str(mark))
