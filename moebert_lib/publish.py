"""Copy a run's figures and tables to where people look, with where each came from."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebert_lib.archive import ROWS
from moebert_lib.errors import home
from moebert_lib.store import Entry, digest, file_digest, write_bytes, write_json

PROVENANCE = "provenance.json"
LONGEST = 80  # characters of a folder's name


def destination(settings: dict[str, Any] | None, *, changed: Mapping[str, Any]) -> Path:
    """``figures/`` for the quick scale as it stands, else a folder in it named by what is run.

    The name is ``<scale>-<task>`` and each further value that was changed, such as
    ``quick-library-n_experts2-seed1``; a digest stands for what a name cannot hold.

    Args:
        settings: Of the notebook, None where it takes none.
        changed: Values by name that differ from the notebook's defaults, the scale left out.
    """
    figures = home() / "figures"
    if not changed and (settings is None or settings["scale"] == "quick"):
        return figures
    head = "changed" if settings is None else f"{settings['scale']}-{settings['task']}"
    further = {name: changed[name] for name in sorted(changed) if name not in ("task", "data_dir")}
    return figures / _safe("-".join([head, *(f"{k}{_word(v)}" for k, v in further.items())]))


def _word(value: Any) -> str:
    """A value as text for a name: ``[1, 2]`` is ``1_2``."""
    return "_".join(map(str, value)) if isinstance(value, list) else str(value)


def _safe(name: str) -> str:
    """A name of short, plain characters; with a digest where that loses anything."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
    if plain == name and len(name) <= LONGEST:
        return name
    short = digest(name)[:8]
    return f"{plain[: LONGEST - len(short) - 1]}-{short}"


def publish(entry: Entry, folder: Path) -> list[Path]:
    """Make ``folder`` hold exactly the run's figures, among those of other notebooks.

    Files that are there already with the same bytes are left alone; missing or changed
    ones are restored; those that an earlier run of the same notebook left are removed.
    """
    notebook, record = entry.key["notebook"], entry.record()
    known = read_provenance(folder)
    made = {}
    for name, sha256 in record["files"].items():
        if name.startswith("figures/"):
            made[Path(name).name] = sha256
            _copy(entry.folder / name, folder / Path(name).name, sha256)
    for name in [name for name, about in known.items() if about["notebook"] == notebook]:
        del known[name]
        if name not in made:
            (folder / Path(name).name).unlink(missing_ok=True)
    about = _about(entry, record)
    known |= {name: {**about, "sha256": sha256} for name, sha256 in made.items()}
    if known != read_provenance(folder):
        write_json(folder / PROVENANCE, known)
    return [folder / name for name in made]


def read_provenance(folder: Path) -> dict[str, dict[str, Any]]:
    """Per file: notebook, run, settings, seeds, data, versions, commit, sha256."""
    try:
        return json.loads((folder / PROVENANCE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _about(entry: Entry, record: dict[str, Any]) -> dict[str, Any]:
    """Where a run's files come from; of one drawn from results only what any machine repeats.

    There each row says with which code, versions and machine it was made (``archive``).
    """
    settings = entry.key.get("settings") or {}
    about = {
        "notebook": entry.key["notebook"],
        "run": run_of(entry),
        "settings": settings,
        "seeds": {name: value for name, value in settings.items() if "seed" in name},
        "inputs": entry.key.get("inputs", {}),
    }
    made = () if _drawn(entry) else ("versions", "commit", "machine")
    return about | {name: record[name] for name in made}


def run_of(entry: Entry) -> str:
    """The digest by which provenance names a run: its entry's, or where it was drawn from results
    that of notebook, values and results alone."""
    decides = ("notebook", "cells", "parameters", "settings", "inputs")
    return digest({name: entry.key[name] for name in decides}) if _drawn(entry) else entry.digest


def _drawn(entry: Entry) -> bool:
    return ROWS in entry.key.get("inputs", {})


def _copy(source: Path, target: Path, sha256: str) -> None:
    if target.is_file() and file_digest(target) == sha256:
        return
    os.makedirs(target.parent, exist_ok=True)
    write_bytes(target, source.read_bytes())
