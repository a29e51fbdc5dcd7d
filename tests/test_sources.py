"""Sources: parameters as a converted model has them, what the store knows, files, refusals."""

import time
from dataclasses import replace

import pytest
import torch
from conftest import make_home
from tiny_spans import span_bert

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import student, teacher
from moebert_lib.explore import score_sources
from moebert_lib.explore.score_sources import ACTIVE, EQ4, LARGE
from moebert_lib.method import encoder_layouts
from moebert_lib.method.importance import Importance
from moebert_lib.model.moe_layer import parameter_counts
from moebert_lib.store.store import Store

SMOKE = Settings.at("smoke")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A home with the smoke scale's source in it, and the source."""
    home = make_home(tmp_path_factory.mktemp("sources") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBERT_HOME", str(home))
        return home, score_sources.from_settings(Store(), SMOKE)


@pytest.fixture
def mine(made, monkeypatch):
    """The source, in the home that it was made in."""
    monkeypatch.setenv("MOEBERT_HOME", str(made[0]))
    return made[1]


@pytest.mark.parametrize("sizes", [(4, 16, 10), (2, 20, 20), (8, 8, 0), (1, 64, 0)])
def test_parameters_are_those_of_the_converted_model(mine, sizes):
    named = dict(zip(("n_experts", "expert_size", "n_shared"), sizes, strict=True))
    model = student.converted(Store(), SMOKE.but(**named))
    assert mine.parameters(*sizes[:2]) == parameter_counts(model)


def test_without_experts_they_are_the_teachers(mine):
    n = sum(p.numel() for p in teacher.teacher(Store(), SMOKE).model.parameters())
    assert mine.parameters(0, 0) == (n, n)


@pytest.mark.parametrize("head", [1, 2, 6, "span"])
def test_a_head_is_counted_from_the_config_alone(head, tiny_bert, tmp_path):
    span = head == "span"
    model = span_bert(tiny_bert()) if span else tiny_bert(num_labels=head)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    without = encoder_layouts.parameters(encoder_layouts.shape(str(tmp_path)))[1]
    true = sum(parameter.numel() for parameter in model.parameters())
    assert without + score_sources.head_parameters(tmp_path) == true


def test_scores_are_eq_4_first_then_those_of_the_pass(mine):
    assert list(mine.scores) == [EQ4, ACTIVE, LARGE]
    assert (mine.scores[EQ4] == teacher.importance(Store(), SMOKE).scores.numpy()).all()
    assert {scores.shape for scores in mine.scores.values()} == {(2, 64)}


def test_accuracies_are_those_of_the_conversions_at_their_sizes(mine):
    assert len(mine.accuracy) == 16  # 12 sizes, four of them twice
    found = mine.nearest(4, 16, 11)
    assert found[["n_experts", "expert_size", "n_shared"]].drop_duplicates().values.tolist() == [
        [4, 16, 11]
    ]
    points = [SMOKE.but(n_experts=4, expert_size=16, n_shared=11, seed=seed) for seed in (0, 1)]
    assert sorted(found["value"]) == sorted(
        student.conversion(Store(), p)[mine.metric] for p in points
    )


def test_sizes_between_are_given_the_nearest(mine):
    row = mine.nearest(7, 9, 1).iloc[0]
    assert (row["n_experts"], row["expert_size"], row["n_shared"]) == (8, 8, 0)


def test_one_expert_is_compared_as_experts_that_share_everything(mine):
    one, all_shared = mine.nearest(1, 16, 0), mine.nearest(4, 16, 16)
    assert one.equals(all_shared) and set(one["n_experts"]) == {4}
    assert set(one["n_shared"]) == {mine.accuracy.query("expert_size == 16")["n_shared"].max()}


def test_the_size_of_an_expert_comes_before_what_it_shares(mine):
    row = mine.nearest(8, 30, 0).iloc[0]
    assert (row["n_experts"], row["expert_size"], row["n_shared"]) == (2, 32, 0)


def test_the_store_offers_the_same_source_by_the_same_name(mine):
    (found,) = score_sources.from_store(Store())
    assert found.name == mine.name == "library · smoke, seed 0, tiny"
    assert (found.scores[EQ4] == mine.scores[EQ4]).all() and found.dense == mine.dense
    assert found.accuracy.equals(mine.accuracy) and found.head == mine.head


def test_beside_a_source_stand_the_others(mine, monkeypatch):
    other = replace(mine, origin="another", name="other")
    monkeypatch.setattr(score_sources, "from_store", lambda store: [other, mine])
    assert [s.name for s in score_sources.beside(Store(), mine)] == [mine.name, "other"]


def test_the_store_lists_the_newest_first(moebert_home):
    for seed in (1, 2):
        teacher.importance(Store(), SMOKE.but(teacher_seed=seed))
        time.sleep(1.1)  # entries are dated to the second
    assert [s.about["seed"] for s in score_sources.from_store(Store())] == [2, 1]


def test_one_scored_but_not_explored_says_why_no_tokens_are_known(moebert_home):
    teacher.importance(Store(), SMOKE)
    (found,) = score_sources.from_store(Store())
    assert list(found.scores) == [EQ4] and "notebook 1" in found.silent
    assert found.nearest(4, 16, 10).empty


def test_an_empty_home_offers_nothing(moebert_home):
    assert score_sources.from_store(Store()) == []


def test_names_that_are_the_same_are_numbered(mine):
    assert [s.name for s in score_sources.distinct([mine, mine])] == [mine.name, f"{mine.name} (2)"]


def test_a_saved_file_brings_its_scores_and_says_that_it_has_no_model(tmp_path):
    scores = torch.rand(12, 3072, dtype=torch.float64)
    empty = torch.zeros(0, 12, 3072), torch.zeros(0, dtype=torch.int64)
    Importance(scores, *empty, {"task": "rte"}).save(tmp_path / "mine.safetensors")
    found = score_sources.from_file(tmp_path / "mine.safetensors")
    assert (found.scores[EQ4] == scores.numpy()).all() and found.about["task"] == "rte"
    assert "mine.safetensors" in found.silent and found.parameters(4, 768).effective < 1e8


def test_layers_of_no_known_model_have_no_parameters(tmp_path):
    scores = torch.rand(3, 50, dtype=torch.float64)
    blocks = scores[None].clone()
    Importance(scores, blocks, torch.ones(1, dtype=torch.int64)).save(tmp_path / "a.safetensors")
    assert score_sources.from_file(tmp_path / "a.safetensors").parameters(4, 12) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.pkl", r"no file .*none.pkl.*did you mean 'nine.pkl'"),
        ("nine.pkl", r"nine.pkl"),
        ("notes.txt", r"notes.txt: expected scores ending in .safetensors or .pkl"),
        ("torn.safetensors", r"torn.safetensors is not an importance file"),
    ],
)
def test_what_is_no_file_of_scores_is_refused_in_one_line(tmp_path, name, message):
    for there in ("nine.pkl", "notes.txt", "torn.safetensors"):
        (tmp_path / there).write_text("nothing")
    with pytest.raises(UserError, match=message) as refused:
        score_sources.from_file(tmp_path / name)
    assert "\n" not in str(refused.value)
