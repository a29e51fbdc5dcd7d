"""Figures about routing show every share and every assignment, counted from one."""

import numpy as np
from matplotlib.colors import to_hex

from moebert_lib import plots_routing as drawn
from moebert_lib.plots import EXPERTS


def test_loads_print_every_share_in_percent():
    shares = {"hash-random": [[0.25, 0.75], [0.5, 0.5]], "gate-token": [[0.0, 1.0], [0.1, 0.9]]}
    first, second = drawn.loads(shares).axes
    assert [text.get_text() for text in first.texts] == ["25", "75", "50", "50"]
    assert [text.get_text() for text in second.texts] == ["0", "100", "10", "90"]


def test_all_routers_have_one_colour_scale():
    figure = drawn.loads({"a": [[0.5, 0.5]], "b": [[0.1, 0.9]]})
    assert {ax.get_images()[0].get_clim() for ax in figure.axes} == {(0, 0.9)}


def test_imbalance_draws_the_busiest_expert_of_each_layer_over_the_mean():
    shares = {"hash-random": [[0.25, 0.75], [0.5, 0.5]], "gate-token": [[0.0, 1.0], [0.1, 0.9]]}
    first, second = drawn.imbalance(shares).collections
    assert np.allclose(first.get_offsets()[:, 1], [1.5, 1.0])
    assert np.allclose(second.get_offsets()[:, 1], [2.0, 1.8])


def test_token_map_numbers_and_colours_the_expert_of_each_token_in_each_layer():
    experts = np.array([[0, 1], [2, 0], [1, 1]])  # 3 tokens, 2 layers
    ax = drawn.token_map(["[CLS]", "good", "[SEP]"], experts)
    drawn_at = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert drawn_at == {(t, n): str(e + 1) for (t, n), e in np.ndenumerate(experts)}
    colors = [to_hex(patch.get_facecolor()).upper() for patch in ax.patches]
    assert colors == [EXPERTS[e] for e in experts.ravel()]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["[CLS]", "good", "[SEP]"]


def test_token_maps_name_the_tokens_once_and_every_map():
    way = (["a", "b"], np.array([[0, 1], [1, 0]]))
    first, second = drawn.token_maps({"hash-random": way, "gate-token": way}).axes
    assert [label.get_text() for label in first.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in second.get_xticklabels()] == ["", ""]
    assert first.get_ylabel().startswith("hash-\nrandom")
    assert second.get_ylabel().startswith("gate-\ntoken")
