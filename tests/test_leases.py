"""A lease has one holder; a dead one's is taken over, a live one's is not."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from moebert_lib.config.errors import CHECKOUT, UserError
from moebert_lib.store import shared
from moebert_lib.store.shared import Lease, Shared
from moebert_lib.store.store import Store


class Careless(MemoryFileSystem):
    """A store that has no exclusive write, and overwrites."""

    cachable = False

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value)


class Terse(MemoryFileSystem):
    """A store that has no word of its own for an object that exists already."""

    cachable = False

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if mode == "create" and self.exists(path):
            raise OSError(errno.EINVAL, "precondition failed")
        super().pipe_file(path, value)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    for name, seconds in dict(BEAT=0.05, EXPIRY=1, FIRST=0.02, POLL=0.05, SETTLE=0.2).items():
        monkeypatch.setattr(shared, name, seconds)


def holder(fs, path: str, token: str = "theirs") -> bytes:
    """What a holder that beats no more has left."""
    content = json.dumps({"host": "gone", "pid": 1, "token": token, "beat": 7}).encode()
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(path, content)
    return content


@pytest.mark.parametrize("url", ["memory://mirror", "file"])
def test_one_at_a_time_holds_a_lease(tmp_path, url, capsys):
    mirror = Shared(str(tmp_path) if url == "file" else url)
    mirror._objects = url != "file"
    inside, most = [], []

    def work(number):
        with mirror.lease("unit"):
            inside.append(number)
            time.sleep(0.1)
            most.append(len(inside))
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1, 1, 1, 1]
    lines = capsys.readouterr().out.splitlines()
    assert set(lines) == {"· waiting for another machine that is making unit"} and len(lines) < 4
    assert not mirror.fs.exists(f"{mirror.root}/leases/unit.json")


@pytest.mark.parametrize(
    "fs, create",
    [
        (MemoryFileSystem(), True),
        (Careless(), True),
        (Terse(), True),
        (MemoryFileSystem(), False),
        (LocalFileSystem(), False),
    ],
)
def test_a_lease_that_another_holds_is_not_created_again(tmp_path, fs, create):
    path = f"{tmp_path}/leases/unit.json"
    ours, theirs = Lease(fs, path), Lease(fs, path)
    fs.makedirs(f"{tmp_path}/leases", exist_ok=True)
    ours.acquire(create=create)
    waiter = threading.Thread(target=theirs.acquire, kwargs={"create": create}, daemon=True)
    with ours:
        waiter.start()
        waiter.join(1.5)  # longer than EXPIRY: the beats keep it
        assert waiter.is_alive() and ours._mine()
    waiter.join(60)
    assert theirs._mine() and not ours._mine()


@pytest.mark.parametrize("fs", [MemoryFileSystem(), Terse(), LocalFileSystem()])
def test_who_comes_second_between_look_and_write_does_not_get_it(tmp_path, fs):
    path = f"{tmp_path}/leases/unit.json"
    content = holder(fs, path)
    create = not isinstance(fs, LocalFileSystem)
    assert not Lease(fs, path)._create(create)
    assert fs.cat_file(path) == content


def test_a_lease_is_released_when_the_work_raises():
    mirror = Shared("memory://mirror")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), mirror.lease("unit"):
            raise error
        assert mirror.fs.find(mirror.root) == []


def test_of_many_who_take_over_one_dead_lease_one_has_it_at_a_time(tmp_path):
    mirror = Shared(str(tmp_path))
    holder(mirror.fs, f"{mirror.root}/leases/unit.json")
    start, inside, most = time.monotonic(), [], []

    def work(number):
        with mirror.lease("unit"):
            inside.append(number)
            time.sleep(0.1)
            most.append((len(inside), time.monotonic() - start))
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [n for n, _ in most] == [1, 1, 1] and min(at for _, at in most) > 1


def test_of_two_who_take_over_at_once_the_later_has_it():
    fs, path = MemoryFileSystem(), "/leases/unit.json"
    holder(fs, path)
    won, both = {}, [Lease(fs, path) for _ in range(2)]

    def take(number):
        time.sleep(0.05 * number)
        won[number] = both[number]._take()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert won == {0: False, 1: True}


def test_who_lost_a_lease_neither_beats_on_nor_removes_the_new_one():
    mirror = Shared("memory://mirror")
    path = f"{mirror.root}/leases/unit.json"
    with mirror.lease("unit"):
        content = holder(mirror.fs, path)
        time.sleep(0.3)
    assert mirror.fs.cat_file(path) == content


def test_a_mirror_that_is_full_is_one_line_and_leaves_no_empty_lease(tmp_path, monkeypatch):
    mirror = Shared(str(tmp_path))

    def full(self, path, mode="rb", **kwargs):
        if mode == "rb":
            return open(path, mode)
        Path(path).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalFileSystem, "open", full)
    with pytest.raises(UserError, match="cannot be written: .*No space left"), mirror.lease("unit"):
        raise AssertionError
    assert mirror.fs.find(mirror.root) == []


def test_a_killed_holder_is_succeeded_and_what_it_left_is_tidied(tmp_path, capsys):
    script = tmp_path / "one.py"
    script.write_text(
        "import sys, time\n"
        "from moebert_lib import leases\n"
        "from moebert_lib.store import Store\n"
        "leases.BEAT = 0.05\n"
        "def build(folder):\n"
        "    (folder / 'half.bin').write_text('half')\n"
        "    print('building', flush=True)\n"
        "    time.sleep(300)\n"
        "Store(sys.argv[1], shared=sys.argv[2]).make('unit', {}, build)\n"
    )
    one, mirror = tmp_path / "one", str(tmp_path / "mirror")
    env = {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, str(script), str(one), mirror]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "building\n"
            here = Store(one)
            assert here.busy("unit", {}) and not here.busy("unit", {"a": 1})
            assert here.tidy() == 0 and len(list(one.glob("tmp/*/half.bin"))) == 1
        finally:
            process.send_signal(signal.SIGKILL)
    assert not here.busy("unit", {})
    other = Store(tmp_path / "other", shared=mirror)
    assert other.make("unit", {}, lambda folder: {"score": 1}).row == {"score": 1}
    assert "· waiting for another machine that is making unit-" in capsys.readouterr().out
    assert here.tidy() == 1 and list(one.glob("tmp/*")) == []
    assert here.entries() == [] and Store(one, shared=mirror).pull() == 1
