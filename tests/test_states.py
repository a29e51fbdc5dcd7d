"""States of sentences, and the planes they are looked at in."""

import numpy as np
import pytest
import torch

from moebert_lib.model.accelerate import accelerate_if_exact
from moebert_lib.training.evaluation import planes, sentence_states


@pytest.fixture
def states(rng):
    return {"teacher": rng.normal(size=(2, 9, 5)), "distilled": rng.normal(size=(2, 9, 5))}


def test_a_sentences_state_is_the_mean_over_its_real_tokens_in_the_datasets_order(
    tiny_bert, tiny_batch
):
    model, batch = tiny_bert(), tiny_batch(n=3)
    order = torch.tensor([2, 0, 1])
    batches = [{**{k: v[order] for k, v in batch.items()}, "index": order}]
    hidden = model(**batch, output_hidden_states=True).hidden_states
    lengths = batch["attention_mask"].sum(1).tolist()
    slow = [[h[i, :n].mean(0).tolist() for i, n in enumerate(lengths)] for h in hidden]
    for each in (model, accelerate_if_exact(model)):
        assert np.allclose(sentence_states(each, batches), slow, atol=1e-5)


def test_the_plane_is_that_of_the_two_main_directions(states):
    own = states["teacher"][1] - states["teacher"][1].mean(0)
    _, sizes, directions = np.linalg.svd(own)
    frame = planes(states).query("layer == 1 and stage == 'teacher'")
    expected = own @ directions[:2].T
    assert np.allclose(np.abs(frame[["x", "y"]]), np.abs(expected))
    assert frame["seen"].iloc[0] == pytest.approx((sizes[:2] ** 2).sum() / (sizes**2).sum())


def test_a_student_is_seen_in_its_teachers_plane(states):
    states["distilled"] = states["teacher"] + 0.0
    frame = planes(states).pivot(index=["layer", "sentence"], columns="stage", values=["x", "y"])
    assert np.allclose(frame.xs("teacher", axis=1, level=1), frame.xs("distilled", axis=1, level=1))
    shift = np.zeros(5)
    moved = planes({**states, "distilled": states["teacher"] + shift + 1e3})
    assert moved.query("stage == 'distilled'")["x"].abs().min() > 10


@pytest.mark.parametrize("own", [np.ones((2, 1, 5)), np.ones((2, 4, 5))])
def test_where_there_is_no_spread_there_is_no_plane(own):
    frame = planes({"teacher": own, "distilled": own + 1})
    assert (frame[["x", "y", "seen"]] == 0).all(axis=None)
