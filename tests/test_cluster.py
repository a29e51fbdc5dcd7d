"""Runs on a Ray cluster: two real nodes on this machine, with homes of their own and a mirror."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import nbformat
import pytest
from ray_nodes import gone, kill, marked, runs, start

from moebert_lib.config.errors import UserError
from moebert_lib.config.provenance import digest
from moebert_lib.runs import execution, local_pool, ray_cluster
from moebert_lib.runs import plan as planning
from moebert_lib.store.store import Store

HEALTH = '{"health_check_initial_delay_ms":500,"health_check_period_ms":500,' + (
    '"health_check_timeout_ms":2000,"health_check_failure_threshold":3}'
)
PARAMETERS = "n: int = 0"
SAY = """
import os, pathlib, time
home = pathlib.Path(os.environ["MOEBERT_HOME"])
print("· at", home.name, os.getpid(), flush=True)
"""
WRITE = """
gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
file = pathlib.Path(os.environ["MOEBERT_FIGURES"]) / "place.csv"
file.write_text(f"{home.name},{gpu},{os.environ['OMP_NUM_THREADS']}")
"""
#: Each of two runs goes on when the other is there too.
MEET = """
(home / f"met{n}").touch()
while len(list(home.glob("met?"))) < 2:
    time.sleep(0.1)
"""
SLEEP = "time.sleep(300)"
#: First the Ray worker dies, then the worker that it started, then the kernel.
DIE = """
import psutil
lives = home / "lives"
n_lives = len(lives.read_text()) if lives.exists() else 2
lives.write_text("x" * (n_lives - 1))
os.kill([os.getpid(), *(parent.pid for parent in psutil.Process().parents())][n_lives], 9)
time.sleep(60)
"""
DRIVER = """
import sys
from moebert_lib import batch, cluster
jobs = batch.plan(batch.select([sys.argv[2]]), scale="smoke", parameters={}, data_dir="")
engine = cluster.Ray(sys.argv[1] or None)
batch.run(jobs, engine=engine, publishing=False, echo=lambda line: print(line, flush=True))
"""
STUCK = """
first = home / "first"
if home.name == "two" and first.exists():
    print("· stuck", flush=True)
    time.sleep(300)
if home.name == "two":
    first.touch()
time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def place():
    """A folder with a short path, as unix sockets want it; its processes end with the tests."""
    folder = Path(tempfile.mkdtemp(prefix="mb", dir="/tmp"))
    yield folder
    kill(marked(str(folder)))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def head(place) -> str:
    """The address of a cluster of one node: one core, two GPUs that it only claims to have."""
    with socket.socket() as free:
        free.bind((ray_cluster.LOOPBACK, 0))
        port = free.getsockname()[1]
    start(
        place,
        "one",
        "--head",
        f"--port={port}",
        "--num-gpus=2",
        "--include-dashboard=false",
        f"--system-config={HEALTH}",
    )
    return f"{ray_cluster.LOOPBACK}:{port}"


@pytest.fixture(scope="module")
def engine(head):
    """Maker of engines of this process, which joins the cluster once."""
    joined = ray_cluster.Ray(head)
    yield partial(ray_cluster.Ray, gpus_per_run=0)
    joined.close()


@pytest.fixture
def home(tmp_path, place, monkeypatch) -> Path:
    """The driver's own home, and a mirror that the nodes see too."""
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path / "driver"))
    monkeypatch.setenv("MOEBERT_STORE", f"file://{place}/mirror")
    return tmp_path / "driver"


def planned(home: Path, name: str, *cells: str, points: int = 1) -> list[planning.Job]:
    """Jobs of a notebook with these code cells, one for each ``n``."""
    path = home / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    first = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    more = [nbformat.v4.new_code_cell(cell) for cell in cells]
    about = {"language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *more], metadata=about), path)
    plans = [planning.plan([path], scale="smoke", parameters={"n": n}) for n in range(points)]
    return [job for plan in plans for job in plan]


def run(jobs, made, lines=None, **options):
    echo = (lines if lines is not None else []).append
    return local_pool.run(
        jobs, engine=made, publishing=False, keep_going=True, echo=echo, **options
    )


def written(entry) -> list[str]:
    return (entry.folder / "figures" / "place.csv").read_text().split(",")


def outcomes(made, requests) -> dict[int, dict]:
    events = made.run(requests, busy=lambda index: False)
    return {event.index: event.outcome for event in events if event.outcome}


def test_a_run_has_a_gpu_and_its_threads_to_itself(home, engine, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")  # the user's own choice
    made = engine(gpus_per_run=None, cpus_per_run=0.5)
    assert made.gpus == 1 and made.workers == 2
    results = run(planned(home, "01_gpus", SAY, MEET, WRITE, points=2), made)
    assert sorted(written(entry) for entry in results) == [["one", "0", "1"], ["one", "1", "1"]]
    assert all(entry.folder.parent == home / "runs" for entry in results)


def test_a_run_that_fails_elsewhere_comes_back_and_other_code_names_its_host(home, place, engine):
    fails, other = planned(home, "02_fails", SAY, "1 / 0", points=2)
    changed = execution.request(other) | {"digest": digest("another")}
    found = outcomes(engine(cpus_per_run=0.5), [execution.request(fails), changed])
    copy = execution.kept(fails) / "notebook.ipynb"
    assert found[0]["status"] == "failed" and found[0]["copy"] == str(copy)
    assert copy.is_relative_to(home) and "ZeroDivisionError" in copy.read_text()
    assert "ZeroDivisionError" in str(execution.failed_before(fails))
    assert (place / "one" / "runs" / "failed").is_dir() and "files" not in found[0]
    assert found[1]["status"] == "refused"
    assert found[1]["error"].startswith(f"{socket.gethostname()}: library, data or weights")


def test_a_node_with_a_folder_of_its_own_needs_a_mirror(home, place, engine, monkeypatch):
    monkeypatch.delenv("MOEBERT_STORE")
    jobs = planned(home, "03_alone", SAY, WRITE)
    (failure,) = run(jobs, engine())
    assert re.search(f"{place}/one/runs.*pass --store URL", str(failure)) and failure.died
    monkeypatch.setenv("MOEBERT_HOME", str(place / "one"))  # now it is the same folder
    (entry,) = run(jobs, engine())
    assert entry.folder.parent == place / "one" / "runs" and written(entry)[0] == "one"


def test_what_dies_is_asked_for_again_and_given_up_in_one_line(home, place, engine, monkeypatch):
    monkeypatch.delenv("MOEBERT_STORE")  # its lease outlives the worker for a minute
    monkeypatch.setenv("MOEBERT_HOME", str(place / "one"))
    lines: list[str] = []
    (failure,) = run(planned(place / "one", "04_dies", SAY, DIE), engine(), lines)
    host = socket.gethostname()
    assert [line.split("· ")[1] for line in lines if "once more" in line] == [
        f"{host}: the Ray worker died; once more",
        f"{host}: the worker process died (signal 9); once more",
    ]
    died = f"{host}: the kernel died, often for want of memory"
    assert str(failure).endswith(died) and failure.died and failure.copy.is_file()
    assert sum("running" in line for line in lines) == 1


def test_closing_ends_what_runs_and_what_waits_and_leaves_the_cluster(home, place, engine):
    requests = [execution.request(job) for job in planned(home, "05_long", SAY, SLEEP, points=2)]
    made = engine()
    events = made.run(requests, busy=lambda index: index == 0)
    assert next(events) == local_pool.Event(1, started=True)  # the other one is busy elsewhere
    assert next(events).line.startswith("· at one") and runs(place)
    events.close()
    assert gone(runs, place, 0.5)
    (entry,) = run(planned(home, "06_after", SAY, WRITE), made)
    assert written(entry)[0] == "one" and not any((place / "one" / "runs" / "tmp").iterdir())


def test_nothing_is_left_when_the_driver_is_killed(home, place, head):
    planned(home, "07_orphan", SAY, SLEEP)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, head, "07"], stdout=subprocess.PIPE)
    assert any(b"at one" in line for line in driver.stdout) and runs(place)
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert gone(runs, place, 15)


def test_a_sweep_outlives_the_death_of_a_node(home, place, head, engine):
    start(place, "two", f"--address={head}")
    made = engine()
    assert made.workers == 2
    lines: list[str] = []

    def echo(line: str) -> None:
        lines.append(line)
        if "stuck" in line:
            kill(marked(f"{place} two"))
            shutil.rmtree(place / "mirror" / "leases")  # else they are waited for, for a minute

    jobs = planned(home, "08_sweep", SAY, STUCK, WRITE, points=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_pool, "QUIET", 0)  # every line of a run
        results = local_pool.run(jobs, engine=made, publishing=False, keep_going=True, echo=echo)
    places = [written(entry)[0] for entry in results]
    assert places.count("two") == 1 and places.count("one") == 3
    assert all(Store().folder(job.key()).is_relative_to(home) for job in jobs)
    assert sum("once more" in line for line in lines) == 1
    assert not marked(f"{place} two") and gone(runs, place, 0.5) and made.workers == 1


def test_an_instance_of_its_own_starts_and_ends_with_the_process(home, place):
    planned(home, "09_own", SAY, WRITE)
    own = {"RAY_TMPDIR": f"{place}/own", "RAY_AUTH_TOKEN": 64 * "0"}
    own |= {"CLUSTER_MARK": f"{place} own", "MOEBERT_STORE": ""}
    (place / "own").mkdir()
    command = [sys.executable, "-c", DRIVER, "", "09"]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "09_own done" in done.stdout
    (entry,) = Store().entries("notebook")
    assert written(entry)[0] == "driver"
    assert gone(marked, f"{place} own", 10)


def test_what_no_node_can_hold_is_said(home, engine):
    made = engine(cpus_per_run=8)
    assert made.workers == 1
    (job,) = planned(home, "10_large", WRITE)
    events = made.run([execution.request(job)], busy=lambda index: False)
    assert next(events).line == "· waiting for a node with 8 CPUs"
    events.close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("localhost", "'localhost': expected auto or HOST:PORT"),
        ("ray://127.0.0.1:10001", "expected auto or HOST:PORT"),
        ("127.0.0.1:1", "127.0.0.1:1 cannot be reached: .*refused"),
        ("auto", "127.0.0.1:2 cannot be reached"),
        (None, "127.0.0.1:2 cannot be reached"),
    ],
)
def test_a_cluster_that_is_not_there_is_refused_in_one_line(address, said, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=f"^.*{said}.*$"):
        ray_cluster.Ray(address)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus_per_run": 1.5}, "1.5 GPUs"),
        ({"gpus_per_run": -1}, "-1 GPUs"),
        ({"cpus_per_run": 0}, "0 CPUs"),
    ],
)
def test_sizes_of_a_run_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UserError, match=f"^{said} for a run: expected"):
        ray_cluster.Ray(**options)


def test_ray_is_asked_for_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'moebert\[cluster\]'"):
        ray_cluster.Ray()


def test_of_a_failed_run_no_more_than_some_megabytes_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "COPIED", 10)
    for name, size in (("a", 9), ("b/c", 1), ("d", 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    assert ray_cluster._packed(tmp_path) == {"b/c": b"x", "d": b"xxxxx"}
