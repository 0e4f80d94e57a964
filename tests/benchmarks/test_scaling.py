"""`python -m benchmarks.scaling`: the arithmetic from compiled programs to seconds, and what is refused."""

import dataclasses
import json

import pytest

from benchmarks import scaling
from benchmarks.scaling import CHIPS, Chip, as_json, as_markdown, estimate, main
from train.cost.figures import Figures
from train.cost.hlo import Traffic
from train.recipes import RECIPES


def _figures(**changes) -> Figures:
    settings = {field.name: None for field in dataclasses.fields(Figures)} | {
        "config": dataclasses.replace(RECIPES["imagenet"], variant="ti", batch_size=256, precision="bfloat16"),
        "slice": "v5e:2x2",
        "devices": 4,
        "device_kind": "TPU v5 lite",
        "needed": 2**30,
        "flops": 10**12,
        "cycles": 15_000_000,
        "seconds": 1.0,
        "traffic": {"all-reduce": Traffic(calls=1, volume=10**8, sent=1.5e8), "all-gather": Traffic(1, 1, 0.5e8)},
    }
    return Figures(**settings | changes)


def test_a_chips_clock_is_the_one_at_which_its_matrix_units_reach_the_published_peak():
    chip = Chip(peak=197e12, flops_per_cycle=4 * 2 * 128**2, links=200e9, axes=2)
    assert chip.clock == pytest.approx(1.503e9, rel=1e-3)
    assert chip.ring == 100e9


def _cells(*results) -> list[str]:
    """Of the table's last row."""
    table = as_markdown(as_json(results)).splitlines()
    assert {line.count("|") for line in table[2:]} == {table[-1].count("|")}
    return [cell.strip() for cell in table[-1].strip("|").split("|")]


def test_a_step_lies_between_hiding_all_communication_and_hiding_none():
    found = estimate(_figures())
    assert found["compute_s"] == pytest.approx(15_000_000 / CHIPS["TPU v5 lite"].clock)
    assert found["communication_s"] == pytest.approx(2e8 / 100e9)
    shortest, longest = (float(part) for part in _cells(found)[-3].split("-"))
    assert shortest == pytest.approx(1000 * found["compute_s"], abs=0.05)
    assert longest == pytest.approx(1000 * found["compute_s"] + 2, abs=0.05)
    assert _cells(estimate(_figures(cycles=1)))[-3] == "2.0-2.0"


def test_efficiency_is_measured_against_the_first_slice():
    first = estimate(_figures(slice="v5e:1x1", devices=1, traffic={}))
    cells = _cells(first, estimate(_figures()))
    assert cells[:3] == ["v5e:2x2", "4", "256"]
    assert cells[-1] == f"{first['compute_s'] / (first['compute_s'] + 0.002):.0%}"
    assert float(cells[-2].replace(",", "")) == pytest.approx(256 / (first["compute_s"] + 0.002), abs=0.5)


def test_the_json_says_how_it_was_estimated_with_which_versions_and_holds_every_figure():
    told = json.loads(json.dumps(as_json([estimate(_figures())])))
    assert "No TPU is involved" in told["method"]
    assert told["machine"]["cpu"] and told["software"]["jax"]
    (row,) = told["results"]
    assert (row["devices"], row["batch_size"], row["cycles"]) == (4, 256, 15_000_000)
    assert row["traffic"]["all-reduce"]["volume"] == 10**8
    assert row["compute_s"] > row["communication_s"] > 0


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that answers at once, for slices of one to four chips of `kind`."""

    def _compiler(kind="TPU v5 lite", **changes):
        device = type("Device", (), {"device_kind": kind})()
        monkeypatch.setattr("train.cost.slices.prepare_environment", lambda: None)
        monkeypatch.setattr(
            "train.cost.slices.slice_devices", lambda topology: [device] * (4 if "2x2" in topology else 1)
        )
        asked = []

        def compile_step(config, num_classes, topology):
            asked.append((topology, config.batch_size, num_classes))
            return _figures(slice=topology, config=config, **changes)

        monkeypatch.setattr(scaling, "compile_step", compile_step)
        return asked

    return _compiler


def test_every_chip_gets_as_many_images(compiler, capsys, tmp_path):
    asked = compiler()
    file = tmp_path / "scaling.json"
    assert main(["--topology", "v5e:1x1", "v5e:2x2", "--batch-size", "32", "--json", str(file)]) == 0
    assert asked == [("v5e:1x1", 32, 1000), ("v5e:2x2", 128, 1000)]
    assert capsys.readouterr().out.count("\n| v5e:") == 2
    assert [row["slice"] for row in json.loads(file.read_text())["results"]] == ["v5e:1x1", "v5e:2x2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"too_much": "does not fit: a step needs 20 GiB"}, "v5e:2x2: does not fit"),
        ({"cycles": None}, "v5e:2x2: the compiler gives no estimate of its cycles"),
    ],
)
def test_a_slice_without_an_estimate_is_one_line_and_status_1(compiler, capsys, changes, message):
    compiler(**changes)
    assert main(["--topology", "v5e:2x2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_chip_without_published_figures_is_refused_before_anything_is_compiled(compiler, capsys):
    asked = compiler(kind="TPU v9")
    assert main(["--topology", "v9:2x2"]) == 2
    assert "no published figures of TPU v9" in capsys.readouterr().err
    assert not asked
