"""Figures about routing show every share and every assignment, counted from one."""

import numpy as np
import pandas as pd
import pytest
from drawings import drawn_bars, drawn_points
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from moebert_lib.plots import routing as drawn
from moebert_lib.plots.style import EXPERTS


def long(shares):
    """Shares by router, layers by experts, as one row each."""
    rows = [
        (router, layer + 1, expert + 1, share)
        for router, table in shares.items()
        for (layer, expert), share in np.ndenumerate(np.array(table))
    ]
    return pd.DataFrame(rows, columns=["router", "layer", "expert", "share"])


def test_loads_print_every_share_in_percent():
    shares = {"hash-random": [[0.25, 0.75], [0.5, 0.5]], "gate-token": [[0.0, 1.0], [0.1, 0.9]]}
    first, second = drawn.loads(long(shares)).axes
    assert [text.get_text() for text in first.texts] == ["25", "75", "50", "50"]
    assert [text.get_text() for text in second.texts] == ["0", "100", "10", "90"]


def test_all_routers_have_one_colour_scale():
    figure = drawn.loads(long({"a": [[0.5, 0.5]], "b": [[0.1, 0.9]]}))
    assert {ax.collections[0].get_clim() for ax in figure.axes} == {(0, 90)}


def test_imbalance_draws_every_layer_of_every_router_side_by_side():
    rows = [("hash-random", 1, 1.5), ("hash-random", 2, 1.0), ("gate-token", 1, 2.0)]
    ax = drawn.imbalance(pd.DataFrame(rows, columns=["router", "layer", "ratio"]))
    points = drawn_points(ax)
    assert points[:, 1].tolist() == [1.5, 1.0, 2.0]
    assert points[0, 0] < points[1, 0] < points[2, 0] and points[:, 0].round().tolist() == [0, 0, 1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["layer 1", "layer 2"]


def test_token_map_numbers_and_colours_the_expert_of_each_token_in_each_layer():
    experts = np.array([[0, 1], [2, 0], [1, 1]])  # 3 tokens, 2 layers
    ax = drawn.token_map(["[CLS]", "good", "[SEP]"], experts)
    drawn_at = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert drawn_at == {(t + 0.5, n + 0.5): str(e + 1) for (t, n), e in np.ndenumerate(experts)}
    colors = [to_hex(color).upper() for color in ax.collections[0].get_facecolors()]
    assert colors == [EXPERTS[e] for e in experts.T.ravel()]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["[CLS]", "good", "[SEP]"]


WAYS = {"hash-random": np.array([[0, 1], [1, 0]]), "gate-token": np.array([[1, 1], [1, 1]])}
SHARES = {name: np.array([[0.25, 0.75], [0.5, 0.5]]) for name in WAYS}


def test_token_maps_name_the_tokens_once_and_every_map():
    first, _, second, _ = drawn.token_maps(["a", "b"], WAYS, SHARES).axes
    assert [label.get_text() for label in first.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in second.get_xticklabels()] == ["", ""]
    assert first.get_ylabel().startswith("hash-\nrandom")
    assert second.get_ylabel().startswith("gate-\ntoken")


def test_loads_of_the_sentence_stand_beside_each_map_as_bars_under_lines_of_the_larger_set():
    _, right, _, other = drawn.token_maps(["a", "b"], WAYS, SHARES, layer=1).axes
    assert [bar.get_width() for bar in right.patches] == [50, 50]
    assert [bar.get_width() for bar in other.patches] == [0, 100]
    lines = right.collections[0].get_segments()
    assert [line[0][0] for line in lines] == [25, 75]


def test_a_long_sentence_is_drawn_to_its_24th_token_and_counted_whole():
    ways = {"gate-token": np.arange(40)[:, None] % 2}
    figure = drawn.token_maps(["a"] * 40, ways, {"gate-token": [[0.5, 0.5]]}, title="Seen")
    left, right = figure.axes
    assert len(left.texts) == 24 and [bar.get_width() for bar in right.patches] == [50, 50]
    assert "24 of 40 tokens" in figure.get_suptitle().replace("\n", " ")


RUNS = pd.DataFrame(
    [
        ("hash-random", 0, 0.80),
        ("gate-token, k = 2", 0, 0.85),
        ("hash-random", 1, 0.70),
        ("gate-token, k = 2", 1, 0.65),
    ],
    columns=["name", "seed", "accuracy"],
)


def test_routers_beyond_the_paper_are_a_line_for_each_seed_and_a_bar_at_each_mean():
    ax = drawn.beyond(RUNS, "accuracy", dense=0.9)
    *seeds, means, teacher = (list(np.round(line.get_ydata(), 9)) for line in ax.lines)
    assert seeds == [[80, 85], [70, 65]]
    assert means == [75, 75] and [place for place, _ in drawn_bars(ax, rows=False)] == [0, 1]
    assert teacher == [90, 90]
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        "hash-\nrandom",
        "gate-\ntoken\nk = 2",
    ]


def test_hindsight_has_a_curve_and_a_point_for_each_model_and_router():
    rows = [
        (model, router, layer, 10 * m + r + layer / 10, (m + r) / 10)
        for m, model in enumerate(("converted", "trained"))
        for r, router in enumerate(("own", "oracle"))
        for layer in (0, 1, 2)
    ]
    rows += [("teacher", "own", layer, 0, 0.9) for layer in (0, 1, 2)]
    frame = pd.DataFrame(rows, columns=["model", "router", "layer", "distance", "score"])
    left, right = drawn.hindsight(frame, "accuracy").axes
    curves = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert curves == {
        "converted, own router": [0, 0.1, 0.2],
        "converted, oracle": [1, 1.1, 1.2],
        "trained, own router": [10, 10.1, 10.2],
        "trained, oracle": [11, 11.1, 11.2],
    }
    points = [float(line.get_ydata()[0]) for line in right.lines if len(line.get_xdata()) == 1]
    assert points == pytest.approx([0, 10, 10, 20])
    assert [90, 90] in [list(np.round(line.get_ydata(), 9)) for line in right.lines]


def test_remedies_draw_load_beside_the_metric_and_collapsed_gates_hollow():
    loads = {"no remedy": (3.9, 3.7), "noise": (1.4, 3.0), "capacity": (1.1, 1.2)}
    rows = [(name, 4, load, 0.8) for name, both in loads.items() for load in both]
    runs = pd.DataFrame(rows, columns=["name", "n_experts", "busiest", "accuracy"])
    runs["collapsed"] = runs["busiest"] > 2.5
    left, right = drawn.remedies(runs, "accuracy", dense=0.9, title="t").axes
    assert [label.get_text() for label in left.get_yticklabels()] == list(loads)
    assert drawn_points(left)[:, 0].tolist() == runs["busiest"].tolist()
    assert drawn_points(right)[:, 0].tolist() == [80.0] * 6
    hollow = [
        bool((part.get_facecolor()[:, :3] == 1).all())
        for part in left.collections
        if isinstance(part, PathCollection) and len(part.get_offsets())
    ]
    assert hollow == [True] * 2 + [False] * 4  # of noise, one of two runs has not collapsed
