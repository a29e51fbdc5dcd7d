"""A disk that is full or must not be written, and what is lost or altered on it."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweeping import ALL, Home, copied, undisturbed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a small disk is mounted")

SIZE = 16 << 20  # bytes of the small disk


class SmallDisk:
    """A tmpfs that only the processes of a mount namespace of its own see."""

    def __init__(self, place: Path):
        place.mkdir(parents=True)
        said = []
        mount = f'mount -t tmpfs -o size={SIZE} tmpfs "$0" && echo ready && exec cat'
        for how in ("-m", "-rm"):  # as root, else as root of a user namespace
            self.holder = subprocess.Popen(
                ["unshare", how, "sh", "-c", mount, str(place)],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            if self.holder.stdout.readline() == "ready\n":
                break
            said.append(self.holder.communicate()[1])
        else:
            pytest.fail(f"this test needs to mount a tmpfs, and may not: {said}")
        self.place, spaces = place, ["-U", "--preserve-credentials"] if how == "-rm" else []
        self.prefix = ["nsenter", "-t", str(self.holder.pid), "-m", *spaces]
        self.root = Path(f"/proc/{self.holder.pid}/root")

    def remount(self, option: str) -> None:
        """Make it ``ro`` or ``rw``."""
        options = f"remount,{option},size={SIZE}"
        subprocess.run([*self.prefix, "mount", "-o", options, str(self.place)], check=True)

    def close(self) -> None:
        """End the namespace, and with it the disk."""
        self.holder.communicate()


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "home")
    yield made
    made.close()


def test_a_full_or_read_only_disk_is_one_line_and_after_that_a_resume_completes(tmp_path, disk):
    home = Home(tmp_path, prefix=disk.prefix, root=disk.root)
    home.grid(seeds=[0])
    home.sweep()
    finished = home.entries()
    home.grid()
    for free in (0, 20_000, 500_000):  # room for nothing, part of a run, part of a stage
        check_full(home, free)
        assert finished.items() <= home.entries().items() and not list(home.runs.glob("failed/*"))
    disk.remount("ro")
    check_read_only(home)
    disk.remount("rw")
    home.sweep()
    assert finished.items() <= home.entries().items()
    home.check_complete(undisturbed().table())


def check_full(home: Home, free: int) -> None:
    """A sweep that finds this many bytes free says so in one line and leaves no half entry."""
    space, filler = os.statvfs(home.folder), home.folder / "filler"
    filler.write_bytes(bytes(space.f_bavail * space.f_frsize - free))
    ended = home.run()
    filler.unlink()
    assert ended.status == 2 and "no space left on device; make room" in ended.line
    home.check_tidy()


def check_read_only(home: Home) -> None:
    """A sweep says so in one line; what only reads works."""
    ended = home.run()
    assert ended.status == 2 and "read-only file system" in ended.line
    status = home.run("status")
    assert status.status == 0 and not status.err and "0 failed" in status.out, status
    dry = home.run("sweep", f"{home.base}/home/grid.yaml", "--dry-run")
    assert dry.status == 0 and not dry.err and "nothing was executed" in dry.out, dry


def flip(path: Path) -> None:
    """Alter one byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Lose the second half."""
    os.truncate(path, path.stat().st_size // 2)


#: What happens to which file of what, and what is said about it.
def better(path: Path) -> None:
    """Another number in a record that stays whole JSON."""
    record = json.loads(path.read_text())
    assert record["row"]["metrics"]
    record["row"]["metrics"] = dict.fromkeys(record["row"]["metrics"], 9)
    path.write_text(json.dumps(record, indent=2, sort_keys=True))


DAMAGES = {
    "own 0": (flip, "pieces.bin", "has changed"),
    "own 1": (cut, "pieces.bin", "has changed"),
    "own 2": (Path.unlink, "pieces.bin", "is missing"),
    "shared 0": (cut, "entry.json", "is missing, cut short or has changed"),
    "run 0": (flip, "notebook.ipynb", "has changed"),
    "run 1": (Path.unlink, "figures/figure1.csv", "is missing"),
    "run 2": (better, "entry.json", "is missing, cut short or has changed"),
}


def test_what_was_altered_is_named_in_a_line_and_made_again(tmp_path):
    home = copied(undisturbed(), tmp_path)
    before, places, damaged = home.entries(), home.places(), []
    for name, (damage, file, what) in DAMAGES.items():
        damage(places[name] / file)
        damaged.append((places[name].name, f"{file} {what}"))
    ended = home.sweep()
    said = re.findall(r"moebert: (\S+): (.+); moved to .+ and made again\n", ended.out + ended.err)
    assert sorted(said) == sorted(damaged), ended
    assert Counter(home.log()) == Counter(DAMAGES.keys())
    after = home.entries()
    assert all(after[name] == before[name] for name in ALL - DAMAGES.keys())
    stages = [name for name in ALL if not name.startswith("run")]
    assert {after[name]["pieces.bin"] for name in stages} == {before["own 0"]["pieces.bin"]}
    home.check_complete(undisturbed().table())
