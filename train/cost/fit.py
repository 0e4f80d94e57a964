"""The largest batch that a training step can have on a card, found without one."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from train.config import TrainConfig
from train.cost.figures import check_case, compile_step
from train.cost.gpus import find_gpu, gpu_devices

_ACCUM = 4  # parts of a batch, unless the settings have another number
_TRIED = (4, 8)  # multiples of `_UNIT` that tell how memory grows
_UNIT = 8  # images of a part on a device: batches are multiples of it
_CONFIRMED = 4  # programs at most that are compiled for a card, to get from the guess to what fits

# ways to save memory, and their flags in words
WAYS = {
    "none": "",
    "grad_checkpointing": "--grad-checkpointing",
    "grad_accum": "--grad-accum",
    "both": "--grad-checkpointing and --grad-accum",
}


@dataclass(frozen=True)
class Fit:
    """The largest batches of a model on a card, over all devices. 0: not even the smallest that was tried fits."""

    variant: str
    image_size: tuple[int, int]
    topology: str
    available: int  # bytes of a device
    grad_accum: int  # parts, where the batch is cut
    batches: dict[str, int]  # by the names in `WAYS`
    needed: dict[str, float]  # bytes of a device for these batches, of those that fit


def largest_batches(
    config: TrainConfig, num_classes: int, topologies: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> Iterator[Fit]:
    """For every topology of GPUs, one after the other.

    Memory grows evenly with the batch: two small ones tell how for all cards, and on each the largest is compiled to
    confirm it. On a card of another compute capability it may take a few bytes an image more or less, which the first
    program for that capability corrects. Batches are multiples of 8 images of a part on a device.

    Args:
        say: is told of each program what it needs.

    Raises SettingsError as `train.cost.figures.compile_step` does.
    """
    model_config = config.model_config(num_classes)
    parts = config.grad_accum if config.grad_accum > 1 else _ACCUM
    for topology in topologies:
        smallest = dataclasses.replace(config, batch_size=_UNIT * _devices(topology) * parts, grad_accum=parts)
        check_case(smallest, num_classes, topology)
    lines: dict[tuple, _Line] = {}  # by devices and way
    for topology in topologies:
        gpu, devices = find_gpu(topology), _devices(topology)
        batches, needed = {}, {}
        for way in WAYS:
            saving = dataclasses.replace(
                config,
                batch_size=_UNIT * devices * parts,
                grad_checkpointing=config.grad_checkpointing or way in ("grad_checkpointing", "both"),
                grad_accum=parts if way in ("grad_accum", "both") else 1,
            )
            unit = _UNIT * devices * saving.grad_accum
            name = f"{model_config.name} on {topology} {WAYS[way]}".rstrip()
            search = _Search(saving, num_classes, topology, unit, name, say)
            line = lines.get((devices, way)) or search.line()
            batches[way], needed[way], lines[devices, way] = search.largest(line, gpu.available)
        yield Fit(
            variant=model_config.name,
            image_size=model_config.image_size,
            topology=topology,
            available=gpu.available,
            grad_accum=parts,
            batches=batches,
            needed=needed,
        )


def _devices(topology: str) -> int:
    return len(gpu_devices(topology))


@dataclass(frozen=True)
class _Line:
    """How memory grows with the batch."""

    batch: int
    needed: float  # bytes of a device for that batch
    slope: float  # bytes of a device for an image of the batch

    def largest(self, available: float) -> float:
        """The batch that needs so many bytes."""
        return self.batch + (available - self.needed) / self.slope


@dataclass(frozen=True)
class _Search:
    config: TrainConfig
    num_classes: int
    topology: str
    unit: int  # batches are multiples of it
    name: str
    say: Callable[[str], None]

    def needs(self, batch: int) -> float:
        """Bytes of a device."""
        from train.devices.memory import format_bytes

        figures = compile_step(dataclasses.replace(self.config, batch_size=batch), self.num_classes, self.topology)
        self.say(f"{self.name}: a batch of {batch} needs {format_bytes(figures.needed)}")
        return figures.needed

    def line(self) -> _Line:
        """By two small batches."""
        small, large = (times * self.unit for times in _TRIED)
        least, most = self.needs(small), self.needs(large)
        return _Line(large, most, (most - least) / (large - small))

    def largest(self, line: _Line, available: int) -> tuple[int, float, _Line]:
        """The largest batch that fits into so many bytes, and what it needs, both 0 where none does; and the line
        through the last batch that was compiled."""
        tried: dict[int, float] = {}
        for _ in range(_CONFIRMED):
            batch = int(line.largest(available)) // self.unit * self.unit
            fails = [other for other, needed in tried.items() if needed > available]
            batch = min([batch, *(other - self.unit for other in fails)])
            if batch <= 0 or batch in tried:
                break
            tried[batch] = self.needs(batch)
            line = dataclasses.replace(line, batch=batch, needed=tried[batch])
        fits = max(((batch, needed) for batch, needed in tried.items() if needed <= available), default=(0, 0))
        return *fits, line
