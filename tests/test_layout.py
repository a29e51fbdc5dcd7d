"""The shape of the project: rooms, sizes, names, and nothing of one machine in it."""

import ast
import re
import socket

import pytest
from checkout import LIBRARY, ROOT, files, text, tree

#: Each module in one room. A module imports from its own room and the rooms below.
ROOMS = {
    "the command line": "cli __main__ options commands commands_model commands_pages "
    "commands_bench doctor",
    "speed": "bench bench_inference bench_training bench_importance bench_scaling bench_cuda "
    "bench_machine bench_models bench_batch bench_widgets released roofline",
    "pages": "explore_page redraw findings found_rows found_beyond report report_tables site "
    "site_notebooks site_pages site_reference site_theme",
    "widgets": "widgets token_table explorer explorer_widget readout sources",
    "figures and tables": "plots plots_importance plots_experts plots_routing plots_states "
    "plots_learning plots_results plots_claims plots_release plots_speed plots_bench "
    "plots_explorer plots_scores saving tables",
    "a model to ship": "ship card receipt onnx_file",
    "many runs": "sweeps sweep_tables batch engines cluster nodes inventory reasons export "
    "results columns",
    "one notebook, planned and run": "planning notebook_files knobs forecast estimate worker "
    "execution publish pages",
    "exercises": "exercises exercises_method exercises_learning exercises_results",
    "what runs say": "claims verdicts",
    "experiments, each made once": "grids experiment constructions teachers removal scorings "
    "excitation inputs facts records archive store shared leases disk",
    "learning": "train teacher_states checkpoints distill evaluate routes states oracle",
    "MoEBERT as a transformers model": "modeling encoders encoder_checks convert moe_layer",
    "the method: tensors in, tensors out": "importance scores release stability experts groups "
    "layer_view routing",
    "the same model, faster": "packed prepared kernels packing",
    "ground": "adapters data batching tasks corpus files spans weights settings sizes scales "
    "errors stages paper checks checks_model provenance intervals yamls",
}
FLOOR = {name: floor for floor, room in enumerate(ROOMS.values()) for name in room.split()}

TOP_LEVEL = set(
    "notebooks moebert_lib figures tests environment.yml README.md pyproject.toml constraints.txt "
    "Makefile LICENSE CHANGELOG.md CONTRIBUTING.md .ci .github .gitignore "
    ".pre-commit-config.yaml".split()
)

#: One character of each is bracketed, so that this file does not contain what it refuses.
ONE_MACHINE = re.compile(
    r"/[r]oot/|/[h]ome/\w+/|/[U]sers/\w+/|/[w]ork/\w+|/[o]pt/\w+|[A-Z]:\\+[U]sers"
    r"|[p]ypi\.org|[p]ythonhosted|[n]pmjs|[d]eb\.debian|[d]ownload\.pytorch"
)


def imported(module: ast.Module) -> set[str]:
    """Names of the library's modules that a parsed file imports, anywhere in it."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "moebert_lib" if node.level else node.module
            base = f"{base}.{node.module}" if node.level and node.module else base
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    parts = [name.split(".") for name in found if name.startswith("moebert_lib.")]
    return {names[1] for names in parts if names[1] in FLOOR}


def own_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return length
    return length - (function.body[0].end_lineno - function.body[0].lineno + 1)


def test_every_module_has_exactly_one_room():
    named = [name for room in ROOMS.values() for name in room.split()]
    there = sorted(path.stem for path in LIBRARY.glob("*.py") if path.stem != "__init__")
    assert sorted(named) == there


@pytest.mark.parametrize("name", FLOOR)
def test_imports_point_down(name):
    up = {other for other in imported(tree(LIBRARY / f"{name}.py")) if FLOOR[other] < FLOOR[name]}
    assert not up, f"{name} imports {', '.join(sorted(up))} from a room above"


def test_imports_are_found_wherever_they_hide():
    source = """
        import moebert_lib.store
        from moebert_lib import plots
        from moebert_lib.data import load
        def late():
            from . import batch
            from .cli import main
        import torch, moebertx.train
    """
    module = ast.parse("if True:" + source)
    assert imported(module) == {"store", "plots", "data", "batch", "cli"}


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
