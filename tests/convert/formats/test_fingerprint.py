"""Damage in Orbax folders and safetensors files is noticed by whoever reads them, whatever was damaged."""

import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import convert
from convert.errors import ConversionError
from convert.formats import fingerprint
from convert.formats.run_folder import read_progress, read_state
from tests.train.small_weights import save_small
from train.run.checkpoints import Checkpoints
from train.run.run_state import RunState


def _state(changed=0.0):
    return {"opt": {"count": jnp.int32(3)}, "params": {"x": {0: jnp.arange(12.0), 10: jnp.ones(3) + changed}}}


def _checkpoint(folder, state):
    with closing(Checkpoints(folder, description={"a": 1}, say=print)) as checkpoints:
        checkpoints.save(state, RunState(step=7), {})
        checkpoints.wait()
    return folder / "checkpoints" / "7"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, bool])
def test_every_flipped_bit_changes_a_mark_and_devices_compute_the_same(dtype):
    array = np.random.default_rng(0).integers(0, 2, 70).astype(dtype)
    seen = set()
    for bit in range(array.nbytes * 8 if dtype is not bool else 0):
        flipped = np.frombuffer(array.tobytes(), np.uint8).copy()
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(fingerprint.marks_of({"a": flipped.view(dtype)})["a"])
    assert fingerprint.marks_of({"a": array})["a"] not in seen
    for version in (1, 2):
        on_devices = fingerprint.marks_on_devices({"a": jnp.asarray(array)}, version=version)
        assert on_devices.tolist() == [fingerprint.marks_of({"a": array}, version=version)["a"]]
    assert fingerprint.marks_of({"a": ~array if dtype is bool else array + dtype(1)}) != fingerprint.marks_of(
        {"a": array}
    )


def test_a_changed_array_of_a_checkpoint_is_noticed_where_it_is_read_and_nowhere_else(tmp_path):
    whole, other = (_checkpoint(tmp_path / name, _state(value)) for name, value in (("a", 0.0), ("b", 1e-7)))
    np.testing.assert_array_equal(read_state(whole)["params"]["x"]["0"], np.arange(12.0))
    shutil.rmtree(whole / "state")
    shutil.copytree(other / "state", whole / "state")
    for keys in (None, ["params"]):
        with pytest.raises(ConversionError, match=r"is damaged: 1 arrays are not what was written \(params/x/10\)"):
            read_state(whole, keys)
    assert read_state(whole, ["opt"])["opt"]["count"] == 3


@pytest.mark.parametrize("item", ["progress", "crossvit"])
def test_what_lies_beside_the_arrays_is_covered_too(tmp_path, item):
    step = _checkpoint(tmp_path, _state())
    assert read_progress(step)["step"] == 7
    file = step / item / "metadata"
    text = file.read_text()
    for damaged in (
        text.replace("7", "6") if item == "progress" else text.replace("1", "2"),
        text[:-1],
        "",
        "[" * 10**5,
    ):
        file.write_text(damaged)
        with pytest.raises(ConversionError, match="damaged"):
            read_state(step, ["params"])
    shutil.rmtree(step / item)
    if item == "crossvit":
        with pytest.raises(ConversionError, match="damaged"):
            read_progress(step)


def test_fingerprints_of_earlier_versions_are_checked_too(tmp_path):
    step = _checkpoint(tmp_path, _state())
    file = step / "progress" / "metadata"
    marks = fingerprint.marks_of(jax.device_get(_state()), version=1)
    before = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("marks", "sum")}
    file.write_text(json.dumps({**before, "fingerprint": list(marks.values())}))
    np.testing.assert_array_equal(read_state(step, ["params"])["params"]["x"]["10"], np.ones(3))
    file.write_text(json.dumps({**before, "fingerprint": [mark + 1 for mark in marks.values()]}))
    with pytest.raises(ConversionError, match="damaged"):
        read_state(step, ["params"])


def test_folders_that_convert_writes_have_one(tmp_path):
    weights = convert.load_weights(save_small(tmp_path / "w.safetensors", "abc"))
    params = convert.to_flax(weights.tensors, weights.config)
    whole = convert.save(params, weights.config, tmp_path / "whole")
    params["head"][0]["bias"] = params["head"][0]["bias"] + np.float32(1e-6)
    other = convert.save(params, weights.config, tmp_path / "other")
    convert.load_weights(whole)
    shutil.rmtree(whole / "params")
    shutil.copytree(other / "params", whole / "params")
    with pytest.raises(ConversionError, match=r"1 arrays are not what was written \(head/0/bias\)"):
        convert.load_weights(whole)


@pytest.mark.parametrize("ending", [".safetensors", ".flax.safetensors"])
def test_a_flipped_bit_of_a_safetensors_file_of_ours_is_noticed(tmp_path, ending):
    weights = convert.load_weights(save_small(tmp_path / "w.safetensors", "abc"))
    file = convert.save(weights.tensors, weights.config, tmp_path / f"out{ending}", class_names=weights.class_names)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    name = content.index(b'["a') if b'["a' in content else content.index(b'[\\"a')
    for place in (name + content[name:].index(b"a"), 8 + length, (8 + length + len(content)) // 2, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
        with pytest.raises(ConversionError, match="is damaged: it is not what was written"):
            convert.load_weights(file)
    file.write_bytes(content)
    assert convert.load_weights(file).class_names == ("a", "b", "c")


def test_other_programs_may_write_our_metadata_again_but_not_with_other_weights(tmp_path):
    path = save_small(tmp_path / "w.safetensors", "abc")
    with safe_open(path, "numpy") as file:
        about = file.metadata()
    tensors = load_file(path)
    save_file(dict(reversed(tensors.items())), path, metadata=about)
    assert convert.load_weights(path).class_names == ("a", "b", "c")
    changed = tensors | {"head.0.bias": tensors["head.0.bias"] + 1}
    save_file(changed, path, metadata=about)
    with pytest.raises(ConversionError, match="on purpose, that has to leave 'crossvit-sha256' out"):
        convert.load_weights(path)
    save_file(changed, path, metadata={name: text for name, text in about.items() if name != "crossvit-sha256"})
    np.testing.assert_array_equal(convert.load_weights(path).tensors["head.0.bias"], changed["head.0.bias"])
