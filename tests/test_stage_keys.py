"""A stage's key: what was chosen apart from what it was made with, as records keep it."""

import ast
import inspect
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from checkout import LIBRARY, ROOT
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.config import provenance
from moebert_lib.config.provenance import digest
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import (
    dataset,
    expert_partitions,
    neuron_measurements,
    stage_keys,
    student,
    teacher,
)
from moebert_lib.runs import plan
from moebert_lib.store.committed_results import ROWS
from moebert_lib.store.store import ORIGIN, PARENTS, StageKey, Store

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
        ("about", dataset.summary_key),
        ("teacher", teacher.teacher_key),
        ("importance", teacher.importance_key),
        ("scores", teacher.scores_key),
        ("excitation", neuron_measurements.excitation_key),
        ("converted", student.conversion_key),
        ("student", student.student_key),
    ],
)
def test_todays_keys_have_the_names_of_the_committed_ones(kind, make, committed):
    records = [record for record in committed if record["kind"] == kind]
    names = {frozenset(StageKey.read(kind, record["key"]).flat(origin=False)) for record in records}
    as_then = SETTINGS.but(**stage_keys.LATER)
    assert frozenset(make(Store(), as_then).flat(origin=False)) in names


class SettingsOfNextYear(Settings):
    """The settings with a new field, whose default is not what older results had."""

    patience: float = 0.1


#: Every kind of stage, and the kinds that are keyed by settings as a whole.
KEYS = {
    "about": dataset.summary_key,
    "right": teacher.right_key,
    "teacher": teacher.teacher_key,
    "importance": teacher.importance_key,
    "scores": teacher.scores_key,
    "excitation": neuron_measurements.excitation_key,
    "removal": partial(neuron_measurements.removal_key, n_examples=8),
    "score_removal": partial(neuron_measurements.score_removal_key, n_examples=8),
    "grouping": expert_partitions.grouping_key,
    "converted": student.conversion_key,
    "student": student.student_key,
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_new_setting_at_its_old_value_changes_no_key(kind, monkeypatch):
    make, changes = KEYS[kind], {"grouping": "kmeans-activations"} if kind == "grouping" else {}
    before = make(Store(), SETTINGS.but(**changes))
    for names in ("DATA", "TEACHER", "IMPORTANCE", "CONVERSION", "TRAINING"):
        for module in (stage_keys, dataset, teacher, student, expert_partitions):
            if hasattr(module, names):
                more = (*getattr(stage_keys, names), "patience")
                monkeypatch.setattr(module, names, more, raising=False)
    monkeypatch.setitem(stage_keys.LATER, "patience", 0.0)
    values = SETTINGS.but(**changes).model_dump()
    assert make(Store(), SettingsOfNextYear(**values, patience=0.0)) == before
    assert make(Store(), SettingsOfNextYear(**values)) != before


def test_a_new_setting_at_its_old_value_changes_no_table_and_no_notebook(runs, monkeypatch):
    (job,) = plan.plan(plan.select(["03"]), scale="smoke")
    measure = partial(dataset.measured_table, runs, "sizes", build=lambda: pd.DataFrame({"n": [1]}))
    before = job.key(), (measure(SETTINGS), runs.entries())[1][0].key
    monkeypatch.setitem(stage_keys.LATER, "patience", 0.0)
    newer = SettingsOfNextYear(**SETTINGS.model_dump(), patience=0.0)
    monkeypatch.setattr(dataset, "Settings", SettingsOfNextYear)
    assert measure(newer).equals(measure(newer)) and len(runs.entries()) == 1
    assert runs.entries()[0].key == before[1]
    with_it = SettingsOfNextYear(**job.settings.model_dump(), patience=0.0)
    assert replace(job, settings=with_it).key() == before[0]
    other = SettingsOfNextYear(**job.settings.model_dump(), patience=0.5)
    assert replace(job, settings=other).key() != before[0]


@pytest.fixture
def runs(tmp_path):
    return Store(tmp_path / "runs")


def test_every_setting_is_as_old_as_the_committed_results_or_has_its_old_value(committed):
    """Else a new field of Settings would make them unfindable: add it to ``stage_keys.LATER``."""
    tables = [record["key"]["of"] for record in committed if record["kind"] == "table"]
    old = next(of for of in tables if isinstance(of, dict) and "teacher_epochs" in of)
    assert set(Settings.model_fields) - set(old) - {"data_dir"} == set(stage_keys.LATER)


# Which code decides a stage: what its build function runs is in its key.


class Watch:
    """Notes which code of the library runs while each stage is built."""

    def __init__(self):
        self.stage: list[str | None] = []
        self.ran: dict[str, set[tuple[str, int]]] = {}
        self.builds: dict[str, tuple] = {}

    def __call__(self, frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(str(LIBRARY)):
            return
        if code in KEY_CODES or code.co_name == "<module>":  # a key, or an import: no result
            if event == "call":
                self.stage.append(None)
            elif event == "return":
                self.stage.pop()
        elif event == "call" and self.stage and self.stage[-1]:
            self.ran[self.stage[-1]].add((code.co_filename, code.co_firstlineno))

    def make(self, store, key, build, **how):
        """In place of ``Store.make``."""

        def watched(folder):
            self.stage.append(key.kind)
            self.ran.setdefault(key.kind, set())
            self.builds[key.kind] = key, build.func
            try:
                return build(folder)
            finally:
                self.stage.pop()

        self.stage.append(None)  # the store's own work
        try:
            return MAKE(store, key, watched, **how)
        finally:
            self.stage.pop()


MAKE = Store.make
ROOM = (dataset, teacher, student, expert_partitions, neuron_measurements)
KEY_CODES = {
    function.__code__
    for module in ROOM
    for function in vars(module).values()
    if inspect.isfunction(function) and function.__annotations__.get("return") is StageKey
}


def definition(path: str, line: int) -> str:
    """The full name of the top-level definition that holds a line, as in a key's digest."""
    module = ".".join(Path(path).relative_to(LIBRARY).with_suffix("").parts)
    for node in ast.parse(Path(path).read_text("utf-8")).body:
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        if first <= line <= node.end_lineno:
            names = provenance._defined_names(node)
            return f"{module}.{names[0]}" if names else f"{module}."
    return f"{module}."


def forget():
    """As in a new process, so that nothing that a build needs is there already."""
    caches = (teacher._teacher, teacher._importance, dataset._dataset)
    for cached in (*caches, expert_partitions._activations):
        cached.cache_clear()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Every stage of a tiny experiment, built one by one."""
    watch, store = Watch(), Store(tmp_path_factory.mktemp("watched") / "runs")
    gate = SETTINGS.but(routing="gate-token")
    clustered = SETTINGS.but(grouping="kmeans-activations")
    steps = [
        lambda: dataset.summary(store, SETTINGS),
        lambda: teacher.teacher(store, SETTINGS),
        lambda: teacher.importance(store, SETTINGS),
        lambda: teacher.all_scores(store, SETTINGS),
        lambda: neuron_measurements.excitation(store, SETTINGS),
        lambda: neuron_measurements.removal_curves(store, SETTINGS, n_examples=8),
        lambda: neuron_measurements.removal_by_score(store, SETTINGS, n_examples=8),
        lambda: student.conversion(store, clustered),
        lambda: student.conversion(store, SETTINGS.but(routing="hash-balance")),
        lambda: student.student(store, gate, keep_model=True),
        lambda: student.student(store, SETTINGS.but(cache_teacher=True)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "make", lambda self, *args, **how: watch.make(self, *args, **how))
        for step in steps:
            forget()
            sys.setprofile(watch)
            try:
                step()
            finally:
                sys.setprofile(None)
    forget()
    return watch


STAGES = "about right teacher importance scores excitation removal".split()
STAGES += "score_removal grouped converted student".split()


@pytest.mark.parametrize("kind", STAGES)
def test_all_code_that_a_build_runs_is_in_the_key_of_its_stage(kind, watched):
    key, build = watched.builds[kind]
    assert key.origin["code"] == provenance.code_of(build)
    ran = {definition(*place) for place in watched.ran[kind]}
    assert len(ran) > 3
    ran = {name for name in ran if not provenance._without_numbers(name)}
    assert ran - provenance.definitions_used(build).keys() == set()


BUILDS = [
    ("teacher", teacher._fine_tune),
    ("importance", teacher._score_importance),
    ("scores", teacher._score_all),
    ("converted", student._convert),
    ("student", student._distil),
    ("removal", neuron_measurements._remove_in_order),
    ("excitation", neuron_measurements._excite),
    ("grouped", expert_partitions._group),
]


def modules(function):
    """The modules whose code a function can run."""
    return {name.rpartition(".")[0] for name in provenance.definitions_used(function)}


def test_a_stage_does_not_depend_on_code_of_later_stages_or_of_figures():
    fine_tuned = provenance.definitions_used(teacher._fine_tune)
    assert {"training.trainer", "data.loading", "model.cpu_kernels"} <= modules(teacher._fine_tune)
    later = ("method.importance", "method.partition", "method.distillation_loss", "model.mo")
    names = {name for name in fine_tuned if name.startswith(later)}
    accelerated = {"method.importance.over_tokens", "model.moe_layer.RoutingCall"}
    assert names <= accelerated  # which an accelerated model, dense or not, can run
    everything = set().union(*(modules(build) for _, build in BUILDS))
    rooms = {name.split(".")[0] for name in everything}
    assert rooms == {"data", "method", "model", "training", "experiments"}
