"""What computes for the server: a classifier as jax has it, compiled for a few sizes of batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from crossvit_jax import CrossViTConfig
from train.images.transforms import EvalTransform
from train.inference.classify import probabilities
from train.inference.evaluation import forward
from train.inference.model import Classifier
from train.pictures.attention import class_token_attention

Images = Float32[np.ndarray, "pictures height width 3"]
Probabilities = Float32[np.ndarray, "pictures classes"]


class Explained(NamedTuple):
    """An image's probabilities (classes,), and `class_token_attention` of it."""

    probabilities: Float32[np.ndarray, " classes"]
    attention: dict[str, list[np.ndarray]]


class Engine(Protocol):
    """What the server needs of a model. Only one thread calls it."""

    config: CrossViTConfig
    class_names: Sequence[str]  # in the order of the outputs
    transform: EvalTransform  # from an encoded picture to an image of the model
    sizes: tuple[int, ...]  # of batches, the smallest first
    platform: str  # what computes, in a word
    headline: str  # what it is, in words
    explains: bool  # whether it can tell what it attends to

    def compile(self) -> None:
        """Makes every program that will be called."""

    def classify(self, images: Images) -> Probabilities:
        """Of as many images as the largest batch holds, or fewer."""

    def explain(self, images: Images) -> Explained:
        """Of one image (1, height, width, 3)."""


class JaxEngine:
    """A classifier on all devices of this machine.

    Args:
        largest: images in the largest batch.
        explains: whether attention can be asked for; not of quantised models, as what weights attend to once they are
            rounded is not to be had, nor of those that reduce their tokens.
    """

    platform = "jax"

    def __init__(self, classifier: Classifier, largest: int, *, explains: bool):
        self.headline = f"{classifier.task.headline()}, in {classifier.precision} on {classifier.device_summary}"
        self.config, self.class_names = classifier.config, classifier.task.class_names
        self.transform = classifier.task.transform(training=False)
        self.sizes = batch_sizes(largest, devices=classifier.mesh.size)
        self.explains = explains
        self._classifier = classifier
        self._programs: dict[tuple[Any, int], Any] = {}

    def compile(self) -> None:
        for size in self.sizes:
            self._compile(_classify, size)
        if self.explains:
            self._compile(_explain, self.sizes[0])

    def classify(self, images: Images) -> Probabilities:
        return self._run(_classify, images)[: len(images)]

    def explain(self, images: Images) -> Explained:
        values, attention = self._run(_explain, images)
        return Explained(values[0], jax.tree.map(lambda array: array[0], attention))

    def _compile(self, function: Any, size: int) -> None:
        shape = jax.ShapeDtypeStruct((size, *self.config.image_size, 3), jnp.float32)
        self._programs[function, size] = self._classifier.compile(function, {"image": shape})
        self._run(function, np.zeros(shape.shape, np.float32))  # what is done once is done before anybody waits

    def _run(self, function: Any, images: Images) -> Any:
        size = next(size for size in self.sizes if size >= len(images))
        missing = size - len(images)
        padded = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)]) if missing else images
        (outputs,) = forward(self._programs[function, size], iter([{"image": padded}]))
        return outputs


def batch_sizes(largest: int, *, devices: int = 1) -> tuple[int, ...]:
    """1, 2, 4, … and the largest, or the next multiples of the number of devices."""
    powers = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return tuple(sorted({-(-size // devices) * devices for size in (*powers, largest)}))


def _classify(model: Any, batch: Any) -> Any:
    return probabilities(model, batch["image"])


def _explain(model: Any, batch: Any) -> Any:
    return probabilities(model, batch["image"]), class_token_attention(model, batch["image"])
