"""The short form of `python -m tests.fuzz.run`: some inputs of every kind, the same in each run."""

import os
import re
import signal
import subprocess
import sys

from tests.fuzz.kinds import KINDS
from tests.fuzz.worker import Worker


def test_damaged_input_of_every_kind_is_read_right_or_refused_in_time():
    # a process that has started no backend: with the threads of one, its forks could hang
    command = [sys.executable, "-m", "tests.fuzz.run", "--inputs", "400"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\w+) +\d+ inputs: \d+ read, \d+ refused, 0 faults", done.stdout, re.MULTILINE) == list(KINDS)


def test_a_process_that_hangs_dies_or_raises_is_told_and_the_next_input_gets_another():
    def odd(how):
        if how == "hang":
            while True:
                pass
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise":
            raise KeyError(how)
        if how == "colour":
            print("\x1b[31m")
        return 0

    worker = Worker(odd, seconds=1, memory=1024)
    try:
        assert [worker(how).fault for how in ("fine", "hang", "fine", "die", "raise", "colour", "fine")] == [
            None,
            "hung: no end after 1 s",
            None,
            "died: SIGKILL",
            "a traceback: KeyError: 'raise'",
            "control characters in what is printed",
            None,
        ]
    finally:
        worker.close()
