"""Style, saving and the shared marks; what single figures draw is tested beside their modules."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from drawings import drawn_bars, drawn_points
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from moebert_lib.config.errors import UserError
from moebert_lib.plots import style as plots
from moebert_lib.store import run_outputs


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBERT_FIGURES", str(tmp_path))
    return tmp_path


@pytest.fixture
def style():
    with mpl.rc_context():
        plots.use_style()
        yield


def picture():
    ax = plots.axes()
    ax.plot([0, 1], [2, 3], label="line")
    plots.legend_above(ax, 1)
    plots.headline(ax, "A finding")
    return ax


def title_of(ax):
    """The text of a figure's title."""
    figure = ax.get_figure()
    return next(t for t in figure.findobj(Text) if t.get_text() == figure.get_suptitle() != "")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_writes_png_and_csv_and_nothing_else(out, style):
    path = plots.save(picture(), "figure0", pd.DataFrame({"x": [1.0, 0.1]}))
    assert path == out / "figure0.png"
    assert set(contents(out)) == {"figure0.png", "figure0.csv"}
    assert (out / "figure0.csv").read_bytes() == b"x\n1\n0.1\n"


def test_a_saved_figure_carries_its_finding_as_title(out, style):
    ax = plots.axes()
    plots.headline(ax, "Without hash-random, a step of -1.5 points is all that remains to be seen")
    path = plots.save(ax, "figure0")
    said = "Without hash-random, a step of \u22121.5 points is all that remains to be seen"
    assert "\n" in title_of(ax).get_text()
    assert Image.open(path).text["Title"] == said


@pytest.mark.parametrize("asked", ["pdf", "svg", "pdf, svg"])
def test_vectors_are_written_when_asked_for_and_their_bytes_repeat(out, style, monkeypatch, asked):
    monkeypatch.setenv(run_outputs.FORMATS, asked)
    plots.save(picture(), "figure0")
    first = contents(out)
    plots.save(picture(), "figure0")
    endings = {name.strip() for name in asked.split(",")} | {"png"}
    assert set(first) == {f"figure0.{ending}" for ending in endings}
    assert contents(out) == first
    assert "svg" not in endings or b"<dc:title>A finding</dc:title>" in first["figure0.svg"]


def test_an_unknown_format_is_refused(out, monkeypatch):
    monkeypatch.setenv(run_outputs.FORMATS, "bmp")
    with pytest.raises(UserError, match="unknown format 'bmp'; choose from pdf, svg"):
        plots.save(picture(), "figure0")


def test_a_figure_without_a_finding_is_not_saved(out):
    with pytest.raises(ValueError, match="figure0 has no title"):
        plots.save(plots.axes(), "figure0")
    assert contents(out) == {}


def test_names_at_the_ends_of_lines_keep_their_order_and_do_not_touch(style):
    ax = plots.axes()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ends = {name: (1.0, y, "k") for name, y in {"b": 0.5, "a": 0.49, "d": 0.9, "c": 0.51}.items()}
    plots.label_ends(ax, ends)
    run_outputs.settle(ax.get_figure())
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [text.get_text() for text in ax.texts] == ["a", "b", "c", "d"]
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))


def test_names_at_the_bottom_stay_above_the_axis(style):
    ax = plots.axes()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    plots.label_ends(ax, {name: (1.0, 0.01, "k") for name in "abc"})
    run_outputs.settle(ax.get_figure())
    lowest = min(text.get_window_extent().y0 for text in ax.texts)
    assert lowest >= ax.get_window_extent().y0 - 5


def test_without_data_there_is_no_csv(out):
    plots.save(picture(), "figure0")
    assert not (out / "figure0.csv").exists()


def test_the_same_figure_saved_twice_has_the_same_bytes(out, style):
    ax = picture()
    plots.save(ax, "figure0")
    first = contents(out)
    plots.save(ax.get_figure(), "figure0")
    assert contents(out) == first


def test_the_same_figure_drawn_again_has_the_same_bytes(out, style):
    plots.save(picture(), "figure0")
    first = contents(out)
    plots.save(picture(), "figure0")
    assert contents(out) == first


def test_nothing_is_left_of_a_file_that_could_not_be_written(out):
    def fail(path):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        run_outputs.write(out / "a.txt", fail)
    assert contents(out) == {}


def test_a_png_has_two_hundred_dots_an_inch(out, style):
    plots.save(picture(), "figure0")
    height, width, _ = plt.imread(out / "figure0.png").shape
    assert (width, height) == tuple(round(200 * inches) for inches in plots.SINGLE)


@pytest.mark.parametrize("name", ["", "a/b", "figure0.png", ".."])
def test_a_name_that_is_no_plain_name_is_refused(out, name):
    with pytest.raises(ValueError, match="must be a file name"):
        plots.save(picture(), name)


RUNS = pd.DataFrame(
    {"kind": ["b", "b", "b", "a"], "score": [1.0, 2.0, 6.0, 5.0], "seed": [0, 1, 2, 0]}
)


@pytest.mark.parametrize("rows", [False, True])
def test_a_strip_has_every_run_beside_the_others_and_a_bar_at_the_mean(rows):
    ax = plots.axes()
    assert plots.strip(ax, RUNS, "kind", "score", rows=rows) == ["b", "a"]
    points = drawn_points(ax)[:, ::-1] if rows else drawn_points(ax)  # (place, value)
    assert sorted(points[:, 1]) == [1, 2, 5, 6]
    assert len(set(points[:3, 0])) == 3 and points[:3, 0].mean() == pytest.approx(0)
    assert points[3, 0] == pytest.approx(1)
    assert drawn_bars(ax, rows=rows) == [(0, 3)]  # one value has no bar


def test_a_strip_can_have_medians_hollow_points_or_no_bar():
    ax, bare = plots.axes(), plots.axes()
    plots.strip(ax, RUNS, "kind", "score", hollow=["a"], middle="median")
    plots.strip(bare, RUNS, "kind", "score", middle=None)
    assert drawn_bars(ax, rows=False) == [(0, 2)] and bare.get_lines()[:] == []
    drawn = [points for points in ax.collections if len(points.get_offsets())]
    faces = [mpl.colors.to_hex(points.get_facecolor()[0]) for points in drawn]
    assert [face == "#ffffff" for face in faces] == [False, False, False, True]


def test_strips_have_the_same_bytes_every_time(out, style):
    for name in ("one", "other"):
        ax = plots.axes()
        plots.strip(ax, RUNS, "kind", "score")
        plots.headline(ax, "Same")
        plots.save(ax, name)
    assert contents(out)["one.png"] == contents(out)["other.png"]


def test_seed_lines_join_the_runs_of_each_seed():
    ax = plots.axes()
    frame = pd.DataFrame(
        {"kind": ["b", "b", "a", "a"], "score": [1.0, 2, 6, 5], "seed": [0, 1] * 2}
    )
    plots.seed_lines(ax, frame, "kind", "score")
    first, second, mean = (list(line.get_ydata()) for line in ax.get_lines())
    assert (first, second, mean) == ([1, 6], [2, 5], [1.5, 5.5])


def test_a_heat_map_has_readable_numbers_and_leaves_out_what_is_missing():
    ax = plots.axes()
    plots.heat(ax, pd.DataFrame([[0.0, 1.0], [np.nan, 0.5]]), ".1f", vmax=1)
    assert [text.get_text() for text in ax.texts] == ["0.0", "1.0", "0.5"]
    assert [text.get_color() for text in ax.texts[:2]] == [plots.INK, "white"]


def test_facets_draw_each_value_in_a_panel_of_its_own(style):
    figure = plots.facets(
        RUNS,
        "kind",
        lambda ax, rows: ax.plot(rows["score"].to_numpy()),
        title="Panels",
        labels=("x", "y"),
        name="kind {}",
        handles=[Line2D([], [], label="all")],
    )
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["kind b", "kind a"]
    assert [list(ax.get_lines()[0].get_ydata()) for ax in figure.axes] == [[1, 2, 6], [5]]
    assert run_outputs.finding(figure) == "Panels"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all"]


def test_comparisons_are_told_in_words_by_their_signs():
    rows = {"better": [8, 4, 2], "worse": [4, 2, 1], "mean": [0.24, -0.51, 0.3], "pairs": 3}
    first, none = "in all 3 seeds 8 scored 0.2 points above 4", "no clear difference between"
    second = "4 scored 0.5 points below 2"
    told = {
        ">??": f"N: {first}; {none} 4, 2 and 1",
        "???": f"N: {none} 8, 4, 2 and 1",
        "><>": f"N: {first}, {second} and 2 scored 0.3 points above 1",
        "?>?": f"N: in all 3 seeds {second}; {none} 8 and 4; {none} 2 and 1",
    }
    for signs, words in told.items():
        assert plots.order_in_words(pd.DataFrame({**rows, "sign": [*signs]}), "N") == words


def test_values_apart_from_a_base_are_named():
    compared = pd.DataFrame({"low": [0.1, -1, np.nan], "high": [1.0, 1, np.nan]}, ["a", "b", "c"])
    assert plots.differing_in_words(compared, "c").endswith(": a")
    assert plots.differing_in_words(compared.drop("a"), "c").startswith("No clear difference")


def test_a_title_is_wrapped_inside_the_figure_even_beside_long_labels(style):
    ax = plots.axes()
    ax.set_yticks([0, 1], ["a rather long label", "b"])
    plots.headline(ax, "One active expert in four makes MoEBERT faster than BERT by a half")
    figure = ax.get_figure()
    run_outputs.settle(figure)
    title = title_of(ax)
    assert "\n" in title.get_text()
    assert title.get_window_extent().x1 <= figure.bbox.x1


def test_a_long_title_is_balanced_over_no_more_lines_than_it_needs(style):
    ax = plots.axes()
    title = "With half of the neurons gone, importance is worth +1.9 points over luck, it seems"
    plots.headline(ax, title)
    first, second = title_of(ax).get_text().split("\n")
    assert f"{first} {second}" == title and len(first) < 1.4 * len(second)


def test_a_legend_above_covers_neither_axes_nor_title(style):
    ax = picture()
    run_outputs.settle(ax.get_figure())
    legend = ax.get_legend().get_window_extent()
    assert legend.y0 >= ax.get_window_extent().y1 - 1
    assert legend.y1 <= title_of(ax).get_window_extent().y0 + 1


def test_colours_of_roles_differ_in_lightness_so_that_grey_print_keeps_them_apart():
    roles = [plots.COLORS[n] for n in ("shared", "own", "dropped")] + [plots.INK]
    weights = np.array([0.2126, 0.7152, 0.0722])
    lightness = sorted(float(weights @ mpl.colors.to_rgb(color)) for color in roles)
    assert min(np.diff(lightness)) > 0.12


@pytest.mark.parametrize("color, ink", [("#000080", "white"), ("#FFFFAA", plots.INK)])
def test_text_on_a_colour_can_be_read(color, ink):
    assert plots.ink_on(color) == ink


def test_importing_or_drawing_changes_no_style():
    before = dict(mpl.rcParams)
    picture()
    assert dict(mpl.rcParams) == before
