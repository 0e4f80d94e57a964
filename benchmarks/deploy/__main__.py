"""The command `python -m benchmarks.deploy`: what each shipped form of a trained model costs, and what it is worth.

Size, latency at batch 1, throughput at batch 8 and top-1 accuracy on the held-out images, beside torch in float32. A
form whose logits are further from those of its weights in float32 than converters accept is not timed.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import EPILOG, add_json, check_json, parser_of, tell
from benchmarks.result import as_json, write_json
from benchmarks.rounds import say
from convert.command_line import at_least_one, data_set, leave, run, weights_source
from convert.errors import require
from convert.export.compare import ONNX_PACKAGES
from convert.files import home_path

_EPILOG = f"""\
RUN: the folder of a training run, whose settings tell the data set; or any SOURCE of python -m convert, with --dataset.
A run with --qat int8 joins the run before it, of the same variant, image size and data set. Static int8 is calibrated
on training images.

{EPILOG}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark as the arguments say; returns the exit status."""
    parser = parser_of("deploy", "Compare the shipped forms of trained CrossViTs: size, speed, accuracy.", _EPILOG)
    parser.add_argument("--runs", type=weights_source, nargs="+", required=True, metavar="RUN", help="trained runs")
    add = parser.add_argument
    add("--dataset", type=data_set, metavar="DATA", help="as of python -m train.main (default: that of each run)")
    add("--data-dir", type=home_path, metavar="DIR", help="where prepared data sets lie (default: as in each run)")
    add("--images", type=at_least_one, default=2000, metavar="N", help="held-out ones to try at most; default: 2000")
    add("--calibration-images", type=at_least_one, default=128, metavar="N", help="training images; default: 128")
    add("--repeats", type=at_least_one, default=10, metavar="N", help="rounds; default: 10")
    add_json(parser)
    args = parser.parse_args(argv)
    return run(parser.prog, lambda: _run(args), failure=1)


def _run(args: argparse.Namespace) -> int:
    check_json(args.json)
    require("the ONNX forms", *ONNX_PACKAGES, verb="need")
    # late: wrong flags need not wait for the frameworks
    from benchmarks.deploy.measure import measure_model
    from benchmarks.deploy.runs import open_model, open_run, pair

    runs = [open_run(source, dataset=args.dataset, data_dir=args.data_dir) for source in args.runs]
    models, measured = [open_model(run, qat) for run, qat in pair(runs)], []
    for number, model in enumerate(models, 1):
        say(f"CrossViT {model.run.weights.config.name} of {model.run.source}, {number} of {len(models)}")
        with tempfile.TemporaryDirectory(prefix="crossvit-deploy-") as folder:
            how = {"images": args.images, "calibration_images": args.calibration_images, "rounds": args.repeats}
            measured += measure_model(model, Path(folder), **how)
        content = as_json("deploy", measured)
        write_json(args.json, content)  # after each model, so that an interruption costs one
    return tell(content)


if __name__ == "__main__":
    leave(main())
