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


def why(key, stored, **how):
    """:func:`status.why` of a key that is written as in a record, joined."""
    return "; ".join(status.why(StageKey.read("notebook", key), stored, **how))


def test_what_is_stored_and_what_never_ran_are_said_in_two_words():
    other = but(notebook="05_routing")
    assert why(KEY, entries(but(settings={"seed": 1}), KEY, other)) == "stored"
    assert why(KEY, entries(other)) == why(KEY, []) == "never run"


@pytest.mark.parametrize(
    "key, words",
    [
        (but(cells=["a", "b", "X", "d"]), ["cell", "3"]),
        (but(cells=["X", "b", "Y", "Z"]), ["cells", "1, 3, 4"]),
        (but(cells=["a", "b", "c", "X", "d"]), ["cells", "4"]),
        (but(cells=["a", "c", "d"]), ["cells", "2 removed"]),
        (but(code={"train": "9", "experts": "9"}), ["library", "experts", "train"]),
        (but(code={"packed": "4"}), ["library", "packed"]),
        (less("code", "train"), ["library", "train"]),
        (but(versions={"torch": "2.13.0+cpu"}), ["torch 2.12.0 -> 2.13.0+cpu"]),
        (but(inputs={"data": "d1"}), ["data changed"]),
        (but(inputs={"model": "m1"}), ["weights changed"]),
        (but(settings={"seed": 3}), ["seed=3", "nearest run: 0"]),
        (but(settings={"padding": 0.5}), ["padding=0.5", "None"]),
        (less("settings", "n_experts"), ["n_experts=None", "4"]),
        (but(parameters={"layers": [2]}), ["layers=[2]", "[0, 1]"]),
        (but(parameters={"seed": 3, "overrides": {"n_experts": 8}}), ["seed=3", "n_experts=8"]),
        (but(cells="digest"), ["cells changed"]),
        (but(future=1), ["future changed"]),
    ],
)
def test_each_reason_is_named(key, words):
    line = why(key, entries(KEY))
    assert all(word in line for word in words), line
    assert line.isprintable()


def test_one_cell_among_hundreds_that_are_alike_is_found():
    old = 250 * ["a"]
    assert why(but(cells=["b", *old]), entries(but(cells=old))).endswith(": 1")


def test_data_that_follow_from_a_value_are_no_reason_of_their_own():
    changed = but(inputs={"data": "d1"}, settings={"task": "cola"})
    assert "data changed" not in why(changed, entries(KEY))


def test_a_value_that_was_given_and_is_a_setting_is_named_once():
    key = but(parameters={"seed": 3}, settings={"seed": 3})
    assert why(key, entries(KEY)).count("seed=3") == 1


def test_what_is_damaged_is_said_first_and_on_one_line():
    damage = "figures/a.csv has changed"
    assert why(KEY, entries(KEY), damaged=damage) == f"damaged: {damage}"
    assert why(KEY, [], damaged="a\nb") == r"damaged: 'a\nb'"


def test_long_lists_and_values_are_shortened_unless_all_is_asked_for():
    values = {f"x{n}": n for n in range(17)}
    old, new = but(settings=dict.fromkeys(values, -1)), but(settings=values)
    line, whole = why(new, entries(old)), why(new, entries(old), whole=True)
    assert "x4=4" in line and "x5=" not in line and "12 more" in line
    assert all(f"x{n}={n} (" in whole for n in range(17)) and "more" not in whole
    long = but(parameters={"label": 90 * "a"})
    assert 90 * "a" in why(long, entries(KEY), whole=True)
    assert 90 * "a" not in why(long, entries(KEY))


def test_text_that_could_break_the_line_or_pass_for_another_value_is_quoted():
    line = why(but(parameters={"a": "x\n\x1b[2J", "b": "3", "c": 3}), entries(KEY))
    assert r"a='x\n\x1b[2J'" in line and "b='3'" in line and "c=3" in line


def test_the_same_values_are_nearer_than_fewer_differences_and_then_newer_is():
    seed, code = but(settings={"seed": 1}), but(code={"train": "8", "data": "8"}, cells=[])
    assert "seed" not in why(KEY, entries(code, seed)) + why(KEY, entries(seed, code))
    older, newer = but(code={"train": "8"}), but(code={"train": "7"}, cells=["x"])
    assert "cells" not in why(KEY, entries(newer, older))


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
@example({"settings": {}}, [{"settings": None}], False)
def test_any_stored_key_gives_a_line_and_only_an_equal_one_is_stored(key, stored, again):
    stored = [*([json.loads(to_json(key))] if again else []), *stored]
    line = why(key, entries(*stored))
    same = StageKey.read("notebook", key).digest in [entry.digest for entry in entries(*stored)]
    assert line and "\n" not in line and (line == "stored") == same


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
    assert why(planned().key().values(), before).endswith(": 3")
    assert why(planned("00").key().values(), before) == "never run"


def test_a_changed_setting_of_a_planned_job_is_named_with_what_ran(home):
    before = stored(planned()) + stored(planned(n_experts=2, seed=1))
    line = why(planned(n_experts=2).key().values(), before)
    assert "seed=0 (nearest run: 1)" in line and "n_experts" not in line
    line = why(planned(task="acceptability", label="a b").key().values(), before)
    assert "task=acceptability" in line and "label='a b'" in line and "seed" not in line


def test_a_code_change_is_not_told_as_another_seed(home):
    job = planned()
    before = stored(job) + stored(planned(seed=1))
    before[0].key.origin["code"]["config.settings"] = "another"
    before[0].key.origin["versions"]["torch"] = "2.0"
    torch = job.key().origin["versions"]["torch"]
    line = why(job.key().values(), before)
    assert "config.settings" in line and f"torch 2.0 -> {torch}" in line and "seed" not in line
