"""`python -m benchmarks.serving`: what `python -m train.serve` does under load.

The load comes from this process, over the loopback: generator and server share the machine's cores.
"""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.command import add_rounds, parser_of, run_benchmark
from benchmarks.result import Content, one_result
from benchmarks.rounds import in_turn, say
from benchmarks.sides.load import closed_loop, open_loop
from benchmarks.task import DataTask
from benchmarks.worker import SideFailed
from convert.command_line import at_least_one, leave, weights_source
from train.data.bad_images import BadImages
from train.devices.process import keep_freed_memory
from train.inference.classify import classify
from train.inference.image_paths import FileSource
from train.inference.model import Classifier, load_classifier

_SHARES = (0.5, 0.8, 1.2, 2.0)  # of capacity
_START = 600.0  # seconds that a server has to become ready
_PHOTOGRAPHS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    epilog = "exit status: 0 done; 1 a server failed; 2 wrong flags"
    parser = parser_of("serving", "Put a server of a classifier under load, beside train.predict's loop.", epilog)
    parser.add_argument("--weights", type=weights_source, required=True, metavar="SOURCE", help="the weights to serve")
    parser.add_argument("--max-batch", type=at_least_one, default=8, metavar="N", help="as of train.serve; default: 8")
    parser.add_argument("--seconds", type=at_least_one, default=20, metavar="N", help="of each load; default: 20")
    soak = "requests, with a look at the server's memory after each tenth; default: 1000"
    parser.add_argument("--soak", type=at_least_one, default=1000, metavar="N", help=soak)
    add_rounds(parser, repeats=3)
    args = parser.parse_args(argv)
    return run_benchmark(parser, args, lambda: _measured(args))


def _measured(args: argparse.Namespace) -> Iterator[Content]:
    keep_freed_memory()  # as the commands of train do
    bodies = [sample["image"] for sample in DataTask(batch_size=_PHOTOGRAPHS).samples()]
    predicted = _predicted(load_classifier(args.weights), bodies, args.seconds / 2)
    with _serving(args.weights, args.max_batch) as server:
        rates = _compared(server, predicted, bodies, args)
        capacity = median(rates["server"])
        say(f"capacity {capacity:.1f} pictures/s")
        loads = [_loaded(server, bodies, share, capacity, args.seconds) for share in _SHARES]
        soak = _soaked(server, bodies, args)
    sides = {side: {"seconds": [1 / rate for rate in found]} for side, found in rates.items()}
    told = {"weights": Path(args.weights).name, "batch_size": args.max_batch, "images_per_call": 1}
    yield one_result("serving", told | {"loads": loads, "soak": soak}, sides)


@contextlib.contextmanager
def _serving(source: str, max_batch: int) -> Iterator[str]:
    """`python -m train.serve` in a process of its own: its address, once it takes requests. Raises SideFailed."""
    command = [sys.executable, "-m", "train.serve", "--weights", source, "--max-batch", str(max_batch), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "CROSSVIT_TOKEN"}
    with (
        tempfile.NamedTemporaryFile("w", prefix="crossvit-serving-") as log,
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log) as process,
    ):
        try:
            end = time.monotonic() + _START
            while ": ready\n" not in (text := Path(log.name).read_text()):
                if time.monotonic() > end or process.poll() is not None:
                    raise SideFailed(f"the server did not become ready: {text[-500:].strip()}")
                time.sleep(0.1)
            yield text.split("http://")[1].split()[0]
        finally:
            process.kill()


def _metrics(address: str) -> dict[str, float]:
    """Prometheus's text as numbers."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def _compared(
    server: str, predicted: Iterator[float], bodies: Sequence[bytes], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Pictures in a second of the server, of train.predict, and without batches; in turns, so that others slow all."""

    def rate(of: str, seconds: float = args.seconds / 2) -> float:
        return asyncio.run(closed_loop(of, bodies, clients=2 * args.max_batch, seconds=seconds)).rate

    with _serving(args.weights, 1) as single, contextlib.closing(predicted):
        rate(server, 2)  # warm
        ours = {"server": lambda: rate(server), "train.predict": lambda: next(predicted)}
        return in_turn(ours | {"one at a time": lambda: rate(single)}, args.repeats)


def _predicted(classifier: Classifier, bodies: Sequence[bytes], seconds: float) -> Iterator[float]:
    """Pictures in a second of train.predict's loop at its own batch size, anew each time that it is asked."""
    with tempfile.TemporaryDirectory(prefix="crossvit-serving-") as folder:
        for number, body in enumerate(bodies):
            Path(folder, f"{number}.jpg").write_bytes(body)
        source = FileSource(tuple(map(str, Path(folder).iterdir())) * 10**5)  # more than there is time for
        settings = {"batch_size": classifier.batch_size(None, None), "workers": 0, "top_k": 5}
        batches = classify(classifier, source, BadImages(source, say), **settings)
        with contextlib.closing(batches):
            next(batches)  # compiled
            while True:
                next(batches), next(batches)  # which had been read ahead
                start, done = time.perf_counter(), 0
                while time.perf_counter() < start + seconds:
                    done += len(next(batches))
                yield done / (time.perf_counter() - start)


def _loaded(server: str, bodies: Sequence[bytes], share: float, capacity: float, seconds: float) -> dict[str, Any]:
    """What becomes of a share of the capacity, and of the server's batches meanwhile."""
    before = _metrics(server)
    load = asyncio.run(open_loop(server, bodies, rate=share * capacity, seconds=seconds))
    change = {name: value - before.get(name, 0.0) for name, value in _metrics(server).items()}
    batches = max(1.0, change["crossvit_batch_pictures_count"])
    say(f"load of {share:.0%} done")
    return load.as_json() | {
        "share": share,
        "batch_pictures": change["crossvit_batch_pictures_sum"] / batches,
        "batch_s": change["crossvit_compute_seconds_sum"] / batches,
    }


def _soaked(server: str, bodies: Sequence[bytes], args: argparse.Namespace) -> dict[str, Any]:
    """The memory after each tenth of some requests, and how they were answered."""
    memory, statuses = [], Counter()
    for number in range(10):
        count = args.soak // 10 + (number < args.soak % 10)
        load = asyncio.run(closed_loop(server, bodies, clients=2 * args.max_batch, requests=count))
        statuses += load.statuses
        memory.append(_metrics(server).get("process_resident_memory_bytes"))
    say(f"{args.soak} requests done")
    return {"memory_bytes": memory, "statuses": {str(status): count for status, count in sorted(statuses.items())}}


if __name__ == "__main__":
    leave(main())
