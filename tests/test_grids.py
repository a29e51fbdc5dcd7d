"""What notebooks ask for, and what a plan makes of it: every run once, as the store counts."""

import itertools
from types import SimpleNamespace

import pytest
from checkout import NOTEBOOKS

from moebert_lib.config.errors import UserError
from moebert_lib.config.paper_numbers import FIGURE_SETTINGS, FIGURES, TABLE7
from moebert_lib.config.presets import BASE, LARGE
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import ablations, student
from moebert_lib.method.routing import ROUTINGS
from moebert_lib.runs import cost
from moebert_lib.runs import plan as planning
from moebert_lib.store.store import Store


@pytest.fixture
def paper_plan(moebert_home) -> list[cost.Run]:
    """All runs of the whole workbook at scale paper."""
    jobs = planning.plan(NOTEBOOKS, scale="paper")
    return [run for new in cost.runs(jobs) for run in new]


def students(plan, **settings):
    """Students of a plan whose settings have these values."""
    return [
        run
        for run in plan
        if run.stage == "student"
        and all(getattr(run.settings, name) == v for name, v in settings.items())
    ]


def usual(plan, task, model=BASE):
    """Students with the scale's own settings."""
    own = Settings.at("paper", task=task, model=model)
    width = 4096 if model == LARGE else 3072
    varied = (
        "n_experts",
        "ranking",
        "grouping",
        "routing",
        "distill",
        "preset",
        "gate_scaling",
        "teacher_dropout",
        "padding_in_loss",
        "shared_neurons",
        "expert_layer_norm",
        "importance_split",
    )
    same = {name: getattr(own, name) for name in varied} | {"task": task, "model": model}
    return [r for r in students(plan, **same) if r.settings.sizes(width) == own.sizes(width)]


@pytest.mark.parametrize("task", TABLE7)
def test_the_paper_plan_trains_each_task_of_tables_1_and_2_with_three_seeds(paper_plan, task):
    found = usual(paper_plan, task)
    assert sorted(run.settings.seed for run in found) == [0, 1, 2]
    for run in found:
        asked = {name: getattr(run.settings, name) for name in TABLE7[task]}
        assert asked == TABLE7[task]


@pytest.mark.parametrize("task", ablations.TABLE3_TASKS)
def test_it_has_table_3s_plain_training(paper_plan, task):
    plain = students(paper_plan, task=task, distill="none", model=BASE)
    assert sorted(run.settings.seed for run in plain) == [0, 1, 2]


@pytest.mark.parametrize("task", ablations.TABLE4_TASKS)
def test_it_has_table_4s_large_models_with_their_experts(paper_plan, task):
    found = usual(paper_plan, task, LARGE)
    assert sorted(run.settings.seed for run in found) == [0, 1, 2]
    assert {run.settings.sizes(4096) for run in found} == {(1024, 512)}


def spelt_out(run) -> dict:
    """A run's settings, sizes left to the paper's proportions worked out."""
    sizes = zip(("expert_size", "n_shared"), run.settings.sizes(3072), strict=True)
    return run.settings.model_dump() | dict(sizes)


@pytest.mark.parametrize("figure", FIGURE_SETTINGS)
def test_it_has_every_point_of_every_figure_three_times(paper_plan, figure):
    setting = FIGURE_SETTINGS[figure]
    on_mnli = students(paper_plan, task="mnli", model=BASE)
    for value in FIGURES[figure]:
        found = [run.settings.seed for run in on_mnli if spelt_out(run)[setting] == value]
        assert set(found) == {0, 1, 2}, value


def test_no_run_comes_twice(paper_plan):
    keys = [run.key for run in paper_plan]
    assert len(set(keys)) == len(keys)


def test_every_student_has_its_teacher_and_scores_in_the_plan(paper_plan):
    made = {run.key for run in paper_plan}
    for run in students(paper_plan):
        assert cost.Run("teacher", run.settings).key in made
        assert run.settings.ranking == "random" or (
            cost.Run("importance", run.settings).key in made
        )


def test_two_points_are_one_run_exactly_if_the_store_has_one_key_for_them():
    base = Settings.at("smoke")
    points = [
        base,
        base.but(split_seed=3),
        base.but(seed=1),
        base.but(ranking="random"),
        base.but(ranking="random", split_seed=3),
        base.but(expert_size=16, n_shared=10),
        base.but(n_shared=8),
        base.but(distill="none"),
        base.but(importance_examples=16),
        base.but(teacher_seed=1),
        base.but(n_seeds=5),
        base.but(max_grad_norm=2.0),
        base.but(grouping="kmeans-weights"),
        base.but(grouping="kmeans-weights", split_seed=3),
        base.but(grouping="coactivation"),
        base.but(grouping="coactivation", split_seed=3),
        base.but(routing="gate-token"),
        base.but(routing="gate-token", gate_top_k=2),
        base.but(warmup=0.1),
        base.but(held_out=0.25),
        base.but(held_out=0.25, importance_split="held-out"),
        base.but(score_at=[0.5, 1]),
        base.but(student="half-depth"),
        base.but(student="half-depth", ranking="random", split_seed=3),
        base.but(student="half-depth", seed=1),
    ]
    for one, other in itertools.combinations(points, 2):
        same = cost.Run("student", one).key == cost.Run("student", other).key
        assert same == (student.student_key(Store(), one) == student.student_key(Store(), other)), (
            one,
            other,
        )


def test_the_default_is_in_every_figure_and_one_setting_changes():
    settings = Settings.at("paper")
    grid = ablations.ablations(settings)
    base = settings.but(expert_size=768, n_shared=512, split_seed=0)
    for name, points in grid.items():
        assert base in points
        for point in points:
            changed = {k for k, v in point if v != getattr(base, k)} - {"seed", "split_seed"}
            assert changed <= {FIGURE_SETTINGS[name]} | (
                {"n_shared"} if name == "figure2a" else set()
            )


def test_the_controls_cost_what_the_experts_cost_at_the_papers_sizes(moebert_home):
    grid = ablations.controls(Settings.at("paper"))
    assert all([point.seed for point in points] == [0, 1, 2] for points in grid.values())
    flops = {}
    for name in ("experts", "one expert", "half depth"):
        (point, *_) = grid[name]
        flops[name] = cost.Run("converted", point).cost.flops
    assert flops["experts"] == flops["one expert"]
    # but for attention between tokens, which half the depth has half of
    assert flops["half depth"] == pytest.approx(flops["experts"], rel=0.01)
    dense = grid["dense trained on"][0]
    assert dense.sizes(3072) == (3072, 0) and dense.distill == "none"
    assert [run.stage for run in asked_for(grid["half depth"][0])] == ["teacher", "student"]


def asked_for(settings):
    """The runs that a student needs."""
    job = SimpleNamespace(settings=settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "asked", lambda job: [("student", settings)])
        (runs,) = cost.runs([job])
        return runs


def test_numbers_of_experts_that_the_layer_cannot_fill_are_left_out():
    grid = ablations.ablations(Settings.at("smoke"), numbers=[1, 2, 500])
    assert {point.n_experts for point in grid["figure2b"]} == {1, 2}


@pytest.mark.parametrize("scale", ["base", "paper"])
def test_empty_lists_are_the_papers_points_at_its_scales_and_fewer_below(scale):
    whole = ablations.ablations(Settings.at(scale))
    fewer = ablations.ablations(Settings.at("quick"))
    assert {p.expert_size for p in whole["figure2a"]} == set(FIGURES["figure2a"])
    assert {p.n_experts for p in whole["figure2b"]} == set(FIGURES["figure2b"])
    assert {p.n_shared for p in whole["figure2c"]} == set(FIGURES["figure2c"])
    assert all(len(fewer[name]) < len(whole[name]) for name in ("figure2a", "figure2b", "figure2c"))


def test_table_3_spans_the_papers_tasks_at_its_scale_only():
    assert set(ablations.plain_training(Settings.at("paper"))) == set(ablations.TABLE3_TASKS)
    assert set(ablations.plain_training(Settings.at("paper", task="cola"))) == {"cola"}
    assert set(ablations.plain_training(Settings.at("quick"))) == {"library"}


def test_the_routers_are_those_of_the_library():
    assert ablations.ROUTINGS == ROUTINGS
    assert list(ablations.routers(Settings.at("smoke"))) == list(ROUTINGS)


def test_beyond_the_paper_are_words_by_clusters_and_two_experts_a_token():
    def said(**changes):
        found = ablations.beyond_routers(Settings.at("smoke", **changes))
        return {name: {(p.routing, p.gate_top_k) for p in points} for name, points in found.items()}

    hashes = {name: {(name, 1)} for name in ("hash-random", "hash-cluster")}
    one, two = {("gate-token", 1)}, {("gate-token", 2)}
    assert said() == hashes | {"gate-token, k = 1": one, "gate-token, k = 2": two}
    assert said(n_experts=1)["gate-token, k = 2"] == one  # there are no two


def test_a_notebook_asked_for_twice_adds_nothing(moebert_home):
    paths = [path for path in NOTEBOOKS if path.stem[:2] in ("01", "03", "04")]
    once = cost.runs(planning.plan(paths, scale="smoke"))
    again = cost.runs(planning.plan([*paths, paths[-1]], scale="smoke"))
    assert again[:-1] == once and again[-1] == [] and all(once)


def test_a_plan_reads_as_one_line_for_each_group_and_a_sum(moebert_home):
    paths = [path for path in NOTEBOOKS if path.stem[:2] in ("00", "03")]
    jobs = planning.plan(paths, scale="smoke")
    lines = list(cost.lines(jobs, ["to run", "to run"]))
    assert lines[0] == "00_the_idea: to run" and lines[1].strip() == "trains nothing"
    (plain,) = [line for line in lines if "distill=none" in line]
    assert "seeds 0-1" in plain and "batch 16" in plain and "CPU" in plain
    (total,) = [line for line in lines if line.startswith("in all")]
    assert "1 teacher, 1 scoring, 4 conversions, 4 students" in total
    assert any("factor of about three" in line for line in lines)


def test_a_line_says_what_differs_from_the_scales_default(moebert_home):
    path = next(path for path in NOTEBOOKS if path.stem.startswith("08"))
    lines = list(cost.lines(planning.plan([path], scale="quick"), ["to run"]))
    trained = [line for line in lines if "student" in line and "seeds" in line]
    assert sum("default" in line for line in trained) == 1
    assert any("importance_split=validation" in line for line in trained)
    assert any("shared_neurons=tied " in line for line in trained)


def test_what_is_stored_is_not_listed_but_still_made_already(moebert_home):
    paths = [path for path in NOTEBOOKS if path.stem[:2] in ("03", "04")]
    jobs = planning.plan(paths, scale="smoke")
    lines = list(cost.lines(jobs, ["stored, 0.1 min", "to run"]))
    assert lines[1].startswith("04") and not any("teacher" in line for line in lines[2:-3])


def test_points_that_do_not_fit_are_refused_when_planned(moebert_home):
    path = next(path for path in NOTEBOOKS if path.stem.startswith("04"))
    with pytest.raises(UserError, match="largest expert_size that fits"):
        planning.plan([path], scale="quick", parameters={"n_experts": 8, "expert_size": 192})


def test_every_task_that_a_grid_reads_is_checked_when_planned(moebert_home, tiny_glue, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "sst2").symlink_to(tiny_glue / "sst2", target_is_directory=True)
    path = next(path for path in NOTEBOOKS if path.stem.startswith("01"))
    values = {"task": "sst2", "other_tasks": ["squad"]}
    with pytest.raises(UserError, match="squad"):
        planning.plan([path], scale="small", parameters=values, data_dir=str(tmp_path / "some"))


def test_the_explorer_shares_its_points_of_four_experts_with_notebook_2():
    settings = Settings.at("quick")
    grid = ablations.explorer(settings)
    found = [point for points in grid.values() for point in points]
    four = {(s.n_shared, s.seed) for s in found if s.n_experts == 4}
    assert four == set(itertools.product((0, 128, 256, 353), (0, 1)))
    assert len(found) == 16 and {s.n_experts * s.expert_size for s in found} == {1536}


def test_the_explorers_conversions_are_plain_whatever_the_settings():
    other = Settings.at("quick", ranking="random", routing="gate-token", preset="release")
    for point in itertools.chain.from_iterable(ablations.explorer(other).values()):
        assert (point.ranking, point.routing, point.gate_scaling) == (
            "importance",
            "hash-random",
            "inside",
        )
        assert point.importance_split == "validation"


def test_constructions_vary_one_thing_each_and_none_shared_has_no_inverse(moebert_home):
    small = ablations.constructions(Settings.at("small"))
    assert [name for name in small if "inverse" in name] == ["inverse"]
    assert len(small) == 2 * len(ablations.CONSTRUCTIONS) - 1
    beside = ablations.deals_beside(small)
    for name, points in small.items():
        assert [point.split_seed for point in points] == [0, 1, 2]
        for point, deal in zip(points, small[beside[name]], strict=True):
            assert point.sizes(1536) == (384, 0 if name.endswith("none shared") else 256)
            kind = {key for key, value in point if value != getattr(deal, key)}
            assert kind <= {"ranking", "grouping"} and len(kind) == (name != beside[name])


def test_quick_shares_in_every_construction(moebert_home):
    assert list(ablations.constructions(Settings.at("quick"))) == list(ablations.CONSTRUCTIONS)
