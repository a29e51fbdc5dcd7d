"""The mirror: entries come back as they went, whole, from any file system, and tricks do not."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from hostile import HOSTILE

from moebert_lib.config.errors import CHECKOUT, UserError
from moebert_lib.config.file_io import DAY
from moebert_lib.config.provenance import checksums
from moebert_lib.store.shared import Shared
from moebert_lib.store.store import Store


class Objects(MemoryFileSystem):
    """Behaves as an object store: uploads appear whole, and there are no folders to make."""

    protocol = "oss"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("oss://", "memory://"))

    def put_file(self, lpath, rpath, **kwargs):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def makedirs(self, path, exist_ok=False):
        raise PermissionError("no new buckets")


@pytest.fixture(params=["memory", "oss", "file"])
def url(request, tmp_path):
    register_implementation("oss", Objects, clobber=True)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    place = f"{tmp_path}/mirror" if request.param == "file" else "mirror"
    return f"{request.param}://{place}"


@pytest.fixture
def one(tmp_path, url) -> Store:
    return Store(tmp_path / "one", shared=url)


@pytest.fixture
def other(tmp_path, url) -> Store:
    return Store(tmp_path / "other", shared=url)


def write_one(folder: Path) -> dict:
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text("one")
    (folder / "empty").touch()
    return {"score": 0.5}


def must_not_build(folder: Path) -> dict:
    raise AssertionError("built although it is shared")


def objects(mirror: Shared) -> list[str]:
    """All that lies in a mirror, below its address."""
    return sorted(path.removeprefix(mirror.root + "/") for path in mirror.fs.find(mirror.root))


def test_an_entry_made_in_one_store_is_reused_in_another(one, other):
    made = one.make("unit", {"a": 1}, write_one)
    again = other.make("unit", {"a": 1}, must_not_build)
    assert (made.reused, again.reused) == (False, True) and made.folder != again.folder
    assert checksums(made.folder) == checksums(again.folder)
    assert objects(one.shared) == [f"{made.folder.name}.zip"]
    for each in (one, other):
        assert list((each.root / "tmp").iterdir()) == []


def test_find_looks_in_the_mirror_too(one, other):
    assert other.find("unit", {}) is None and not other.root.exists()
    one.make("unit", {}, write_one)
    assert other.find("unit", {}).row == {"score": 0.5}
    assert len(other.entries()) == 1


def test_pull_fetches_what_is_missing_and_counts_it(one, other):
    for number in range(3):
        one.make("unit", {"n": number}, lambda folder, n=number: {"n": n})
    other.make("unit", {"n": 1}, must_not_build)
    assert other.entries()[0].row == {"n": 1}
    assert (other.pull(), other.pull()) == (2, 0)
    assert sorted(entry.row["n"] for entry in other.entries()) == [0, 1, 2]


def test_what_was_made_before_there_was_a_mirror_is_sent_when_it_is_reused(one, other):
    Store(one.root).make("unit", {}, write_one)
    assert one.shared.names() == []
    assert one.make("unit", {}, must_not_build).reused
    assert other.make("unit", {}, must_not_build).reused


def test_force_replaces_an_entry_here_and_in_the_mirror(one, other):
    one.make("unit", {}, lambda folder: {"score": 0})
    forced = other.make("unit", {}, lambda folder: {"score": 1}, force=True)
    assert not forced.reused and one.find("unit", {}).row == {"score": 0}
    one.make("unit", {}, lambda folder: {"score": 2}, force=True)
    third = Store(one.root.with_name("third"), shared=one.shared.url)
    assert third.make("unit", {}, must_not_build).row == {"score": 2}


def test_a_damaged_entry_is_mended_from_the_mirror(one):
    made = one.make("unit", {}, write_one)
    (made.folder / "deep" / "a.txt").write_text("two")
    assert one.make("unit", {}, must_not_build).reused
    assert (made.folder / "deep" / "a.txt").read_text() == "one"


def test_a_push_that_dies_midway_shows_nothing_and_keeps_the_entry(monkeypatch, capsys, one, other):
    def half(self, here, there, **kwargs):
        if self.protocol != "oss":
            self.pipe_file(there, Path(here).read_bytes()[:100])
        raise ConnectionError("the line\nis dead")

    with monkeypatch.context() as patch:
        patch.setattr(type(one.shared.fs), "put_file", half)
        assert not one.make("unit", {}, write_one).reused
        said = capsys.readouterr().err
        assert re.search("cannot be written: the line is dead; unit-.* is complete in", said)
        assert other.find("unit", {}) is None and objects(one.shared) == []
        assert one.find("unit", {}).row == {"score": 0.5}
    assert one.make("unit", {}, must_not_build).reused
    assert other.make("unit", {}, must_not_build).reused


def test_a_push_removes_what_killed_ones_left_a_day_ago(tmp_path):
    left = tmp_path / "mirror" / "tmp"
    left.mkdir(parents=True)
    for name, age in (("old", 2), ("new", 0.5)):
        (left / name).touch()
        os.utime(left / name, (time.time() - age * DAY,) * 2)
    Store(tmp_path / "one", shared=str(tmp_path / "mirror")).make("unit", {}, write_one)
    assert [path.name for path in left.iterdir()] == ["new"]


def test_a_mirror_that_cannot_be_reached_is_one_line_before_any_work(monkeypatch, one):
    def down(self, path, **kwargs):
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(type(one.shared.fs), "info", down)
    for ask in (
        lambda: one.make("unit", {}, must_not_build),
        lambda: one.find("unit", {}),
        lambda: one.shared.has("unit"),
    ):
        with pytest.raises(UserError, match="cannot be reached: nobody there") as error:
            ask()
        assert one.shared.url in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "address, words",
    [
        ("absent://bucket/store", "store 'absent://bucket/store': Install absentfs"),
        ("s3n://bucket/store", r"knows 's3n://'; did you mean 's3'\?, or install"),
        ("mirror", "expected a whole path, as '.*/mirror'"),
        ("file://mirror", "expected a whole path, as '.*/mirror'"),
        ("zz://ann:secret@host/x", "^(?!.*secret).*zz://host/x"),
    ],
)
def test_an_address_that_cannot_be_had_is_refused_in_one_line(tmp_path, address, words):
    register_implementation("absent", "absentfs.System", clobber=True, errtxt="Install absentfs")
    with pytest.raises(UserError, match=words) as error:
        Store(tmp_path, shared=address)
    assert "\n" not in str(error.value)


def test_the_environment_names_the_mirror_of_the_default_store_only(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path))
    monkeypatch.setenv("MOEBERT_STORE", str(tmp_path / "mirror"))
    assert Store().shared.root == str(tmp_path / "mirror")
    assert Store(tmp_path / "runs").shared is None and Store(shared="").shared is None
    monkeypatch.setenv("MOEBERT_STORE", "")
    assert Store().shared is None


@pytest.mark.parametrize("trick", HOSTILE)
def test_an_object_that_lies_is_named_moved_away_and_made_again(one, other, capsys, trick):
    lie, words = HOSTILE[trick]
    made = one.make("unit", {"a": 1}, write_one)
    good = {path: (made.folder / path).read_bytes() for path in checksums(made.folder)}
    one.shared.fs.pipe_file(f"{one.shared.root}/{made.folder.name}.zip", lie(good, made.record()))
    before = {path for path in one.root.parent.rglob("*") if "mirror" not in path.parts}
    assert other.find("unit", {"a": 1}) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and f"{one.shared.url}/{made.folder.name}.zip: " in line
    (aside,) = objects(one.shared)
    assert aside.startswith(f"damaged/{made.folder.name}-")
    left = {path for path in one.root.parent.rglob("*") if "mirror" not in path.parts} - before
    assert {path.name for path in left if path.is_file()} == {f"{made.folder.name}.lock"}
    assert not other.make("unit", {"a": 1}, write_one).reused
    assert one.shared.names() == [made.folder.name]


def test_an_entry_with_a_pickle_is_not_sent(one, capsys):
    def pickled(folder):
        (folder / "model.pt").write_bytes(b"")
        return {}

    one.make("unit", {}, pickled)
    said = capsys.readouterr().err
    assert re.search(r"'model.pt' is a pickle.*unit-.* is complete in", said)
    assert len(one.entries()) == 1 and one.shared.names() == []


def test_names_are_those_of_entries_only(one):
    assert one.shared.names() == []
    made = one.make("unit", {}, write_one)
    for name in ("notes.txt", "..zip", "unit-0123.zip", f"{made.folder.name}.zip.1a2b"):
        one.shared.fs.pipe_file(f"{one.shared.root}/{name}", b"")
    assert one.shared.names() == [made.folder.name]


def test_machines_that_want_the_same_entry_build_it_once(tmp_path):
    script = tmp_path / "one.py"
    script.write_text(
        "import sys, time\n"
        "from moebert_lib.store import Store\n"
        "def build(folder):\n"
        "    with open('log', 'a') as log: log.write('built\\n')\n"
        "    time.sleep(1)\n"
        "    return {'score': 1}\n"
        "entry = Store(sys.argv[1], shared=sys.argv[2]).make('unit', {}, build)\n"
        "assert entry.row == {'score': 1}\n"
    )
    env = {"PYTHONPATH": str(CHECKOUT)}
    both = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / root), str(tmp_path / "mirror")],
            env=env,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
        )
        for root in ("one", "other")
    ]
    assert [process.wait(120) for process in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "built\n"
    mirror = Shared(str(tmp_path / "mirror"))
    assert objects(mirror) == [f"{name}.zip" for name in mirror.names()]


def test_what_another_machine_is_making_is_busy_here(one, other):
    def build(folder):
        assert other.busy("unit", {}) and not other.busy("unit", {"a": 1})
        return write_one(folder)

    assert not one.busy("unit", {})
    one.make("unit", {}, build)
    assert not one.busy("unit", {}) and not other.busy("unit", {})


def test_what_was_made_before_there_was_a_mirror_is_sent_when_it_is_asked_for(one, other):
    Store(one.root).make("unit", {}, write_one)
    assert other.find("unit", {}) is None
    one.send(one.find("unit", {}))
    assert other.find("unit", {}).row == {"score": 0.5}
