"""The command `python -m convert SOURCE DESTINATION`."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert.command_line import (
    Parser,
    Program,
    at_least_one,
    at_least_zero,
    branch,
    data_set,
    image_size,
    leave,
    patch_size,
    prune,
    reduce_tokens,
    run,
    weights_source,
)
from convert.errors import ConversionError, listed, require
from convert.files import local_path, shown
from convert.report import tell_class_order, tell_result, tell_training, tell_warning, tell_weights
from crossvit_jax.config import EXAMPLE
from crossvit_jax.files import MAX_PIXELS

if TYPE_CHECKING:
    from convert.export.export import Export
    from convert.weights import Weights

_PROGRAM = Program("convert")
_EPILOG = """\
SOURCE       hf-hub:timm/crossvit_tiny_240.in1k (any repository on the hub, also with @REVISION), a folder such as
             those have (model.safetensors, also in several files with an index), a .safetensors, .pth or .bin file with
             timm's, IBM's or Flax's names, an Orbax folder, or the folder of a training run (runs/X the weights of
             its best evaluation, runs/X:last the last, runs/X:ema their average)
DESTINATION  .safetensors or .pth for timm and the torch twin, .flax.safetensors, or no ending for an Orbax folder;
             .hf for a folder as repositories of the hub are, for timm.create_model("local-dir:out.hf"), and with
             --push OWNER/REPO also uploaded there;
             .onnx, .stablehlo or .pt exports the whole model, and keeps the file only if it computes what SOURCE
             does: .onnx with --quantize dynamic or static in int8; .pt, the PyTorch twin with its linear layers in
             integers by torchao, with --quantize int8 or int4; with --training, .pth.tar or .pth for timm's
             train.py --resume; with --triton, a folder for tritonserver --model-repository

exit status: 0 done; 1 --verify found the twins apart, or the exported file was not kept; 2 nothing was written, and
one line on stderr says why

examples:
  python -m convert hf-hub:timm/crossvit_tiny_240.in1k ti.flax.safetensors --verify
  python -m convert runs/X model.onnx --quantize dynamic
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Converts as the arguments say; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    return run(_PROGRAM, lambda: _convert(args))


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM,
        description="Convert CrossViT weights between timm, torch, Flax, safetensors and Orbax, or export them.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("source", type=weights_source, metavar="SOURCE")
    add("destination", type=local_path, metavar="DESTINATION", nargs="?")
    add("--info", action="store_true", help="tell what is in SOURCE, and write nothing")
    add("--num-classes", type=at_least_zero, metavar="N", help="new head for N classes; 0: no head")
    add("--image-size", type=image_size, metavar="N|HxW", help="resample the position embeddings to this size")
    add("--patch-size", type=patch_size, metavar="N,N", help="resize kernels and positions to patches of this size")
    add(
        "--reduce-tokens",
        type=reduce_tokens,
        metavar="HOW",
        help="compute with fewer tokens: merge:N, fusion:SHARE or prune:SHARE; none: with all; no weight is changed, "
        "and timm does not know of it",
    )
    add(
        "--prune",
        type=prune,
        metavar="HOW",
        help="mlp=SHARE,heads=SHARE, or one of them: keep this share of the hidden neurons and of the heads of "
        "self-attention in each block of the widest branch, those that matter most for images; mlp=1:0.5 has a share "
        "for each branch",
    )
    add(
        "--branches",
        nargs="+",
        type=branch,
        metavar="BRANCH",
        help=f"of a model that is no variant, where SOURCE does not tell them: one text for each, such as {EXAMPLE}",
    )
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as stored; exported: float32")
    add(
        "--quantize",
        choices=("dynamic", "static", "int8", "int4"),
        help=".onnx in int8: activations' ranges found anew (dynamic) or fixed (static); .pt: int8 or int4 weights",
    )
    add(
        "--calibrate",
        type=data_set,
        metavar="digits|FOLDER",
        help="images for static ranges and for --prune: scikit-learn's digits, or image files (folder:FOLDER means the "
        "same); default of --prune: those of the run, else the digits",
    )
    add("--calibration-images", type=at_least_one, metavar="N", help="how many of them at most; default: 128")
    add("--max-pixels", type=at_least_one, metavar="N", help=f"images of more are not read; default: {MAX_PIXELS:,}")
    add("--target", choices=("cpu", "tensorrt"), help="what reads the static file; default: cpu")
    add("--compare", type=data_set, metavar="digits|FOLDER", help="images to compare .pt on; default: photographs")
    add("--preprocess", action="store_true", help=".onnx takes uint8 pictures of any size: resize and crop are in it")
    add("--triton", action="store_true", help="DESTINATION is a model repository for Triton, with preprocessing")
    add("--raw", action="store_true", help="of a detector, .onnx and .stablehlo return what it says at each point")
    add(
        "--license",
        metavar="TEXT",
        help="what .onnx, .pt or .hf says of its weights; default: Apache-2.0, as the published ones are",
    )
    add(
        "--training",
        action="store_true",
        help="of a run's newest checkpoint, write the weights with the optimiser's state, their average and the epoch",
    )
    add("--push", metavar="OWNER/REPO", help="upload the folder .hf to this repository of the Hugging Face hub, too")
    add("--verify", action="store_true", help="run both twins on what was written and compare")
    add("--overwrite", action="store_true", help="replace DESTINATION if it exists")
    return parser


def _convert(args: argparse.Namespace) -> int:
    # imported late: --help and a mistyped command line need not wait for the frameworks
    from convert.export.export import Export
    from convert.formats import publish
    from convert.formats.write import EXPORTED, check_destination, check_writable, write, written_for_timm
    from convert.tensors import DTYPES
    from crossvit_jax.preprocess import limit_pixels

    limit_pixels(args.max_pixels)
    if args.info:
        return _info(args)
    if args.destination is None:
        raise ConversionError("DESTINATION is needed; --info alone writes nothing")
    for flag in ("verify", "training"):
        if getattr(args, flag):
            require(f"--{flag}", "torch")
    if args.training:
        return _training(args)
    if args.triton:
        return _triton(args)
    if args.push is not None and Path(args.destination).name.endswith(EXPORTED):
        raise ConversionError("--push is for a folder .hf, not for an exported file")
    how = {field.name: getattr(args, field.name) for field in dataclasses.fields(Export)}
    if args.prune is not None:
        _check_prune(args)
        if args.quantize != "static":  # they are for pruning alone
            how |= {"calibrate": None, "calibration_images": None}
    how = Export(**how)
    name = Path(args.destination).name  # without the slash that may be behind it
    if args.license is not None and not name.endswith((".onnx", ".pt", ".hf")):
        raise ConversionError("--license is for .onnx, .pt and .hf; no other here has a place for it")
    if name.endswith(EXPORTED) or how != Export(dtype=how.dtype):
        return _export(args, how)
    place = check_destination(args.destination, overwrite=args.overwrite)
    if args.push is not None:
        if not place.name.endswith(".hf"):
            raise ConversionError(f"--push is for a folder .hf, which the hub takes as it is; got {args.destination}")
        publish.check_publishable(args.push)
    weights = _load(args, lambda weights: check_writable(weights, place))
    stored = ", ".join(weights.dtypes)
    if args.dtype:
        weights = weights.astype(DTYPES[args.dtype])
    tell_weights(weights, stored)
    path = write(weights, args.destination, overwrite=args.overwrite)
    print(f"written     {path}")
    if written_for_timm(path):
        tell_class_order(weights)
    status = _verify(weights, path) if args.verify else 0
    if args.push is not None and status == 0:
        print(f"published   {publish.publish(path, args.push)}")
    return status


def _export(args: argparse.Namespace, how: "Export") -> int:
    from convert.export.export import check_export, check_weights, export
    from convert.tensors import DTYPES

    if args.verify:
        raise ConversionError("--verify is for weights; an exported file is always run against its source")
    check_export(args.destination, how, overwrite=args.overwrite)
    as_float32 = how.quantize and args.dtype

    def check(weights: "Weights") -> None:
        check_weights(weights.astype(DTYPES[args.dtype]) if as_float32 else weights, how)

    weights = _load(args, check)
    stored = ", ".join(weights.dtypes)
    if as_float32:
        weights = weights.astype(DTYPES[args.dtype])
    tell_weights(weights.astype(DTYPES[how.dtype or "float32"]), stored)
    return tell_result(export(weights, args.destination, how, overwrite=args.overwrite, warn=tell_warning))


def _refuse_others(args: argparse.Namespace, why: str, *fine: str) -> None:
    """Raises ConversionError where flags were given that would have no effect."""
    others = [
        name for name, value in vars(args).items() if name not in ("source", *fine) and value not in (None, False)
    ]
    if others:
        raise ConversionError(
            f"{why}: leave out {'' if others[0] == 'destination' else '--'}{others[0].replace('_', '-')}"
        )


def _info(args: argparse.Namespace) -> int:
    from convert.training.of_source import training_state_of

    _refuse_others(args, "--info writes nothing", "info", "branches")
    weights = _load(args)
    tell_weights(weights, ", ".join(weights.dtypes))
    if weights.class_names is not None:
        print(f"named       {listed(map(shown, weights.class_names))}")
    try:
        state = training_state_of(args.source)
    except ConversionError as error:
        print(f"training    its state does not go on in another framework: {error}")
        return 0
    if state is None:
        print("training    no state: weights alone")
    else:
        tell_training(state)
    return 0


def _training(args: argparse.Namespace) -> int:
    from convert.files import check_place, typed_path
    from convert.training.run_checkpoint import read_run_checkpoint
    from convert.training.torch_checkpoint import write_torch_checkpoint

    _refuse_others(args, "--training takes a run as it is", "destination", "training", "overwrite")
    path = typed_path(args.destination)
    if not path.name.endswith((".pth.tar", ".pth")):
        raise ConversionError(f"{path}: a training checkpoint of torch ends in .pth.tar or .pth")
    check_place(path, overwrite=args.overwrite)
    state = read_run_checkpoint(typed_path(args.source))
    tell_weights(state.weights, ", ".join(state.weights.dtypes))
    tell_training(state)
    write_torch_checkpoint(state, path)
    print(f"written     {path}")
    return 0


def _triton(args: argparse.Namespace) -> int:
    from convert.export.triton import check_repository, write_repository

    _refuse_others(
        args,
        "--triton writes a repository",
        *("destination", "triton", "overwrite", "dtype", "license", "image_size", "patch_size", "reduce_tokens"),
    )
    if args.dtype == "bfloat16":
        raise ConversionError("--triton computes in float32 or float16: ONNX Runtime has no bfloat16 on CPUs")
    path = check_repository(args.destination, overwrite=args.overwrite)
    weights = _load(args)
    tell_weights(weights, ", ".join(weights.dtypes))
    comparison = write_repository(weights, path, dtype=args.dtype or "float32", overwrite=args.overwrite)
    print(f"{'written    ' if comparison.passed else 'NOT written'} {path}")
    print(f"compared    {comparison}")
    return 0 if comparison.passed else 1


def _check_prune(args: argparse.Namespace) -> None:
    """Raises ConversionError for what does not go with --prune, before anything is read."""
    from convert.export.calibration import find_images

    if args.num_classes is not None:
        raise ConversionError("--prune goes by what a trained head says: give --num-classes afterwards, a new head")
    if args.calibrate is not None:
        find_images(args.calibrate)


def _load(args: argparse.Namespace, check: Callable[["Weights"], None] | None = None) -> "Weights":
    """The weights as asked for.

    Args:
        check: raises for those that cannot be written, before any are pruned, which takes long.
    """
    from convert.models import load_weights

    changes = {
        name: getattr(args, name) for name in ("num_classes", "image_size", "patch_size", "reduce_tokens", "branches")
    }
    weights = load_weights(args.source, **{key: value for key, value in changes.items() if value is not None})
    if args.prune is not None:
        weights = _prune(weights, args, check)
    elif check is not None:
        check(weights)
    return weights if args.license is None else dataclasses.replace(weights, license=args.license)


def _prune(weights: "Weights", args: argparse.Namespace, check: Callable[["Weights"], None] | None) -> "Weights":
    """The weights without what --prune leaves out."""
    from convert.changes.prune import class_labels, prune, pruned_config
    from convert.export.calibration import CALIBRATED_ON, DIGITS, FEW, training_images
    from convert.image_files import LeftOut

    try:
        pruned = dataclasses.replace(weights, config=pruned_config(weights, args.prune))
    except ConversionError as error:
        raise ConversionError(f"--prune: {error}") from None
    if check is not None:
        check(pruned)
    config, left_out = weights.config, LeftOut()
    source = args.calibrate or (weights.trained or {}).get("dataset", DIGITS)
    try:
        count = args.calibration_images or CALIBRATED_ON
        images, names = training_images(source, config, count, weights.exif or "keep", left_out)
    except ConversionError as error:
        told = f"--prune by the data of the run: {error}; --calibrate names other images"
        raise ConversionError(str(error) if args.calibrate else told) from None
    for note in left_out.notes():
        tell_warning(note)
    if len(images) < FEW:
        tell_warning(f"pruned by {len(images)} image{'s' * (len(images) > 1)}: with fewer than {FEW} that is chance")
    if source == DIGITS and config.num_classes != 10:
        tell_warning(
            f"pruned by {DIGITS}, and the model has {config.num_classes} classes: --calibrate names a folder of images "
            "such as it will see"
        )
    return prune(weights, args.prune, images, class_labels(names, weights.class_names))


def _verify(weights: "Weights", path: Path) -> int:
    from convert.verify import BOUND, largest_difference, read_back

    written, wrong = read_back(weights, path)
    if wrong:
        print(f"verified    NOT as converted: {len(wrong)} tensors come back changed: {', '.join(wrong)}")
        return 1
    difference = largest_difference(written)
    print("verified    every tensor comes back bit for bit; ", end="")
    what = "outputs" if weights.config.task == "detection" else "logits"
    print(f"the twins' {what} differ by {difference:.1e} of the largest (bound {BOUND:.0e})", end="")
    passed = difference <= BOUND  # not so for NaN either
    print("" if passed else ": TOO MUCH")
    return 0 if passed else 1


if __name__ == "__main__":
    leave(main())
