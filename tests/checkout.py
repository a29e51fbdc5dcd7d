"""What lies in this checkout: its files, its modules, its notebooks."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "moebert_lib"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FINDINGS = ROOT / "notebooks" / "09_what_we_found.ipynb"  # a page of results, not a lesson
PYTHON = sorted([*LIBRARY.rglob("*.py"), *(ROOT / "tests").rglob("*.py")])

_MADE = {".git", ".venv", "runs", ".ipynb_checkpoints", "__pycache__", "build", "dist"}
_MADE |= {".hypothesis", ".pytest_cache", ".ruff_cache"}


def files() -> list[Path]:
    """Every file that is, or would be, committed; relative to the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:  # a copy without its git folder
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        names = [path for path in found if not _MADE & set(path.parts)]
    return sorted(name for name in names if (ROOT / name).is_file())


def text(path: Path) -> str:
    """A file's text, or nothing where it is not text."""
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def tree(path: Path) -> ast.Module:
    """A Python file, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"))


def bare(requirement: str) -> str:
    """A requirement's project name as registries compare it: ``Foo_Bar>=1`` is ``foo-bar``."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()
