"""The benchmark of widgets: every move redraws, and slow widgets are named."""

import pytest

from moebert_lib.bench import harness, sweeps_and_widgets
from moebert_lib.bench.sweeps_and_widgets import WIDGETS
from moebert_lib.store.store import Store


@pytest.mark.parametrize("name", [n for n in WIDGETS if n.startswith("explorer")])
def test_a_move_of_the_explorer_is_a_new_picture(name):
    move = WIDGETS[name]()
    made = move.__closure__[0].cell_contents
    frames = []
    for n in range(3):
        move(n)
        frames.append(bytes(made.canvas.buffer_rgba()))
    assert len(set(frames)) == 3 and len(made.views) == int(name.split()[1])


@pytest.mark.parametrize("name", [n for n in WIDGETS if not n.startswith("explorer")])
def test_a_move_of_a_widget_runs(name):
    move = WIDGETS[name]()
    move(0)
    move(1)


def test_a_widget_is_slow_where_a_tenth_of_its_moves_are(moebert_home, monkeypatch, capsys):
    moves = []
    monkeypatch.setattr(
        sweeps_and_widgets, "WIDGETS", {"quick": lambda: moves.append, "slow": lambda: moves.append}
    )
    measure = harness.Benchmark.measure

    def slowed(benchmark, setting):
        timings = measure(benchmark, setting).assign(seconds=0.05)
        slow = (timings["variant"] == "slow") & (timings["repeat"] < 3)
        return timings.assign(seconds=timings["seconds"].mask(slow, 0.15))

    monkeypatch.setattr(harness.Benchmark, "measure", slowed)
    assert harness.run(sweeps_and_widgets.redrawing(repeats=10))
    assert moves == [n for n in range(11) for _ in range(2)]
    record = harness.read(Store(), "widgets")
    assert record["slow"] == ["slow"] and record["limit_ms"] == 100
    assert "over 100 ms: slow" in capsys.readouterr().out
