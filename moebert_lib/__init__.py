"""MoEBERT: a fine-tuned BERT's feed-forward layers turned into importance-guided experts.

Shapes are written in one alphabet: ``B`` batch, ``T`` tokens, ``D`` hidden size, ``F`` neurons
of a dense FFN, ``E`` experts, ``K`` neurons of an expert, ``L`` layers.

Importing this package registers MoEBERTs of all families with transformers' ``AutoConfig``,
``AutoModel``, ``AutoModelForSequenceClassification`` and ``AutoModelForQuestionAnswering``.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("moebert")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

#: Public names, and the module that holds each.
PUBLIC = {
    "Importance": "method.importance",
    "ffn_importance": "model.accelerate",
    "deal_neurons": "method.partition",
    "to_moebert": "model.conversion",
    "MoEBertConfig": "model.modeling",
    "MoEBertForSequenceClassification": "model.modeling",
    "MoEBertForQuestionAnswering": "model.modeling",
    "accelerate": "model.accelerate",
    "parameter_counts": "model.moe_layer",
    "record_routes": "model.moe_layer",
    "DistillationTrainer": "training.trainer",
    "Settings": "config.settings",
    "record": "store.run_outputs",
    "start_run": "runs.notebook_session",
    "sweep": "runs.sweep",
}
__all__ = sorted(PUBLIC)


def lazy_files(folder: str, path: str) -> tuple[Callable, Callable]:
    """``__getattr__`` and ``__dir__`` of a package that imports its modules when they are named.

    Args:
        folder: The package's ``__name__``, such as ``moebert_lib.plots``.
        path: Its ``__file__``.
    """
    names = sorted({file.stem for file in Path(path).parent.glob("[a-z]*")})

    def load(name: str):
        if name not in names:
            raise AttributeError(f"{folder} has no '{name}'; it has {', '.join(names)}")
        return importlib.import_module(f"{folder}.{name}")

    return load, lambda: names


_folder, _folders = lazy_files(__name__, __file__)


def __getattr__(name: str):
    if name in PUBLIC:
        return getattr(importlib.import_module(f"moebert_lib.{PUBLIC[name]}"), name)
    return _folder(name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, *_folders()]


def _is_command() -> bool:
    """Whether this process is the ``moebert`` command, or one that runs notebooks for it."""
    by_script = Path(sys.argv[0]).name in ("moebert", "moebert.exe") if sys.argv else False
    module = sys.orig_argv[2] if sys.orig_argv[1:2] == ["-m"] else ""
    return by_script or module == "moebert_lib"


if not _is_command():  # the command imports torch and transformers only where it needs them
    importlib.import_module("moebert_lib.model.modeling")  # registers with AutoConfig and AutoModel
