"""The bench of widgets: every move redraws, times are summed up beside the limit and kept."""

import json

import pandas as pd
import pytest

from moebert_lib.bench import workflow


@pytest.mark.parametrize("name", [n for n in workflow.WIDGETS if n.startswith("explorer")])
def test_a_move_of_the_explorer_is_a_new_picture(name):
    move = workflow.WIDGETS[name]()
    made = move.__closure__[0].cell_contents
    frames = []
    for n in range(3):
        move(n)
        frames.append(bytes(made.canvas.buffer_rgba()))
    assert len(set(frames)) == 3 and len(made.views) == int(name.split()[1])


def test_a_widget_is_within_where_its_slow_moves_are():
    timings = pd.DataFrame(
        {"widget": ["a"] * 10 + ["b"] * 10, "ms": [50] * 10 + [50] * 7 + [150] * 3}
    )
    table = workflow.summary(timings).set_index("widget")
    assert table["median_ms"].tolist() == [50, 50] and table["within"].tolist() == [True, False]


def test_main_prints_each_widget_and_keeps_the_times(moebert_home, monkeypatch, capsys):
    monkeypatch.setattr(workflow, "WIDGETS", {"quick one": lambda: lambda n: None})
    workflow.main_bench_widgets(repeats=2)
    said = capsys.readouterr().out
    assert "quick one" in said and "all within 100 ms" in said
    (path,) = (moebert_home / "runs").glob("bench-widgets-*.json")
    assert len(json.loads(path.read_text())["timings"]) == 2
