"""The command `python -m benchmarks.table`: tables from the JSON that benchmarks wrote, and a plot of the ratios.

Files of one benchmark that were measured on one machine with the same versions share a table.
"""

import argparse
import itertools
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.goals import fed_verdicts, model_verdicts
from benchmarks.result import (
    Content,
    Result,
    best,
    described,
    failed,
    images_per_s,
    in_words,
    markdown_table,
    name_of,
    peak_bytes,
    rounds,
    share_of_peak,
    spread,
    times_as_fast,
    where,
)
from benchmarks.rounds import ACCEPTED_OTHERS
from benchmarks.task import TIMM_FED
from convert.command_line import Parser, leave, run
from convert.files import check_replaceable, typed_path
from crossvit_jax.files import read_json

MODELS = ("inference", "training")  # the benchmarks whose files share tables
_OTHERS = {  # what makes the table of a file
    "data": "benchmarks.data:as_markdown",
    "deploy": "benchmarks.table:deploy_markdown",
    "detection": "benchmarks.detection:as_markdown",
    "end_to_end": "benchmarks.table:fed_markdown",
    "scaling": "benchmarks.scaling:as_markdown",
    "serving": "benchmarks.serving:as_markdown",
    "soak": "benchmarks.serving:soak_as_markdown",
    "startup": "benchmarks.startup:as_markdown",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, draws the picture; returns the exit status: 0 done; 2 wrong flags, or files that do not do."""
    parser = Parser(prog="python -m benchmarks.table", description=__doc__.split("`: ", 1)[1])
    parser.add_argument("files", nargs="+", type=typed_path, metavar="FILE", help="what --json of a benchmark wrote")
    parser.add_argument("--plot", type=typed_path, metavar="PNG", help="draw how fast Flax is beside the best of timm")
    args = parser.parse_args(argv)
    return run(parser.prog, lambda: _tell(parser, args))


def _tell(parser: Parser, args: argparse.Namespace) -> int:
    contents = [_read(parser, file) for file in args.files]
    try:
        print("\n\n".join(tables(contents)))
    except (AttributeError, KeyError, TypeError) as error:
        parser.error(f"a file is not as a benchmark wrote it ({type(error).__name__}: {error})")
    if args.plot:
        from benchmarks.report.plot import draw_ratios
        from train.pictures.figure import is_own_picture

        try:
            check_replaceable([args.plot], is_own_picture, inputs=args.files)
            draw_ratios([content for content in contents if content["benchmark"] in MODELS], args.plot)
        except (OSError, ValueError) as error:
            parser.error(f"--plot {args.plot}: {getattr(error, 'strerror', None) or error}")
    return 0


def tables(contents: Iterable[Content]) -> list[str]:
    """Markdown for each benchmark and machine, in the order of the files."""
    groups: dict[Any, list[Content]] = {}
    for number, content in enumerate(contents):
        alike = (content["benchmark"], described(content)) if content["benchmark"] in MODELS else number
        groups.setdefault(alike, []).append(content)
    return [_table(group) for group in groups.values()]


def _table(contents: Sequence[Content]) -> str:
    benchmark = contents[0]["benchmark"]
    if benchmark in MODELS:
        return "\n".join([*table_lines(contents), *notes(contents)])
    return pkgutil.resolve_name(_OTHERS[benchmark])(*contents)


def _read(parser: Parser, file: Path) -> Content:
    """Ends the program if it is no file that a benchmark wrote."""
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        parser.error(f"{file}: {getattr(error, 'strerror', None) or 'not JSON'}")
    if not isinstance(content, dict) or content.get("benchmark") not in (*MODELS, *_OTHERS):
        parser.error(f"{file}: not written by --json of {', '.join((*MODELS, *_OTHERS))}")
    return content


# --- inference and training ---


def table_lines(contents: Sequence[Content]) -> list[str]:
    """A line on what was measured where, and a table with a row per side.

    Results appended to the last content append lines to these, and change none: rows can be printed as they come.
    """
    lines = [f"CrossViT {contents[0]['benchmark']} on {where(*contents)}"]
    for titles, results in itertools.groupby(_results(contents), key=_titles):
        rows = [[_CELLS[title](result, side) for title in titles] for result in results for side in result["sides"]]
        lines += ["", *markdown_table(titles, rows)]
    return lines


def notes(contents: Sequence[Content]) -> list[str]:
    """What has to be said under a table: what does not count, and which goals are reached."""
    results = _results(contents)
    lines = _disturbed(contents, ", which slows the sides unequally. Measure again on an idle machine.")
    incomplete = [result for result in results if failed(result, "timm")]
    if incomplete:
        which = "; ".join(f"{name_of(result)}: {', '.join(failed(result, 'timm'))} failed" for result in incomplete)
        lines += ["", f"**Not beside timm at its best**: {which}. There the ratios are to what was left of timm."]
    return lines + model_verdicts(contents[0]["benchmark"], results)


def _disturbed(contents: Sequence[Content], ending: str = ".") -> list[str]:
    """A note if other programs computed meanwhile."""
    busy = [result["others_cores"] for result in _results(contents) if result["disturbed"]]
    if not busy:
        return []
    cores = f"up to {max(busy):.1f} of {contents[0]['machine']['cores']} cores"
    return ["", f"**Not valid as a comparison**: other programs kept {cores} busy meanwhile{ending}"]


def _results(contents: Sequence[Content]) -> list[Result]:
    return [result for content in contents for result in content["results"]]


def _titles(result: Result) -> tuple[str, ...]:
    """The columns of its table: some only where a side knows what belongs into them."""
    return tuple(
        title
        for title, cell in _CELLS.items()
        if title not in _WHERE_KNOWN or any(cell(result, side) for side in result["sides"])
    )


def _times(result: Result, side: str) -> str:
    if side not in rounds(result):
        return _failure(result, side)
    return in_words(spread([1000 * seconds for seconds in rounds(result)[side]]))


def _failure(result: Result, side: str) -> str:
    return f"failed: {result['sides'][side]['failure'].replace('|', '/')}"


def _images_per_s(result: Result, side: str) -> str:
    times = rounds(result).get(side)
    return f"{result['batch_size'] / spread(times)['median']:.1f}" if times else ""


def _ratio(result: Result, side: str) -> str:
    best_timm = best(result, "timm")
    if best_timm is None or side not in rounds(result):
        return ""
    if side == best_timm:
        return "**best of timm that ran**" if failed(result, "timm") else "**best of timm**"
    return _beside(result, side, best_timm)


def _beside(result: Result, side: str, other: str) -> str:
    """How many times as fast a side is as another."""
    return in_words(times_as_fast(rounds(result)[side], rounds(result)[other]))


def _peak_memory(result: Result, side: str) -> str:
    known = peak_bytes(result, side)
    return "" if known is None else f"{known / 2**30:.2f}"


def _difference(result: Result, side: str) -> str:
    return "reference" if side == result["compared_with"] else _known(result["sides"][side].get("difference"), ".1e")


def _known(value: float | None, as_text: str) -> str:
    return "" if value is None else format(value, as_text)


_CELLS: dict[str, Callable[[Result, str], str]] = {
    "variant": lambda result, side: result["variant"],
    "batch": lambda result, side: str(result["batch_size"]),
    "dtype": lambda result, side: result["dtype"],
    "side": lambda result, side: side,
    "ms per call, median (min-max)": _times,
    "images/s": _images_per_s,
    "times as fast as timm's best (min-max)": _ratio,
    "peak memory, GiB": _peak_memory,
    "of the matmul peak": lambda result, side: _known(share_of_peak(result, side), ".0%"),
    "difference": _difference,
    "from float32": lambda result, side: _known(result["sides"][side].get("from_float32"), ".1e"),
}
_WHERE_KNOWN = ("peak memory, GiB", "of the matmul peak", "from float32")


# --- end to end ---

_FED_TITLES = (
    *("variant", "batch", "dtype", "side", "images/s, median (min-max)"),
    *("of its step alone (min-max)", "times as fast as timm (min-max)"),
)


def fed_markdown(content: Content) -> str:
    """What was measured where, a table with a row per side, and what has to be said of it."""
    return "\n".join([*fed_lines(content), *_disturbed([content]), *fed_verdicts(content["results"])])


def fed_lines(content: Content) -> list[str]:
    """The line above the table, and the table. More results append lines to these, and change none."""
    rows = [_fed_cells(result, side) for result in content["results"] for side in result["sides"]]
    return [
        f"Training with the input pipeline, {content['images']:,} JPEG files of 500 x 375, {content['workers']} "
        f"workers; {where(content)}",
        "",
        *markdown_table(_FED_TITLES, rows),
    ]


def _fed_cells(result: Result, side: str) -> list[str]:
    """The ratios are the share of the side's step alone; and how many times as fast as timm's it is, fed or alone."""
    cells = [result["variant"], str(result["batch_size"]), result["dtype"], side]
    timed, step_alone = rounds(result), result["step_alone"]
    if side not in timed:
        return [*cells, _failure(result, side), "", ""]
    images = result["steps_per_call"] * result["batch_size"]
    alone, share, ratio = step_alone[side], "", ""
    if alone != side and alone in timed:
        shares = {name: 100 * value for name, value in times_as_fast(timed[side], timed[alone]).items()}
        share = "{ratio:.0f} % ({min:.0f}-{max:.0f})".format(**shares)
    other = TIMM_FED if alone != side else step_alone[TIMM_FED]
    if other != side and other in timed:
        ratio = _beside(result, side, other)
    return [*cells, in_words(images_per_s(timed[side], images), ".1f"), share, ratio]


# --- deploy ---


def deploy_markdown(content: Content) -> str:
    """For each model, a line on what was measured and a table with a row per form; at the end a line on the machine."""
    lines = []
    for result in content["results"]:
        held_out = f"{result['held_out_images']} held-out images ({result['held_out_split']})"
        unreadable = f", {result['unreadable_images']} more could not be read" if result["unreadable_images"] else ""
        faster = "times as fast as torch (min-max)"
        speeds = [(f"batch {size}: {'ms' if size == 1 else 'images/s'}", faster) for size in _batch_sizes(result)]
        titles = ["form", "MB", "% of ONNX float32", *itertools.chain(*speeds), "top-1, %", "points"]
        lines += [
            f"CrossViT {result['variant']} at {' x '.join(map(str, result['image_size']))} pixels, {result['run']}; "
            f"top-1 on {result['images']} of {held_out}{unreadable}; static int8 calibrated on "
            f"{result['calibration_images']} training images",
            "",
            *markdown_table([*titles, "logits differ by"], [_form_cells(result, name) for name in result["forms"]]),
            "",
            *(f"{failure}\n" for failure in failures(result)),
        ]
        if result["others_cores"] is not None and result["others_cores"] > ACCEPTED_OTHERS:
            busy = f"{result['others_cores']:.1f}"
            lines += [f"**Times not valid**: other programs kept {busy} cores busy meanwhile.", ""]
    lines.append(
        "Points: how far top-1 is above that of float32. Logits: the largest difference, for int8 the root mean square "
        f"one. {where(content)}"
    )
    return "\n".join(lines)


def failures(result: Result) -> list[str]:
    """What went wrong with a deployed model, with the form's name and batch size."""
    return [
        f"{name} at batch {size}: {form['batches'][str(size)]['failure']}"
        for size in _batch_sizes(result)
        for name, form in result["forms"].items()
        if form["batches"][str(size)]["failure"] is not None
    ]


def _batch_sizes(result: Result) -> list[int]:
    return [int(size) for size in next(iter(result["forms"].values()))["batches"]]


def _form_cells(result: Result, name: str) -> list[str]:
    form, forms, reference = result["forms"][name], result["forms"], result["compared_with"]
    cells = [name, f"{form['bytes'] / 1e6:.1f}{' in memory' if form['runs_in'] == 'qwix' else ''}"]
    cells.append(_known(form["percent_of_onnx_float32"], ".1f"))
    for size in _batch_sizes(result):
        batch = form["batches"][str(size)]
        if batch["failure"] is not None:
            cells += ["failed", ""]
            continue
        seconds = batch["median_s_per_call"]
        cells.append(f"{1000 * seconds:.2f}" if size == 1 else f"{size / seconds:.1f}")
        at_size = {"sides": {side: known["batches"][str(size)] for side, known in forms.items()}}
        cells.append(_beside(at_size, name, reference) if name != reference and reference in rounds(at_size) else "")
    cells += [_known(form["top1"], ".2f"), "" if name == reference else _known(form["points_from_float32"], "+.2f")]
    far = [(b["difference"], b["difference_of"]) for b in form["batches"].values() if "difference_of" in b]
    return [*cells, "{:.1e} of the {}".format(*max(far)) if far else ""]


if __name__ == "__main__":
    leave(main())
