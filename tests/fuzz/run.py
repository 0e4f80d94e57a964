"""Tries seeded input of every kind: `python -m tests.fuzz.run [--inputs 5000] [--first-seed 0] [--kind picture]`.

Told are the inputs tried, what was read and what was refused, the most memory that one took, and each fault with its
kind and seed, by which it can be tried again. Exit status: 0 no fault, 1 some.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.kinds import KINDS, make_templates
from tests.fuzz.worker import Outcome, Worker

_SECONDS, _MEMORY = 30, 6144  # of one input; MiB of address space, of which the backend of jax takes some for itself
# how many of the inputs, by what one of them costs
_SHARES = dict.fromkeys(KINDS, 4) | {"picture": 6, "orbax": 1, "masks": 1}
_SHARES |= dict.fromkeys(("safetensors", "torch_file", "coco", "voc", "yolo"), 2)


def try_inputs(kind: str, seeds: range, folder: Path) -> tuple[list[Outcome], list[str]]:
    """What came of the inputs of a kind, and the faults. `folder` has the templates."""

    def one(seed: int) -> int:
        work = Path(tempfile.mkdtemp(dir=folder))
        try:
            return KINDS[kind](random.Random(f"{kind} {seed}"), folder, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    worker = Worker(one, seconds=_SECONDS, memory=_MEMORY)
    try:
        outcomes = [worker(seed) for seed in seeds]
    finally:
        worker.close()
    told = zip(seeds, outcomes, strict=True)
    return outcomes, [f"{kind} {seed}: {fault}" for seed, outcome in told if (fault := _fault(outcome))]


def _fault(outcome: Outcome) -> str | None:
    """What is wrong with an end: 0 for what was read, and 2 for what was refused, are right."""
    return outcome.fault or (None if outcome.status in (0, 2) else f"status {outcome.status}: {outcome.output}")


def prepare(folder: Path) -> None:
    """Makes the templates, in a process of its own."""
    worker = Worker(make_templates, seconds=300, memory=_MEMORY)
    try:
        made = worker(folder)
    finally:
        worker.close()
    assert made.status == 0, made.output


def shared_out(inputs: int) -> dict[str, int]:
    """How many of the inputs are of each kind."""
    return {kind: max(1, inputs * share // sum(_SHARES.values())) for kind, share in _SHARES.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="none: all of them")
    args = parser.parse_args()
    faults, count = [], 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for kind, inputs in ({args.kind: args.inputs} if args.kind else shared_out(args.inputs)).items():
            outcomes, found = try_inputs(kind, range(args.first_seed, args.first_seed + inputs), Path(folder))
            statuses = Counter(outcome.status for outcome in outcomes)
            most = max(outcome.memory for outcome in outcomes)
            told = f"{statuses[0]} read, {statuses[2]} refused, {len(found)} faults; {most} MiB"
            print(f"{kind:17} {inputs:5} inputs: {told}")
            sys.stdout.flush()
            faults += found
            count += inputs
    for fault in faults:
        print(fault)
    print(f"{count} inputs, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
