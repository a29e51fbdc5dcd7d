"""The reference: every public name of the library, by room, from its docstring.

The rooms and their order are those of the table in the README. Names are found in the
source, so that a module's page lists what it defines and nothing that it imports.
"""

import ast
import fnmatch
import re
from pathlib import Path
from typing import NamedTuple

from moebert_lib.errors import LIBRARY, UserError

LONGEST_VALUE = 60  # characters of a constant that its entry repeats
ROLES = {"autofunction": "func", "autoclass": "class"}  # how a name's entry is linked to
ROW = re.compile(r"^\| ([^|]+?) \| (`.+`.*?) \|$", re.MULTILINE)


class Name(NamedTuple):
    """A public name: the directive that documents it, and what it says of itself at once."""

    name: str
    directive: str
    about: str  # the first paragraph of a docstring; of a constant, its comment ``#:``
    options: tuple[str, ...] = ()


def rooms(readme: str) -> dict[str, list[str]]:
    """Modules by room, from the table "The library" of the README; ``plots_*`` is a pattern.

    Raises:
        UserError: the table names a module that is not there.
    """
    there = sorted(path.stem for path in LIBRARY.glob("*.py"))
    found: dict[str, list[str]] = {}
    _, _, rest = readme.partition("## The library")
    for room, cell in ROW.findall(rest.partition("\n## ")[0]):
        found[room] = []
        for pattern in re.findall(r"`([\w*]+)`", cell):
            modules = fnmatch.filter(there, pattern)
            if not modules and "*" not in pattern:
                raise UserError(f"README's table names the module {pattern}, which is not there")
            found[room] += [name for name in modules if name not in found[room]]
    if not found:
        raise UserError("README has no table of rooms under 'The library'")
    return found


def names(module: str) -> list[Name]:
    """The public names that a module defines, in the order of its source."""
    source = (LIBRARY / f"{module}.py").read_text("utf-8")
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            about = (ast.get_docstring(node) or "").partition("\n\n")[0]
            is_class = isinstance(node, ast.ClassDef)
            options = (":members:",) if is_class else ()
            options += (":show-inheritance:",) if is_class and node.bases else ()
            directive = "autoclass" if is_class else "autofunction"
            found.append(Name(node.name, directive, about, options))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = ast.get_source_segment(source, node.value) if node.value else ""
            plain = [name.id for target in targets for name in _names(target)]
            short = len(plain) == 1 and 0 < len(value) <= LONGEST_VALUE and "\n" not in value
            options = (f":value: {value}",) if short else ()
            found += [Name(name, "py:data", _comment(source, node), options) for name in plain]
    return [name for name in found if not name.name.startswith("_")]


def write(folder: Path, readme: str) -> None:
    """Write the pages, in reStructuredText: one for each room, and the map of them all."""
    folder.mkdir(parents=True)
    by_room = rooms(readme)
    lines = [_title("Reference", "="), _intro()]
    for room, modules in by_room.items():
        lines += [f":doc:`{room} <{_file(room)}>`", ""]
        lines += [f"* :py:mod:`~moebert_lib.{name}`: {_first(name)}" for name in modules] + [""]
        (folder / f"{_file(room)}.rst").write_text(_room(room, modules), "utf-8")
    lines += [".. toctree::", "   :hidden:", "", *(f"   {_file(room)}" for room in by_room), ""]
    (folder / "index.rst").write_text("\n".join(lines), "utf-8")


def _intro() -> str:
    return (
        "Every public name, by room. A module imports from its own room and from those below it: "
        "the last room is the ground on which the others stand. Shapes are written in one "
        "alphabet: ``B`` batch, ``T`` tokens, ``D`` hidden size, ``F`` neurons of a dense FFN, "
        "``E`` experts, ``K`` neurons of an expert, ``L`` layers.\n"
    )


def _room(room: str, modules: list[str]) -> str:
    lines = [_title(room[0].upper() + room[1:], "=")]
    lines += [f"* :py:mod:`~moebert_lib.{name}`: {_first(name)}" for name in modules] + [""]
    for module in modules:
        lines += [_title(module, "-"), f".. py:module:: moebert_lib.{module}", ""]
        lines += [_drawn(_docstring(module)), ""]
        public = names(module)
        for name in (name for name in public if name.directive in ROLES):
            role = ROLES[name.directive]
            link = f":py:{role}:`~moebert_lib.{module}.{name.name}`"
            lines.append(f"* {link}: {' '.join(name.about.split())}")
        lines.append("")
        for name in public:
            at = f"moebert_lib.{module}." if name.directive in ROLES else ""  # autodoc's are whole
            lines.append(f".. {name.directive}:: {at}{name.name}")
            lines += [*(f"   {option}" for option in name.options), ""]
            if name.directive not in ROLES:
                lines += [f"   {name.about}", ""]
    return "\n".join(lines)


def _first(module: str) -> str:
    """The first paragraph of a module's docstring, as one line."""
    return " ".join(_docstring(module).partition("\n\n")[0].split())


def _docstring(module: str) -> str:
    tree = ast.parse((LIBRARY / f"{module}.py").read_text("utf-8"))
    return ast.get_docstring(tree) or ""


def _drawn(docstring: str) -> str:
    """A docstring with its formulas line by line: paragraphs set in, or in columns."""
    paragraphs = docstring.split("\n\n")
    for place, text in enumerate(paragraphs):
        announced = place and paragraphs[place - 1].endswith("::")
        if not announced and re.search(r"^ {4}|\S {2,}\S", text):
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            paragraphs[place] = f".. code-block:: text\n\n{indented}"
    return "\n\n".join(paragraphs)


def _names(target: ast.expr) -> list[ast.Name]:
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    return [part for part in parts if isinstance(part, ast.Name)]


def _comment(source: str, node: ast.stmt) -> str:
    """The comment ``#:`` above a constant, or behind it."""
    lines = source.splitlines()
    above = node.lineno - 1
    while above and lines[above - 1].startswith("#:"):
        above -= 1
    told = lines[above : node.lineno - 1] or re.findall(r"  #: .*", lines[node.end_lineno - 1])
    return " ".join(line.strip(" #:") for line in told)


def _title(text: str, rule: str) -> str:
    return f"{text}\n{rule * len(text)}\n"


def _file(room: str) -> str:
    return re.sub(r"\W+", "-", room)
