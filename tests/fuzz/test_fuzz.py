"""The short form of `python -m tests.fuzz.run`: some inputs of every kind, the same in each run."""

import os
import signal

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.run import prepare, shared_out, try_inputs
from tests.fuzz.worker import Worker

_INPUTS = 400


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    prepare(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_read_right_or_refused_in_time(kind, templates):
    outcomes, faults = try_inputs(kind, range(shared_out(_INPUTS)[kind]), templates)
    assert faults == []
    assert {outcome.status for outcome in outcomes} <= {0, 2}


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
