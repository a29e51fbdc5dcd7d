"""``moebert convert --task``: scored, distilled, evaluated and written; and what it refuses."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_home
from sharing import converted, saved_bert
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moebert_lib.cli import main
from moebert_lib.config.errors import UserError
from moebert_lib.config.provenance import checksums
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import dataset, student
from moebert_lib.experiments import teacher as teachers
from moebert_lib.publish import share_model
from moebert_lib.store.store import Store

SMOKE = ["--task", "library", "--scale", "smoke"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("ship") / "home")


@pytest.fixture(autouse=True)
def here(home, tmp_path, monkeypatch):
    """Commands are typed in a folder of their own, beside one store."""
    monkeypatch.setenv("MOEBERT_HOME", str(home))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def teacher():
    """The scale's own fine-tuned model, saved with its tokenizer."""
    return teachers.teacher(Store(), Settings.at("smoke"))


def convert(*words):
    return main.main(["convert", *map(str, words)])


def test_a_bert_becomes_a_folder_with_all_that_is_needed(teacher, tmp_path, capsys):
    assert convert(teacher.entry.folder, *SMOKE, "--out", "moe") == 0
    out = capsys.readouterr().out
    assert "student: step" in out and "checks: 11 of 11 hold" in out
    names = {path.name for path in (tmp_path / "moe").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "importance.safetensors",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not [path for path in tmp_path.iterdir() if path.name != "moe"]


def test_its_metrics_are_those_of_a_plain_loop(teacher):
    settings = Settings.at("smoke")
    shared = share_model.from_task(Store(), str(teacher.entry.folder), settings)
    (row,), bundle = shared.facts["metrics"], dataset.dataset(settings)
    for name, model in (("dense", shared.dense), ("moebert", shared.model)):
        answers = [
            int(model(torch.tensor([ids])).logits.argmax())
            for ids in bundle.validation["input_ids"]
        ]
        assert row[name][0] == accuracy_score(bundle.truths(), answers)
        assert row[name][1] <= row[name][0] <= row[name][2]
    assert row["difference"][0] == row["moebert"][0] - row["dense"][0]
    assert shared.facts["n"] == len(bundle.validation) and shared.facts["steps"] == 4
    assert shared.facts["dense_digest"] and shared.scores.meta["data"] == bundle.digest


def test_dense_and_moebert_are_not_taken_for_each_other(teacher, tmp_path, monkeypatch, capsys):
    truths = dataset.dataset(Settings.at("smoke")).truths()
    wrong = [(label + 1) % 6 for label in truths]
    few = [*truths[:12], *wrong[12:]]  # a quarter right
    monkeypatch.setattr(
        teachers,
        "evaluate_with_answers",
        lambda settings, model: (
            {},
            np.array(few if hasattr(model.config, "n_experts") else truths),
        ),
    )
    words = ("-p", "seed=5", "--untrained", "--out", "moe")
    assert convert(teacher.entry.folder, *SMOKE, *words) == 0
    assert "accuracy 25.0, dense 100.0, on 48 validation examples" in capsys.readouterr().out
    text = (tmp_path / "moe" / "README.md").read_text()
    assert re.search(r"accuracy \| 100.0 \(.*\) \| 25.0 \(.*\) \| -75.0 \(", text)
    assert "on 48 examples of `library` (first 48 of validation)" in text
    assert "value: 0.25" in text and "split: first 48 of validation" in text


def test_two_experts_a_token_are_shipped_as_two(tmp_path, capsys):
    words = ("--routing", "gate-token", "-p", "gate_top_k=2", "--untrained", "--out", "moe")
    assert convert(*SMOKE, *words) == 0
    assert "checks: 9 of 9 hold" in capsys.readouterr().out
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "| a gate's 2 largest p add up to between 2/N and 1 |" in card
    assert "to 2 experts" in card


def test_training_moves_the_experts_and_untrained_leaves_them(teacher):
    folder, settings = str(teacher.entry.folder), Settings.at("smoke", n_experts=2)
    trained, plain = (
        share_model.from_task(Store(), folder, settings, train=train) for train in (True, False)
    )
    same = [
        torch.equal(a, b)
        for a, b in zip(plain.model.parameters(), plain.untrained.parameters(), strict=True)
    ]
    assert all(same) and plain.facts["steps"] is None
    moved = zip(trained.model.parameters(), trained.untrained.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in moved if a.shape[0] == 2)


def test_the_scales_own_teacher_needs_no_name_and_what_is_stored_is_not_made_again(
    tmp_path, monkeypatch, capsys
):
    assert convert(*SMOKE, "--out", "one") == 0
    monkeypatch.setattr(student, "distil", None)  # would be called
    assert convert(*SMOKE, "--out", "two") == 0
    one, two = (checksums(tmp_path / name) for name in ("one", "two"))
    assert one.pop("README.md") != two.pop("README.md")  # its title
    assert one == two
    assert "`tiny`, fine-tuned on this task" in (tmp_path / "one" / "README.md").read_text()


def test_pipeline_finds_it_in_a_new_process_as_its_card_says(tmp_path):
    assert convert(*SMOKE, "--out", "moe") == 0
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "moe/README.md").read_text(), re.S)
    code = f"NAME = 'moe'\n{code}\nimport json\nprint(json.dumps(classify('A tensor of ones.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout.splitlines()[-1])
    model = AutoModelForSequenceClassification.from_pretrained("moe")
    batch = AutoTokenizer.from_pretrained("moe")("A tensor of ones.", return_tensors="pt")
    best = model(**batch).logits.softmax(-1).max(-1)
    assert answer["label"] == model.config.id2label[int(best.indices)]
    assert answer["score"] == pytest.approx(best.values.item(), abs=1e-6)


def test_stopped_in_training_it_leaves_no_folder(teacher, tmp_path, monkeypatch, capsys):
    def stop(*_args, **_named):
        raise KeyboardInterrupt

    monkeypatch.setattr(student, "distil", stop)
    assert convert(teacher.entry.folder, *SMOKE, "-p", "seed=3", "--out", "moe") == 130
    assert "stopped" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


class Hub:
    """Stands in for the hub: keeps what it is sent."""

    sent: dict = {}

    def create_repo(self, repo, exist_ok):
        assert exist_ok
        return SimpleNamespace(repo_id=repo)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        Hub.sent[repo_id] = checksums(share_model.Path(folder_path))
        return f"hub/{repo_id}"


def test_card_and_tokenizer_go_to_the_hub_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(share_model, "HfApi", Hub)
    assert convert(*SMOKE, "--out", "moe", "--push-to-hub", "me/moe") == 0
    assert Hub.sent.pop("me/moe") == checksums(tmp_path / "moe")
    assert "sent: hub/me/moe" in capsys.readouterr().out


def test_whatever_the_hubs_http_library_raises_is_one_line_that_says_how_to_go_on(
    tmp_path, tiny_bert, tiny_batch, monkeypatch
):
    class ConnectError(Exception):  # as httpx has it: no OSError
        pass

    def no_network(*_args, **_named):
        raise ConnectError("no route to host\nand much more")

    monkeypatch.setattr(share_model, "HfApi", Hub)
    monkeypatch.setattr(Hub, "create_repo", no_network)
    share_model.write(
        converted(saved_bert(tmp_path, tiny_bert), tiny_batch), tmp_path / "moe", name="moe"
    )
    with pytest.raises(UserError) as error:
        share_model.push(tmp_path / "moe", "me/moe")
    reason = "could not be sent to me/moe: no route to host; try again with: hf upload me/moe "
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_folder_stays(tmp_path, capsys):
    assert convert(*SMOKE, "--out", "moe", "--push-to-hub", "me/moe") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moebert: moe is written and could not be sent to me/moe: ")
    assert (tmp_path / "moe" / "model.safetensors").is_file()


def test_a_model_that_fails_a_check_is_written_with_status_1_and_not_sent(
    tmp_path, monkeypatch, capsys
):
    usual = share_model.run_checks

    def one_fails(*given):
        first, *others = usual(*given)
        return [replace(first, holds=False), *others]

    monkeypatch.setattr(share_model, "run_checks", one_fails)
    monkeypatch.setattr(share_model, "push", lambda *_: pytest.fail("it was sent"))
    assert convert(*SMOKE, "--out", "moe", "--push-to-hub", "me/moe") == 1
    out = capsys.readouterr().out
    assert "checks: 10 of 11 hold; FAILS: one full-width expert" in out and "not sent" in out
    assert "**FAILS**" in (tmp_path / "moe" / "README.md").read_text()


def test_a_model_without_its_tokenizer_is_refused(tmp_path, tiny_bert, capsys):
    tiny_bert(dtype=torch.float32).save_pretrained(tmp_path / "bert")
    assert convert(tmp_path / "bert", *SMOKE, "--out", "moe") == 2
    assert "bert holds no tokenizer; save it there too" in capsys.readouterr().err


def test_sizes_are_held_against_the_model_that_is_given_not_the_scales(monkeypatch):
    asked = []

    def stop(_store, _model, settings, *, train):
        asked.append(settings)
        raise UserError("stop")

    monkeypatch.setattr(share_model, "from_task", stop)
    sizes = ["--expert-size", "384", "--n-shared", "256"]  # too many for 64 neurons
    assert convert("mine", *SMOKE, *sizes, "--out", "moe") == 2
    assert asked[0].model == "mine" and asked[0].sizes(1536) == (384, 256)


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "give --task T to score and train, or --importance FILE"),
        (["--task", "library", "--importance", "x"], "give --task T"),
        (["m", "--importance", "x", "--untrained"], "leave --untrained out"),
        (["--importance", "x"], "needs the MODEL that was scored"),
        (["--task", "libary"], "did you mean 'library'?"),
        ([*SMOKE, "-p", "seeds=1"], "did you mean 'seed'?"),
        ([*SMOKE, "-p", "n_experts=8", "--n-experts", "4"], "n_experts is given twice"),
        (["nowhere", *SMOKE, "-p", "model=m"], "model is given twice"),
        (["nowhere/", *SMOKE], "no model 'nowhere/'"),
    ],
)
def test_what_does_not_fit_is_one_line(words, said, tmp_path, capsys):
    assert convert(*words, "--out", "moe") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spans, words, said",
    [
        (False, SMOKE, "the model has 2 outputs, task 'library' needs 6"),
        (True, SMOKE, "task 'library' is a classification task, the model is a Bert"),
        (False, ["--task", "follows", "--scale", "quick", "-p", "max_length=100"], "at most 64"),
        (False, ["--task", "follows", "--scale", "smoke", "-p", "ranking=random"], "leave them"),
    ],
)
def test_a_model_of_another_task_is_refused(spans, words, said, tmp_path, tiny_bert, capsys):
    saved_bert(tmp_path, tiny_bert, spans=spans)
    capsys.readouterr()
    assert convert("bert", *words, "--out", "moe") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "moe").exists()


def test_classes_in_another_order_are_refused(tmp_path, tiny_bert, capsys):
    folder = saved_bert(tmp_path, tiny_bert)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "follows", "1": "elsewhere"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert convert("bert", "--task", "follows", "--scale", "smoke", "--out", "moe") == 2
    assert "classes are follows, elsewhere" in capsys.readouterr().err
