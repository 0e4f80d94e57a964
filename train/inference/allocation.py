"""Which patch sizes a classifier is compared at; `auto`: one that the device can afford, or one for each picture."""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from convert.errors import SettingsError
from crossvit_jax import CrossViTConfig
from train.data.entropies import grey_entropy
from train.inference.model import BATCHES_BEHIND, Classifier
from train.tasks.task import Batch

Load = Callable[[tuple[int, ...] | None], Classifier]  # at a patch size; none: the stored one
# those of about the published ratio of both grids, 20 to 14, at 240 and 224 pixels
_PAIRS = ((24, 32), (20, 28), (12, 16), (10, 14), (8, 14))
_CALLS = 5  # that are timed, after one that is not


def compared_patch_sizes(
    config: CrossViTConfig, trained: tuple[tuple[int, ...], ...] | None = None
) -> list[tuple[int, ...]]:
    """A model's own patch size and those that it was trained with, as far as they divide the branches' images.

    Where no others were trained: twice and half its own, and for two branches the usual pairs. Those with the fewest
    patches come first.
    """
    stored = config.patch_size
    wanted = {stored, *(trained or ())}
    if trained is None:
        wanted |= {tuple(2 * size for size in stored), *(_PAIRS if len(stored) == 2 else ())}
        if not any(size % 2 for size in stored):
            wanted.add(tuple(size // 2 for size in stored))
    fitting = []
    for sizes in wanted:
        try:
            fitting.append(config.at_patch_size(sizes))
        except ValueError:  # three convolutions fit no other size
            continue
    patches = {c.patch_size: sum(rows * columns for rows, columns in c.grid_size) for c in fitting}
    return sorted(patches, key=lambda sizes: (patches[sizes], sizes))


def affordable(load: Load, batch_size: Callable[[Classifier], int], budget_ms: float) -> tuple[Classifier, list[str]]:
    """The classifier at the patch size with the most patches of which a picture takes no longer than the budget.

    Sizes are those trained with; or where weights do not tell, the usual ones, but none with more patches than stored.
    Each is timed on this device, from the most patches on, until one is fast enough.

    Returns:
        It, and what was measured, in a line.

    Raises SettingsError if none is fast enough, or the model has one patch size only.
    """
    stored = load(None)
    sizes = _sizes(stored)
    if stored.patch_sizes is None:
        sizes = sizes[: sizes.index(stored.config.patch_size) + 1]
    told = []
    for size in reversed(sizes):
        classifier = _at(size, stored, load)
        took = milliseconds(classifier, batch_size(classifier))
        told.append(f"{_name(size)} takes {took:.3g} ms a picture")
        if took <= budget_ms:
            untrained = stored.patch_sizes is None and size != stored.config.patch_size
            loses = "; the weights were not trained with it, and lose accuracy" * untrained
            return classifier, [f"patch size {', '.join(told)}, of {budget_ms:g}: taken{loses}"]
    raise SettingsError(f"--budget-ms {budget_ms:g}: no patch size is fast enough: {', '.join(told)}")


def milliseconds(classifier: Classifier, batch_size: int) -> float:
    """A picture's share of the time that the model takes for a batch: the median of some calls."""
    shapes = {"image": classifier.task.batch_shapes(batch_size, training=False)["image"]}
    program = classifier.compile(lambda model, batch: model(batch["image"]), shapes)
    batch = {"image": np.zeros(shapes["image"].shape, shapes["image"].dtype)}
    jax.block_until_ready(program(batch))
    times = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        jax.block_until_ready(program(batch))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / batch_size


def allocating(load: Load) -> "Allocating":
    """A classifier that takes larger patches for pictures with less in them, by the thresholds of its training.

    Raises SettingsError if the weights do not tell them.
    """
    stored = load(None)
    sizes = _sizes(stored)
    if stored.entropies is None:
        raise SettingsError(
            "--patch-size auto needs --budget-ms, or weights that tell the entropies of the pictures that they were "
            "trained on: train.main --patch-sizes leaves them"
        )
    if len(sizes) != len(stored.entropies) + 1:
        trained = " and ".join(map(_name, stored.patch_sizes))
        raise SettingsError(f"--patch-size auto: at this image size not all patch sizes of training divide: {trained}")
    members = tuple(_at(size, stored, load) for size in sizes)
    known = {name: getattr(stored, name) for name in stored.__dataclass_fields__}
    return Allocating(**known, members=members)


def _sizes(classifier: Classifier) -> list[tuple[int, ...]]:
    if classifier.config.multi_conv:
        raise SettingsError("--patch-size auto: the model has one patch size, three convolutions embed the patches")
    return compared_patch_sizes(classifier.config, classifier.patch_sizes)


def _at(size: tuple[int, ...], stored: Classifier, load: Load) -> Classifier:
    return stored if size == stored.config.patch_size else load(size)


def _name(size: Sequence[int]) -> str:
    return ",".join(map(str, size))


@dataclass(frozen=True)
class Allocating(Classifier):
    """Each picture is computed by the member whose share of entropies it falls into; a batch waits until it is full."""

    members: tuple[Classifier, ...] = ()  # at one patch size each, the fewest patches first
    taken: Counter[int] = field(default_factory=Counter)  # pictures of each member

    def run(
        self, function: Callable[[nnx.Module, Batch], Any], shapes: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Callable[[Iterator[Batch]], Iterator[Any]]:
        """See `Predictor.run`. Outputs are those of `function` for each batch in turn; of `sums`, which are over
        pictures, what has come together since."""
        programs = [member.compile(function, shapes) for member in self.members]
        return lambda batches: _Router(self, programs, shapes).outputs(batches)

    def places(self, images: np.ndarray) -> np.ndarray:
        """The member of each picture, uint8 (pictures, height, width, 3)."""
        return np.searchsorted(self.entropies, grey_entropy(images), side="right")


class _Router:
    """Pictures that wait for their batch to be full, and outputs that wait for those before them."""

    def __init__(self, model: Allocating, programs: Sequence[Callable], shapes: Mapping[str, jax.ShapeDtypeStruct]):
        self._model, self._programs, self._shapes = model, programs, shapes
        self._waiting: list[list[tuple[int, Batch]]] = [[] for _ in programs]  # the picture's number and its arrays
        self._running: deque[tuple[list[int], Any]] = deque()
        self._rows: dict[int, Any] = {}  # of pictures by number, until all of their batch are there
        self._sums: Any = None

    def outputs(self, batches: Iterator[Batch]) -> Iterator[Any]:
        size = self._shapes["mask"].shape[0]
        first = end = 0  # pictures that are told, and that have come
        for batch in batches:
            batch = jax.device_get(dict(batch))
            for offset, place in enumerate(self._model.places(batch["image"])):
                # copies: a view would keep its whole batch while it waits
                self._waiting[place].append((end + offset, {name: x[offset].copy() for name, x in batch.items()}))
                if batch["mask"][offset]:
                    self._model.taken[int(place)] += 1
                if len(self._waiting[place]) == size:
                    self._start(place)
            end += size
            while first < end and all(number in self._rows for number in range(first, first + size)):
                yield self._told(first, size)
                first += size
        for place in range(len(self._programs)):
            self._start(place)
        self._fetch(0)
        for number in range(first, end, size):
            yield self._told(number, size)

    def _start(self, place: int) -> None:
        waiting, self._waiting[place] = self._waiting[place], []
        if not waiting:
            return
        batch = {name: np.zeros(shape.shape, shape.dtype) for name, shape in self._shapes.items()}  # the mask's 0 too
        for row, (_, picture) in enumerate(waiting):
            for name in batch:
                batch[name][row] = picture[name]
        self._running.append(([number for number, _ in waiting], self._programs[place](batch)))
        self._fetch(BATCHES_BEHIND)

    def _fetch(self, behind: int) -> None:
        while len(self._running) > behind:
            numbers, outputs = self._running.popleft()
            outputs = dict(jax.device_get(outputs))
            if (sums := outputs.pop("sums", None)) is not None:
                self._sums = sums if self._sums is None else jax.tree.map(np.add, self._sums, sums)
            for row, number in enumerate(numbers):
                self._rows[number] = {name: x[row] for name, x in outputs.items()}

    def _told(self, first: int, size: int) -> dict[str, Any]:
        rows = [self._rows.pop(number) for number in range(first, first + size)]
        outputs = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if self._sums is not None:
            outputs["sums"], self._sums = self._sums, jax.tree.map(np.zeros_like, self._sums)
        return outputs
