"""Whether an exported model computes what its source does, on images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Num, Shaped

from convert.errors import ConversionError
from crossvit_jax.config import CrossViTConfig
from crossvit_jax.preprocess import normalised, preprocess_image, resize

# Of floating point, the largest difference of logits, relative to the largest logit; of integers, the root mean square
# difference, relative to the standard deviation of the source's logits.
BOUNDS = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.2, "int8": 0.12, "int4": 0.3}

# that making an ONNX file and comparing it takes, all of them of the extra `onnx`
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "torch", "sklearn")

Images = Float32[np.ndarray, "images height width channels"]

# logits or features (batch, out), of a segmenter (batch, classes, height, width); a detector's, by name
Outputs = Float[np.ndarray, "batch out *size"] | dict[str, Shaped[np.ndarray, "batch ..."]]

# from images or pictures (batch, height, width, channels)
Run = Callable[[Num[np.ndarray, "batch height width channels"]], Outputs]

_BATCH = 7  # the last batch has another size, at which a graph fails that fixed its batch dimension


@dataclass(frozen=True)
class Comparison:
    """How far the outputs of an exported model are from its source's; NaN where they are not finite."""

    largest: float  # difference, relative to the source's largest output
    spread: float  # root mean square difference, relative to the standard deviation of the source's outputs
    agreement: float  # share of the images, pixels or points with the same most probable class
    of: Literal["largest", "spread"]  # which of the two is bounded
    bound: float
    images: str = "the images"  # which ones
    source: str = "the source's"  # whose outputs these are
    outputs: str = "logits"  # what is compared
    agree: str = "top-1 agreement"  # what `agreement` is called

    @property
    def value(self) -> float:
        """What is bounded."""
        return getattr(self, self.of)

    @property
    def kind(self) -> str:
        """Of what that is a share."""
        return {"largest": "largest logit", "spread": "logits' spread"}[self.of]

    @property
    def passed(self) -> bool:
        return self.value <= self.bound  # not so for NaN either

    def __str__(self) -> str:
        told = {"largest": f"{self.largest:.1e} of the largest", "spread": f"{self.spread:.3f} of their spread"}
        bounded, (other,) = told.pop(self.of), told.values()
        return (
            f"on {self.images} its {self.outputs} differ from {self.source} by {bounded} (bound {self.bound:g})"
            f"{'' if self.passed else ': TOO MUCH'}, {other}; {self.agree} {self.agreement:.1%}"
        )


def compare(got: Outputs, expected: Outputs, numbers: str, **told: str) -> Comparison:
    """How far the outputs of an exported model are from its source's in float32.

    Of several outputs, the one counts that is farthest off; the first are those of the classes.

    Args:
        numbers: that the model computes with, a key of `BOUNDS`.
        **told: `images`, `source` and `outputs` of the comparison.

    Raises:
        ConversionError: the outputs have other shapes than the source's.
    """
    classes_axis = 1
    if isinstance(expected, dict):
        told, classes_axis = {"outputs": "outputs", "agree": "points of the same class"} | told, -1
    elif expected.ndim == 4:
        told = {"agree": "pixels of the same class"} | told
    pairs = _pairs(got, expected)
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = [(own - reference, reference) for own, reference in pairs]
        first, reference = (x.argmax(axis=classes_axis) for x in pairs[0])
        return Comparison(
            largest=float(_largest(np.abs(error).max() / np.abs(reference).max() for error, reference in errors)),
            spread=float(_largest(np.sqrt(np.mean(error**2)) / reference.std() for error, reference in errors)),
            agreement=float((first == reference).mean()),
            of="spread" if numbers.startswith("int") else "largest",
            bound=BOUNDS[numbers],
            **told,
        )


def outputs(run: Run, images: Images) -> Outputs:
    """Runs a model on images, in batches of two sizes."""
    parts = [run(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)


def _largest(values: Iterable[float]) -> float:
    return np.max(list(values))  # NaN if one is


def _pairs(got: Outputs, expected: Outputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each output beside its source's, whose order they have. Raises ConversionError if they have other shapes."""
    got, expected = (x if isinstance(x, dict) else {"": x} for x in (got, expected))
    shapes = [{name: array.shape for name, array in x.items()} for x in (got, expected)]
    if shapes[0] != shapes[1]:
        told = [", ".join(f"{name} {shape}".strip() for name, shape in x.items()) for x in shapes]
        raise ConversionError(f"the exported model returns {told[0]}, and its source {told[1]}")
    return [(got[name], array) for name, array in expected.items()]


def picture_batches(config: CrossViTConfig) -> Sequence[tuple[Num[np.ndarray, "batch rows columns 3"], Images]]:
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


def photographs(config: CrossViTConfig, count: int) -> Images:
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
