"""The local engine: what dies is asked again, what is stopped leaves nothing behind."""

import os
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from moebert_lib.config.errors import UserError
from moebert_lib.runs import cost, local_pool
from moebert_lib.runs.local_pool import Event, Local

#: Stands in for ``moebert_lib.runs.execution``: a request is Python that gives ``outcome``.
STAND_IN = """
import json, os, sys
for line in sys.stdin:
    space = {"say": lambda text: print(json.dumps({"say": text}), flush=True)}
    exec(json.loads(line)["code"], space)
    print(json.dumps({"outcome": space.get("outcome", {"status": "done"})}), flush=True)
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    """Workers that run the code they are sent, started the same way as the real ones."""
    package = tmp_path / "moebert_lib"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "runs").mkdir()
    (package / "runs" / "__init__.py").write_text("")
    (package / "runs" / "execution.py").write_text(STAND_IN)
    monkeypatch.setattr(local_pool, "CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)


def asked(*codes):
    return [{"code": textwrap.dedent(code)} for code in codes]


def never(index):
    return False


def events(engine, requests, busy=never) -> list[Event]:
    return list(engine.run(requests, busy=busy))


def outcomes(found):
    return {event.index: event.outcome for event in found if event.outcome}


@pytest.mark.parametrize("workers", [1, 3])
def test_every_request_is_answered_once_and_what_it_says_comes_before(workers):
    found = events(Local(workers), asked(*[f"say('{n}')" for n in range(5)]))
    assert sorted(outcomes(found)) == list(range(5))
    assert all(outcome == {"status": "done"} for outcome in outcomes(found).values())
    for index in range(5):
        own = [event for event in found if event.index == index]
        assert own[0].started and own[1].line == str(index) and own[2].outcome


def test_no_requests_start_nothing():
    assert events(Local(2), []) == []


def test_one_process_answers_several_requests():
    found = events(Local(1), asked(*["import os; say(str(os.getpid()))"] * 3))
    assert len({event.line for event in found if event.line}) == 1


def test_a_process_that_dies_is_replaced_and_asked_again(tmp_path):
    once = f"""
        import os, pathlib, signal
        mark = pathlib.Path({str(tmp_path / "mark")!r})
        if not mark.exists():
            mark.touch(); os.kill(os.getpid(), signal.SIGKILL)
    """
    found = events(Local(1), asked(once, ""))
    assert {outcome["status"] for outcome in outcomes(found).values()} == {"done"}
    assert any("signal 9" in (event.line or "") for event in found)


def test_what_dies_every_time_is_given_up_and_the_others_go_on(tmp_path):
    log = tmp_path / "log"
    dies = f"open({str(log)!r}, 'a').write('x'); import os; os._exit(3)"
    found = outcomes(events(Local(1), asked(dies, "")))
    assert found[0]["status"] == "died" and "exit status 3" in found[0]["error"]
    assert found[1] == {"status": "done"} and log.read_text() == "x" * (1 + local_pool.RETRIES)


def test_a_kernel_that_died_is_tried_again_too(tmp_path):
    log = tmp_path / "log"
    code = f"""
        open({str(log)!r}, 'a').write('x')
        died = len(open({str(log)!r}).read()) < 2
        outcome = {{"status": "died", "error": "the kernel died"}} if died else {{"status": "done"}}
    """
    assert outcomes(events(Local(1), asked(code)))[0] == {"status": "done"}


def test_what_is_no_event_ends_the_process_and_not_the_patience():
    found = outcomes(events(Local(1), asked("print('noise')", "")))
    assert found[0]["status"] == "died" and found[1] == {"status": "done"}


def test_what_another_batch_is_making_waits_for_the_end():
    found = events(Local(1), asked("", "", ""), busy=lambda index: index == 0)
    assert [event.index for event in found if event.started] == [1, 2, 0]


def test_closing_the_iterator_ends_every_process():
    others = psutil.Process().children(recursive=True)  # such as a browser of other tests
    running = Local(2).run(asked(*["import time; time.sleep(600)"] * 3), busy=never)
    assert {next(running).started for _ in range(2)} == {True}
    time.sleep(0.5)
    mine = set(psutil.Process().children(recursive=True)) - set(others)
    start = time.monotonic()
    local_pool.PATIENCE, before = 0.5, local_pool.PATIENCE  # the stand-in does not watch its input
    try:
        running.close()
    finally:
        local_pool.PATIENCE = before
    assert time.monotonic() - start < 30
    assert mine and not psutil.wait_procs(mine, timeout=10)[1]
    assert not [thread for thread in threading.enumerate() if "serve" in thread.name]


def test_a_run_has_one_thread_however_many_run_and_a_gpu_to_itself(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    local = Local(2, gpus=["2", "5"])
    seen = [local.environment(slot) for slot in range(2)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in seen] == ["2", "5"]
    assert {env["OMP_WAIT_POLICY"] for env in seen} == {"PASSIVE"}
    for workers in (1, 2, 8):
        assert Local(workers).environment(0)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in Local(threads=None).environment(0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own choice stays
    assert local.environment(0)["OMP_NUM_THREADS"] == "3"


def test_a_process_that_cannot_start_is_an_outcome_and_no_lost_request(monkeypatch):
    def full(environment):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(local_pool, "Worker", full)
    found = outcomes(events(Local(2), asked("", "", "")))
    assert sorted(found) == [0, 1, 2]
    assert all("Cannot allocate memory" in outcome["error"] for outcome in found.values())


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


def test_the_real_worker_leaves_when_its_input_closes():
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "moebert_lib.runs.execution"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = psutil.Popen(command, stdin=-1, stdout=-1, cwd=root, env=environment)
    process.stdin.close()
    assert process.wait(60) == 0 and process.stdout.read() == b""
    process.stdout.close()
