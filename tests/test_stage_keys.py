"""A stage's key: what was chosen apart from what it was made with, as records keep it."""

import json

import pandas as pd
import pytest
from checkout import ROOT
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.config.provenance import digest
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import dataset, neuron_measurements, student, teacher
from moebert_lib.store.committed_results import ROWS
from moebert_lib.store.store import ORIGIN, PARENTS, StageKey

SETTINGS = Settings.at("smoke")
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers())
NAMES = st.sampled_from(["seed", "task", "epochs", "of", "settings"])


def keys(depth=2):
    """Keys with keys of earlier stages among their choices."""
    plain = st.dictionaries(NAMES, VALUES | st.dictionaries(st.text(max_size=3), VALUES))
    origin = st.dictionaries(st.sampled_from(sorted(ORIGIN)), VALUES)
    if depth:
        parents = {
            name: keys(depth - 1).map(
                lambda key, kind=kind: StageKey(kind, key.choices, key.origin)
            )
            for name, kind in PARENTS.items()
        }
        chosen = st.builds(dict.__or__, plain, st.fixed_dictionaries({}, optional=parents))
    else:
        chosen = plain
    return st.builds(StageKey, st.sampled_from(["student", "table"]), chosen, origin)


@given(keys())
def test_a_key_comes_back_from_its_record(key):
    record = json.loads(json.dumps(key.values(), sort_keys=True))
    again = StageKey.read(key.kind, record)
    assert again == key and again.digest == key.digest
    assert again.choices_digest == key.choices_digest


@given(keys(), keys())
def test_keys_differ_where_their_digests_do(one, other):
    alike = one.kind == other.kind and not one.difference(other)
    if one.digest == other.digest:
        assert alike
    if one.kind == other.kind and one.choices_digest == other.choices_digest:
        assert not one.difference(other, origin=False)


@given(keys())
def test_the_origin_decides_the_digest_but_not_which_experiment_it_is(key):
    other = StageKey(key.kind, key.choices, {**key.origin, "code": "another"})
    assert other.choices_digest == key.choices_digest and other.digest != key.digest
    assert set(key.difference(other)) == {"code"} and not key.difference(other, origin=False)
    assert not {name.rpartition(".")[2] for name in key.flat(origin=False)} & {"code", "data"}


def test_a_name_in_the_wrong_part_is_refused():
    with pytest.raises(ValueError, match="'code' is in the wrong part of a student key"):
        StageKey("student", {"code": "3f"})
    with pytest.raises(ValueError, match="'seed' is in the wrong part"):
        StageKey("student", {}, {"seed": 0})


def test_values_are_those_that_json_gives_back():
    key = StageKey("removal", {"fractions": (0.25, 0.5)})
    assert key == StageKey.read("removal", json.loads(json.dumps(key.values())))
    assert key.choices["fractions"] == [0.25, 0.5]


@pytest.fixture(scope="module")
def committed():
    """The records of the committed results."""
    texts = pd.read_parquet(ROOT / "figures" / "runs" / ROWS, columns=["record"])["record"]
    return [json.loads(text) for text in texts]


def test_every_committed_record_keeps_the_digest_it_was_stored_under(committed):
    for record in committed:
        key = StageKey.read(record["kind"], record["key"])
        assert key.values() == record["key"] and key.digest == record["digest"]
        assert key.digest == digest({"kind": record["kind"], "key": record["key"]})


#: For each kind of stage the names of its choices, at any depth, when the results were committed.
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("about", dataset.about_key),
        ("teacher", teacher.teacher_key),
        ("importance", teacher.importance_key),
        ("scores", teacher.scorings_key),
        ("excitation", neuron_measurements.excitation_key),
        ("converted", student.conversion_key),
        ("student", student.student_key),
    ],
)
def test_todays_keys_have_the_names_of_the_committed_ones(kind, make, committed):
    records = [record for record in committed if record["kind"] == kind]
    names = {frozenset(StageKey.read(kind, record["key"]).flat(origin=False)) for record in records}
    assert frozenset(make(SETTINGS).flat(origin=False)) in names
