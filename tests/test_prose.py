"""What the prose promises: links lead somewhere, the guide's code runs, its messages come."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import torch
from checkout import NOTEBOOKS, ROOT
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertTokenizerFast,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moebert_lib import ffn_importance, to_moebert
from moebert_lib.publish.site import slug

GUIDE = ROOT / "notebooks" / "your_bert.md"
GLOSSARY = ROOT / "notebooks" / "glossary.md"
PROSE = [*NOTEBOOKS, GUIDE, GLOSSARY, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:href|src)=[\"']([^\"']+)[\"']")


def prose(path):
    """The markdown of a file, its code left out."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        return CODE.sub("", "\n\n".join(c.source for c in cells if c.cell_type == "markdown"))
    return CODE.sub("", path.read_text())


def links(path):
    return [first or second for first, second in LINK.findall(prose(path))]


def anchors(path):
    """What may stand behind ``#``: JupyterLab's ids in a notebook, GitHub's in markdown."""
    headings = re.findall(r"^#+ (.+?)\s*$", prose(path), re.MULTILINE)
    as_text = [re.sub(r"\[([^]]*)\]\([^)]*\)|[*_]", r"\1", heading) for heading in headings]
    if path.suffix == ".ipynb":
        return {heading.replace(" ", "-") for heading in as_text}
    return {slug(heading) for heading in as_text}


def broken(link, source):
    """What is wrong with a link in a file, "" where nothing is."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        good = parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc)
        return "" if good else "no well-formed https address"
    target = (source.parent / unquote(parts.path)).resolve() if parts.path else source
    if not target.exists():
        return f"no file {parts.path}"
    if parts.fragment and unquote(parts.fragment) not in anchors(target):
        return f"no heading #{parts.fragment} in {target.name}"
    return ""


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_every_link_leads_somewhere(path):
    found = links(path)
    assert {link: broken(link, path) for link in found if broken(link, path)} == {}
    assert found or path.stem == "CONTRIBUTING"


@pytest.mark.parametrize(
    "text, said",
    [
        ("[a](gone.ipynb)", "no file"),
        ("[a](glossary.md#unicorn)", "no heading"),
        ("[a](http://example.org)", "https"),
        ("[a](https://nowhere)", "https"),
        ('<a href="gone.md">', "no file"),
        ("[a](01_importance.ipynb#the-deal)", "no heading"),
    ],
)
def test_a_planted_broken_link_is_found(tmp_path, text, said):
    for near in (GLOSSARY, NOTEBOOKS[1]):
        (tmp_path / near.name).symlink_to(near)
    (tmp_path / "a.md").write_text(f"{text} and `[b](code.md)`, [c](glossary.md#deal)\n")
    told = [broken(link, tmp_path / "a.md") for link in links(tmp_path / "a.md")]
    assert len(told) == 2 and said in told[0] and told[1] == ""


def test_glossary_is_in_order_short_and_linked_alike_everywhere():
    terms = re.findall(r"^## (.+)\n\n(.+?)\n(?:\n|\Z)", GLOSSARY.read_text(), re.MULTILINE)
    names = [name for name, _ in terms]
    assert names == sorted(names) and len(names) == GLOSSARY.read_text().count("\n## ")
    assert [name for name in names if slug(name) != name.replace(" ", "-")] == []
    ends = {name: len(re.findall(r"[.?!](?=\s+[A-Z`\[$]|$)", text)) for name, text in terms}
    assert {name: n for name, n in ends.items() if n > 2} == {}


def blocks():
    return re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def your_models(tmp_path, tiny_bert, monkeypatch) -> dict[str, Path]:
    """The guide's two paths, with a tiny model at each; the current folder is a fresh one."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "dull", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    dense = tiny_bert(dtype=torch.float32)
    dense.save_pretrained(tmp_path / "bert")
    BertForQuestionAnswering(BertConfig(**dense.config.to_dict())).save_pretrained(tmp_path / "qa")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    return {
        "path/to/your-fine-tuned-bert": tmp_path / "bert",
        "path/to/your-squad-bert": tmp_path / "qa",
    }


def test_the_guides_code_runs_from_first_to_last_block(your_models, monkeypatch, capsys):
    pushed, here = [], {}
    for kind in (PreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, name: pushed.append(name))
    for block in blocks():
        for path, place in your_models.items():
            block = block.replace(path, str(place))
        exec(block, here)
    assert pushed == ["you/my-moebert"] * 2
    assert here["answers"](here["again"]).equal(here["answers"](here["moebert"]))
    assert "MoEBertForQuestionAnswering" in capsys.readouterr().out


def shown(message):
    """The messages in the guide's table that begin or stand in an error's text."""
    told = re.findall(r"^\| `([^`]+)` \|", GUIDE.read_text(), re.MULTILINE)
    return [text for text in told if text.strip("… ") in message]


def test_every_message_the_guide_explains_is_one_that_comes(tiny_bert, tiny_batch):
    bert, batch = tiny_bert(), tiny_batch()
    scores = ffn_importance(bert, [batch])
    bare = {name: value for name, value in batch.items() if name != "labels"}
    faults = [
        lambda: to_moebert(bert.bert, scores),
        lambda: to_moebert(tiny_bert(seed=1), scores),
        lambda: ffn_importance(bert, [bare]),
        lambda: ffn_importance(bert, batch),
        lambda: to_moebert(bert, scores.scores),
        lambda: to_moebert(bert, scores, expert_size=8, n_shared=8),
        lambda: to_moebert(bert, scores, expert_size=32, n_shared=0),
        lambda: to_moebert(bert, scores, routing="hash-balance"),
        lambda: to_moebert(bert, scores, experts=4),
    ]
    explained = []
    for fault in faults:
        with pytest.raises((ValueError, TypeError)) as error:
            fault()
        explained += shown(str(error.value))
    rows = GUIDE.read_text().count("\n| `")
    assert len(explained) == len(set(explained)) == len(faults) == rows
