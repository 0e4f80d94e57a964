"""What compiled programs cost, in words, as tables and as JSON; every line says that nothing was run."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.files import write_whole
from crossvit_jax.files import read_json
from train.cost.figures import Figures
from train.cost.fit import WAYS, Fit

_NOT_RUN = "nothing was run"
_PLACES = 8  # of a program's kernels that are told
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")

Columns = Mapping[str, Callable[[Any], str]]  # what a row says, by the titles of the cells


# --- a program in a few lines ---


def describe(figures: Figures, num_classes: int) -> str:
    """A few lines for the user."""
    config, what = figures.config, "forward pass" if figures.inference else "step"
    lines = [
        f"CrossViT {config.variant}, {'inference, ' * figures.inference}{num_classes} classes, {config.precision}, "
        f"batch {config.batch_size} on {figures.devices} x {figures.device_kind} ({figures.slice}), mesh {figures.mesh}"
    ]
    if figures.memory is not None:
        state = "parameters" if figures.inference else "parameters and optimiser"
        lines.append(figures.memory.describe(figures.available, state=state))
    by_xla = "" if figures.compiler_flops is None else f"; {_count(figures.compiler_flops)} by XLA's own count"
    lines.append(f"FLOPs per {what}: {_count(figures.flops)} in matrix products and convolutions{by_xla}")
    if figures.cycles is not None:
        without = f", without those of {figures.own_kernels} calls of our own kernels" * bool(figures.own_kernels)
        lines.append(f"clock cycles per {what} by the compiler's own estimate: {_count(figures.cycles)}{without}")
    if figures.estimate is not None:
        times = [("computing", figures.estimate.compute), ("communication", figures.estimate.communication)]
        parts = " and ".join(f"{1000 * seconds:.2f} ms of {part}" for part, seconds in times)
        lines.append(
            f"estimated time per {what}: {parts}, {_range(figures)} ms together: {_images_per_s(figures)} images/s"
        )
    if figures.roofline is not None:
        lines += _describe_kernels(figures)
    if figures.traffic is not None:
        lines.append(_describe_traffic(figures, what))
    lines.append(f"compiled in {figures.seconds:.0f} s")
    lines.append(f"does not fit: {figures.too_much}" if figures.too_much else "fits")
    return "\n".join(lines if figures.slice == "local" else [f"{line} [{_NOT_RUN}]" for line in lines])


def _describe_kernels(figures: Figures) -> list[str]:
    roofline = figures.roofline
    large = sum(array.bytes for array in roofline.large_float32)
    lines = [
        f"kernels on a device: {roofline.kernels}, moving {roofline.bytes / 1e9:.1f} GB; fused attention in "
        f"{roofline.fused_attention}; float32 arrays above 50 MB: {len(roofline.large_float32)}, {large / 1e9:.2f} GB",
        f"at 100 % of the roofline: {_milliseconds(roofline.seconds)}, {100 * roofline.memory_share:.0f} % of it bound "
        f"by memory",
    ]
    if roofline.estimate is not None:
        lines.append(f"by XLA's own tables: {_milliseconds(roofline.estimate)}")
    for place in roofline.places[:_PLACES]:
        lines.append(
            f"  {_milliseconds(place.seconds)}, {place.bytes / 1e9:.2f} GB: {place.kernels} x {place.kind} of "
            f"{place.place or 'no function of this project'}"
        )
    return lines


def _describe_traffic(figures: Figures, what: str) -> str:
    from train.devices.memory import format_bytes

    kinds = [f"{kind} {format_bytes(t.volume)} in {t.calls}" for kind, t in figures.traffic.items()]
    sent = format_bytes(sum(t.sent for t in figures.traffic.values()))
    told = f"{', '.join(kinds)}; {sent} sent on rings" if kinds else "none"
    early = figures.early_reductions
    started = f"; {early[0]} of {early[1]} reductions start before the backward pass ends" if early else ""
    return f"communication per {what} and device: {told}{started}"


# --- tables ---


def columns(*, on_gpus: bool = False, on_tpus: bool = False) -> Columns:
    """What the rows of a table of `Figures` say.

    Args:
        on_gpus: some are of GPUs that are not there.
        on_tpus: some are of slices of TPUs that are not there.
    """
    first = {
        "variant": lambda figures: figures.config.variant,
        "slice": lambda figures: figures.slice,
        "devices": lambda figures: f"{figures.devices} x {figures.device_kind}",
        "memory per device": lambda figures: _memory(figures.needed),
        "available": lambda figures: _memory(figures.available),
        f"FLOPs per {'call' if on_gpus else 'step'}": lambda figures: _count(figures.flops),
    }
    last = {
        "all-reduce": _traffic(lambda kind, traffic: traffic.volume * (kind == "all-reduce")),
        "other collectives": _traffic(lambda kind, traffic: traffic.volume * (kind != "all-reduce")),
        "sent": _traffic(lambda kind, traffic: traffic.sent),
        "early reductions": lambda figures: _of(figures.early_reductions, lambda early: f"{early[0]} of {early[1]}"),
        "compiled in": lambda figures: f"{figures.seconds:.0f} s, {_NOT_RUN}",
        "fits": lambda figures: "no" if figures.too_much else "yes",
    }
    if not on_gpus:
        del last["early reductions"]
    return first | (_KERNEL_COLUMNS if on_gpus else {}) | (_TIME_COLUMNS if on_tpus else {}) | last


def _of_roofline(told: Callable[[Any], str]) -> Callable[[Figures], str]:
    return lambda figures: _of(figures.roofline, told)


_KERNEL_COLUMNS: Columns = {
    "kernels": _of_roofline(lambda roofline: f"{roofline.kernels}"),
    "bytes moved": _of_roofline(lambda roofline: f"{roofline.bytes / 1e9:.1f} GB"),
    "roofline": _of_roofline(lambda roofline: _milliseconds(roofline.seconds)),
    "bound by": _of_roofline(
        lambda roofline: (
            f"memory, {100 * roofline.memory_share:.0f} %"
            if roofline.memory_share >= 0.5
            else f"arithmetic, {100 * (1 - roofline.memory_share):.0f} %"
        )
    ),
    "XLA's estimate": _of_roofline(lambda roofline: _of(roofline.estimate, _milliseconds)),
    "fused attention": _of_roofline(lambda roofline: f"{roofline.fused_attention}"),
    "float32 > 50 MB": _of_roofline(
        lambda roofline: (
            f"{len(roofline.large_float32)}, {sum(array.bytes for array in roofline.large_float32) / 1e9:.2f} GB"
        )
    ),
}

_TIME_COLUMNS: Columns = {
    "compute, ms": lambda figures: _of(figures.estimate, lambda estimate: f"{1000 * estimate.compute:.1f}"),
    "communication, ms": lambda figures: _of(figures.estimate, lambda estimate: f"{1000 * estimate.communication:.2f}"),
    "step, ms": lambda figures: _of(figures.estimate, lambda _: _range(figures)),
    "images/s": lambda figures: _of(figures.estimate, lambda _: _images_per_s(figures)),
}

FIT_COLUMNS: Columns = {
    "variant": lambda fit: fit.variant,
    "pixels": lambda fit: " x ".join(map(str, dict.fromkeys(fit.image_size))),
    "device": lambda fit: f"{fit.topology}, {_memory(fit.available)}",
    **{
        f"largest batch, {flags}" if flags else "largest batch": lambda fit, way=way: f"{fit.batches[way]}"
        for way, flags in WAYS.items()
    },
    "run": lambda _: f"compiled, {_NOT_RUN}",
}


def print_row(shown: Columns, of: Any, *, head: bool) -> None:
    """Prints the row of a Markdown table at once.

    Args:
        head: it is the first one: the titles go before it.
    """
    rows: list[Sequence[str]] = [[cell(of) for cell in shown.values()]]
    if head:
        rows = [[*shown], ["---"] * len(shown), *rows]
    print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n", flush=True)


def _range(figures: Figures) -> str:
    """Milliseconds between hiding all communication and hiding none."""
    return f"{1000 * figures.estimate.shortest:.1f}-{1000 * figures.estimate.longest:.1f}"


def _images_per_s(figures: Figures) -> str:
    """Those of the longest step."""
    rate = f"{figures.config.batch_size / figures.estimate.longest:,.0f}"
    return f"without our own kernels {rate}" if figures.own_kernels else f"at least {rate}"


def _of(value: Any, told: Callable[[Any], str]) -> str:
    return "-" if value is None else told(value)


def _traffic(number: Callable[[str, Any], float]) -> Callable[[Figures], str]:
    from train.devices.memory import format_bytes

    return lambda figures: _of(figures.traffic, lambda all: format_bytes(sum(number(*kind) for kind in all.items())))


def _memory(size: float | None) -> str:
    from train.devices.memory import format_bytes

    return "unknown" if size is None else format_bytes(size)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _count(number: float) -> str:
    """A large number in words: `38.3 T`."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


# --- JSON ---


def as_json(result: Figures | Fit) -> dict[str, Any]:
    """All that is known, in plain types."""
    return dataclasses.asdict(result) | {"run": _NOT_RUN}


def write_report(file: Path | None, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes a report whole, or not at all, if there is a file. Raises NotWritten if that is impossible."""
    if file is not None:
        versions = {name: version for name in _PACKAGES if (version := _version(name))}
        content = {"report": "train.compile", "run": _NOT_RUN, "versions": versions, "results": results}
        write_whole(file, f"{json.dumps(content, indent=2)}\n".encode())


def is_report(file: Path) -> bool:
    """Whether `write_report` wrote a file, or nobody did: it is empty."""
    try:
        content = read_json(file, empty={"report": "train.compile"})
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("report") == "train.compile"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
