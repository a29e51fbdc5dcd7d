"""One set of smoke runs for all test files: what one worker has run, another finds.

Each test file has a home of its own, so figures are published apart; ``runs/`` is shared, and
the store's locks keep two workers from running the same notebook at the same time.
"""

import os
from pathlib import Path

from conftest import make_home


def home(folder: Path, tmp_path_factory) -> Path:
    """A new MOEBERT_HOME in ``folder`` whose runs are shared among workers."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke-runs"
    shared.mkdir(exist_ok=True)
    make_home(folder)
    (folder / "runs").symlink_to(shared, target_is_directory=True)
    return folder
