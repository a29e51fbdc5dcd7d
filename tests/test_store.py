"""Entries are made once, checked when reused, and never seen half-written."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkout import LIBRARY
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.config import provenance
from moebert_lib.config.errors import CHECKOUT
from moebert_lib.config.provenance import digest
from moebert_lib.runs import export
from moebert_lib.store import store
from moebert_lib.store.store import StageKey, Store

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

UNIT = StageKey("unit", {})


@pytest.fixture
def runs(tmp_path) -> Store:
    return Store(tmp_path / "runs")


def write_one(folder: Path) -> dict:
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text("one")
    return {"score": 0.5}


def must_not_build(folder: Path) -> dict:
    raise AssertionError("built although it is stored")


def test_an_entry_is_built_once_and_then_reused(runs):
    first = runs.make(StageKey("unit", {"a": 1}), write_one)
    again = runs.make(StageKey("unit", {"a": 1}), must_not_build)
    assert (first.reused, again.reused) == (False, True)
    assert again.row == {"score": 0.5}
    assert (again.folder / "deep" / "a.txt").read_text() == "one"


@pytest.mark.parametrize("kind, key", [("unit", {"a": 2}), ("unit", {"b": 1}), ("other", {"a": 1})])
def test_another_key_or_kind_is_another_entry(runs, kind, key):
    one = runs.make(StageKey("unit", {"a": 1}), write_one)
    assert runs.make(StageKey(kind, key), write_one).folder != one.folder


def test_a_fresh_row_equals_the_row_read_back(runs):
    row = {"count": np.int64(3), "values": np.array([0.5, 1.0]), "pair": (1, 2), "at": Path("x")}
    fresh = runs.make(UNIT, lambda folder: row)
    assert fresh.row == runs.make(UNIT, must_not_build).row
    assert fresh.row == {"count": 3, "values": [0.5, 1.0], "pair": [1, 2], "at": "x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_build_that_stops_leaves_nothing(runs, error):
    def stop(folder):
        write_one(folder)
        raise error

    with pytest.raises(error):
        runs.make(UNIT, stop)
    assert runs.entries() == [] and list((runs.root / "tmp").iterdir()) == []
    assert runs.make(UNIT, write_one).row == {"score": 0.5}


def test_a_row_that_is_not_json_leaves_nothing(runs):
    with pytest.raises(TypeError, match="object"):
        runs.make(UNIT, lambda folder: {"x": object()})
    assert runs.entries() == [] and list((runs.root / "tmp").iterdir()) == []


def test_what_a_killed_process_left_is_cleared_first(runs):
    left = runs.root / "tmp" / runs.folder(UNIT).name
    left.mkdir(parents=True)
    (left / "half.bin").write_text("half")
    entry = runs.make(UNIT, write_one)
    assert sorted(entry.record()["files"]) == ["deep/a.txt"]


def damage_file(folder):
    (folder / "deep" / "a.txt").write_text("two")


def remove_file(folder):
    (folder / "deep" / "a.txt").unlink()


def cut_record(folder):
    (folder / "entry.json").write_text('{"kind": "unit", ')


@pytest.mark.parametrize(
    "damage, named",
    [(damage_file, "deep/a.txt"), (remove_file, "deep/a.txt"), (cut_record, "entry.json")],
)
def test_a_damaged_entry_is_named_set_aside_and_made_again(runs, capsys, damage, named):
    first = runs.make(UNIT, write_one)
    damage(first.folder)
    assert runs.find(UNIT) is None
    assert not runs.make(UNIT, write_one).reused
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and first.folder.name in line
    assert len(list((runs.root / "damaged").iterdir())) == 1
    assert len(runs.entries()) == 1


def test_force_replaces_an_entry_only_once_the_new_one_is_whole(runs):
    def fail(folder):
        raise ValueError

    runs.make(UNIT, write_one)
    with pytest.raises(ValueError):
        runs.make(UNIT, fail, force=True)
    assert runs.find(UNIT).row == {"score": 0.5}
    assert runs.make(UNIT, lambda folder: {"score": 1.0}, force=True).row == {"score": 1.0}
    assert runs.find(UNIT).row == {"score": 1.0}


def test_processes_that_want_the_same_entry_build_it_once(tmp_path):
    script = tmp_path / "one.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "from moebert_lib.store.store import StageKey, Store\n"
        "def build(folder):\n"
        "    with open(sys.argv[2], 'a') as log: log.write('built\\n')\n"
        "    time.sleep(1)\n"
        "    return {}\n"
        "Store(sys.argv[1]).make(StageKey('unit', {}), build)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "runs"), str(tmp_path / "log")]
    env = {"PYTHONPATH": str(CHECKOUT)}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_frame_has_one_flat_row_for_each_entry(runs):
    for seed in (1, 0):
        key = StageKey("unit", {"settings": {"seed": seed}}, {"code": "x"})
        runs.make(key, lambda folder, s=seed: {"accuracy": s / 2})
    runs.make(StageKey("other", {}), write_one)
    frame = export.frame([runs.root], kind="unit")
    assert sorted(zip(frame["seed"], frame["accuracy"], strict=True)) == [(0, 0), (1, 0.5)]
    assert {"digest", "created", "seconds"} <= set(frame.columns)
    assert len(export.frame([runs.root], kind="all")) == 3


def test_looking_creates_nothing(runs):
    assert runs.find(UNIT) is None and runs.entries() == []
    assert not runs.root.exists()


@given(JSON)
def test_digest_survives_json_and_ignores_the_order_of_names(value):
    again = json.loads(json.dumps(value))
    turned = {"b": value, "a": again}
    assert digest(value) == digest(again)
    assert digest(turned) == digest(dict(sorted(turned.items())))


@given(JSON, JSON)
def test_different_json_has_different_digests(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest(one) == digest(other)) == same


def code_of(text):
    return provenance._dump(ast.parse(text))


def test_code_digest_is_blind_to_comments_docstrings_and_layout():
    plain = code_of("def f(x):\n    return x + 1\n")
    dressed = '"""Header."""\n# why\ndef f(x):\n    """One more."""\n    return (x +\n        1)\n'
    assert code_of(dressed) == plain
    assert code_of("def f(x):\n    return x + 2\n") != plain


def test_modules_are_found_in_folders_and_followed_through_imports(tmp_path, monkeypatch):
    texts = {
        "room/low.py": "x = 1\n",
        "room/middle.py": "def f():\n    from moebert_lib.room import low\n",
        "other/top.py": "from moebert_lib.room.middle import f\nfrom moebert_lib import public\n",
        "other/held.py": "public = 1\n",
        "other/beside.py": "y = 2\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "LIBRARY", tmp_path)
    monkeypatch.setattr(provenance, "PUBLIC", {"public": "other.held"})
    provenance.library_modules.cache_clear()
    try:
        reached = provenance.reached("other.top")
        assert reached == ["other.held", "other.top", "room.low", "room.middle"]
    finally:
        provenance.library_modules.cache_clear()


def test_every_module_of_the_library_has_a_digest():
    modules = {path.stem for path in LIBRARY.rglob("*.py")} - {"__init__"}
    assert {name.rpartition(".")[2] for name in provenance.code_digests()} == modules


def test_commit_names_head_and_says_when_the_library_differs(tmp_path, monkeypatch):
    library = tmp_path / "moebert_lib"
    library.mkdir()
    (library / "provenance.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert provenance.commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    clean = provenance.commit()
    (library / "provenance.py").write_text("x = 2\n")
    assert len(clean) == 40 and provenance.commit() == f"{clean}-dirty"


def test_machine_and_versions_say_what_the_numbers_were_made_on():
    assert {"cpu", "cores", "torch_threads", "system"} == provenance.machine().keys()
    assert provenance.machine()["cores"] >= 1
    assert {"python", "torch", "transformers"} <= provenance.versions().keys()


def test_figures_go_to_the_batch_folder_or_the_interactive_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path))
    assert store.output_dir() == tmp_path / "runs" / "interactive" / "figures"
    monkeypatch.setenv("MOEBERT_FIGURES", str(tmp_path / "batch"))
    assert store.output_dir() == tmp_path / "batch" and store.output_dir().is_dir()
