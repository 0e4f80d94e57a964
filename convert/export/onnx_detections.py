"""From what a detector says at each point to boxes, inside an ONNX file: as `detections_of`, by `NonMaxSuppression`.

`detections_of` takes one box after the other, for its shapes are fixed; ONNX has an operator whose result is a list of
any length. Here its result goes back to the places that the boxes came from, so that all shapes are known but the
batch's.
"""

import json
import warnings

import numpy as np
import onnx
import onnx.compose
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn
from torch.nn import functional

from convert.export.onnx_graph import OPSET
from crossvit_jax.config import DetectorConfig
from crossvit_torch.boxes import clip, decode, make_points

RAW = ("cls_logits", "bbox_regression", "bbox_ctrness")
FOUND = ("boxes", "scores", "labels", "valid")
THRESHOLDS = {"score_threshold": 0.05, "iou_threshold": 0.6, "max_detections": 100}  # as of `detect`
_CANDIDATES = 1000  # of each level, as of `detections_of`
_PREFIX = "detections/"  # of the names of all that is added

# Scores of boxes, (batch, points, classes), that suppression within each class leaves; 0 for all others. Only traced:
# the graph has `NonMaxSuppression` for it.
torch.library.define("crossvit_export::suppressed", "(Tensor boxes, Tensor scores) -> Tensor")
torch.library.register_fake("crossvit_export::suppressed", lambda boxes, scores: torch.empty_like(scores))


def with_detections(model: onnx.ModelProto, config: DetectorConfig) -> onnx.ModelProto:
    """The detector behind which the boxes are made of its outputs.

    Args:
        model: in float or int8; returns the three raw outputs of the detector.
        config: the detector's.

    Returns:
        A graph with the same input and metadata that returns `boxes` (batch, 100, 4), float32, x1 y1 x2 y2 in pixels of
        the image, `scores` (batch, 100), float32, `labels` (batch, 100), int32, and `valid` (batch, 100), bool: where
        it is False there is nothing, and all is 0. The metadata tell the thresholds.
    """
    after = onnx.compose.add_prefix(_graph(config), _PREFIX, rename_inputs=False, rename_outputs=False).graph
    joined = onnx.ModelProto()
    joined.CopyFrom(model)
    del joined.graph.output[:]
    joined.graph.node.extend(after.node)
    joined.graph.initializer.extend(after.initializer)
    joined.graph.output.extend(after.output)
    for key, value in THRESHOLDS.items():
        joined.metadata_props.add(key=key, value=json.dumps(value))
    return joined


class _Detections(nn.Module):
    """`detections_of` in a form that ONNX has operators for."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        points = make_points(config)
        self.register_buffer("xy", points.xy)
        self.register_buffer("stride", points.stride)
        self.counts, self.size = points.counts, config.image_size

    def forward(self, logits: Tensor, distances: Tensor, centreness: Tensor) -> tuple[Tensor, ...]:
        """`boxes`, `scores`, `labels` and `valid` of the raw outputs."""
        scores = torch.sqrt(logits.sigmoid() * centreness.sigmoid())
        scores = torch.where(scores > THRESHOLDS["score_threshold"], scores, 0)
        scores = torch.cat([_best_of(level) for level in scores.split(list(self.counts), dim=1)], dim=1)
        boxes = clip(decode(self.xy, self.stride, distances), self.size)
        # flat places are ordered by point, then by class: equal scores stay in the order of `detections_of`
        left = torch.ops.crossvit_export.suppressed(boxes, scores).flatten(1)
        most, classes = THRESHOLDS["max_detections"], scores.shape[2]
        best, place = left.topk(min(most, left.shape[1]))
        best, place = (functional.pad(x, (0, most - x.shape[1])) for x in (best, place))  # of few points
        valid = best > 0
        point = (place // classes)[..., None].expand(-1, -1, 4)
        found = torch.where(valid[..., None], boxes.gather(1, point), 0)
        return found, best, torch.where(valid, place % classes, 0).to(torch.int32), valid


def _best_of(level: Tensor) -> Tensor:
    """The scores of a level (batch, points, classes), all but those of its candidates 0."""
    scores = level.flatten(1)
    if scores.shape[1] <= _CANDIDATES:
        return level
    best, place = scores.topk(_CANDIDATES)
    return torch.zeros_like(scores).scatter(1, place, best).view_as(level)


def _graph(config: DetectorConfig) -> onnx.ModelProto:
    """The graph from raw outputs to detections."""
    points = sum(rows * columns for rows, columns in config.level_grids)
    with warnings.catch_warnings():
        # a name that is given three times is used once: so it should be
        warnings.filterwarnings("ignore", message="# The axis name")
        program = _program(config, points)
    return program.model_proto


def _program(config: DetectorConfig, points: int) -> torch.onnx.ONNXProgram:
    return torch.onnx.export(
        _Detections(config).eval(),
        tuple(torch.zeros(2, points, width) for width in (config.num_classes, 4, 1)),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(RAW),
        output_names=list(FOUND),
        dynamic_shapes=({0: torch.export.Dim("batch")},) * len(RAW),
        custom_translation_table={torch.ops.crossvit_export.suppressed.default: _suppressed},
        verbose=False,
    )


def _suppressed(boxes, scores):
    """See `crossvit_export::suppressed`. No class has more boxes than are kept of all classes."""

    def constant(value, dtype):
        return op.Constant(value=onnx.numpy_helper.from_array(np.array([value], dtype)))

    limits = (
        constant(THRESHOLDS["max_detections"], np.int64),
        constant(THRESHOLDS["iou_threshold"], np.float32),
        constant(0, np.float32),
    )
    selected = op.NonMaxSuppression(boxes, op.Transpose(scores, perm=[0, 2, 1]), *limits)  # rows: image, class, box
    place = op.Gather(selected, op.Constant(value=onnx.numpy_helper.from_array(np.array([0, 2, 1]))), axis=1)
    return op.ScatterND(op.Sub(scores, scores), place, op.GatherND(scores, place))
