"""Signals that ask a run to end, and those that end it at once."""

import os
import signal
import subprocess
import sys

import pytest

from convert.command_line import Program
from train.run.interruption import Interruption

_ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers():
    """Those of a shell's program, whatever the tests run in."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in _ALL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", _ALL)
def test_each_signal_asks_the_run_to_save_and_has_its_status(number, capfd):
    with Interruption() as interruption:
        interruption.can_save = True
        assert not interruption.wanted(1)
        os.kill(os.getpid(), number)
        assert interruption.wanted(1)
        assert interruption.status == 128 + number
    assert all(signal.getsignal(other) == signal.SIG_DFL for other in _ALL)
    once_more = ", once more to end at once" * (number in (signal.SIGTERM, signal.SIGINT))
    assert capfd.readouterr().err == f"\npython -m train.main: interrupted; saving{once_more}\n"


def test_a_terminal_and_its_shell_both_hang_up_and_a_schedulers_end_follows_its_warning(capfd, monkeypatch):
    monkeypatch.setattr(Program, "typed", "crossvit train")
    with Interruption() as interruption:
        interruption.can_save = True
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)  # none of them ends this process
        assert interruption.status == 143
    assert capfd.readouterr().err == "\ncrossvit train: interrupted; saving\n"


def test_under_nohup_a_closed_terminal_is_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interruption() as interruption:
        interruption.can_save = True
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption.wanted(1)


@pytest.mark.parametrize(
    ("signals", "status", "line"),
    [
        ("SIGUSR1 SIGTERM SIGTERM", 143, b"\npython -m train.main: interrupted before it was saved\n"),
        ("SIGTERM SIGHUP SIGINT", 130, b"\npython -m train.main: interrupted before it was saved\n"),
    ],
)
def test_a_second_signal_of_someone_impatient_ends_the_run_at_once(signals, status, line):
    program = """
import os, signal, sys
from train.run.interruption import Interruption
with Interruption() as interruption:
    interruption.can_save = True
    for name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(signal, name))
"""
    done = subprocess.run([sys.executable, "-c", program, *signals.split()], capture_output=True)
    assert done.returncode == status
    assert done.stderr.endswith(line)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_several_processes_stop_together_as_jax_hands_sigterm_on(number, monkeypatch):
    heard = []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    signal.signal(signal.SIGTERM, lambda *_: heard.append("jax"))  # with several processes it is jax's
    with Interruption() as interruption:
        interruption.can_save = True
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert heard == ["jax"]
