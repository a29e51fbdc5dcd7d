"""A training that was interrupted and resumed equals, bit for bit, one that was not.

As a command, ``python test_checkpoints.py FOLDER`` is a training that kills itself.
"""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, set_seed

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.method.partition import random_ranking
from moebert_lib.model.conversion import to_moebert
from moebert_lib.training import checkpoints, trainer

NAMES = ("input_ids", "attention_mask")
KINDS = {
    "teacher": {},
    "hash": {"routing": "hash-random"},
    "gate": {"routing": "gate-token"},
    "sentence gate": {"routing": "gate-sentence"},
    "tied": {"routing": "hash-random", "shared_neurons": "tied"},
    "tied gate": {"routing": "gate-token", "shared_neurons": "tied"},
    "by tokens": {},
    "kept teacher": {},
    "bfloat16": {},
}
#: Settings of some kinds.
OTHER = {
    "by tokens": {"tokens_per_batch": 32},  # 6 batches too
    "kept teacher": {"cache_teacher": True, "teacher_dropout": False},
    "bfloat16": {"dtype": "bfloat16"},
}
#: 22 sentences are 6 batches; of the third epoch half is trained, so that it ends in between.
SETTINGS = Settings.at(
    "smoke",
    batch_size=4,
    epochs=2.5,
    learning_rate=1e-3,
    teacher_batch_size=4,
    teacher_epochs=2.5,
    teacher_learning_rate=1e-3,
    teacher_dropout=True,
)
STEPS = 15
POINTS = (0.25, 1.0, 2.0, 2.5)  # epochs


class Interrupted(trainer.Progress):
    """Ends a training after a step, by Ctrl-C, or by ``kill -9`` while a checkpoint is written."""

    def __init__(self, name, *, step, kill=False):
        super().__init__(name)
        self.step, self.kill = step, kill

    def on_save(self, args, state, control, **kwargs):  # before the marker
        if self.kill and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Pad:
    """A tokenizer as far as collator and checkpoint need one."""

    pad_token_id = 0

    def pad(self, rows, **_):
        longest = max(len(row["input_ids"]) for row in rows)
        padded = {n: [row[n] + [0] * (longest - len(row[n])) for row in rows] for n in NAMES}
        return {n: torch.tensor(values) for n, values in padded.items()} | {
            name: torch.tensor([row[name] for row in rows])
            for name in ("labels", "index")
            if name in rows[0]
        }

    def save_pretrained(self, folder):
        """Nothing to save."""


def sentences():
    noise = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 12, (22,), generator=noise).tolist()
    ids = [torch.randint(1, 99, (n,), generator=noise).tolist() for n in lengths]
    labels = torch.randint(2, (22,), generator=noise).tolist()
    masks = [[1] * n for n in lengths]
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": labels})


def trained(kind, folder, *, keep=True, progress=trainer.Progress, **more):
    """A tiny model trained: its tensors by name, and the columns of a student's curve.

    Below ``folder``: ``trainer``, and ``kept`` for the checkpoints where they are asked for.
    """
    set_seed(7)
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    dense, curve = BertForSequenceClassification(config), {}
    settings = SETTINGS.but(**OTHER.get(kind, {}), score_at=POINTS if more else ())
    data = (sentences(), Pad(), settings, folder / "trainer")
    given = {"checkpoints": folder / "kept"} if keep else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Progress", progress)
        if kind == "teacher":
            model = dense
            trainer.fine_tune(model, *data, **given)
        else:
            model = to_moebert(dense, random_ranking(2, 64, seed=0), **KINDS[kind])
            curve = trainer.distil(model, dense, *data, **given, **more)
    tensors = {name: values.clone() for name, values in model.state_dict().items()}
    return tensors | {name: torch.tensor(curve[name].to_numpy()) for name in curve}


def interrupted(kind, folder, step):
    with pytest.raises(KeyboardInterrupt):
        trained(kind, folder, progress=functools.partial(Interrupted, step=step))


def test_a_resumed_training_scores_each_point_as_an_uninterrupted_one(tmp_path, every_step):
    def scores(into):
        def score(epoch, model):
            with torch.no_grad():
                into[epoch] = sum(values.double().sum() for values in model.parameters())

        return score

    at_once, before, after = {}, {}, {}
    trained("hash", tmp_path / "one", keep=False, score=scores(at_once))
    with pytest.raises(KeyboardInterrupt):
        stop = functools.partial(Interrupted, step=9)
        trained("hash", tmp_path, progress=stop, score=scores(before))
    trained("hash", tmp_path, score=scores(after))
    assert list(before) == [0.25, 1.0] and list(after) == [2.0, 2.5]
    assert before | after == at_once


def steps(folder):
    """Steps of the checkpoints that are there."""
    return sorted(int(path.name.split("-")[1]) for path in (folder / "kept").glob("*"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What each kind is when it is trained at once, without checkpoints."""
    return functools.cache(lambda kind: trained(kind, tmp_path_factory.mktemp("one"), keep=False))


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setenv(checkpoints.VARIABLE, "0")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_equals_an_uninterrupted_one(
    kind, tmp_path, every_step, uninterrupted, capsys
):
    expected = uninterrupted(kind)
    interrupted(kind, tmp_path, 9)
    assert steps(tmp_path) == [8, 9]
    capsys.readouterr()
    assert_same(trained(kind, tmp_path), expected)
    who = "teacher" if kind == "teacher" else "student"
    first, *_, last = capsys.readouterr().out.splitlines()  # a slow machine prints more
    assert first == f"· {who}: resumed at step 9/{STEPS}"
    assert last.startswith(f"· {who}: step {STEPS}/{STEPS}, ")
    assert last.endswith(" s since step 9")


def test_it_may_be_interrupted_at_any_step_again_and_again(tmp_path, every_step, uninterrupted):
    for step in range(1, STEPS):  # ends of epochs are 6 and 12
        interrupted("gate", tmp_path, step)
    assert_same(trained("gate", tmp_path), uninterrupted("gate"))


def test_steps_after_the_last_checkpoint_are_done_again(
    tmp_path, every_step, uninterrupted, monkeypatch, capsys
):
    interrupted("hash", tmp_path, 8)
    monkeypatch.setenv(checkpoints.VARIABLE, "3600")
    interrupted("hash", tmp_path, 13)
    assert steps(tmp_path) == [7, 8]
    assert_same(trained("hash", tmp_path), uninterrupted("hash"))
    assert capsys.readouterr().out.count("resumed at step 8/15") == 2


def test_a_training_killed_while_it_writes_goes_on_from_the_checkpoint_before(
    tmp_path, every_step, uninterrupted, capsys
):
    run = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert steps(tmp_path) == [8, 9]
    assert_same(trained("gate", tmp_path), uninterrupted("gate"))
    said = capsys.readouterr()
    assert f"{tmp_path}/kept/checkpoint-9: it was not written to its end; removed" in said.err
    assert "resumed at step 8/15" in said.out


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(
    name, tmp_path, every_step, uninterrupted, capsys
):
    interrupted("hash", tmp_path, 8)
    path = tmp_path / "kept" / "checkpoint-8" / name
    path.write_bytes(path.read_bytes()[:-1])
    assert_same(trained("hash", tmp_path), uninterrupted("hash"))
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("moebert:")]
    assert lines == [f"moebert: {path.parent}: {name} is missing or has changed; removed"]
    assert "resumed at step 7/15" in said.out


def test_with_none_that_is_whole_training_starts_again(tmp_path, every_step, uninterrupted, capsys):
    interrupted("hash", tmp_path, 5)
    for marker in (tmp_path / "kept").glob(f"*/{checkpoints.MARKER}"):
        marker.unlink()
    assert_same(trained("hash", tmp_path), uninterrupted("hash"))
    said = capsys.readouterr()
    assert said.err.count("it was not written to its end; removed") == 2
    assert "resumed" not in said.out


def test_a_damaged_older_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path, every_step):
    interrupted("hash", tmp_path, 4)
    (tmp_path / "kept" / "checkpoint-3" / "optimizer.pt").unlink()
    assert checkpoints.latest(tmp_path / "kept").name == "checkpoint-4"
    assert steps(tmp_path) == [4]


def test_a_training_shorter_than_the_time_limit_writes_nothing(tmp_path, uninterrupted):
    assert_same(trained("hash", tmp_path), uninterrupted("hash"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "trainer"]


def test_checkpoints_keep_their_distance_in_time(tmp_path, monkeypatch):
    now = [0.0]  # a clock that a step moves by ten seconds
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])

    class Slow(trainer.Progress):
        def on_step_begin(self, args, state, control, **kwargs):
            now[0] += 10

        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)

    saved = []
    monkeypatch.setenv(checkpoints.VARIABLE, "39")
    trained("hash", tmp_path, progress=Slow)
    assert saved == [4, 8, 12]


def test_the_last_step_writes_none_and_two_are_kept(tmp_path, every_step):
    trained("teacher", tmp_path)
    assert steps(tmp_path) == [STEPS - 2, STEPS - 1]


def test_finished_training_is_soon_repeated_from_its_last_checkpoint(
    tmp_path, every_step, uninterrupted, capsys
):
    for _ in range(2):
        assert_same(trained("hash", tmp_path), uninterrupted("hash"))
    assert "resumed at step 14/15" in capsys.readouterr().out


def test_clear_removes_all_and_may_find_nothing(tmp_path, every_step):
    interrupted("teacher", tmp_path, 3)
    for _ in range(2):
        checkpoints.clear(tmp_path / "kept")
        assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "5 min"])
def test_a_bad_number_of_seconds_is_refused_in_one_line(value, tmp_path, monkeypatch):
    monkeypatch.setenv(checkpoints.VARIABLE, value)
    with pytest.raises(UserError, match="expected seconds, 0 or more") as refusal:
        trained("teacher", tmp_path)
    assert repr(value) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(("given", "seconds"), [(None, 300), ("", 300), ("0", 0), ("7.5", 7.5)])
def test_seconds_come_from_the_environment(given, seconds, monkeypatch):
    monkeypatch.delenv(checkpoints.VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(checkpoints.VARIABLE, given)
    assert checkpoints.seconds() == seconds


if __name__ == "__main__":
    trained("gate", Path(sys.argv[1]), progress=functools.partial(Interrupted, step=9, kill=True))
