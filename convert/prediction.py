"""What pictures show, by a model or by weights from any source."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from convert.errors import ConversionError
from convert.models import flax_model, load_weights
from convert.verify import run_flax
from crossvit_jax import CrossViT, preprocess_image

if TYPE_CHECKING:
    from PIL import Image

_TOGETHER = 32  # pictures that the model sees at a time


class Prediction(NamedTuple):
    """One class that a picture may show."""

    class_name: str  # the index as text where the model knows no names
    probability: float


def predict(
    model: "CrossViT | str | Path",
    pictures: "Sequence[str | Path | Image.Image | np.ndarray]",
    *,
    top_k: int = 5,
    class_names: Sequence[str] | None = None,
) -> list[list[Prediction]]:
    """The likeliest classes of each picture, the best first, in full float32 on the default device.

    `python -m train.predict` does the same for many files, on all devices.

    Args:
        model: one of `load_flax` or any other, whose mode stays as it is; or a source of weights.
        pictures: paths, images of Pillow, or uint8 RGB pixels (height, width, 3).
        top_k: classes for each, or all where there are fewer.
        class_names: in the order of the outputs; none: those that the weights know.

    Raises:
        ConversionError: the source cannot be read, the model has no head or is not for colour images, or there are
            not as many names as classes.
        UnreadableImage: a picture cannot be read.
    """
    exif = "keep"
    if not isinstance(model, CrossViT):
        weights = load_weights(model)
        class_names, exif = class_names or weights.class_names, weights.exif or exif
        model = flax_model(weights)
    config = model.config
    if config.task != "classification":
        raise ConversionError(f"predict is for classifiers, and this is a model for {config.task}")
    if config.num_classes == 0 or config.in_chans != 3:
        why = "no head" if config.num_classes == 0 else f"{config.in_chans} channels"
        raise ConversionError(f"the model has {why}: it does not classify colour images")
    names = class_names or getattr(model, "class_names", None) or [*map(str, range(config.num_classes))]
    if len(names) != config.num_classes:
        raise ConversionError(f"{len(names)} class names for {config.num_classes} classes")
    evaluated = nnx.clone(model)
    evaluated.eval()
    found: list[list[Prediction]] = []
    size = min(_TOGETHER, len(pictures))
    for start in range(0, len(pictures), _TOGETHER):
        batch = np.stack([preprocess_image(one, config, exif=exif) for one in pictures[start : start + size]])
        # always as many, so that one program is compiled
        padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])
        probabilities = np.asarray(jax.nn.softmax(run_flax(evaluated, padded)))[: len(batch)]
        found += [_best(row, names, top_k) for row in probabilities]
    return found


def _best(probabilities: np.ndarray, names: Sequence[str], top_k: int) -> list[Prediction]:
    order: Any = np.argsort(-probabilities, kind="stable")[:top_k]
    return [Prediction(names[index], float(probabilities[index])) for index in order]
