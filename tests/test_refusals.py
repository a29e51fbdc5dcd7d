"""Whatever is wrong is refused before any compute: one line, the nearest choice, status 2."""

import os
import subprocess
import sys
from pathlib import Path

import fixture_home
import pytest
from checkout import NOTEBOOKS

from moebert_lib.cli import main
from moebert_lib.config.errors import CHECKOUT

SST2 = ["--scale", "small", "-p", "task=sst2"]

#: What is typed (shell words), and what the one line must say.
REFUSED = {
    # the command
    "misspelt command": (["rnu"], "unknown command 'rnu'; did you mean 'run'?"),
    "unlike any command": (["zzz"], "choose from run, sweep"),
    "option before the command": (["--scale", "quick"], "give a command first"),
    "misspelt option": (["run", "--sclae", "quick"], "did you mean '--scale'?"),
    "abbreviated option": (["run", "--forc"], "did you mean '--force'?"),
    "option of another command": (["status", "--force"], "unknown option '--force'"),
    "option without value": (["run", "--scale"], "expected one argument"),
    "unknown short option": (["run", "-x"], "does not take '-x'"),
    "status takes no words": (["status", "all"], "does not take 'all'"),
    # notebooks
    "misspelt notebook": (["run", "01_importence"], "did you mean '01_importance'?"),
    "notebook number too high": (["run", "42"], "no notebook '42'"),
    "notebook path not there": (["run", "x/05_rout.ipynb"], "did you mean '05_routing'?"),
    "one good and one bad notebook": (["run", "01", "routin"], "did you mean '05_routing'?"),
    # kinds of value that look right
    "scale in a list": (["run", "01", "-p", "scale=[quick]"], "did you mean 'quick'?"),
    "task in a list": (
        ["importance", "--scale", "paper", "-p", "task=[1]", "--out", "x"],
        "task=[1]",
    ),
    "true for a number": (["run", "01", "-p", "epochs=true"], "values of a switch only"),
    # model
    "hub model at an offline scale": (["run", "01", "-p", "model=bert-base-uncased"], "is offline"),
    "model folder not there": (["run", "01", "-p", "model=/no/bert"], "no folder '/no/bert'"),
    "no expert": (
        ["convert", "m", "--n-experts", "0", "--importance", "f", "--out", "o"],
        "expected at least 1",
    ),
    # scale
    "misspelt scale": (["run", "--scale", "qiuck"], "unknown scale 'qiuck'; did you mean 'quick'?"),
    "empty scale": (["run", "--scale", ""], "choose from smoke, quick, small, base, paper"),
    "two scales": (["run", "--scale", "quick", "-p", "scale=small"], "differ; keep one"),
    # parameters
    "misspelt parameter": (["run", "-p", "n_expert=4"], "did you mean 'n_experts'?"),
    "misspelt notebook parameter": (["run", "01", "-p", "layer=[1]"], "did you mean 'layers'?"),
    "parameter without value": (["run", "-p", "seed"], "expected NAME=VALUE"),
    "parameter without name": (["run", "-p", "=3"], "expected NAME=VALUE"),
    "parameter twice": (["run", "-p", "seed=1", "-p", "seed=2"], "given twice"),
    "not YAML": (["run", "-p", "layers=[1"], "not YAML"),
    "parameter of a notebook without any": (["run", "00", "-p", "seed=1"], "'seed' of 00_the_idea"),
    "code for a name": (["run", "-p", "__import__('os')=1"], "unknown parameter"),
    # types and ranges
    "word for a number": (["run", "-p", "seed=two"], "seed='two': input should be a valid integer"),
    "fraction for a count": (["run", "-p", "seed=1.5"], "seed=1.5"),
    "negative seed": (["run", "-p", "seed=-1"], "seed=-1"),
    "word in a list of numbers": (["run", "-p", "layers=[0, x]"], "valid integer"),
    "number for text": (["run", "-p", "label=3"], "label=3"),
    "date for text": (["run", "-p", "label=2024-01-01"], "label="),
    "word for a rate": (["run", "-p", "learning_rate=fast"], "learning_rate='fast'"),
    "infinite rate": (["run", "-p", "learning_rate=.inf"], "finite"),
    "zero epochs": (["run", "-p", "epochs=0"], "epochs=0"),
    "list for overrides": (["run", "-p", "overrides=[1]"], "expected names and values"),
    "misspelt name in overrides": (["run", "-p", "overrides={epoch: 1}"], "did you mean 'epochs'?"),
    "misspelt choice": (["run", "-p", "routing=hash-randm"], "did you mean 'hash-random'?"),
    "misspelt ranking": (["run", "-p", "ranking=inverted"], "did you mean 'inverse'?"),
    # sizes
    "experts too large": (
        ["run", "-p", "expert_size=800", "-p", "n_shared=0"],
        "largest expert_size that fits is 384",
    ),
    "more shared than there are": (["run", "-p", "n_shared=500"], "largest n_shared is 384"),
    "too many experts": (["run", "-p", "n_experts=11", "-p", "expert_size=384"], "fits is"),
    # tasks and data
    "misspelt task": (["run", "-p", "task=libary"], "did you mean 'library'?"),
    "misspelt GLUE task": (["run", "--scale", "small", "-p", "task=sst-2"], "did you mean 'sst2'?"),
    "GLUE offline without data": (["run", "-p", "task=sst2"], "data"),
    "data folder not there": (["run", *SST2, "--data-dir", "{tmp}/none"], "none"),
    "data folder empty": (["run", *SST2, "--data-dir", "{tmp}/empty"], "no folder 'sst2'"),
    "task not in the folder": (
        ["run", "--scale", "small", "-p", "task=rte", "--data-dir", "{tmp}/glue"],
        "rte",
    ),
    "wrong columns": (["run", *SST2, "--data-dir", "{tmp}/glue"], "sentence"),
    # sweep
    "grid not there": (["sweep", "none.yaml"], "no file none.yaml"),
    "sweep without a grid": (["sweep"], "name a grid"),
    "grid with a misspelt name": (["sweep", "{tmp}/typo.yaml"], "did you mean 'seeds'?"),
    "grid with a misspelt setting": (["sweep", "{tmp}/setting.yaml"], "did you mean 'n_shared'?"),
    "grid with a bad point": (["sweep", "{tmp}/point.yaml"], "largest n_shared is 384"),
    "grid with an empty list": (["sweep", "{tmp}/none.yaml"], "'seeds' has no values"),
    "grid that is a list": (["sweep", "{tmp}/list.yaml"], "expected names and values"),
    "grid that would run code": (["sweep", "{tmp}/code.yaml"], "not YAML"),
    # the others
    "report of nothing": (["report"], "run moebert run first"),
    "importance without a file": (["importance", "--task", "library"], "required: --out"),
    "importance of no task": (["importance", "--task", "libary", "--out", "x"], "'library'?"),
    "importance to no folder": (["importance", "--out", "{tmp}/no/x"], "no folder"),
    "importance with a misspelt setting": (
        ["importance", "--out", "x", "-p", "epoch=1"],
        "did you mean 'epochs'?",
    ),
    "convert without scores": (["convert", "m", "--importance", "no", "--out", "o"], "no file no"),
    "convert over a folder": (
        ["convert", "m", "--importance", "{tmp}/typo.yaml", "--out", "{tmp}/glue"],
        "is there already",
    ),
    "convert with a misspelt router": (
        ["convert", "m", "--importance", "x", "--out", "o", "--routing", "gate-tokn"],
        "did you mean 'gate-token'?",
    ),
    "convert with a word for a number": (
        ["convert", "m", "--importance", "x", "--out", "o", "--n-experts", "four"],
        "invalid int value: 'four'",
    ),
    "bench of nothing known": (["bench", "inferense"], "inference"),
    "bench of no sentences": (["bench", "--batch", "0"], "at least 1"),
}

#: Asked of the workbook's own notebooks.
REFUSED_KNOBS = {
    "layer zero": ("02", "layer=0", "layer=0: input should be greater than or equal to 1"),
    "layer beyond the last": ("02", "layer=3", "expected 1 to 2"),
    "layer in words": ("02", "layer=first", "valid integer"),
    "no resamples": (
        "01",
        "n_resamples=0",
        "n_resamples=0: input should be greater than or equal to 1",
    ),
    "nothing removed from": (
        "01",
        "removal_examples=-1",
        "input should be greater than or equal to 1",
    ),
    "misspelt other task": ("01", "other_tasks=[folows]", "did you mean 'follows'?"),
    "other task without data": ("01", "other_tasks=[rte]", "task 'rte' needs a data_dir"),
    "one task, not a list": ("01", "other_tasks=follows", "valid list"),
    "fraction of one": (
        "04",
        "fractions=[1, 2]",
        "fractions=[1, 2]: input should be greater than or equal to 2",
    ),
    "one point": ("04", "fractions=[4]", "two or more different"),
    "point in words": ("04", "fractions=[four, 2]", "valid integer"),
    "half a number": ("04", "numbers=[1.5, 2]", "numbers=[1.5, 2]"),
    "no experts": ("04", "numbers=[0, 4]", "input should be greater than or equal to 1"),
    "no number that fits": ("04", "numbers=[4, 4000]", "from 1 to 9, which is what fits"),
    "four thirds": ("04", "thirds=[0, 4]", "input should be less than or equal to 3"),
    "a third twice": ("04", "thirds=[1, 1]", "two or more different"),
    "number for a sentence": ("05", "sentence=7", "valid string"),
    "misspelt task of the table": ("06", "tasks=[libary]", "did you mean 'library'?"),
    "task of the table without data": ("06", "tasks=[library, cola]", "task 'cola' needs"),
    "no sentence at once": ("07", "batch=0", "batch=0: input should be greater than or equal to 1"),
    "no round": ("07", "repeats=0", "input should be greater than or equal to 1"),
    "no tokens": ("07", "lengths=[0, 8]", "input should be greater than or equal to 1"),
    "no lengths": ("07", "lengths=[]", "ascending"),
    "lengths falling": ("07", "lengths=[64, 16]", "ascending"),
    "lengths too long": ("07", "lengths=[16, 1024]", "input should be less than or equal to 512"),
    "length in words": ("07", "lengths=[long]", "valid integer"),
    "toy of no expert": (
        "00",
        "n_experts=0",
        "n_experts=0: input should be greater than or equal to 1",
    ),
    "toy of empty experts": ("00", "expert_size=0", "input should be greater than or equal to 1"),
    "toy sharing less than nothing": (
        "00",
        "n_shared=-1",
        "input should be greater than or equal to 0",
    ),
}

GRIDS = {
    "typo": "seed: [0, 1]\n",
    "setting": "settings: {n_share: [0]}\n",
    "point": "settings: {n_shared: [0, 500]}\n",
    "none": "seeds: []\n",
    "list": "- 1\n- 2\n",
    "code": "seeds: !!python/object/apply:os.system ['touch pwned']\n",
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A home with the workbook's names, and beside it bad grids and bad data."""
    home = fixture_home.make(tmp_path / "home", fixture_home.WORKBOOK)
    (tmp_path / "empty").mkdir()
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        (tmp_path / "glue" / "sst2" / f"{split}.jsonl").write_text('{"words": "a", "label": 0}\n')
    for name, text in GRIDS.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("MOEBERT_HOME", str(home))
    monkeypatch.chdir(home)
    return tmp_path


@pytest.mark.parametrize("argv, said", REFUSED.values(), ids=REFUSED)
def test_it_is_refused_in_one_line_before_any_compute(place, capfd, argv, said):
    status = main.main([word.replace("{tmp}", str(place)) for word in argv])
    out, err = capfd.readouterr()
    assert status == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("moebert: ")
    assert said in err
    assert sorted(os.listdir(place / "home")) == ["notebooks"]


@pytest.mark.parametrize("number, given, said", REFUSED_KNOBS.values(), ids=REFUSED_KNOBS)
def test_a_notebooks_own_parameters_are_refused_out_of_range(
    moebert_home, capfd, number, given, said
):
    scale = [] if number == "00" else ["--scale", "smoke"]
    assert main.main(["run", number, *scale, "-p", given]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and said in err
    assert sorted(os.listdir(moebert_home)) == ["figures", "notebooks"]


def test_more_experts_than_the_toy_has_neurons_need_something_shared(moebert_home, capfd):
    assert main.main(["run", "00", "-p", "n_experts=8", "-p", "n_shared=0"]) == 2
    assert "expected 1 to 6 if nothing is shared" in capfd.readouterr().err
    assert main.main(["run", "00", "--plan", "-p", "n_experts=8"]) == 0


def test_every_notebook_is_planned_with_its_own_defaults(moebert_home, capfd):
    for path in NOTEBOOKS:
        assert main.main(["run", path.stem, "--plan", "--scale", "smoke"]) == 0, path.stem


def test_there_are_at_least_25_of_them():
    assert len(REFUSED) >= 25


@pytest.mark.parametrize("name", ["misspelt command", "misspelt parameter", "misspelt scale"])
def test_the_command_itself_ends_with_status_2_and_no_traceback(place, name):
    argv, said = REFUSED[name]
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "moebert_lib", *argv]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_checkout_without_notebooks_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path))
    assert main.main(["run"]) == 2
    assert f"no notebooks in {tmp_path / 'notebooks'}" in capsys.readouterr().err


def test_a_file_that_is_no_notebook_is_named(place, capsys):
    (place / "home" / "notebooks" / "01_importance.ipynb").write_text("not JSON")
    assert main.main(["run", "01"]) == 2
    assert "01_importance.ipynb is not a notebook" in capsys.readouterr().err
