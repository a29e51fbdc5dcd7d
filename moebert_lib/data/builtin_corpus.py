"""English sentences from the docstrings of installed libraries: text that needs no download.

The pinned libraries contain thousands of sentences written by people. They are read with ``ast``
(nothing is imported), cleaned of markup, and kept if they are plain English. ``tasks`` makes labels
from the text itself.

Three rules keep the tasks honest. All of a docstring is in one split, so neighbouring sentences
are never in two. Near-duplicates are dropped over all libraries and both splits. The name of a
library becomes "library" (with its aliases: np, pd, ...), so that it does not give the answer away;
names of types (DataFrame, tensor) stay, since they are the subject of the text. Tests, private
names and packages are left out.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from moebert_lib.config import provenance
from moebert_lib.config.errors import UserError, home
from moebert_lib.config.file_io import write_bytes

#: Package to the name it is installed under.
PACKAGES = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
VALIDATION_SHARE = 0.2  # of the docstrings
SHORTEST, LONGEST = 6, 25  # words

#: Tests, copies of other projects, and transformers' models: a third of the code to parse, and
#: nearly all of their text repeats from model to model.
_SKIPPED = re.compile(
    r"(^|/)(tests?|testing|externals|vendored|benchmarks)/|(^|/)(conftest|testing_\w+)\.py$"
    r"|^models/.*/mod(eling|ular)_\w+\.py$"
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

_MARKUP = (
    (re.compile(r":[\w:.-]+:`[~!]?(?:[\w.]*\.)?([^`<]*?)(?:\s*<[^`]*>)?`"), r"\1"),  # :class:`~a.B`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_+"), r"\1"),  # `text <address>`_
    (re.compile(r"\[([^\]]*)\]\([^)]*\)"), r"\1"),  # [text](address)
    (re.compile(r"\s*\[(?:\d+|[A-Za-z]+\d+)\]_"), ""),  # [1]_
    (re.compile(r"`+~?([^`]*)`+_?"), r"\1"),  # ``code``
    (re.compile(r"\*{1,2}(\w[^*]*)\*{1,2}"), r"\1"),  # **bold**
)
_BREAK = re.compile(r"\s*(?:>>>|\.\.|--|==|~~|```|[|#]|\+-|$)")  # code, rules, tables: not text
_BULLET = re.compile(r"\s*(?:[-*+•]|\(?\d+[.)])\s+")
_ARGUMENT = re.compile(r"^\w+\s*(?:\([^)]*\))?\s*:\s+(?=[A-Z])")  # Google style "name (int): Text"
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|cf|vs|resp|approx|Figs?|Eqs?|Sec|Refs?|al|no)\. ")
_SENTENCE_END = re.compile(r"(?<=[a-z)][.!?]) (?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*|\d+(?:\.\d+)?|(?:e\.g|i\.e|etc|vs|cf|resp)\.")
_COMMON = set(
    "a all an and are as at be been by can does each for from had has have if in is it not of on "
    "or should that the this to was were when which will with".split()
)
_NAME = re.compile(
    r"\b[\w-]*(?:torch|numpy|scipy|pandas|sklearn|scikit|matplotlib|sympy|networkx|hugging ?face)"
    r"[\w-]*\b|\b(?:transformers|np|pd|plt|pyplot|mpl|nx|hf)\b",
    re.IGNORECASE,
)


class Sentence(NamedTuple):
    """``docstring`` is ``path:line``; neighbours in it have consecutive ``position``."""

    text: str
    library: str
    docstring: str
    position: int

    @property
    def split(self) -> str:
        """``train`` or ``validation``, the same for the whole docstring."""
        share = int(_hash(self.docstring)[:8], 16) / 2**32
        return "validation" if share < VALIDATION_SHARE else "train"


def sentences(*, files_per_package: int | None = None) -> list[Sentence]:
    """All distinct plain-English sentences, in the order of packages, files and lines.

    Read from the docstrings once (a quarter of a minute) and kept in ``runs/corpus-<digest>``.

    Args:
        files_per_package: Read only so many middle-sized files of each; for tests.

    Raises:
        UserError: one of the libraries is not installed.
    """
    folder = home() / "runs" / f"corpus-{digest(files_per_package=files_per_package)[:16]}"
    kept = _read(folder / "sentences.jsonl")
    if kept is None:
        if files_per_package is None:
            print(f"· reading the docstrings of {len(PACKAGES)} libraries, once", flush=True)
        raw = [s for name in PACKAGES for s in _package(name, files_per_package)]
        kept = distinct(raw)
        _write(folder / "sentences.jsonl", kept)
    return kept


def digest(*, files_per_package: int | None = None) -> str:
    """SHA-256 of what decides the sentences: the libraries' versions and this module's code."""
    versions = {name: _version(name) for name in PACKAGES}
    code = provenance.code_of(sentences)
    return provenance.digest({"versions": versions, "code": code, "files": files_per_package})


def docstring_sentences(docstring: str) -> Iterator[tuple[int, str]]:
    """Position and text of each plain-English sentence of a docstring, markup removed.

    Positions count everything, so what is dropped leaves a gap.

    Example:
        >>> doc = "See `x`.\\n\\nThe *first* axis is the one that :func:`~np.sort` works on."
        >>> list(docstring_sentences(doc))
        [(1, 'The first axis is the one that sort works on.')]
    """
    pieces = (piece for block in _blocks(docstring) for piece in _split(block))
    for position, piece in enumerate(pieces):
        if is_plain(piece):
            yield position, _masked(piece)


def is_plain(text: str) -> bool:
    """Whether a text is one English sentence of 6 to 25 words without code or formulas.

    Example:
        >>> is_plain("Return the largest value of each row."), is_plain("Set x_0 = 1 in each row.")
        (True, False)
    """
    if not text[:1].isupper() or text[-1] != "." or text.count("(") != text.count(")"):
        return False
    words = [word.strip("(),;:\"'") for word in text[:-1].split()]
    if not SHORTEST <= len(words) <= LONGEST:
        return False
    english = sum(word.lower() in _COMMON for word in words) >= 2  # other lists have no "the"
    return english and all(_WORD.fullmatch(word) for word in words)


def normalised(text: str) -> str:
    """Lower-case letters and single spaces only: what near-duplicates are compared by."""
    return " ".join(re.sub(r"[^a-z ]", " ", text.lower()).split())


def distinct(raw: Sequence[Sentence]) -> list[Sentence]:
    """The sentences without duplicates and near-duplicates; the first one stays.

    A text found in two libraries goes altogether, since neither label would be right. A
    near-duplicate has more than half of its runs of four words in sentences before it.
    """
    owners: dict[str, set[str]] = {}
    for sentence in raw:
        owners.setdefault(normalised(sentence.text), set()).add(sentence.library)
    kept, texts, seen = [], set(), set()
    for sentence in raw:
        text = normalised(sentence.text)
        if text in texts or len(owners[text]) > 1:
            continue
        words = text.split()
        runs = [" ".join(words[i : i + 4]) for i in range(max(len(words) - 3, 1))]
        if 2 * sum(run in seen for run in runs) <= len(runs):
            kept.append(sentence)
        texts.add(text)
        seen.update(runs)
    return kept


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _version(package: str) -> str:
    try:  # without the local tag: how torch was built changes no docstring
        return metadata.version(PACKAGES[package]).partition("+")[0]
    except metadata.PackageNotFoundError:
        raise UserError(
            f"the built-in tasks read the docstrings of {PACKAGES[package]}, which is not "
            f"installed; pip install -c constraints.txt {PACKAGES[package]}"
        ) from None


def _package(name: str, limit: int | None) -> Iterator[Sentence]:
    spec = importlib.util.find_spec(name)  # finds, does not import
    root = Path(spec.submodule_search_locations[0])
    paths = [path for path in sorted(root.rglob("*.py")) if _is_public(path.relative_to(root))]
    if limit is not None:
        paths = [path for path in paths if 30_000 < path.stat().st_size < 90_000][:limit]
    for path in paths:
        source = path.read_text("utf-8", errors="replace")
        if '"""' not in source:  # spares the parser a third of the files
            continue
        place = path.relative_to(root.parent).as_posix()
        for line, docstring in _docstrings(source):
            for position, text in docstring_sentences(docstring):
                yield Sentence(text, name, f"{place}:{line}", position)


def _is_public(path: Path) -> bool:
    hidden = any(part.startswith("_") and part != "_core" for part in path.parts[:-1])
    return not hidden and not _SKIPPED.search(path.as_posix())  # numpy lives in numpy/_core


def _docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and docstring of the module and of every class and function with a public name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another project's invalid escapes
        stack: list[ast.AST] = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield getattr(node, "lineno", 0), docstring
        inside = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        stack += [child for child in reversed(inside) if _has_public_name(child)]


def _has_public_name(node: ast.stmt) -> bool:
    name = getattr(node, "name", None) or ""
    return not name.startswith("_") or name == "__init__"


def _blocks(docstring: str) -> Iterator[str]:
    """Paragraphs, list items and descriptions, each as one line of text.

    A blank line, a change of indentation, a bullet or a line of code ends a block, which
    parts "name : type" from the description below it.
    """
    lines: list[str] = []
    indent = 0
    for line in [*docstring.splitlines(), ""]:
        bullet = _BULLET.match(line)
        start = bullet.end() if bullet else len(line) - len(line.lstrip())
        if lines and (_BREAK.match(line) or bullet or start != indent):
            yield " ".join(lines)
            lines = []
        if not _BREAK.match(line):
            indent = start
            lines.append(line[start:].strip())


def _split(block: str) -> list[str]:
    for pattern, kept in _MARKUP:
        block = pattern.sub(kept, block)
    block = _ARGUMENT.sub("", " ".join(block.split()))
    block = _ABBREVIATION.sub(r"\1.\0", block)
    return [piece.replace("\0", " ") for piece in _SENTENCE_END.split(block)]


def _masked(text: str) -> str:
    return _NAME.sub(lambda match: "library" if match.start() else "Library", text)


def _read(path: Path) -> list[Sentence] | None:
    """The sentences of a file that is there and whole: its first line is the rest's digest."""
    try:
        checksum, _, body = path.read_text("utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if checksum != _hash(body):
        return None
    return [Sentence(*json.loads(line)) for line in body.splitlines()]


def _write(path: Path, kept: Sequence[Sentence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(json.dumps(sentence) + "\n" for sentence in kept)
    write_bytes(path, f"{_hash(body)}\n{body}".encode())
