"""Fixed models of other patch sizes, made of weights by their one conversion."""

import json

import pytest
import timm
import torch

from convert import ConversionError, load_flax, load_torch, load_weights, save
from convert.verify import run_flax
from tests.convert.conftest import TIMM_SETTINGS, refused, run
from tests.parity.reference import OUTPUT_BOUND, error

OTHER = (8, 8)  # 48 and 32 pixels are seen: grids of 6 x 6 and 4 x 4 instead of 4 x 4 and 2 x 2


@pytest.fixture
def flexible(weights_file, images):
    """What the model computes when it is called with the other patches."""
    with torch.inference_mode():
        return load_torch(weights_file)(images, patch_size=OTHER)


def test_a_fixed_model_of_other_patches_computes_what_the_call_with_them_does(weights_file, images, flexible):
    weights = load_weights(weights_file, patch_size=OTHER)
    assert weights.config.patch_size == OTHER
    assert weights.tensors["patch_embed.1.proj.weight"].shape == (192, 3, 8, 8)
    position, kernel = weights.notes
    assert position == "position embeddings resampled from 4 x 4 and 2 x 2 patches to 6 x 6 and 4 x 4"
    assert kernel.startswith(
        "kernels resized from patches of 12 and 16 pixels to 8 and 8: weights that were not trained"
    )
    with torch.inference_mode():
        assert error(load_torch(weights_file, patch_size=OTHER)(images), flexible) <= OUTPUT_BOUND["float32"]
    fixed = run_flax(load_flax(weights_file, patch_size=OTHER), images.permute(0, 2, 3, 1).numpy())
    assert error(fixed, flexible) <= OUTPUT_BOUND["float32"]


@pytest.mark.parametrize("name", ["fixed.pth", "fixed.safetensors"])
def test_the_command_writes_what_timm_loads_into_its_own_model(capsys, weights_file, tmp_path, images, flexible, name):
    status, out, _ = run(capsys, weights_file, tmp_path / name, "--patch-size", "8,8")
    assert status == 0
    assert "patch_size=(8, 8)" in out and "note        kernels resized from patches of 12 and 16 pixels" in out
    model = timm.create_model("crossvit_tiny_240", patch_size=OTHER, **TIMM_SETTINGS).eval()
    if name.endswith(".pth"):
        model.load_state_dict(torch.load(tmp_path / name, weights_only=True), strict=True)
    else:
        timm.models.load_checkpoint(model, str(tmp_path / name), strict=True)
    with torch.inference_mode():
        assert error(model(images), flexible) <= OUTPUT_BOUND["float32"]
    again = load_weights(tmp_path / name)  # of the .pth, shapes tell
    assert (again.config.name, again.config.patch_size, again.config.image_size) == ("ti", OTHER, (48, 48))


def test_a_folder_of_other_patches_is_what_timm_makes_the_model_of(capsys, weights_file, tmp_path, images, flexible):
    status, _, _ = run(capsys, weights_file, tmp_path / "out.hf", "--patch-size", "8,8", "--verify")
    assert status == 0
    assert json.loads((tmp_path / "out.hf" / "config.json").read_text())["model_args"]["patch_size"] == [8, 8]
    model = timm.create_model(f"local-dir:{tmp_path / 'out.hf'}", pretrained=True).eval()
    with torch.inference_mode():
        assert error(model(images), flexible) <= OUTPUT_BOUND["float32"]


def test_the_stored_patches_change_nothing(weights_file):
    weights = load_weights(weights_file, patch_size=(12, 16))
    assert weights.notes == ()
    assert weights.config == load_weights(weights_file).config


def test_patches_and_size_of_the_image_may_change_together(weights_file):
    # patches of 10 pixels divide neither image as it is stored
    config = load_weights(weights_file, image_size=60, patch_size=(10, 10)).config
    assert config.grid_size == ((6, 6), (4, 4))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (
            "10,8",
            "patch_size 10 does not divide the image of branch 0, 48 x 48 pixels; these do: 1, 2, 3, 4, 6, 8, 12,",
        ),
        ("8", "patch_size must be 2 whole numbers, one per branch; got (8,)"),
        ("8x8", "argument --patch-size: must be pixels, a number for each branch, such as 24,32; got '8x8'"),
        ("0,8", "argument --patch-size: must be pixels"),
    ],
)
def test_patches_that_cannot_be_are_refused(capsys, weights_file, tmp_path, value, why):
    assert why in refused(capsys, weights_file, tmp_path / "out.safetensors", "--patch-size", value)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_description_of_other_branches_resizes_no_kernels(weights_file):
    branches = load_weights(weights_file).config.replace(patch_size=OTHER).branches
    with pytest.raises(ConversionError):
        load_weights(weights_file, branches=branches)


def test_detectors_keep_the_patches_that_their_pyramid_is_made_for(weights_file, tmp_path):
    detector = load_torch(weights_file, task="detection", num_classes=3)
    path = save(detector.state_dict(), detector.config, tmp_path / "detector.safetensors")
    with pytest.raises(ConversionError, match=r"patch_size must stay \(12, 16\): a detection model's pyramid"):
        load_weights(path, patch_size=(24, 32))
    with pytest.raises(ConversionError, match=r"in these weights patch_size is \(12, 16\)"):
        load_weights(weights_file, task="detection", num_classes=3, patch_size=(24, 32))
