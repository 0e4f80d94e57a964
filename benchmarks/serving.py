"""`python -m benchmarks.serving`: what `python -m train.serve` does under load, at its end, and with noise.

The load comes from this process, over the loopback: generator and server share the machine's cores.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.command import writable_json
from benchmarks.result import Content, about, markdown_table, where, write_json
from benchmarks.rounds import say
from benchmarks.worker import SideFailed
from convert.command_line import Parser, at_least_one, leave, run, weights_source
from convert.files import typed_path

TO_BATCHES, TO_PLAIN = 0.85, 1.2  # goals: of train.predict's images in a second, and of a plain server's
_PROGRAM = "python -m benchmarks.serving"
_SHARES = (0.5, 0.8, 1.2, 2.0)  # of capacity
_START = 600.0  # seconds that a server has to become ready
_PHOTOGRAPHS = 8
_ROUNDS = 3
_READ_AHEAD = 2  # batches that are ready, or nearly so, when the loop goes on


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status: 0 done; 1 a server failed; 2 wrong flags."""
    parser = Parser(prog=_PROGRAM, description="Put a server of a classifier under load, and compare it with others.")
    parser.add_argument("--weights", type=weights_source, required=True, metavar="SOURCE", help="the weights to serve")
    parser.add_argument("--max-batch", type=at_least_one, default=8, metavar="N", help="as of train.serve; default: 8")
    parser.add_argument("--seconds", type=at_least_one, default=20, metavar="N", help="of each load; default: 20")
    parser.add_argument("--fuzzed", type=at_least_one, default=1000, metavar="N", help="bodies of noise; default: 1000")
    parser.add_argument(
        "--soak",
        type=at_least_one,
        default=1000,
        metavar="N",
        help="requests one after the other, with a look at the server's memory after each tenth; default: 1000",
    )
    parser.add_argument("--json", type=typed_path, metavar="FILE", help="write what was measured to FILE")
    args = parser.parse_args(argv)
    writable_json(parser, args.json)
    return run(_PROGRAM, lambda: _run(args), failure=1)


def _run(args: argparse.Namespace) -> int:
    bodies = photographs()
    told: dict[str, Any] = {"weights": Path(args.weights).name, "max_batch": args.max_batch, "seconds": args.seconds}
    with _serving(_server_command(args)) as server:
        told["rounds"] = _compared(server, bodies, args)
        told["capacity_per_s"] = median(told["rounds"]["server"])
        say(f"capacity {told['capacity_per_s']:.1f} pictures/s")
        told["loads"] = _under_load(server, bodies, told["capacity_per_s"], args.seconds)
        told["soak"] = _soaked(server, bodies, args)
        told["fuzzed"] = dict(asyncio.run(_fuzz(server.address, bodies, args.fuzzed)))
        told["alive"] = asyncio.run(_closed(server.address, bodies, 1, 0.5)).statuses.keys() == {200}
        say("noise done")
        told["sigterm"] = _ended(server, bodies, 1.2 * told["capacity_per_s"])
    content = about("serving") | told
    print(as_markdown(content))
    write_json(args.json, content)
    return 0


def as_markdown(content: Content) -> str:
    """What was served where, a table of loads, and what the rest came to."""
    rows = []
    for load in content["loads"]:
        waits = ["-" if load[name] is None else f"{1000 * load[name]:.0f}" for name in ("p50_s", "p99_s")]
        figures = [f"{load['rejected']:.1%}", f"{load['batch_pictures']:.1f}", f"{1000 * load['batch_s']:.0f}"]
        others = ", ".join(f"{count} of {status}" for status, count in load["statuses"].items() if status != "200")
        rows.append([f"{load['share']:.0%}", f"{load['answered_per_s']:.1f}", *waits, *figures, others or "none"])
    titles = ["load", "answers/s", "p50 ms", "p99 ms", "rejected", "pictures a batch", "ms a batch", "other statuses"]
    rounds, end = content["rounds"], content["sigterm"]
    to_batches, to_plain = (_ratio(rounds["server"], rounds[other]) for other in ("predict", "plain"))
    soak, sizes = content["soak"], content["soak"]["memory_bytes"]
    grown = "unknown" if None in sizes else f"{(sizes[-1] - sizes[0]) / 2**20:+.1f} MiB since the first"
    sizes = ", ".join("-" if size is None else f"{size / 2**20:.0f}" for size in sizes)
    return "\n".join(
        [
            f"`train.serve --weights {content['weights']} --max-batch {content['max_batch']}`; {where(content)}",
            "",
            "Generator and server share the cores. Loads are open: requests come at random times, answered or not.",
            "",
            *markdown_table(titles, rows),
            "",
            f"- capacity {content['capacity_per_s']:.1f} pictures/s: {to_batches} of train.predict's loop (goal "
            f"{TO_BATCHES}), {to_plain} times a plain server that takes one request at a time (goal {TO_PLAIN}); "
            f"median of {_ROUNDS} rounds (smallest to largest)",
            f"- {sum(content['fuzzed'].values())} bodies of noise: {_listed(content['fuzzed'])}; "
            f"afterwards it {'answers' if content['alive'] else 'DOES NOT ANSWER'}",
            f"- memory after each tenth of {sum(soak['statuses'].values())} requests ({_listed(soak['statuses'])}): "
            f"{sizes} MiB, {grown}",
            f"- SIGTERM under load: exit status {end['status']} after {end['seconds']:.1f} s; "
            f"{end['answered']} answers arrived of {end['logged']} that it sent",
        ]
    )


def photographs() -> list[bytes]:
    """Cut-outs of the photographs that scikit-learn carries, as JPEG files of 500 × 375 pixels, as ImageNet's."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    encoded, draws = [], random.Random(0)
    for number in range(_PHOTOGRAPHS):
        pixels = load_sample_images().images[number % 2]
        left, top = draws.randrange(640 - 500), draws.randrange(427 - 375)
        file = io.BytesIO()
        Image.fromarray(pixels[top : top + 375, left : left + 500]).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


def _server_command(args: argparse.Namespace) -> list[str]:
    flags = ["--weights", args.weights, "--max-batch", str(args.max_batch), "--port", "0"]
    return [sys.executable, "-m", "train.serve", *flags]


class _Server:
    """A process that says `http://ADDRESS`, and what it can be asked."""

    def __init__(self, process: subprocess.Popen, log: Path, requests: Path):
        self.process, self.log, self.requests = process, log, requests
        self.address = ""

    def wait(self) -> None:
        """Until it takes requests. Raises SideFailed."""
        end = time.monotonic() + _START
        while time.monotonic() < end and self.process.poll() is None:
            text = self.log.read_text()
            if "http://" in text:
                self.address = text.split("http://")[1].split()[0]
                if ": ready\n" in text:
                    return
            time.sleep(0.1)
        raise SideFailed(f"the server did not become ready: {self.log.read_text()[-500:]}")

    def metrics(self) -> dict[str, float]:
        """Prometheus's text as numbers."""
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=60) as answer:
            lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def memory(self) -> float | None:
        """Resident bytes; none where the system does not tell."""
        return self.metrics().get("process_resident_memory_bytes")


@contextlib.contextmanager
def _serving(command: Sequence[str]) -> Iterator[_Server]:
    with tempfile.TemporaryDirectory(prefix="crossvit-serving-") as folder:
        log, out = Path(folder, "log"), Path(folder, "out")
        environment = {name: value for name, value in os.environ.items() if name != "CROSSVIT_TOKEN"}
        with (
            log.open("w") as err,
            out.open("w") as requests,
            subprocess.Popen(command, env=environment, stdout=requests, stderr=err) as process,
        ):
            server = _Server(process, log, out)
            try:
                server.wait()
                yield server
            finally:
                process.kill()


def _compared(server: _Server, bodies: Sequence[bytes], args: argparse.Namespace) -> dict[str, list[float]]:
    """Pictures in a second of `server`, `predict`, which is train.predict's loop, and `plain`, a server that takes one
    request at a time. They take turns, so that what else the machine does slows all of them."""
    seconds, clients = args.seconds / 2, 2 * args.max_batch
    rates: dict[str, list[float]] = {"server": [], "predict": [], "plain": []}
    with (
        _serving([sys.executable, "-m", "benchmarks.sides.plain_server", args.weights]) as plain,
        contextlib.closing(_batch_loop(args.weights, bodies, seconds)) as predict,
    ):
        asyncio.run(_closed(server.address, bodies, clients, 2))  # warm
        for number in range(_ROUNDS):
            rates["server"].append(asyncio.run(_closed(server.address, bodies, clients, seconds)).rate)
            rates["predict"].append(next(predict))
            rates["plain"].append(asyncio.run(_closed(plain.address, bodies, 4, seconds)).rate)
            say(f"round {number + 1} of {_ROUNDS} done")
    return rates


def _ratio(rates: Sequence[float], others: Sequence[float]) -> str:
    """Median, smallest and largest over rounds."""
    ratios = [rate / other for rate, other in zip(rates, others, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _batch_loop(source: str, bodies: Sequence[bytes], seconds: float) -> Iterator[float]:
    """Images in a second of train.predict's own loop, at its own batch size: anew each time that it is asked."""
    from train.data.bad_images import BadImages
    from train.devices.process import keep_compiled_programs, keep_freed_memory
    from train.inference.classify import classify
    from train.inference.image_paths import FileSource
    from train.inference.model import load_classifier

    keep_freed_memory()
    keep_compiled_programs()
    classifier = load_classifier(source)
    size = classifier.batch_size(None, 10**6)
    with tempfile.TemporaryDirectory(prefix="crossvit-serving-") as folder:
        paths = [Path(folder, f"{number}.jpg") for number in range(len(bodies))]
        for path, body in zip(paths, bodies, strict=True):
            path.write_bytes(body)
        files = FileSource(tuple(str(paths[number % len(paths)]) for number in range(1000 * size)))
        batches = classify(classifier, files, BadImages(files, print), batch_size=size, workers=0, top_k=5)
        with contextlib.closing(batches):
            next(batches)  # it is compiled
            while True:
                for _ in range(_READ_AHEAD):  # which took no time of this round
                    next(batches)
                start, done = time.perf_counter(), 0
                while time.perf_counter() < start + seconds:
                    done += len(next(batches))
                yield done / (time.perf_counter() - start)


async def _closed(address: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Any:
    from benchmarks.sides.load import closed_loop

    return await closed_loop(address, bodies, clients=clients, seconds=seconds)


def _under_load(server: _Server, bodies: Sequence[bytes], capacity: float, seconds: float) -> list[dict[str, Any]]:
    from benchmarks.sides.load import open_loop

    loads = []
    for share in _SHARES:
        before, rate = server.metrics(), share * capacity
        load = asyncio.run(open_loop(server.address, bodies, rate=rate, seconds=seconds))
        after = server.metrics()
        change = {name: after[name] - before.get(name, 0.0) for name in after}
        batches = max(1.0, change["crossvit_batch_pictures_count"])
        loads.append(
            load.as_json()
            | {
                "share": share,
                "batch_pictures": change["crossvit_batch_pictures_sum"] / batches,
                "batch_s": change["crossvit_compute_seconds_sum"] / batches,
            }
        )
        say(f"load of {share:.0%} done")
    return loads


def _soaked(server: _Server, bodies: Sequence[bytes], args: argparse.Namespace) -> dict[str, Any]:
    """The memory after each tenth of some requests, and how they were answered."""
    from benchmarks.sides.load import closed_loop

    memory, statuses = [], Counter()
    for number in range(10):
        count = args.soak // 10 + (number < args.soak % 10)
        load = asyncio.run(closed_loop(server.address, bodies, clients=2 * args.max_batch, requests=count))
        statuses += load.statuses
        memory.append(server.memory())
    say(f"{args.soak} requests done")
    return {"memory_bytes": memory, "statuses": {str(status): count for status, count in sorted(statuses.items())}}


async def _fuzz(address: str, bodies: Sequence[bytes], count: int) -> Counter:
    """How often each status answered bodies that are cut off, or have other bytes here and there."""
    from benchmarks.sides.load import Connections

    kinds = ("image/jpeg", "application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain")
    connections, draws, statuses = Connections(address), random.Random(0), Counter()
    for number in range(count):
        body = bytearray(bodies[number % len(bodies)][: draws.randrange(1, 3000)])
        for _ in range(10):
            body[draws.randrange(len(body))] = draws.randrange(256)
        statuses[str(await connections.ask(bytes(body), kinds[number % len(kinds)]))] += 1
    connections.close()
    return statuses


def _ended(server: _Server, bodies: Sequence[bytes], rate: float) -> dict[str, Any]:
    """Sends SIGTERM in the middle of a load: how it ended, and whether all that was answered with 200 arrived."""
    from benchmarks.sides.load import open_loop

    before = sum(entry["status"] == 200 and entry["path"] == "/predict" for entry in _logged(server))
    start = 0.0

    def end() -> None:
        nonlocal start
        start = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)

    timer = threading.Timer(2.0, end)
    timer.start()
    load = asyncio.run(open_loop(server.address, bodies, rate=rate, seconds=4.0))
    status = server.process.wait(60)
    seconds = time.perf_counter() - start
    answered = sum(entry["status"] == 200 and entry["path"] == "/predict" for entry in _logged(server)) - before
    statuses = {str(number): count for number, count in sorted(load.statuses.items())}
    return {"status": status, "seconds": seconds, "answered": load.statuses[200], "logged": answered} | {
        "statuses": statuses
    }


def _logged(server: _Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.requests.read_text().splitlines()]


def _listed(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count} of {status}" for status, count in sorted(statuses.items()))


if __name__ == "__main__":
    leave(main())
