"""RandAugment strings mean on the device what they mean to timm; what it does not know is refused in one line."""

import dataclasses

import pytest
from timm.data import auto_augment

from convert.errors import SettingsError
from train.compile import main as compile_main
from train.flags import parse_flags
from train.images.augment import OPERATIONS
from train.images.rand_augment import check_augment_on, device_can_augment, parse_rand_augment
from train.job import augment_on, prepare
from train.recipes import RECIPES

_KNOWN = ["rand", "rand-m9-mstd0.5-inc1", "rand-inc1-p0.25-m0-n3", "rand-m7-inc0", "rand-mstd1-n1-p1"]
_UNKNOWN = ["original", "v0-mstd0.5", "augmix-m5", "3a", "rand-m11", "rand-tweights", "rand-m9-mmax30", "rand-mstd101"]
_UNKNOWN += ["rand-m9.5", "rand-m", "rand-m9-m8", "rand-inc2", "rand-p2", "rand-", "rand-w0", "rand-m٣"]


@pytest.mark.parametrize("text", _KNOWN)
def test_a_string_means_what_it_means_to_timm(text):
    timms = auto_augment.rand_augment_transform(text, {"img_mean": (0, 0, 0)})
    ours = parse_rand_augment(text)
    assert ours.layers == timms.num_layers
    assert timms.choice_weights is None
    assert len(timms.ops) == len(OPERATIONS)
    for op in timms.ops:
        assert op.name.removesuffix("Increasing") in OPERATIONS
        assert (op.magnitude, op.magnitude_std, op.prob) == (ours.magnitude, ours.noise, ours.prob)
    assert ours.increasing == ("ColorIncreasing" in {op.name for op in timms.ops})


def test_no_string_means_no_operations():
    assert parse_rand_augment("").layers == 0


@pytest.mark.parametrize("text", _UNKNOWN)
def test_what_the_device_does_not_know_is_refused_with_what_it_does(text):
    with pytest.raises(SettingsError, match="augment_on device takes as auto_augment rand with") as error:
        check_augment_on(dataclasses.replace(RECIPES["imagenet"], augment_on="device", auto_augment=text))
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_does_not_begin_with_it():
    with pytest.raises(SettingsError, match="augment_on device takes as auto_augment rand with"):
        prepare(dataclasses.replace(RECIPES["digits"], augment_on="device", auto_augment="original"))


def test_a_wrong_place_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_flags(["--augment-on=gpu"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "augment_on must be device or host; got gpu" in error and error.count("\n") == 1


def test_what_a_run_would_refuse_is_not_compiled_either(capsys):
    assert compile_main(["--augment-on=device", "--auto-augment=original"]) == 2
    error = capsys.readouterr().err
    assert "augment_on device takes as auto_augment" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("backend", "auto_augment", "saved", "expected"),
    [
        ("gpu", "rand-m9-mstd0.5-inc1", None, "device"),
        ("gpu", "", None, "device"),
        ("gpu", "original", None, "host"),
        ("cpu", "rand-m9-mstd0.5-inc1", None, "host"),
        ("tpu", "rand-m9-mstd0.5-inc1", None, "host"),
        ("cpu", "rand-m9-mstd0.5-inc1", {"train": {"augment_on": "device"}}, "device"),
        ("gpu", "rand-m9-mstd0.5-inc1", {"train": {"augment_on": "host"}}, "host"),
    ],
)
def test_by_default_it_is_the_faster_place_but_a_run_goes_on_where_it_was(
    backend, auto_augment, saved, expected, monkeypatch
):
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    config = dataclasses.replace(RECIPES["imagenet"], auto_augment=auto_augment)
    assert augment_on(config, saved) == expected
    for chosen in ("host", "device"):
        if device_can_augment(config):
            assert augment_on(dataclasses.replace(config, augment_on=chosen), saved) == chosen
