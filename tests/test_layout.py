"""The shape of the project: rooms, sizes, names, and nothing of one machine in it."""

import ast
import re
import socket
import subprocess
import sys

import pytest
from checkout import LIBRARY, ROOT, files, text, tree

import moebert_lib
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


IMPORTS = {
    "from moebert_lib.plots import routing as r": {"plots.routing"},
    "import moebert_lib.plots.style": {"plots.style"},
    "from moebert_lib import plots\nplots.routing.loads(plots.style)": {
        "plots.routing",
        "plots.style",
    },
    "from moebert_lib import plots": set(),  # loads no file by itself
    "from moebert_lib import plots\nshow(plots)": {
        name for name in library_modules() if name.startswith("plots.")
    },
    "from moebert_lib import accelerate": {"model.accelerate"},
    "import moebert_lib\nmoebert_lib.accelerate(m)": {"model.accelerate"},
    "import moebert_lib as m\nm.plots.routing.loads(x)": {"plots.routing"},
    "import moebert_lib as m\nshow(m)": set(library_modules()),
    "import numpy, os.path\nfrom plots import routing": set(),
}


@pytest.mark.parametrize("text", IMPORTS)
def test_what_a_text_reaches_is_found_through_every_kind_of_import(text):
    assert imported(ast.parse(text)) == IMPORTS[text]


@pytest.mark.parametrize("name", ROOMS)
def test_a_folder_loads_its_files_when_they_are_named(name):
    folder = getattr(moebert_lib, name)
    files = {module.partition(".")[2] for module in library_modules() if module.startswith(name)}
    assert set(dir(folder)) >= files - {""}
    with pytest.raises(AttributeError, match="it has"):
        folder.nothing  # noqa: B018 (the access is what is tested)


def test_importing_a_folder_imports_no_file_of_it():
    code = (
        "import sys; sys.orig_argv[1:3] = ['-m', 'moebert_lib']\n"
        "from moebert_lib import plots, training\n"
        "sys.exit(any(m.startswith(('moebert_lib.plots.', 'torch')) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
