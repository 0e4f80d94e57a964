"""The command `python -m benchmarks.scaling`: step time and communication on TPU slices, estimated without having one.

The training step is compiled for each slice by the TPU's own compiler, with as many images on every chip.

- *compute* is the compiler's estimate of the clock cycles of everything a chip computes, as if nothing overlapped, at
  the clock that Google's published peak implies.
- *communication* is what leaves a chip in a step if the collectives are done on rings (`train.communication`), at the
  published speed of the links along one axis of the slice. Latency is left out.
- *step* lies between the longer of the two, if all communication is hidden behind computing, and their sum, if none is.
- *efficiency* is the compute time of the first slice in the table ÷ the longest step.

No TPU is involved: these are estimates for comparing slices, not measurements.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import variant_name, writable_json
from benchmarks.report import machine, write_json
from convert.command_line import Parser, at_least_one
from train.compile import Figures, compile_step
from train.config import RECIPES, SettingsError


@dataclass(frozen=True)
class Chip:
    """What Google publishes of a chip (Cloud TPU documentation, "TPU versions"), per second."""

    peak: float  # FLOPs in bfloat16
    flops_per_cycle: int  # of all matrix units: 128 x 128 multiply-adds each
    links: float  # bytes, of all inter-chip links together
    axes: int  # of the torus that the links make

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak / self.flops_per_cycle

    @property
    def ring(self) -> float:
        """Bytes per second that a chip sends on a ring along one axis, both ways together."""
        return self.links / self.axes


CHIPS = {
    "TPU v4": Chip(275e12, 8 * 2 * 128**2, 300e9, 3),
    "TPU v5 lite": Chip(197e12, 4 * 2 * 128**2, 200e9, 2),
    "TPU v5": Chip(459e12, 8 * 2 * 128**2, 600e9, 3),
}
_SLICES = ["v5e:1x1", "v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"]
_HEAD = """\
| slice | devices | batch | memory per device | compute, ms | sent per device | communication, ms | step, ms | \
images/s, at least | efficiency |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step on a slice."""

    figures: Figures
    compute: float
    communication: float

    @property
    def longest(self) -> float:
        """If no communication is hidden behind computing."""
        return self.compute + self.communication

    @property
    def shortest(self) -> float:
        """If all of it is."""
        return max(self.compute, self.communication)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done; 1 a step does not fit or the compiler gives no estimate; 2 wrong flags."""
    parser = Parser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--variant", type=variant_name, default="ti", metavar="NAME", help="default: ti")
    parser.add_argument("--batch-size", type=at_least_one, default=64, metavar="N", help="per chip; default: 64")
    parser.add_argument(
        "--topology", nargs="+", default=_SLICES, metavar="SLICE", help="default: v5e of 1 to 256 chips"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    writable_json(parser, args.json)
    try:
        return _run(args)
    except SettingsError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    from train.slices import prepare_environment, slice_devices

    prepare_environment()
    sizes = {topology: slice_devices(topology) for topology in args.topology}
    for topology, devices in sizes.items():
        if devices[0].device_kind not in CHIPS:
            raise SettingsError(f"--topology {topology}: no published figures of {devices[0].device_kind} here")
    estimates: list[Estimate] = []
    print(_HEAD, flush=True)
    for topology, devices in sizes.items():
        config = dataclasses.replace(
            RECIPES["imagenet"], variant=args.variant, batch_size=args.batch_size * len(devices)
        )
        figures = compile_step(config, 1000, topology)
        if figures.too_much or figures.cycles is None:
            problem = figures.too_much or "the compiler gives no estimate of its cycles"
            print(f"python -m benchmarks.scaling: error: {topology}: {problem}", file=sys.stderr)
            return 1
        estimates.append(estimate(figures))
        print(table_row(estimates[-1], estimates[0]), flush=True)
        if args.json:
            write_json(args.json, as_json(estimates))
    return 0


def estimate(figures: Figures) -> Estimate:
    """What the compiled program's figures come to in seconds."""
    chip = CHIPS[figures.device_kind]
    sent = sum(traffic.sent for traffic in figures.traffic.values())
    return Estimate(figures, figures.cycles / chip.clock, sent / chip.ring)


def table_row(estimate: Estimate, first: Estimate) -> str:
    """A row under the table's head."""
    from train.memory import amount

    figures = estimate.figures
    cells = [
        figures.slice,
        str(figures.devices),
        str(figures.config.batch_size),
        amount(figures.needed),
        f"{1000 * estimate.compute:.1f}",
        amount(sum(traffic.sent for traffic in figures.traffic.values())),
        f"{1000 * estimate.communication:.2f}",
        f"{1000 * estimate.shortest:.1f}-{1000 * estimate.longest:.1f}",
        f"{figures.config.batch_size / estimate.longest:,.0f}",
        f"{first.compute / estimate.longest:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def as_json(estimates: Sequence[Estimate]) -> dict:
    """Everything known, in plain types."""
    return {
        "benchmark": "scaling",
        "machine": machine(),  # where it was compiled
        "method": __doc__,
        "chips": {name: dataclasses.asdict(chip) for name, chip in CHIPS.items()},
        "results": [
            {
                "variant": estimate.figures.config.variant,
                "slice": estimate.figures.slice,
                "devices": estimate.figures.devices,
                "device_kind": estimate.figures.device_kind,
                "batch_size": estimate.figures.config.batch_size,
                "dtype": estimate.figures.config.precision,
                "cycles": estimate.figures.cycles,
                "flops": estimate.figures.flops,
                "bytes_needed": estimate.figures.needed,
                "traffic": {kind: dataclasses.asdict(traffic) for kind, traffic in estimate.figures.traffic.items()},
                "compute_s": estimate.compute,
                "communication_s": estimate.communication,
                "compiled_in_s": estimate.figures.seconds,
            }
            for estimate in estimates
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
