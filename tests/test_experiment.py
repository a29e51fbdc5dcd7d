"""The unit experiment at scale smoke: made once, shared, repeated exactly."""

import numpy as np
import pytest
import torch

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import dataset, teacher
from moebert_lib.experiments import student as experiment
from moebert_lib.experiments.ablations import points
from moebert_lib.model.moe_layer import moe_layers
from moebert_lib.store.store import StageKey, Store
from moebert_lib.training import checkpoints
from moebert_lib.training.evaluation import score, sentence_states

SETTINGS = Settings.at("smoke")


def forget():
    """As a new process would start: nothing in memory, only what the store holds."""
    for cached in (teacher._teacher, teacher._importance, dataset._dataset):
        cached.cache_clear()


@pytest.fixture
def home(moebert_home):
    """A store of this test's own."""
    forget()
    yield moebert_home
    forget()


@pytest.fixture(scope="module")
def shared():
    """The session's store, for tests that do not mind what lies in it: one teacher for all."""
    forget()


def count(kind):
    return len(Store().entries(kind))


def test_a_student_is_made_once_and_then_reused(home, capsys):
    first = experiment.student(Store(), SETTINGS)
    forget()
    again = experiment.student(Store(), SETTINGS)
    assert not first.entry.reused and again.entry.reused
    assert first.row == again.row and first.curve.equals(again.curve)
    kinds = ("teacher", "importance", "converted", "student")
    assert [count(kind) for kind in kinds] == [1, 1, 1, 1]


def test_a_model_that_is_fine_tuned_already_is_the_teacher_as_it_is(shared):
    made = teacher.teacher(Store(), SETTINGS)
    given = SETTINGS.but(model=str(made.entry.folder), teacher_epochs=0)
    again = teacher.teacher(Store(), given)
    assert again.metrics == made.metrics
    pairs = zip(again.model.parameters(), made.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_a_model_that_was_never_fine_tuned_or_on_another_task_is_refused(shared):
    with pytest.raises(UserError, match="random weights; expected teacher_epochs above 0"):
        teacher.teacher(Store(), SETTINGS.but(teacher_epochs=0))
    folder = str(teacher.teacher(Store(), SETTINGS).entry.folder)
    with pytest.raises(UserError, match="6 outputs, task 'acceptability' needs 2"):
        teacher.teacher(Store(), SETTINGS.but(model=folder, task="acceptability", teacher_epochs=0))


def test_ablations_share_teacher_and_importance(home):
    points = [SETTINGS.but(n_shared=n, seed=seed) for n in (0, 8) for seed in (0, 1)]
    frame = experiment.grid(Store(), points)
    assert (count("teacher"), count("importance"), count("student")) == (1, 1, 4)
    assert frame["n_shared"].tolist() == [0, 0, 8, 8] and frame["seed"].tolist() == [0, 1, 0, 1]


def test_a_grid_runs_only_what_is_missing(home, capsys):
    experiment.grid(Store(), [SETTINGS])
    experiment.grid(Store(), [SETTINGS, SETTINGS.but(distill="last"), SETTINGS])
    assert "3 points, 1 run now, 2 reused" in capsys.readouterr().out
    assert count("student") == 2


def test_a_row_holds_what_the_notebooks_draw(shared):
    row = experiment.student(Store(), SETTINGS).row
    assert {"teacher_accuracy", "converted_accuracy", "accuracy", "steps"} <= set(row)
    assert row["effective_parameters"] < row["stored_parameters"]


def test_conversion_leaves_the_embeddings_and_moves_the_layers(shared):
    apart = experiment.distances(Store(), SETTINGS, experiment.converted(Store(), SETTINGS))
    assert apart.shape == (3,) and apart[0] == 0 < apart[2]
    student = experiment.student(Store(), SETTINGS, keep_model=True)
    again = experiment.distances(Store(), SETTINGS, student.model())
    assert student.distances.tolist() == pytest.approx(again.tolist(), rel=1e-5)


def test_a_students_states_are_those_of_its_model_beside_its_teachers(shared):
    model = experiment.student(Store(), SETTINGS, keep_model=True).model()
    found = experiment.states(Store(), SETTINGS)
    batches = dataset.dataset(SETTINGS).batches("validation", limit=experiment.NEAR)
    again = sentence_states(model, batches)
    assert {values.shape for values in found.values()} == {again.shape}
    assert found["distilled"] == pytest.approx(again, abs=5e-3)  # kept in float16
    assert (found["teacher"][0] == found["converted"][0]).all()
    assert (found["teacher"][1:] != found["converted"][1:]).any()


@pytest.mark.parametrize("task", ["passage", "squad_v2", "mnli", "stsb"])
def test_every_kind_of_task_goes_the_whole_way(shared, tiny_glue, task):
    data_dir = "" if task == "passage" else str(tiny_glue)
    settings = Settings.at("smoke", task=task, data_dir=data_dir, doc_stride=8, max_length=48)
    row, bundle = (
        experiment.student(Store(), settings, keep_model=True).row,
        dataset.dataset(settings),
    )
    names = [*bundle.task.metrics, *(["accuracy_mismatched"] if task == "mnli" else [])]
    assert {f"{when}{name}" for name in names for when in ("", "teacher_", "converted_")} <= set(
        row
    )
    model = experiment.student(Store(), settings).model()
    assert teacher.evaluate(settings, model) == {name: row[name] for name in names}
    said, truths = experiment.answers(Store(), settings), bundle.truths()
    assert len(said) == len(truths) == len(bundle.examples["validation"])
    assert said["distilled"].tolist() == list(teacher.evaluate_with_answers(settings, model)[1])
    assert judged_again(settings, bundle.task) == {name: row[name] for name in names}


def judged_again(settings, task):
    """A student's metrics from what is stored of it, without its model and without data."""
    kept = teacher.predictions(experiment.student(Store(), settings).entry)
    splits = dict.fromkeys(name.split(".")[0] for name in kept)
    suffixes = {split: "" if split == "validation" else f"_{split}" for split in splits}
    if task.kind == "span":
        return {name: kept[f"validation.{name}"].mean() for name in task.metrics}
    right, found = teacher.right_answers(Store(), settings), {}
    for split, suffix in suffixes.items():
        answers, logits = kept[f"{split}.answers"], kept[f"{split}.logits"]
        near = logits[:, 0] if task.kind == "regression" else logits.argmax(1)
        assert logits.dtype == np.float16 and near == pytest.approx(answers, abs=1e-2)
        scores = score(answers, right[split], task.metrics)
        found |= {f"{name}{suffix}": value for name, value in scores.items()}
    return found


def test_a_student_is_scored_on_the_way_and_its_row_keeps_each_point(shared):
    settings = SETTINGS.but(epochs=2.0, learning_rate=1e-2, score_at=[0.25, 1, 2])
    student = experiment.student(Store(), settings, keep_model=True)
    kept, right = teacher.predictions(student.entry), teacher.right_answers(Store(), settings)
    for point in ("0.25", "1", "2"):
        answers = kept[f"validation.answers.at_{point}"]
        assert score(answers, right["validation"], ["accuracy"]) == {
            "accuracy": student.row[f"accuracy_at_{point}"]
        }
    last, whole = kept["validation.logits.at_2"], kept["validation.logits"]
    assert last == pytest.approx(whole, abs=1e-2)
    assert abs(kept["validation.logits.at_0.25"] - whole).max() > 0.1


def test_a_student_that_dies_on_the_way_keeps_the_points_that_were_scored(home, monkeypatch):
    settings = SETTINGS.but(epochs=2.0, score_at=[0.25, 2])
    monkeypatch.setenv(checkpoints.VARIABLE, "0")
    score_point, scored = experiment._score_point, []

    def dies(settings, points, epoch, model):
        scored.append(epoch)
        if scored == [0.25, 2]:
            raise KeyboardInterrupt
        score_point(settings, points, epoch, model)

    monkeypatch.setattr(experiment, "_score_point", dies)
    with pytest.raises(KeyboardInterrupt):
        experiment.student(Store(), settings)
    row = experiment.student(Store(), settings).row
    assert scored == [0.25, 2, 2] and {"accuracy_at_0.25", "accuracy_at_2"} <= set(row)


def test_settings_are_chosen_on_what_is_held_out(shared):
    """Neither teacher nor student sees the development set, and importance is scored apart."""
    settings = SETTINGS.but(held_out=0.25, evaluate_on="held-out", importance_split="held-out")
    bundle = dataset.dataset(settings)
    assert (len(bundle.train), len(bundle.validation), bundle.judged) == (48, 16, ["validation"])
    student = experiment.student(Store(), settings)
    right = teacher.right_answers(Store(), settings)["validation"]
    assert right.tolist() == bundle.truths() and len(right) == 16
    assert teacher.importance(Store(), settings).n_examples == 16
    answers = teacher.predictions(student.entry)["validation.answers"]
    assert score(answers, right, ["accuracy"]) == {"accuracy": student.row["accuracy"]}


def test_entries_from_before_predictions_were_kept_have_none(tmp_path):
    entry = Store(tmp_path).make(StageKey("student", {"seed": 0}), lambda folder: {"accuracy": 1.0})
    assert teacher.predictions(entry) == {}


@pytest.mark.parametrize("distill", ["all", "none"])
def test_half_depth_goes_the_whole_way(shared, distill):
    settings = SETTINGS.but(student="half-depth", distill=distill, cache_teacher=distill == "all")
    student = experiment.student(Store(), settings, keep_model=True)
    assert student.model().config.num_hidden_layers == 1 and len(student.distances) == 2
    assert student.row["stored_parameters"] == student.row["effective_parameters"]
    found = experiment.states(Store(), settings)
    assert {values.shape for values in found.values()} == {found["teacher"].shape}
    assert (found["teacher"][0] == found["converted"][0]).all()
    measured = {name: student.row[name] for name in dataset.dataset(settings).task.metrics}
    assert teacher.evaluate(settings, student.model()) == measured


def test_how_experts_are_made_does_not_matter_to_half_depth():
    half = SETTINGS.but(student="half-depth")
    for changes in (dict(ranking="random"), dict(n_experts=2), dict(importance_examples=16)):
        assert experiment.student_key(Store(), half) == (
            experiment.student_key(Store(), half.but(**changes))
        )
    for changes in (dict(seed=1), dict(teacher_epochs=2.0), dict(epochs=2.0)):
        assert experiment.student_key(Store(), half) != (
            experiment.student_key(Store(), half.but(**changes))
        )


def test_the_dense_control_begins_as_its_teacher(shared):
    (control, *_) = points("controls", SETTINGS)["dense trained on"]
    row = experiment.student(Store(), control).row
    assert row["converted_accuracy"] == row["teacher_accuracy"]
    model = experiment.converted(Store(), control)
    apart = experiment.distances(Store(), control, model)
    assert apart.tolist() == pytest.approx([0] * 3, abs=1e-9)


def test_same_settings_same_numbers_in_another_store(home, tmp_path, monkeypatch):
    first = experiment.student(Store(), SETTINGS)
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path))
    forget()
    second = experiment.student(Store(), SETTINGS)
    assert not second.entry.reused
    assert first.row == second.row and first.curve.equals(second.curve)


@pytest.mark.parametrize(
    "changes",
    [
        dict(importance_split="validation"),
        dict(held_out=0.1),
        dict(importance_examples=16),
        dict(dropout=0.0),
    ],
)
def test_importance_depends_on_its_settings(changes):
    changed = SETTINGS.but(**changes)
    assert teacher.importance_key(Store(), changed) != teacher.importance_key(Store(), SETTINGS)


@pytest.mark.parametrize(
    "changes",
    [
        dict(dtype="bfloat16"),
        dict(tokens_per_batch=99),
        dict(cache_teacher=True),
        dict(warmup=0.1),
        dict(schedule="constant"),
        dict(score_at=[0.5]),
        dict(student_dropout=0.0),
        dict(hidden_loss_mean="examples"),
    ],
)
def test_a_student_depends_on_how_its_training_is_computed(changes):
    changed = SETTINGS.but(**changes)
    assert experiment.student_key(Store(), changed) != experiment.student_key(Store(), SETTINGS)
    same = teacher.teacher_key(Store(), changed) == teacher.teacher_key(Store(), SETTINGS)
    assert same == ("dtype" not in changes)


def test_a_teacher_depends_on_its_warm_up():
    changed = SETTINGS.but(teacher_warmup=0.1)
    assert teacher.teacher_key(Store(), changed) != teacher.teacher_key(Store(), SETTINGS)


@pytest.mark.parametrize("changes", [dict(seed=5), dict(distill="last"), dict(n_experts=2)])
def test_the_teacher_does_not_depend_on_the_student(changes):
    changed = teacher.teacher_key(Store(), SETTINGS.but(**changes))
    assert changed == teacher.teacher_key(Store(), SETTINGS)


def test_a_random_split_needs_no_scores(home):
    experiment.conversion(Store(), SETTINGS.but(ranking="random"))
    assert count("importance") == 0 and count("converted") == 1


def test_conversion_is_the_metric_of_the_converted_model(shared):
    model = experiment.converted(Store(), SETTINGS)
    assert experiment.conversion(Store(), SETTINGS) == teacher.evaluate(SETTINGS, model)
    assert [tuple(layer.neurons.shape) for layer in moe_layers(model)] == [(4, 16)] * 2


def test_rankings_give_other_experts(shared):
    kinds = ("importance", "random", "inverse")
    dealt = [
        moe_layers(experiment.converted(Store(), SETTINGS.but(ranking=k)))[0].neurons for k in kinds
    ]
    assert not torch.equal(dealt[0], dealt[1]) and not torch.equal(dealt[0], dealt[2])
    shared = [set(rows[0, :10].tolist()) for rows in dealt]
    assert not shared[0] & shared[2]  # the most and the least important


def test_a_kept_model_is_the_one_that_was_measured(shared):
    kept = experiment.student(Store(), SETTINGS.but(routing="gate-token"), keep_model=True)
    measured = {name: kept.row[name] for name in dataset.dataset(SETTINGS).task.metrics}
    assert teacher.evaluate(SETTINGS, kept.model()) == measured
    assert experiment.student(Store(), SETTINGS.but(routing="gate-token")).entry.reused


def test_balanced_routing_counts_the_training_tokens(shared):
    counts = dataset.token_frequencies(SETTINGS)
    ids = [token for row in dataset.dataset(SETTINGS).train["input_ids"] for token in row]
    assert int(counts.sum()) == len(ids) and int(counts[ids[0]]) == ids.count(ids[0])
    experiment.conversion(Store(), SETTINGS.but(routing="hash-balance"))


def test_one_line_says_what_is_run(shared):
    line = dataset.provenance_line(Store(), SETTINGS)
    assert "\n" not in line and "smoke" in line and "library" in line and "64 training" in line
