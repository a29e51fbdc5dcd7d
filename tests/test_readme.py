"""What the README promises: its code runs, its files are there, its map is the library's."""

import hashlib
import json
import re
import shlex
from types import SimpleNamespace

import pandas as pd
from checkout import LIBRARY, NOTEBOOKS, ROOT

from moebert_lib.bench import harness
from moebert_lib.cli import main
from moebert_lib.publish import report
from moebert_lib.runs import sweep
from moebert_lib.store import committed_results

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_ten_lines_of_python_run(tiny_bert, tmp_path, monkeypatch, capsys):
    import torch
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "dull", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    tiny_bert(dtype=torch.float32).save_pretrained(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    code, _ = blocks("python")
    exec(code.replace("path/to/your-fine-tuned-bert", str(tmp_path / "bert")), {})
    assert "effective=" in capsys.readouterr().out
    assert (tmp_path / "my-moebert" / "model.safetensors").is_file()


def test_a_model_is_shipped_as_it_shows(moebert_home, tmp_path, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda _, repo, **__: SimpleNamespace(repo_id=repo)
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **how: sent.append(how))
    monkeypatch.chdir(tmp_path)
    lines = "".join(blocks("bash")).splitlines()
    (line,) = [line for line in lines if "convert --task library" in line]
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "--onnx"]
    assert main.main([*words, "--scale", "smoke"]) == 0  # the graph has its own tests
    capsys.readouterr()
    assert "| one full-width expert = the dense model |" in (tmp_path / "moe/README.md").read_text()
    exec(blocks("python")[1], {})
    assert [(how["repo_id"], how["folder_path"]) for how in sent] == [("OWNER/NAME", "moe")]


def test_the_commands_it_shows_are_accepted(moebert_home, data_dir, capsys):
    for line in "".join(blocks("bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["moebert", "run"] and "--help" not in words:
            words = [str(data_dir) if word == "DIR" else word for word in words[1:]]
            assert main.main([*words, "--plan"]) in (0, None), capsys.readouterr().err


def test_the_grid_it_shows_is_accepted(moebert_home, data_dir, tmp_path):
    (grid,) = blocks("yaml")
    path = tmp_path / "grid.yaml"
    path.write_text(grid.replace("DIR", str(data_dir)))
    assert len(sweep.read(path).jobs) == 2 * 5 * 2 * 2


def test_every_notebook_is_on_the_map():
    assert re.findall(r"\]\(notebooks/(\w+\.ipynb)\)", README) == [path.name for path in NOTEBOOKS]


def test_every_module_is_on_the_map():
    table = README[README.index("| room |") : README.index("## Differences")]
    named = set(re.findall(r"`(\w+)`", table))
    there = {path.stem for path in LIBRARY.glob("*.py") if not path.stem.startswith("__")}
    assert {name for name in there - named if not name.startswith("plots_")} == set()
    assert named - there == set()


def test_files_it_links_to_are_there():
    for target in re.findall(r"\]\(((?!http)[\w./-]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_results_are_those_of_the_committed_table():
    block = README.partition("<!-- results -->")[2].partition("<!-- end of results -->")[0]
    mine, drawn = (
        [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]
        for text in (block, (ROOT / "figures" / "06_methods.md").read_text())
    )
    assert len(drawn) > 6 and [mine[0], *mine[2:]] == [drawn[0], *drawn[2:]]


def test_the_verdicts_it_counts_are_those_of_the_committed_table():
    told = pd.read_csv(ROOT / "figures" / "06_claims.csv")["verdict"].value_counts()
    text = " ".join(README.split())
    counts = [told.get(word, 0) for word in ("reproduced", "not reproduced", "undecided")]
    said = "{} reproduced, {} not reproduced, {} undecided"
    assert said.format(*counts) in text and f"the paper's {told.sum()} claims" in text


def test_the_speeds_are_those_of_the_committed_records():
    def rounds(what, setting):
        record = json.loads((ROOT / "figures" / "bench" / f"{what}.json").read_text())
        assert record["commit"][:7] in README and record["created"][:10] in README
        rows = harness.frame(record, "timings").query("setting == @setting")
        return rows.pivot(index="repeat", columns="variant", values="seconds")

    def told(wide, variant, against):
        low, middle, high = harness.paired(wide, variant, against)
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    moe, fast = "moebert hash-random, accelerated", ", accelerated"
    columns = [rounds("inference", setting) for setting in ("32 x 128", "GLUE-like", "1 x 64")]
    for against in ("dense", "dense" + fast, "equal FLOPs" + fast):
        assert "| " + " | ".join(told(wide, moe, against) for wide in columns) + " |" in README
    text, steps = " ".join(README.split()), rounds("training", "GLUE-like, dropout 0")
    for variant in ("packed", "packed bf16"):
        assert told(steps, variant, "release style") + (" in" if "bf16" in variant else "") in text
    loop = told(rounds("importance", "GLUE-like"), "packed", "per-example loop")
    assert f"importance is {loop} times as fast as a loop over examples" in text


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
