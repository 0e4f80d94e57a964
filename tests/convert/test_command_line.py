"""How every command ends: a status and one line for whatever stops it, and errors that workers can send."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.rounds import SidesDisagree
from benchmarks.worker import SideFailed
from convert.command_line import Parser, run
from convert.errors import ConversionError, SettingsError, UserError
from convert.files import NotWritten
from crossvit_jax.preprocess import UnreadableImage
from train.data.bad_images import TooManyBadImages
from train.data.sources import DataError, WorkersFailed
from train.devices.memory import DoesNotFit
from train.run.folder import CheckpointError
from train.run.interruption import Interrupted
from train.run.meter import TrainingFailed


@pytest.mark.parametrize(
    ("error", "statuses", "line"),
    [
        (SettingsError("no such thing"), (2, 2), "error: no such thing"),
        (DataError("the data is gone"), (2, 1), "error: the data is gone"),
        (Interrupted("saved", 130), (130, 130), "saved"),
        (OSError(28, "No space left on device", "x.json"), (2, 1), "error: x.json: No space left on device"),
        (OSError("unlike others"), (2, 1), "error: unlike others"),
        (MemoryError(), (2, 1), "error: out of memory: take less"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), (2, 1), "error: the devices are out of memory: take less"),
        (RuntimeError("INTERNAL: YNNPACK operation failed"), (2, 1), "error: the devices are out of memory: take less"),
        (KeyboardInterrupt(), (130, 130), "interrupted"),
    ],
)
def test_what_stops_a_command_is_one_line_and_a_status(capsys, error, statuses, line):
    def command():
        raise error

    assert run("x", command, remedy="take less") == statuses[0]
    assert run("x", command, remedy="take less", failure=1) == statuses[1]
    assert capsys.readouterr().err == f"x: {line}\n" * 2


def test_any_other_error_is_ours_and_keeps_its_traceback():
    def command():
        raise RuntimeError("a mistake in the program")

    with pytest.raises(RuntimeError):
        run("x", command)


def test_where_nobody_reads_on_the_status_is_a_shells_and_nothing_is_told():
    program = """
import sys
from convert.command_line import leave, run
leave(run("x", lambda: print("y" * 100_000) or 0))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 141)


def test_a_flags_user_error_is_shown_as_it_is(capsys):
    def colour(text):
        raise SettingsError(f"colour must be red; got {text}")

    parser = Parser(prog="x")
    parser.add_argument("--colour", type=colour)
    parser.add_argument("--number", type=int)
    for flag, line in (("--colour=blue", "colour must be red; got blue"), ("--number=a", "invalid int value: 'a'")):
        with pytest.raises(SystemExit):
            parser.parse_args([flag])
        assert capsys.readouterr().err == f"x: error: argument {flag.split('=')[0]}: {line}\n"


@pytest.mark.parametrize(
    "error",
    [
        *(
            kind("why")
            for kind in (UserError, ConversionError, SettingsError, DataError, WorkersFailed, TooManyBadImages)
        ),
        *(kind("why") for kind in (TrainingFailed, CheckpointError, SidesDisagree)),
        Interrupted("saved", 130),
        DoesNotFit("too much", 7.5),
        SideFailed("killed"),
        UnreadableImage("a.png", "it is empty"),
        NotWritten(Path("out.pth"), "no space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_whole_from_other_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
    assert getattr(again, "status", None) == getattr(error, "status", None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_that_would_end_the_process_lets_a_command_clean_up(capsys, number):
    before = signal.signal(number, signal.SIG_DFL)
    cleaned = []

    def command():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            cleaned.append(signal.getsignal(signal.SIGTERM))  # a second one waits for the end of this

    try:
        assert run("x", command) == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert cleaned == [signal.SIG_IGN]
    assert capsys.readouterr().err == "x: terminated\n"


def test_a_signal_that_nohup_ignores_stays_ignored(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("x", lambda: os.kill(os.getpid(), signal.SIGHUP) or 0) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
