"""Weights for images with another mean, standard deviation or interpolation are refused by all that reads weights."""

import argparse
import functools
import importlib
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import convert
from convert import ConversionError
from convert.training.torch_checkpoint import read_torch_checkpoint
from tests.train.small_weights import save_small, small_timm_model

_MEAN = "mean (0.5, 0.5, 0.5), not (0.485, 0.456, 0.406)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights with such a config.json beside them, a picture, and data to train on."""
    folder = tmp_path_factory.mktemp("otherwise")
    save_small(folder / "model.safetensors", "ab")
    about = {"architecture": "crossvit_of_somebody", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (folder / "config.json").write_text(json.dumps(about))
    for number in range(8):
        path = folder / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((50, 50, 3), 20 * number, np.uint8)).save(path)
    return folder


_COMMANDS = [
    *(("convert.__main__", ["SOURCE", f"out{ending}"]) for ending in (".pth", ".flax.safetensors", ".hf", "")),
    *(("convert.__main__", ["SOURCE", f"out{ending}"]) for ending in (".onnx", ".stablehlo")),
    ("convert.__main__", ["SOURCE", "out.onnx", "--preprocess"]),
    ("convert.__main__", ["SOURCE", "out.onnx", "--quantize=dynamic"]),
    ("convert.__main__", ["SOURCE", "out.pt", "--quantize=int8"]),
    ("convert.__main__", ["SOURCE", "out", "--triton"]),
    ("convert.__main__", ["SOURCE", "--info"]),
    ("train.predict", ["--weights=SOURCE", "data/a/0.png"]),
    ("train.evaluate", ["--weights=SOURCE", "--dataset=data", "--output=out"]),
    ("train.serve", ["--weights=SOURCE", "--port=0"]),
    ("train.main", ["--init=SOURCE", "--dataset=data", "--output=out", "--batch-size=2"]),
    ("train.main", ["--distill=SOURCE", "--dataset=data", "--output=out", "--batch-size=2"]),
    # train.compile needs the settings of weights alone, whatever images they are for
    ("train.main", ["--task=segmentation", "--init=SOURCE", "--output=out", "--batch-size=2"]),
]


@pytest.mark.parametrize(("command", "argv"), _COMMANDS, ids=lambda value: value if isinstance(value, str) else " ")
def test_every_command_refuses_them_in_a_line_and_writes_nothing(command, argv, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir())
    main = importlib.import_module(command).main
    try:
        status = main([arg.replace("SOURCE", "local-dir:.") for arg in argv])
    except SystemExit as stopped:
        status = stopped.code
    out, error = capfd.readouterr()
    assert (status, out) == (2, ""), error
    lines = [line for line in error.splitlines() if "note: " not in line]
    assert len(lines) == 1 and _MEAN in lines[0], error
    assert sorted(os.listdir()) == before


_READERS = [convert.load_weights, convert.load_flax, convert.load_torch]


@pytest.mark.parametrize("read", [*_READERS, functools.partial(convert.predict, pictures=[])])
def test_every_function_refuses_them(read, folder):
    for source in (folder, folder / "model.safetensors", f"local-dir:{folder}"):
        with pytest.raises(ConversionError, match=r"mean \(0.5, 0.5, 0.5\), not"):
            read(source)


def test_the_flags_in_a_training_checkpoint_of_timm_count_too(tmp_path):
    path = tmp_path / "last.pth.tar"
    state = small_timm_model(2).state_dict()

    def save(**flags):
        torch.save({"state_dict": state, "optimizer": {}, "args": argparse.Namespace(**flags)}, path)

    save(mean=None, std=None, interpolation="", crop_mode=None, in_chans=None)
    with pytest.raises(ConversionError, match=r"^(?!.*it was trained with)"):  # what it lacks is something else
        read_torch_checkpoint(path)
    for flags, told in (
        ({"mean": [0.5, 0.5, 0.5]}, r"mean \(0.5, 0.5, 0.5\), not"),
        ({"std": [0.5, 0.5, 0.5]}, r"std \(0.5, 0.5, 0.5\), not"),
        ({"interpolation": "bilinear"}, "interpolation bilinear, not bicubic"),
    ):
        save(**flags)
        for read in (read_torch_checkpoint, convert.load_weights):
            with pytest.raises(ConversionError, match=f"last.pth.tar: it was trained with {told}"):
                read(path)
