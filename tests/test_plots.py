"""Style, saving and the shared marks; what single figures draw is tested beside their modules."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
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
    ax = plots.axes(None)
    ax.plot([0, 1], [2, 3], label="line")
    plots.headline(ax, "A finding", legend_rows=plots.legend_above(ax, 1))
    return ax


def title_of(ax):
    """The text that holds the left-aligned title."""
    return next(t for t in ax.findobj(Text) if t.get_text() == ax.get_title(loc="left") != "")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_writes_png_and_csv_and_nothing_else(out, style):
    path = plots.save(picture(), "figure0", pd.DataFrame({"x": [1.0, 0.1]}))
    assert path == out / "figure0.png"
    assert set(contents(out)) == {"figure0.png", "figure0.csv"}
    assert (out / "figure0.csv").read_bytes() == b"x\n1\n0.1\n"


def test_a_saved_figure_carries_its_finding_as_title(out, style):
    ax = plots.axes(None)
    plots.headline(ax, "Without hash-random, a step of -1.5 points is all that remains to be seen")
    path = plots.save(ax, "figure0")
    said = "Without hash-random, a step of \u22121.5 points is all that remains to be seen"
    assert "\n" in ax.get_title(loc="left")
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


def test_a_figure_of_panels_is_titled_by_its_headline_or_by_theirs():
    figure, panels = plots.panels(None, 2, per_row=2)
    for ax, title in zip(panels, ("One", "Other"), strict=True):
        ax.set_title(title)
        plots.headline(ax, title)
    assert run_outputs.finding(figure) == "One. Other"
    plots.headline(figure, "Both", legend_rows=1)
    assert run_outputs.finding(figure) == "Both"


def test_a_figure_without_a_finding_is_not_saved(out):
    with pytest.raises(ValueError, match="figure0 has no title"):
        plots.save(plots.axes(None), "figure0")
    assert contents(out) == {}


def test_names_at_the_ends_of_lines_keep_their_order_and_do_not_touch(style):
    ax = plots.axes(None)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ends = {name: (1.0, y, "k") for name, y in {"b": 0.5, "a": 0.49, "d": 0.9, "c": 0.51}.items()}
    plots.label_ends(ax, ends)
    run_outputs.settle(ax.get_figure())
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [text.get_text() for text in ax.texts] == ["a", "b", "c", "d"]
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))


def test_names_at_the_bottom_stay_above_the_axis(style):
    ax = plots.axes(None)
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


def test_dots_are_the_values_and_the_bar_their_mean():
    ax = plots.axes(None)
    plots.dots(ax, 3, [1.0, 2.0, 6.0], color="k")
    points, bar = ax.get_lines()
    assert list(points.get_ydata()) == [1, 2, 6]
    assert points.get_xdata().mean() == pytest.approx(3)
    assert list(bar.get_ydata()) == [3, 3]


def test_one_value_has_no_bar():
    ax = plots.axes(None)
    plots.dots(ax, 0, [1.0], color="k")
    assert len(ax.get_lines()) == 1


def test_a_title_is_wrapped_inside_the_figure_even_beside_long_labels(style):
    ax = plots.axes(None)
    ax.set_yticks([0, 1], ["a rather long label", "b"])
    plots.headline(ax, "One active expert in four makes MoEBERT faster than BERT by a half")
    figure = ax.get_figure()
    run_outputs.settle(figure)
    title = title_of(ax)
    assert "\n" in title.get_text()
    assert title.get_window_extent().x1 <= figure.bbox.x1


def test_a_long_title_is_balanced_over_no_more_lines_than_it_needs(style):
    ax = plots.axes(None)
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
