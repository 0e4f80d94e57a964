"""Fewer tokens from the command line: kept in files, evaluated, and refused.

A run trains with them in tests/train/tasks/test_distillation.py; tests/convert/export/test_onnx_graph.py exports them.
"""

import json

import pytest
from PIL import Image

import train.evaluate
import train.predict
from convert.__main__ import main as convert_main
from convert.changes.dense import adapt_to_task
from convert.models import load_torch, load_weights
from tests.train.small_weights import save_small, small_timm_model


@pytest.fixture
def weights(tmp_path):
    return save_small(tmp_path / "w.safetensors", "0123456789")


def test_the_setting_travels_with_the_weights_and_only_where_it_is(weights, tmp_path, capsys):
    reduced = tmp_path / "reduced.safetensors"
    assert convert_main([str(weights), str(reduced), "--reduce-tokens=merge:1,1"]) == 0
    assert load_weights(reduced).config.reduce_tokens == "merge:1,1"
    assert load_weights(reduced, reduce_tokens="none").config.reduce_tokens is None
    assert load_weights(reduced, patch_size=(24, 16)).config.reduce_tokens == "merge:1,1"
    assert b"reduce_tokens" not in weights.read_bytes()  # earlier versions read what has none
    assert small_timm_model(10).load_state_dict(load_torch(reduced).state_dict(), strict=True)
    detector = adapt_to_task(load_weights(reduced), "detection", {"num_classes": 3})
    assert detector.config.backbone.reduce_tokens is None
    assert "reduce_tokens merge:1,1 dropped: all tokens are computed" in detector.notes


def test_weights_are_evaluated_as_asked_for(weights, few_digits_dir, tmp_path, capsys):
    flags = [f"--weights={weights}", "--dataset=digits", f"--data-dir={few_digits_dir}", "--batch-size=57"]
    assert train.evaluate.main([*flags, "--reduce-tokens=merge:4,1", f"--output={tmp_path / 'out'}"]) == 0
    assert ", merge:4,1, " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["reduce_tokens"] == "merge:4,1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--reduce-tokens=merge:3"],
            "a block merges at most half of a branch's patches, which is 2 of the 4 of branch",
        ),
        (["--reduce-tokens=fusion:0.5"], "reduce_tokens fusion:0.5 is done between stages, and there is only one"),
        (["--reduce-tokens=drop:1"], "argument --reduce-tokens: must be merge:N, fusion:SHARE, prune:SHARE, such as"),
        (
            ["--reduce-tokens=merge:1", "--attention=maps"],
            "--attention needs a token for each patch, and this model has",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(weights, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 48)).save("one.png")
    try:
        status = train.predict.main([f"--weights={weights}", *flags, "one.png"])
    except SystemExit as exit:
        status = exit.code
    out, error = capsys.readouterr()
    assert (status, out) == (2, "")
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "maps").exists()
