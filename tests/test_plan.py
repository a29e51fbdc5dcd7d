"""A plan and its notebook agree: what a notebook asks for by name is what its run makes."""

import gc
import sys

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import smoke_runs
import torch
from checkout import NOTEBOOKS

from moebert_lib.cli import main
from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import ablations, student, teacher
from moebert_lib.runs import cost, notebook_session, plan
from moebert_lib.store.store import StageKey, Store

KEYS = {
    "teacher": teacher.teacher_key,
    "importance": teacher.importance_key,
    "converted": student.conversion_key,
    "student": student.student_key,
}


@pytest.fixture(scope="module")
def smoke_home(tmp_path_factory):
    return smoke_runs.home(tmp_path_factory.mktemp("plan") / "home", tmp_path_factory)


@pytest.fixture
def here(smoke_home, tmp_path, monkeypatch):
    """A place to run a notebook's code within this process, at scale smoke."""
    monkeypatch.setenv("MOEBERT_HOME", str(smoke_home))
    monkeypatch.setenv("MOEBERT_FIGURES", str(tmp_path))
    yield
    torch.set_default_dtype(torch.float32)
    plt.close("all")


def forget() -> None:
    """Empty the library's caches, so that each stage is asked for again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("moebert_lib."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear") and value.__module__.startswith("moebert_lib."):
                    value.cache_clear()
    gc.collect()


def asked_for(job, monkeypatch) -> set[tuple[str, str]]:
    """Kind and choices of the stages that a run of a notebook takes from the store."""
    seen, make, find = set(), Store.make, Store.find

    def log(key):
        """A stage, and those before it that it is made of."""
        if key.kind in KEYS:
            seen.add((key.kind, key.choices_digest))
        for part in key.choices.values():
            if isinstance(part, StageKey):
                log(part)

    def logged_make(self, key, *args, **more):
        log(key)
        return make(self, key, *args, **more)

    def logged_find(self, key):
        entry = find(self, key)
        if entry:
            log(key)
        return entry

    monkeypatch.setattr(Store, "make", logged_make)
    monkeypatch.setattr(Store, "find", logged_find)
    monkeypatch.setattr(notebook_session, "start_run", lambda variables: job.settings)
    forget()
    names = {"__name__": "__main__"}
    for cell in job.cells:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= job.parameters
    return seen


def listed(job) -> set[tuple[str, str]]:
    """Kind and choices of the stages that a plan lists; a student brings its conversion."""
    (runs,) = cost.runs([job])
    stages = {(run.stage, run.settings) for run in runs}
    stages |= {("converted", settings) for stage, settings in stages if stage == "student"}
    return {(stage, KEYS[stage](Store(), settings).choices_digest) for stage, settings in stages}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_run_asks_for_exactly_the_stages_that_the_plan_lists(path, here, monkeypatch):
    (job,) = plan.plan([path], scale="smoke")
    assert asked_for(job, monkeypatch) == listed(job)


def notebook(folder, cells, name="mine"):
    """A notebook of one's own with the usual parameters, and settings made of them."""
    head = [
        "scale: str = 'smoke'\nseed: int = 0\nnumbers: list[int] = [1, 2]\noverrides: dict = {}",
        "from moebert_lib.config.settings import Settings\n"
        "settings = Settings.at(scale, seed=seed, **overrides)",
    ]
    made = [nbformat.v4.new_code_cell(source) for source in (*head, *cells)]
    made[0].metadata["tags"] = ["parameters"]
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


def test_a_setting_of_several_values_reaches_the_notebook_as_it_was_given(tmp_path):
    from papermill.translators import translate_parameters

    values = {"score_at": [0.25, 1]}
    (job,) = plan.plan([notebook(tmp_path, [])], scale="smoke", parameters=values)
    space = {}
    exec(translate_parameters("python3", "python", job.given, "Parameters"), {}, space)
    assert Settings.at(job.settings.scale, **space["overrides"]) == job.settings
    assert job.settings.score_at == (0.25, 1.0)


def points(cells, folder, **parameters):
    """What a plan reads in the cells of a notebook."""
    (job,) = plan.plan([notebook(folder, cells)], scale="smoke", parameters=parameters)
    return plan.asked(job)


ROUTERS = [("student", p) for ps in ablations.routers(Settings.at("smoke")).values() for p in ps]


@pytest.mark.parametrize(
    "cells",
    [
        ["from moebert_lib.experiments import ablations", "ablations.points('routers', settings)"],
        ["from moebert_lib.experiments import ablations as a\na.points('routers', settings)"],
        ["from moebert_lib.experiments.ablations import points\nx = points('routers', settings)"],
        ["from moebert_lib import experiments\nexperiments.ablations.points('routers', settings)"],
        [
            "%matplotlib inline\nfrom moebert_lib.experiments import ablations\n!ls",
            "%%time\nfor _ in range(1):\n    ablations.points('routers', settings)",
        ],
    ],
)
def test_names_are_read_whatever_the_import_and_beside_ipythons_commands(
    cells, moebert_home, tmp_path
):
    assert points(cells, tmp_path) == ROUTERS


def test_a_notebooks_parameters_and_settings_decide_what_its_names_mean(moebert_home, tmp_path):
    cell = (
        "from moebert_lib.experiments import ablations\n"
        "ablations.points('ablations', settings, numbers=numbers, thirds=[0, 2])"
    )
    found = [point for _, point in points([cell], tmp_path, seed=5, n_seeds=1, numbers=[1, 3])]
    wanted = ablations.ablations(
        Settings.at("smoke", seed=5, n_seeds=1), numbers=[1, 3], thirds=[0, 2]
    )
    assert found == [point for several in wanted.values() for point in several]


def test_code_is_read_and_never_run(moebert_home, tmp_path):
    mark = tmp_path / "ran"
    cells = [f"open({str(mark)!r}, 'w')", "raise SystemExit", "%%bash\nexit 1\nfi"]
    asks = "from moebert_lib.experiments.ablations import points\npoints('routers', settings)"
    assert points([*cells, asks], tmp_path) == ROUTERS and not mark.exists()


CANARY = "__import__('pathlib').Path({mark!r}).touch()"
ANNOTATIONS = ["{}", "list[{}]", "dict[str, {}]", "Literal[{}]", "int | {}", "'{}'", "list['{}']"]
PLACES = {
    **{f"annotation {place}": [f"n: {place} = 0"] for place in ANNOTATIONS},
    "endless annotation": ["n: 9**9**9 = 0"],
    "default": ["n: int = {}"],
    "default in a list": ["n: list = [{}]"],
    "endless default": ["n: int = 9**9**9"],
    "statement among the parameters": ["n: int = 0\n{}"],
    "cell": ["n: int = 0", "{}"],
    "cell of IPython": ["n: int = 0", "%time {}\n!touch {mark}"],
    "name of a set": ["n: int = 0", "{points}points({}, settings)"],
    "parameter of a set": ["n: int = 0", "{points}points('routers', settings, n={})"],
    "settings of a set": ["n: int = 0", "{points}points('routers', {})"],
}


@pytest.mark.parametrize("cells", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("option", ["--plan", "--why"])
def test_a_plan_runs_nothing_that_a_notebook_holds(cells, option, moebert_home, tmp_path, capsys):
    mark = tmp_path / "ran"
    canary = CANARY.format(mark=str(mark))
    asks = "from moebert_lib.experiments.ablations import points\n"
    filled = [
        cell.replace("'{}'", repr(canary)).replace("{}", canary).replace("{mark}", str(mark))
        for cell in cells
    ]
    made = [nbformat.v4.new_code_cell(cell.replace("{points}", asks)) for cell in filled]
    made[0].metadata["tags"] = ["parameters"]
    path = tmp_path / "mine.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"notebook: {path}\n")
    commands = [["run", str(path), option]]
    commands += [["sweep", str(grid), *more] for more in (["--dry-run"], ["--why"], ["--count"])]
    assert {main.main(command) for command in commands} <= {0, 2}
    assert not mark.exists() and "Traceback" not in capsys.readouterr().err


GRIDS = [
    "notebook: !!python/object/apply:os.system ['{}']",
    "seeds: [!!python/name:os.system '']",
    "seeds: ['{}']",
    "tasks: ['{}']",
    "data_dir: '$({})'",
    "settings: {{model: ['{}']}}",
    "settings: {{'{}': [1]}}",
    "settings: {{overrides: [{{'{}': 1}}]}}",
    "points: [{{notebook: '{}'}}]",
    "points: [{{n_experts: '{}'}}]",
]


@pytest.mark.parametrize("text", GRIDS)
def test_a_dry_run_runs_nothing_that_a_grid_holds(text, moebert_home, tmp_path, capsys):
    mark = tmp_path / "ran"
    canaries = (CANARY.format(mark=str(mark)).replace("'", "''"), f"touch {mark}")
    for canary in canaries:
        grid = tmp_path / "grid.yaml"
        grid.write_text(f"scale: smoke\n{text.format(canary)}\n")
        for more in (["--dry-run"], ["--why"], ["--count"]):
            assert main.main(["sweep", str(grid), *more]) == 2
    assert not mark.exists() and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("points('rooters', settings)", "did you mean 'routers'"),
        ("points('ablations', settings, numbers=[4, 4])", "two or more different"),
        ("points('ablations', settings, number=numbers)", "number=.*unexpected"),
        ("points('ablations', settings, numbers=several)", "a plan cannot read"),
        ("points(name, settings)", "a plan cannot read"),
        ("points('routers', settings.but(seed=1))", "a plan cannot read"),
        ("points('routers')", "a plan cannot read"),
    ],
)
def test_a_call_that_cannot_be_planned_is_refused(call, told, moebert_home, tmp_path):
    cell = f"from moebert_lib.experiments.ablations import points\n{call}"
    with pytest.raises(UserError, match=told):
        points([cell], tmp_path)


def test_a_copied_and_renamed_notebook_is_planned_the_same(moebert_home, tmp_path):
    for path in NOTEBOOKS:
        copy = tmp_path / f"my_{path.name}"
        copy.write_bytes(path.read_bytes())
        job, renamed = plan.plan([path, copy], scale="smoke")
        assert plan.asked(job) == plan.asked(renamed)
        assert (job.timed, job.folders) == (renamed.timed, renamed.folders)
        assert renamed.name == f"my_{path.stem}"


def test_like_runs_that_are_stored_say_how_long_a_run_takes(moebert_home):
    base = Settings.at("smoke")
    runs = [cost.Run(stage, base) for stage in cost.STAGES]
    guessed = [cost.seconds(run, cost.stored_seconds()) for run in runs]
    for seed in (0, 1):
        student.student(Store(), base.but(seed=seed))
    stored = cost.stored_seconds()
    again = [cost.Run(run.stage, base.but(seed=7)) for run in runs]
    known = {stage: [] for stage in cost.STAGES}
    for entry in Store().entries():
        known.get(entry.kind, []).append(entry.seconds)
    for run, before in zip(again, guessed, strict=True):
        assert cost.seconds(run, stored) == np.median(known[run.stage]) != before
    other = cost.Run("student", base.but(epochs=2.0, routing="gate-token"))
    assert cost.seconds(other, stored) == other.cost.flops / cost.cpu_flops()
