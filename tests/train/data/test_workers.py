"""Worker processes outlive what is meant for the main process, but not the main process."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import grain
import pytest

from convert.errors import UserError
from train.data.batches import train_batches
from train.data.sources import WorkersFailed
from train.data.workers import _Explained
from train.loop import _told_how_to_go_on

_DATA = """
import multiprocessing, os, signal, sys, time
from contextlib import closing

import numpy as np

from train.data.batches import train_batches
from train.data.streams import device_batches
from train.devices.mesh import make_mesh


class Numbers:
    def __init__(self):
        self.more = bytes(2**20)  # than a pipe to a worker holds

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return {"image": b"", "label": index, "name": ""}


def label(sample, rng):
    return {"label": np.int32(sample["label"])}
"""

_ENDED_AT_ONCE = """
if __name__ == "__main__":
    stream = iter(train_batches(Numbers(), label, batch_size=5, seed=0, workers=2))
    batches = [next(stream) for _ in range(3)]
    os._exit(3)
"""

_SIGNALS_TO_ALL = """
SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]  # as they are delivered, by number

def to_all(*signals):
    for one in signals:
        os.killpg(0, one)


def labels(workers, meanwhile=lambda: None):
    stream = iter(train_batches(Numbers(), label, batch_size=5, seed=0, workers=workers))
    meanwhile()
    for batch in range(30):
        if batch == 6:
            meanwhile()
        yield next(stream)["label"].tolist()


if __name__ == "__main__":
    heard = []
    for one in SIGNALS:
        signal.signal(one, lambda number, _: heard.append(number))

    def interrupt():
        give_up = time.monotonic() + 20
        while len(multiprocessing.active_children()) < 2:  # they start before any batch is asked for
            assert time.monotonic() < give_up
            time.sleep(0.01)
        to_all(*SIGNALS)

    expected = list(labels(0))
    stream = labels(2, interrupt)
    assert [next(stream) for _ in expected] == expected
    assert heard == 2 * SIGNALS
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
"""

_FEW_BATCHES = """

def work():
    batches = train_batches(Numbers(), label, batch_size=5, seed=0, workers=2)
    with closing(device_batches(batches, make_mesh())) as stream:
        print(sum(int(next(stream)["label"].sum()) for _ in range(10)))


if __name__ == "__main__":
    work()
"""

_ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "JAX_PLATFORMS": "cpu"}


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds out in /proc whether a process runs")
def test_workers_let_signals_to_all_pass_from_birth_and_end_with_the_main_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_DATA + _SIGNALS_TO_ALL)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(script)], env=_ENVIRONMENT, start_new_session=True, **pipes) as main:
        workers = [int(pid) for pid in main.stdout.readline().split()]
        try:
            assert len(workers) == 2
            assert all(map(_is_running, workers))
        finally:
            main.send_signal(signal.SIGKILL)
        main.wait()
        give_up = time.monotonic() + 20
        while any(map(_is_running, workers)) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert not any(map(_is_running, workers))


def test_the_end_of_a_program_has_no_shared_memory_left_to_warn_of(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import train.data.workers\ntrain.data.workers._start_tracker = lambda: None\n{_DATA}{_FEW_BATCHES}"
    )
    done = subprocess.run([sys.executable, str(script)], env=_ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1225\n", "")


def test_a_process_that_ends_at_once_leaves_nothing_to_be_told_of(tmp_path):
    """As a run does at Ctrl-C: Python would warn of the semaphores and the shared memory that it then removes."""
    script = tmp_path / "script.py"
    script.write_text(_DATA + _ENDED_AT_ONCE)
    done = subprocess.run([sys.executable, str(script)], env=_ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


# --- workers that end before their time ---


class _Numbers:
    def __len__(self):
        return 50

    def __getitem__(self, index):
        return {"image": b"", "label": index, "name": ""}


def _killed(sample, rng):
    """As the system does where memory ends."""
    os.kill(os.getpid(), signal.SIGKILL)


_ENDED = "Worker process was terminated unexpectedly with exit code"  # Grain's words
_LESS = "fewer workers or a smaller --batch-size take less"


def test_a_worker_that_is_killed_is_told_in_one_line():
    batches = train_batches(_Numbers(), _killed, batch_size=5, seed=0, workers=1)
    with closing(iter(batches)) as stream, pytest.raises(WorkersFailed) as told:
        next(stream)
    assert str(told.value) == f"a worker process was killed, as the system does where memory ends: {_LESS}"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(f"{_ENDED} -7. Search"), f"/dev/shm, in which worker processes leave batches, is full.*{_LESS}"),
        (OSError(28, "No space left on device"), "/dev/shm, .*, and Docker makes it larger with --shm-size=8g"),
        (RuntimeError(f"{_ENDED} -11. Search"), "a worker process was ended by SIGSEGV"),
        (RuntimeError(f"{_ENDED} 3. Search"), "a worker process was ended with exit status 3"),
        (RuntimeError(f"{_ENDED} 66. Search"), "a script that starts worker processes is run by each of them once"),
        (RuntimeError("another"), "another"),
    ],
)
def test_what_ended_a_worker_is_told_with_what_helps(error, line):
    def batches():
        raise error
        yield

    with pytest.raises(type(error) if line == "another" else UserError, match=f"^{line}"):
        next(_Explained(_Plain(batches())))


class _Plain(grain.DatasetIterator):
    def __init__(self, values):
        super().__init__()
        self._values = values

    def __next__(self):
        return next(self._values)

    def get_state(self):
        return {}

    def set_state(self, state): ...


@pytest.mark.parametrize(
    ("code", "line"),
    [(28, "/dev/shm, in which"), (30, r"worker processes cannot be started \(Read-only file system\); --workers 0 ")],
)
def test_workers_that_cannot_be_started_are_told_with_what_helps(code, line, monkeypatch):
    def no_semaphore(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("multiprocessing.context.SpawnContext.Event", no_semaphore)
    with pytest.raises(WorkersFailed, match=f"^{line}"):
        iter(train_batches(_Numbers(), _killed, batch_size=5, seed=0, workers=1))


_UNGUARDED = """

def work():
    print("work", os.getpid(), flush=True)
    next(iter(train_batches(Numbers(), label, batch_size=5, seed=0, workers=2)))
    return 0


from convert.command_line import leave, run
leave(run("x", work))
"""


def test_a_script_without_a_main_guard_does_no_work_in_its_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_DATA + _UNGUARDED)
    done = subprocess.run([sys.executable, str(script)], env=_ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("work") == 1
    assert done.stderr == (
        "x: error: a script that starts worker processes is run by each of them once more: put what it does below "
        "`if __name__ == '__main__':`\n"
    )
    assert done.returncode == 2


def test_a_run_whose_worker_was_killed_says_how_to_go_on(tmp_path):
    def fail():
        with _told_how_to_go_on(tmp_path):
            raise WorkersFailed("a worker process was killed")

    with pytest.raises(WorkersFailed, match=r"^a worker process was killed$"):  # nothing was begun yet
        fail()
    (tmp_path / "config.json").write_text('{"train": {}}')
    with pytest.raises(WorkersFailed) as told:
        fail()
    assert str(told.value) == (
        f"a worker process was killed; --resume {tmp_path} goes on, --workers 0 needs no worker processes"
    )
