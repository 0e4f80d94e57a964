"""The command `python -m benchmarks.table`: tables from the JSON that benchmarks wrote, and a plot of the ratios.

Results of models that were measured on one machine with the same versions share a table.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.result import (
    Content,
    Result,
    best,
    described,
    failed,
    images_per_s,
    markdown_table,
    rounds,
    spread,
    times_as_fast,
    where,
)
from convert.command_line import Parser, leave, run
from convert.errors import SettingsError
from convert.files import check_replaceable, typed_path
from crossvit_jax.files import read_json

Cell = Callable[[Any, str], str]  # of a row: a result, and a side of it


@dataclass(frozen=True)
class Layout:
    """How a benchmark's results are shown."""

    title: str  # with names of a result in braces
    columns: Sequence[tuple[str, Cell]]  # those of which no row knows anything are left out
    rivals: str = "timm"  # the sides whose names begin so: the fastest of them is compared with
    rows: Callable[[Sequence[Result]], list[tuple[Any, str]]] = lambda results: [
        (result, side) for result in results for side in result["sides"]
    ]
    more: Callable[[Sequence[Result]], list[str]] = lambda results: []  # lines under the table


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, draws the picture; returns the exit status: 0 done; 2 wrong flags, or files that do not do."""
    parser = Parser(prog="python -m benchmarks.table", description=__doc__.split("`: ", 1)[1])
    parser.add_argument("files", nargs="+", type=typed_path, metavar="FILE", help="what --json of a benchmark wrote")
    parser.add_argument("--plot", type=typed_path, metavar="PNG", help="draw how fast Flax is beside the best of timm")
    args = parser.parse_args(argv)

    def tell() -> int:
        contents = list(map(_read, args.files))
        try:
            print("\n\n".join(tables(contents)))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise SettingsError(f"a file is not as a benchmark wrote it ({type(error).__name__}: {error})") from None
        if args.plot:
            from benchmarks.plot import draw_ratios
            from train.pictures.figure import is_own_picture

            check_replaceable([args.plot], is_own_picture, inputs=args.files)
            draw_ratios([content for content in contents if content["benchmark"] in MODELS], args.plot)
        return 0

    return run(parser.prog, tell)


def _read(file: Path) -> Content:
    """Raises SettingsError if it is no file that a benchmark wrote."""
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file}: {getattr(error, 'strerror', None) or 'not JSON'}") from None
    if not isinstance(content, dict) or content.get("benchmark") not in LAYOUTS:
        raise SettingsError(f"{file}: not written by --json of {', '.join(LAYOUTS)}")
    return content


def tables(contents: Iterable[Content]) -> list[str]:
    """Markdown for what each benchmark measured on each machine, in the order of the files."""
    groups: dict[Any, list[tuple[Content, Result]]] = {}
    for number, content in enumerate(contents):
        benchmark, file = content["benchmark"], None if content["benchmark"] in MODELS else number
        for result in content["results"]:
            alike = (benchmark, described(content), LAYOUTS[benchmark].title.format_map(result), file)
            groups.setdefault(alike, []).append((content, result))
    return ["\n".join(_table(LAYOUTS[kind], title, group)) for (kind, _, title, _), group in groups.items()]


def _table(layout: Layout, title: str, group: Sequence[tuple[Content, Result]]) -> list[str]:
    """What was measured where, a row for each side, and what has to be said of it."""
    contents, results = zip(*group, strict=True)
    rows = layout.rows(results)
    columns = [(title, [cell(*row) for row in rows]) for title, cell in layout.columns]
    titles, cells = zip(*(column for column in columns if any(column[1])), strict=True)
    lines = [f"{title}; {where(contents)}", "", *markdown_table(titles, zip(*cells, strict=True))]
    busy = [result["others_cores"] for result in results if result["disturbed"]]
    if busy:
        cores = f"up to {max(busy):.1f} of {contents[0]['machine']['cores']} cores"
        lines += ["", f"**Not valid as a comparison**: other programs kept {cores} busy meanwhile."]
    if any(failed(result, layout.rivals) for result in results):
        lines += ["", f"**Not beside {layout.rivals} at its best**: a side of it failed."]
    return lines + layout.more(results)


# --- cells ---


def _in_words(figures: Iterable[float], form: str = ".2f", scale: float = 1) -> str:
    """The first figure, and in brackets the range."""
    first, smallest, largest = (format(scale * value, form) for value in figures)
    return f"{first} ({smallest}-{largest})"


def _setting(name: str) -> Cell:
    return lambda result, side: str(result[name])


def _told(name: str, form: str, scale: float = 1) -> Cell:
    """A figure that a side may have told of itself."""

    def cell(result: Result, side: str) -> str:
        value = result["sides"][side].get(name)
        return "" if value is None else format(scale * value, form)

    return cell


def _figures(
    of: Callable[[Result, str], Sequence[float]], form: str, *, median_only: bool = False, says_why: bool = True
) -> Cell:
    """Median and range of a side that was timed; another one `says_why` it was not, or nothing."""

    def cell(result: Result, side: str) -> str:
        if side in rounds(result):
            return format(of(result, side)[0], form) if median_only else _in_words(of(result, side), form)
        return f"failed: {result['sides'][side]['failure'].replace('|', '/')}" if says_why else ""

    return cell


def _seconds(form: str, scale: float, **how: bool) -> Cell:
    return _figures(lambda result, side: [scale * one for one in spread(rounds(result)[side])], form, **how)


def _beside(other: str | Callable[[Result, str], str | None], form: str = ".2f", scale: float = 1) -> Cell:
    """How many times as fast a side is as another, or as what that gives for a result and a side; None: as none."""

    def cell(result: Result, side: str) -> str:
        timed, name = rounds(result), other if isinstance(other, str) else other(result, side)
        return _in_words(times_as_fast(timed[side], timed[name]), form, scale) if {side, name} <= timed.keys() else ""

    return cell


def _beside_best(whose: str) -> tuple[str, Cell]:
    def cell(result: Result, side: str) -> str:
        fastest = best(result, whose)
        if side == fastest:
            return f"**best of {whose}{' that ran' if failed(result, whose) else ''}**"
        return _beside(lambda *_: fastest)(result, side)

    return f"times as fast as {whose}'s best (min-max)", cell


def _difference(result: Result, side: str) -> str:
    return "reference" if side == result["reference"] else _told("difference", ".1e")(result, side)


def _share_of_peak(result: Result, side: str) -> str:
    flops, peak, seconds = result["flops_per_call"], result["peak_flops"], rounds(result).get(side)
    return f"{flops / spread(seconds)[0] / peak:.0%}" if flops and peak and seconds else ""


_SIDE = ("side", lambda result, side: side)
_SETTINGS = (("variant", _setting("variant")), ("batch", _setting("batch_size")), ("dtype", _setting("dtype")), _SIDE)
_TIME = ("ms per call, median (min-max)", _seconds(".2f", 1000))
_PER_S = ("images/s", _figures(images_per_s, ".1f", median_only=True, says_why=False))
_RATES = ("images/s, median (min-max)", _figures(images_per_s, ".1f"))
_KNOWN = (
    ("peak memory, GiB", _told("peak_bytes", ".2f", 2**-30)),
    ("of the matmul peak", _share_of_peak),
    *(("difference", _difference), ("from float32", _told("from_float32", ".1e"))),
)
_MODEL_COLUMNS = (*_SETTINGS, _TIME, _PER_S, _beside_best("timm"), *_KNOWN)
_BENCHMARK = ("benchmark", _setting("benchmark"))
_DETECTOR_COLUMNS = (_BENCHMARK, *_SETTINGS, _TIME, _PER_S, _beside_best("torchvision"), *_KNOWN)

# --- end to end: shares of the step alone, and ratios to timm of what is fed alike ---

_ALONE = {"flax-device": "flax", "flax-host": "flax", "timm-loader": "timm"}
_FED_ALIKE = {"flax": "timm", "flax-device": "timm-loader", "flax-host": "timm-loader"}


def _percent(result: Result, side: str) -> str:
    return _beside(lambda _, side: _ALONE.get(side), ".0f", 100)(result, side).replace(" ", " % ", 1)


_FED_COLUMNS = (
    *(*_SETTINGS, _RATES, ("of its step alone (min-max)", _percent)),
    ("times as fast as timm (min-max)", _beside(lambda _, side: _FED_ALIKE.get(side))),
)

# --- the input pipeline, starts, several models ---


def _beside_timm(result: Result, side: str) -> str:
    return "beside the workers" if side == "device-augment" else _beside("timm")(result, side)


_DATA_COLUMNS = (
    *(_SIDE, (_RATES[0], _figures(images_per_s, ".0f"))),
    ("times as fast as timm (min-max)", _beside_timm),
)
_START_COLUMNS = (
    *(("start", _SIDE[1]), ("seconds, median (min-max)", _seconds(".1f", 1))),
    # seconds of the second start for one of the first
    ("share of the first (min-max)", lambda result, side: _beside(side)(result, "first")),
)
_ACCURACY_COLUMNS = (
    *(("weights", _SIDE[1]), ("parameters", _told("parameters", ",")), ("GMAC", _told("macs", ".3f", 1e-9)), _PER_S),
    ("times as fast as the first (min-max)", _beside(lambda result, side: result["reference"])),
    ("top-1, %", _told("top1", ".2f")),
)

# --- deployed forms: a row has the results at both batch sizes ---


def _at(size: int, cell: Cell) -> Cell:
    return lambda at, side: cell(at[size], side)


def _megabytes(result: Result, side: str) -> str:
    told = result["sides"][side]
    return f"{told['bytes'] / 1e6:.1f}{' in memory' if told['runs_in'] == 'qwix' else ''}"


def _logits(at: dict[int, Result], side: str) -> str:
    told = [result["sides"][side] for result in at.values()]
    far = [(one["difference"], one["difference_of"]) for one in told if "difference_of" in one]
    return "{:.1e} of the {}".format(*max(far)) if far else ""


_BESIDE_TORCH = _beside(lambda result, side: None if side == result["reference"] else result["reference"])
_DEPLOYED_COLUMNS = (
    ("form", lambda at, side: side),
    ("MB", _at(1, _megabytes)),
    ("% of ONNX float32", _at(1, _told("percent_of_onnx_float32", ".1f"))),
    ("batch 1: ms", _at(1, _seconds(".2f", 1000, median_only=True))),
    ("times as fast as torch (min-max)", _at(1, _BESIDE_TORCH)),
    ("batch 8: images/s", _at(8, _figures(images_per_s, ".1f", median_only=True))),
    ("times as fast as torch (min-max)", _at(8, _BESIDE_TORCH)),
    ("top-1, %", _at(1, _told("top1", ".2f"))),
    ("points", _at(1, _told("points_from_float32", "+.2f"))),
    ("logits differ by", _logits),
)
_POINTS = "Points: top-1 above that of float32. Logits: the largest difference, for int8 the root mean square."
_DEPLOYED_TITLE = (
    "CrossViT {variant} at {image_size[0]} x {image_size[1]} pixels, {run}; top-1 on {images} of {held_out_images} "
    "held-out images ({held_out_split}), {unreadable_images} more could not be read; static int8 calibrated on "
    "{calibration_images} training images"
)


def _forms(results: Sequence[Result]) -> list[tuple[dict[int, Result], str]]:
    return [({result["batch_size"]: result for result in results}, side) for side in results[0]["sides"]]


# --- servers ---


def _served(results: Sequence[Result]) -> list[str]:
    """Loads and memory of a server."""
    rows, soak = [], results[0]["soak"]
    for load in results[0]["loads"]:
        waits = ["-" if load[name] is None else f"{1000 * load[name]:.0f}" for name in ("p50_s", "p99_s")]
        figures = [f"{load['rejected']:.1%}", f"{load['batch_pictures']:.1f}", f"{1000 * load['batch_s']:.0f}"]
        statuses = _listed(load["statuses"])
        rows.append([f"{load['share']:.0%}", f"{load['answered_per_s']:.1f}", *waits, *figures, statuses])
    titles = ["load", "answers/s", "p50 ms", "p99 ms", "rejected", "pictures a batch", "ms a batch", "statuses"]
    sizes = ", ".join("-" if size is None else f"{size / 2**20:.0f}" for size in soak["memory_bytes"])
    return [
        *("", "Loads are open: requests come at random times. Generator and server share the cores.", ""),
        *markdown_table(titles, rows),
        *("", f"Memory after each tenth of {_listed(soak['statuses'])} answers: {sizes} MiB"),
    ]


_SERVING_COLUMNS = (
    *(_SIDE, _RATES),
    ("times as fast as train.predict", _beside("train.predict")),
    ("times as fast as without batches", _beside("one at a time")),
)


def _listed(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count} of {status}" for status, count in sorted(statuses.items()))


MODELS = ("inference", "training")
LAYOUTS = {
    "inference": Layout("CrossViT inference", _MODEL_COLUMNS),
    "training": Layout("CrossViT training", _MODEL_COLUMNS),
    "detection": Layout("CrossViT detector", _DETECTOR_COLUMNS, "torchvision"),
    "end_to_end": Layout(
        "Training with the input pipeline, {files:,} JPEG files of 500 x 375, {workers} workers", _FED_COLUMNS
    ),
    "data": Layout("{batch_size} JPEG photographs of 500 x 375 to a training batch at 240 pixels", _DATA_COLUMNS),
    "startup": Layout("`python -m train.main {flags}`, to the end of the first step", _START_COLUMNS),
    "deploy": Layout(_DEPLOYED_TITLE, _DEPLOYED_COLUMNS, "torch", rows=_forms, more=lambda results: ["", _POINTS]),
    "accuracy": Layout("{dataset}, top-1 on {images} images ({held_out_split})", _ACCURACY_COLUMNS),
    "serving": Layout("`train.serve --weights {weights} --max-batch {batch_size}`", _SERVING_COLUMNS, more=_served),
}


if __name__ == "__main__":
    leave(main())
