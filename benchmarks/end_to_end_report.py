"""The end-to-end benchmark's measurements as JSON, and the table that is made from it."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import goals
from benchmarks.machine import about, where
from benchmarks.ratios import best, images_per_s, rounds, times_as_fast
from benchmarks.rounds import Measured, Times
from benchmarks.task import FLAX_FED, TIMM_FED, EndToEndTask

Content = Mapping[str, Any]  # of a JSON file

_HEADER = (
    *("variant", "batch", "dtype", "side", "images/s, median (min-max)"),
    *("of its step alone (min-max)", "times as fast as timm (min-max)"),
)


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


def as_markdown(content: Content) -> str:
    """What was measured where, a table with a row per side, and what has to be said of it."""
    return "\n".join([*table_lines(content), *notes(content)])


def table_lines(content: Content) -> list[str]:
    """The line above the table, and the table. More results append lines to these, and change none."""
    lines = [
        f"Training with the input pipeline, {content['images']:,} JPEG files of 500 x 375, {content['workers']} "
        f"workers; {where(content)}",
        "",
        _row(_HEADER),
        _row("---" for _ in _HEADER),
    ]
    return lines + [_row(_cells(result, side)) for result in content["results"] for side in result["sides"]]


def notes(content: Content) -> list[str]:
    """What has to be said under the table."""
    disturbed = [result["others_cores"] for result in content["results"] if result["disturbed"]]
    lines = []
    if disturbed:
        lines += [
            "",
            f"**Not valid as a comparison**: other programs kept up to {max(disturbed):.1f} of "
            f"{content['machine']['cores']} cores busy meanwhile.",
        ]
    return lines + _verdicts([result for result in content["results"] if goals.on_gpu(result)])


def _verdicts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the faster of Flax's pipelines reaches the goals, and where it does not."""
    shares, ratios = [], []
    for result in results:
        timed, fed = rounds(result), best(result, tuple(FLAX_FED))
        if fed is None or result["disturbed"]:
            continue
        name, alone = f"{result['variant']} at batch {result['batch_size']}", result["step_alone"][fed]
        if result["variant"] in ("s", "b") and alone in timed:
            shares.append((name, times_as_fast(timed[fed], timed[alone])["ratio"]))
        if result["variant"] == "ti" and TIMM_FED in timed:
            ratios.append((name, times_as_fast(timed[fed], timed[TIMM_FED])["ratio"]))
    return [
        *goals.verdict(f"{goals.FED_SHARE:.0%} of the step alone", shares, goals.FED_SHARE, as_text=".1%"),
        *goals.verdict(f"{goals.FED_TIMES_AS_FAST} times timm's loader", ratios, goals.FED_TIMES_AS_FAST),
    ]


def _cells(result: Mapping[str, Any], side: str) -> list[str]:
    cells = [result["variant"], str(result["batch_size"]), result["dtype"], side]
    if side not in rounds(result):
        return [*cells, f"failed: {result['sides'][side]['failure'].replace('|', '/')}", "", ""]
    images = result["steps_per_call"] * result["batch_size"]
    rates = images_per_s(rounds(result)[side], images)
    return [*cells, "{median:.1f} ({min:.1f}-{max:.1f})".format(**rates), *_ratios(result, side)]


def _ratios(result: Mapping[str, Any], side: str) -> list[str]:
    """The share of the side's step alone; and how many times as fast as timm's it is, fed or alone as itself."""
    timed, step_alone = rounds(result), result["step_alone"]
    share = ratio = ""
    if step_alone[side] != side and step_alone[side] in timed:
        shares = {name: 100 * value for name, value in times_as_fast(timed[side], timed[step_alone[side]]).items()}
        share = "{ratio:.0f} % ({min:.0f}-{max:.0f})".format(**shares)
    other = TIMM_FED if step_alone[side] != side else step_alone[TIMM_FED]
    if other != side and other in timed:
        ratio = "{ratio:.2f} ({min:.2f}-{max:.2f})".format(**times_as_fast(timed[side], timed[other]))
    return [share, ratio]


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"
