"""Importance files of the release: read as numbers, refused as programs."""

import hashlib
import io
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from drawings import drawn_bars, drawn_points

from moebert_lib.cli import main
from moebert_lib.config import paper_numbers
from moebert_lib.config.errors import UserError
from moebert_lib.method import rank_stability, release_files
from moebert_lib.method.importance import Importance
from moebert_lib.plots import importance as plots_release
from moebert_lib.plots import results

#: Importance that the top 512 and the kept 1536 neurons hold in the released files, and the
#: overlap of the top 512 between tasks, as counted once by other code.
TOP = {
    "rte": 0.515,
    "cola": 0.442,
    "mrpc": 0.475,
    "sst2": 0.430,
    "qnli": 0.413,
    "qqp": 0.398,
    "mnli": 0.412,
    "squad": 0.463,
    "squad_v2": 0.447,
}
KEPT = {
    "rte": 0.792,
    "cola": 0.762,
    "mrpc": 0.776,
    "sst2": 0.760,
    "qnli": 0.741,
    "qqp": 0.727,
    "mnli": 0.739,
    "squad": 0.773,
    "squad_v2": 0.765,
}


def content(scores):
    """What the release pickles for scores ``(L, F)`` in the neurons' order."""
    order = np.argsort(-scores, axis=1, kind="stable")
    sorted_scores = np.take_along_axis(scores, order, axis=1)
    return {"importance": sorted_scores.tolist(), "idx": order.tolist()}


def write(path, what, protocol=3):
    path.write_bytes(what if isinstance(what, bytes) else pickle.dumps(what, protocol))
    return path


@pytest.fixture
def scores(rng):
    return rng.exponential(size=(2, 24))


@pytest.fixture(scope="module")
def files(request, tmp_path_factory):
    """Folder of importance files: beside ``--data-dir`` where that has one, else made up here.

    The made-up ones are cut to hold what the real ones hold; tasks share some neurons.
    """
    given = request.config.getoption("--data-dir")
    beside = Path(given).resolve().parent / "importance" if given else None
    if beside and beside.is_dir():
        return beside
    folder, rng = tmp_path_factory.mktemp("release"), np.random.default_rng(0)
    common = rng.random((12, 3072))
    for task in TOP:
        own = rng.random((12, 3072))
        mixed = common + (0.37 if task.startswith("squad") else 0.8) * own
        ranks = np.argsort(np.argsort(-mixed, axis=1), axis=1)
        parts = (TOP[task], KEPT[task] - TOP[task], 1 - KEPT[task])
        values = np.repeat(parts, (512, 1024, 1536)) / np.repeat(
            (512, 1024, 1536), (512, 1024, 1536)
        )
        write(folder / f"importance_{task}.pkl", content(values[ranks]))
    return folder


def test_the_released_files_hold_what_was_counted_in_them(files):
    read = release_files.read_folder(files)
    assert set(read) == set(TOP)
    for task, importance in read.items():
        assert importance.scores.shape == (12, 3072)
        held = release_files.shares(importance)
        assert (held.shared, held.kept) == pytest.approx((TOP[task], KEPT[task]), abs=6e-4), task
        assert held.dropped == pytest.approx(1 - held.kept)


def test_tasks_share_more_top_neurons_than_chance_and_both_squads_most(files):
    table = rank_stability.jaccard_table(release_files.read_folder(files), 512)
    assert rank_stability.jaccard_chance(512, 3072) == pytest.approx(0.09, abs=2e-3)
    off = table.where(~np.eye(len(table), dtype=bool)).stack()
    assert off.idxmax() in {("squad", "squad_v2"), ("squad_v2", "squad")}
    assert off.max() == pytest.approx(0.48, abs=0.03)
    others = off.drop([("squad", "squad_v2"), ("squad_v2", "squad")])
    assert 0.175 < others.min() < others.max() < 0.405


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_each_score_returns_to_its_neuron_whatever_the_protocol(scores, protocol, tmp_path):
    path = write(tmp_path / "importance_x.pkl", content(scores), protocol)
    importance = release_files.read(path)
    assert torch.equal(importance.scores, torch.from_numpy(scores))
    assert importance.ranking.tolist() == content(scores)["idx"]
    assert importance.meta == {
        "source": "importance_x.pkl",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def test_an_unknown_number_of_examples_is_none_and_nothing_is_resampled(scores, tmp_path):
    path = write(tmp_path / "x.pkl", content(scores))
    release_files.read(path).save(tmp_path / "x.safetensors")
    for importance in (release_files.read(path), Importance.load(tmp_path / "x.safetensors")):
        assert importance.n_examples is None
        assert torch.equal(importance.scores, torch.from_numpy(scores))
        with pytest.raises(ValueError, match="without blocks"):
            importance.bootstrap(3)
        with pytest.raises(ValueError, match="without blocks"):
            importance.pairs(1, 3)


class Trap:
    """Unpickled with pickle.load, this makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_file_is_refused_and_not_run(scores, protocol, tmp_path, capsys):
    made = tmp_path / "made"
    whole = {**content(scores), "idx": Trap(made)}
    path = write(tmp_path / "trap.pkl", whole, protocol)
    args = ["importance", "--import", str(path), "--out", str(tmp_path / "out")]
    assert main.main(args) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "asks for more than numbers" in said
    assert not made.exists() and not (tmp_path / "out").exists()
    pickle.loads(path.read_bytes())
    assert made.is_dir()  # the trap was real


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_second_lock_holds_alone(protocol, tmp_path):
    content = pickle.dumps(Trap(tmp_path / "made"), protocol)
    with pytest.raises(pickle.UnpicklingError, match=r"it names \w+\.mkdir"):
        release_files._PlainUnpickler(io.BytesIO(content)).load()
    with pytest.raises(pickle.UnpicklingError, match="something outside"):
        release_files._PlainUnpickler(io.BytesIO(b"Pelsewhere\n.")).load()
    assert not (tmp_path / "made").exists()


MEMO = b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + b"."  # asks for gigabytes of memo
TOWER = b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b"."  # lists in lists in lists
TEXT = b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"short"
ITSELF = b"\x80\x02]q\x00h\x00a."  # a list that holds itself
BROKEN = {
    "nothing": (b"", "was not read"),
    "a text": (b"importance", "was not read"),
    "a memo beyond measure": (MEMO, "it numbers more than"),
    "a tower of lists": (TOWER, "more than 1000 lists"),
    "a text that is not there": (TEXT, "was not read"),
    "too large": (b"\x80\x02]" + b"K\x01" * 2_000_000, "larger than 4 MB"),
    "something after its end": (b"\x80\x02].cos\nsystem\n.", "bytes follow its end"),
    "a list in itself": (ITSELF, "expected a dictionary"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_plain_pickle_is_refused_in_one_line(name, tmp_path):
    what, why = BROKEN[name]
    with pytest.raises(UserError, match=why) as refusal:
        release_files.read(write(tmp_path / "x.pkl", what))
    assert "\n" not in str(refusal.value)


def test_a_file_cut_short_anywhere_is_refused(scores, tmp_path):
    whole = pickle.dumps(content(scores), 3)
    for end in (*range(0, len(whole), 41), len(whole) - 1):
        with pytest.raises(UserError):
            release_files.read(write(tmp_path / "x.pkl", whole[:end]))


ROWS = [[2.0, 1.0], [3.0, 0.5]]
IDX = [[0, 1], [1, 0]]
WRONG = {
    "a list": ([1.0], "dictionary"),
    "another key": ({"importance": ROWS, "order": IDX}, "dictionary"),
    "a key too many": ({"importance": ROWS, "idx": IDX, "n": 3}, "dictionary"),
    "no layer": ({"importance": [], "idx": []}, "'importance' must be lists"),
    "empty layers": ({"importance": [[], []], "idx": [[], []]}, "'importance' must be lists"),
    "whole numbers": ({"importance": [[2, 1], [3, 0]], "idx": IDX}, "lists of floats"),
    "ragged layers": ({"importance": [[2.0, 1.0], [3.0]], "idx": IDX}, "all of one length"),
    "lists for numbers": ({"importance": [[[2.0], 1.0], [3.0, 1.0]], "idx": IDX}, "of floats"),
    "fractions of neurons": ({"importance": ROWS, "idx": [[0.0, 1.0], [1, 0]]}, "lists of ints"),
    "fewer layers of neurons": ({"importance": ROWS, "idx": IDX[:1]}, r"\(2, 2\) scores"),
    "not a number": ({"importance": [[2.0, float("nan")], ROWS[1]], "idx": IDX}, "not finite"),
    "below zero": ({"importance": [[2.0, -1.0], ROWS[1]], "idx": IDX}, "negative"),
    "ascending": ({"importance": [[1.0, 2.0], ROWS[1]], "idx": IDX}, "highest to the lowest"),
    "a neuron twice": ({"importance": ROWS, "idx": [[0, 0], [1, 0]]}, "each of the 2 neurons"),
    "a neuron beyond": ({"importance": ROWS, "idx": [[0, 2], [1, 0]]}, "each of the 2 neurons"),
    "only zeros": ({"importance": [[0.0, 0.0], ROWS[1]], "idx": IDX}, "no score above zero"),
}


@pytest.mark.parametrize("name", WRONG)
def test_numbers_that_are_no_scores_are_refused(name, tmp_path):
    what, why = WRONG[name]
    with pytest.raises(UserError, match=why):
        release_files.read(write(tmp_path / "x.pkl", what))


def test_a_folder_without_files_is_refused_and_no_folder_is_no_file(tmp_path):
    assert release_files.read_folder("") == {}
    with pytest.raises(UserError, match=r"no importance_\*\.pkl"):
        release_files.read_folder(tmp_path)
    with pytest.raises(UserError, match="no file"):
        release_files.read(tmp_path / "importance_rte.pkl")


@pytest.mark.parametrize("width", [64, 1536, 3072, 4096])
def test_proportions_are_a_sixth_and_a_half(width):
    n_shared, n_kept = release_files.proportions(width)
    assert n_shared == pytest.approx(width / 6, abs=1)
    assert n_kept == pytest.approx(width / 2, abs=4)


def test_equal_scores_hold_what_they_are_many_of(tmp_path):
    held = release_files.shares(
        release_files.read(write(tmp_path / "x.pkl", content(np.ones((3, 48)))))
    )
    assert held == pytest.approx((1 / 6, 1 / 2, 1 / 2))


def test_curves_pass_through_the_shares(scores, tmp_path):
    one = release_files.read(write(tmp_path / "x.pkl", content(scores)))  # 24 neurons: 4 and 12
    curve = release_files.mass_curves({"x": one, "y": one})["x"]
    assert (curve[0], curve[50], curve[100]) == pytest.approx(
        (0, 100 * release_files.shares(one).kept, 100)
    )
    assert (curve.diff().dropna() >= 0).all() and (curve.diff().diff().dropna() < 1e-9).all()


def test_layers_count_by_their_importance():
    scores = torch.ones(2, 48, dtype=torch.float64)
    scores[1, 8:] = 0
    scores[1, :8] = 48 / 8  # as much as the first layer, all of it in the top sixth
    for factor in (1, 3):
        importance = Importance(scores * torch.tensor([[factor], [1]]), scores[:0], scores[:0, 0])
        assert release_files.shares(importance).shared == pytest.approx(
            (factor / 6 + 1) / (factor + 1)
        )


def test_scores_per_example_are_alike_for_the_split_they_came_from():
    sizes = paper_numbers.TABLE6 | paper_numbers.TABLE5
    files = {
        task: Importance(torch.full((1, 4), 2.5 * development), None, None)
        for task, (_, development) in sizes.items()
    }
    table = release_files.per_example({**files, "another": files["rte"]})
    assert list(table["task"]) == list(sizes)
    assert table["development"].tolist() == pytest.approx([10.0] * len(sizes))
    assert table["training"].max() / table["training"].min() > 5


def test_the_command_converts_a_file_that_convert_accepts(tmp_path, tiny_bert, rng, capsys):
    path = write(tmp_path / "importance_x.pkl", content(rng.exponential(size=(2, 64))))
    out = tmp_path / "x.safetensors"
    assert main.main(["importance", "--import", str(path), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 layers of 64 neurons" in said and str(out) in said
    assert hashlib.sha256(path.read_bytes()).hexdigest() in said
    held = release_files.shares(release_files.read(path))
    assert re.search(rf"top 10\D* {held.shared:.1%}", said)
    assert re.search(rf"kept 34\D* {held.kept:.1%}", said)
    from moebert_lib import to_moebert
    from moebert_lib.model.moe_layer import moe_layers

    scores = Importance.load(out)
    model = to_moebert(tiny_bert(), scores)
    assert all(
        (scores.ranking[layer, :10] == one.neurons[:, :10]).all()
        for layer, one in enumerate(moe_layers(model))
    )


@pytest.mark.parametrize(
    "option",
    [["--task", "rte"], ["--scale", "smoke"], ["-p", "seed=1"], ["--data-dir", "x"]],
    ids=lambda option: option[0],
)
def test_import_takes_no_option_of_scoring(option, tmp_path, scores, capsys):
    path = write(tmp_path / "x.pkl", content(scores))
    args = ["importance", "--import", str(path), "--out", str(tmp_path / "out"), *option]
    assert main.main(args) == 2
    assert f"leave {option[0]} out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_figure_of_switches_shows_every_pair_and_their_mean():
    rows = pd.DataFrame({"switch": ["b", "b", "a"], "difference": [1.0, 3.0, -2.0]})
    ax = results.switches(rows)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]
    assert drawn_points(ax)[:, 0].tolist() == [1.0, 3.0, -2.0]
    assert drawn_bars(ax, rows=True)[0] == (0, 2.0)
    low, high = ax.get_xlim()
    assert low == -high and high > 3


def test_the_figure_of_files_draws_their_curves(scores, tmp_path):
    one = release_files.read(write(tmp_path / "x.pkl", content(scores)))
    curves = release_files.mass_curves({"rte": one})
    ax = plots_release.mass_by_file(curves, marks={"kept": 50})
    drawn = [list(line.get_ydata()) for line in ax.get_lines()]
    assert curves["rte"].tolist() in drawn
