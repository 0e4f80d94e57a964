"""`python -m benchmarks.serving`: a whole small run, whose counts must be right whatever the machine does meanwhile."""

import asyncio
import json
import socket
import threading

import pytest

from benchmarks.serving import main
from benchmarks.sides.load import Load, closed_loop, open_loop
from tests.train.small_weights import save_small


class _Echo:
    """A server that answers 200, and every tenth request 503."""

    def __enter__(self):
        self.asked = 0
        self._loop = asyncio.new_event_loop()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = self._loop.run_until_complete(asyncio.start_server(self._answer, sock=self._listener))
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _answer(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                await reader.readexactly(int(head.split("Content-Length: ")[1].split()[0]))
                self.asked += 1
                status = 503 if self.asked % 10 == 0 else 200
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        except asyncio.IncompleteReadError:
            writer.close()


def test_an_open_load_has_its_rate_and_counts_every_answer():
    with _Echo() as echo:
        load = asyncio.run(open_loop(echo.address, [b"x"], rate=200, seconds=1))
        assert sum(load.statuses.values()) == echo.asked == pytest.approx(200, abs=60)
        assert load.statuses == {200: echo.asked - echo.asked // 10, 503: echo.asked // 10}
        assert len(load.waits) == load.statuses[200]
        asked = echo.asked
        closed = asyncio.run(closed_loop(echo.address, [b"x"], clients=3, seconds=0.2))
        assert sum(closed.statuses.values()) == echo.asked - asked
        assert closed.seconds >= 0.2
        counted = asyncio.run(closed_loop(echo.address, [b"x"], clients=3, requests=50))
        assert sum(counted.statuses.values()) == 50


def test_a_server_that_does_not_listen_is_counted_as_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    load = asyncio.run(closed_loop(f"127.0.0.1:{port}", [b"x"], clients=1, seconds=0.01))
    assert set(load.statuses) == {0}
    assert load.waits == []


def test_quantiles_and_shares():
    load = Load(seconds=2.0, waits=[float(number) for number in range(100)])
    load.statuses.update({200: 100, 503: 25})
    told = load.as_json()
    assert (told["p50_s"], told["p99_s"], told["rejected"], told["answered_per_s"]) == (50.0, 99.0, 0.2, 50.0)


@pytest.mark.slow
def test_a_small_run_loses_nothing(tmp_path, capfd):
    weights, file = save_small(tmp_path / "w.safetensors", "abcdefgh"), tmp_path / "x.json"
    flags = [f"--weights={weights}", "--max-batch=2", "--seconds=1", "--soak=505", f"--json={file}"]
    assert main(flags) == 0, capfd.readouterr()
    out = capfd.readouterr().out
    assert "each tenth of 505 of 200 answers: " in out
    assert " | times as fast as train.predict | " in out
    (told,) = json.loads(file.read_text())["results"]
    sides = ("server", "train.predict", "one at a time")
    assert {side: len(known["seconds"]) for side, known in told["sides"].items()} == dict.fromkeys(sides, 3)
    assert [load["share"] for load in told["loads"]] == [0.5, 0.8, 1.2, 2.0]
    for load in told["loads"]:
        assert set(load["statuses"]) <= {"200", "503"}
    memory = told["soak"]["memory_bytes"]
    assert len(memory) == 10
    assert memory[-1] - memory[2] < 350 * 2**14  # 16 KiB a request; a file has 50, its pixels 550
