"""Notebooks are found by what people call them, and their parameters read or refused."""

import json

import fixture_home
import pytest

from moebert_lib.config.errors import UserError
from moebert_lib.runs import plan
from moebert_lib.runs.plan import select


@pytest.fixture
def home(tmp_path, monkeypatch):
    names = {"00_the_idea": "plain", "01_importance": "settings", "02_fails": "fails"}
    folder = fixture_home.make(tmp_path / "home", names)
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    return folder


@pytest.mark.parametrize("name", ["1", "01", "01_importance", "importance"])
def test_a_notebook_is_found_by_number_or_name(home, name):
    assert [path.stem for path in select([name])] == ["01_importance"]


def test_all_notebooks_in_order_are_the_default_and_none_comes_twice(home):
    assert [path.stem[:2] for path in select()] == ["00", "01", "02"]
    assert len(select(["01", "importance", str(select(["01"])[0])])) == 1


def cell(source, *tags):
    return {"cell_type": "code", "source": source, "metadata": {"tags": list(tags)}}


@pytest.mark.parametrize(
    "cells, said",
    [
        ([cell("a: int = 1", "parameters"), cell("a = 2", "parameters")], "2 cells tagged"),
        ([cell("import os", "parameters")], "may hold only lines such as"),
        ([cell("a = print()", "parameters")], "may hold only lines such as"),
        ([cell("a = b = 1", "parameters")], "may hold only lines such as"),
        ([cell("a: int", "parameters")], "may hold only lines such as"),
        ([cell("a, b = 1, 2", "parameters")], "may hold only lines such as"),
        ([cell("a = {1, 2}", "parameters")], "may hold only lines such as"),
        ([cell("a = " + 9999 * "-" + "1", "parameters")], "may hold only lines such as"),
        ([cell("a = = 1", "parameters")], "may hold only lines such as"),
    ],
)
def test_a_parameters_cell_that_cannot_be_read_is_refused(tmp_path, cells, said):
    path = tmp_path / "bad.ipynb"
    path.write_text(json.dumps({"cells": cells, "nbformat": 4}))
    with pytest.raises(UserError, match=said):
        plan.plan([path])


TYPED = [
    ("str", '"x"', ["y"], [1, None, ["y"]]),
    ("int", "1", [2], [1.5, "2", True]),
    ("float", "1.0", [2, 0.5, "1e-4"], ["fast", None, float("inf")]),
    ("bool", "True", [False], [0, "no"]),
    ("int | None", "None", [3, None], [0.5]),
    ("list", "[]", [[1, "x"]], [{"x": 1}]),
    ("list[str]", "[]", [["a", "b"]], [[1], "a"]),
    ("dict", "{}", [{"x": [1]}], [[1]]),
    ("dict[str, int]", "{}", [{"x": 1}], [{"x": "y"}]),
    ('Literal["a", "b"]', '"a"', ["b"], ["c", 1]),
    ('Literal["a", 1] | None', "None", ["a", 1, None], ["1"]),
    ("list[Literal[1, 2]]", "[]", [[1, 2]], [[3]]),
    ("Path", "None", [1, "x", None, [2]], []),
    ('"int"', "1", [1, "x"], []),
    ("Annotated[int, 3]", "1", ["x"], []),
    ("list[Word]", "[]", [["x", 1]], ["x"]),
]


@pytest.mark.parametrize("annotation, default, accepted, refused", TYPED)
def test_an_annotation_of_known_words_is_a_type_and_any_other_takes_every_value(
    tmp_path, annotation, default, accepted, refused
):
    path = tmp_path / "typed.ipynb"
    source = f"value: {annotation} = {default}  # what it means"
    path.write_text(json.dumps({"cells": [cell(source, "parameters")], "nbformat": 4}))
    assert plan.parameters_of(path)["value"].help == "what it means"
    for value in accepted:
        (job,) = plan.plan([path], parameters={"value": value})
        assert job.parameters["value"] == (float(value) if annotation == "float" else value)
    for value in refused:
        with pytest.raises(UserError, match="value="):
            plan.plan([path], parameters={"value": value})


CODE = {"cell_type": "code", "source": "1", "metadata": {}}
MALFORMED = {
    "a list": [],
    "a number": 3,
    "no cells": {"nbformat": 4},
    "cells of another version": {"worksheets": [{"cells": []}]},
    "cells by name": {"cells": {"a": CODE}},
    "a cell that is text": {"cells": ["x = 1"]},
    "a cell without a type": {"cells": [{"source": "", "metadata": {}}]},
    "a cell without a source": {"cells": [{"cell_type": "code", "metadata": {}}]},
    "a source of numbers": {"cells": [CODE | {"source": [1, 2]}]},
    "a cell without metadata": {"cells": [{"cell_type": "code", "source": ""}]},
    "metadata in a list": {"cells": [CODE | {"metadata": []}]},
    "tags without a list": {"cells": [CODE | {"metadata": {"tags": None}}]},
    "tags of numbers": {"cells": [CODE | {"metadata": {"tags": [1]}}]},
    "the notebook's metadata in a list": {"cells": [CODE], "metadata": []},
    "folders without a list": {"cells": [CODE], "metadata": {"moebert": {"folders": 1}}},
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_notebook_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "odd.ipynb"
    for text in (json.dumps(content), 9999 * "[", "{", "\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match="odd.ipynb is not a notebook"):
            plan.plan([path])
