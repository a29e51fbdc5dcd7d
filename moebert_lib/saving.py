"""Files of figures and tables: where they lie, whole or not at all, the same bytes each time."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from moebert_lib import store


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
