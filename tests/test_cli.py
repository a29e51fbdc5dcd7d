"""The commands as a user types them: what they print and with which status they end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import fixture_home
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moebert_lib.bench import harness
from moebert_lib.cli import doctor, main
from moebert_lib.config import errors
from moebert_lib.config.errors import CHECKOUT, UserError
from moebert_lib.explore import explorer_page
from moebert_lib.publish import site
from moebert_lib.runs import export, sweep
from moebert_lib.runs.execution import NotebookFailed
from moebert_lib.store import run_outputs
from moebert_lib.store.store import Store

COMMANDS = ["run", "sweep", "status", "report", "export", "explore", "site", "importance"]
COMMANDS += ["convert", "bench", "doctor"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    names = {"00_the_idea": "plain", "02_fails": "fails", "03_distillation": "settings"}
    folder = fixture_home.make(tmp_path / "home", names | {"05_sleeps": "sleeps"})
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    assert main.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"example:\n  moebert {command}" in out and "positional arguments" not in out[:40]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_all_commands(argv, capsys):
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"  {command}" in out for command in COMMANDS)


def test_help_comes_at_once_because_torch_is_not_imported():
    code = (
        "import sys; sys.orig_argv[1:3] = ['-m', 'moebert_lib']\n"
        "from moebert_lib.cli import main; status = main.main(['run', '--help'])\n"
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_run_prints_progress_and_where_things_are_and_then_reuses(home, capsys):
    one = ["--workers", "1"]  # side by side, lines are shown now and then only
    assert main.main(["run", "03", "00", "--scale", "smoke", "-p", "layers=[1]", *one]) == 0
    out = capsys.readouterr().out
    assert "    · settings read" in out and "figures/smoke-library" in out
    assert out.splitlines()[-1].split() == ["page", "runs/report.html"]
    assert main.main(["run", "00", "--scale", "smoke", "03", "-p", "layers=[1]"]) == 0
    out = capsys.readouterr().out
    assert out.count("reused") == 2 and "running" not in out
    assert main.main(["status"]) == 0
    assert "2 stored" in capsys.readouterr().out


def test_plan_says_what_would_run_and_runs_nothing(home, capsys):
    assert main.main(["run", "03", "--plan", "-p", "seed=2"]) == 0
    out = capsys.readouterr().out
    assert "03_distillation seed=2: to run" in out and "student" in out and "seeds 2-4" in out
    assert out.splitlines()[-1] == "1 notebook runs planned, nothing was executed"
    assert not (home / "runs").exists()


def test_a_plan_at_scale_paper_is_there_at_once_and_offline(moebert_home):
    code = (
        "import sys; sys.orig_argv[1:3] = ['-m', 'moebert_lib']\n"
        "from moebert_lib.cli import main\n"
        "status = main.main(['run', '--scale', 'paper', '--plan'])\n"
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^in all .*CPU ", done.stdout, re.MULTILINE)
    assert re.search(r"\bGPU\b.*\d+ (h|min|days)\b", done.stdout)
    assert sorted(os.listdir(moebert_home)) == ["figures", "notebooks"]


def test_a_plan_says_what_is_stored(home, capsys):
    assert main.main(["run", "03", "--scale", "smoke"]) == 0
    assert main.main(["run", "00", "03", "--scale", "smoke", "--plan"]) == 0
    out = capsys.readouterr().out
    assert "03_distillation scale=smoke: stored, 0." in out and "00_the_idea: to run" in out


def test_a_failing_notebook_is_one_line_and_status_1(home, capsys):
    assert main.main(["run", "02"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moebert: notebook 02_fails, cell 3: ValueError: seed 0;")
    assert Path(line.rpartition("executed copy: ")[2]).is_file()
    main.main(["status"])
    assert "failed      02_fails, cell 3: ValueError: seed 0" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_kernel_and_no_entry(home, sent):
    command = [sys.executable, "-m", "moebert_lib", "run", "05_sleeps"]
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    kernel = next(int(line.split()[-1]) for line in process.stdout if "· kernel" in line)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.startswith("moebert: stopped")
    assert Store().entries() == [] and list((home / "runs" / "tmp").iterdir()) == []
    assert gone(kernel)


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


GRID = """
scale: smoke
tasks: library
seeds: [0, 1]
settings:
  n_shared: [12, 16]
  layers: [[0]]
"""


def test_a_grid_is_the_product_of_its_lists_without_doubles(home, tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID.replace("[0, 1]", "[0, 1, 0]"))
    jobs = sweep.read(path).jobs
    points = [(job.settings.seed, job.settings.n_shared) for job in jobs]
    assert points == [(0, 12), (0, 16), (1, 12), (1, 16)]
    assert all(job.parameters["layers"] == [0] for job in jobs)
    assert main.main(["sweep", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out.count(": never run") == 4 and not (home / "runs").exists()


def test_sweep_runs_its_points_and_stores_one_row_each(home, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("scale: smoke\nseeds: [1, 2]\n")
    assert main.main(["sweep", str(path)]) == 0
    assert sorted(export.frame()["seed"]) == [1, 2]


def test_doctor_says_ok_or_what_to_do(home, capsys):
    status = main.main(["doctor", "--data-dir", str(home)])
    lines = capsys.readouterr().out.splitlines()
    assert status == 1 and all(re.match(r"(ok|PROBLEM) +\w+ +\S", line) for line in lines)
    assert any(line.startswith("PROBLEM data") and "sst2" in line for line in lines)
    assert any(re.match(r"ok +kernel", line) for line in lines)
    assert [line.split()[1] for line in lines[:3]] == ["versions", "bfloat16", "machine"]


@pytest.mark.parametrize("supported", [True, False])
def test_doctor_says_whether_the_processor_has_bfloat16(supported, monkeypatch):
    capabilities = {"avx2": True, "avx512_bf16": supported, "amx_bf16": False}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert doctor.bfloat16().startswith("processor has" if supported else "processor lacks")


@pytest.mark.parametrize("supported", [True, False])
def test_a_plan_in_bfloat16_says_whether_it_is_slow(home, supported, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    capabilities = {"avx2": True, "avx512_bf16": supported}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    asked = ["run", "03", "--scale", "smoke", "--plan"]
    for dtype, lines in (("bfloat16", 1), ("float32", 0)):
        assert main.main([*asked, "-p", f"dtype={dtype}"]) == 0
        about = [line for line in capsys.readouterr().out.splitlines() if "dtype=bf" in line]
        about = [line for line in about if "this device" in line]
        assert len(about) == lines and all(("slower" in line) != supported for line in about)


def test_convert_makes_a_model_that_transformers_loads(tmp_path, tiny_bert, monkeypatch, capsys):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from moebert_lib.config.presets import MINILM
    from moebert_lib.data import pretrained_weights
    from moebert_lib.method import importance

    dense, out = tmp_path / "dense", tmp_path / "moe"
    tokenizer = AutoTokenizer.from_pretrained(pretrained_weights.find(MINILM))
    tokenizer.save_pretrained(dense)
    tiny_bert(dtype=torch.float32).save_pretrained(dense)  # of 99 tokens
    scores = importance.Importance(
        torch.rand(2, 64, dtype=torch.float64),
        torch.rand(1, 2, 64, dtype=torch.float64),
        torch.ones(1, dtype=torch.int64),
        {},
    )
    scores.save(tmp_path / "scores.safetensors")
    given = ["--importance", str(tmp_path / "scores.safetensors"), "--out", str(out)]
    assert main.main(["convert", str(dense), *given, "--n-shared", "8"]) == 2
    assert "knows 30,522 tokens, the model 99" in capsys.readouterr().err and not out.exists()

    tiny_bert(dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(dense)
    assert main.main(["convert", str(dense), *given, "--n-shared", "8"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert type(model).__name__ == "MoEBertForSequenceClassification"
    assert "4 experts a layer" in capsys.readouterr().out


def test_importance_writes_a_file_that_loads(moebert_home, tmp_path, capsys):
    from moebert_lib.method.importance import Importance

    out = tmp_path / "scores.safetensors"
    assert main.main(["importance", "--scale", "smoke", "--out", str(out)]) == 0
    assert Importance.load(out).scores.shape == (2, 64)
    assert "2 layers of 64 neurons" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["nothing.pkl"], "nothing.pkl does not exist; expected a file from moebert importance"),
        (["notebooks"], "notebooks is a folder; expected a file"),
        (["README.md"], "README.md: expected scores ending in .safetensors or .pkl"),
        (["--port", "70000"], "--port 70000: expected 1 to 65535"),
        (["--ip", "192.0.2.1"], "--ip 192.0.2.1 is not an address of this machine"),
        (["--task", "librari"], "library"),
        (["--prot", "1"], "--port"),
    ],
)
def test_explore_refuses_in_one_line_before_anything_opens(home, argv, told, capsys):
    (home / "README.md").write_text("no scores")
    assert main.main(["explore", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moebert: ") and told in line
    assert not (home / "runs").exists()


def test_explore_says_what_to_install_where_voila_is_missing(home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "voila.app", None)
    assert main.main(["explore"]) == 2
    assert "pip install 'moebert[lab]'" in capsys.readouterr().err


def test_a_port_that_is_taken_gives_way_to_the_next_free_one():
    with socket.create_server(("localhost", 0)) as server:
        taken = server.getsockname()[1]
        assert explorer_page.free_port("localhost", taken) > taken


def test_explore_makes_what_it_shows_before_the_page_opens(home, monkeypatch, capsys):
    served = {}
    monkeypatch.setattr(explorer_page, "serve", lambda code, **how: served.update(how, code=code))
    assert main.main(["explore", "--scale", "smoke", "--no-browser"]) == 0
    assert {"teacher", "importance"} <= {entry.kind for entry in Store().entries()}
    assert "made in" in capsys.readouterr().out and served["browser"] is False
    assert main.main(["explore"]) == 0
    assert "score_sources.from_store(store)" in served["code"] and served["ip"] == "localhost"


def test_site_and_widgets_are_given_what_was_asked_for(home, monkeypatch, capsys):
    asked = {}

    def build(out, *, figures):
        asked.update(out=out, figures=figures)
        return home / "index.html"

    monkeypatch.setattr(site, "build", build)
    monkeypatch.setattr(
        harness, "run", lambda made, *, out: asked.update(repeats=made.repeats) or True
    )
    assert main.main(["site", "--out", "public"]) == 0
    assert capsys.readouterr().out.split() == ["site", "index.html"]
    assert main.main(["bench", "widgets", "--repeats", "3"]) == 0
    assert asked == {"out": Path("public"), "figures": None, "repeats": 3}


def test_an_unexpected_error_is_one_line_with_the_place_of_its_traceback(home, monkeypatch, capsys):
    def fails(stores, *, kind):
        return {}["missing"]

    monkeypatch.setattr(export, "frame", fails)
    assert main.main(["export", "runs.parquet"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moebert: export: KeyError: 'missing'; ")
    saved = Path(line.split()[-1])
    assert saved.is_relative_to(home / "runs" / "errors")
    text = saved.read_text()
    assert "moebert export runs.parquet" in text and "in fails" in text


@pytest.mark.parametrize(
    "error, status",
    [
        (UserError("no"), 2),
        (FileNotFoundError(2, "No such file", "x"), 2),
        (MemoryError(), 1),
        (RecursionError("deep"), 1),
        (KeyboardInterrupt(), 130),
        (NotebookFailed("x", 3, "ValueError: no"), 1),
    ],
)
def test_every_error_is_one_line_with_a_status(home, monkeypatch, capsys, error, status):
    def fails(stores, *, kind):
        raise error

    monkeypatch.setattr(export, "frame", fails)
    assert main.main(["export", "runs.parquet"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moebert: ")


def test_a_value_that_the_library_refuses_is_bad_input_and_another_value_error_is_not(
    home, monkeypatch, capsys
):
    def refused(stores, *, kind):
        run_outputs.output_file("a/b", "csv")

    def not_refused(stores, *, kind):
        int("x")

    monkeypatch.setattr(export, "frame", refused)
    assert main.main(["export", "runs.parquet"]) == 2
    monkeypatch.setattr(export, "frame", not_refused)
    assert main.main(["export", "runs.parquet"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


WORDS = st.sampled_from(["--plan", "--why", "--scale", "-p", "03", "seed=1", "--"]) | st.text()


@given(command=st.sampled_from(COMMANDS), words=st.lists(WORDS, max_size=3), name=st.text())
def test_whatever_is_typed_is_answered_or_refused_in_one_line(
    tmp_path_factory, capsys, command, words, name
):
    assume("\x00" not in "".join([*words, name]))
    folder = tmp_path_factory.mktemp("typed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBERT_HOME", str(folder))
        patch.chdir(folder)
        for argv in ([command, "--unknown", *words], ["run", "--plan", "-p", f"{name}=1", *words]):
            assert main.main(argv) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("moebert: ")
        assert not any(folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_while_a_command_imports_is_one_line():
    """The interrupt arrives inside an import, which turns it into another error."""
    code = (
        "import builtins, os, signal, sys, types\n"
        "sys.orig_argv[1:3] = ['-m', 'moebert_lib']\n"
        "from moebert_lib.cli import main\n"
        "def find(name, *rest):\n"
        "    if name == 'pandas':\n"
        "        try: os.kill(os.getpid(), signal.SIGINT); signal.sigtimedwait([], 1)\n"
        "        except KeyboardInterrupt: raise ImportError('half of pandas') from None\n"
        "sys.meta_path.insert(0, types.SimpleNamespace(find_spec=find))\n"
        "sys.exit(main.main(['export', 'x.csv']))\n"
    )
    restore = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=restore
    )
    assert done.returncode == 130 and done.stderr.startswith("moebert: stopped")
    assert len(done.stderr.splitlines()) == 1


def test_the_home_of_an_installed_library_is_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MOEBERT_HOME")
    monkeypatch.chdir(tmp_path)
    assert errors.home() == CHECKOUT.resolve()
    monkeypatch.setattr(errors, "CHECKOUT", tmp_path / "site-packages")
    assert errors.home() == tmp_path.resolve()
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path / "other"))
    assert errors.home() == (tmp_path / "other").resolve()
