"""What is written: timm loads it strictly, our own formats keep everything, and failures leave nothing."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import stat

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save as library_save
from safetensors.torch import load_file

from convert import ConversionError, load_flax, load_weights, save
from convert.formats.write import write
from convert.verify import read_back
from tests.convert.conftest import tiny

ENDINGS = [".safetensors", ".pth", ".flax.safetensors", ""]


@pytest.fixture
def folder(tmp_path):
    """Where only what a test writes can be."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def _load(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_timm_loads_it_strictly_with_equal_logits(folder, weights, ending, images, logits):
    path = write(weights, folder / f"out{ending}")
    model = tiny().eval()
    model.load_state_dict(_load(path), strict=True)
    with torch.inference_mode():
        assert torch.equal(model(images), logits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_keeps_every_bit_in_its_dtype(folder, weights, ending, dtype):
    weights = weights.astype(np.dtype(dtype))
    path = write(weights, folder / f"out{ending}")
    assert load_weights(path).dtypes == [dtype]
    assert read_back(weights, path)[1] == []


def test_mixed_dtypes_stay_mixed(folder, weights):
    half = weights.tensors["norm.0.weight"].astype(np.float16)
    path = save(weights.tensors | {"norm.0.weight": half}, weights.config, folder / "out.pth")
    assert load_weights(path).dtypes == ["float32", "float16"]


@pytest.mark.parametrize("ending", [".safetensors", ".flax.safetensors", ""])
def test_settings_and_class_names_travel_along(folder, weights_file, ending):
    weights = load_weights(weights_file, image_size=(48, 96), global_pool="avg", drop_path_rate=0.1)
    names = [f"class {i}" for i in range(10)]
    path = save(weights.tensors, weights.config, folder / f"out{ending}", class_names=names)
    again = load_weights(path)
    assert again.config == weights.config
    assert again.class_names == tuple(names)
    assert load_weights(path, num_classes=3).class_names is None


def test_the_metadata_of_safetensors_is_readable_json(folder, weights):
    with safe_open(write(weights, folder / "out.safetensors"), "numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    branches = json.loads(metadata["crossvit"])["config"]["branches"]
    assert [branch["image_scale"] for branch in branches] == ["1", "2/3"]


def test_the_same_weights_are_always_the_same_bytes_in_the_librarys_order(folder, weights):
    mixed = dict(weights.tensors)
    for place, name in enumerate(mixed):
        mixed[name] = np.ascontiguousarray(mixed[name].astype((np.float32, ml_dtypes.bfloat16, np.float64)[place % 3]))
    mixed = dataclasses.replace(weights, tensors=mixed)
    files = {write(mixed, folder / f"{number}.safetensors").read_bytes() for number in range(4)}
    assert len(files) == 1
    (ours,) = files
    theirs = library_save(mixed.tensors, metadata={"format": "pt"})
    headers = []
    for data in (ours, theirs):
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        headers.append((json.loads(data[8 : 8 + length]), data[8 + length :]))
    (about, data), (plain, expected) = headers
    assert data == expected
    assert list(about.pop("__metadata__")) == ["format", "crossvit", "crossvit-sha256"]
    del plain["__metadata__"]
    assert list(about.items()) == list(plain.items())


def test_flax_safetensors_have_flaxs_paths_and_layouts(folder, weights, state):
    with safe_open(write(weights, folder / "out.flax.safetensors"), "numpy") as file:
        assert np.array_equal(file.get_tensor("head.0.kernel"), state["head.0.weight"].numpy().T)
        assert file.metadata()["format"] == "flax"


def test_parameters_of_a_model_are_saved_in_any_form(folder, weights_file, weights):
    model = load_flax(weights_file)
    assert read_back(weights, save(model, model.config, folder / "model.safetensors"))[1] == []
    with pytest.raises(ConversionError, match=r"2 missing \(head"):
        params = {name: array for name, array in weights.tensors.items() if not name.startswith("head.0")}
        save(params, weights.config, folder / "no.safetensors")
    with pytest.raises(ConversionError, match="2 class names for 10 classes"):
        save(model, model.config, folder / "no.safetensors", class_names=["a", "b"])
    assert os.listdir(folder) == ["model.safetensors"]


@pytest.mark.parametrize(("ending", "exif"), [*((ending, "apply") for ending in ENDINGS), (".safetensors", None)])
def test_what_training_did_with_orientations_travels(folder, weights, ending, exif):
    path = write(dataclasses.replace(weights, exif=exif), folder / f"out{ending}")
    assert load_weights(path, num_classes=3).exif == (None if ending == ".pth" else exif)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_existing_destination_is_refused_then_replaced_on_request(folder, weights, ending):
    path = write(weights, folder / f"out{ending}")
    other = weights.astype(np.float16)
    with pytest.raises(ConversionError, match="exists"):
        write(other, path)
    assert read_back(weights, path)[1] == []
    write(other, path, overwrite=True)
    assert read_back(other, path)[1] == []
    assert os.listdir(folder) == [path.name]


def test_other_things_are_never_replaced(folder, weights):
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").touch()
    (folder / "folder.pth").mkdir()
    (folder / "file").touch()
    for name, added in (("ours", "notes.txt"), ("opt", "opt_state")):
        write(weights, folder / name)
        (folder / name / added).touch()
    (folder / "params" / "params").mkdir(parents=True)
    for name in ("photos", "folder.pth", "file", "ours", "opt", "params"):
        with pytest.raises(ConversionError, match="not replaced"):
            write(weights, folder / name, overwrite=True)
    assert (folder / "photos" / "cat.jpg").exists()
    assert (folder / "ours" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("out.tflite", "unknown ending '.tflite'"), ("missing/out.pth", "does not exist"), ("..", "exists")],
)
def test_impossible_destinations_are_told(folder, weights, name, message):
    with pytest.raises(ConversionError, match=message):
        write(weights, folder / name)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_disk_without_space_is_told_before_anything_is_written(folder, weights, ending, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(ConversionError, match="the disk has 1,000 left"):
        write(weights, folder / f"out{ending}")
    assert os.listdir(folder) == []


@pytest.mark.parametrize("ending", ENDINGS[:3])
def test_a_limit_in_the_middle_of_writing_leaves_nothing(folder, weights, ending):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # a real failing write, as with a quota
    try:
        with pytest.raises(ConversionError, match="could not be written: File too large"):
            write(weights, folder / f"out{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_failure_at_the_end_leaves_nothing_and_what_was_there(folder, weights, ending, error, monkeypatch):
    path = folder / f"out{ending}"
    write(weights, path)

    def fail(*args):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr("convert.formats.write.write_orbax", fail)
    with pytest.raises(ConversionError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        write(weights.astype(np.float16), path, overwrite=True)
    if isinstance(error, OSError):
        assert "no space left on device" in str(caught.value)
    monkeypatch.undo()
    assert os.listdir(folder) == [path.name]
    assert read_back(weights, path)[1] == []


def test_an_orbax_folder_comes_back_when_its_replacement_cannot_be_moved(folder, weights, monkeypatch):
    path = write(weights, folder / "out")
    rename = type(path).rename

    def fail_for_new(self, target):
        if self.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", fail_for_new)
    with pytest.raises(ConversionError, match="Input/output error"):
        write(weights.astype(np.float16), path, overwrite=True)
    assert os.listdir(folder) == ["out"]
    assert read_back(weights, path)[1] == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_has_the_usual_permissions(folder, weights, ending):
    path = write(weights, folder / f"out{ending}")
    reference = folder / "reference"
    if path.is_dir():
        reference.mkdir()
    else:
        reference.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)
