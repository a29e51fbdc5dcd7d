"""The explorer: every corner of every control is drawn, words agree with the deal, refusals."""

import importlib.util
import itertools
import re
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient

from moebert_lib.config.errors import UserError
from moebert_lib.experiments.neuron_measurements import Excitation
from moebert_lib.explore import explorer
from moebert_lib.explore.explorer import NONE, Explorer, views
from moebert_lib.explore.score_sources import ACTIVE, EQ4, Source
from moebert_lib.method.partition import deal_neurons, view

VIEW = "application/vnd.jupyter.widget-view+json"
SIZES = {"n_experts": 4, "expert_size": 16, "n_shared": 10}


def source(name="mine", *, layers=2, width=64, excited=True) -> Source:
    """Made-up scores of two kinds, and what excites the neurons."""
    rng = np.random.default_rng(len(name))
    scores = {kind: rng.lognormal(size=(layers, width)) for kind in (EQ4, ACTIVE)}
    names = ["n_experts", "expert_size", "n_shared", "seed", "value"]
    judged = pd.DataFrame([(4, 16, 10, 0, 0.5), (8, 8, 4, 0, 0.25)], columns=names)
    top = torch.ones(layers, width, 1)
    known = Excitation(
        top[..., 0], top[..., 0], top, top.int() * 0, top.short(), [["a", "<b>", "c"]]
    )
    rest = dict(excited=known) if excited else dict(silent="no model")
    return Source(name, scores, accuracy=judged, metric="accuracy", dense=0.75, **rest)


MINE, WIDE = source(), source("wider", layers=3, width=128, excited=False)


@pytest.fixture
def made() -> Explorer:
    """An explorer of two columns of one source, with another in its menus."""
    chosen = explorer.chosen_columns([MINE, WIDE], [("mine", EQ4), ("mine", ACTIVE)])
    return Explorer([MINE, WIDE], chosen, layer=1, **SIZES)


def pixels(made) -> bytes:
    made.canvas.draw()
    return bytes(made.canvas.buffer_rgba())


def test_every_corner_of_the_sliders_is_drawn(made):
    ends = [(slider.min, slider.max) for slider in made.sliders.values()]
    for corner in itertools.product(*ends):
        for slider, value in zip(made.sliders.values(), corner, strict=True):
            slider.value = value
        pixels(made)
    assert len(ends) == 5


@pytest.mark.parametrize("name", ["layer", "n_experts", "expert_size", "n_shared", "rank"])
def test_moving_a_slider_changes_the_picture_and_the_words(made, name):
    before, words = pixels(made), made.table.value + made.neuron.value
    made.sliders[name].value += 1 if name != "expert_size" else -4
    assert pixels(made) != before
    assert made.table.value + made.neuron.value != words


def test_a_view_deals_as_conversion_does():
    one = view(("", ""), MINE.scores[EQ4][0], **SIZES)
    ranking = torch.as_tensor(MINE.scores[EQ4][0]).argsort(descending=True, stable=True)
    assert (one.ranking[one.hands] == deal_neurons(ranking, **SIZES).numpy()).all()
    assert one.n_kept == one.holds.any(0).sum() == 34


def test_mass_and_overlap_by_hand():
    one = view(("", ""), np.array([4.0, 1, 8, 2, 1]), n_experts=2, expert_size=2, n_shared=1)
    assert one.mass.tolist() == [12 / 16, 10 / 16]
    assert one.overlap.tolist() == [[1, 8 / 12], [8 / 10, 1]]
    parts = [one.part(rank) for rank in range(4)]
    assert parts == ["all experts", "expert 1", "expert 2", "no expert, it is dropped"]


def test_a_wider_layer_gets_the_same_proportions_and_its_last_layer():
    narrow, wide = views([(MINE, EQ4), (WIDE, EQ4)], layer=2, **SIZES)
    assert wide.hands.shape == (4, 32) and wide.n_shared == 20 == 2 * narrow.n_shared
    (first, last) = views([(WIDE, EQ4), (MINE, EQ4)], layer=3, **SIZES)
    assert "layer 3" in first.heading[1] and "layer 2" in last.heading[1]


def test_one_neuron_is_followed_through_columns_of_one_width(made):
    made.sliders["rank"].value = 7
    ranks = made.marked()
    assert ranks[0] == 6 and made.views[1].ranking[ranks[1]] == made.views[0].ranking[6]
    made.menus[2][0].value = "wider"
    assert made.marked()[2] == 12  # the same relative rank


def test_pointing_previews_and_clicking_keeps_a_neuron(made):
    column, event = made.picture.columns[1], type("Event", (), {})()
    event.inaxes, event.xdata = column.curve, 20.5
    made._hover(event)
    assert made.marked()[1] == 20 and made.sliders["rank"].value == 1
    made._click(event)
    event.inaxes = None
    made._hover(event)
    assert made.marked()[1] == 20 and made.sliders["rank"].value == made.marked()[0] + 1


def test_a_moved_slider_wins_over_a_resting_pointer(made):
    event = type("Event", (), {"inaxes": made.picture.columns[1].curve, "xdata": 20.5})()
    made._hover(event)
    made.sliders["rank"].value = 5
    assert made.hovered is None and made.marked()[0] == 4


def test_columns_have_one_scale_of_scores(made):
    limits = {column.curve.get_ylim() for column in made.picture.columns}
    assert len(limits) == 1 and made.views[0].relative.mean() == pytest.approx(1)
    assert "1 · mine" in made.table.value and "2 · rank" in made.neuron.value


def test_without_names_all_scores_of_a_source_are_shown_or_one_of_each_file():
    columns = explorer.chosen_columns([MINE, WIDE], None)
    assert [score for _, score in columns] == [EQ4, ACTIVE]
    files = [Source(name, {EQ4: MINE.scores[EQ4]}) for name in "abcd"]
    assert [one.name for one, _ in explorer.chosen_columns(files, None)] == ["a", "b", "c"]


def test_menus_add_and_remove_columns_and_rescale_the_sliders(made):
    made.menus[1][0].value = NONE
    assert len(made.picture.columns) == len(made.views) == 1
    made.menus[0][0].value = "wider"
    assert {n: s.value for n, s in made.sliders.items() if n in SIZES} == {
        "n_experts": 4,
        "expert_size": 32,
        "n_shared": 20,
    }
    assert made.sliders["layer"].max == 3 and made.sliders["rank"].max == 128


def test_the_table_names_the_sizes_of_its_accuracy():
    def said(**sizes):
        chosen = [(MINE, EQ4)]
        return re.sub("<[^>]+>", "", explorer.table(chosen, views(chosen, layer=1, **sizes)))

    assert "50.0%: one run at these sizes; dense 75.0%" in said(**SIZES)
    near = "one run at the nearest judged: 8 experts, 8 neurons each, 4 shared"
    assert near in said(n_experts=8, expert_size=8, n_shared=3)
    assert "75.0%: each expert is the whole dense layer" in said(
        n_experts=1, expert_size=64, n_shared=0
    )
    assert "only Eq. 4 was judged" in explorer.table(
        [(MINE, ACTIVE)], views([(MINE, ACTIVE)], layer=1, **SIZES)
    )


def test_few_runs_are_told_one_by_one():
    assert explorer._runs([60.9, 61.3]) == "61.1% (60.9, 61.3): mean of 2 runs"
    assert explorer._runs([60.0, 61.0, 62.0, 65.0]) == "62.0% (60.0 to 65.0): mean of 4 runs"


def test_sizes_that_do_not_fit_are_said_to_be_cut(made):
    assert "do not fit" not in made.table.value
    made.sliders["expert_size"].value = 60
    drawn = made.views[0].hands.shape[1]
    words = f"60 neurons in each do not fit in 4 experts with 10 shared; drawn: {drawn}"
    assert drawn == 23 and words in made.table.value
    made.sliders["expert_size"].value, made.sliders["n_shared"].value = 8, 20
    assert "20 shared are more than the 8 in each; drawn: 8" in made.table.value
    assert "4 experts, 8 neurons each, all shared" in made.table.value


def test_tokens_are_shown_as_text_or_why_there_are_none():
    shown = views([(MINE, EQ4), (WIDE, EQ4)], layer=1, **SIZES)
    said = explorer.neuron([(MINE, EQ4), (WIDE, EQ4)], shown, [0, 0], layer=1)
    assert "<mark>&lt;b&gt;</mark>" in said and "No tokens: no model" in said
    assert "aria-live='polite'" in said


def test_the_still_picture_has_its_title_and_the_numbers_its_ranks():
    drawn = explorer.still([MINE, WIDE], shown=[("wider", EQ4)], layer=3, title="A finding")
    assert drawn.get_suptitle() == "A finding"
    table = explorer.numbers(MINE, shown=[("mine", EQ4)], **SIZES)
    assert table["holders"].value_counts().to_dict() == {4: 10, 1: 24, 0: 30}
    assert table["value"].is_monotonic_decreasing and sorted(table["neuron"]) == list(range(64))


def test_a_name_with_dollars_is_drawn_as_it_is():
    odd = replace(MINE, name="imp_$a^$_$y$.pkl")
    drawn = explorer.still(odd, title="A finding")
    drawn.canvas.draw()
    assert any(odd.name in text.get_text() for text in drawn.texts)


def test_the_overlap_stands_in_the_table_too(made):
    assert "two experts have in common" in made.table.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shown": [("mime", EQ4)]}, "no source 'mime'; did you mean 'mine'"),
        ({"shown": [("mine", "mean activations")]}, "did you mean 'mean activation'"),
        ({"shown": [("mine", EQ4)] * 4}, "4 columns; expected 1 to 3"),
        ({"layer": 3}, "layer=3: expected 1 to 2"),
        ({"n_experts": 0}, "n_experts=0: expected at least 1"),
        ({"n_share": 2}, "unknown size 'n_share'; did you mean 'n_shared'"),
    ],
)
def test_what_is_not_there_is_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        explorer.still(MINE, **options)
    with pytest.raises(UserError, match="nothing to explore"):
        explorer.still([])


LATER = """\
%matplotlib inline
import matplotlib.pyplot as plt, numpy as np
from moebert_lib.explore import explorer
from moebert_lib.explore.score_sources import EQ4, Source
before = plt.get_backend()
explorer.explore(Source("a", {EQ4: np.arange(1.0, 129).reshape(2, 64)}))
assert plt.get_backend() == before, plt.get_backend()
"""


def test_in_a_kernel_later_figures_are_pictures_as_before(monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    sources = LATER, "plt.plot([1, 2]);", "plt.subplots()[0]"
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    NotebookClient(page, timeout=120).execute()
    widget, *later = [[o.get("data", {}) for o in cell.outputs] for cell in page.cells]
    assert any(VIEW in data for data in widget)
    assert all(any("image/png" in data for data in outputs) for outputs in later)
    assert not any(VIEW in data for outputs in later for data in outputs)


def test_without_ipympl_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    explorer.explore(MINE)
    assert capsys.readouterr().out == f"{explorer.MISSING}\n"
