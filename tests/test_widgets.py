"""Explorers draw at both ends of every slider, without an error hidden in their state."""

import importlib.util
import itertools

import ipywidgets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib import widgets
from moebert_lib.experts import deal_neurons

SCORES = np.arange(1.0, 129.0).reshape(2, 64)


@pytest.fixture
def moved(monkeypatch):
    """What an explorer hands to ``interact``: the callback, the controls and the picture."""
    seen = {}
    monkeypatch.setattr(ipywidgets, "interact", lambda show, **c: seen.update(show=show, **c))
    monkeypatch.setattr("IPython.display.display", lambda picture: seen.update(picture=picture))
    return seen


def ends(control):
    """Both ends of a slider, or all entries of a menu."""
    if isinstance(control, tuple):
        return control[:2]
    return control if isinstance(control, list) else (control.min, control.max)


@pytest.mark.parametrize(
    "explore",
    [
        lambda: widgets.explore_importance(SCORES),
        lambda: widgets.explore_deal(np.arange(6), n_experts=2, expert_size=3, n_shared=1),
        lambda: widgets.explore_deal(np.arange(64)[::-1].copy()),
    ],
)
def test_every_corner_of_the_sliders_is_drawn(moved, explore):
    explore()
    show, picture = moved.pop("show"), moved.pop("picture")
    for corner in itertools.product(*map(ends, moved.values())):
        show(**dict(zip(moved, corner, strict=True)))
    assert bytes(picture.value).startswith(b"\x89PNG")


def test_moving_a_slider_changes_the_picture_in_place(moved):
    widgets.explore_deal(np.arange(6), n_experts=2, expert_size=3, n_shared=1)
    moved["show"](n_experts=2, expert_size=3, n_shared=1)
    before = bytes(moved["picture"].value)
    moved["show"](n_experts=2, expert_size=3, n_shared=2)
    assert bytes(moved["picture"].value) != before


def test_routing_explorer_shows_every_entry_of_its_menu(moved):
    tokens = ["a", "cat", "sat"]
    widgets.explore_routing({n: (tokens, np.eye(3, 2, dtype=int) + n) for n in (0, 1)})
    show, picture = moved["show"], moved["picture"]
    pictures = []
    for choice in (0, 1):
        show(sentence=choice)
        pictures.append(bytes(picture.value))
    assert pictures[0] != pictures[1]


@given(
    width=st.integers(1, 100), n_experts=st.integers(1, 8),
    expert_size=st.integers(1, 120), n_shared=st.integers(0, 120),
)  # fmt: skip
def test_fitted_sizes_can_always_be_dealt_and_fitting_twice_changes_nothing(
    width, n_experts, expert_size, n_shared
):
    n_experts = min(n_experts, width)
    size, shared = widgets.fit(width, n_experts, expert_size, n_shared)
    hands = deal_neurons(
        torch.arange(width), n_experts=n_experts, expert_size=size, n_shared=shared,
        allow_identical=True,
    )  # fmt: skip
    assert hands.shape == (n_experts, size)
    assert widgets.fit(width, n_experts, size, shared) == (size, shared)


def test_sizes_that_fit_are_left_alone():
    assert widgets.fit(3072, 4, 768, 512) == (768, 512)


def test_without_ipywidgets_one_sentence_says_what_is_missing(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ipywidgets" else found(name)
    )
    widgets.explore_importance(SCORES)
    widgets.explore_deal(np.arange(6))
    widgets.explore_routing({"x": (["a"], [[0]])})
    assert capsys.readouterr().out == 3 * f"{widgets.MISSING}\n"
