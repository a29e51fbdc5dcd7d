"""What a notebook's run writes: figures, tables and recorded numbers; copies of them."""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from moebert_lib.config.errors import CHECKOUT, UserError, home
from moebert_lib.config.file_io import replacing, write_bytes, write_json
from moebert_lib.config.provenance import digest, file_digest
from moebert_lib.store import store
from moebert_lib.store.committed_results import ROWS
from moebert_lib.store.store import Entry, Store, output_dir

#: The environment variable for vector formats, and its possible values.
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
    with replacing(path) as temporary:
        produce(str(temporary))


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
    markdown = f"{caption}\n\n{_markdown(cells, numeric)}\n"
    write_bytes(output_file(name, "md"), markdown.encode())
    write_bytes(output_file(name, "tex"), _latex(cells, numeric, caption, name).encode())
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


# Figures and tables of runs, copied to runs/figures with a note of where each comes from.

PROVENANCE = "provenance.json"
LONGEST = 80  # characters of a folder's name


def destination(settings: Mapping[str, Any] | None, *, changed: Mapping[str, Any]) -> Path:
    """``runs/figures/`` for scale quick unchanged, else a folder in it named by what is run.

    The name is ``<scale>-<task>`` and each further value that was changed, such as
    ``quick-library-n_experts2-seed1``. Where that is too long, or has other characters than
    letters, digits and ``_.-``, the name ends with a digest.

    Args:
        settings: Of the notebook, None where it takes none.
        changed: Values by name that differ from the notebook's defaults, the scale left out.
    """
    figures = home() / "runs" / "figures"
    if not changed and (settings is None or settings["scale"] == "quick"):
        return figures
    words = ["changed" if settings is None else f"{settings['scale']}-{settings['task']}"]
    for name, value in sorted(changed.items()):
        if name not in ("task", "data_dir"):
            text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"{name}{text}")
    name = "-".join(words)
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
    if plain == name and len(name) <= LONGEST:
        return figures / name
    ending = f"-{digest(name)[:8]}"
    return figures / (plain[: LONGEST - len(ending)] + ending)


def publish(entry: Entry, folder: Path) -> None:
    """Make ``folder`` hold exactly the run's figures, among those of other notebooks.

    Files that are there already with the same bytes are left alone; missing or changed ones are
    restored; those that an earlier run of the same notebook left are removed.
    """
    record, notebook = entry.record(), entry.key.choices["notebook"]
    made = {
        name.removeprefix("figures/"): sha256
        for name, sha256 in record["files"].items()
        if name.startswith("figures/")
    }
    with FileLock(Store().root / "locks" / "figures.lock"):  # another batch may publish too
        known = read_provenance(folder)
        kept = {name: about for name, about in known.items() if about["notebook"] != notebook}
        for name in known.keys() - kept.keys() - made.keys():
            (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name, sha256 in made.items():
            target = folder / name
            if not target.is_file() or file_digest(target) != sha256:
                write_bytes(target, (entry.folder / "figures" / name).read_bytes())
            kept[name] = _origin(entry, record) | {"sha256": sha256}
        if kept != known:
            write_json(folder / PROVENANCE, kept)


def read_provenance(folder: Path) -> dict[str, dict[str, Any]]:
    """Per file: notebook, run, settings, seeds, data, versions, commit, sha256."""
    try:
        return json.loads((folder / PROVENANCE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _origin(entry: Entry, record: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run's files come from; drawn from committed results, what any machine repeats."""
    settings = entry.key.choices.get("settings") or {}
    origin = {
        "notebook": entry.key.choices["notebook"],
        "run": run_of(entry),
        "settings": settings,
        "seeds": {name: value for name, value in settings.items() if "seed" in name},
        "inputs": entry.key.origin.get("inputs", {}),
    }
    made_with = () if ROWS in origin["inputs"] else ("versions", "commit", "machine")
    return origin | {name: record[name] for name in made_with}


def run_of(entry: Entry) -> str:
    """The digest that names a run in a provenance file.

    It is the entry's, or that of notebook, values and results where it was drawn from results.
    """
    inputs = entry.key.origin.get("inputs", {})
    return digest({**entry.key.choices, "inputs": inputs}) if ROWS in inputs else entry.digest


# The numbers that a notebook records of its run, for the table of a sweep and for an export.

METRICS = "metrics.json"
#: What this process has recorded, by the run's folder: no run reads the numbers of another.
RECORDED: dict[Path, dict[str, Any]] = {}


def record(**metrics: Any) -> None:
    """Keep numbers of the run that this notebook is; a name given again replaces the first.

    In a notebook: ``record(accuracy=0.75, steps=120)``. A number that is not finite is kept as
    the text ``nan``, ``inf`` or ``-inf``, so that every table shows it.

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
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def row_of_run(notebook: str, chosen: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The row of a notebook's run: its figures, changed values and recorded numbers.

    Args:
        notebook: Its name.
        chosen: Values that differ from the notebook's defaults, by name.
        folder: Of the run.
    """
    return {
        "notebook": notebook,
        "figures": sorted(path.name for path in (folder / "figures").iterdir()),
        "changed": {name: value for name, value in chosen.items() if name != "data_dir"},
        "metrics": read_metrics(folder),
    }


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
