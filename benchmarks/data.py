"""The command `python -m benchmarks.data`: encoded photographs to training batches, ours against timm's transform.

A process of each side makes batches on one core, in turn with the others: `timm`; `host`, our workers where they
augment; `device-worker`, our workers where the device augments; and `device-augment`, what the device then does, which
runs beside the workers and is no rival of theirs. Nothing is timed before pixels made from the same draws are equal.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import add_rounds, parser_of, run_sides
from benchmarks.task import DataTask
from convert.command_line import at_least_one, leave
from convert.errors import require


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = parser_of("data", "Time encoded photographs to training batches: ours against timm's transform.")
    parser.add_argument("--photographs", type=at_least_one, default=48, metavar="N", help="in a batch; default: 48")
    add_rounds(parser, DataTask.SIDES)
    parser.set_defaults(device=None)  # the device's part runs on a GPU where there is one
    args = parser.parse_args(argv)

    def tasks(device: str, _: Path) -> list[DataTask]:
        require("the input pipelines", "numba", "simplejpeg", "sklearn", extra="train", verb="need")
        return [DataTask(batch_size=args.photographs, device=device)]

    return run_sides(parser, args, tasks)


if __name__ == "__main__":
    leave(main())
