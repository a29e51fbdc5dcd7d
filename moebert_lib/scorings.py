"""Every score of a teacher's neurons (``scores``), made once and kept."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from moebert_lib import archive
from moebert_lib.inputs import dataset
from moebert_lib.scores import SCORES, every_score
from moebert_lib.settings import Settings
from moebert_lib.store import code_digest
from moebert_lib.teachers import importance_key, teacher


def scorings_key(settings: Settings) -> dict:
    """What the scores depend on, given what importance depends on."""
    return {
        "importance": importance_key(settings),
        "kinds": list(SCORES),
        "code": code_digest("scores", "experts"),
    }


def scorings(settings: Settings) -> dict[str, Tensor]:
    """All of :data:`scores.SCORES` for the teacher, from the store or computed now.

    The examples are those that Eq. 4 is scored on; ``random`` has seed 0.

    Returns:
        Name to scores ``(L, F)``, float64, in the order of ``SCORES``.
    """

    def build(folder: Path) -> dict:
        model, bundle = teacher(settings).model, dataset(settings)
        batches = bundle.batches(
            settings.importance_split,
            batch_size=32,
            limit=settings.importance_examples,
            shuffle=True,
        )
        found = every_score(model, batches)
        save_file({kind: one.scores for kind, one in found.items()}, folder / "scores.safetensors")
        return {"n_examples": found["importance"].n_examples}

    entry = archive.store().make("scores", scorings_key(settings), build)
    print(f"· scores for {settings.task}: {entry.origin}", flush=True)
    kept = load_file(entry.folder / "scores.safetensors")
    return {kind: kept[kind] for kind in SCORES}
