"""The local pool: every run has a result, what dies is run once more, a stop leaves nothing."""

import threading
import time
from dataclasses import dataclass

import psutil
import pytest

from moebert_lib.config.errors import UserError
from moebert_lib.config.file_io import Unwritable
from moebert_lib.runs import cost, execution, local_pool
from moebert_lib.runs.execution import NotebookFailed
from moebert_lib.runs.local_pool import Local
from moebert_lib.store import run_outputs
from moebert_lib.store.store import Entry, StageKey, Store


@dataclass
class StandIn:
    """A job whose run is a function of the keyword arguments of ``Local.make``."""

    name: str
    run: object
    values: dict

    def key(self):
        return StageKey("notebook", {"notebook": self.name})


class PlannedStandIn(StandIn):
    """With what a batch asks of a job beside its key."""

    timed, place, settings, chosen = False, "", None, {}


class Pool(Local):
    """Makes a stand-in's run in this process."""

    def make(self, job, **how):
        return job.run(**how)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBERT_HOME", str(tmp_path))


def entry(name="x"):
    return Entry(StageKey("notebook", {"notebook": name}), None, {}, 1.0, False)


def jobs(*runs):
    return [StandIn(f"{n:02}", run, {}) for n, run in enumerate(runs)]


def done(**how):
    return entry()


def fails(error):
    def run(**how):
        raise error

    return run


def events(pool, runs):
    return list(pool.run(jobs(*runs)))


def results(pool, runs):
    ended = [(index, event) for index, event in events(pool, runs) if event is not None]
    return {index: event for index, event in ended if not isinstance(event, str)}


@pytest.mark.parametrize("workers", [1, 3])
def test_every_run_has_one_result_and_its_lines_come_before(workers):
    def talks(say, **how):
        say("· half")
        return entry()

    seen = events(Pool(workers), [talks] * 5)
    for index in range(5):
        assert [event for number, event in seen if number == index] == [None, "· half", entry()]
    assert len(seen) == 15


def test_no_jobs_start_nothing():
    assert results(Pool(2), []) == {}


def test_an_error_in_the_callers_echo_reaches_the_caller_and_stops_the_rest(monkeypatch):
    monkeypatch.setattr(execution, "failed_before", lambda job: None)
    counts = []

    def run(**how):
        counts.append(1)
        return entry()

    def broken(line):
        raise BrokenPipeError

    planned = [PlannedStandIn("00", run, {})] * 9
    with pytest.raises(BrokenPipeError):
        local_pool.run(planned, engine=Pool(2), echo=broken)
    assert len(counts) < 9


@pytest.mark.parametrize(
    "error, state",
    [
        (NotebookFailed("x", 3, "ValueError: no"), "failed"),
        (NotebookFailed("x", None, "the kernel died", "died"), "died"),
        (UserError("no data"), "not run"),
        (OSError(12, "Cannot allocate memory"), "not run"),
        (ZeroDivisionError("a slot"), "failed"),
        (SystemExit(3), "failed"),
    ],
)
def test_whatever_goes_wrong_the_run_has_a_result_and_the_others_go_on(error, state):
    found = results(Pool(2), [done, fails(error), done, done])
    assert sorted(found) == [0, 1, 2, 3] and found[1].state == state
    assert str(error.args[-1]) in str(found[1]) or str(error) in str(found[1])
    assert all(isinstance(found[n], Entry) for n in (0, 2, 3))


def test_a_slot_that_dies_before_its_run_starts_ends_the_batch_and_does_not_hang(monkeypatch):
    def take(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(local_pool._Queue, "take", take)
    with pytest.raises(OSError, match="Input/output"):
        results(Pool(2), [done] * 3)


def test_a_full_disk_ends_the_batch_with_one_line():
    found = results(Pool(1), [fails(Unwritable("runs cannot be written: no space"))])
    assert type(found[0]) is UserError and "no space" in str(found[0])


def test_what_dies_is_run_once_more_and_then_given_up():
    counts = {"once": 0, "always": 0}

    def dies(name, times):
        def run(**how):
            counts[name] += 1
            if counts[name] <= times:
                raise NotebookFailed(name, None, "the kernel died", "died")
            return entry()

        return run

    seen = events(Pool(1), [dies("once", 1), dies("always", 9)])
    once, always = ([event for n, event in seen if n == number] for number in (0, 1))
    assert isinstance(once[-1], Entry) and always[-1].state == "died"
    assert counts == {"once": 2, "always": 2}
    assert once[1:-1] == always[1:-1] == ["moebert: the kernel died; once more"]


def test_a_cell_that_fails_is_not_run_again():
    counts = []

    def run(**how):
        counts.append(1)
        raise NotebookFailed("x", 1, "ValueError")

    assert results(Pool(1), [run])[0].state == "failed" and len(counts) == 1


def test_what_another_batch_is_making_waits_for_the_end(monkeypatch):
    monkeypatch.setattr(Store, "busy", lambda self, key: key.choices["notebook"] == "00")
    started = [index for index, event in events(Pool(1), [done] * 3) if event is None]
    assert started == [1, 2, 0]


def test_closing_starts_nothing_more_and_waits_for_what_runs():
    ended = []

    def run(kernels, **how):
        assert kernels.stopped.wait(60)
        ended.append(1)
        raise NotebookFailed("x", None, "the kernel died", "died")

    made = Pool(2).run(jobs(done, *[run] * 5))
    next(event for _, event in made if isinstance(event, Entry))
    made.close()
    assert len(ended) <= 2  # those that ran
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_a_stop_ends_a_wait_for_another_process(tmp_path):
    from moebert_lib.config import file_io

    key = StageKey("notebook", {"notebook": "00"})
    cancelled = threading.Event()
    store = Store(cancelled=cancelled)
    with file_io.lock(store.root, store.folder(key).name):
        threading.Timer(0.3, cancelled.set).start()
        start = time.monotonic()
        with pytest.raises(file_io.Cancelled):
            store.make(key, lambda folder: {})
    assert time.monotonic() - start < 10


def test_kernels_that_are_killed_take_their_children_with_them():
    import subprocess
    import sys
    from types import SimpleNamespace

    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], stdin=0)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    manager = SimpleNamespace(provisioner=SimpleNamespace(process=process))
    client = type("Client", (), {"km": manager})()
    kernels = execution.Kernels()
    with kernels.running(client):
        while not (children := psutil.Process(process.pid).children()):
            time.sleep(0.05)
        kernels.kill()
    assert process.wait(10) == -9 and not psutil.wait_procs(children, 10)[1]
    kernels.kill()  # nothing is left, nothing happens


def test_a_run_has_one_thread_however_many_run_and_a_gpu_to_itself(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    local = Local(2, gpus=["2", "5"])
    seen = [local.environment(slot) for slot in range(2)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in seen] == ["2", "5"]
    assert {env["OMP_WAIT_POLICY"] for env in seen} == {"PASSIVE"}
    for workers in (1, 2, 8):
        assert Local(workers).environment(0)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in Local(threads=None).environment(0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own choice stays
    changes = local.environment(0)
    kernel = run_outputs.kernel_environment(tmp_path, offline=True, changes=changes)
    assert kernel["OMP_NUM_THREADS"] == "3" and kernel["CUDA_VISIBLE_DEVICES"] == "2"


def test_as_many_workers_as_cores_memory_and_jobs_allow(monkeypatch):
    def fitting(n_cores, gigabytes, jobs):
        monkeypatch.setattr(local_pool, "cores", lambda: n_cores)
        monkeypatch.setattr(local_pool, "free_memory", lambda: gigabytes << 30)
        return local_pool.fitting([None] * jobs).workers

    monkeypatch.setattr(local_pool, "gpus", list)
    monkeypatch.setattr(cost, "runs", lambda jobs: [[]])
    assert fitting(4, 64, 40) == 4 and fitting(4, 64, 3) == 3 and fitting(4, 0, 40) == 1
    assert fitting(8, 3, 40) == 3  # one gigabyte for each kernel


def test_one_run_for_each_gpu_where_torch_can_use_one(monkeypatch):
    monkeypatch.setattr(local_pool, "versions", lambda: {"torch": "2.13.0"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 3")
    local = local_pool.fitting([None] * 40)
    assert local.workers == 2 and local.gpus == ("0", "3")
    with pytest.raises(UserError, match="3 workers: each run has a GPU to itself"):
        Local(3, gpus=local_pool.gpus())
    for none in ("", "-1", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert local_pool.gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(local_pool, "versions", lambda: {"torch": "2.13.0+cpu"})
    assert local_pool.gpus() == []


def test_free_memory_is_no_more_than_the_machine_has():
    assert 0 < local_pool.free_memory() <= psutil.virtual_memory().total


def test_no_workers_are_refused():
    with pytest.raises(UserError, match="0 workers"):
        Local(0)
