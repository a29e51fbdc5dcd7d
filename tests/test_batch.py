"""Planning refuses or fits values; running reuses, publishes, and says what failed."""

import io
import json
import os
import re
import time
from pathlib import Path

import fixture_home
import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebert_lib.config.settings import Settings
from moebert_lib.runs import execution, export, local_pool, plan, sweep
from moebert_lib.runs.execution import NotebookFailed
from moebert_lib.store import run_outputs
from moebert_lib.store.store import StageKey, Store

ATTACKS = [
    'a"; import os; os._exit(3)  #',
    "b'''\nraise SystemExit\n'''",
    "`touch x` $(touch x) {braces} {{x}} \\",
    "line\nbreak\r\n\ttab \x00 \u2028 é 漢",
]
JSON_TEXT = st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    names = {"00_the_idea": "plain", "01_importance": "settings", "02_fails": "fails"}
    folder = fixture_home.make(tmp_path / "home {x}", names)
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    return folder


def planned(*names, scale="smoke", data_dir="", **parameters):
    return plan.plan(plan.select(names), scale=scale, parameters=parameters, data_dir=data_dir)


def row_of(entry) -> dict:
    return json.loads((entry.folder / "figures" / "row.json").read_text())


def test_a_value_goes_to_the_notebooks_own_parameter_or_to_overrides(home):
    (job,) = planned("01", seed=3, layers=[2], n_shared=11)
    assert job.given == {"scale": "smoke", "seed": 3, "layers": [2], "overrides": {"n_shared": 11}}
    assert (job.settings.seed, job.settings.n_shared, job.settings.scale) == (3, 11, "smoke")


def test_values_are_stored_as_their_setting_reads_them(home):
    (text,) = planned("01", learning_rate="1e-4")  # how YAML 1.1 reads it
    (number,) = planned("01", learning_rate=0.0001)
    assert text.key() == number.key() and text.given["overrides"] == {"learning_rate": 0.0001}


def test_values_that_change_nothing_are_dropped(home):
    (usual,), (spelt,) = planned("01"), planned("01", seed=0, task="library", n_experts=4)
    assert usual.key() == spelt.key() and not spelt.chosen
    assert planned("01", seed=1)[0].chosen == {"seed": 1}


def test_a_value_for_another_notebook_is_no_value_for_this_one(home):
    plain, own = planned("00", "01", layers=[1])
    assert plain.given == {} and plain.settings is None and own.given["layers"] == [1]


def test_planning_writes_nothing(home):
    planned("00", "01", seed=3)
    assert sorted(path.name for path in home.iterdir()) == ["notebooks"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_value_reaches_the_notebook_as_text_and_never_as_code(home, attack):
    (path,) = plan.select(["01"])
    source = path.read_text()
    (job,) = planned("01", label=attack)
    assert job.given["label"] == attack and job.source == source == path.read_text()
    assert injected(attack) == attack


def injected(value):
    """What a kernel would see of a value, by papermill's own translation."""
    from papermill.translators import translate_parameters

    space: dict = {}
    exec(translate_parameters("python3", "python", {"value": value}, "Parameters"), {}, space)
    return space["value"]


@given(st.dictionaries(st.text(), JSON_TEXT, max_size=4) | JSON_TEXT | st.lists(JSON_TEXT))
def test_any_json_value_survives_the_way_into_the_notebook(value):
    assert injected(value) == value


def test_a_run_is_made_once_and_its_figures_published_and_restored(home):
    lines: list[str] = []
    attack = "\n".join(ATTACKS)
    jobs = planned("01", label=attack)
    (entry,) = local_pool.run(jobs, echo=lines.append)
    assert row_of(entry)["label"] == attack and row_of(entry)["settings"]["scale"] == "smoke"
    assert set(os.listdir(entry.folder)) == {"notebook.ipynb", "log.txt", "figures", "entry.json"}
    assert "    · settings read" in lines and not any("quiet" in line for line in lines)
    published = local_pool.published(jobs[0])
    about = run_outputs.read_provenance(published)["figure1.png"]
    assert about["run"] == entry.digest and about["settings"]["seed"] == 0
    (published / "figure1.png").unlink()
    (published / "figure1.csv").write_text("edited")
    (again,) = local_pool.run(jobs, echo=lines.append)
    assert again.reused and "reused" in lines[-1]
    assert (published / "figure1.png").is_file() and "edited" not in (
        published / "figure1.csv"
    ).read_text()


def test_a_failed_run_says_where_and_keeps_its_copy_but_no_entry(home):
    with pytest.raises(NotebookFailed) as caught:
        local_pool.run(planned("02"))
    assert str(caught.value) == "notebook 02_fails, cell 3: ValueError: seed 0"
    assert "is not allowed" in caught.value.copy.read_text()
    assert Store().entries() == [] and not (home / "runs" / "figures").exists()
    assert list((home / "runs" / "tmp").iterdir()) == []
    assert [run["notebook"] for run in execution.failed_runs()] == ["02_fails"]


def test_a_failure_is_forgotten_once_the_notebook_is_mended(home):
    (path,) = plan.select(["02"])
    for _ in range(2):
        with pytest.raises(NotebookFailed):
            local_pool.run(planned("02"))
    assert len(execution.failed_runs()) == 1
    edited(path, "seed == 0", "seed == 9")
    local_pool.run(planned("02"))
    assert len(Store().entries()) == 1 and execution.failed_runs() == []


def test_a_failure_that_another_process_met_meanwhile_is_told_and_not_met_again(home):
    (job,) = planned("02")
    before = time.time() - 1
    with pytest.raises(NotebookFailed):
        execution.make(job)
    first = (execution.failure_folder(job) / execution.FAILED).stat().st_mtime_ns
    with pytest.raises(NotebookFailed, match="cell 3: ValueError: seed 0"):
        execution.make(job, since=before)
    assert (execution.failure_folder(job) / execution.FAILED).stat().st_mtime_ns == first
    with pytest.raises(NotebookFailed):
        execution.make(job, since=time.time())
    assert (execution.failure_folder(job) / execution.FAILED).stat().st_mtime_ns > first


def test_after_a_failure_the_others_can_still_run(home):
    lines: list[str] = []
    failure, entry = local_pool.run(planned("02", "00"), keep_going=True, echo=lines.append)
    assert isinstance(failure, NotebookFailed) and entry.row["notebook"] == "00_the_idea"
    assert [entry.key.choices["notebook"] for entry in Store().entries()] == ["00_the_idea"]
    assert (home / "runs" / "figures" / "figure0.csv").is_file()


@pytest.mark.parametrize(
    "fixture, said", [("dies", "dies, cell 2: the kernel died"), ("widget", "hidden in the widget")]
)
def test_a_dead_kernel_and_a_broken_widget_fail_the_run(home, fixture, said):
    path = fixture_home.FIXTURES / f"{fixture}.ipynb"
    with pytest.raises(NotebookFailed, match=said):
        local_pool.run(plan.plan([path]))


def written(home, name, *cells):
    """The path of a new notebook with these code cells, the first with its parameters."""
    first, *others = (nbformat.v4.new_code_cell(cell) for cell in cells)
    first.metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *others]), home / f"{name}.ipynb")
    return home / f"{name}.ipynb"


@pytest.mark.parametrize(
    "code, state, said",
    [
        ("import sys; sys.exit(0)", "failed", "SystemExit: .*; code cells not run after it: 1"),
        ("raise SystemExit", "failed", "SystemExit"),
        ("import os; os._exit(3)", "died", "the kernel died: exit status 3"),
        ("import os; os.kill(os.getpid(), 15)", "died", "the kernel died: SIGTERM"),
        ("import os; os.kill(os.getpid(), 9)", "died", "the kernel died: SIGKILL"),
    ],
)
def test_a_cell_that_ends_the_notebook_or_its_process_is_named_and_not_done(
    home, code, state, said
):
    path = written(home, "ends", "n: int = 0", code, "print('never')")
    (failure,) = local_pool.run(plan.plan([path]), keep_going=True, engine=OnlyOnce())
    assert isinstance(failure, NotebookFailed) and (failure.state, failure.cell) == (state, 2)
    assert re.search(said, failure.error) and Store().entries() == []


class OnlyOnce(local_pool.Local):
    """Tries nothing twice."""

    def run(self, jobs, **how):
        return super().run(jobs, **how, attempts=1)


def test_a_recorded_number_that_is_not_finite_is_seen_in_every_table(home):
    values = "loss=float('nan'), high=float('inf'), gap=-float('inf'), best=0.5"
    code = f"import moebert_lib; moebert_lib.record({values})"
    planned = plan.plan([written(home, "diverges", "n: int = 0", code)])
    results = local_pool.run(planned)
    for row in (sweep.table(planned, results).iloc[0], export.frame().iloc[0]):
        assert [row["loss"], row["high"], row["gap"]] == ["nan", "inf", "-inf"]
        assert row["best"] == 0.5


def edited(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_editing_code_makes_a_new_run_but_prose_and_outputs_do_not(home):
    (path,) = plan.select(["01"])
    old = planned("01")[0].key()
    edited(path, '"outputs": []', '"outputs": [ ]')
    edited(path, '"execution_count": null', '"execution_count": 7')
    edited(path, "Something else first.", "Something else, told better.")
    assert planned("01")[0].key() == old
    edited(path, "quiet line", "another line")
    assert planned("01")[0].key() != old


def test_an_exercise_that_is_filled_in_reruns_nothing(home):
    (path,) = plan.select(["01"])
    notebook = nbformat.read(path, as_version=4)
    cell = nbformat.v4.new_code_cell("def mine(): ...", metadata={"tags": ["exercise"]})
    notebook.cells.append(cell)
    nbformat.write(notebook, path)
    old = planned("01")[0].key()
    edited(path, "def mine(): ...", "def mine(): return 1")
    assert planned("01")[0].key() == old
    edited(path, '"exercise"', '"lesson"')
    assert planned("01")[0].key() != old


def test_where_the_data_lies_is_not_part_of_the_key(home, tiny_glue, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_glue, target_is_directory=True)
    one, other = (
        planned("01", task="sst2", data_dir=str(folder))[0] for folder in (tiny_glue, moved)
    )
    assert one.key() == other.key() and str(tiny_glue) not in json.dumps(one.key().values())


def test_publishing_removes_what_an_earlier_run_of_the_same_notebook_left(tmp_path):
    store, folder = Store(tmp_path / "runs"), tmp_path / "figures"

    def entry(number, *names):
        def build(made):
            (made / "figures").mkdir()
            for name in names:
                (made / "figures" / name).write_text(str(number))
            return {}

        return store.make(StageKey("notebook", {"notebook": f"0{number}", "names": names}), build)

    run_outputs.publish(entry(1, "a.csv", "b.csv"), folder)
    run_outputs.publish(entry(2, "c.csv"), folder)
    run_outputs.publish(entry(1, "b.csv"), folder)
    assert sorted(run_outputs.read_provenance(folder)) == ["b.csv", "c.csv"]
    assert sorted(os.listdir(folder)) == ["b.csv", "c.csv", "provenance.json"]


def test_only_quick_as_it_comes_is_published_as_the_workbooks_own(home):
    def place(**values):
        return (
            local_pool.published(planned("01", **values)[0]).relative_to(home / "runs").as_posix()
        )

    assert place(scale="quick") == "figures"
    assert place(scale="quick", task="acceptability") == "figures/quick-acceptability"
    assert place(scale="smoke") == "figures/smoke-library"
    assert local_pool.published(planned("00")[0]) == home / "runs" / "figures"


def test_variants_are_published_apart_under_what_was_changed(home, tiny_glue):
    def place(**values):
        return (
            local_pool.published(planned("01", **values)[0])
            .relative_to(home / "runs" / "figures")
            .as_posix()
        )

    assert place(scale="quick", seed=1, n_experts=2) == "quick-library-n_experts2-seed1"
    assert place(scale="smoke", layers=[0, 2]) == "smoke-library-layers0_2"
    where = dict(scale="small", data_dir=str(tiny_glue))
    assert place(**where) == "small-sst2" and place(**where, task="rte") == "small-rte"
    plain = run_outputs.destination(None, changed={"n_shared": 9})
    assert plain == home / "runs" / "figures" / "changed-n_shared9"


@given(label=st.text(min_size=1), other=st.text(min_size=1))
def test_names_of_folders_are_short_and_plain_and_two_for_two_values(label, other):
    one, two = (run_outputs.destination(None, changed={"label": x}).name for x in (label, other))
    assert re.fullmatch(r"[\w.-]{1,80}", one, re.ASCII) and (one == two) == (label == other)
    long = run_outputs.destination(None, changed={"label": 90 * "x" + label}).name
    assert len(long) <= 80 and re.fullmatch(r"[\w.-]+-[0-9a-f]{8}", long, re.ASCII)


@pytest.mark.parametrize("scale, offline", [("quick", "1"), ("small", None)])
def test_the_kernel_is_offline_at_scales_that_promise_it(tmp_path, monkeypatch, scale, offline):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    env = run_outputs.kernel_environment(tmp_path, offline=Settings.at(scale).offline)
    assert env.get("HF_HUB_OFFLINE") == env.get("HF_DATASETS_OFFLINE") == offline
    assert env["MOEBERT_FIGURES"] == str(tmp_path) and "MPLBACKEND" not in env


def test_the_output_log_keeps_everything_and_passes_on_whole_progress_lines():
    log, lines = io.StringIO(), []
    tee = execution.OutputLog(log, lines.append)
    for piece in ("a\n· ha", "lf\nb · c\n", "· last"):
        tee.write(piece)
    assert lines == ["· half"] and log.getvalue() == "a\n· half\nb · c\n· last"


def test_a_folders_place_on_this_machine_names_no_figures(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "importance_rte.pkl").write_bytes(b"")
    values = {"importance_dir": str(tmp_path / "files")}
    (job,) = plan.plan(plan.select(["08"]), scale="smoke", parameters=values)
    assert local_pool.published(job).name == "smoke-library-importance_dirfiles"


def test_what_a_notebook_prints_past_python_is_no_word_of_its_worker(home):
    """A bare notebook, as nbformat makes it, whose processes write where workers report."""
    code = "import os; os.system('echo {}'); os.write(1, b'noise\\n'); print(n)"
    path = written(home, "bare", "n: int = 0", code)
    (entry,) = local_pool.run(plan.plan([path], parameters={"n": 7}))
    assert "7" in (entry.folder / "log.txt").read_text()
