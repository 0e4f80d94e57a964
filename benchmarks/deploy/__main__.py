"""The command `python -m benchmarks.deploy`: what each shipped form of a trained model costs, and what it is worth.

Size, latency at batch 1, throughput at batch 8 and top-1 accuracy on the held-out images, beside torch in float32. A
form whose logits are further from those of its weights in float32 than converters accept is not timed.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import add_rounds_flags, require_packages, writable_json
from benchmarks.rounds import say
from convert.command_line import Parser, at_least_one, data_set, leave, run, weights_source
from convert.files import home_path

if TYPE_CHECKING:
    from benchmarks.deploy.result import Deployed
    from benchmarks.deploy.runs import Model

_PROGRAM = "python -m benchmarks.deploy"

_EPILOG = """\
RUN: the folder of a training run, whose settings tell the data set; or any SOURCE of python -m convert, with --dataset.
A run with --qat int8 joins the run before it of the same variant, image size and data set.

Each side runs in a process of its own, one at a time, round by round in turn: A B C A B C … Compilation and warm-up are
not timed. Static int8 is calibrated on training images.

exit status: 0 done; 1 a form failed or differs too much: its row says so; 2 wrong flags, or a run that cannot be used
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark as the arguments say; returns the exit status."""
    parser = Parser(
        prog=_PROGRAM,
        description="Compare the shipped forms of trained CrossViTs: size, speed, accuracy.",
        epilog=_EPILOG,
    )
    parser.add_argument("--runs", type=weights_source, nargs="+", required=True, metavar="RUN", help="trained runs")
    parser.add_argument(
        "--dataset", type=data_set, metavar="DATA", help="as of python -m train.main (default: that of each run)"
    )
    parser.add_argument(
        "--data-dir", type=home_path, metavar="DIR", help="where prepared data sets lie (default: as in each run)"
    )
    parser.add_argument(
        "--images", type=at_least_one, default=2000, metavar="N", help="held-out ones to try at most; default: 2000"
    )
    parser.add_argument(
        "--calibration-images", type=at_least_one, default=128, metavar="N", help="training images; default: 128"
    )
    add_rounds_flags(parser)
    args = parser.parse_args(argv)
    writable_json(parser, args.json)
    return run(_PROGRAM, lambda: _run(args), failure=1)


def _run(args: argparse.Namespace) -> int:
    require_packages("the ONNX forms")
    # late: wrong flags need not wait for the frameworks
    from benchmarks.deploy.result import as_json
    from benchmarks.deploy.runs import open_model, open_run, pair
    from benchmarks.result import write_json
    from benchmarks.table import deploy_markdown, failures

    runs = [open_run(source, dataset=args.dataset, data_dir=args.data_dir) for source in args.runs]
    models = [open_model(run, qat) for run, qat in pair(runs)]
    results = []
    for number, model in enumerate(models, 1):
        say(f"CrossViT {model.config.name} of {model.run.source}, {number} of {len(models)}")
        with tempfile.TemporaryDirectory(prefix="crossvit-deploy-") as folder:
            results.append(_deploy(model, Path(folder), args))
        content = as_json(results)
        write_json(args.json, content)  # after each model, so that an interruption costs one
    print(deploy_markdown(content))
    return 1 if any(failures(result) for result in content["results"]) else 0


def _deploy(model: "Model", folder: Path, args: argparse.Namespace) -> "Deployed":
    from benchmarks.deploy.forms import float_forms, qat_forms
    from benchmarks.deploy.measure import measure_forms
    from benchmarks.deploy.result import Deployed
    from benchmarks.deploy.runs import evenly, read_images

    sets = model.sets
    say("reading images")
    indices = evenly(sets.train, args.calibration_images)
    calibration, _ = read_images(sets.train, indices, model.run.weights, folder / "calibration.npy")
    indices = evenly(sets.held_out, args.images)
    images, labels = read_images(sets.held_out, indices, model.run.weights, folder / "images.npy")

    channels_first = calibration.transpose(0, 3, 1, 2)
    forms = float_forms(model.run.weights, folder, channels_first)
    weights = {False: model.run.weights}
    if model.qat is not None:
        forms |= qat_forms(model.qat.weights, folder, channels_first)
        weights[True] = model.qat.weights
    measured, logits = measure_forms(forms, weights, folder / "images.npy", len(images), rounds=args.repeats)
    labels = model.classes[labels]
    return Deployed(
        model=model,
        forms=forms,
        measured=measured,
        right={name: int((answers.argmax(axis=1) == labels).sum()) for name, answers in logits.items()},
        images=len(images),
        unreadable=len(indices) - len(images),
        calibrated_on=len(calibration),
    )


if __name__ == "__main__":
    leave(main())
