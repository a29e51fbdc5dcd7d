"""A MOEBERT_HOME whose notebooks are the tiny ones of ``tests/notebooks``."""

import shutil
from pathlib import Path

FIXTURES = Path(__file__).parent / "notebooks"

#: The workbook's names, each with the fixture that stands in for it.
WORKBOOK = {
    "00_the_idea": "plain",
    "01_importance": "settings",
    "02_experts": "settings",
    "03_distillation": "settings",
    "04_ablations": "settings",
    "05_routing": "settings",
    "06_results": "settings",
    "07_speed": "settings",
}


def make(folder: Path, notebooks: dict[str, str]) -> Path:
    """Fill ``folder`` with fixtures under the given names, and return it."""
    (folder / "notebooks").mkdir(parents=True)
    for name, fixture in notebooks.items():
        shutil.copy(FIXTURES / f"{fixture}.ipynb", folder / "notebooks" / f"{name}.ipynb")
    return folder
