"""Write a folder of results (``archive``): the stages of many runs, all but their models."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_lib import columns
from moebert_lib.archive import FILES, ROWS, Archive, place
from moebert_lib.errors import UserError, home
from moebert_lib.provenance import to_json
from moebert_lib.store import Store, write_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

#: Files of a stage that figures are drawn from; models, tokenizers and states are left behind.
KEPT = {
    "teacher": ("config.json", "answers.csv"),
    "importance": ("importance.safetensors",),
    "excitation": ("excitation.safetensors", "tokens.json"),
    "removal": ("curves.csv",),
    "scores": ("scores.safetensors",),
    "score_removal": ("curves.csv",),
    "converted": ("answers.csv",),
    "student": ("answers.csv", "curve.csv", "distances.csv"),
    "about": (),
    "table": ("table.parquet",),
}
#: Columns without use here: ``of`` is what a table was measured of, whole, as its record has it.
LEFT = ["store", "superseded", "notebook", "of"]
PACKED = {"compression": "zstd", "compression_level": 19, "index": False}


def write(folder: Path, stores: Sequence[str | Path] = ()) -> tuple[int, int]:
    """Add the stages of stores to a folder of results; returns its numbers of rows and files.

    Of a stage that is there twice the newer stays. Equal results give equal bytes.

    Args:
        folder: Made where it is missing.
        stores: Each a MOEBERT_HOME or its ``runs/``; this home by default.

    Raises:
        UserError: no such store, or no stage anywhere.
    """
    from pandas import DataFrame

    found: dict[str, tuple[dict[str, Any], dict[str, bytes]]] = {}
    for record, files in [*_there(folder), *_new(stores)]:
        where = place(record["kind"], record["key"])
        if where not in found or found[where][0]["created"] <= record["created"]:
            found[where] = record, files
    if not found:
        raise UserError(
            "no stage of an experiment in the stores; expected a MOEBERT_HOME or its runs/ folder"
        )
    kept = sorted(found.values(), key=lambda one: (one[0]["kind"], one[0]["digest"]))
    files = [
        (record["digest"], name, content)
        for record, files in kept
        for name, content in sorted(files.items())
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _write(_rows([record for record, _ in kept]), folder / ROWS)
    _write(DataFrame(files, columns=["digest", "name", "content"]), folder / FILES)
    return len(kept), len(files)


def verify(folder: Path) -> None:
    """Every column of the rows says what the row's own record, which is sealed, says.

    Raises:
        UserError: naming the row and the column that do not; as :class:`archive.Archive`.
    """
    from pandas import read_parquet

    records = Archive(folder).records.values()
    packed = io.BytesIO()
    _rows(list(records)).to_parquet(packed, **PACKED)
    told, table = read_parquet(packed), read_parquet(folder / ROWS)
    for name in dict.fromkeys([*told, *table]):
        sides = [side.get(name) for side in (told, table)]
        if any(side is None for side in sides):
            raise UserError(f"{folder / ROWS}: column '{name}' is new or missing; restore the file")
        apart = ~((sides[0] == sides[1]) | (sides[0].isna() & sides[1].isna()))
        if apart.any():
            row = int(apart.argmax())
            raise UserError(
                f"{folder / ROWS}: row {row} says {name} {sides[1][row]}, its record "
                f"{sides[0][row]}; restore the file"
            )


def _there(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """What a folder of results holds already."""
    if (folder / ROWS).is_file():
        results = Archive(folder)
        for record in results.records.values():
            yield record, dict(results.files_of(record))


def _new(stores: Sequence[str | Path]) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """The stages in stores, with their small files."""
    for store in [Path(store).expanduser() for store in stores] or [home()]:
        root = store / "runs" if (store / "runs").is_dir() else store
        if not root.is_dir():
            raise UserError(f"no folder '{store}'; expected a MOEBERT_HOME or its runs/ folder")
        for entry in Store(root).entries():
            names = [name for name in KEPT.get(entry.kind, ()) if (entry.folder / name).is_file()]
            if entry.kind in KEPT:
                yield entry.record(), {name: (entry.folder / name).read_bytes() for name in names}


def _rows(records: Sequence[dict[str, Any]]) -> "DataFrame":
    """One row a stage: its settings and metrics as columns, and its whole record as JSON."""
    table = columns.table([columns.row(record) for record in records])
    whole = {record["digest"]: to_json(record) for record in records}
    table = table.drop(columns=LEFT, errors="ignore")
    return table.assign(record=table["digest"].map(whole))


def _write(table: "DataFrame", path: Path) -> None:
    """Whole or not at all, as small as it goes."""
    packed = io.BytesIO()
    table.to_parquet(packed, **PACKED)
    write_bytes(path, packed.getvalue())
