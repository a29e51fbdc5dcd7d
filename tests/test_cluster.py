"""Runs on a Ray cluster: two real nodes on this machine that see one home."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import nbformat
import pytest
from ray_nodes import gone, kernels, kill, marked, start

from moebert_lib.config.errors import UserError
from moebert_lib.runs import execution, local_pool, ray_cluster
from moebert_lib.runs import plan as planning

HEALTH = '{"health_check_initial_delay_ms":500,"health_check_period_ms":500,' + (
    '"health_check_timeout_ms":2000,"health_check_failure_threshold":3}'
)
PARAMETERS = "n: int = 0"
SAY = """
import os, pathlib, time
home, node = pathlib.Path(os.environ["MOEBERT_HOME"]), os.environ.get("NODE_NAME", "driver")
(home / f"on_{node}_{n}").touch()
"""
WRITE = """
gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
file = pathlib.Path(os.environ["MOEBERT_FIGURES"]) / "place.csv"
file.write_text(f"{node},{gpu},{os.environ['OMP_NUM_THREADS']}")
"""
#: Each of two runs goes on when the other is there too.
MEET = """
(home / f"met{n}").touch()
while len(list(home.glob("met?"))) < 2:
    time.sleep(0.1)
"""
SLEEP = "time.sleep(300)"
#: The kernel dies each time; the Ray worker above it dies at the first time.
DIE = """
import psutil
first = not (home / "died").exists()
(home / "died").touch()
os.kill(psutil.Process().ppid() if first else os.getpid(), 9)
time.sleep(60)
"""
DRIVER = """
import sys
from moebert_lib.runs import local_pool, plan, ray_cluster
jobs = plan.plan(plan.select([sys.argv[2]]), scale="smoke")
engine = ray_cluster.Ray(sys.argv[1] or None)
local_pool.run(jobs, engine=engine, echo=lambda line: print(line, flush=True))
"""
STUCK = """
if node == "two" and (home / "first").exists():
    (home / "stuck").touch()
    time.sleep(300)
if node == "two":
    (home / "first").touch()
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
    options = ["--num-gpus=2", "--include-dashboard=false", f"--system-config={HEALTH}"]
    start(place, "one", "--head", f"--port={port}", *options)
    return f"{ray_cluster.LOOPBACK}:{port}"


@pytest.fixture(scope="module")
def engine(head):
    """Maker of engines of this process, which joins the cluster once."""
    import ray

    ray_cluster.Ray(head)
    yield partial(ray_cluster.Ray, gpus_per_run=0)
    ray.shutdown()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home that the driver and all nodes see."""
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


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
    options = {"echo": echo, **options}
    return local_pool.run(jobs, engine=made, keep_going=True, **options)


def written(entry) -> list[str]:
    return (entry.folder / "figures" / "place.csv").read_text().split(",")


def test_a_run_has_a_gpu_and_its_threads_to_itself(home, engine, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")  # the user's own choice
    made = engine(gpus_per_run=None, cpus_per_run=0.5)
    assert made.workers == 2
    results = run(planned(home, "01_gpus", SAY, MEET, WRITE, points=2), made)
    assert sorted(written(entry) for entry in results) == [["one", "0", "1"], ["one", "1", "1"]]
    assert all(entry.folder.parent == home / "runs" for entry in results)


def test_a_run_that_fails_on_a_node_is_remembered_with_its_copy(home, engine):
    jobs = planned(home, "02_fails", SAY, "1 / 0")
    (failure,) = run(jobs, engine())
    assert failure.state == "failed" and "ZeroDivisionError" in str(failure)
    assert failure.copy == execution.failure_folder(jobs[0]) / "notebook.ipynb"
    assert "ZeroDivisionError" in failure.copy.read_text()
    assert "ZeroDivisionError" in str(execution.failed_before(jobs[0]))


def test_a_node_that_does_not_see_the_home_or_has_other_code_says_so(home, tmp_path, monkeypatch):
    (job,) = planned(home, "03_alone", SAY, WRITE)
    (home / "runs").mkdir()
    (home / "runs" / "marker").touch()
    ask = partial(ray_cluster.run_on_node, job, home=home, environment={}, force=False)
    host = socket.gethostname()
    blind = ask(job.key().digest, marker="another")
    assert blind.state == "not run" and f"{host} does not see {home}" in str(blind)
    assert "MOEBERT_HOME" in str(blind)
    other = ask("0" * 64, marker="marker")
    assert other.state == "not run" and f"{host} has another library" in str(other)


def test_a_worker_that_is_lost_is_replaced_once_and_what_dies_again_is_given_up(home, engine):
    lines: list[str] = []
    (failure,) = run(planned(home, "04_dies", SAY, DIE), engine(), lines)
    assert sum("once more" in line for line in lines) == 1, (lines, failure)
    assert failure.state == "died" and "the kernel died" in str(failure)
    assert failure.copy.is_file()


def test_a_stop_ends_what_runs_and_what_waits_and_leaves_the_cluster(home, place, engine):
    jobs = planned(home, "05_long", SAY, SLEEP, points=2)
    ended = local_pool.completed(jobs, engine=engine(), echo=stop_at("on_one"))
    with pytest.raises(KeyboardInterrupt):
        next(ended)
    assert gone(kernels, place, 1)
    (entry,) = run(planned(home, "06_after", SAY, WRITE), engine())
    assert written(entry)[0] == "one" and not any((home / "runs" / "tmp").iterdir())


def stop_at(name: str):
    """An echo that waits until a notebook runs, and then does what Ctrl-C does."""
    import time

    def echo(line: str) -> None:
        if "running" in line:
            folder = Path(os.environ["MOEBERT_HOME"])
            while not list(folder.glob(f"{name}*")):
                time.sleep(0.1)
            raise KeyboardInterrupt

    return echo


def test_nothing_is_left_when_the_driver_is_killed(home, place, head):
    planned(home, "07_orphan", SAY, SLEEP)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, head, "07"], stdout=subprocess.PIPE)
    while not list(home.glob("on_one_0")):
        assert driver.poll() is None
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert gone(kernels, place, 30)


def test_a_sweep_outlives_the_death_of_a_node(home, place, head, engine):
    start(place, "two", f"--address={head}")
    made = engine()
    assert made.workers == 2

    def echo(line: str) -> None:
        if (home / "stuck").exists():
            (home / "stuck").unlink()
            kill(marked(f"{place} two"))

    jobs = planned(home, "08_sweep", SAY, STUCK, WRITE, points=4)
    results = run(jobs, made, echo=echo)
    places = [written(entry)[0] for entry in results]
    assert sorted(set(places)) in (["one"], ["one", "two"]) and len(places) == 4
    assert not marked(f"{place} two") and gone(kernels, place, 1)


def test_an_instance_of_its_own_starts_and_ends_with_the_process(home, place):
    planned(home, "09_own", SAY, WRITE)
    own = {"RAY_TMPDIR": f"{place}/own", "CLUSTER_MARK": f"{place} own"}
    (place / "own").mkdir()
    command = [sys.executable, "-c", DRIVER, "", "09"]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0 and "09_own done" in done.stdout, done
    assert gone(marked, f"{place} own", 10)


@pytest.mark.parametrize(
    "address", ["localhost", "ray://127.0.0.1:10001", "127.0.0.1:1", "auto", None]
)
def test_a_cluster_that_is_not_there_is_refused_in_one_line(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"^no Ray cluster at .*; expected auto, or HOST:PORT.*$"):
        ray_cluster.Ray(address)


def test_ray_is_asked_for_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'moebert\[cluster\]'"):
        ray_cluster.Ray()
