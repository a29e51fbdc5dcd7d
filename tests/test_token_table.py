"""The table of a sentence's way shows every expert and every share, and tokens as they are."""

import re
from html.parser import HTMLParser

import numpy as np

from moebert_lib.explore.widgets import busiest_experts, token_table

WAYS = {"hash-random": np.array([[0, 1], [2, 1], [2, 3]]), "gate-token": np.zeros((3, 2), int)}
LOADS = {name: np.full((2, 4), 0.25) for name in WAYS}


class Reader(HTMLParser):
    """Names of the elements and the text of the cells."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.cells = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        self.elements.append(f"/{tag}")

    def handle_data(self, data):
        if self.elements[-1] == "td":
            self.cells[-1] += data


def test_every_tokens_expert_in_every_layer_is_a_cell_counted_from_one():
    cells = Reader(token_table(["a", "b", "c"], WAYS, LOADS, layer=1)).cells
    expected = np.concatenate([experts.T.ravel() + 1 for experts in WAYS.values()])
    assert cells == [str(expert) for expert in expected]


def test_shares_of_the_sentence_stand_beside_those_of_the_validation_set():
    page = token_table(["a", "b", "c"], WAYS, LOADS, layer=2)
    shares = re.findall(r"<span>(\d+%) \((\d+%)\)</span>", page)
    mine = ["0%", "67%", "0%", "33%", "100%", "0%", "0%", "0%"]
    assert shares == [(share, "25%") for share in mine]


def test_the_chosen_layers_row_is_marked_once_for_each_router():
    page = token_table(["a", "b", "c"], WAYS, LOADS, layer=2)
    assert page.count("<tr class='here'><th scope='row'>2</th>") == 2


def test_nothing_in_a_sentence_is_taken_for_markup_or_formula():
    odd = ["<script>alert(1)</script>", "$x$", "<img src=x onerror=alert(1)>"]
    page = token_table(odd, WAYS, LOADS, layer=1)
    assert not {"script", "img"} & set(Reader(page).elements)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "$x$" in page
    assert "mathjax_ignore" in page


def test_one_line_says_how_the_layers_work_is_shared():
    line = "Layer 1: of 3 tokens the busiest expert serves 2 with hash-random, 3 with gate-token."
    assert busiest_experts(WAYS, layer=1) == line
