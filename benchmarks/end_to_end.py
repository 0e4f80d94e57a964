"""The command `python -m benchmarks.end_to_end`: training fed from JPEG files on a disk, Flax against timm.

Each pipeline is timed beside its own step alone: Flax's step with the trainer's pipeline, which augments on the device
(flax-device) or in the workers (flax-host), and timm's with timm's loader (timm-loader). All have the paper's recipe:
crop, flip, RandAugment, erasing, Mixup and CutMix. The steps alone, on a batch that lies on the device, are sides of the
training benchmark.

A round begins with empty queues, see `benchmarks.steady_state`, and is of at least four batches from each worker, so
that what was read ahead flatters nobody.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import exit_status, pick_device, variant_name, workers_environment, writable_json
from benchmarks.end_to_end_task import FLAX_FED, FLAX_STEPS, TIMM_FED, TIMM_STEPS, EndToEndTask, write_photographs
from benchmarks.machine import about, where
from benchmarks.measure import GPU_PATIENCE, Measured, SidesDisagree, Times, not_failed, require_agreement, take_turns
from benchmarks.ratios import rounds, spread, times_as_fast
from benchmarks.record import write_json
from benchmarks.task import Task, usable_cores
from benchmarks.worker import PATIENCE
from convert.command_line import Parser, at_least_one

_HEADER = (
    *("variant", "batch", "dtype", "side", "images/s, median (min-max)"),
    *("of its step alone (min-max)", "times as fast as timm (min-max)"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status: 0 done; 1 the sides disagree or one failed; 2 wrong flags."""
    parser = Parser(
        prog="python -m benchmarks.end_to_end",
        description="Time training with its input pipeline, JPEG files to updated weights: Flax against timm.",
    )
    parser.add_argument("--variants", nargs="+", type=variant_name, default=["ti"], metavar="NAME", help="default: ti")
    parser.add_argument("--batch-size", type=at_least_one, default=8, metavar="N", help="default: 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu where torch and jax can use one")
    parser.add_argument(
        "--augment-on",
        nargs="+",
        choices=tuple(FLAX_FED.values()),
        default=list(FLAX_FED.values()),
        help="of Flax's pipeline; default: both, each a side",
    )
    parser.add_argument("--flax-step", choices=FLAX_STEPS, default=FLAX_STEPS[0], help=f"default: {FLAX_STEPS[0]}")
    parser.add_argument("--timm-step", choices=TIMM_STEPS, default=TIMM_STEPS[0], help=f"default: {TIMM_STEPS[0]}")
    parser.add_argument(
        "--workers",
        type=at_least_one,
        default=usable_cores(),
        metavar="N",
        help=f"processes of each pipeline; default: one for each core, here {usable_cores()}",
    )
    parser.add_argument(
        "--images", type=at_least_one, default=1024, metavar="N", help="JPEG files to be read; default: 1024"
    )
    parser.add_argument("--repeats", type=at_least_one, default=5, metavar="N", help="rounds; default: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured, every round, to FILE")
    args = parser.parse_args(argv)
    if args.images < args.batch_size:
        parser.error(f"--images {args.images} do not fill a batch of {args.batch_size}")
    writable_json(parser, args.json)
    device = pick_device(parser, args)
    if args.flax_step == "flax-cudnn" and (device, args.dtype) != ("gpu", "bfloat16"):
        parser.error(f"--flax-step flax-cudnn needs a GPU and --dtype bfloat16; this is {device}, {args.dtype}")
    return exit_status(parser, lambda: _run(args, device))


def _run(args: argparse.Namespace, device: str) -> int:
    from benchmarks.timm_side import write_weights

    results: list[tuple[EndToEndTask, dict[str, Times]]] = []
    with tempfile.TemporaryDirectory(prefix="crossvit-benchmark-") as name:
        folder = Path(name)
        write_photographs(folder, args.images)
        environment = workers_environment(device, folder, one_at_a_time=False)
        for variant in args.variants:
            weights = folder / f"{variant}.safetensors"
            write_weights(variant, weights)
            step = Task(
                benchmark="training",
                variant=variant,
                batch_size=args.batch_size,
                dtype=args.dtype,
                device=device,
                weights=str(weights),
            )
            task = EndToEndTask(step=step, flax=args.flax_step, timm=args.timm_step, folder=name, workers=args.workers)
            _say(f"CrossViT {variant}, end to end, {args.dtype}, {device}")
            fed = [side for side, place in FLAX_FED.items() if place in args.augment_on]
            sides = [task.flax, *fed, task.timm, TIMM_FED]
            results.append((task, measure(task, sides, rounds=args.repeats, environment=environment)))
            content = as_json(results, images=args.images)
            if args.json:  # after each variant, so that an interruption costs one
                write_json(args.json, content)
    print(as_markdown(content))
    return 1 if any(times.failure for _, sides in results for times in sides.values()) else 0


def measure(task: EndToEndTask, sides: Sequence[str], *, rounds: int, environment: dict[str, str]) -> dict[str, Times]:
    """Times the sides in turn, as `take_turns` does. Raises SidesDisagree as `require_comparable` does."""
    times = {side: Times() for side in sides}
    take_turns(
        task,
        times,
        compare=lambda: require_comparable(task, times),
        rounds=rounds,
        together=task.step.device == "gpu",
        environment=environment,
        say=_say,
    )
    return times


def require_comparable(task: EndToEndTask, sides: Mapping[str, Times]) -> None:
    """What can be checked before anything is timed.

    Raises SidesDisagree if the steps compute something else, as in the training benchmark, or if a pipeline delivers
    something else than photographs as the model wants them.
    """
    alone = {side: sides[side] for side in (task.flax, task.timm)}
    require_agreement(Measured(task.step, task.timm, alone))
    for side, times in not_failed(sides).items():
        problem = None if side in alone else times.ready.check.problem(task)
        if problem:
            raise SidesDisagree(f"{side}: {problem}: nothing is timed")


def as_json(results: Sequence[tuple[EndToEndTask, Mapping[str, Times]]], *, images: int) -> dict[str, Any]:
    """Everything measured, with every round, in plain types."""
    facts: dict[str, str] = {}
    for _, sides in results:
        for times in sides.values():
            facts |= times.ready.facts if times.ready else {}
    return about("end_to_end", facts) | {
        "images": images,
        "workers": results[0][0].workers,
        "results": [_result(task, sides) for task, sides in results],
    }


def _result(task: EndToEndTask, sides: Mapping[str, Times]) -> dict[str, Any]:
    measured = Measured(task.step, task.timm, dict(sides))
    return {
        "variant": task.step.variant,
        "batch_size": task.step.batch_size,
        "dtype": task.step.dtype,
        "device": task.step.device,
        "steps_per_call": task.steps,
        "step_alone": {side: task.flax if side.startswith("flax") else task.timm for side in sides},
        "others_cores": measured.others,
        "disturbed": measured.disturbed,
        "sides": {side: _side(times) for side, times in sides.items()},
    }


def _side(times: Times) -> dict[str, Any]:
    known: dict[str, Any] = {"failure": times.failure}
    if times.ready:
        ready = times.ready
        known |= {"load_s": ready.load_s, "first_result_s": ready.first_s, "warm_up_s": ready.warm_up_s}
        known |= {"calls_per_round": ready.calls, "difference": times.difference, "rounds_s_per_call": times.seconds}
    return known


def as_markdown(content: Mapping[str, Any]) -> str:
    """What was measured where, a table with a row per side, and what has to be said of it."""
    lines = [
        f"Training with the input pipeline, {content['images']} JPEG photographs of 500 x 375, {content['workers']} "
        f"workers; {where(content)}",
        "",
        _row(_HEADER),
        _row("---" for _ in _HEADER),
    ]
    for result in content["results"]:
        lines += [_row(_cells(result, side)) for side in result["sides"]]
    disturbed = [result["others_cores"] for result in content["results"] if result["disturbed"]]
    if disturbed:
        lines += ["", f"**Not valid as a comparison**: other programs kept up to {max(disturbed):.1f} cores busy."]
    return "\n".join(lines)


def _cells(result: Mapping[str, Any], side: str) -> list[str]:
    cells = [result["variant"], str(result["batch_size"]), result["dtype"], side]
    if side not in rounds(result):
        return [*cells, f"failed: {result['sides'][side]['failure'].replace('|', '/')}", "", ""]
    images = result["steps_per_call"] * result["batch_size"]
    rates = spread([images / seconds for seconds in rounds(result)[side]])
    return [*cells, "{median:.1f} ({min:.1f}-{max:.1f})".format(**rates), *_ratios(result, side)]


def _ratios(result: Mapping[str, Any], side: str) -> list[str]:
    """The share of the side's step alone; and how many times as fast as timm's it is, fed or alone as itself."""
    timed, step_alone = rounds(result), result["step_alone"]
    share = ratio = ""
    if step_alone[side] != side and step_alone[side] in timed:
        shares = {name: 100 * value for name, value in times_as_fast(result, side, step_alone[side]).items()}
        share = "{ratio:.0f} % ({min:.0f}-{max:.0f})".format(**shares)
    other = TIMM_FED if step_alone[side] != side else step_alone[TIMM_FED]
    if other != side and other in timed:
        ratio = "{ratio:.2f} ({min:.2f}-{max:.2f})".format(**times_as_fast(result, side, other))
    return [share, ratio]


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
