"""`python -m train.serve --weights SOURCE`: a model behind HTTP, for people, programs and Triton's clients."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once.
import argparse
import contextlib
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from convert.command_line import Parser, Program, at_least_one, at_least_zero, leave, run
from convert.errors import SettingsError, require
from convert.files import typed_path
from convert.streams import let_go_of_output, tell, tell_error
from crossvit_jax.extras import EXTRAS
from train.inference.command import SOURCES, add_detection_flags, add_model_flags, load_model, tell_notes

if TYPE_CHECKING:
    from train.inference.server.app import Service
    from train.inference.server.engines.engine import Engine

_PROGRAM = Program("train.serve")
_TOKEN = "CROSSVIT_TOKEN"
_BATCH_ON_CPUS, _BATCH_ON_OTHERS = 8, 64
_LAST_PORT, _LONGEST = 65535, 86400
_MOST_PIXELS = 50_000_000  # of a picture, unless more are asked for

_EPILOG = f"""\
{SOURCES}; or an .onnx file that
python -m convert wrote, without --preprocess, which ONNX Runtime computes on CPUs. Classifiers, detectors and
segmenters are served, with the answers of python -m train.predict.

{_TOKEN} in the environment: requests must bear this token (Authorization: Bearer TOKEN), but for health checks and the
page. Standard output has a line of JSON for each request, stderr the rest.

exit status: 0 a signal (SIGTERM, Ctrl-C) ended it, and all that was accepted was answered; 1 some of it was not; 2 the
server could not start, and one line on stderr says why

examples:
  python -m train.serve --weights runs/X --port 8080
  curl --data-binary @photo.jpg http://127.0.0.1:8080/predict
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve as the arguments say; returns the exit status."""
    args = _parser().parse_args(argv)
    return run(_PROGRAM, lambda: _serve(args), remedy="choose a smaller --max-batch")


def _parser() -> Parser:
    parser = Parser(
        prog=_PROGRAM, description="Answer HTTP requests for what pictures show, with a CrossViT.", epilog=_EPILOG
    )
    add_model_flags(parser, batches=False, max_pixels=_MOST_PIXELS)
    add_detection_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=_port, default=8000, help="0: a free one (default: 8000)")
    parser.add_argument(
        "--max-batch",
        type=at_least_one,
        metavar="N",
        help="pictures in the largest batch; 1, 2, 4, … and this are compiled (default: 8 on CPUs, 64 on others)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--batching-delay",
        type=_milliseconds,
        default=0.005,
        metavar="MS",
        help="milliseconds that a picture waits for others (default: 5)",
    )
    limits.add_argument(
        "--queue",
        type=at_least_one,
        metavar="N",
        help="pictures in the server at once; more are refused (default: 16 of the largest batches)",
    )
    limits.add_argument(
        "--overload-status",
        type=int,
        choices=(503, 429),
        default=503,
        help="of the refusals for want of room (default: 503)",
    )
    limits.add_argument(
        "--deadline", type=_seconds, default=10.0, metavar="S", help="seconds until an answer; then 504 (default: 10)"
    )
    limits.add_argument(
        "--max-body", type=at_least_one, default=32, metavar="MB", help="megabytes of a request (default: 32)"
    )
    limits.add_argument(
        "--grace", type=_seconds, default=30.0, metavar="S", help="seconds to end in after SIGTERM (default: 30)"
    )
    return parser


def _service(args: argparse.Namespace, token: str | None) -> "Service":
    from crossvit_jax.preprocess import limit_pixels
    from train.inference.server.app import Service
    from train.inference.server.limits import Limits

    limit_pixels(args.max_pixels)  # of what is decoded, too
    engine = _onnx_engine(args) if args.weights.endswith(".onnx") else _jax_engine(args)
    most = args.queue or 16 * engine.sizes[-1]
    return Service(
        engine,
        Limits(
            pictures=most,
            batching_delay=args.batching_delay,
            deadline=args.deadline,
            body_bytes=args.max_body * 10**6,
            pixels=args.max_pixels,
            overload_status=args.overload_status,
            token=token,
        ),
    )


def _jax_engine(args: argparse.Namespace) -> "Engine":
    from train.inference.server.engines.jax_engine import JaxEngine

    predictor = load_model(args)
    tell_notes(_PROGRAM, predictor.notes)
    largest = args.max_batch or (_BATCH_ON_CPUS if predictor.platform == "cpu" else _BATCH_ON_OTHERS)
    # what weights attend to is not to be had once they are rounded, or of fewer tokens: as in train.predict
    explains = not args.quantize and getattr(predictor.task.model_config, "reduce_tokens", None) is None
    return JaxEngine(predictor, largest, explains=explains)


def _onnx_engine(args: argparse.Namespace) -> "Engine":
    from train.inference.server.engines.onnx_engine import OnnxEngine

    path = typed_path(args.weights)
    fixed = ("image_size", "precision", "reduce_tokens", "quantize", "score_threshold", "iou_threshold")
    fixed += ("max_detections",)
    if args.attention_kernel != "auto":
        raise SettingsError(f"{path} computes as it was exported: leave out --attention-kernel")
    for name in fixed:
        if getattr(args, name, None) is not None:
            raise SettingsError(f"{path} computes as it was exported: leave out --{name.replace('_', '-')}")
    engine = OnnxEngine(path, args.max_batch or _BATCH_ON_CPUS, crop_pct=args.crop_pct, exif=args.exif)
    if engine.is_dynamic:
        why = "in larger batches a picture's neighbours would change its answer, as their ranges are the whole batch's"
        tell_notes(_PROGRAM, [f"{path} is quantised dynamically, and gets one picture at a time: {why}"])
    return engine


class _Log:
    """Standard output, a line for each request; nothing any more once nobody reads it."""

    def __init__(self):
        self._read = True

    def __call__(self, line: str) -> None:
        try:
            if self._read:
                tell(line)
        except BrokenPipeError:
            self._read = False
            let_go_of_output()


# --- the types of flags ---


def _port(text: str) -> int:
    if at_least_zero(text) > _LAST_PORT:
        raise argparse.ArgumentTypeError(f"must be a port, from 0 to {_LAST_PORT}; got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    return _positive(text, "seconds")


def _milliseconds(text: str) -> float:
    return 0.0 if text == "0" else _positive(text, "milliseconds") / 1000


def _positive(text: str, unit: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _LONGEST:
        raise argparse.ArgumentTypeError(f"must be {unit}, above 0 and at most {_LONGEST}; got {text!r}")
    return value


def _serve(args: argparse.Namespace) -> int:
    require("serving", *EXTRAS["serve"])
    token = os.environ.get(_TOKEN)
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise SettingsError(f"{_TOKEN} is set, and is no token: it must be printable ASCII without spaces around it")
    from train.inference.server.run import NotAnswered, address, listen, serve

    with contextlib.closing(listen(args.host, args.port)) as listener:
        service = _service(args, token)
        place = address(*listener.getsockname()[:2])

        def say(line: str) -> None:
            tell_error(f"{_PROGRAM}: {line}")

        say(f"{service.engine.headline}; http://{place} is ready once its programs are compiled")
        if args.host not in ("127.0.0.1", "::1", "localhost") and token is None:
            say(f"note: whoever reaches {place} may use it: no {_TOKEN} is set")
        log = _Log()
        lost = serve(service, listener, grace=args.grace, log=log, say=say)
        if lost:
            raise NotAnswered(f"{lost} pictures were not answered within {args.grace:g} s")
    return 0


if __name__ == "__main__":
    leave(main(), at_once=True)
