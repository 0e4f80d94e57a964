"""What the class tokens attend to is what timm computes, and is drawn where it belongs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from convert import load_flax
from tests.train.pictures.pixels import pixels_of
from tests.train.small_weights import save_small, small_config, small_timm_model
from train.pictures.attention import class_token_attention, draw_attention, picture_paths


@torch.inference_mode()
def test_attention_is_what_timm_computes(tmp_path):
    model = small_timm_model(3)
    seen = {}

    def watch(module, name):
        module.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.update({name: inputs[0]}))

    stage = model.blocks[-1]
    for branch in (0, 1):
        stage.blocks[branch][-1].attn.fused_attn = False  # the fused kernel shows no weights
        watch(stage.blocks[branch][-1].attn, ("own", branch))
        watch(stage.fusion[branch].attn, ("across", branch))
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    model(images)

    ours = load_flax(save_small(tmp_path / "w.safetensors", "abc"))
    attention = nnx.jit(class_token_attention)(ours, jnp.asarray(images.permute(0, 2, 3, 1)))
    for branch, patches in enumerate((16, 4)):
        for name, tokens in (("own", 1 + patches), ("across", 1 + 20 - patches)):
            values = np.asarray(attention[name][branch])
            assert values.shape == (2, tokens)
            np.testing.assert_allclose(values.sum(1), 1, atol=1e-5)
            assert values.std() > 1e-3  # not the same everywhere
            np.testing.assert_allclose(values, seen[name, branch][:, :, 0].mean(1), atol=1e-6)


def _drawn(path, config, lit):
    """The picture of attention that rests on one patch: of the map with a name and branch, in some row and column."""
    attention = {"own": [], "across": []}
    for branch in (0, 1):
        for name, grid in (("own", config.grid_size[branch]), ("across", config.grid_size[1 - branch])):
            values = np.full(grid, 1e-3)
            if lit[:2] == (name, branch):
                values[lit[2:]] = 1
            attention[name].append(np.append(0.1, values))
    image = np.zeros((*config.image_size, 3), np.float32)
    draw_attention(path, config, title="x", image=image, attention=attention, predictions=[("cat", 0.9)])
    return pixels_of(path)


def _middle(brighter):
    """Row and column of what is much brighter."""
    return np.argwhere(brighter.sum(-1) > 300).mean(0)


def test_each_patch_is_lit_at_its_place_in_its_map(tmp_path):
    config = dataclasses.replace(small_config(3), image_size=(48, 96))
    places = {}
    for name in ("own", "across"):
        for branch in (0, 1):
            rows, columns = config.grid_size[branch if name == "own" else 1 - branch]
            first = _drawn(tmp_path / "x.png", config, (name, branch, 0, columns - 1))
            second = _drawn(tmp_path / "x.png", config, (name, branch, rows - 1, 0))
            # where each is brighter than the other
            top_right, bottom_left = _middle(first - second), _middle(second - first)
            assert bottom_left[0] > top_right[0] + 30
            assert bottom_left[1] < top_right[1] - 100  # the image is twice as wide as high
            places[name, branch] = (top_right + bottom_left) / 2
    assert places["across", 0][1] > places["own", 0][1] + 200  # across is on the right
    assert places["own", 1][0] > places["own", 0][0] + 200  # branch 1 is below
    assert places["across", 1] == pytest.approx((places["own", 1][0], places["across", 0][1]), abs=3)


def test_names_of_pictures_are_never_given_twice(tmp_path):
    images = ["x/a.jpg", "y/a.png", "a-2.png", "A.png", "y/a.png", "é.png", "e\u0301.png", "long" * 100 + ".png", "b"]
    given = [path.name for path in picture_paths(tmp_path, images)]
    assert len({name.lower() for name in given}) == len(images)
    assert given[6] == "e\u0301-2.png"  # the same letter, put together otherwise
    assert given[:3] == ["a.png", "a-2.png", "a-2-2.png"]
    assert max(len(name.encode()) for name in given) < 230
