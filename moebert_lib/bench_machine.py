"""What a benchmark ran on, and under which conditions."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import torch

from moebert_lib import provenance

#: Instructions that decide how fast matrices are multiplied, by /proc/cpuinfo's names.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "bf16")
BUSY = 0.5  # of a core: other work that a timing would show


def machine() -> dict[str, Any]:
    """CPU, cores, threads, instructions, memory, how torch was built, and the GPU or "none"."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    libraries = {
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    return {
        **provenance.machine(),
        "instructions": _instructions(),
        "ram_gb": _ram(),
        "torch_build": libraries,
        "gpu": gpu,
    }


def prepare() -> dict[str, Any]:
    """Called first by every benchmark: has memory kept, and says whether others are at work.

    Returns:
        ``load``, the average over the last minute for each core, None where the system does
        not say; ``memory_kept``, see :func:`keep_memory`; and ``malloc``, settings of the
        allocator that the process was started with.
    """
    cores = provenance.cores()
    load = os.getloadavg()[0] / cores if hasattr(os, "getloadavg") else None
    if load is not None and load > BUSY:
        print(f"timed beside other work: load {load * cores:.1f} on {cores} cores", flush=True)
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    return {"load": load, "memory_kept": keep_memory(), "malloc": malloc}


def keep_memory() -> bool:
    """Have glibc keep freed memory for the next call; whether that could be done.

    Else large buffers go back to the system after each layer, and are mapped and zeroed anew:
    a cost of the allocator, not of the model. It is what MALLOC_MMAP_MAX_=0 and
    MALLOC_TRIM_THRESHOLD_=100000000000 do before a process starts.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def _instructions() -> list[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    lines = (line.partition(":") for line in info.read_text().splitlines())
    flags = next((value.split() for name, _, value in lines if name.strip() == "flags"), [])
    return [name for name in INSTRUCTIONS if name in flags]


def _ram() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
