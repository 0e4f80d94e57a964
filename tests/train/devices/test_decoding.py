"""Pictures of many pixels that are decoded at the same time share a bounded memory, and none waits for ever."""

import itertools
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from crossvit_jax.preprocess import UnreadableImage
from train.devices import decoding
from train.devices.decoding import SMALL, DecodingMemory, largest_kept, share_among
from train.images import decode
from train.images.decode import decode_pixels


class _Most:
    """How much is held at the same time."""

    def __init__(self):
        self.now = self.most = self.together = self.threads = 0
        self._lock = threading.Lock()

    def __call__(self, size):
        with self._lock:
            self.now, self.threads = self.now + size, self.threads + (1 if size > 0 else -1)
            self.most, self.together = max(self.most, self.now), max(self.together, self.threads)


def _big_png(width, height):
    """The beginning of a PNG file: only its header can be read."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\2\0\0\0"
    head = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return head + (4).to_bytes(4, "big") + b"IDATabcd\0\0\0\0"


def test_threads_never_hold_more_than_the_limit_but_for_one_picture_alone():
    memory, most, rng = DecodingMemory(100 * SMALL), _Most(), np.random.default_rng(0)
    sizes = rng.integers(2, 60, size=200).tolist() + [150] * 5
    rng.shuffle(sizes)

    def decode_one(size):
        with memory.returned():
            memory.take(size * SMALL, 1)
            most(size)
            time.sleep(0.0005)
            most(-size)
            if size % 3 == 0:
                raise ValueError("damaged")

    with ThreadPoolExecutor(16) as pool:
        failures = [future.exception(timeout=60) for future in [pool.submit(decode_one, size) for size in sizes]]
    assert sum(failure is not None for failure in failures) == sum(size % 3 == 0 for size in sizes)
    assert most.most == 150  # one alone
    assert most.together > 2
    assert memory.held == 0


def test_threads_hold_at_most_the_limit():
    memory, held = DecodingMemory(100 * SMALL), []

    def decode_one(size):
        with memory.returned():
            memory.take(size * SMALL, 1)
            held.append(memory.held)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(decode_one, [2, 30, 60, 99] * 30))
    assert max(held) <= 100 * SMALL
    assert memory.held == 0


def test_a_mask_and_its_picture_count_once_and_a_larger_picture_does_not_wait_for_itself():
    memory = DecodingMemory(40 * SMALL)
    together = threading.Barrier(2, timeout=20)

    def sample():
        with memory.returned():
            memory.take(2 * SMALL, 10)  # the mask
            together.wait()  # both threads hold all that there is
            with memory.returned():
                memory.take(2 * SMALL, 10)
                memory.take(2 * SMALL, 8)
                assert memory.held == 40 * SMALL
                together.wait()
                memory.take(3 * SMALL, 10)
            assert memory.held >= 30 * SMALL  # it is returned at the end of the outer block

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(sample), pool.submit(sample)]:
            future.result(timeout=20)
    assert memory.held == 0


def test_pictures_of_few_pixels_take_no_lock(monkeypatch):
    memory = DecodingMemory(1)
    monkeypatch.setattr(memory, "_changed", None)
    with memory.returned():
        memory.take(SMALL, 100)
    assert memory.held == 0


def test_damaged_pictures_return_what_they_took(monkeypatch):
    memory, taken = DecodingMemory(10**9), []
    monkeypatch.setattr(decode, "decoding_memory", lambda: memory)
    take = memory.take
    monkeypatch.setattr(memory, "take", lambda *size: (take(*size), taken.append(memory.held)))
    encoded = _big_png(10_000, 9_000)
    with ThreadPoolExecutor(8) as pool:
        failures = [pool.submit(decode_pixels, encoded, "x.png").exception(timeout=60) for _ in range(16)]
    assert all(isinstance(failure, UnreadableImage) for failure in failures)
    assert min(taken) == 14 * 10_000 * 9_000  # more than the limit: one after the other
    assert max(taken) == 14 * 10_000 * 9_000
    assert memory.held == 0


_WORKER = """
import sys, time
from train.devices.decoding import SMALL, decoding_memory

memory = decoding_memory()
assert memory.limit == int(sys.argv[1]), memory.limit
for _ in range(3):
    with memory.returned():
        memory.take(memory.limit // 2, 4)  # more than its share
        print(time.monotonic())
        time.sleep(0.02)
        print(time.monotonic(), flush=True)
"""


def test_workers_share_and_decode_one_after_the_other_what_is_above_a_share(monkeypatch):
    for name in ("CROSSVIT_DECODING_BYTES", "CROSSVIT_DECODING_LOCK"):
        monkeypatch.setenv(name, "")  # restored at the end
    monkeypatch.setattr(decoding, "host_memory", lambda: 2**34)
    share_among(3)
    command = [sys.executable, "-c", _WORKER, str(2**34 // 4 // 3)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    times = []
    for worker in workers:
        numbers = list(map(float, worker.communicate(timeout=60)[0].split()))
        assert len(numbers) == 6
        times += zip(numbers[::2], numbers[1::2], strict=True)
    times.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_pictures_that_wait_for_the_main_process_are_bounded_too(monkeypatch, workers):
    monkeypatch.setattr(decoding, "host_memory", lambda: 16 * 2**30)
    assert largest_kept(workers) * 4 * max(1, workers) == 4 * 2**30
