"""What the class tokens attend to is what timm computes, and is drawn where it belongs."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from convert import load_flax
from tests.train.pictures.pixels import pixels_of
from tests.train.small_weights import save_small, small_config, small_timm_model
from train.pictures.attention import attention_of_all_layers, class_token_attention, draw_attention, picture_paths


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


def test_rollout_is_the_product_of_all_layers(tmp_path):
    """As whole matrices over the tokens of both branches, one for each layer, in which a token keeps half of itself."""
    model = load_flax(save_small(tmp_path / "w.safetensors", "abc"))
    images = jax.random.normal(jax.random.key(0), (2, 48, 48, 3))
    maps = {path: np.asarray(values, np.float64).mean(1) for path, values in model.attention_maps(images).items()}
    tokens = [1 + rows * columns for rows, columns in model.config.grid_size]
    places = [np.arange(tokens[0]), tokens[0] + np.arange(tokens[1])]
    product = np.broadcast_to(np.eye(sum(tokens)), (2, sum(tokens), sum(tokens)))
    for stage, depths in enumerate(model.config.stage_depths):
        for branch, depth in enumerate(depths):
            for block in range(depth):
                layer = np.broadcast_to(np.eye(sum(tokens)), product.shape).copy()
                own = np.ix_((0, 1), places[branch], places[branch])
                layer[own] = (layer[own] + maps[f"blocks.{stage}.blocks.{branch}.{block}.attn"]) / 2
                product = layer @ product
        layer = np.broadcast_to(np.eye(sum(tokens)), product.shape).copy()
        for branch in (0, 1):
            token, patches = places[branch][0], places[1 - branch][1:]
            weights = maps[f"blocks.{stage}.fusion.{branch}.attn"][:, 0]
            layer[:, token, token] = (1 + weights[:, 0]) / 2
            layer[:, token, patches] = weights[:, 1:] / 2
        product = layer @ product
    rollout = nnx.jit(attention_of_all_layers)(model, images)["rollout"]
    for branch in (0, 1):
        expected = product[:, places[branch][0]][:, places[branch]]
        np.testing.assert_allclose(rollout[branch], expected, atol=1e-6)
        assert (np.asarray(rollout[branch]).sum(1) < 0.999).all()  # some comes from the other branch


def _drawn(path, config, corners):
    """The picture of attention that rests on one corner of each map: of `own`, `across` and `rollout`, as 0 or -1 for
    row and column."""
    attention = {"own": [], "across": [], "rollout": []}
    for branch in (0, 1):
        for name, corner in zip(attention, corners, strict=True):
            values = np.full(config.grid_size[1 - branch if name == "across" else branch], 1e-3)
            values[corner] = 1
            attention[name].append(np.append(0.1, values))
    image = np.zeros((*config.image_size, 3), np.float32)
    draw_attention(path, config, title="x", image=image, attention=attention, predictions=[("cat", 0.9)])
    return pixels_of(path)


def test_each_patch_is_lit_at_its_place_in_its_map(tmp_path):
    config = dataclasses.replace(small_config(3), image_size=(48, 96))
    top_left, top_right, bottom_left, bottom_right = (0, 0), (0, -1), (-1, 0), (-1, -1)
    first = _drawn(tmp_path / "x.png", config, (top_right, top_right, top_left))
    second = _drawn(tmp_path / "x.png", config, (bottom_left, bottom_left, bottom_right))
    height, width = first.shape[:2]
    for branch in (0, 1):
        for column, seen in enumerate((branch, 1 - branch, branch)):  # own, across, rollout
            part = np.s_[int((0.1 + 0.46 * branch) * height) :, int((0.255 + 0.25 * column) * width) :]
            part = np.s_[
                part[0].start : part[0].start + int(0.38 * height), part[1].start : part[1].start + int(0.21 * width)
            ]
            difference = first[part] - second[part]
            above, below = np.argwhere(difference.sum(-1) > 300), np.argwhere(difference.sum(-1) < -300)
            assert below.mean(0)[0] > above.mean(0)[0] + 30
            to_the_right = above.mean(0)[1] - below.mean(0)[1]
            assert (to_the_right if column < 2 else -to_the_right) > 100  # the image is twice as wide as high
            rows, columns = config.grid_size[seen]
            shares = len(above) / np.prod(difference.shape[:2]) * rows * columns
            assert 0.4 < shares < 1.2  # a patch of this map's grid


def test_a_flat_map_looks_flat_and_is_not_stretched_to_all_colours(tmp_path):
    config = small_config(3)
    flat = {name: [np.full(1 + 16, 1 / 17), np.full(1 + 4, 1 / 5)] for name in ("own", "rollout")}
    flat["across"] = flat["own"][::-1]
    image = np.zeros((*config.image_size, 3), np.float32)
    draw_attention(tmp_path / "x.png", config, title="x", image=image, attention=flat, predictions=[("cat", 0.9)])
    pixels = pixels_of(tmp_path / "x.png")
    height, width = pixels.shape[:2]
    for column in range(3):  # well inside of the maps of branch 0, see the places in draw_attention
        left, right = int((0.32 + 0.25 * column) * width), int((0.40 + 0.25 * column) * width)
        seen = pixels[int(0.2 * height) : int(0.4 * height), left:right]
        assert np.ptp(seen.reshape(-1, 3), axis=0).max() <= 1  # one colour
        assert seen.max() < 160  # and far from the brightest


def test_names_of_pictures_mirror_the_folders_and_are_never_given_twice(tmp_path):
    images = ["x/a.jpg", "x/a.png", "x/a-2.png", "x/A.png", "y/a.png", "X/a.png", "é.png", "e\u0301.png", "b", "y.jpg"]
    images += ["x/" + "long" * 100 + ".png", "y.png/c.jpg"]
    given = [str(path.relative_to(tmp_path)) for path in picture_paths(tmp_path, images)]
    assert len({name.lower() for name in given}) == len(images)
    assert given[:4] == ["x/a.png", "x/a-2.png", "x/a-2-2.png", "x/A-3.png"]
    assert given[4:6] == ["y/a.png", "X/a-4.png"]  # for some file systems x and X are one folder
    assert given[7] == "e\u0301-2.png"  # the same letter, put together otherwise
    assert (given[9], given[11]) == ("y-2.png", "y.png/c.png")  # y.png is a folder
    assert max(len(name.encode()) for name in given) < 230


def test_folders_that_all_images_have_in_common_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [str(tmp_path / "photos/odd/1.png"), "photos/even/../even/0.png", "photos/2.jpg"]
    assert picture_paths(Path("maps"), images) == [Path("maps/odd/1.png"), Path("maps/even/0.png"), Path("maps/2.png")]
    assert picture_paths(Path("maps"), images[:1]) == [Path("maps/1.png")]
    assert picture_paths(Path("maps"), []) == []
