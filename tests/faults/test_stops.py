"""A sweep that is stopped, or that shares its store with another, and goes on."""

import os
import signal
from collections import Counter

from sweeping import ALL, Home, undisturbed, until


def test_a_stop_says_one_line_leaves_no_process_and_a_resume_completes(tmp_path):
    home = Home(tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM):
        before, command = len(home.log()), home.start()
        until(lambda n=before: len(home.log()) > n)  # its first step: most is still to do
        os.killpg(command.process.pid, number)  # what a terminal does on Ctrl-C
        ended = command.end()
        home.alone()
        assert ended.status == 130 and ended.line.startswith("moebert: stopped; ")
        home.check_tidy()
    home.sweep()
    home.check_complete(undisturbed().table())


def test_two_sweeps_at_once_share_the_work(tmp_path):
    home = Home(tmp_path)
    both = [home.start(), home.start()]
    assert [command.end().status for command in both] == [0, 0]
    assert Counter(home.log()) == Counter(ALL)
    home.check_complete(undisturbed().table())
