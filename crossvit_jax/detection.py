"""Object detection: FCOS (arXiv 2006.09214) on the pyramid. Its losses are in `detection_loss`."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from crossvit_jax.boxes import Points, clip, decode, make_points, suppress
from crossvit_jax.config import DetectorConfig, get_dense_config
from crossvit_jax.layers import Conv, GroupNorm, OutputConv, ReLU, Sequential
from crossvit_jax.pyramid import DenseModel

_PRIOR = 0.01  # what a fresh head takes for the probability of every class
_INIT = {"kernel_init": nnx.initializers.normal(0.01), "bias_init": nnx.initializers.zeros}


def tower(width: int, num_convs: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs) -> Sequential:
    """Convolutions of 3 x 3 pixels with group norm and ReLU."""
    kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    layers = []
    for _ in range(num_convs):
        layers += [Conv(width, width, 3, padding=1, **_INIT, **kwargs), GroupNorm(32, width, **kwargs), ReLU()]
    return Sequential(layers)


class FCOSClassificationHead(nnx.Module):
    """The class of each point's box (torchvision `FCOSClassificationHead`)."""

    def __init__(
        self, width: int, num_classes: int, num_convs: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = tower(width, num_convs, **kwargs)
        prior = nnx.initializers.constant(-math.log((1 - _PRIOR) / _PRIOR))
        self.cls_logits = OutputConv(width, num_classes, 3, **_INIT | {"bias_init": prior}, **kwargs)

    def __call__(self, levels: list[Float[Array, "batch _ _ dim"]]) -> Float[Array, "batch points classes"]:
        return _joined([self.cls_logits(self.conv(x)) for x in levels])


class FCOSRegressionHead(nnx.Module):
    """Each point's box, and how near the point is to its middle (torchvision `FCOSRegressionHead`)."""

    def __init__(self, width: int, num_convs: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = tower(width, num_convs, **kwargs)
        self.bbox_reg = OutputConv(width, 4, 3, **_INIT, **kwargs)
        self.bbox_ctrness = OutputConv(width, 1, 3, **_INIT, **kwargs)

    def __call__(
        self, levels: list[Float[Array, "batch _ _ dim"]]
    ) -> tuple[Float[Array, "batch points 4"], Float[Array, "batch points 1"]]:
        levels = [self.conv(x) for x in levels]
        distances = _joined([jnp.maximum(self.bbox_reg(x), 0) for x in levels])
        return distances, _joined([self.bbox_ctrness(x) for x in levels])


def _joined(levels: list[Float[Array, "batch _ _ out"]]) -> Float[Array, "batch points out"]:
    """Level by level and row by row."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in levels], axis=1)


class FCOSHead(nnx.Module):
    """What is predicted at each point of the levels; parameters have the names of torchvision's `FCOSHead`."""

    def __init__(
        self, width: int, num_classes: int, num_convs: int, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.classification_head = FCOSClassificationHead(width, num_classes, num_convs, **kwargs)
        self.regression_head = FCOSRegressionHead(width, num_convs, **kwargs)

    def __call__(self, levels: list[Float[Array, "batch _ _ dim"]]) -> dict[str, Float[Array, "batch points _"]]:
        """See `CrossViTDetector`."""
        distances, centreness = self.regression_head(levels)
        return {
            "cls_logits": self.classification_head(levels),
            "bbox_regression": distances,
            "bbox_ctrness": centreness,
        }


class CrossViTDetector(DenseModel):
    """A detector: CrossViT, the pyramid, and FCOS's head. Arguments are those of `DenseModel`."""

    def __init__(self, config: DetectorConfig, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kwargs = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        self.head = FCOSHead(config.width, config.num_classes, config.num_convs, **kwargs)

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, rngs: nnx.Rngs | None = None
    ) -> dict[str, Float[Array, "batch points _"]]:
        """What is predicted at each point, level by level and row by row, in float32 or wider.

        `cls_logits` (batch, points, classes); `bbox_regression` (batch, points, 4), the distances to a box's left, top,
        right and lower side in strides; and `bbox_ctrness` (batch, points, 1), the logit of the centreness.

        Args:
            images: channels last, ImageNet-normalised, of the model's size.
            rngs: stream `dropout`, for training mode.

        Raises:
            ValueError: wrong shape or dtype of the images; or training mode without `rngs`.
        """
        return self.head(self._levels(images, rngs))

    def detect(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.6,
        max_detections: int = 100,
    ) -> dict[str, Array]:
        """The objects in images, best first, in arrays of fixed shapes; see `detections_of`. In evaluation mode.

        Args:
            images: as for the call.
        """
        thresholds = {"score_threshold": score_threshold, "iou_threshold": iou_threshold}
        outputs = self(images)
        points = make_points(self.config, outputs["cls_logits"].dtype)
        size = self.config.image_size
        return detections_of(outputs, points, size, **thresholds, max_detections=max_detections)


def detections_of(
    outputs: Mapping[str, Float[Array, "batch points _"]],
    points: Points,
    size: tuple[int, int],
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.6,
    max_detections: int = 100,
    candidates: int = 1000,
) -> dict[str, Array]:
    """What a detector's outputs say there is in images, as torchvision's `FCOS.postprocess_detections`.

    Args:
        points: the detector's, see `make_points`.
        size: of the images (height, width), at whose borders boxes end.
        score_threshold: scores are above it; a score is the square root of class probability · centreness.
        iou_threshold: of two boxes of a class whose intersection over union is above it, the better is kept.
        max_detections: the best are kept.
        candidates: from each level so many go into the suppression, the best.

    Returns:
        `boxes` (batch, detections, 4), x1 y1 x2 y2 in pixels, `scores` (batch, detections), `labels` (batch,
        detections), int32 from 0, and `valid` (batch, detections): where it is False there is nothing, and all is 0.
    """
    real = jnp.promote_types(outputs["cls_logits"].dtype, jnp.float32)
    logits, distances, centreness = (outputs[name].astype(real) for name in _OUTPUTS)
    scores = jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(centreness))
    scores = jnp.where(scores > score_threshold, scores, -jnp.inf)
    xy, stride = (jnp.asarray(x, real) for x in (points.xy, points.stride))

    def of_image(scores: Array, distances: Array) -> dict[str, Array]:
        classes, first, parts = scores.shape[-1], 0, []
        for count in points.counts:
            of_level = scores[first : first + count].reshape(-1)
            best, index = jax.lax.top_k(of_level, min(candidates, len(of_level)))
            parts.append((best, index // classes + first, index % classes))
            first += count
        best, point, label = (jnp.concatenate(part) for part in zip(*parts, strict=True))
        boxes = clip(decode(xy[point], stride[point], distances[point]), size)
        kept, valid = suppress(boxes, best, label, iou_threshold=iou_threshold, max_detections=max_detections)
        found = {"boxes": boxes[kept], "scores": best[kept], "labels": label[kept].astype(jnp.int32)}
        found = {name: jnp.where(jnp.expand_dims(valid, range(1, x.ndim)), x, 0) for name, x in found.items()}
        return found | {"valid": valid}

    return jax.vmap(of_image)(scores, distances)


_OUTPUTS = ("cls_logits", "bbox_regression", "bbox_ctrness")


def create_detector(
    name: str, *, dtype=None, param_dtype=jnp.float32, rngs: nnx.Rngs | None = None, **overrides
) -> CrossViTDetector:
    """A freshly initialised detector. `convert.load_flax(source, task="detection")` makes one of trained weights.

    Args:
        name: of the variant, by its short, timm or IBM name, see `list_variants`.
        dtype, param_dtype, rngs: see `DenseModel`.
        **overrides: `num_classes`, which is needed, and other settings, see `get_dense_config`.

    Raises:
        ValueError, TypeError: see `get_dense_config`; or `rngs` is missing.
    """
    config = get_dense_config("detection", name, **overrides)
    if rngs is None:
        raise TypeError("fresh weights are drawn from rngs=nnx.Rngs(seed), which is missing")
    return CrossViTDetector(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
