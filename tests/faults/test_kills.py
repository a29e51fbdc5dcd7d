"""Whatever process of a sweep is killed at whatever moment, nothing finished is lost.

``MOEBERT_KILLS=20 pytest tests/faults/test_kills.py`` kills as often at random, beside the one at
a kernel's start. A test's name ends with the seed that chose its moment; ``MOEBERT_KILLS_SEED``
chooses the first one.
"""

import os
import random
import time
from collections import Counter

import pytest
from sweeping import ALL, Command, Home, undisturbed, until

KILLS = int(os.environ.get("MOEBERT_KILLS", 2))
FIRST = int(os.environ.get("MOEBERT_KILLS_SEED", random.SystemRandom().randrange(10**6)))
#: What can be killed, by a word of its command line; the sweep itself is known.
VICTIMS = {"sweep": "", "kernel": "ipykernel_launcher"}
CASES = [(list(VICTIMS)[n % 2], FIRST + n) for n in range(KILLS)]


@pytest.mark.parametrize("victim, seed", CASES, ids=[f"{who}-{seed}" for who, seed in CASES])
def test_a_sweep_completes_and_repeats_only_what_was_in_flight(tmp_path, victim, seed):
    home, moment = Home(tmp_path), random.Random(seed)
    command = home.start()
    n_logged = moment.randrange(len(ALL) - 1)
    until(lambda: len(home.log()) >= n_logged)
    time.sleep(moment.random())
    check_survives(home, command, victim)


def test_a_kernel_that_dies_while_it_starts_is_started_again(tmp_path):
    home = Home(tmp_path)
    check_survives(home, home.start(), "kernel")


def check_survives(home: Home, command: Command, victim: str) -> None:
    """Kill a process of a sweep now; what should be there in the end, is."""
    if victim == "sweep":
        process = command.process
    else:
        process = until(lambda: command.find(VICTIMS[victim]))
    before = home.entries()
    process.kill()
    repeatable = set(home.log()) - before.keys()
    ended = command.end()
    home.alone()
    if victim == "sweep":
        assert ended.status == -9
        repeatable = set(home.log()) - home.entries().keys()
        ended = home.run()
    assert ended.status == 0, ended
    after = home.entries()
    assert {what: after[what] for what in before} == before
    counts = Counter(home.log())
    repeated = {what for what, n in counts.items() if n > 1}
    assert repeated <= repeatable and max(counts.values()) < 3
    home.check_complete(undisturbed().table())
