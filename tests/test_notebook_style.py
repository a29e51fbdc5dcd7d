"""Every notebook follows the same anatomy: sizes, sections, parameters, a clean source."""

import ast
import json
import re
from types import ModuleType

import nbformat
import numpy as np
import papermill
import pytest
from checkout import FINDINGS, NOTEBOOKS

import moebert_lib
from moebert_lib.config.provenance import dotted, local_names

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

#: Set-up, plumbing and noise that belong in the library or nowhere.
REFUSED = re.compile(
    r"^\s*[!%]|pip install|sys\.path|plt\.show|warnings\.|autoreload|IN_COLAB|os\.environ",
    re.MULTILINE,
)


def read(path):
    return nbformat.read(path, as_version=4)


def sources(path, kind, *, exercises=False):
    """Sources of the lesson's cells of a kind, or of its exercises, which are tagged."""
    cells = [cell for cell in read(path).cells if cell.cell_type == kind]
    return [c.source for c in cells if ("exercise" in c.metadata.get("tags", [])) == exercises]


def parameters(path):
    return [c for c in read(path).cells if "parameters" in c.metadata.get("tags", [])]


def statements(node: ast.AST) -> int:
    return sum(isinstance(part, ast.stmt) for part in ast.walk(node))


def test_notebook_is_valid_and_its_cells_have_ids(path):
    raw = json.loads(path.read_text())
    nbformat.validate(raw)
    ids = [cell.get("id") for cell in raw["cells"]]
    assert all(ids) and len(set(ids)) == len(ids)


def test_notebook_runs_with_whatever_python_is_active(path):
    assert read(path).metadata.kernelspec.name == "python3"


def test_source_holds_no_outputs_and_no_trace_of_a_run(path):
    notebook = read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in cells if cell.outputs or cell.execution_count]
    kept = {key for cell in notebook.cells for key in cell.metadata}
    assert kept <= {"tags", "jupyter"}
    assert set(notebook.metadata) <= {"kernelspec", "language_info", "moebert"}
    assert "version" not in notebook.metadata.get("language_info", {})


def test_code_is_short_enough_to_read(path):
    sizes = [statements(ast.parse(source)) for source in sources(path, "code")]
    assert 12 <= len(sizes) <= 25, f"{len(sizes)} code cells"
    assert sum(sizes) <= 150, f"{sum(sizes)} statements"
    if path != FINDINGS:  # a page of results, which hides its code
        assert np.median(sizes) <= 5
    assert np.percentile(sizes, 90) <= 10
    assert max(sizes) <= 15


def test_there_is_text_for_every_piece_of_code(path):
    assert len(sources(path, "markdown")) >= len(sources(path, "code"))


def test_a_notebook_imports_at_most_eight_names_of_the_library(path):
    tree = ast.parse("\n".join(sources(path, "code") + sources(path, "code", exercises=True)))
    names = local_names(tree)
    assert len(names) <= 8, sorted(names)
    renamed = {name for name, full in names.items() if full.rpartition(".")[2] != name}
    assert renamed == set()


def test_exercises_are_one_section_of_short_cells_before_the_take_away(path):
    if path == FINDINGS:
        pytest.skip("a page of results has no exercises")
    cells = read(path).cells
    places = [n for n, cell in enumerate(cells) if "exercise" in cell.metadata.get("tags", [])]
    assert places == list(range(len(cells) - 9, len(cells) - 3))
    kinds = [cells[place].cell_type for place in places]
    assert kinds == ["markdown", "code"] * 3
    lines = [len(s.splitlines()) for s in sources(path, "code", exercises=True)]
    assert max(lines) <= 8


def test_first_cell_is_a_title_with_the_notebooks_number(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith(f"# {int(path.stem[:2])} ")


def test_one_cell_holds_the_parameters(path):
    assert len(parameters(path)) == 1


def test_parameters_are_literal_one_liners_that_papermill_reads(path):
    (cell,) = parameters(path)
    for statement, line in zip(ast.parse(cell.source).body, cell.source.splitlines(), strict=True):
        assert isinstance(statement, ast.AnnAssign), line
        ast.literal_eval(statement.value)
        assert "=" not in line.partition("#")[2], f"papermill cannot read: {line}"
    names = [statement.target.id for statement in ast.parse(cell.source).body]
    assert list(papermill.inspect_notebook(str(path))) == names


def test_every_parameter_says_what_it_is(path):
    known = papermill.inspect_notebook(str(path)).values()
    assert [item["name"] for item in known if not item["help"]] == []


def test_notebook_ends_with_links_to_the_notebooks_beside_it(path):
    links = read(path).cells[-1]
    place = NOTEBOOKS.index(path)
    around = NOTEBOOKS[max(place - 1, 0) : place] + NOTEBOOKS[place + 1 : place + 2]
    linked = re.findall(r"\]\(([\w.]+\.ipynb)\)", links.source)
    assert linked == [other.name for other in around]


def test_linked_notebooks_exist(path):
    linked = re.findall(r"\]\((\w+\.ipynb)", "\n".join(sources(path, "markdown")))
    assert set(linked) <= {other.name for other in NOTEBOOKS}


def test_code_has_no_plumbing_and_defines_no_class(path):
    code = "\n".join(sources(path, "code"))
    assert not REFUSED.search(code)
    assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ClassDef)]


def test_functions_are_the_lesson_and_at_most_8_statements(path):
    trees = [ast.parse(source) for source in sources(path, "code")]
    defs = [n for t in trees for n in ast.walk(t) if isinstance(n, ast.FunctionDef)]
    assert [n.name for n in defs if statements(n) > 8] == []


def test_every_name_of_the_library_in_a_notebook_exists(path):
    tree = ast.parse("\n".join(sources(path, "code") + sources(path, "code", exercises=True)))
    names = local_names(tree)
    chains = {dotted(node, names) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for chain in chains - {""}:
        assert resolves(chain), chain


def resolves(chain: str) -> bool:
    """Whether the parts of a dotted name are there, up to the first object that is no module."""
    value = moebert_lib
    for part in chain.split(".")[1:]:
        if not isinstance(value, ModuleType):
            return True
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True
