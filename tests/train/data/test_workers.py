"""Worker processes outlive what is meant for the main process, but not the main process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_DATA = """
import multiprocessing, os, signal, sys, time
from contextlib import closing

import numpy as np

from train.data.batches import train_batches
from train.data.streams import device_batches
from train.devices.mesh import make_mesh


class Numbers:
    def __len__(self):
        return 50

    def __getitem__(self, index):
        return {"image": b"", "label": index, "name": ""}


def label(sample, rng):
    return {"label": np.int32(sample["label"])}
"""

_SIGNALS_TO_ALL = """

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
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda number, _: heard.append(number))

    def interrupt():
        give_up = time.monotonic() + 20
        while len(multiprocessing.active_children()) < 2:  # they start before any batch is asked for
            assert time.monotonic() < give_up
            time.sleep(0.01)
        to_all(signal.SIGINT, signal.SIGTERM)

    expected = list(labels(0))
    stream = labels(2, interrupt)
    assert [next(stream) for _ in expected] == expected
    assert heard == 2 * [signal.SIGINT, signal.SIGTERM]
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
    script.write_text(_DATA + _FEW_BATCHES)
    done = subprocess.run([sys.executable, str(script)], env=_ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1225\n", "")
