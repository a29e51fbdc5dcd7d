import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.config.errors import UserError
from moebert_lib.data import builtin_corpus
from moebert_lib.data.builtin_corpus import (
    PACKAGES,
    Sentence,
    distinct,
    docstring_sentences,
    is_plain,
    normalised,
    sentences,
)

DOCSTRING = """
Return the largest value of each row, as in :func:`~numpy.maximum` and ``sort``.

See the [guide](https://example.org) for all that is known of this [1]_. It was written
by hand (e.g. by the authors of the text).

Parameters
----------
axis : int
    The axis that the function works along in the array.
    - **Every item** of a list is a sentence that stands by itself.

Args:
    depth (`int`, *optional*): How deep the tree is allowed to grow at most.

>>> This is not a sentence but the code of an example.
Set x_0 = 1 in each of the rows of the table.
"""


@pytest.fixture(scope="module")
def some():
    return sentences(files_per_package=5)


def text_of(docstring):
    return [text for _, text in docstring_sentences(docstring)]


def test_markup_is_removed_and_code_is_left_out():
    assert text_of(DOCSTRING) == [
        "Return the largest value of each row, as in maximum and sort.",
        "See the guide for all that is known of this.",
        "It was written by hand (e.g. by the authors of the text).",
        "The axis that the function works along in the array.",
        "Every item of a list is a sentence that stands by itself.",
        "How deep the tree is allowed to grow at most.",
    ]


def test_what_is_dropped_leaves_a_gap_in_the_positions():
    docstring = "The first one is as plain as the others. Set `x_0 = y`. The last one is plain too."
    assert [position for position, _ in docstring_sentences(docstring)] == [0, 2]


@pytest.mark.parametrize(
    "text",
    [
        "Too short for the task.",
        "the first letter of this one is not a capital letter.",
        "A question is not what is wanted here, is it?",
        "The value of x_0 is set to one in each row.",
        "The rows are sorted by a < b in each of the tables.",
        "Sympy numpy scipy pandas torch networkx matplotlib transformers.",
        "The bracket (of which there is one is never closed again.",
        " ".join(["The", *["word"] * 24, "of", "the", "row."]),
        "",
    ],
)
def test_what_is_no_plain_english_sentence_is_refused(text):
    assert not is_plain(text)


@pytest.mark.parametrize(
    "name", ["NumPy", "PyTorch", "TorchScript", "scikit-learn", "np", "pd", "Hugging Face", "SymPy"]
)
def test_a_librarys_name_is_masked(name):
    text = f"The users of {name} work with the arrays that are {name}'s."
    assert text_of(text) == [text.replace(name, "library")]


def test_a_name_at_the_start_becomes_a_capitalised_word():
    assert text_of("NumPy is used by all of the others.") == [
        "Library is used by all of the others."
    ]


def test_no_sentence_names_its_library(some):
    # two names are English words of their own elsewhere, so words are compared, not letters
    named = {name for name in [*PACKAGES, "scikit-learn", "pytorch", "np", "pd", "plt"]}
    assert not [s for s in some if named & set(s.text.lower().replace(".", "").split())]


def test_sentences_are_distinct_plain_and_from_every_package(some):
    assert {s.library for s in some} == set(PACKAGES)
    assert len({normalised(s.text) for s in some}) == len(some) > 1000
    assert all(is_plain(s.text) for s in some)


def test_docstrings_lie_in_one_split_and_a_fifth_is_for_validation():
    made = [Sentence("", "numpy", f"numpy/a.py:{line}", 0) for line in range(5000)]
    share = sum(s.split == "validation" for s in made) / len(made)
    assert share == pytest.approx(builtin_corpus.VALIDATION_SHARE, abs=0.02)
    assert made[0].split == made[0]._replace(position=7, text="other").split


def test_no_validation_sentence_shares_most_of_itself_with_a_training_sentence(some):
    def runs_of(sentence):
        words = normalised(sentence.text).split()
        return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}

    runs = {s: runs_of(s) for s in some}
    order = {s: place for place, s in enumerate(some)}
    training = [s for s in some if s.split == "train"]
    for s in [s for s in some if s.split == "validation"][:150]:
        for other in training:
            later = max(s, other, key=order.get)
            assert 2 * len(runs[s] & runs[other]) <= len(runs[later])


def make(text, library="numpy", position=0):
    return Sentence(text, library, f"{library}/a.py:1", position)


def test_case_digits_and_punctuation_do_not_make_a_difference():
    first = make("Return the 2 largest values of each row, sorted.")
    again = make("return the 33 largest values of each row (sorted).")
    assert distinct([first, again]) == [first]


def test_a_sentence_that_differs_in_one_word_of_many_is_a_near_duplicate():
    first = make("Construct the tokenizer of the model with all of its special tokens.")
    again = make("Construct the tokenizer of the model with all of its added tokens.")
    assert distinct([first, again]) == [first]


def test_a_sentence_found_in_two_libraries_goes_from_both():
    both = [make("Return the shape of the array."), make("Return the shape of the array.", "scipy")]
    alone = make("Draw a line through all of the points.")
    assert distinct([*both, alone]) == [alone]


@given(st.text())
def test_any_text_can_be_read(text):
    assert all(is_plain(found) or "ibrary" in found for found in text_of(text))


@pytest.fixture
def one_package(monkeypatch):
    monkeypatch.setattr(builtin_corpus, "PACKAGES", {"networkx": "networkx"})


def test_sentences_are_read_once_and_kept(moebert_home, one_package, monkeypatch):
    first = sentences(files_per_package=1)
    monkeypatch.setattr(builtin_corpus, "_package", None)  # reading again would fail
    assert sentences(files_per_package=1) == first
    assert not list((moebert_home / "runs").glob("*/*.tmp"))


def test_a_damaged_copy_is_made_again(moebert_home, one_package):
    first = sentences(files_per_package=1)
    (path,) = (moebert_home / "runs").glob("corpus-*/sentences.jsonl")
    whole = path.read_text()
    path.write_text(whole.replace(json.dumps(first[0].text), json.dumps("Another.")))
    assert sentences(files_per_package=1) == first
    assert path.read_text() == whole


@pytest.fixture
def other_versions():
    builtin_corpus._version.cache_clear()
    yield
    builtin_corpus._version.cache_clear()


def test_the_digest_follows_versions_but_not_how_torch_was_built(monkeypatch, other_versions):
    def at(version):
        monkeypatch.setattr(builtin_corpus.metadata, "version", lambda name: version)
        builtin_corpus._version.cache_clear()
        return builtin_corpus.digest()

    assert at("2.13.0+cpu") == at("2.13.0") != at("2.14.0")
    assert builtin_corpus.digest() != builtin_corpus.digest(files_per_package=3)


def test_a_library_that_is_not_installed_is_named(monkeypatch, other_versions):
    monkeypatch.setitem(builtin_corpus.PACKAGES, "sympy", "not-installed-anywhere")
    with pytest.raises(UserError, match="docstrings of not-installed-anywhere, which is not"):
        builtin_corpus.digest()


def test_reading_imports_nothing(tmp_path, monkeypatch):
    package = tmp_path / "boom"
    package.mkdir()
    text = 'raise SystemExit\ndef f():\n    """The function that is never called by anyone."""\n'
    (package / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = builtin_corpus._package("boom", None)
    assert (found.docstring, found.text) == ("boom/__init__.py:2", text.split('"""')[1])
