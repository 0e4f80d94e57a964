"""Whether an exported graph computes what its source does, on photographs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Num

from convert.errors import ConversionError
from crossvit_jax.config import CrossViTConfig
from crossvit_jax.preprocess import normalised, preprocess_image, resize

# batches of images or pictures (batch, height, width, channels) to outputs (batch, out)
Run = Callable[[Num[np.ndarray, "batch height width channels"]], Float[np.ndarray, "batch out"]]

# what a graph is given, and the images that its source sees in place of that
Batch = tuple[Num[np.ndarray, "batch rows columns channels"], Float32[np.ndarray, "batch height width channels"]]

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


def compare(exported: Run, source: Run, batches: Sequence[Batch], bound: float) -> Comparison:
    """Runs both on the same photographs, batch by batch.

    Raises:
        ConversionError: the outputs have other shapes than the source's.
    """
    got = np.concatenate([exported(given) for given, _ in batches])
    expected = np.concatenate([source(seen) for _, seen in batches])
    if got.shape != expected.shape:
        raise ConversionError(f"the exported graph returns {got.shape}, and its source {expected.shape}")
    with np.errstate(invalid="ignore"):
        difference = float(np.abs(got - expected).max() / np.abs(expected).max())
    agreement = float((got.argmax(axis=1) == expected.argmax(axis=1)).mean())
    return Comparison(difference, agreement, len(expected), bound)


def image_batches(config: CrossViTConfig) -> list[Batch]:
    """Photographs for a graph of normalised images, in batches of two sizes."""
    return [(part, part) for part in np.split(photographs(config, sum(_BATCHES)), np.cumsum(_BATCHES)[:-1])]


def picture_batches(config: CrossViTConfig) -> list[Batch]:
    """Photographs for a graph with preprocessing: pictures of several sizes, each with what evaluation makes of it.

    There are small ones that are enlarged, upright ones, and batches of 1, 2 and 13.
    """
    from sklearn.datasets import load_sample_images

    landscapes = np.stack(load_sample_images().images)
    rng = np.random.default_rng(0)
    corners = zip(rng.integers(427 - 90, size=13), rng.integers(640 - 71, size=13), strict=True)
    small = np.stack([landscapes[i % 2, top : top + 90, left : left + 71] for i, (top, left) in enumerate(corners)])
    upright = np.ascontiguousarray(landscapes[:1].swapaxes(1, 2))
    return [
        (pictures, np.stack([preprocess_image(one, config) for one in pictures]))
        for pictures in (upright, landscapes, small)
    ]


def photographs(config: CrossViTConfig, count: int) -> Float32[np.ndarray, "count height width channels"]:
    """Cut-outs of the two photographs that scikit-learn carries, normalised, at the model's size. Always the same.

    Noise would not do: on it, the logits of a trained model are smaller and closer together than on pictures.
    """
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
        pictures.append(resize(picture[top : top + rows, left : left + columns], (height, width)))
    # a model of other than three channels sees them in turn
    return normalised(np.stack(pictures))[..., np.arange(config.in_chans) % 3]
