"""What the page says of its runs comes from their rows."""

import pytest

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.publish import findings
from moebert_lib.store import committed_results

MACHINE = {"cpu": "A CPU", "cores": 2, "torch_threads": 1}
VERSIONS = {"python": "3.11", "torch": "2.0", "transformers": "5.0"}


def student(seed, steps=32, seconds=20.0, *, commit="a" * 40, torch="2.0", **changes):
    """The record of a student on RTE at scale small, some settings changed."""
    key = Settings.at("small", task="rte", seed=seed, teacher_seed=0, **changes).model_dump()
    return {
        "kind": "student",
        "key": {**key, "data": "d" * 64},
        "digest": f"{seed}{steps}",
        "commit": commit,
        "created": "2026-01-02T00:00:00",
        "seconds": seconds,
        "machine": MACHINE,
        "versions": {**VERSIONS, "torch": torch},
        "row": {"task": "rte", "steps": steps},
    }


class Rows:
    """An archive of records whose development set has 200 examples."""

    def __init__(self, records):
        self.records = dict(enumerate(records))

    def files_of(self, _):
        return [("answers.csv", b"answer\n" + b"1\n" * 200)]


@pytest.fixture
def rows(monkeypatch):
    def put(*records):
        monkeypatch.setattr(committed_results, "opened", lambda _: Rows(records))

    return put


def test_a_commit_that_was_not_clean_keeps_its_suffix_and_every_version_is_named(rows):
    rows(student(0), student(1, commit="b" * 40 + "-dirty", torch="2.1"))
    said = findings.provenance()
    assert "commits aaaaaaaa, bbbbbbbb-dirty;" in said and "torch 2.0 and 2.1" in said
    assert "2 students and 0 teachers" in said and "1 thread a run" in said
    assert "(2026-01-02; A CPU" in said and "data rte `dddddddd`" in said


def test_steps_and_the_cost_of_padding_are_those_of_the_shortest_students(rows):
    rows(
        student(0, steps=250, seconds=900.0),
        student(0, seconds=18.4),
        student(1, seconds=30.6),
        student(2, seconds=61.9, padding_in_loss=True),
    )
    assert findings.brief() == (
        "These students had 32 steps of 32 sentences; one that counts padding took 62 seconds, "
        "any other 18 to 31. One sentence of the development set is 0.50 points."
    )


def test_what_every_student_departs_from_its_scale_in_is_told(rows):
    half = {"dtype": "bfloat16"}
    rows(student(0, epochs=1.0, n_experts=2, **half), student(1, epochs=0.125, **half))
    said = findings.limits()
    told = "`epochs`: 1.0 or 0.125 (3.0 there); `dtype`: bfloat16 (auto there)."
    assert f"those of scale small, but for `teacher_seed`: 0 (None there); {told}" in said
    assert "n_experts" not in said and "**One teacher per task.**" in said
    assert "**Two seeds of each setting.**" in said and "0.50 on rte" in said


def test_the_task_of_most_students_is_the_main_one_and_their_epochs_are_told(rows):
    rows(student(0, epochs=1.0), student(1, epochs=1.0), student(2, epochs=0.125))
    assert findings.main_task() == "rte"
    assert findings.trained() == "Teachers were trained for 3 epochs, students for 1."


def test_results_without_a_student_are_refused(rows):
    rows({**student(0), "kind": "teacher"})
    with pytest.raises(UserError, match="hold no student"):
        findings.provenance()
