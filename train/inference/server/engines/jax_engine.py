"""A classifier, detector or segmenter as jax has it, compiled for a few sizes of batches."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.images.dense import WholeTransform
from train.inference.classify import probabilities
from train.inference.model import Classifier, Predictor, forward
from train.inference.server.engines.engine import Explained, Images, batch_sizes, rows_of
from train.pictures.attention import class_token_attention


class JaxEngine:
    """A model on all devices of this machine.

    Args:
        largest: images in the largest batch.
        explains: whether attention can be asked for, of a classifier; not of quantised ones, as what weights attend to
            once they are rounded is not to be had, nor of those that reduce their tokens.
    """

    platform = "jax"

    def __init__(self, predictor: Predictor, largest: int, *, explains: bool):
        task = predictor.task
        self.headline = f"{task.headline()}, in {predictor.precision} on {predictor.device_summary}"
        self.config, self.class_names = task.model_config, task.class_names
        self.sizes = batch_sizes(largest, devices=predictor.mesh.size)
        self.most_objects = getattr(task, "max_detections", 0)
        self._classifies = isinstance(predictor, Classifier)
        if self._classifies:
            self.transform = task.transform(training=False)
        else:
            self.transform = WholeTransform(self.config.image_size, task.config.exif)
        self.explains = explains and self._classifies
        self._predictor = predictor
        self._programs: dict[tuple[Any, int], Any] = {}

    def compile(self) -> None:
        for size in self.sizes:
            self._compile(self._found, size)
        if self.explains:
            self._compile(_explain, self.sizes[0])

    def compute(self, images: Images) -> Sequence[Any]:
        outputs = self._run(self._found, images)
        return outputs[: len(images)] if self._classifies else rows_of(outputs, len(images))

    def explain(self, images: Images) -> Explained:
        values, attention = self._run(_explain, images)
        return Explained(values[0], jax.tree.map(lambda array: array[0], attention))

    def _found(self, model: Any, batch: Any) -> Any:
        task, images = self._predictor.task, batch["image"]
        return probabilities(model, images) if self._classifies else task.found(model, images)

    def _compile(self, function: Any, size: int) -> None:
        shape = jax.ShapeDtypeStruct((size, *self.config.image_size, 3), jnp.uint8)
        self._programs[function, size] = self._predictor.compile(function, {"image": shape})
        self._run(function, np.zeros(shape.shape, np.uint8))  # what is done once is done before anybody waits

    def _run(self, function: Any, images: Images) -> Any:
        size = next(size for size in self.sizes if size >= len(images))
        missing = size - len(images)
        padded = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)]) if missing else images
        (outputs,) = forward(self._programs[function, size], iter([{"image": padded}]))
        return outputs


def _explain(model: Any, batch: Any) -> Any:
    return probabilities(model, batch["image"]), class_token_attention(model, batch["image"])
