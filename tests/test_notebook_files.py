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
        ([cell("a: nothing = 1", "parameters")], "may hold only lines such as"),
        ([cell("a = = 1", "parameters")], "may hold only lines such as"),
    ],
)
def test_a_parameters_cell_that_cannot_be_read_is_refused(tmp_path, cells, said):
    path = tmp_path / "bad.ipynb"
    path.write_text(json.dumps({"cells": cells, "nbformat": 4}))
    with pytest.raises(UserError, match=said):
        plan.plan([path])
