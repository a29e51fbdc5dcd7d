"""The shape of the project: rooms, sizes, names, and nothing of one machine in it."""

import re
import socket

import pytest
from checkout import LIBRARY, ROOT, files, text, tree

from moebert_lib.config.provenance import imported, library_modules

#: A folder imports from itself and from the folders before it.
ROOMS = (
    "config data method model training store experiments evidence plots teaching explore runs "
    "publish bench cli"
).split()

TOP_LEVEL = set(
    "notebooks moebert_lib figures tests environment.yml README.md pyproject.toml constraints.txt "
    "Makefile LICENSE CHANGELOG.md CONTRIBUTING.md CITATION.cff .ci .github .gitignore "
    ".pre-commit-config.yaml".split()
)

#: One character of each is bracketed, so that this file does not contain what it refuses.
ONE_MACHINE = re.compile(
    r"/[r]oot/|/[h]ome/\w+/|/[U]sers/\w+/|/[w]ork/\w+|/[o]pt/\w+|[A-Z]:\\+[U]sers"
    r"|[p]ypi\.org|[p]ythonhosted|[n]pmjs|[d]eb\.debian|[d]ownload\.pytorch"
)


def room(module: str) -> int:
    return ROOMS.index(module.split(".")[0])


def test_the_library_holds_folders_only():
    there = {path.name for path in LIBRARY.iterdir() if path.name != "__pycache__"}
    assert there == {*ROOMS, "__init__.py", "__main__.py"}


@pytest.mark.parametrize("module", sorted(library_modules().keys() - {"__main__"}))
def test_imports_point_to_the_same_folder_or_one_before_it(module):
    path = library_modules()[module]
    later = {name for name in imported(tree(path)) if room(name) > room(module)}
    assert not later


def test_the_top_level_holds_the_fixed_names_and_nothing_else():
    assert {path.parts[0] for path in files()} == TOP_LEVEL


def test_no_file_names_one_machine_or_a_registry():
    hits = {str(path): ONE_MACHINE.search(text(path)) for path in files()}
    assert {path: hit[0] for path, hit in hits.items() if hit} == {}


def test_no_file_names_this_host_or_checkout():
    host = socket.gethostname()
    places = [str(ROOT)] + ([host] if len(host) > 8 else [])  # short ones are common words
    assert [path for path in files() if any(place in text(path) for place in places)] == []


def test_folders_beside_the_checkout_are_named_by_ci_alone():
    outside = re.compile(r"\.\./[s]hared")
    assert [str(path) for path in files() if outside.search(text(path))] == [".ci/run"]
