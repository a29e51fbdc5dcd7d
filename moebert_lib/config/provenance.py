"""What made a result: digests of keys, files and code; versions, commit and machine."""

import ast
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from moebert_lib import PUBLIC
from moebert_lib.config.errors import CHECKOUT, LIBRARY

LIBRARIES = (
    "moebert torch transformers datasets tokenizers numpy scipy scikit-learn pandas matplotlib "
    "papermill accelerate"
).split()


def digest(obj: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its names."""
    return hashlib.sha256(to_json(obj, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_digest(path: Path) -> str:
    """:func:`file_digest` of a file that is only read: once a process, unless it changes."""
    stat = path.stat()
    return _input_digest(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _input_digest(path: Path, _size: int, _changed: int) -> str:
    return file_digest(path)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def code_digest(*module_names: str) -> str:
    """One SHA-256 of :func:`code_digests`."""
    return digest(code_digests(*module_names))


@functools.cache  # of the code as it was first asked for: what this process has imported
def code_digests(*module_names: str) -> dict[str, str]:
    """SHA-256 of modules of this library by name, blind to comments, docstrings and layout.

    Args:
        module_names: Names below ``moebert_lib``, such as ``method.importance``; none for all.

    Raises:
        KeyError: There is no such module.
    """
    paths = library_modules()
    names = [name.removeprefix("moebert_lib.") for name in module_names] or sorted(paths)
    return {name: digest(_code(paths[name])) for name in names}


@functools.cache
def library_modules() -> dict[str, Path]:
    """Every module of this library by its name below ``moebert_lib``, ``__init__`` left out."""
    paths = {}
    for path in LIBRARY.rglob("*.py"):
        if path.stem != "__init__":
            name = ".".join(path.relative_to(LIBRARY).with_suffix("").parts)
            paths[name] = path
    return paths


def local_names(tree: ast.AST) -> dict[str, str]:
    """The names that a parsed text imports from this library, each with its full dotted name.

    Example:
        >>> local_names(ast.parse("from moebert_lib.plots import routing as r"))
        {'r': 'moebert_lib.plots.routing'}
    """
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {name: full for name, full in names.items() if full.split(".")[0] == "moebert_lib"}


def dotted(node: ast.AST, names: Mapping[str, str]) -> str:
    """What an expression such as ``r.loads`` names in this library; "" for anything else.

    Args:
        node: Of a parsed text.
        names: From :func:`local_names`.

    Example:
        >>> dotted(ast.parse("r.loads", mode="eval").body, {"r": "moebert_lib.plots.routing"})
        'moebert_lib.plots.routing.loads'
    """
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    owner = dotted(node.value, names) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if owner else ""


def imported(tree: ast.AST) -> set[str]:
    """This library's modules that a parsed text imports, or reaches through a folder's name.

    A public name of ``moebert_lib`` counts as the module that defines it. A folder counts as the
    modules that the text names, as in ``plots.routing.loads``, and where its name stands alone, as
    all of its modules.
    """
    names, nodes = local_names(tree), list(ast.walk(tree))
    owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    chains = {dotted(node, names) for node in nodes if id(node) not in owners}
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    brought = {full for full in {*names.values(), *plain} if not _is_folder(full)}
    return set().union(*map(_modules_of, filter(None, chains | brought)))


def _is_folder(full_name: str) -> bool:
    return full_name == "moebert_lib" or full_name in {
        f"moebert_lib.{name.partition('.')[0]}" for name in library_modules()
    }


def _modules_of(full_name: str) -> set[str]:
    """The module that holds a dotted name; all modules of a folder."""
    top, _, below = full_name.partition(".")
    if top != "moebert_lib":
        return set()
    parts, modules = below.split("."), library_modules()
    if parts[0] in PUBLIC:
        return {PUBLIC[parts[0]]}
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    module = next((prefix for prefix in prefixes if prefix in modules), None)
    if module:
        return {module}
    return {name for name in modules if not below or name.startswith(f"{parts[0]}.")}


def reached(*names: str, but: tuple[str, ...] = ()) -> list[str]:
    """This library's modules that some import, themselves and theirs too.

    Args:
        names: Modules to begin with, named as in :func:`library_modules`.
        but: Modules that are not followed.
    """
    modules, seen, left = library_modules(), set(), {*names}
    while left:
        seen.add(module := left.pop())
        left |= imported(ast.parse(modules[module].read_text("utf-8"))) - seen - {*but}
    return sorted(seen)


@functools.cache
def versions() -> dict[str, str]:
    """Python's and the libraries' versions, without importing them."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Git commit of the checkout, "-dirty" where library or notebooks differ from it."""
    root = CHECKOUT
    if not (root / ".git").exists():  # installed, or unpacked from an archive
        return None
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", "moebert_lib", "notebooks")
    return f"{head}-dirty" if head and changed else head


def machine() -> dict[str, Any]:
    """What the seconds were measured on: CPU model, cores in use, torch's threads."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        cpu = next((value.strip() for name, _, value in lines if name.strip() == "model name"), cpu)
    torch = sys.modules.get("torch")  # only if something has imported it: it takes seconds
    threads = torch.get_num_threads() if torch else os.environ.get("OMP_NUM_THREADS")
    threads = int(threads) if str(threads).isdecimal() else None
    return {"cpu": cpu, "cores": cores(), "torch_threads": threads, "system": platform.system()}


def cores() -> int:
    """CPU cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent outside Linux
    mine = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(mine, int(quota) // int(period)), 1)
    except (OSError, ValueError):  # no such group, or without a limit
        return mine


def to_json(obj: Any, *, sort_keys: bool = True, **layout: Any) -> str:
    """JSON text, by default with sorted names, so that equal values give equal text."""
    return json.dumps(obj, sort_keys=sort_keys, ensure_ascii=False, default=_plain, **layout)


def _plain(value: Any) -> Any:
    """JSON for what is not: numpy and torch values, pydantic models, paths."""
    for method in ("tolist", "model_dump"):
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a {type(value).__name__} cannot be stored as JSON: {value!r}")


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return ast.dump(tree)


def _git(root: Path, *command: str) -> str | None:
    command = ("git", "-C", str(root), *command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
