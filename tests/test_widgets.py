"""Explorers draw at both ends of every control, in time, without an error hidden in their state."""

import importlib.util
import itertools
import time

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from moebert_lib.config.presets import MINILM
from moebert_lib.data import pretrained_weights
from moebert_lib.explore import widgets
from moebert_lib.method import routing
from moebert_lib.method.partition import random_ranking
from moebert_lib.model.conversion import to_moebert
from moebert_lib.training.evaluation import planes

DEAL = dict(n_experts=2, expert_size=3, n_shared=1)


@pytest.fixture
def moved(monkeypatch):
    """What an explorer hands to ``interact``: the callback, the controls and what is shown."""
    seen = {}
    monkeypatch.setattr(ipywidgets, "interact", lambda show, **c: seen.update(show=show, **c))
    monkeypatch.setattr("IPython.display.display", lambda *shown: seen.update(shown=shown))
    return seen


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pretrained_weights.find(MINILM, hub=False))


@pytest.fixture
def routed(tiny_bert, tokenizer):
    """Arguments of ``explore_routing``: four tiny models and even loads."""
    counts, dense = torch.arange(len(tokenizer)), tiny_bert(vocab_size=len(tokenizer))
    options = dict(token_frequencies=counts)
    ranking = random_ranking(2, 64, seed=0)
    models = {
        name: to_moebert(dense, ranking, routing=name, **options) for name in routing.ROUTINGS
    }
    return (models, tokenizer), {"loads": {name: np.full((2, 4), 0.25) for name in models}}


@pytest.fixture
def states(rng):
    """Arguments of ``explore_states``."""
    names = ("teacher", "converted", "distilled")
    frame = planes({name: rng.normal(size=(3, 64, 8)) for name in names})
    pairs = [(layer, stage, layer + 0.5) for layer in range(3) for stage in names[1:]]
    return frame, pd.DataFrame(pairs, columns=["layer", "stage", "distance"])


def ends(control):
    """Both ends of a slider, all entries of a menu, or what a text field may hold."""
    if isinstance(control, ipywidgets.Text):
        return ["", "The array. " * 40, "<b>$x$</b>"]
    if isinstance(control, ipywidgets.Dropdown):
        return [value for _, value in control.options]
    return (control.min, control.max)


def visit(moved):
    """Draw every corner of the controls; what was shown in each."""
    show, (picture, *_) = moved.pop("show"), moved.pop("shown")
    for corner in itertools.product(*map(ends, moved.values())):
        show(**dict(zip(moved, corner, strict=True)))
        yield picture.value


@pytest.mark.parametrize(
    "explore",
    [
        lambda: widgets.explore_deal(np.arange(6), **DEAL),
        lambda: widgets.explore_deal(np.arange(64)[::-1].copy()),
    ],
)
def test_every_corner_of_the_deals_sliders_is_drawn(moved, explore):
    explore()
    assert all(bytes(shown).startswith(b"\x89PNG") for shown in visit(moved))


def test_every_layer_before_and_after_is_another_picture(moved, states):
    widgets.explore_states(*states)
    assert len(set(map(bytes, visit(moved)))) == 4


def test_every_text_and_layer_is_drawn_under_every_router(moved, routed):
    arguments, options = routed
    widgets.explore_routing(*arguments, sentence="A mean.", **options, max_length=16)
    empty, also_empty, *pages = visit(moved)
    assert empty == also_empty and "type a sentence" in empty
    assert all(name in page for name in routing.ROUTINGS for page in pages)
    assert ["Cut after 16 tokens" in page for page in pages] == [True, True, False, False]
    assert not any("<b>$x$</b>" in page for page in pages)


def test_a_sentence_is_read_once_and_other_layers_ask_no_model(routed):
    arguments, options = routed
    view, calls = widgets.routing_view(*arguments, **options), []
    for model in arguments[0].values():
        model.bert.register_forward_hook(lambda *_: calls.append(1))
    for layer in (1, 2, 1):
        view.draw(sentence="The mean of an array", layer=layer)
    assert len(calls) == len(routing.ROUTINGS)


def test_moving_a_slider_changes_the_picture_and_its_words_in_place(moved):
    widgets.explore_deal(np.arange(6), **DEAL)
    seen = []
    for n_shared in (1, 2):
        moved["show"](**{**DEAL, "n_shared": n_shared})
        picture, words = moved["shown"]
        seen.append((bytes(picture.value), words.value))
    assert seen[0][0] != seen[1][0]
    assert "2 experts of 3, 1 shared: 5 of 6 neurons kept" in seen[0][1]
    assert "2 experts of 3, 2 shared: 4 of 6 neurons kept" in seen[1][1]


def test_controls_say_what_they_are_and_are_not_cut_off(moved, states, routed):
    widgets.explore_deal(np.arange(64))
    widgets.explore_states(*states)
    widgets.explore_routing(*routed[0], sentence="x", **routed[1])
    controls = [value for value in moved.values() if isinstance(value, ipywidgets.DOMWidget)]
    named = [control for control in controls if getattr(control, "description", "")]
    assert {control.description for control in named} == {
        "experts",
        "expert size",
        "shared neurons",
        "layer",
        "student",
        "sentence",
    }
    assert {control.style.description_width for control in named} == {"9em"}


def test_a_redraw_keeps_up_with_the_hand(states, routed):
    """Half a second is generous, for machines that are busy; ``moebert bench`` measures."""
    views = {
        widgets.deal_view(np.arange(1536)): dict(n_experts=4, expert_size=384, n_shared=256),
        widgets.states_view(*states): dict(layer=1, stage="distilled"),
        widgets.routing_view(*routed[0], **routed[1]): dict(sentence="A mean of means.", layer=1),
    }
    for view, values in views.items():
        view.draw(**values)
        started = time.perf_counter()
        view.draw(**values)
        assert time.perf_counter() - started < 0.5


def test_without_ipywidgets_one_sentence_says_what_is_missing(monkeypatch, capsys, states):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ipywidgets" else found(name)
    )
    widgets.explore_deal(np.arange(6))
    widgets.explore_states(*states)
    widgets.explore_routing({}, None, sentence="", loads={})
    assert capsys.readouterr().out == 3 * f"{widgets.MISSING}\n"
