"""Why a run is reused or must run, in one line: by hand, as properties, on planned notebooks."""

import copy
import json
from pathlib import Path

import fixture_home
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moebert_lib.config.provenance import to_json
from moebert_lib.runs import plan, status
from moebert_lib.runs.status import MOST, Reason
from moebert_lib.store.store import Entry, StageKey

KEY = {
    "notebook": "04_ablations",
    "cells": ["a", "b", "c", "d"],
    "parameters": {"scale": "small", "seed": 0, "layers": [0, 1], "overrides": {}},
    "settings": {"scale": "small", "seed": 0, "task": "rte", "n_experts": 4, "model": "x"},
    "inputs": {"data": "d0", "model": "m0"},
    "code": {"data": "1", "experts": "2", "train": "3"},
    "versions": {"torch": "2.12.0", "numpy": "2.0.1"},
}


def but(key=KEY, **parts):
    """The key with some of a part's names changed; a value that is no dict replaces the part."""
    key = copy.deepcopy(key)
    for part, value in parts.items():
        key[part] = {**key[part], **value} if isinstance(value, dict) else value
    return key


def less(part, name):
    key = copy.deepcopy(KEY)
    del key[part][name]
    return key


def entries(*keys):
    return [
        Entry(StageKey.read("notebook", key), Path(str(n)), {}, 1.0, True)
        for n, key in enumerate(keys)
    ]


def why(key, stored, **damage):
    """:func:`status.why` of a key that is written as in a record."""
    return status.why(StageKey.read("notebook", key), stored, **damage)


def details(key, stored, **damage):
    return status.details(StageKey.read("notebook", key), stored, **damage)


def compare(key, stored):
    return status.compare(StageKey.read("notebook", key), stored)


def nearest(key, *keys):
    """Which of the stored keys is compared with; None where none is."""
    entry = compare(key, entries(*keys)).entry
    return entry and int(entry.folder.name)


def test_what_is_stored_and_what_never_ran_are_said_in_two_words():
    other = but(notebook="05_routing")
    assert why(KEY, entries(but(settings={"seed": 1}), KEY, other)) == "stored"
    assert why(KEY, entries(other)) == why(KEY, []) == "never run"
    assert details(KEY, entries(KEY)) == ["stored"] and details(KEY, []) == ["never run"]
    assert compare(KEY, []) == Reason(None, ()) and not compare(KEY, []).stored


@pytest.mark.parametrize(
    "key, said",
    [
        (but(cells=["a", "b", "X", "d"]), "code cell 3 changed"),
        (but(cells=["X", "b", "Y", "Z"]), "code cells 1, 3 and 4 changed"),
        (but(cells=["X", "b", "Y", "d"]), "code cells 1 and 3 changed"),
        (but(cells=["a", "b", "c", "X", "d"]), "code cell 4 added"),
        (but(cells=["a", "c", "d"]), "code cell 2 removed"),
        (
            but(cells=["a", "X", "b", "c", "Y", "Z"]),
            "code cell 5 changed; code cells 2 and 6 added",
        ),
        (but(code={"train": "9", "experts": "9"}), "library changed: experts, train"),
        (but(code={"packed": "4"}), "library changed: packed (new)"),
        (less("code", "train"), "library changed: train (removed)"),
        (but(versions={"torch": "2.13.0+cpu"}), "torch 2.12.0 -> 2.13.0+cpu"),
        (but(versions={"ray": "2.40"}), "ray none -> 2.40"),
        (less("versions", "numpy"), "numpy 2.0.1 -> none"),
        (but(inputs={"data": "d1"}), "data changed"),
        (but(inputs={"model": "m1"}), "weights changed"),
        (but(inputs={"data": "d1", "model": "m1"}), "data changed; weights changed"),
        (but(settings={"seed": 3}), "new value: seed=3 (nearest run has seed=0)"),
        (but(settings={"padding": 0.5}), "new setting padding=0.5"),
        (less("settings", "n_experts"), "setting removed: n_experts"),
        (but(parameters={"layers": [2]}), "new value: layers=[2] (nearest run has layers=[0, 1])"),
        (but(settings={"seed": False}), "new value: seed=False (nearest run has seed=0)"),
        (
            but(settings=None, parameters={"layers": []}),
            "new value: layers=[] (nearest run has layers=[0, 1]); settings changed",
        ),
        (
            but(settings={"model": "y"}, inputs={"model": "m1"}),
            "new value: model=y (nearest run has model=x)",
        ),
        (but(cells="digest"), "notebook code changed"),
        (but(code="digest"), "library changed"),
        (but(future=1), "future changed"),
        (but(versions=[]), "versions changed"),
        (but(inputs=None), "inputs changed"),
    ],
)
def test_each_reason_is_named(key, said):
    assert why(key, entries(KEY)) == said


def test_one_cell_among_hundreds_that_are_alike_is_found():
    old = 250 * ["a"]
    assert why(but(cells=["b", *old]), entries(but(cells=old))) == "code cell 1 added"


def test_several_reasons_are_joined_and_told_one_a_line():
    key = but(cells=["X"], code={"train": "9"}, versions={"torch": "3"}, inputs={"model": "m1"})
    said = [
        "code cell 1 changed",
        "code cells 2, 3 and 4 removed",
        "library changed: train",
        "torch 2.12.0 -> 3",
        "weights changed",
    ]
    assert why(key, entries(KEY)) == "; ".join(said)
    split = [f"code cell {number} removed" for number in (2, 3, 4)]
    assert details(key, entries(KEY)) == [said[0], *split, *said[2:]]


def test_values_come_as_they_were_given_and_as_settings_hold_them():
    parameters = {"seed": 3, "overrides": {"n_experts": 8}}
    key = but(parameters=parameters, settings={"task": "cola", "seed": 3, "n_experts": 8})
    said = "new values: seed=3 n_experts=8 task=cola (nearest run has seed=0 n_experts=4 task=rte)"
    assert why(key, entries(KEY)) == said
    assert details(key, entries(KEY))[1] == "new value: n_experts=8 (nearest run has n_experts=4)"


def test_entries_of_the_older_layout_are_named_as_a_whole():
    old = but(cells="one digest", code="another", inputs={"data": "d1"})
    assert why(KEY, entries(old)) == "notebook code changed; library changed"


@pytest.mark.parametrize(
    "parts", [{"settings": {"task": "cola"}}, {"code": {"data": "9"}}, {"settings": {"scale": "s"}}]
)
def test_data_that_follow_from_a_value_or_a_module_are_no_reason_of_their_own(parts):
    assert "data changed" not in why(but(inputs={"data": "d1"}, **parts), entries(KEY))
    assert "data changed" in why(but(inputs={"data": "d1"}, code={"train": "9"}), entries(KEY))


def test_a_folders_files_are_named_as_files_and_a_folder_chosen_as_a_value():
    chosen, edited = (but(parameters={"importance_dir": {"a.pkl": digest}}) for digest in "12")
    none = but(parameters={"importance_dir": {}})
    assert why(edited, entries(chosen)) == "files of importance_dir changed"
    assert why(none, entries(chosen)).startswith("new value: importance_dir={} (nearest run has")


def test_what_is_damaged_is_said_first_and_on_one_line():
    damage = "figures/a.csv has changed"
    assert why(KEY, entries(KEY), damaged=damage) == f"damaged: {damage}"
    assert details(KEY, [], damaged="a\nb") == [r"damaged: 'a\nb'"]


def test_long_lists_and_values_are_shortened_in_the_line_and_whole_in_the_details():
    values = {f"x{n}": n for n in range(17)}
    old, new = but(settings=dict.fromkeys(values, -1)), but(settings=values)
    line = why(new, entries(old))
    assert "x3=3 x4=4 and 12 more (nearest run has x0=-1" in line and "x5=" not in line
    assert [f"x{n}={n} (" in said for n, said in enumerate(details(new, entries(old)))] == 17 * [
        True
    ]
    six = why(but(code={str(n): "new" for n in range(MOST + 1)}), entries(KEY))
    assert "5 (new)" in six and "more" not in six
    long = but(parameters={"label": 90 * "a"})
    assert why(long, entries(KEY)) == f"new setting label={39 * 'a'}…"
    assert details(long, entries(KEY)) == [f"new setting label={90 * 'a'}"]


def test_text_that_could_break_the_line_or_pass_for_another_value_is_written_as_python_writes_it():
    key = but(
        parameters={
            "a": "x\n\x1b[2J\u2028\u202e",
            "b": "3",
            "c": 3,
            "d": "nan",
            "e": None,
            "f": "aé",
        }
    )
    assert why(key, entries(KEY)) == (
        r"new settings a='x\n\x1b[2J\u2028\u202e' b='3' c=3 d='nan' e=None f='aé'"
    )
    assert why(but(code={"a\r{s}": "1"}), entries(KEY)) == r"library changed: 'a\r{s}' (new)"


def test_the_same_values_are_nearer_than_fewer_differences_and_then_newer_is():
    seed, code = but(settings={"seed": 1}), but(code={"train": "8", "data": "8"}, cells=[])
    assert nearest(KEY, code, seed) == 0 and nearest(KEY, seed, code) == 1
    assert nearest(KEY, code, but(cells=[]), but(cells=["a"])) == 2
    assert nearest(KEY, but(cells=[]), but(cells=["x", "y", "z", "w"])) == 1
    assert nearest(KEY, seed, but(settings={"seed": 1, "task": "cola"})) == 0
    assert nearest(KEY, seed, but(notebook="05_routing")) == 0
    assert nearest(KEY, but(settings=None), seed) == 1


def test_a_setting_that_one_side_does_not_know_makes_no_other_values():
    assert nearest(KEY, less("settings", "n_experts"), but(settings={"seed": 1})) == 0
    assert not compare(KEY, entries(less("settings", "n_experts"))).other_values


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
PARTS = st.sampled_from([*KEY, *KEY["settings"], "data", "overrides", "importance_dir"])
NESTED = st.dictionaries(PARTS, JSON | st.dictionaries(PARTS, JSON, max_size=4), max_size=8)
KEYS = NESTED | NESTED.map(lambda parts: KEY | parts | {"notebook": KEY["notebook"]})
FEW = st.integers(0, 1)
NEAR = st.builds(
    but,
    cells=st.lists(st.sampled_from("ab"), max_size=3),
    settings=st.fixed_dictionaries({"seed": FEW}, optional={"padding": FEW}),
    code=st.fixed_dictionaries({"train": FEW}, optional={"packed": FEW}),
)


@given(KEYS | NEAR, st.lists(KEYS | NEAR, max_size=4), st.booleans())
@example(KEY, [but(settings={"seed": False})], False)
@example(KEY, [but(settings={"seed": 0.0})], False)
@example(KEY, [but(parameters={"overrides": {"seed": 0}})], False)
@example({"settings": {}}, [{"settings": None}], False)
@example({"notebook": "\ud800"}, [{"notebook": "\ud800", "cells": "\ud800"}], False)
def test_any_stored_key_gives_one_line_and_only_an_equal_one_is_stored(key, stored, again):
    stored = [*([json.loads(to_json(key))] if again else []), *stored]
    found = entries(*stored)
    line, lines = why(key, found), details(key, found)
    assert line and all(text and text.isprintable() for text in [line, *lines])
    equal = to_json(key) in [to_json(one) for one in stored]
    assert (line == "stored") == (lines == ["stored"]) == compare(key, found).stored == equal


@given(NEAR, st.lists(NEAR | KEYS, max_size=6))
def test_the_nearest_is_the_first_of_all_in_the_documented_order(key, stored):
    best = None
    for entry in entries(*stored):
        alone = compare(key, [entry])
        rank = (alone.other_values, len(alone.differences))
        if alone.entry and (best is None or rank <= best[0]):
            best = (rank, entry)
    assert compare(key, entries(*stored)).entry == (best and best[1])


@given(st.lists(st.sampled_from("abcdef"), max_size=9), st.lists(st.sampled_from("abcdef")))
def test_cells_named_lead_from_the_old_notebook_to_the_new(old, new):
    differences = compare(but(cells=new), entries(but(cells=old))).differences
    named = {
        kind: [int(one.name) - 1 for one in differences if one.kind == f"cell {kind}"]
        for kind in ("changed", "added", "removed")
    }
    kept = [cell for n, cell in enumerate(old) if n not in named["removed"]]
    for n in named["added"]:
        kept.insert(n, new[n])
    assert len(kept) == len(new)
    assert all(kept[n] == new[n] for n in range(len(new)) if n not in named["changed"])


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    folder = fixture_home.make(tmp_path, {"00_the_idea": "plain", "01_importance": "settings"})
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    return folder


def planned(name="01", **parameters):
    (job,) = plan.plan(plan.select([name]), scale="smoke", parameters=parameters)
    return job


def edited(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def stored(job):
    """The entry of a job, as it is read back from the disk."""
    return entries(json.loads(to_json(job.key().values())))


def test_editing_prose_reruns_nothing_and_editing_code_names_the_cell(home):
    (path,) = plan.select(["01"])
    before = stored(planned())
    edited(path, "Something else first.", "Something else, told better.")
    assert why(planned().key().values(), before) == "stored"
    edited(path, "quiet line", "another line")
    assert why(planned().key().values(), before) == "code cell 3 changed"
    assert why(planned("00").key().values(), before) == "never run"


def test_a_changed_setting_of_a_planned_job_is_named_with_what_ran(home):
    before = stored(planned()) + stored(planned(n_experts=2, seed=1))
    said = why(planned(n_experts=2).key().values(), before)
    assert said == "new value: seed=0 (nearest run has seed=1)"
    assert why(planned(task="acceptability", label="a b").key().values(), before) == (
        "new values: task=acceptability label='a b' (nearest run has task=library label=a)"
    )


def test_a_code_change_is_not_told_as_another_seed(home):
    job = planned()
    before = stored(job) + stored(planned(seed=1))
    before[0].key.origin["code"]["config.settings"] = "another"
    before[0].key.origin["versions"]["torch"] = "2.0"
    torch = job.key().origin["versions"]["torch"]
    assert (
        why(job.key().values(), before) == f"library changed: config.settings; torch 2.0 -> {torch}"
    )
