"""The least time that a GPU could take for the kernels of a program: arithmetic from published peaks, not measured."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from train.cost.gpus import Gpu
from train.cost.kernels import Kernel

_LARGE = 50_000_000  # bytes of a float32 array that should rather have stayed in a kernel
_HALF = ("bf16", "f16")

# for `_estimated_time`, of an H100: what experience says can be had
_BANDWIDTH_SHARE = 0.9
_ATTENTION_FLOPS = 400e12
_SHORTEST = 2e-6  # seconds of a kernel
_PLAUSIBLE = 5  # estimates so many times the roofline are wrong: XLA knows no better for Triton's kernels


@dataclass(frozen=True)
class Place:
    """All kernels of one kind that come from one function."""

    place: str
    kind: str
    kernels: int
    bytes: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class LargeArray:
    """A float32 array of more than 50 MB that a kernel writes into memory."""

    place: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class Roofline:
    """What the kernels of a program move and compute on one device, and the least time for it on a card."""

    kernels: int
    bytes: int
    flops: int
    seconds: float  # each kernel bound by either memory or arithmetic, at all of their peaks
    memory_share: float  # of these seconds, those of kernels that the memory bounds
    estimate: float | None  # seconds by XLA's own tables where it has them
    fused_attention: int  # calls
    large_float32: tuple[LargeArray, ...]
    places: tuple[Place, ...]  # the longest first


def roofline(kernels: Sequence[Kernel], gpu: Gpu) -> Roofline:
    """The kernels together."""
    seconds = [kernel.times * least_time(kernel, gpu) for kernel in kernels]
    by_memory = sum(time for kernel, time in zip(kernels, seconds, strict=True) if _memory_bounds(kernel, gpu))
    known = any(kernel.estimates for kernel in kernels)
    return Roofline(
        kernels=sum(kernel.times for kernel in kernels),
        bytes=sum(kernel.times * (kernel.read + kernel.written) for kernel in kernels),
        flops=sum(kernel.times * kernel.flops for kernel in kernels),
        seconds=sum(seconds),
        memory_share=by_memory / sum(seconds) if sum(seconds) else 0.0,
        estimate=sum(kernel.times * _estimated_time(kernel, gpu) for kernel in kernels) if known else None,
        fused_attention=sum(kernel.times for kernel in kernels if kernel.is_fused_attention),
        large_float32=tuple(
            LargeArray(kernel.place, kernel.kind, array.bytes)
            for kernel in kernels
            for array in kernel.results
            if array.dtype == "f32" and array.bytes > _LARGE
            for _ in range(kernel.times)
        ),
        places=_by_place(kernels, gpu),
    )


def least_time(kernel: Kernel, gpu: Gpu) -> float:
    """Seconds of a kernel at all of the card's bandwidth or of its FLOPs, whichever are more.

    Half precision at the peak of the tensor cores, everything else at that of float32 without them.
    """
    return max(_memory_time(kernel, gpu), _arithmetic_time(kernel, gpu))


def _memory_time(kernel: Kernel, gpu: Gpu) -> float:
    return (kernel.read + kernel.written) / gpu.bandwidth


def _arithmetic_time(kernel: Kernel, gpu: Gpu) -> float:
    return kernel.flops / (gpu.tensor_flops if kernel.dtype in _HALF else gpu.float32_flops)


def _memory_bounds(kernel: Kernel, gpu: Gpu) -> bool:
    return _memory_time(kernel, gpu) >= _arithmetic_time(kernel, gpu)


def _estimated_time(kernel: Kernel, gpu: Gpu) -> float:
    """Seconds that XLA expects where its estimates are usable, otherwise the roofline at what can be had.

    Usable are its tables of products ("sol"; of batches of them they are not), and what it says of fusions without
    products and of copies.
    """
    at_least = max(_memory_time(kernel, gpu) / _BANDWIDTH_SHARE, _arithmetic_time(kernel, gpu))
    expected = 0.0
    if "cublas" in kernel.kind and len(kernel.results[0].shape) <= 2:
        expected = kernel.estimates.get("sol", 0) * 1e-6
    elif kernel.is_fused_attention:
        expected = kernel.flops / _ATTENTION_FLOPS
    elif kernel.kind in ("kLoop", "kInput", "copy"):
        told = kernel.estimates.get("", 0) * 1e-6
        expected = told if told < _PLAUSIBLE * at_least else 0
    return max(at_least, expected, _SHORTEST)


def _by_place(kernels: Sequence[Kernel], gpu: Gpu) -> tuple[Place, ...]:
    groups: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.place, kernel.kind].append(kernel)
    places = [
        Place(
            *key,
            kernels=sum(kernel.times for kernel in group),
            bytes=sum(kernel.times * (kernel.read + kernel.written) for kernel in group),
            flops=sum(kernel.times * kernel.flops for kernel in group),
            seconds=sum(kernel.times * least_time(kernel, gpu) for kernel in group),
        )
        for key, group in groups.items()
    ]
    return tuple(sorted(places, key=lambda place: -place.seconds))
