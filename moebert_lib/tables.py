"""Tables for people: the same cells as Markdown, LaTeX and on screen, the numbers as CSV."""

from collections.abc import Mapping

import pandas as pd
from pandas.io.formats.style import Styler

from moebert_lib.saving import only_counts, output_file, write, write_csv

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
