"""A reader's function is judged in one line; every notebook's exercises can be solved."""

import ast
import re

import nbformat
import pytest
import torch
from checkout import NOTEBOOKS
from test_exercises_learning import WRONG
from test_exercises_method import MISTAKES
from test_exercises_results import TEMPTING

from moebert_lib.teaching import exercises as module
from moebert_lib.teaching.exercises import Case, attempt

TWICE = [Case((torch.tensor([1.0, 2.0]),), torch.tensor([2.0, 4.0]))]
SOLUTION = re.compile(
    r"<details><summary>Solution</summary>\n+```python\n(.*?)```\n.*?</details>", re.S
)


def test_a_right_function_is_told_so():
    assert attempt(lambda x: x + x, TWICE) == (True, "right: your function, 1 cases")


@pytest.mark.parametrize(
    "mine, said",
    [
        (lambda x: None, "to do: your function returns nothing yet"),
        (lambda x: x, r"not yet: .* gave \[1, 2\], expected \[2, 4\]"),
        (lambda x: x[:1], r"not yet: .* gave shape \(1,\), expected \(2,\)"),
        (lambda x: "four", "not yet: .* gave 'four'"),
        (lambda x, y: x, "not yet: .* raised TypeError"),
        (lambda x: 1 / 0, "not yet: .* raised ZeroDivisionError"),
        (lambda x: x * float("nan"), "not yet: "),
    ],
)
def test_what_is_missing_is_said_and_nothing_raises(mine, said):
    right, line = attempt(mine, TWICE)
    assert not right and re.match(said, line)


def test_a_function_cannot_spoil_its_case():
    assert not attempt(
        lambda x: x.mul_(2), [*TWICE, Case((torch.ones(1),), 3 * torch.ones(1))]
    ).right
    assert TWICE[0].arguments[0].tolist() == [1.0, 2.0]


def tagged(path):
    """The cells of a notebook's exercises, in order."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if "exercise" in cell.metadata.get("tags", [])]


def exercises(path):
    """Text, solution, skeleton and the line that tries it, of each exercise of a notebook."""
    cells = tagged(path)
    for text, code in zip(cells[::2], cells[1::2], strict=True):
        *function, last = ast.parse(code.source).body
        yield text.source, SOLUTION.search(text.source)[1], function, ast.unparse(last)


def names(path):
    """What the notebook's exercises may use: its imports and the modules of exercises."""
    space = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for node in ast.parse(cell.source).body if cell.cell_type == "code" else ():
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), space)
    return space


TAUGHT = [path for path in NOTEBOOKS if not path.stem.startswith("09")]  # a page of results


@pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)
def test_each_notebook_has_three_exercises_open_as_given_and_right_as_solved(path):
    found = list(exercises(path))
    assert len(found) == 3
    for text, solution, skeleton, judge in found:
        assert re.match(r"(## Exercises\n.*?)?\*\*\d\. ", text, re.S)
        space = names(path)
        exec("\n".join(map(ast.unparse, skeleton)), space)
        assert eval(judge, space).said.startswith("to do: ")
        exec(solution, space)
        assert eval(judge, space).right, eval(judge, space)


def test_every_exercise_has_a_tempting_answer():
    public = {name for name, f in vars(module).items() if str(f.__doc__).startswith("Notebook")}
    assert public == {*WRONG, *(name for name, *_ in (*MISTAKES, *TEMPTING))}
