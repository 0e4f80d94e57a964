"""Several models side by side: the figures are those of each."""

import json
import re

import numpy as np

from benchmarks import accuracy
from convert import digits, load_weights
from convert.__main__ import main as convert_main
from tests.train.small_weights import save_small
from train.cost.flops import macs_per_image


def test_each_model_is_told_with_its_size_its_work_and_its_accuracy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "ROUND_SECONDS", 0.0)
    few = digits._stored()[:100]
    monkeypatch.setattr(digits, "_stored", lambda: few)
    monkeypatch.setattr("convert.changes.prune.worth", _first_is_best)
    whole = save_small(tmp_path / "whole.safetensors", "0123456789")
    pruned = tmp_path / "pruned.safetensors"
    assert convert_main([str(whole), str(pruned), "--prune=mlp=0.5"]) == 0
    capsys.readouterr()
    file = tmp_path / "x.json"
    flags = ["--dataset=digits", "--repeats=2", "--batch-size=2", f"--json={file}"]
    assert accuracy.main([str(whole), str(pruned), *flags]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("digits, top-1 on 20 images (test); ")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[4:]]
    (result,) = json.loads(file.read_text())["results"]
    assert {len(side["seconds"]) for side in result["sides"].values()} == {2}
    for path, (name, parameters, gmac, _, times, top1) in zip((whole, pruned), rows, strict=True):
        weights = load_weights(path)
        assert name == str(path)
        assert parameters == f"{sum(array.size for array in weights.tensors.values()):,}"
        assert gmac == f"{macs_per_image(weights.config) / 1e9:.3f}"
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\)", times)
        assert 0 <= float(top1) <= 100
    assert rows[0][4] == "1.00 (1.00-1.00)"


def _first_is_best(weights, images, labels):
    return {("blocks.0.blocks.1.0", "mlp"): -np.arange(48)}


def test_weights_and_data_that_do_not_fit_are_refused(tmp_path, capsys):
    path = save_small(tmp_path / "whole.safetensors", "012345678")
    assert accuracy.main([str(path), "--dataset=digits"]) == 2
    assert "the data set has 10 classes, the weights have 9" in capsys.readouterr().err
    assert accuracy.main([str(path)]) == 2
    assert "--dataset is needed" in capsys.readouterr().err
