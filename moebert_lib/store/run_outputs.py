"""Files of figures and tables: where they lie, whole or not at all, the same bytes each time."""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from moebert_lib.config.errors import CHECKOUT, UserError, home
from moebert_lib.config.file_io import write_json
from moebert_lib.store import store
from moebert_lib.store.store import output_dir

#: Environment variable that asks for vector formats, and the formats it may name.
FORMATS, VECTORS = "MOEBERT_FORMATS", ("pdf", "svg")


def finding(figure: Figure) -> str:
    """What a figure's headline says, in one line; of several panels, each headline in turn."""
    above = [figure.get_suptitle(), *(part.get_suptitle() for part in figure.subfigs)]
    titles = [text for text in above if text] or [ax.get_title(loc="left") for ax in figure.axes]
    return ". ".join(" ".join(text.split()) for text in titles if text.strip())


def output_file(name: str, ending: str) -> Path:
    """Where ``name`` is written; refuses anything but a plain name."""
    if not name or Path(name).name != name or "." in name:
        raise ValueError(f"name={name!r} must be a file name without folder or ending")
    return store.output_dir() / f"{name}.{ending}"


def vector_formats() -> list[str]:
    """Formats that figures are written in beside PNG, from the variable MOEBERT_FORMATS.

    It names them with commas between: ``pdf``, ``svg`` or ``pdf,svg``. The default is none.

    Raises:
        UserError: an unknown format.
    """
    named = os.environ.get(FORMATS, "")
    formats = [name.strip().lower() for name in named.split(",") if name.strip()]
    unknown = [name for name in formats if name not in VECTORS]
    if unknown:
        raise UserError(
            f"{FORMATS}: unknown format {unknown[0]!r}; choose from {', '.join(VECTORS)}"
        )
    return formats


def write(path: Path, produce: Callable[[str], object]) -> None:
    """Let ``produce`` write a temporary file, then move it to ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    os.close(handle)
    try:
        produce(temporary)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_csv(data: pd.DataFrame, path: str) -> None:
    """CSV with eight digits: the last bits of a float differ between machines."""
    index = not only_counts(data.index)
    data.to_csv(path, index=index, float_format="%.8g", lineterminator="\n")


def only_counts(index: pd.Index) -> bool:
    """Whether a table's index says nothing: unnamed row numbers, not shown or written."""
    return index.names == [None] and pd.api.types.is_integer_dtype(index)


def settle(figure: Figure) -> None:
    """Lay the figure out once and for all, so that saving it again gives equal bytes.

    Constrained layout starts from where it last stopped, and moves by the last bit of a float.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


# Tables for people: the same cells as Markdown, LaTeX and on screen, the numbers as CSV.

DASH = "–"

#: What LaTeX does not print as it stands.
_LATEX = {
    "–": "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "λ": r"$\lambda$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "−": "$-$",
    "Δ": r"$\Delta$",
    "ρ": r"$\rho$",
    "|": r"\textbar{}",
}


def save_table(
    df: pd.DataFrame,
    name: str,
    *,
    caption: str,
    decimals: int = 1,
    formats: Mapping[str, str] | None = None,
) -> Styler:
    """Write a table as ``<name>.md``, ``<name>.tex`` and ``<name>.csv``, and show it.

    Cells become text first, so that 89.0 keeps its zero. Numbers are set right, words left.
    The files lie in ``store.output_dir()``, appear whole, and are the same bytes each time.

    Args:
        df: One column per thing shown; an index that is not just row numbers comes
            first. Missing values are printed as a dash.
        name: File name without ending, such as ``"table3"``; also the LaTeX label.
        caption: One sentence that says what, on which data, over how many seeds.
        decimals: Digits after the point of floats.
        formats: Format specifications of single columns, such as ``{"p": ".3f"}``.

    Returns:
        The table for display in a notebook, caption included.

    Raises:
        ValueError: ``name`` holds a folder or an ending, or ``formats`` an unknown column.
    """
    shown = df if only_counts(df.index) else df.reset_index()
    unknown = [column for column in formats or {} if column not in shown]
    if unknown:
        raise ValueError(f"no column {unknown[0]!r}; the table has {', '.join(map(str, shown))}")
    cells = as_text(shown, decimals=decimals, formats=formats)
    numeric = [pd.api.types.is_numeric_dtype(kind) for kind in shown.dtypes]
    _write_text(f"{caption}\n\n{_markdown(cells, numeric)}\n", name, "md")
    _write_text(_latex(cells, numeric, caption, name), name, "tex")
    write(output_file(name, "csv"), lambda path: write_csv(df, path))
    return _screen(cells, numeric, caption)


def as_text(
    df: pd.DataFrame, *, decimals: int = 1, formats: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Every cell as it is printed.

    Example:
        >>> as_text(pd.DataFrame({"task": ["rte"], "acc": [74.0], "n": [2490]})).values.tolist()
        [['rte', '74.0', '2,490']]
    """

    def text(value: object, spec: str) -> str:
        if pd.isna(value):
            return DASH
        if isinstance(value, str | bool):
            return str(value)
        return format(value, spec)

    def spec(column: object) -> str:
        counts = pd.api.types.is_integer_dtype(df[column])
        plain = "" if not pd.api.types.is_numeric_dtype(df[column]) else f".{decimals}f"
        return (formats or {}).get(column, "," if counts else plain)

    return pd.DataFrame({c: [text(v, spec(c)) for v in df[c]] for c in df}, index=df.index)


def _write_text(text: str, name: str, ending: str) -> None:
    def produce(path: str) -> None:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)

    write(output_file(name, ending), produce)


def _markdown(cells: pd.DataFrame, numeric: list[bool]) -> str:
    escaped = cells.map(_escape_markdown).rename(columns=lambda c: _escape_markdown(str(c)))
    align = ["right" if number else "left" for number in numeric]
    return escaped.to_markdown(index=False, disable_numparse=True, colalign=align)


def _escape_markdown(text: str) -> str:
    for character in "\\|*_`":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")


def _latex(cells: pd.DataFrame, numeric: list[bool], caption: str, name: str) -> str:
    styler = cells.style.format(escape="latex").format_index(escape="latex", axis=1)
    table = styler.hide(axis="index").to_latex(
        hrules=True,
        position_float="centering",
        position="t",
        label=f"tab:{name}",
        column_format="".join("r" if number else "l" for number in numeric),
        caption="CAPTION",
    )
    words = pd.DataFrame([[caption]]).style.format(escape="latex").hide().hide(axis=1).to_latex()
    escaped = words.split("\n")[1].removesuffix(r"\\").strip()  # Styler leaves captions as they are
    table = table.replace("CAPTION", escaped, 1)
    for character, command in _LATEX.items():
        table = table.replace(character, command)
    return table


def _screen(cells: pd.DataFrame, numeric: list[bool], caption: str) -> Styler:
    styler = cells.style.format(escape="html").format_index(escape="html", axis=1)
    styler = styler.hide(axis="index").set_caption(caption)
    for column, number in zip(cells, numeric, strict=True):
        styler = styler.set_properties(
            subset=[column], **{"text-align": "right" if number else "left"}
        )
    return styler.set_table_styles(
        [
            {"selector": "caption", "props": "text-align: left; padding-bottom: 0.5em"},
            {"selector": "th", "props": "text-align: left; border-bottom: 1px solid #444"},
        ]
    )


# The numbers by which a notebook's run is told in a sweep's table and in an export.

METRICS = "metrics.json"
#: What this process has recorded, by the run's folder: no run reads the numbers of another.
RECORDED: dict[Path, dict[str, Any]] = {}


def record(**metrics: Any) -> None:
    """Keep numbers of the run that this notebook is; a name given again replaces the first.

    In a notebook: ``record(accuracy=0.75, steps=120)``.

    Raises:
        UserError: a value that is neither number, text, truth value nor None.
    """
    plain = {name: _plain(name, value) for name, value in metrics.items()}
    folder = output_dir().parent
    RECORDED[folder] = RECORDED.get(folder, {}) | plain
    write_json(folder / METRICS, RECORDED[folder])


def read_metrics(folder: Path) -> dict[str, Any]:
    """The numbers that were recorded of the run in a folder; empty where there are none."""
    path = folder / METRICS
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _plain(name: str, value: Any) -> Any:
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if value is not None and not isinstance(value, bool | int | float | str):
        raise UserError(f"record: {name} is a {type(value).__name__}; expected a number or a text")
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What a kernel that writes figures and tables needs to know.


def kernel_environment(
    figures: Path, *, offline: bool, changes: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment of a notebook's kernel: this process's, and where figures go.

    Args:
        figures: The folder of the run's figures and tables.
        offline: Forbid downloads.
        changes: Further variables, such as the run's threads and GPU.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    library = str(CHECKOUT)  # the kernel runs the library that planned the run
    environment |= {
        "MOEBERT_HOME": str(home()),
        "MOEBERT_FIGURES": str(figures),
        "PYTHONPATH": os.pathsep.join(filter(None, [library, environment.get("PYTHONPATH")])),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    if sys.platform == "linux":  # keep large buffers: 15 % faster on big CPU batches
        environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return environment | dict(changes or {})
