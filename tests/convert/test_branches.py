"""Models of three branches, which are no variant, go through every format."""

import numpy as np
import pytest
import torch

from convert import ConversionError, load_torch, load_weights, save
from convert.architecture import expected_shapes
from convert.tree import flatten, nest
from crossvit_jax.config import CUSTOM, Branch, get_config
from tests.convert.conftest import refused, run
from tests.three_branches import BRANCHES, TEXTS, save_three, three_config


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return save_three(tmp_path_factory.mktemp("three") / "three.safetensors", "0123456789")


def test_settings_travel_with_the_weights(three):
    weights = load_weights(three)
    assert weights.config == three_config(10)
    assert load_weights(three, branches=BRANCHES).config == weights.config
    with pytest.raises(ConversionError, match="that cannot be changed"):
        load_weights(three, branches=BRANCHES[:2])


@pytest.mark.parametrize("settings", [{}, {"fusion_depth": (0, 2), "stages": 2}, {"multi_conv": True}], ids=str)
def test_of_a_file_without_metadata_shapes_tell_all_but_the_branches(tmp_path, settings):
    branches = (Branch(embed_dim=12, depth=1, num_heads=2, mlp_ratio=2.0, patch_size=16, image_scale=2 / 3),)
    branches *= 3 if settings else 1
    config = three_config(5).replace(branches=branches, in_chans=1, crop_pct=0.875, **settings)
    weights = {name: torch.zeros(shape) for name, shape in expected_shapes(config).items()}
    path = save(weights, config, tmp_path / "w.pth")
    assert load_weights(path, branches=branches).config == config


def test_a_file_without_metadata_needs_the_branches(capsys, three, tmp_path):
    path = tmp_path / "three.pth"
    status, out, _ = run(capsys, three, path, "--verify")
    assert status == 0
    assert "variant     custom; in timm: none" in out
    assert "the branches see 48 x 48 and 32 x 32 and 24 x 24" in out
    again = tmp_path / "again.safetensors"
    assert "it has 3 branches, of no variant: give their settings (--branches" in refused(capsys, path, again)
    other = [TEXTS[0].replace("depth=1", "depth=2"), *TEXTS[1:]]
    assert "does not fit its settings (custom): 12 missing" in refused(capsys, path, again, "--branches", *other)
    uneven = "embed_dim=12,depth=1,num_heads=5,patch_size=12"
    assert "embed_dim 12 cannot be cut into num_heads 5" in refused(capsys, path, again, "--branches", uneven)
    status, out, _ = run(capsys, path, again, "--image-size", 96, "--branches", *TEXTS)
    assert status == 0
    assert "resampled from 4 x 4 and 2 x 2 and 3 x 3 patches to 8 x 8 and 4 x 4 and 6 x 6" in out
    assert load_weights(again).config.branches == BRANCHES


@pytest.mark.parametrize(
    ("ending", "flags"),
    [
        (".onnx", []),
        (".onnx", ["--quantize", "static", "--calibrate", "digits", "--calibration-images", 8]),
        (".stablehlo", []),
        (".pt", ["--quantize", "int8"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value,
)
def test_it_is_exported_with_any_attention(capsys, tmp_path, ending, flags):
    if ending == ".pt":
        pytest.importorskip("torchao")
    attention = ("spatial-reduction:2", "separable", "full")
    three = save_three(tmp_path / "three.safetensors", "0123456789", attention=attention)
    status, out, _ = run(capsys, three, tmp_path / f"model{ending}", *flags)
    assert (status, "NOT written" in out) == (0, False), out
    assert (tmp_path / f"model{ending}").is_file()


def test_heads_of_another_number_make_another_model(three, tmp_path):
    """What shapes cannot tell: the branches given decide it."""
    path = save_three(tmp_path / "three.pth", "0123456789")
    images = torch.ones(1, 3, 48, 48)
    heads = [Branch.parse(text.replace("num_heads=2", "num_heads=4")) for text in TEXTS]
    with torch.inference_mode():
        expected, got, other = (
            model(images)
            for model in (load_torch(three), load_torch(path, branches=BRANCHES), load_torch(path, branches=heads))
        )
    assert torch.equal(got, expected)
    assert not torch.allclose(other, expected)


@pytest.mark.parametrize(
    ("attention", "leaf", "shape"),
    [("separable", "qkv", (1 + 2 * 96, 96)), ("spatial-reduction:4", "sr", (96, 96, 4, 4))],
    ids=["separable", "spatial reduction"],
)
def test_another_attention_is_told_by_shapes_and_settings_and_is_none_of_timms(
    capsys, tmp_path, attention, leaf, shape
):
    config = get_config("ti", attention=(attention, "full"), num_classes=3).replace(name=CUSTOM)
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=of).astype(np.float32) for name, of in expected_shapes(config).items()}
    assert tensors[f"blocks.2.blocks.0.0.attn.{leaf}.weight"].shape == shape
    path = save(tensors, config, tmp_path / "w.safetensors")
    status, out, _ = run(capsys, path, tmp_path / "w.pth")
    assert status == 0
    told = "embed_dim=96,depth=1,num_heads=3,mlp_ratio=4,patch_size=12,image_scale=1"
    told += f",attention={attention}"
    assert f"branches    {told} embed_dim=192," in out
    assert load_weights(path).config == config
    again = load_weights(tmp_path / "w.pth")
    assert again.config == config
    back = flatten(nest(again.tensors))  # Flax's paths and layouts, and timm's again
    assert all(np.array_equal(back[name], tensor) for name, tensor in tensors.items())
    assert "timm's CrossViT has full attention alone: .safetensors" in refused(capsys, path, tmp_path / "w.hf")
    pruned = [path, tmp_path / "pruned", "--prune", "heads=0.5:0.5"]
    why = f"heads=0.5: heads are cut out of full attention, and branch 0 has {attention}"
    assert f"--prune: {why}" in refused(capsys, *pruned)
