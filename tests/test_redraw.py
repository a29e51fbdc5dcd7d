"""Figures and tables are drawn again from rows and small files: the same bytes, no model."""

import os
import shutil

import fixture_home
import pandas as pd
import pytest
import smoke_runs
import yaml
from checkout import NOTEBOOKS, ROOT, files, text
from stored import put

from moebert_lib.cli import main
from moebert_lib.config import provenance
from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.experiments import dataset, student, teacher
from moebert_lib.publish import report
from moebert_lib.runs import export, local_pool, plan
from moebert_lib.store import committed_results
from moebert_lib.store.committed_results import open_store
from moebert_lib.store.store import StageKey, Store
from moebert_lib.training.evaluation import score


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("redraw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBERT_HOME", str(smoke_runs.home(folder / "home", tmp_path_factory)))
        yield folder / "home"


#: Those that take more from models than stages: make figures draws all of them.
MEASURING = [path for path in NOTEBOOKS if "measured_table(" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", MEASURING, ids=lambda path: path.stem)
def test_a_notebook_drawn_from_results_makes_the_bytes_of_its_run(path, home, tmp_path):
    jobs = plan.plan(plan.select([path.stem]), scale="smoke")
    # runs are shared, and another test's run of a timed notebook measures its tables anew
    (entry,) = local_pool.run(jobs, force=jobs[0].timed)
    made = {file.name: file.read_bytes() for file in (entry.folder / "figures").iterdir()}
    folder = tmp_path / "results"
    dataset.summary(Store(), Settings.at("smoke"))  # not every notebook asks for a stage
    export.write_results(folder)
    grid = {"scale": "smoke", "points": [{"notebook": path.stem}]}
    (folder / report.WORKBOOK).write_text(yaml.safe_dump(grid))
    jobs_before = len(Store().entries("teacher"))
    (job,) = report.plan(folder, tmp_path / "figures")
    local_pool.run([job])
    drawn = {file.name: file.read_bytes() for file in (tmp_path / "figures").iterdir()}
    drawn.pop("provenance.json")
    assert made and drawn == made
    assert len(Store().entries("teacher")) == jobs_before


SETTINGS = Settings.at("smoke", seed=5, teacher_seed=0)


@pytest.fixture
def stored(moebert_home, tmp_path, monkeypatch):
    """A teacher, its scores and a conversion in a folder of results, which then is the store."""
    kept = dataset.measured_table(
        open_store(),
        "sizes",
        SETTINGS,
        lambda: pd.DataFrame({"n": [1, 2]}, ["a", "b"]),
    )
    made = (
        dataset.summary(open_store(), SETTINGS),
        student.conversion(open_store(), SETTINGS),
        kept,
    )
    folder = tmp_path / "results"
    export.write_results(folder)
    shutil.rmtree(moebert_home / "runs")
    monkeypatch.setenv(committed_results.FROM, str(folder))
    teacher._teacher.cache_clear()
    teacher._importance.cache_clear()
    return made


def test_stages_are_read_without_data_weights_or_models(stored, monkeypatch):
    monkeypatch.setattr(dataset, "dataset", lambda _: pytest.fail("data was asked for"))
    about, row, table = stored
    again = dataset.measured_table(
        open_store(), "sizes", SETTINGS, lambda: pytest.fail("measured again")
    )
    assert (
        dataset.summary(open_store(), SETTINGS) == about
        and student.conversion(open_store(), SETTINGS) == row
    )
    assert again.equals(table)
    assert teacher.teacher(open_store(), SETTINGS).metrics["accuracy"] >= 0
    assert teacher.importance(open_store(), SETTINGS).scores.shape == (2, 64)
    kept = teacher.predictions(student.conversion_entry(open_store(), SETTINGS))
    right = teacher.right_answers(open_store(), SETTINGS)["validation"]
    assert score(kept["validation.answers"], right, ["accuracy"]) == row
    assert kept["validation.logits"].shape == (48, 6)
    with pytest.raises(UserError, match="keeps results and no weights"):
        _ = teacher.teacher(open_store(), SETTINGS).model


def test_what_is_not_there_is_told_with_the_nearest_that_is(stored):
    with pytest.raises(
        UserError, match=r"no such converted; the nearest differs in seed=6 \(there: 5\)"
    ):
        student.conversion(open_store(), SETTINGS.but(seed=6))
    with pytest.raises(UserError, match="no such removal"):
        open_store().make(StageKey("removal", {"a": 1}))


def test_equal_results_give_equal_bytes_and_newer_ones_replace(stored, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="no folder"):
        export.write_results(folder, [tmp_path / "nowhere"])
    (tmp_path / "runs").mkdir()
    assert export.write_results(folder, [tmp_path]) == (6, 8)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    frame = pd.read_parquet(folder / committed_results.ROWS)
    kinds = {"about", "right", "teacher", "importance", "converted", "table"}
    assert set(frame["kind"]) == kinds
    assert "of" not in frame and frame["record"].str.contains('"of":').any()


def test_a_row_that_was_edited_is_refused(stored, tmp_path):
    path = tmp_path / "results" / committed_results.ROWS
    frame = pd.read_parquet(path)
    frame["record"] = frame["record"].str.replace('"accuracy": 0.', '"accuracy": 1.')
    frame.to_parquet(path, index=False)
    with pytest.raises(UserError, match="has changed since it was made"):
        committed_results.CommittedResults(path.parent)


def test_a_column_that_says_other_than_its_record_is_named_before_anything_is_drawn(
    stored, tmp_path
):
    path = tmp_path / "results" / committed_results.ROWS
    committed_results.verify(path.parent, export.stage_table)
    frame = pd.read_parquet(path)
    row = int(frame["accuracy"].notna().argmax())
    right = frame.loc[row, "accuracy"]
    frame.assign(accuracy=frame["accuracy"].where(frame.index != row, 0.99)).to_parquet(path)
    said = rf"rows\.parquet: row {row} says accuracy 0\.99, its record {right}; restore"
    with pytest.raises(UserError, match=said):
        report.draw(path.parent, into=tmp_path / "figures")
    frame.drop(columns="accuracy").to_parquet(path)
    with pytest.raises(UserError, match="column 'accuracy' is new or missing"):
        committed_results.verify(path.parent, export.stage_table)


def test_a_small_file_that_was_edited_is_refused(stored, tmp_path):
    path = tmp_path / "results" / committed_results.FILES
    frame = pd.read_parquet(path)
    frame["content"] = [content + b" " for content in frame["content"]]
    frame.to_parquet(path, index=False)
    with pytest.raises(UserError, match=r"files\.parquet: \S+ of .* has changed since it was made"):
        committed_results.CommittedResults(path.parent).entries()
    with pytest.raises(UserError, match="has changed since it was made"):
        export.write_results(path.parent)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no rows\.parquet in"):
        committed_results.CommittedResults(tmp_path)


@pytest.fixture
def workbook(tmp_path, monkeypatch):
    """A home of two tiny notebooks, and results from which three runs of them are drawn."""
    names = {"00_the_idea": "plain", "01_importance": "settings"}
    home = fixture_home.make(tmp_path / "home", names)
    monkeypatch.setenv("MOEBERT_HOME", str(home))
    put(home / "runs", "teacher", {"task": "rte"}, {"accuracy": 0.5})
    export.write_results(tmp_path / "results")
    points = [{"notebook": "00"}, {"notebook": "01"}, {"notebook": "01", "task": "follows"}]
    grid = {"scale": "smoke", "settings": {"n_shared": 3}, "points": points}
    (tmp_path / "results" / report.WORKBOOK).write_text(yaml.safe_dump(grid))
    return tmp_path / "results"


def test_a_workbook_is_drawn_and_every_file_that_differs_is_named(workbook, tmp_path):
    figures = report.draw(workbook)
    assert figures == tmp_path / "home" / "figures" and committed_results.FROM not in os.environ
    assert {"figure0.csv", "figure1.png", "follows/row.json"} <= report.digests(figures).keys()
    assert report.check(workbook) == []
    (figures / "figure0.csv").write_text("x,y\n1,2.6\n")
    (figures / "follows" / "row.json").unlink()
    (figures / "old.png").write_bytes(b"")
    (figures / "bench").mkdir()
    (figures / "bench" / "inference.json").write_text("{}")
    assert report.check(workbook) == [
        "figure0.csv: other bytes",
        "follows/row.json: missing from figures/",
        "old.png: nothing draws it",
    ]


@pytest.mark.parametrize(("kind", "start"), [("pdf", b"%PDF-"), ("svg", b"<?xml")])
def test_vectors_are_drawn_beside_the_pictures_and_not_into_figures(
    kind, start, workbook, tmp_path, capsys
):
    home = tmp_path / "home"
    shutil.copy(ROOT / "notebooks" / "00_the_idea.ipynb", home / "notebooks")
    grid = {"points": [{"notebook": "00"}]}
    (workbook / report.WORKBOOK).write_text(yaml.safe_dump(grid))
    assert main.main(["report", "--from", str(workbook), "--format", kind]) == 0
    folder = home / "runs" / f"figures-{kind}"
    assert (folder / f"00_deal.{kind}").read_bytes().startswith(start)
    assert (folder / "00_deal.png").is_file() and not (home / "figures").exists()
    assert f"figures-{kind}" in capsys.readouterr().out
    assert [
        path for path in files() if path.suffix in (".pdf", ".svg") and "figures" in path.parts
    ] == []


DOCUMENT = "# A\n\n<!-- table: figures/{} -->\n{}<!-- end of table -->\n\nText.\n"


def test_marked_tables_are_filled_and_one_that_differs_is_named(workbook, tmp_path):
    home = tmp_path / "home"
    readme, guide = home / "README.md", home / "notebooks" / "guide.md"
    readme.write_text(DOCUMENT.format("figure0.csv", "") + DOCUMENT.format("t.md", "| old |\n"))
    guide.write_text("# No table\n")
    (home / "figures").mkdir()
    (home / "figures" / "t.md").write_text("A caption.\n\n| a |\n|--:|\n| 1 |\n")
    figures = report.draw(workbook)
    rows = ["|   x |   y |", "|----:|----:|", "|   1 | 2.5 |"]
    csv = "".join(f"{row}\n" for row in rows)
    md = "| a |\n|--:|\n| 1 |\n"
    filled = DOCUMENT.format("figure0.csv", csv) + DOCUMENT.format("t.md", md)
    assert readme.read_text() == filled and guide.read_text() == "# No table\n"
    (figures / "t.md").unlink()
    readme.write_text(DOCUMENT.format("figure0.csv", csv.replace("2.5", "9.9")))
    assert report.check(workbook) == ["README.md: its tables are not those in figures/"]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (DOCUMENT.format("gone.md", ""), "README.md: no file figures/gone.md"),
        ("<!-- table: a.md -->\n" + DOCUMENT.format("t.md", ""), "has no '<!-- end of table -->'"),
    ],
)
def test_a_marked_table_that_cannot_be_filled_is_refused(document, said, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "t.md").write_text("| a |\n")
    (tmp_path / "README.md").write_text(document)
    with pytest.raises(UserError, match=said):
        report.outdated_documents()


def test_the_committed_documents_have_the_committed_tables(monkeypatch):
    monkeypatch.setenv("MOEBERT_HOME", str(ROOT))
    assert report.outdated_documents() == {}
    marked = [name for name in ("README.md", "notebooks/speed.md") if "<!-- table:" in text(name)]
    assert len(marked) == 2


def test_provenance_of_what_is_drawn_is_the_same_on_any_machine(workbook, tmp_path, monkeypatch):
    first = (report.draw(workbook) / "provenance.json").read_text()
    monkeypatch.setattr(provenance, "versions", lambda: {"python": "3.99"})
    monkeypatch.setenv(
        "MOEBERT_HOME",
        str(
            fixture_home.make(
                tmp_path / "other",
                {
                    "00_the_idea": "plain",
                    "01_importance": "settings",
                },
            )
        ),
    )
    assert (report.draw(workbook) / "provenance.json").read_text() == first
    assert "machine" not in first and '"rows.parquet"' in first


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--check"], "--check compares what --from draws; give both"),
        (["--from", "nowhere"], "no rows.parquet in"),
    ],
)
def test_a_report_that_cannot_be_drawn_is_refused_in_one_line(argv, told, moebert_home, capsys):
    assert main.main(["report", *argv]) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1
