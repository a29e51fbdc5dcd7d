"""Scales, changes and refusals of Settings."""

import re

import pytest

from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.paper_numbers import TABLE7
from moebert_lib.config.presets import MINILM, MPNET, RELEASE, SCALES, SHAPES
from moebert_lib.config.settings import Settings, check_sizes


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_valid(scale):
    assert Settings.at(scale).scale == scale


def test_defaults_are_the_papers_proportions():
    settings = Settings.at("paper")
    assert settings.model == "bert-base-uncased" and settings.n_experts == 4
    assert settings.sizes(3072) == (768, 512) and settings.sizes(1536) == (384, 256)


def test_paper_scale_takes_table_7():
    settings = Settings.at("paper", task="rte")
    assert (settings.learning_rate, settings.batch_size, settings.epochs) == (1e-5, 8, 10)
    assert (settings.weight_decay, settings.distill_weight, settings.max_length) == (0.01, 1.0, 512)
    assert Settings.at("paper", task="mnli").distill_weight == 5.0
    assert Settings.at("paper", task="rte", epochs=1).epochs == 1


@pytest.mark.parametrize("task", TABLE7)
def test_scale_base_is_offline_and_has_the_papers_sizes_and_lambda(task):
    settings = Settings.at("base", task=task)
    assert settings.model == MPNET and settings.offline and not settings.brief
    assert settings.sizes(SHAPES[MPNET].neurons) == (768, 512)
    assert settings.distill_weight == TABLE7[task]["distill_weight"]
    assert settings.importance_split == "held-out" and settings.held_out > 0


def test_an_empty_task_is_the_scales_own():
    assert Settings.at("small", task="").task == "sst2"


def test_changes_are_validated_again():
    settings = Settings.at("quick")
    assert settings.but(seed=3).seed == 3 and settings.seed == 0
    with pytest.raises(UserError, match="did you mean 'seed'"):
        settings.but(sead=3)
    with pytest.raises(UserError, match="n_shared=400 exceeds expert_size=384"):
        settings.but(n_shared=400)


def test_settings_are_frozen_and_hashable():
    settings = Settings.at("quick")
    with pytest.raises(Exception, match="frozen"):
        settings.seed = 3
    assert hash(settings) == hash(Settings.at("quick"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scale="quik"), "unknown scale 'quik'; did you mean 'quick'"),
        (dict(routing="hash-randm"), "routing='hash-randm': did you mean 'hash-random'"),
        (dict(seed="three"), "seed='three': input should be a valid integer"),
        (dict(seed=-1), "seed=-1: input should be greater than or equal to 0"),
        (dict(epochs=0), "epochs=0: input should be greater than 0"),
        (dict(epoch=1), "unknown setting 'epoch'; did you mean 'epochs'"),
        (dict(expert_size=900, n_shared=600), "need 1800 neurons.*has 1536.*that fits is 834"),
        (dict(n_experts=8, expert_size=384, n_shared=0), "largest expert_size that fits is 192"),
        (dict(dtype="bfloat61"), "dtype='bfloat61': did you mean 'bfloat16'"),
        (dict(tokens_per_batch=40), "tokens_per_batch=40 cannot hold.*expected max_length=48 or"),
        (
            dict(tokens_per_batch=0),
            "tokens_per_batch=0: input should be greater than or equal to 8",
        ),
        (dict(cache_teacher=True, teacher_dropout=True), "expected teacher_dropout=False"),
    ],
)
def test_what_is_refused_and_how(changes, message):
    with pytest.raises(UserError, match=message) as refusal:
        Settings.at(**{"scale": "quick", **changes})
    assert "\n" not in str(refusal.value)


def test_the_size_it_names_fits():
    assert Settings.at("quick", expert_size=834, n_shared=600).sizes(1536) == (834, 600)


@pytest.mark.parametrize("width, n_experts", [(1536, 4), (64, 5), (64, 40), (7, 3)])
def test_the_size_it_names_is_the_largest_with_two_thirds_shared(width, n_experts):
    with pytest.raises(ValueError, match="largest expert_size") as refusal:
        check_sizes(width, n_experts, width)
    named = int(re.search(r"fits is (\d+)", str(refusal.value))[1])
    check_sizes(width, n_experts, named)
    for size in range(named + 1, width + 1):
        with pytest.raises(ValueError, match=f"fits is {named}"):
            check_sizes(width, n_experts, size)


def test_too_many_experts_are_told_how_many_fit():
    with pytest.raises(ValueError, match="largest n_experts that fits is 64"):
        check_sizes(64, 100)
    with pytest.raises(ValueError, match="largest n_experts that fits is 30"):
        check_sizes(64, 100, 6)  # 4 shared, 2 own
    check_sizes(64, 30, 6)
    with pytest.raises(ValueError, match="an expert holds at most 64"):
        check_sizes(64, 100, 70)


def test_an_unknown_model_is_checked_later():
    assert Settings.at("quick", model="some/bert", expert_size=5000).model != MINILM


def test_nearest_prefers_the_close_one():
    assert nearest("SST2", ["sst2", "rte"]) == "did you mean 'sst2'?"


@pytest.mark.parametrize("scale", SCALES)
def test_the_preset_sets_every_switch_that_was_not_given(scale):
    released = Settings.at(scale, preset="release")
    assert {name: getattr(released, name) for name in RELEASE} == RELEASE
    assert Settings.at(scale, preset="release", gate_scaling="inside").gate_scaling == "inside"
    assert Settings.at(scale).but(preset="release") == released
    assert released.but(preset="paper") == Settings.at(scale)


def test_bert_large_at_paper_scale_shares_what_the_paper_shares():
    large = Settings.at("paper", task="rte", model="bert-large-uncased")
    assert large.sizes(4096) == (1024, 512)
    assert Settings.at("paper", task="squad").max_length == 384
