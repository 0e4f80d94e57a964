"""How long a step would take on a slice of TPUs: from cycles and bytes to seconds, and how it is told."""

import dataclasses

import pytest

from train.cost.figures import Figures
from train.cost.hlo import Traffic
from train.cost.report import as_json, columns, describe
from train.cost.slices import CHIPS, Chip, Estimate, estimate
from train.recipes import RECIPES

_TRAFFIC = {"all-reduce": Traffic(calls=1, volume=10**8, sent=1.5e8), "all-gather": Traffic(1, 1, 0.5e8)}


def _figures(**changes) -> Figures:
    settings = {field.name: None for field in dataclasses.fields(Figures)} | {
        "config": dataclasses.replace(RECIPES["imagenet"], variant="ti", batch_size=256, precision="bfloat16"),
        "slice": "v5e:2x2",
        "devices": 4,
        "device_kind": "TPU v5 lite",
        "flops": 10**12,
        "cycles": 15_000_000,
        "seconds": 1.0,
        "inference": False,
        "traffic": _TRAFFIC,
        "estimate": estimate("TPU v5 lite", 15_000_000, _TRAFFIC),
    }
    return Figures(**settings | changes)


def test_a_chips_clock_is_the_one_at_which_its_matrix_units_reach_the_published_peak():
    chip = Chip(peak=197e12, flops_per_cycle=4 * 2 * 128**2, links=200e9, axes=2)
    assert chip.clock == pytest.approx(1.503e9, rel=1e-3)
    assert chip.ring == 100e9


def test_a_step_lies_between_hiding_all_communication_and_hiding_none():
    found = estimate("TPU v5 lite", 15_000_000, _TRAFFIC)
    compute = 15_000_000 / CHIPS["TPU v5 lite"].clock
    assert found == Estimate(pytest.approx(compute), pytest.approx(2e8 / 100e9))
    assert (found.shortest, found.longest) == (pytest.approx(compute), pytest.approx(compute + 0.002))
    assert estimate("TPU v5 lite", 1, _TRAFFIC).shortest == pytest.approx(0.002)


@pytest.mark.parametrize(("kind", "cycles"), [("TPU v9", 1), ("TPU v5 lite", None), ("cpu", None)])
def test_without_cycles_or_published_figures_there_is_no_estimate(kind, cycles):
    assert estimate(kind, cycles, {}) is None


def test_the_time_is_told_in_the_lines_of_a_case_in_tables_and_in_the_report():
    figures = _figures()
    (line,) = (line for line in describe(figures, 1000).splitlines() if line.startswith("estimated time"))
    assert line == (
        "estimated time per step: 9.98 ms of computing and 2.00 ms of communication, 10.0-12.0 ms together: "
        "at least 21,369 images/s [nothing was run]"
    )
    told = {title: cell(figures) for title, cell in columns(on_tpus=True).items()}
    assert (told["compute, ms"], told["communication, ms"], told["step, ms"]) == ("10.0", "2.00", "10.0-12.0")
    assert told["images/s"] == "at least 21,369"
    with_kernels = _figures(own_kernels=6)
    assert columns(on_tpus=True)["images/s"](with_kernels) == "without our own kernels 21,369"
    assert "15 M, without those of 6 calls of our own kernels [" in describe(with_kernels, 1000)
    assert columns(on_tpus=True)["step, ms"](_figures(estimate=None)) == "-"
    assert "step, ms" not in columns(on_gpus=True)
    assert as_json(figures)["estimate"]["communication"] == pytest.approx(0.002)
