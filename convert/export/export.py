"""Whole models as files that run without this library: written, run against their source, and kept if they agree."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from convert.errors import ConversionError, require
from convert.export.calibration import CALIBRATED_ON, DIGITS, calibration_images, find_images, shortage
from convert.export.compare import (
    ONNX_PACKAGES,
    Comparison,
    Images,
    Run,
    compare,
    outputs,
    photographs,
    picture_batches,
)
from convert.export.kept_boxes import KeptBoxes, compare_kept, kept_of
from convert.files import FOLDER_PREFIX, check_place, replacing, typed_path, write_bytes
from convert.formats.write import require_space
from convert.image_files import LeftOut
from convert.tensors import DTYPES
from convert.weights import Weights
from crossvit_jax.config import CrossViTConfig

_COMPARED, _COMPARED_INTEGERS, _COMPARED_DENSE = 16, 64, 8  # images; those of the last have thousands of points each
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export:
    """What kind of file is asked for. Raises ConversionError for what does not go together."""

    dtype: str | None = None  # of what the file computes; None: float32
    quantize: Literal["dynamic", "static", "int8", "int4"] | None = None  # .onnx in int8, or .pt
    calibrate: str | None = None  # of static: `digits`, or a folder of images
    calibration_images: int | None = None  # of static: how many at most; None: `CALIBRATED_ON`
    target: Literal["cpu", "tensorrt"] | None = None  # of static: what reads the file; None: cpu
    compare: str | None = None  # of .pt: images to compare on, as `calibrate`; None: photographs
    preprocess: bool = False  # .onnx takes pictures of any size, see `onnx_preprocess.with_preprocessing`
    raw: bool = False  # of a detector, its outputs instead of the boxes that are made of them

    def __post_init__(self):
        for name in ("calibrate", "calibration_images", "target"):
            if getattr(self, name) is not None and self.quantize != "static":
                more = " and --prune" * (name != "target")
                raise ConversionError(f"--{name.replace('_', '-')} is for --quantize static{more}")
        if self.quantize == "static" and self.calibrate is None:
            raise ConversionError("--quantize static needs images to calibrate with: --calibrate digits, or a folder")
        if self.quantize is not None and self.dtype not in (None, "float32"):
            raise ConversionError(f"--quantize makes integers of float32, not of --dtype {self.dtype}")
        if self.preprocess and self.target == "tensorrt":
            raise ConversionError("--preprocess computes in float64, which TensorRT does not have")

    @property
    def numbers(self) -> str:
        """That the file computes with, a key of `compare.BOUNDS`."""
        return {None: self.dtype or "float32", "dynamic": "int8", "static": "int8"}.get(self.quantize, self.quantize)


class Exported(NamedTuple):
    """What came of it; the file was only kept if it has `passed`."""

    path: Path
    # with its source; with preprocessing, also with itself without it; of a detector, also the boxes that it keeps
    comparisons: tuple[Comparison | KeptBoxes, ...]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)


class _Ending(NamedTuple):
    dtypes: tuple[str, ...]
    quantize: tuple[str | None, ...]
    extra: str  # that brings what it needs
    packages: tuple[str, ...]


_ENDINGS = {
    # onnxruntime has no bfloat16 on CPUs: nobody could check such a file
    ".onnx": _Ending(("float32", "float16"), (None, "dynamic", "static"), "onnx", ONNX_PACKAGES),
    ".stablehlo": _Ending(("float32", "float16", "bfloat16"), (None,), "train", ("sklearn",)),
    ".pt": _Ending(("float32",), ("int8", "int4"), "torchao", ("torchao", "torch", "sklearn")),
}


def check_export(destination: str | Path, how: Export, *, overwrite: bool = False) -> Path:
    """The destination as a path, before any work is done for it.

    Raises:
        ConversionError: the ending is none that can be exported so; the folder is missing, images are, or something is
            there that may not be replaced.
        MissingExtra: packages are missing.
    """
    path = typed_path(destination)
    for flag, value, ending in (("--preprocess", how.preprocess, ".onnx"), ("--compare", how.compare, ".pt")):
        if value and path.suffix != ending:
            raise ConversionError(f"{path}: {flag} is for {ending} files")
    suiting = [ending for ending, kind in _ENDINGS.items() if how.quantize in kind.quantize]
    if how.quantize is not None and path.suffix not in suiting:
        raise ConversionError(f"{path}: --quantize {how.quantize} is for {suiting[0]} files")
    if path.suffix not in _ENDINGS:
        raise ConversionError(f"{path}: unknown ending {path.suffix!r}; exported: {', '.join(_ENDINGS)}")
    kind = _ENDINGS[path.suffix]
    if path.suffix not in suiting:
        raise ConversionError(f"{path}: a {path.suffix} file is quantised: --quantize {' or '.join(kind.quantize)}")
    if how.dtype not in (None, *kind.dtypes):
        raise ConversionError(f"{path}: {path.suffix} files compute in {' or '.join(kind.dtypes)}, not in {how.dtype}")
    require(str(path), *kind.packages, extra=kind.extra)
    for images in (how.calibrate, how.compare):
        if images is not None:
            find_images(images)
    return check_place(path, overwrite=overwrite)


def check_weights(weights: Weights, how: Export) -> None:
    """Raises ConversionError for weights that cannot be exported so.

    Those are weights in half precision, of which no integers are made: they are rounded once already, and want `astype`
    first; models of other classes than the digits, where these calibrate; and of other images than evaluation makes.
    """
    config = weights.config
    if how.raw and config.task != "detection":
        raise ConversionError(f"--raw is for detectors, and these are weights for {config.task}")
    if config.task != "classification":
        _check_dense(config.task, how)
    if how.quantize is not None and weights.dtypes != ["float32"]:
        raise ConversionError(
            f"integers are made of float32, and the weights are {' and '.join(weights.dtypes)}; "
            "--dtype float32 takes them"
        )
    if how.calibrate == DIGITS and config.num_classes not in (0, 10):  # without a head, nothing tells
        raise ConversionError(
            f"--calibrate {DIGITS} is for models of the 10 digits, and this one has {config.num_classes} classes; "
            "name a folder of images such as it will see"
        )
    if how.preprocess:
        from convert.export.onnx_preprocess import check_pictures

        check_pictures(config)


def _check_dense(task: str, how: Export) -> None:
    """Raises ConversionError for what is there for classifiers only."""
    if how.quantize in ("int8", "int4"):
        raise ConversionError(f".pt files are of classifiers, and these are weights for {task}; .onnx takes them")
    if how.quantize == "static":
        raise ConversionError(
            f"--quantize static calibrates on images cut for classifiers, and these are weights for {task}; "
            "--quantize dynamic needs no images"
        )
    if how.preprocess:
        raise ConversionError(f"--preprocess cuts pictures as for classifiers, and {task} sees them whole")


def export(
    weights: Weights,
    destination: str | Path,
    how: Export | None = None,
    *,
    overwrite: bool = False,
    warn: Callable[[str], None] = _log.warning,
) -> Exported:
    """Writes `.onnx` (see `onnx_graph` and `onnx_int8`), `.stablehlo` or `.pt` (see `torchao`), and runs the file
    against its source in float32: the PyTorch twin, or for `.stablehlo` the Flax model.

    The file is written under a temporary name and only kept if they agree. Of a detector, raw outputs are compared, and
    then the boxes with those that are to be made of the same outputs. Compared are photographs, and for static
    quantisation other images from where the calibration's come: on pictures of another kind, the ranges would not fit.

    Args:
        weights: in any dtype; in float32 for integers.
        warn: is told of too few calibration images, and of files that are left out, before the work.

    Raises:
        ConversionError: see `check_export` and `check_weights`; an image cannot be read or is not what the model is
            for; or the disk is full, or writing fails otherwise.
    """
    how = how or Export()
    path = check_export(destination, how, overwrite=overwrite)
    check_weights(weights, how)
    left_out = LeftOut()
    calibration, images, named = _images(weights, how, left_out, warn)
    for note in left_out.notes():
        warn(note)
    require_space(weights.astype(DTYPES[how.dtype or "float32"]), path)
    with replacing(path) as new:
        run, source = _WRITERS[path.suffix](weights, how, calibration, new)
        got, expected = outputs(run, images), outputs(source, images)
        comparisons = [compare(got, expected, how.numbers, images=named)]
        if how.preprocess and comparisons[0].passed:
            comparisons.append(_add_preprocessing(new, run, weights.config, how.dtype or "float32"))
        if weights.config.task == "detection" and not how.raw and comparisons[0].passed:
            found = outputs(_DETECTORS[path.suffix](weights, how, new), images)
            comparisons.append(compare_kept(found, kept_of(got, weights.config), weights.config, named))
        done = Exported(path, tuple(comparisons))
        if not done.passed:
            new.unlink()
    return done


# --- each writes a file, and returns how it and its source are run ---


def _write_onnx(weights: Weights, how: Export, calibration: Images, path: Path) -> tuple[Run, Run]:
    from convert.export import onnx_graph, onnx_int8

    graph = onnx_graph.onnx_graph(weights, how.dtype or "float32").SerializeToString()
    float32 = path.with_name("float32.onnx")
    write_bytes(float32 if how.quantize else path, graph)
    if how.quantize == "dynamic":
        onnx_int8.quantize_dynamic(float32, path)
    elif how.quantize == "static":
        channels_first = np.ascontiguousarray(calibration.transpose(0, 3, 1, 2))
        onnx_int8.quantize_static(float32, path, channels_first, target=how.target or "cpu")
    # to the letter: in the int8 arithmetic of processors without VNNI, weights of 8 bits overflow
    run = onnx_graph.run_onnx(path, to_the_letter=how.target == "tensorrt")
    return run, onnx_graph.run_torch(weights)


def _write_stablehlo(weights: Weights, how: Export, calibration: Images, path: Path) -> tuple[Run, Run]:
    from convert.export import stablehlo

    write_bytes(path, stablehlo.stablehlo_program(weights, how.dtype or "float32"))
    return stablehlo.run_stablehlo(path), stablehlo.run_source(weights)


def _write_torchao(weights: Weights, how: Export, calibration: Images, path: Path) -> tuple[Run, Run]:
    from convert.export import onnx_graph, torchao

    write_bytes(path, torchao.torchao_file(weights, how.quantize))
    return onnx_graph.run_twin(torchao.load_torchao(path)), onnx_graph.run_torch(weights)


_WRITERS = {".onnx": _write_onnx, ".stablehlo": _write_stablehlo, ".pt": _write_torchao}


def _add_preprocessing(path: Path, without: Run, config: CrossViTConfig, dtype: str) -> Comparison:
    """Puts the preprocessing before the model in a file, and runs it against the file as it was."""
    import onnx

    from convert.export.onnx_graph import run_onnx
    from convert.export.onnx_preprocess import with_preprocessing

    write_bytes(path, with_preprocessing(onnx.load(path), config).SerializeToString())
    run, batches = run_onnx(path), picture_batches(config)
    got = np.concatenate([run(pictures) for pictures, _ in batches])
    expected = np.concatenate([without(images) for _, images in batches])
    return compare(got, expected, dtype, images=f"{len(got)} pictures", source="those for their images")


def _detect_onnx(weights: Weights, how: Export, path: Path) -> Run:
    import onnx

    from convert.export.onnx_detections import with_detections
    from convert.export.onnx_graph import run_onnx

    write_bytes(path, with_detections(onnx.load(path), weights.config).SerializeToString())
    return run_onnx(path)


def _detect_stablehlo(weights: Weights, how: Export, path: Path) -> Run:
    from convert.export.stablehlo import run_stablehlo, stablehlo_program

    write_bytes(path, stablehlo_program(weights, how.dtype or "float32", detect=True))
    return run_stablehlo(path)


# each makes the file of raw outputs one of detections, and returns how that is run
_DETECTORS = {".onnx": _detect_onnx, ".stablehlo": _detect_stablehlo}


def _images(
    weights: Weights, how: Export, left_out: LeftOut, warn: Callable[[str], None]
) -> tuple[Images, Images, str]:
    """Those to calibrate with, those to compare on, and what these are."""
    config, exif = weights.config, weights.exif or "keep"
    count = _COMPARED_INTEGERS if how.quantize else _COMPARED
    if config.task != "classification":
        count = _COMPARED_DENSE
    if how.calibrate is None:
        if how.compare is None:
            images, named = photographs(config, count), f"{count} photographs"
        else:
            images = calibration_images(how.compare, config, count, exif, left_out)
            of = DIGITS if how.compare == DIGITS else f"images of {how.compare.removeprefix(FOLDER_PREFIX)}"
            named = f"{len(images)} {of}"
        return images[:0], images, named
    asked = how.calibration_images or CALIBRATED_ON
    images = calibration_images(how.calibrate, config, asked + count, exif, left_out)
    too_few = shortage(min(len(images), asked), asked)
    if too_few:
        warn(too_few)
    spare = len(images) - asked
    if spare <= 0:
        return images, images, f"the {len(images)} calibration images themselves"
    # at even steps, as the images of one class may lie together
    held_out = np.zeros(len(images), bool)
    held_out[np.arange(spare) * len(images) // spare] = True
    return images[~held_out], images[held_out], f"{spare} images that it was not calibrated on"
