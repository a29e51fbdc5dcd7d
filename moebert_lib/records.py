"""The numbers by which a notebook's run is told in a sweep's table and in an export."""

import json
import math
from typing import Any

from moebert_lib.errors import UserError
from moebert_lib.store import output_dir, write_json

FILE = "metrics.json"


def record(**metrics: Any) -> None:
    """Keep numbers of the run that this notebook is; a name given again replaces the first.

    In a notebook: ``record(accuracy=0.75, steps=120)``.

    Raises:
        UserError: a value that is neither number, text, truth value nor None.
    """
    plain = {name: _plain(name, value) for name, value in metrics.items()}
    path = output_dir().parent / FILE
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    write_json(path, before | plain)


def _plain(name: str, value: Any) -> Any:
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if value is not None and not isinstance(value, bool | int | float | str):
        raise UserError(f"record: {name} is a {type(value).__name__}; expected a number or a text")
    return None if isinstance(value, float) and not math.isfinite(value) else value
