"""Whether an exported graph computes what its source does, on photographs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from convert.errors import ConversionError
from crossvit_jax.config import CrossViTConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's: what every published CrossViT was trained with

# batches of images (batch, height, width, channels) to outputs (batch, out)
Run = Callable[[Float32[np.ndarray, "batch height width channels"]], Float[np.ndarray, "batch out"]]

_BATCHES = (1, 15)  # sizes: a graph that fixed its batch dimension fails at one of them


@dataclass(frozen=True)
class Comparison:
    """How far the outputs of an exported graph are from its source's."""

    difference: float  # the largest, relative to the source's largest output; NaN where outputs are not finite
    agreement: float  # share of the images with the same most probable class
    images: int
    bound: float  # of the difference

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound  # not so for NaN either

    def __str__(self) -> str:
        verdict = "" if self.passed else ": TOO MUCH"
        return (
            f"on {self.images} photographs its logits differ from the source's by {self.difference:.1e} of the "
            f"largest (bound {self.bound:.0e}){verdict}; top-1 agreement {self.agreement:.1%}"
        )


def compare(exported: Run, source: Run, config: CrossViTConfig, bound: float) -> Comparison:
    """Runs both on the same photographs, in batches of two sizes.

    Raises:
        ConversionError: the outputs have other shapes than the source's.
    """
    images = photographs(config, sum(_BATCHES))
    expected = source(images)
    got = np.concatenate([exported(batch) for batch in np.split(images, np.cumsum(_BATCHES)[:-1])])
    if got.shape != expected.shape:
        raise ConversionError(f"the exported graph returns {got.shape}, and its source {expected.shape}")
    with np.errstate(invalid="ignore"):
        difference = float(np.abs(got - expected).max() / np.abs(expected).max())
    agreement = float((got.argmax(axis=1) == expected.argmax(axis=1)).mean())
    return Comparison(difference, agreement, len(images), bound)


def photographs(config: CrossViTConfig, count: int) -> Float32[np.ndarray, "count height width channels"]:
    """Cut-outs of the two photographs that scikit-learn carries, normalised, at the model's size. Always the same.

    Noise would not do: on it, the logits of a trained model are smaller and closer together than on pictures.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    sources = load_sample_images().images
    height, width = config.image_size
    rng = np.random.default_rng(0)
    pictures = []
    for index in range(count):
        picture = sources[index % len(sources)]
        scale = rng.uniform(0.4, 1) * min(picture.shape[0] / height, picture.shape[1] / width)
        rows, columns = int(scale * height), int(scale * width)
        top, left = rng.integers(picture.shape[0] - rows + 1), rng.integers(picture.shape[1] - columns + 1)
        cut = Image.fromarray(picture[top : top + rows, left : left + columns])
        pictures.append(np.asarray(cut.resize((width, height), Image.Resampling.BICUBIC)))
    normalised = (np.stack(pictures) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    # a model of other than three channels sees them in turn
    return normalised[..., np.arange(config.in_chans) % 3]
