"""Preprocessing inside an ONNX file: decoded pictures of any size go in, and the graph does what evaluation does.

Evaluation resizes with Pillow's bicubic filter: sums of products of whole numbers, rounded to 8 bits after the width
and again after the height. ONNX Runtime's own antialiased `Resize` on uint8 comes near, with up to 0.02 % of the values
one level off, and other runtimes have other ways. Here either pass is a product with a matrix that the graph makes of
the picture's size, in float64, where all those sums are exact: whatever runs it gets Pillow's pixels. (But for pictures
more than 100 times as high as wide: there Pillow takes the passes in the other order.)

The decorated functions are translated to ONNX, not run: `*` and the like are operators of the graph.
"""

import math

import numpy as np
import onnx
import onnx.compose
from onnxscript import FLOAT, UINT8, optimizer, script
from onnxscript import opset20 as op

from convert.errors import ConversionError
from crossvit_jax.config import CrossViTConfig
from crossvit_jax.preprocess import MEAN, STD

_PREFIX = "preprocess/"  # of the names of all that is added
_FLOAT, _INT64, _DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.DOUBLE


def check_pictures(config: CrossViTConfig) -> None:
    """Raises ConversionError where the model takes no RGB images."""
    if config.in_chans != 3:
        raise ConversionError(f"--preprocess is for RGB pictures, and the model takes {config.in_chans} channels")


def with_preprocessing(model: onnx.ModelProto, config: CrossViTConfig) -> onnx.ModelProto:
    """The model behind the resize, the centre crop and the normalisation of evaluation.

    Args:
        model: in float or int8; takes normalised float32 images (batch, 3, height, width) of the model's size.
        config: the model's, for its image size and `crop_pct`.

    Returns:
        A graph with the same outputs and metadata but for `input`. It takes `pictures` (batch, height, width, 3), uint8
        RGB, of any size: all pictures of one call have the same.

    Raises:
        ConversionError: see `check_pictures`.
    """
    (images,) = model.graph.input
    before = preprocessing(config, output=images.name).graph
    joined = onnx.ModelProto()
    joined.CopyFrom(model)
    del joined.graph.node[:], joined.graph.input[:]
    joined.graph.node.extend([*before.node, *model.graph.node])
    joined.graph.input.extend(before.input)
    joined.graph.initializer.extend(before.initializer)
    about = {entry.key: entry.value for entry in model.metadata_props}
    about["input"] = "uint8 RGB pictures (batch, height, width, 3), in each call of one size, which may be any"
    onnx.helper.set_model_props(joined, about)
    return joined


def preprocessing(config: CrossViTConfig, *, output: str) -> onnx.ModelProto:
    """The preprocessing alone: from `pictures`, see `with_preprocessing`, to images (batch, 3, height, width), float32
    and normalised, under the name of `output`. Raises ConversionError, see `check_pictures`."""
    check_pictures(config)
    model = optimizer.optimize(_preprocessing(config))  # functions become nodes, and constants are cast
    model = onnx.compose.add_prefix(model, _PREFIX, rename_inputs=False)
    model.graph.node[-1].output[0] = model.graph.output[0].name = output
    return model


@script(default_opset=op)
def _cubic(x):
    """The filter at a distance: a = -0.5, in Pillow's order of operations."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return op.Where(x < 1.0, near, op.Where(x < 2.0, far, x * 0.0))


@script(default_opset=op)
def _axis(size, resized, kept):
    """Pillow's weights for the `kept` places in the middle of an axis that is resized, in units of 2^-22.

    Returns the first pixel that counts for them (1,), the one after the last (1,), and the matrix (kept, pixels).
    """
    scale = op.Cast(size, to=_DOUBLE) / op.Cast(resized, to=_DOUBLE)
    stretch = op.Max(scale, op.CastLike(1.0, scale))
    reach = 2.0 * stretch
    before = op.Round(op.Cast(resized - kept, to=_DOUBLE) / 2.0)
    centres = (op.Cast(op.Range(0, kept, 1), to=_DOUBLE) + before + 0.5) * scale
    first = op.Max(op.Cast(centres[0] - reach + 0.5, to=_INT64), op.CastLike(0, size))
    after = op.Min(op.Cast(centres[-1] + reach + 0.5, to=_INT64), size)
    pixels = op.Cast(op.Range(first, after, 1), to=_DOUBLE)
    exact = _cubic(op.Abs((pixels - op.Unsqueeze(centres, [1]) + 0.5) * (1.0 / stretch)))
    weights = exact / op.ReduceSum(exact, [1], keepdims=1) * 4194304.0
    return op.Reshape(first, [1]), op.Reshape(after, [1]), op.Sign(weights) * op.Floor(op.Abs(weights) + 0.5)


@script(default_opset=op)
def _levels(sums):
    """Sums in units of 2^-22, rounded to whole levels from 0 to 255."""
    levels = op.Floor((sums + 2097152.0) / 4194304.0)
    return op.Clip(levels, op.CastLike(0.0, levels), op.CastLike(255.0, levels))


@script(default_opset=op)
def _square(height, width, goal_height, goal_width):
    """The size that is resized to before a square is cut out: torchvision's `Resize` to the shorter side."""
    shorter = op.Min(height, width)
    return height * goal_height / shorter, width * goal_width / shorter


@script(default_opset=op)
def _rectangle(height, width, goal_height, goal_width):
    """The size that is resized to before any other rectangle is cut out: timm's `ResizeKeepRatio`."""
    rows, columns = op.Cast(height, to=_DOUBLE), op.Cast(width, to=_DOUBLE)
    ratio = op.Min(rows / op.Cast(goal_height, to=_DOUBLE), columns / op.Cast(goal_width, to=_DOUBLE))
    return op.Cast(op.Round(rows / ratio), to=_INT64), op.Cast(op.Round(columns / ratio), to=_INT64)


def _preprocessing(config: CrossViTConfig) -> onnx.ModelProto:
    """The graph from pictures to normalised images (batch, 3, height, width)."""
    image_height, image_width = config.image_size
    goal_height, goal_width = (math.floor(side / config.crop_pct) for side in config.image_size)
    resized = _square if goal_height == goal_width else _rectangle
    mean, std = (onnx.numpy_helper.from_array(np.float32(values)[:, None, None]) for values in (MEAN, STD))

    @script(default_opset=op)
    def preprocess(pictures: UINT8["batch", "height", "width", 3]) -> FLOAT["batch", 3, "rows", "columns"]:  # noqa: F821
        size = op.Shape(pictures, start=1, end=3)
        height, width = size[0], size[1]
        new_height, new_width = resized(height, width, goal_height, goal_width)
        top, bottom, rows = _axis(height, new_height, image_height)
        left, right, columns = _axis(width, new_width, image_width)
        part = op.Slice(pictures, op.Concat(top, left, axis=0), op.Concat(bottom, right, axis=0), [1, 2])
        values = op.Cast(op.Transpose(part, perm=[0, 3, 1, 2]), to=_DOUBLE)
        across = _levels(op.MatMul(values, op.Transpose(columns)))
        levels = op.Cast(_levels(op.MatMul(rows, across)), to=_FLOAT)
        return (levels / 255.0 - op.Constant(value=mean)) / op.Constant(value=std)

    return preprocess.to_model_proto()
