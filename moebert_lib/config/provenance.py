"""Where a result comes from: digests of keys, files and code; versions, commit and machine."""

import ast
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from moebert_lib import PUBLIC
from moebert_lib.config.errors import CHECKOUT, LIBRARY

LIBRARIES = (
    "moebert torch transformers datasets tokenizers numpy scipy scikit-learn pandas matplotlib "
    "papermill accelerate"
).split()


JUST_NOW = 2.0  # seconds in which a file may change twice with one time of change

_PARSING = threading.Lock()


def digest(obj: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its names."""
    return hashlib.sha256(to_json(obj, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_digest(path: Path) -> str:
    """:func:`file_digest` of a file that is only read: once a process, unless it changes.

    A change is seen by the time that the file system keeps of it, which a program cannot set back
    as it can the time stamp; a file that changed in the last seconds is read every time.
    """
    stat = path.stat()
    if abs(time.time() - stat.st_ctime) < JUST_NOW:
        return file_digest(path)
    return _input_digest(path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime_ns)


@functools.lru_cache(maxsize=256)
def _input_digest(path: Path, *_identity: int) -> str:
    return file_digest(path)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def parse(source: str) -> ast.Module:
    """The syntax tree of Python source, for threads too: CPython 3.11 fails in two at a time."""
    with _PARSING:
        return ast.parse(source)


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
    return {name: digest(_dump(parse(paths[name].read_text("utf-8")))) for name in names}


@functools.cache
def library_modules() -> dict[str, Path]:
    """Every module of this library by its name below ``moebert_lib``, ``__init__`` left out."""
    paths = {}
    for path in LIBRARY.rglob("*.py"):
        if path.stem != "__init__":
            name = ".".join(path.relative_to(LIBRARY).with_suffix("").parts)
            paths[name] = path
    return paths


def local_names(*trees: ast.AST) -> dict[str, str]:
    """The names that parsed texts import from this library, each with its full dotted name.

    Example:
        >>> local_names(ast.parse("from moebert_lib.plots import routing as r"))
        {'r': 'moebert_lib.plots.routing'}
    """
    names = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
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


def reached(*names: str) -> list[str]:
    """Modules of this library, and all modules that they import, directly or through others.

    Args:
        names: Modules to begin with, named as in :func:`library_modules`.
    """
    modules, seen, left = library_modules(), set(), {*names}
    while left:
        seen.add(module := left.pop())
        left |= imported(parse(modules[module].read_text("utf-8"))) - seen
    return sorted(seen)


# Which code decides a result: the definitions that a function can run, followed by name.

#: Modules that cannot change a number. Values of settings stand in the keys themselves; a store,
#: an error and a file carry numbers unchanged.
NO_NUMBERS = ("config", "store", "experiments.stage_keys", "experiments.ablations")


def code_of(function: Callable) -> str:
    """One SHA-256 of :func:`definitions_used`."""
    return digest(definitions_used(function))


def definitions_used(function: Callable) -> dict[str, str]:
    """SHA-256 of each definition of this library that a function can run, by its full name.

    A definition is a function, a class with all of its methods, or a constant. It uses those that
    it names, in whatever module they are; a module's name alone stands for all of it. Statements
    that a module runs when it is imported count as used with it.

    Not followed are :data:`NO_NUMBERS`, and what is handed to ``store.make(key, build)``: that is
    an earlier stage, whose own key has its code.

    Args:
        function: Defined at the top level of a module of this library.
    """
    module = function.__module__.removeprefix("moebert_lib.")
    return _definitions_used(module, function.__qualname__)


@functools.cache
def _definitions_used(module: str, name: str) -> dict[str, str]:
    digests: dict[str, str] = {}
    left = {(module, name)}
    while left:
        module, name = left.pop()
        source = _source(module)
        digests[f"{module}.{name}"] = digest([_dump(node) for node in source.definitions[name]])
        used = {pair for pair in source.used_by(name) if not _without_numbers(pair[0])}
        left |= {pair for pair in used if ".".join(pair) not in digests}
    return dict(sorted(digests.items()))


def _without_numbers(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in NO_NUMBERS)


class _Source:
    """The definitions in one module's text, and what each of them names."""

    def __init__(self, module: str):
        self.module = module
        statements = parse(library_modules()[module].read_text("utf-8")).body
        outside = [node for node in statements if not isinstance(node, (*FUNCTIONS, ast.ClassDef))]
        self.imports = local_names(*outside)
        self.definitions: dict[str, list[ast.stmt]] = {AT_IMPORT: []}
        for statement in statements:
            for name in _defined_names(statement):
                self.definitions.setdefault(name, []).append(statement)

    def used_by(self, name: str) -> set[tuple[str, str]]:
        """Module and name of each definition that one of these names."""
        nodes = self.definitions[name]
        names = self.imports | local_names(*nodes)
        used = {(self.module, AT_IMPORT)} if self.definitions[AT_IMPORT] else set()
        return used.union(*(self._named(node, names) for node in nodes))

    def _named(self, node: ast.AST, names: Mapping[str, str]) -> set[tuple[str, str]]:
        full_name = dotted(node, names)
        used = _definitions_of(full_name) if full_name else set()
        if isinstance(node, ast.Name) and node.id in self.definitions:
            used.add((self.module, node.id))
        if full_name:
            return used
        return used.union(*(self._named(child, names) for child in _parts(node)))


#: Statements that run when a module is imported and define no name.
AT_IMPORT = ""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_source = functools.cache(_Source)


def _definitions_of(full_name: str) -> set[tuple[str, str]]:
    """Module and name of what a dotted name stands for; all of a module, or of a folder."""
    definitions = set()
    for module in _modules_of(full_name):
        source = _source(module)
        below = full_name.removeprefix(f"moebert_lib.{module}").removeprefix(".")
        name = full_name.split(".")[1] if below == full_name else below.partition(".")[0]
        if name in source.definitions:
            definitions.add((module, name))
        elif name in source.imports:
            definitions |= _definitions_of(source.imports[name] + below.removeprefix(name))
        else:
            definitions |= {(module, each) for each in source.definitions}
    return definitions


def _defined_names(statement: ast.stmt) -> list[str]:
    """Names that a top-level statement defines; :data:`AT_IMPORT` where it only runs."""
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return []
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return []  # a docstring
    inner = [node for node in ast.iter_child_nodes(statement) if isinstance(node, ast.stmt)]
    if inner:
        return [name for node in inner for name in _defined_names(node)]
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    stored = [node for target in targets if target for node in ast.walk(target)]
    names = [node.id for node in stored if isinstance(node, ast.Name)]
    return names or [AT_IMPORT]


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one, without what is handed to ``store.make``."""
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "make":
        yield node.func
    else:
        yield from ast.iter_child_nodes(node)


@functools.cache
def versions() -> dict[str, str]:
    """Python's and the libraries' versions, without importing them."""
    by_name = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            by_name[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return by_name


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
    usable = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(usable, int(quota) // int(period)), 1)
    except (OSError, ValueError):  # no such group, or without a limit
        return usable


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16.

    Others emulate it, about 9 times slower than float32.
    """
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities[name] for name in capabilities if name.endswith("bf16"))


def to_json(obj: Any, *, sort_keys: bool = True, **layout: Any) -> str:
    """JSON text, by default with sorted names, so that equal values give equal text."""
    return json.dumps(obj, sort_keys=sort_keys, ensure_ascii=False, default=_plain, **layout)


def _plain(value: Any) -> Any:
    """JSON values for numpy and torch values, pydantic models and paths."""
    for method in ("tolist", "model_dump"):
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a {type(value).__name__} cannot be stored as JSON: {value!r}")


def _dump(tree: ast.AST) -> str:
    """A parsed text without docstrings and layout."""
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
