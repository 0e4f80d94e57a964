"""The search for the largest batch, with programs whose memory is known."""

import collections
import dataclasses
from types import SimpleNamespace

import pytest

from train.cost import fit
from train.cost.fit import largest_batches
from train.cost.gpus import GPUS
from train.recipes import RECIPES

_FIXED, _IMAGE = 300e6, 20e6  # bytes


@pytest.fixture
def compiled(monkeypatch):
    """Batches that were compiled, and where; memory of a device is linear in the batch but for what `bend` adds, and on
    an H100 `more` times as much an image."""
    calls = []

    def compile_step(config, num_classes, topology):
        calls.append((topology, config.batch_size, config.grad_checkpointing, config.grad_accum))
        devices = int(topology.partition(":")[2] or 1)
        image = _IMAGE / config.grad_accum / (4 if config.grad_checkpointing else 1)
        image *= compile_step.more if topology.startswith("h100") else 1
        return SimpleNamespace(needed=_FIXED + image * config.batch_size / devices + bend_of(config.batch_size))

    def bend_of(batch):
        return compile_step.bend if batch > 100 else 0

    compile_step.bend, compile_step.more, compile_step.calls = 0, 1, calls
    monkeypatch.setattr(fit, "compile_step", compile_step)
    monkeypatch.setattr(fit, "check_case", lambda config, num_classes, topology: None)
    monkeypatch.setattr(fit, "_devices", lambda topology: int(topology.partition(":")[2] or 1))
    return compile_step


def _expected(available, unit, per_image):
    return int((available - _FIXED) / per_image) // unit * unit


def test_the_largest_batch_is_computed_from_two_and_confirmed(compiled):
    told = []
    (found,) = largest_batches(RECIPES["imagenet"], 1000, ["a4000"], told.append)
    assert [line.partition(" needs ")[0] for line in told[:3]] == [
        "ti on a4000: a batch of 32",
        "ti on a4000: a batch of 64",
        f"ti on a4000: a batch of {found.batches['none']}",
    ]
    assert len(told) == len(compiled.calls) == 12
    assert told[3].startswith("ti on a4000 --grad-checkpointing: a batch of 32 needs ")
    available = int(0.75 * 16_900_000_000)
    assert found.available == GPUS["a4000"].available == available
    assert found.batches == {
        "none": _expected(available, 8, _IMAGE),
        "grad_checkpointing": _expected(available, 8, _IMAGE / 4),
        "grad_accum": _expected(available, 32, _IMAGE / 4),
        "both": _expected(available, 32, _IMAGE / 16),
    }
    assert all(needed <= available for needed in found.needed.values())
    assert [batch for _, batch, checkpointing, parts in compiled.calls if parts == 1 and not checkpointing] == [
        *(32, 64),
        found.batches["none"],
    ]


def test_all_cards_share_what_two_batches_tell(compiled):
    small, large, largest = largest_batches(RECIPES["imagenet"], 1000, ["a4000", "rtx3090", "h100"])
    assert small.batches["none"] < large.batches["none"] < largest.batches["none"]
    counts = collections.Counter(topology for topology, *_ in compiled.calls)
    assert counts == {"a4000": 4 * 3, "rtx3090": 4, "h100": 4}  # one each to confirm


@pytest.mark.parametrize("more", [0.97, 1.03])
def test_what_a_capability_takes_more_or_less_is_found(compiled, more):
    compiled.more = more
    *_, found = largest_batches(RECIPES["imagenet"], 1000, ["a4000", "h100"])
    available = GPUS["h100"].available
    assert found.batches == {
        "none": _expected(available, 8, more * _IMAGE),
        "grad_checkpointing": _expected(available, 8, more * _IMAGE / 4),
        "grad_accum": _expected(available, 32, more * _IMAGE / 4),
        "both": _expected(available, 32, more * _IMAGE / 16),
    }


def test_several_cards_hold_a_batch_together(compiled):
    (found,) = largest_batches(RECIPES["imagenet"], 1000, ["a4000:2"])
    assert found.batches["none"] == _expected(GPUS["a4000"].available, 16, _IMAGE / 2)


def test_a_batch_that_turns_out_too_large_is_made_smaller_until_it_fits(compiled):
    compiled.bend = 1e9
    (found,) = largest_batches(RECIPES["imagenet"], 1000, ["a4000"])
    available = GPUS["a4000"].available
    assert found.batches["none"] == _expected(available - 1e9, 8, _IMAGE)
    assert found.needed["none"] <= available


def test_a_model_that_does_not_fit_at_all_has_no_batch(compiled, monkeypatch):
    monkeypatch.setitem(GPUS, "a4000", dataclasses.replace(GPUS["a4000"], memory=100_000_000))
    (found,) = largest_batches(RECIPES["imagenet"], 1000, ["a4000"])
    assert set(found.batches.values()) == {0}
