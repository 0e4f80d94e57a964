"""A pruned model is trained on: it follows the whole one, and a run's own data choose what is pruned."""

import pytest

import train.main
from convert import load_weights
from convert.__main__ import main as convert_main
from tests.train.small_weights import save_small


@pytest.mark.slow
def test_a_pruned_model_recovers_beside_the_whole_one_and_its_run_is_pruned_by_its_own_data(
    few_digits_dir, no_curves, tmp_path, capsys
):
    source = save_small(tmp_path / "whole.safetensors", "0123456789")
    pruned, run, again = (tmp_path / name for name in ("pruned.safetensors", "run", "again.safetensors"))
    prune = ["--prune=mlp=0.5,heads=0.5", "--calibration-images=40"]
    assert convert_main([str(source), str(pruned), *prune]) == 0
    assert "note        chosen by 40 images\n" in capsys.readouterr().out  # all of them have their labels
    flags = ["--recipe=digits", f"--data-dir={few_digits_dir}", "--batch-size=16", "--epochs=1", "--workers=0"]
    assert train.main.main([*flags, f"--init={pruned}", f"--distill={source}", f"--output={run}"]) == 0
    capsys.readouterr()
    trained = load_weights(run)
    assert trained.config.branches == load_weights(pruned).config.branches
    assert (trained.config.num_heads, trained.config.mlp_ratio) == ((2, 1), (2.0, 1.0))
    assert convert_main([str(run), str(again), *prune]) == 0
    assert "kept in each block of branch 1\nnote        chosen by 40 images\n" in capsys.readouterr().out
    assert convert_main([str(run), "--info"]) == 0
    assert "num_heads=1,mlp_ratio=1,patch_size=16,image_scale=2/3,head_dim=12\n" in capsys.readouterr().out
    refused = convert_main([str(run), str(tmp_path / "other"), "--prune=heads=0.4"])
    assert (refused, capsys.readouterr().err.count("\n")) == (2, 1)


def test_data_of_a_run_that_are_no_folder_have_to_be_named(few_digits_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("convert.formats.run_folder.how_trained", lambda folder: {"dataset": "imagenet2012"})
    run = tmp_path / "run"
    run.mkdir()
    save_small(run / "weights.safetensors", "0123456789")
    assert convert_main([str(run), str(tmp_path / "out"), "--prune=mlp=0.5"]) == 2
    error = capsys.readouterr().err
    assert "--prune by the data of the run: imagenet2012: images come from 'digits' or a folder" in error
    assert error.endswith("; --calibrate names other images\n") and error.count("\n") == 1
