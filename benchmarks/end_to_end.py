"""The command `python -m benchmarks.end_to_end`: training fed from JPEG files on a disk, Flax against timm.

Each pipeline is timed beside its own step alone: Flax's step with the trainer's pipeline, which augments on the device
(flax-device) or in the workers (flax-host), and timm's with timm's loader (timm-loader). All have the paper's recipe:
crop, flip, RandAugment, erasing, Mixup and CutMix. The steps alone are sides of the training benchmark, whose
batch lies on the device.

A round begins with empty queues, see `benchmarks.sides.fed`, and is of at least four batches from each worker, so
that what was read ahead flatters nobody.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import (
    add_model_flags,
    add_rounds_flags,
    model_tasks,
    pick_device,
    require_packages,
    tell,
    until,
    workers_environment,
    writable_json,
)
from benchmarks.result import about, side_as_json, task_as_json, told_facts
from benchmarks.rounds import Measured, SidesDisagree, Times, not_failed, require_agreement, say, take_turns
from benchmarks.table import fed_lines, fed_markdown
from benchmarks.task import (
    FLAX_FED,
    FLAX_STEPS,
    PHOTOGRAPH_CLASSES,
    TIMM_FED,
    TIMM_STEPS,
    DataTask,
    EndToEndTask,
    usable_cores,
)
from convert.command_line import Parser, at_least_one, leave, run

_DIFFERENT = 256  # photographs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status: 0 done; 1 the sides disagree or one failed; 2 wrong flags, or a
    package is missing.
    """
    parser = Parser(
        prog="python -m benchmarks.end_to_end",
        description="Time training with its input pipeline, JPEG files to updated weights: Flax against timm.",
    )
    add_model_flags(parser)
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
        "--images", type=at_least_one, default=20_000, metavar="N", help="JPEG files in an epoch; default: 20000"
    )
    add_rounds_flags(parser, repeats=5, rounds="rounds")
    args = parser.parse_args(argv)
    if args.images < args.batch_size:
        parser.error(f"--images {args.images} do not fill a batch of {args.batch_size}")
    writable_json(parser, args.json)
    device = pick_device(parser, args)
    if args.flax_step == "flax-cudnn" and (device, args.dtype) != ("gpu", "bfloat16"):
        parser.error(f"--flax-step flax-cudnn needs a GPU and --dtype bfloat16; this is {device}, {args.dtype}")
    return run(parser.prog, lambda: _run(args, device), failure=1)


def _run(args: argparse.Namespace, device: str) -> int:
    end = until(args)
    require_packages("the input pipelines", "grain")
    results: list[tuple[EndToEndTask, dict[str, Times]]] = []
    printed = 0
    with tempfile.TemporaryDirectory(prefix="crossvit-benchmark-") as name:
        folder = Path(name)
        write_photographs(folder, args.images)
        environment = workers_environment(device, folder, one_at_a_time=False)
        for step in model_tasks("training", args, device, folder):
            task = EndToEndTask(step=step, flax=args.flax_step, timm=args.timm_step, folder=name, workers=args.workers)
            say(f"CrossViT {step.variant}, end to end, {args.dtype}, {device}")
            fed = [side for side, place in FLAX_FED.items() if place in args.augment_on]
            sides = [task.flax, *fed, task.timm, TIMM_FED]
            times = {side: Times() for side in sides}
            take_turns(
                task,
                times,
                compare=lambda task=task, times=times: require_comparable(task, times),
                rounds=args.repeats,
                until=end,
                device=device,
                environment=environment,
            )
            results.append((task, times))
            content = as_json(results, images=args.images)
            printed = tell(content, fed_lines(content), printed, args.json)
    for line in fed_markdown(content).split("\n")[printed:]:  # what is said under the table
        print(line)
    return 1 if any(times.failure for _, sides in results for times in sides.values()) else 0


def write_photographs(folder: Path, count: int) -> None:
    """So many JPEG files of the size of ImageNet's, in the class folders of `folder/train`.

    They are the files of a few hundred photographs, each under many names: an epoch is long, as it is in a real run.
    `folder/val` is the same folder once more: a data set of the trainer's has one, which nobody looks at here.
    """
    different = folder / "photographs"
    different.mkdir()
    samples = DataTask(photographs=min(count, _DIFFERENT)).samples()
    for number, sample in enumerate(samples):
        (different / f"{number}.jpg").write_bytes(sample["image"])
    for number in range(min(count, PHOTOGRAPH_CLASSES)):
        (folder / "train" / f"class-{number}").mkdir(parents=True)
    for number in range(count):
        file = folder / "train" / f"class-{number % PHOTOGRAPH_CLASSES}" / f"{number}.jpg"
        file.hardlink_to(different / f"{number % len(samples)}.jpg")
    os.symlink("train", folder / "val")


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
    facts = told_facts(times for _, sides in results for times in sides.values())
    return about("end_to_end", facts) | {
        "images": images,
        "workers": results[0][0].workers,
        "results": [_result(task, sides) for task, sides in results],
    }


def _result(task: EndToEndTask, sides: Mapping[str, Times]) -> dict[str, Any]:
    return task_as_json(task.step, sides) | {
        "steps_per_call": task.steps,
        "step_alone": {side: task.flax if side.startswith("flax") else task.timm for side in sides},
        "sides": {side: side_as_json(times, task.steps * task.step.batch_size) for side, times in sides.items()},
    }


if __name__ == "__main__":
    leave(main())
