"""A disk that is full or forbidden is one line and no half entry; killed processes' dust goes."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from moebert_lib.config import file_io
from moebert_lib.config.file_io import Unwritable, replacing, write_bytes
from moebert_lib.store.store import StageKey, Store

SIZE = 2**18  # bytes of the small disk


@pytest.fixture
def runs(tmp_path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A disk of ``SIZE`` bytes: mounted where that is allowed, else one that says so."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "moebert", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if mounted:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    whole = Path.write_bytes

    def write(path, content):
        used = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        room = SIZE - used
        whole(path, content[: max(room, 0)])
        if len(content) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(content)

    monkeypatch.setattr(Path, "write_bytes", write)
    yield folder


def forbid(folder: Path, monkeypatch) -> None:
    """Make a folder read-only: by mounting it so, else by an operating system that says so."""
    mount = ["mount", "-o", "remount,ro", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True).returncode == 0:
            return
    except OSError:
        pass

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)


def files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(path.name for path in found)


def test_a_disk_that_fills_while_building_is_one_line_and_no_half_entry(small):
    runs = Store(small / "runs")
    kept = runs.make(StageKey("unit", {"a": 1}), lambda folder: {"score": 1})

    def too_much(folder):
        (folder / "large.bin").write_bytes(bytes(2 * SIZE))

    with pytest.raises(Unwritable) as error:
        runs.make(StageKey("unit", {"a": 2}), too_much)
    assert str(error.value) == (
        f"{runs.root} cannot be written: no space left on device; make room, finished runs are kept"
    )
    assert files(small) == ["entry.json"] and list((runs.root / "tmp").iterdir()) == []
    assert runs.find(StageKey("unit", {"a": 1})).row == kept.row
    assert runs.make(StageKey("unit", {"a": 2}), lambda folder: {"score": 2}).row == {"score": 2}


def test_a_disk_that_fills_with_the_record_is_one_line_and_no_half_entry(small):
    runs = Store(small / "runs")

    def all_there_is(folder):
        try:
            (folder / "large.bin").write_bytes(bytes(2 * SIZE))
        except OSError:
            return {"score": 1}

    with pytest.raises(Unwritable, match="no space left on device"):
        runs.make(StageKey("unit", {}), all_there_is)
    assert files(small) == [] and list((runs.root / "tmp").iterdir()) == []


def test_a_store_that_may_only_be_read_is_read_and_refuses_the_rest(small, monkeypatch):
    runs = Store(small / "runs")
    runs.make(StageKey("unit", {"a": 1}), lambda folder: {"score": 1})
    forbid(small, monkeypatch)
    with pytest.raises(Unwritable, match="read-only file system; MOEBERT_HOME names another place"):
        runs.make(StageKey("unit", {"a": 2}), lambda folder: {})
    with pytest.raises(Unwritable, match="read-only file system"):
        Store(small / "new" / "runs").make(StageKey("unit", {}), lambda folder: {})
    assert runs.find(StageKey("unit", {"a": 1})).row == {"score": 1} and len(runs.entries()) == 1
    assert not runs.busy(StageKey("unit", {"a": 1})) and runs.tidy() == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, "no such file", "data.jsonl"),
        OSError(errno.EACCES, "denied", "/etc/data.jsonl"),
        OSError(errno.ENOSPC, "full", "/var/other"),
        OSError(errno.EACCES, "denied"),
        OSError("of no number"),
        SafetensorError("header too small"),
    ],
)
def test_errors_of_a_build_about_other_things_pass_through(runs, error):
    def fail(folder):
        raise error

    with pytest.raises(type(error)) as raised:
        runs.make(StageKey("unit", {}), fail)
    assert raised.value is error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_errors_about_the_store_are_one_line_whoever_meets_them(runs, number):
    def fail(folder):
        raise OSError(number, os.strerror(number), str(folder / "a"))

    with pytest.raises(Unwritable, match=os.strerror(number).lower()) as error:
        runs.make(StageKey("unit", {}), fail)
    assert "\n" not in str(error.value) and runs.entries() == []


def test_a_full_disk_is_known_from_what_safetensors_says(runs):
    def fail(folder):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(Unwritable, match="no space left"):
        runs.make(StageKey("unit", {}), fail)


def test_a_file_that_cannot_be_written_leaves_nothing(small):
    with pytest.raises(OSError, match="No space left"):
        write_bytes(small / "a.json", bytes(2 * SIZE))
    assert list(small.iterdir()) == []


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path):
    for content in ("first", "second"):
        with replacing(tmp_path / "made") as temporary:
            temporary.mkdir()
            (temporary / content).touch()
        assert [path.name for path in (tmp_path / "made").iterdir()] == [content]
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "made") as temporary:
        temporary.mkdir()
        (temporary / "half").touch()
        _ = 1 / 0
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "second"]


def test_two_builds_of_one_entry_never_share_a_folder(runs):
    places = []

    def build(folder):
        places.append(folder)
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            runs.make(StageKey("unit", {}), build)
    name = runs.folder(StageKey("unit", {})).name
    assert places[0] != places[1]
    assert all(file_io.WORK.fullmatch(place.name)[1] == name for place in places)


def test_tidy_and_busy_see_that_a_build_is_alive(runs):
    def build(folder):
        (folder / "a.txt").write_text("one")
        assert runs.busy(StageKey("unit", {})) and Store(runs.root).tidy() == 0
        return {"there": (folder / "a.txt").is_file()}

    assert not runs.busy(StageKey("unit", {})) and not runs.root.exists()
    assert runs.make(StageKey("unit", {}), build).row == {"there": True}
    assert not runs.busy(StageKey("unit", {}))


def test_tidy_removes_what_killed_processes_left_and_nothing_else(runs):
    entry = runs.make(StageKey("unit", {}), lambda folder: {})
    died = subprocess.Popen([sys.executable, "-c", ""])
    died.wait(60)
    yesterday = time.time() - 2 * file_io.DAY
    old = file_io.unfinished(runs.root / "old")
    gone = [runs.root / f"report.html.{file_io.HOST}-{died.pid}.tmp", old]
    elsewhere = runs.root / f"report.html.other_{file_io.HOST}-{died.pid}.tmp"
    new = file_io.unfinished(runs.root / "new")
    kept = [new, elsewhere, runs.root / "report.html", runs.root / "a.tmp"]
    for path in gone + kept:
        path.touch()
    os.utime(gone[1], (yesterday, yesterday))
    left = file_io.scratch(runs.folder(StageKey("unit", {"a": 1})))
    (left / "half.bin").touch()
    foreign = runs.root / "tmp" / "notes"
    foreign.mkdir()
    assert (runs.tidy(), runs.tidy()) == (3, 0)
    assert all(path.exists() for path in [*kept, foreign, entry.folder])
    assert not any(path.exists() for path in [*gone, left])
    assert Store(runs.root / "nowhere").tidy() == 0


def test_make_removes_what_a_killed_process_left_of_the_same_entry_only(runs):
    same, another = (file_io.scratch(runs.folder(StageKey("unit", {"a": a}))) for a in (1, 2))
    runs.make(StageKey("unit", {"a": 1}), lambda folder: {})
    assert another.exists() and not same.exists()
