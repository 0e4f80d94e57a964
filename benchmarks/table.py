"""The command `python -m benchmarks.table`: tables from the JSON that benchmarks wrote, and a plot of the ratios.

Files of one benchmark that were measured on one machine with the same versions share a table.
"""

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.machine import described, where
from benchmarks.ratios import Result, best, counts, failed, rounds, spread, times_as_fast
from convert.command_line import Parser

Content = Mapping[str, Any]  # of a JSON file

MODELS = ("inference", "training")  # the benchmarks whose tables are made here
_OTHERS = {  # modules of others, with an `as_markdown(content)` of their own
    "data": "data",
    "deploy": "deploy_report",
    "end_to_end": "end_to_end",
    "scaling": "scaling",
    "startup": "startup",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, draws the picture; returns the exit status: 0 done; 2 wrong flags, or files that do not do."""
    parser = Parser(
        prog="python -m benchmarks.table",
        description=__doc__.split("`: ", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what --json of a benchmark wrote")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw how fast Flax is beside the best of timm")
    args = parser.parse_args(argv)
    contents = [_read(parser, file) for file in args.files]
    try:
        print("\n\n".join(tables(contents)))
    except (AttributeError, KeyError, TypeError) as error:
        parser.error(f"a file is not as a benchmark wrote it ({type(error).__name__}: {error})")
    if args.plot:
        from benchmarks.plot import draw_ratios

        try:
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
    return importlib.import_module(f"benchmarks.{_OTHERS[benchmark]}").as_markdown(*contents)


def _read(parser: Parser, file: Path) -> Content:
    """Ends the program if it is no file that a benchmark wrote."""
    try:
        content = json.loads(file.read_bytes())
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
        lines += ["", _row(titles), _row("---" for _ in titles)]
        lines += [
            _row(_CELLS[title](result, side) for title in titles) for result in results for side in result["sides"]
        ]
    return lines


def notes(contents: Sequence[Content]) -> list[str]:
    """What has to be said under a table: what does not count, and which goals are reached."""
    results = _results(contents)
    lines = []
    disturbed = [result["others_cores"] for result in results if result["disturbed"]]
    if disturbed:
        lines += [
            "",
            f"**Not valid as a comparison**: other programs kept up to {max(disturbed):.1f} of "
            f"{contents[0]['machine']['cores']} cores busy meanwhile, which slows the sides unequally. Measure again "
            "on an idle machine.",
        ]
    incomplete = [result for result in results if failed(result, "timm")]
    if incomplete:
        which = "; ".join(f"{_name(result)}: {', '.join(failed(result, 'timm'))} failed" for result in incomplete)
        lines += ["", f"**Not beside timm at its best**: {which}. There the ratios are to what was left of timm."]
    return lines + _verdicts(contents[0]["benchmark"], results)


def _verdicts(benchmark: str, results: Sequence[Result]) -> list[str]:
    """Where the fastest side of Flax reaches the goals, and where it does not."""
    beside_timm = [
        (result, best(result, "flax"), best(result, "timm"))
        for result in results
        if counts(result) and best(result, "flax") and best(result, "timm")
    ]
    lines = []
    for device, times in goals.TIMES_AS_FAST.items():
        ratios = [
            (_name(result), times_as_fast(rounds(result)[ours], rounds(result)[theirs])["ratio"])
            for result, ours, theirs in beside_timm
            if result["device"] == device
        ]
        lines += goals.verdict(f"{times} times timm's best", ratios, times)
    shares = [
        (_name(result), share)
        for result in results
        if goals.on_gpu(result) and result["variant"] == "b" and not result["disturbed"]
        if (share := _share_of_peak(result, best(result, "flax"))) is not None
    ]
    least = goals.PEAK_SHARE[benchmark]
    lines += goals.verdict(f"{least:.0%} of the matmul peak", shares, least, as_text=".1%")
    if benchmark == "training":
        memory = [
            (_name(result), _peak_bytes(result, ours) / _peak_bytes(result, theirs))
            for result, ours, theirs in beside_timm
            if goals.on_gpu(result) and _peak_bytes(result, ours) and _peak_bytes(result, theirs)
        ]
        lines += goals.verdict("the peak memory of timm's best at most", memory, goals.PEAK_MEMORY, at_most=True)
    return lines


def _results(contents: Sequence[Content]) -> list[Result]:
    return [result for content in contents for result in content["results"]]


def _name(result: Result) -> str:
    name = f"{result['variant']} at batch {result['batch_size']}"
    return name if result["dtype"] == "float32" else f"{name} in {result['dtype']}"


def _titles(result: Result) -> tuple[str, ...]:
    """The columns of its table: some only where a side knows what belongs into them."""
    return tuple(
        title
        for title, cell in _CELLS.items()
        if title not in _WHERE_KNOWN or any(cell(result, side) for side in result["sides"])
    )


def _times(result: Result, side: str) -> str:
    if side not in rounds(result):
        return f"failed: {result['sides'][side]['failure'].replace('|', '/')}"
    milliseconds = spread([1000 * seconds for seconds in rounds(result)[side]])
    return "{median:.2f} ({min:.2f}-{max:.2f})".format(**milliseconds)


def _images_per_s(result: Result, side: str) -> str:
    times = rounds(result).get(side)
    return f"{result['batch_size'] / spread(times)['median']:.1f}" if times else ""


def _ratio(result: Result, side: str) -> str:
    best_timm = best(result, "timm")
    if best_timm is None or side not in rounds(result):
        return ""
    if side == best_timm:
        return "**best of timm that ran**" if failed(result, "timm") else "**best of timm**"
    return "{ratio:.2f} ({min:.2f}-{max:.2f})".format(**times_as_fast(rounds(result)[side], rounds(result)[best_timm]))


def _peak_bytes(result: Result, side: str) -> int | None:
    return result["sides"][side].get("peak_bytes")


def _peak_memory(result: Result, side: str) -> str:
    known = _peak_bytes(result, side)
    return "" if known is None else f"{known / 2**30:.2f}"


def _share_of_peak(result: Result, side: str | None) -> float | None:
    flops, peak, times = result.get("flops_per_call"), result.get("peak_flops"), rounds(result).get(side)
    return flops / spread(times)["median"] / peak if flops and peak and times else None


def _percent_of_peak(result: Result, side: str) -> str:
    share = _share_of_peak(result, side)
    return "" if share is None else f"{share:.0%}"


def _difference(result: Result, side: str) -> str:
    return "reference" if side == result["compared_with"] else _exponent(result["sides"][side].get("difference"))


def _from_float32(result: Result, side: str) -> str:
    return _exponent(result["sides"][side].get("from_float32"))


def _exponent(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


_CELLS: dict[str, Callable[[Result, str], str]] = {
    "variant": lambda result, side: result["variant"],
    "batch": lambda result, side: str(result["batch_size"]),
    "dtype": lambda result, side: result["dtype"],
    "side": lambda result, side: side,
    "ms per call, median (min-max)": _times,
    "images/s": _images_per_s,
    "times as fast as timm's best (min-max)": _ratio,
    "peak memory, GiB": _peak_memory,
    "of the matmul peak": _percent_of_peak,
    "difference": _difference,
    "from float32": _from_float32,
}
_WHERE_KNOWN = ("peak memory, GiB", "of the matmul peak", "from float32")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
