"""The command `python -m benchmarks.scaling`: step time and communication on TPU slices, estimated without having one.

The training step is compiled for each slice by the TPU's own compiler, with as many images on every chip.

- *compute* is the compiler's estimate of the clock cycles of everything a chip computes, as if nothing overlapped, at
  the clock that Google's published peak implies.
- *communication* is what leaves a chip in a step if the collectives are done on rings (`train.cost.hlo`), at
  the published speed of the links along one axis of the slice. Latency is left out.
- *step* lies between the longer of the two, if all communication is hidden behind computing, and their sum, if none is.
- *efficiency* is the compute time of the first slice in the table ÷ the longest step.

No TPU is involved: these are estimates for comparing slices, not measurements.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.command import variant_name, writable_json
from benchmarks.result import Content, about, markdown_table, where, write_json
from convert.command_line import Parser, at_least_one, leave, run
from convert.errors import SettingsError
from convert.files import typed_path
from convert.streams import tell_error
from train.cost.figures import Figures, compile_step
from train.recipes import RECIPES


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
_TITLES = (
    *("slice", "devices", "batch", "memory per device", "compute, ms", "sent per device", "communication, ms"),
    *("step, ms", "images/s, at least", "efficiency"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done; 1 a step does not fit or the compiler gives no estimate; 2 wrong flags."""
    parser = Parser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--variant", type=variant_name, default="ti", metavar="NAME", help="default: ti")
    parser.add_argument("--batch-size", type=at_least_one, default=64, metavar="N", help="per chip; default: 64")
    parser.add_argument(
        "--topology", nargs="+", default=_SLICES, metavar="SLICE", help="default: v5e of 1 to 256 chips"
    )
    parser.add_argument("--json", type=typed_path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    writable_json(parser, args.json)
    return run(parser.prog, lambda: _run(args), failure=1)


def _run(args: argparse.Namespace) -> int:
    from train.cost.slices import prepare_environment, slice_devices

    prepare_environment()
    sizes = {topology: slice_devices(topology) for topology in args.topology}
    for topology, devices in sizes.items():
        if devices[0].device_kind not in CHIPS:
            raise SettingsError(f"--topology {topology}: no published figures of {devices[0].device_kind} here")
    results: list[dict[str, Any]] = []
    print("\n".join(markdown_table(_TITLES, [])), flush=True)
    for topology, devices in sizes.items():
        config = dataclasses.replace(
            RECIPES["imagenet"], variant=args.variant, batch_size=args.batch_size * len(devices)
        )
        figures = compile_step(config, 1000, topology)
        if figures.too_much or figures.cycles is None:
            problem = figures.too_much or "the compiler gives no estimate of its cycles"
            tell_error(f"python -m benchmarks.scaling: error: {topology}: {problem}")
            return 1
        results.append(estimate(figures))
        print(_table(results)[-1], flush=True)
        write_json(args.json, as_json(results))
    return 0


def estimate(figures: Figures) -> dict[str, Any]:
    """Everything known of the compiled program, in plain types, and what it comes to in seconds."""
    chip = CHIPS[figures.device_kind]
    return {
        "variant": figures.config.variant,
        "slice": figures.slice,
        "devices": figures.devices,
        "device_kind": figures.device_kind,
        "batch_size": figures.config.batch_size,
        "dtype": figures.config.precision,
        "cycles": figures.cycles,
        "flops": figures.flops,
        "bytes_needed": figures.needed,
        "traffic": {kind: dataclasses.asdict(traffic) for kind, traffic in figures.traffic.items()},
        "compute_s": figures.cycles / chip.clock,
        "communication_s": sum(traffic.sent for traffic in figures.traffic.values()) / chip.ring,
        "compiled_in_s": figures.seconds,
    }


def as_json(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The method, and what `estimate` gave of each slice; the machine is the one that compiled."""
    chips = {name: dataclasses.asdict(chip) for name, chip in CHIPS.items()}
    return about("scaling") | {"method": __doc__, "chips": chips, "results": list(results)}


def as_markdown(content: Content) -> str:
    """A line on what was compiled where, and a table with a row per slice."""
    results = content["results"]
    first = results[0]
    title = f"CrossViT {first['variant']}, {first['dtype']}, estimated from programs compiled on {where(content)}"
    return "\n".join([title, "", *_table(results)])


def _table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return markdown_table(_TITLES, [_cells(result, results[0]) for result in results])


def _cells(result: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    from train.devices.memory import format_bytes

    shortest = max(result["compute_s"], result["communication_s"])
    longest = result["compute_s"] + result["communication_s"]
    return [
        result["slice"],
        str(result["devices"]),
        str(result["batch_size"]),
        format_bytes(result["bytes_needed"]),
        f"{1000 * result['compute_s']:.1f}",
        format_bytes(sum(traffic["sent"] for traffic in result["traffic"].values())),
        f"{1000 * result['communication_s']:.2f}",
        f"{1000 * shortest:.1f}-{1000 * longest:.1f}",
        f"{result['batch_size'] / longest:,.0f}",
        f"{first['compute_s'] / longest:.0%}",
    ]


if __name__ == "__main__":
    leave(main())
