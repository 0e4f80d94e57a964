"""int8 ONNX files from weights: exported, quantised, run against their source on images, and kept if they agree."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

from convert.errors import ConversionError
from convert.export.calibration import DIGITS, calibration_images, find_images, shortage
from convert.export.compare import Comparison, compare, photographs, picture_batches
from convert.export.export import BOUNDS, check_export
from convert.export.onnx_int8 import quantize_dynamic, quantize_static
from convert.files import replacing, typed_path, write_bytes
from convert.formats.write import require_space
from convert.weights import Weights
from crossvit_jax.config import CrossViTConfig

BOUND = 0.12  # of the root mean square difference, relative to the spread of the source's logits

COMPARED = 64  # images
_BATCH = 7  # the last batch has another size, which a graph of one size would refuse

_log = logging.getLogger(__name__)

Images = Float32[np.ndarray, "images channels height width"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How to make int8 of a model."""

    kind: Literal["dynamic", "static"]
    target: Literal["cpu", "tensorrt"] = "cpu"  # of static
    calibrate: str | None = None  # of static: `digits`, or a folder of images
    images: int = 128  # to calibrate with
    preprocess: bool = False  # the file takes pictures of any size, see `onnx_preprocess.with_preprocessing`

    def __post_init__(self):
        if (self.kind == "static") != (self.calibrate is not None):
            raise ConversionError("calibration images are for static quantisation, which needs them")
        if self.kind == "dynamic" and self.target == "tensorrt":
            raise ConversionError("TensorRT reads static quantisation only")
        if self.preprocess and self.target == "tensorrt":
            raise ConversionError("--preprocess computes in float64, which TensorRT does not have")


@dataclass(frozen=True)
class Difference:
    """How far the logits of a quantised file are from its source's."""

    spread: float  # the root mean square difference, relative to the standard deviation of the source's logits
    largest: float  # the largest difference, relative to the source's largest logit
    agreement: float  # share of the images with the same most probable class
    images: str  # which ones
    bound: float = BOUND  # of the spread

    @property
    def passed(self) -> bool:
        return self.spread <= self.bound  # not so for NaN either

    def __str__(self) -> str:
        return (
            f"on {self.images} its logits differ from the source's by {self.spread:.3f} of their spread "
            f"(bound {self.bound}){'' if self.passed else ': TOO MUCH'}, at most by {self.largest:.3f} of the largest; "
            f"top-1 agreement {self.agreement:.1%}"
        )


@dataclass(frozen=True)
class Int8Export:
    """What came of it; the file was only kept if it has `passed`."""

    path: Path
    difference: Difference
    preprocessing: Comparison | None = None  # of the file, given pictures, and itself without it, given their images

    @property
    def passed(self) -> bool:
        return self.difference.passed and (self.preprocessing is None or self.preprocessing.passed)


def check_quantization(how: Quantization, destination: str | Path, *, overwrite: bool = False) -> Path:
    """The destination as a path, before any work is done for it.

    Raises:
        ConversionError: see `convert.export.export.check_export`; or the ending is not `.onnx`, or there are no images
            to calibrate with.
    """
    path = typed_path(destination)
    if path.suffix != ".onnx":
        raise ConversionError(f"{path}: only .onnx files are quantised")
    if how.calibrate is not None:
        find_images(how.calibrate)
    return check_export(path, "float32", overwrite=overwrite)


def check_weights(weights: Weights) -> None:
    """Raises ConversionError for weights in half precision: they are rounded once already, and want `astype` first."""
    if weights.dtypes != ["float32"]:
        raise ConversionError(
            f"int8 is made from float32, and the weights are {' and '.join(weights.dtypes)}; --dtype float32 takes them"
        )


def export_quantized(
    weights: Weights,
    destination: str | Path,
    how: Quantization,
    *,
    overwrite: bool = False,
    warn: Callable[[str], None] = _log.warning,
) -> Int8Export:
    """Writes an int8 `.onnx` and runs it against the twin in float32; what differs too much is not kept.

    Compared are photographs for dynamic quantisation, and for static other images from where the calibration's come:
    on pictures of another kind, the ranges would not fit.

    Args:
        weights: in float32.
        warn: is told of too few calibration images, before the work.

    Raises:
        ConversionError: see `check_quantization`, `check_weights` and `onnx_preprocess.check_pictures`; the calibration
            images are not what the model is for, or one cannot be read; the disk is full, or writing fails otherwise.
    """
    from convert.export.onnx_graph import onnx_graph

    path = check_quantization(how, destination, overwrite=overwrite)
    check_weights(weights)
    _check_classes(weights.config, how)
    if how.preprocess:
        from convert.export.onnx_preprocess import check_pictures

        check_pictures(weights.config)
    calibration, compared, named = _images(weights, how, warn)
    require_space(weights, path)
    with replacing(path) as new:
        exported = new.with_name("float32.onnx")
        write_bytes(exported, onnx_graph(weights).SerializeToString())
        if how.kind == "static":
            quantize_static(exported, new, calibration, target=how.target)
        else:
            quantize_dynamic(exported, new)
        difference = difference_of(run_source(weights, compared), _run_quantized(new, compared, how), named)
        preprocessing = _add_preprocessing(new, weights.config) if how.preprocess and difference.passed else None
        done = Int8Export(path, difference, preprocessing)
        if not done.passed:
            new.unlink()
    return done


def photographs_to_compare(config: CrossViTConfig) -> tuple[Images, str]:
    """What a quantised model is compared on where nothing else is asked for, and what to call it."""
    return np.ascontiguousarray(photographs(config, COMPARED).transpose(0, 3, 1, 2)), f"{COMPARED} photographs"


def difference_of(
    expected: Float32[np.ndarray, "images out"],
    got: Float32[np.ndarray, "images out"],
    named: str,
    *,
    bound: float | None = None,
) -> Difference:
    """How far the logits of a quantised model are from its source's, on images that `named` tells the user.

    Args:
        bound: of the spread; default: that of int8.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        error = got - expected
        return Difference(
            spread=float(np.sqrt(np.mean(error**2)) / expected.std()),
            largest=float(np.abs(error).max() / np.abs(expected).max()),
            agreement=float((got.argmax(axis=1) == expected.argmax(axis=1)).mean()),
            images=named,
            bound=BOUND if bound is None else bound,
        )


def _add_preprocessing(path: Path, config: CrossViTConfig) -> Comparison:
    """Puts the preprocessing before the model in a file, and runs it against the file as it was."""
    import onnx

    from convert.export.onnx_graph import run_onnx
    from convert.export.onnx_preprocess import with_preprocessing

    without = run_onnx(path)
    write_bytes(path, with_preprocessing(onnx.load(path), config).SerializeToString())
    return compare(run_onnx(path), without, picture_batches(config), BOUNDS["float32"])


def _check_classes(config: CrossViTConfig, how: Quantization) -> None:
    """Without a head, nothing tells that a model is not one of the digits."""
    if how.calibrate == DIGITS and config.num_classes not in (0, 10):
        raise ConversionError(
            f"--calibrate {DIGITS} is for models of the 10 digits, and this one has {config.num_classes} classes; "
            "name a folder of images such as it will see"
        )


def _images(weights: Weights, how: Quantization, warn: Callable[[str], None]) -> tuple[Images, Images, str]:
    """Those to calibrate with, those to compare on, and what these are."""
    if how.calibrate is None:
        pictures, named = photographs_to_compare(weights.config)
        return pictures[:0], pictures, named
    images = calibration_images(how.calibrate, weights.config, how.images + COMPARED)
    too_few = shortage(min(len(images), how.images), how.images)
    if too_few:
        warn(too_few)
    spare = len(images) - how.images
    if spare <= 0:
        return images, images, f"the {len(images)} calibration images themselves"
    # at even steps, as the images of one class may lie together
    held_out = np.zeros(len(images), bool)
    held_out[np.arange(spare) * len(images) // spare] = True
    return images[~held_out], images[held_out], f"{spare} images that it was not calibrated on"


def run_source(weights: Weights, images: Images) -> Float32[np.ndarray, "images out"]:
    """The outputs of the PyTorch twin in float32."""
    from convert.export.onnx_graph import run_torch

    run = run_torch(weights)
    return np.concatenate([run(batch.transpose(0, 2, 3, 1)) for batch in _batches(images)])


def _run_quantized(path: Path, images: Images, how: Quantization) -> Float32[np.ndarray, "images out"]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if how.target == "tensorrt":
        # to the letter: in the int8 arithmetic of processors without VNNI, weights of 8 bits overflow
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch})[0] for batch in _batches(images)])


def _batches(images: Images) -> list[Images]:
    return [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
