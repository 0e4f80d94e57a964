"""Object detection: FCOS (arXiv 2006.09214) on the pyramid. Its losses are in `detection_loss`."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crossvit_jax.config import DetectorConfig, get_dense_config
from crossvit_torch.boxes import Points, clip, decode, make_points, suppress
from crossvit_torch.layers import Conv, GroupNorm, OutputConv, ReLU, Sequential, draw_normal
from crossvit_torch.pyramid import DenseModel

_PRIOR = 0.01  # what a fresh head takes for the probability of every class


def tower(width: int, num_convs: int, *, param_dtype: torch.dtype = torch.float32, device=None) -> Sequential:
    """Convolutions of 3 x 3 pixels with group norm and ReLU."""
    kwargs = {"dtype": param_dtype, "device": device}
    layers = []
    for _ in range(num_convs):
        layers += [_init(Conv(width, width, 3, padding=1, **kwargs)), GroupNorm(32, width, **kwargs), ReLU()]
    return Sequential(*layers)


def _init(conv: Conv, bias: float = 0.0) -> Conv:
    draw_normal(conv.weight, 0.01)
    nn.init.constant_(conv.bias, bias)
    return conv


class FCOSClassificationHead(nn.Module):
    """The class of each point's box (torchvision `FCOSClassificationHead`)."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_convs: int,
        *,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.conv = tower(width, num_convs, param_dtype=param_dtype, device=device)
        prior = -math.log((1 - _PRIOR) / _PRIOR)
        self.cls_logits = _init(OutputConv(width, num_classes, 3, **kwargs), prior)

    def forward(self, levels: list[Float[Tensor, "batch dim _ _"]]) -> Float[Tensor, "batch points classes"]:
        return _joined([self.cls_logits(self.conv(x)) for x in levels])


class FCOSRegressionHead(nn.Module):
    """Each point's box, and how near the point is to its middle (torchvision `FCOSRegressionHead`)."""

    def __init__(self, width: int, num_convs: int, *, param_dtype: torch.dtype = torch.float32, device=None):
        super().__init__()
        kwargs = {"dtype": param_dtype, "device": device}
        self.conv = tower(width, num_convs, param_dtype=param_dtype, device=device)
        self.bbox_reg = _init(OutputConv(width, 4, 3, **kwargs))
        self.bbox_ctrness = _init(OutputConv(width, 1, 3, **kwargs))

    def forward(
        self, levels: list[Float[Tensor, "batch dim _ _"]]
    ) -> tuple[Float[Tensor, "batch points 4"], Float[Tensor, "batch points 1"]]:
        levels = [self.conv(x) for x in levels]
        distances = _joined([self.bbox_reg(x).relu() for x in levels])
        return distances, _joined([self.bbox_ctrness(x) for x in levels])


def _joined(levels: list[Float[Tensor, "batch out _ _"]]) -> Float[Tensor, "batch points out"]:
    """Level by level and row by row."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)


class FCOSHead(nn.Module):
    """What is predicted at each point of the levels; parameters have the names of torchvision's `FCOSHead`."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_convs: int,
        *,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__()
        kwargs = {"param_dtype": param_dtype, "device": device}
        self.classification_head = FCOSClassificationHead(width, num_classes, num_convs, **kwargs)
        self.regression_head = FCOSRegressionHead(width, num_convs, **kwargs)

    def forward(self, levels: list[Float[Tensor, "batch dim _ _"]]) -> dict[str, Float[Tensor, "batch points _"]]:
        """See `CrossViTDetector`."""
        distances, centreness = self.regression_head(levels)
        return {
            "cls_logits": self.classification_head(levels),
            "bbox_regression": distances,
            "bbox_ctrness": centreness,
        }


class CrossViTDetector(DenseModel):
    """A detector: CrossViT, the pyramid, and FCOS's head. Arguments are those of `DenseModel`."""

    def __init__(
        self,
        config: DetectorConfig,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
        device=None,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, device=device)
        kwargs = {"param_dtype": param_dtype, "device": device}
        self.head = FCOSHead(config.width, config.num_classes, config.num_convs, **kwargs)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> dict[str, Float[Tensor, "batch points _"]]:
        """What is predicted at each point, level by level and row by row, in float32 or wider.

        `cls_logits` (batch, points, classes); `bbox_regression` (batch, points, 4), the distances to a box's left, top,
        right and lower side in strides; and `bbox_ctrness` (batch, points, 1), the logit of the centreness.

        Args:
            images: channels first, ImageNet-normalised, of the model's size.

        Raises:
            ValueError: wrong shape or dtype of the images.
        """
        with self._precision(images):
            return self.head(self._levels(images))

    def detect(
        self,
        images: Float[Tensor, "batch channels height width"],
        *,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.6,
        max_detections: int = 100,
    ) -> dict[str, Tensor]:
        """The objects in images, best first, in tensors of fixed shapes; see `detections_of`. In evaluation mode.

        Args:
            images: as for the call.
        """
        thresholds = {"score_threshold": score_threshold, "iou_threshold": iou_threshold}
        with torch.no_grad():
            outputs = self(images)
            points = make_points(self.config, outputs["cls_logits"].dtype, device=images.device)
            size = self.config.image_size
            return detections_of(outputs, points, size, **thresholds, max_detections=max_detections)


def detections_of(
    outputs: Mapping[str, Float[Tensor, "batch points _"]],
    points: Points,
    size: tuple[int, int],
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.6,
    max_detections: int = 100,
    candidates: int = 1000,
) -> dict[str, Tensor]:
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
    real = torch.promote_types(outputs["cls_logits"].dtype, torch.float32)
    logits, distances, centreness = (outputs[name].to(real) for name in _OUTPUTS)
    scores = torch.sqrt(logits.sigmoid() * centreness.sigmoid())
    scores = torch.where(scores > score_threshold, scores, -torch.inf)
    xy, stride = (x.to(real) for x in (points.xy, points.stride))

    def of_image(scores: Tensor, distances: Tensor) -> dict[str, Tensor]:
        classes, first, parts = scores.shape[-1], 0, []
        for count in points.counts:
            of_level = scores[first : first + count].reshape(-1)
            best, index = torch.sort(of_level, descending=True, stable=True)  # topk leaves the order of equals open
            best, index = best[:candidates], index[:candidates]
            parts.append((best, index // classes + first, index % classes))
            first += count
        best, point, label = (torch.cat(part) for part in zip(*parts, strict=True))
        boxes = clip(decode(xy[point], stride[point], distances[point]), size)
        kept, valid = suppress(boxes, best, label, iou_threshold=iou_threshold, max_detections=max_detections)
        found = {"boxes": boxes[kept], "scores": best[kept], "labels": label[kept].to(torch.int32)}
        return {name: x.masked_fill(~valid.view(-1, *[1] * (x.ndim - 1)), 0) for name, x in found.items()} | {
            "valid": valid
        }

    images = [of_image(*image) for image in zip(scores, distances, strict=True)]
    return {name: torch.stack([found[name] for found in images]) for name in images[0]}


_OUTPUTS = ("cls_logits", "bbox_regression", "bbox_ctrness")


def create_detector(
    name: str, *, dtype: torch.dtype | None = None, param_dtype: torch.dtype = torch.float32, device=None, **overrides
) -> CrossViTDetector:
    """A freshly initialised detector. `convert.load_torch(source, task="detection")` makes one of trained weights.

    Args:
        name: of the variant, by its short, timm or IBM name, see `list_variants`.
        dtype, param_dtype, device: see `DenseModel`.
        **overrides: `num_classes`, which is needed, and other settings, see `get_dense_config`.

    Raises:
        ValueError, TypeError: see `get_dense_config`.
    """
    config = get_dense_config("detection", name, **overrides)
    return CrossViTDetector(config, dtype=dtype, param_dtype=param_dtype, device=device)
