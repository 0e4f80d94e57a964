"""Masked image modelling: no masked pixel reaches a token, the loss is transformers', the twins learn alike."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.flatten_util import ravel_pytree
from transformers import ViTConfig, ViTForMaskedImageModeling

from convert.architecture import SameKey
from convert.tree import flatten
from crossvit_jax.config.masking import cell_grid, cell_overlaps, masked_cells
from crossvit_jax.pretraining import masked as pretraining
from crossvit_torch.pretraining import masked as torch_pretraining
from tests.parity.reference import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
    PRECISIONS,
    channels_last,
    error,
    flax_module,
    gradient_errors,
    perturb,
    random_array,
)
from tests.small_model import small_config

LOSS_BOUND = {"float32": 1e-6, "float64": 1e-12}
CONFIG = small_config(0)  # branches of 4 x 4 and 2 x 2 patches
UNLIKE = CONFIG.replace(image_size=120, image_scale=(1, 14 / 15))  # 10 x 10 and 7 x 7, which share no border inside
FUSED = UNLIKE.replace(stages=2)  # so that each branch is told of the other


def twins(config, precision):
    """The perturbed torch model and what builds the Flax one."""
    twin = perturb(torch_pretraining.MaskedCrossViT(config)).to(getattr(torch, precision))
    return twin, lambda rngs: pretraining.MaskedCrossViT(config, param_dtype=precision, rngs=rngs)


def draw_cells(seed, batch, grid, count):
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(grid[0] * grid[1]), (batch, 1)), axis=1)
    return (order < count).reshape(batch, *grid)


def test_no_masked_pixel_has_any_part_in_the_tokens_of_any_branch():
    cells = draw_cells(0, 2, (5, 5), 15)
    pixels = cells.repeat(24, 1).repeat(24, 2)
    x = random_array(1, 2, 3, 120, 120).astype(np.float32)
    twin, build = twins(FUSED, "float32")
    inputs = torch.tensor(x, requires_grad=True)
    maps = twin.forward_masked(inputs, torch.tensor(cells))
    (of_torch,) = torch.autograd.grad(sum(out.sin().sum() for out in maps), inputs)

    @jax.jit
    def gradient(params, x):
        model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: build(SameKey()))), params)
        model.eval()
        return jax.grad(lambda x: sum(jnp.sin(out).sum() for out in model.forward_masked(x, jnp.asarray(cells))))(x)

    params = nnx.state(flax_module(build, twin.state_dict()), nnx.Param)
    of_torch = channels_last(of_torch.numpy())
    of_flax = np.asarray(gradient(params, jnp.asarray(channels_last(x))))
    assert error(of_flax, of_torch) <= GRADIENT_BOUND["float32"]
    for result in (of_torch, of_flax):
        assert not result[pixels].any() and result[~pixels].any(-1).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_is_that_of_transformers_for_each_branch(precision):
    dtype = getattr(torch, precision)
    x, cells = random_array(1, 3, 3, 48, 48), draw_cells(2, 3, (2, 2), 1)
    cells[0] = False  # the number of masked patches is that of the batch
    images = torch.tensor(x, dtype=dtype)
    masks = torch_pretraining.patch_masks(torch.tensor(cells), CONFIG)
    expected, predictions = 0.0, []
    for i, (size, patch) in enumerate(zip((48, 32), CONFIG.patch_size, strict=True)):
        settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        settings |= {"image_size": size, "patch_size": patch, "encoder_stride": patch}
        reference = perturb(ViTForMaskedImageModeling(ViTConfig(**settings)), seed=i).to(dtype)
        seen = torch_pretraining.scale_image(images, (size, size))
        torch.set_default_dtype(dtype)  # in which it adds 1e-5 to the number of masked pixels
        with torch.no_grad():
            result = reference(seen, bool_masked_pos=masks[i])
        torch.set_default_dtype(torch.float32)
        expected += result.loss.item()
        same_size = CONFIG.replace(image_size=size, image_scale=(1, 1), patch_size=(patch, patch))
        predictions.append(torch_pretraining.image_patches(result.reconstruction, same_size)[0])
    patches = torch_pretraining.image_patches(images, CONFIG)
    of_torch = torch_pretraining.masked_loss(predictions, patches, masks, CONFIG)
    assert of_torch.dtype == dtype and abs(of_torch.item() / expected - 1) <= LOSS_BOUND[precision]

    with jax.enable_x64(precision == "float64"):

        @jax.jit
        def run(predictions, x, cells):
            own = predictions, pretraining.image_patches(x, CONFIG), pretraining.patch_masks(cells, CONFIG)
            counted = pretraining.mean_masked_pixels(own[2], CONFIG)
            parts = [
                pretraining.masked_loss(*([a[i : i + 1] for a in side] for side in own), CONFIG, counted[i : i + 1])
                for i in range(3)
            ]
            return own[1], pretraining.masked_loss(*own, CONFIG), sum(parts) / 3

        x = jnp.asarray(channels_last(x), precision)
        of_flax, whole, of_parts = run([jnp.asarray(p.numpy()) for p in predictions], x, jnp.asarray(cells))
        for one, other in zip(patches, of_flax, strict=True):
            assert error(other, one) <= OUTPUT_BOUND[precision]
        assert whole.dtype == precision and abs(float(whole) / expected - 1) <= LOSS_BOUND[precision]
        # the mean of the losses of parts, by what was counted over the whole batch, is that of the batch
        assert abs(float(of_parts) / expected - 1) <= 2 * LOSS_BOUND[precision]


def test_twenty_steps_in_float64_end_at_the_twins_weights_and_leave_what_is_unused_alone():
    rate, count = 1e-3, 20
    twin, build = twins(CONFIG, "float64")
    before = {name: tensor.numpy().copy() for name, tensor in twin.state_dict().items()}
    batches = [(random_array(i, 4, 3, 48, 48), draw_cells(i, 4, (2, 2), 2)) for i in range(count)]

    with jax.enable_x64(True):
        graphdef, state = nnx.split(flax_module(build, twin.state_dict()))
        vector, tree = ravel_pytree(nnx.to_pure_dict(state))  # as one vector, which takes less compiling
        shapes = tree(vector)
        model = nnx.merge(graphdef, shapes)
        used = [
            jnp.full(x.size, not model.unused(".".join(str(key.key) for key in path)))
            for path, x in jax.tree.leaves_with_path(shapes)
        ]
        used, optimizer = jnp.concatenate(used), optax.adamw(rate, weight_decay=0.05)

        @jax.jit
        def step(vector, state, x, cells):
            def loss(vector):
                predictions = nnx.merge(graphdef, tree(vector))(x, cells)
                patches, masks = pretraining.image_patches(x, CONFIG), pretraining.patch_masks(cells, CONFIG)
                return pretraining.masked_loss(predictions, patches, masks, CONFIG), predictions

            (value, outs), grads = jax.value_and_grad(loss, has_aux=True)(vector)
            updates, state = optimizer.update(grads, state, vector)
            return vector + updates * used, state, value, outs, grads

        state, of_flax = optimizer.init(vector), []
        for x, cells in batches:
            vector, state, value, outs, grads = step(vector, state, channels_last(x), jnp.asarray(cells))
            of_flax.append((float(value), jax.tree.map(np.asarray, outs), flatten(tree(grads))))
        after = flatten(tree(vector))

    used = [parameter for name, parameter in twin.train().named_parameters() if not twin.unused(name)]
    of_torch = torch.optim.AdamW(used, lr=rate, weight_decay=0.05)
    for i, ((x, cells), (value, predictions, grads)) in enumerate(zip(batches, of_flax, strict=True)):
        x, cells = torch.tensor(x), torch.tensor(cells)
        outs = twin(x, cells)
        patches, masks = torch_pretraining.image_patches(x, CONFIG), torch_pretraining.patch_masks(cells, CONFIG)
        loss = torch_pretraining.masked_loss(outs, patches, masks, CONFIG)
        of_torch.zero_grad()
        loss.backward()
        if i == 0:
            for got, want in zip(predictions, outs, strict=True):
                assert error(got, want) <= OUTPUT_BOUND["float64"]
            expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
            assert {name for name in before if name not in expected} == set(filter(twin.unused, before))
            assert not any(grads[name].any() for name in before if name not in expected)
            errors = gradient_errors({name: grads[name] for name in expected}, expected)
            assert max(errors.values()) <= GRADIENT_BOUND["float64"], errors
        of_torch.step()
        assert abs(value / loss.item() - 1) < 1e-9
    for name, parameter in twin.named_parameters():
        if twin.unused(name):
            np.testing.assert_array_equal(after[name], before[name])
        else:
            assert error(after[name], parameter) <= 1e-8
            assert np.abs(after[name] - before[name]).max() > 1e-4


def test_half_precision_predicts_and_has_features_in_float32():
    twin, _ = twins(CONFIG, "float32")
    x, cells = random_array(1, 4, 3, 48, 48).astype(np.float32), draw_cells(0, 4, (2, 2), 2)
    half = torch_pretraining.MaskedCrossViT(CONFIG, dtype=torch.bfloat16).eval()
    half.load_state_dict(twin.state_dict())
    model = flax_module(partial(_half, CONFIG), twin.state_dict())
    x, cells = torch.tensor(x), torch.tensor(cells)
    of_flax = nnx.jit(lambda model, x, cells: [*model(x, cells), model.features(x)])(
        model, jnp.asarray(channels_last(x.numpy())), jnp.asarray(cells.numpy())
    )
    with torch.no_grad():
        want, of_torch = ([*one(x, cells), one.features(x)] for one in (twin, half))
    for results in (of_torch, of_flax):
        assert all(0 < error(got, expected) < 0.05 for got, expected in zip(results, want, strict=True))


def _half(config, rngs):
    return pretraining.MaskedCrossViT(config, dtype=jnp.bfloat16, rngs=rngs)


# --- cells ---


def test_patches_are_masked_where_masked_cells_cover_half_of_them_or_more():
    for config, grid in ((CONFIG, (2, 2)), (UNLIKE, (5, 5)), (UNLIKE.replace(crop_scale=True), (4, 2))):
        cells = draw_cells(3, 4, grid, grid[0] * grid[1] // 2)
        masks = [np.asarray(mask) for mask in pretraining.patch_masks(jnp.asarray(cells), config)]
        of_torch = torch_pretraining.patch_masks(torch.tensor(cells), config)
        side = config.image_size[0]
        for branch, (mask, other) in enumerate(zip(masks, of_torch, strict=True)):
            np.testing.assert_array_equal(mask, other)
            patches, seen = config.grid_size[branch][0], config.branch_image_size[branch][0]
            # by brute force: every pixel of the image in as many parts as there are patches along a side
            fine = cells.repeat(side * patches // grid[0], 1).repeat(side * patches // grid[1], 2)
            if config.crop_scale:
                first = round((side - seen) / 2) * patches
                fine = fine[:, first : first + seen * patches, first : first + seen * patches]
            length = fine.shape[1] // patches
            shares = fine.reshape(len(cells), patches, length, patches, length).mean((2, 4))
            np.testing.assert_array_equal(mask, shares.reshape(mask.shape) >= 0.5)
            rows, columns = cell_overlaps(config, branch, grid)
            assert len(set(map(sum, rows))) == len(set(map(sum, columns))) == 1


def test_cells_that_mask_nothing_or_everything_or_do_not_fit_are_refused():
    assert cell_grid(CONFIG, 24) == (2, 2) and cell_grid(CONFIG.replace(image_size=(48, 96)), 24) == (2, 4)
    assert [masked_cells((4, 4), ratio) for ratio in (0.01, 0.5, 0.6, 0.9)] == [1, 8, 10, 15]
    with pytest.raises(ValueError, match="cells of 20 pixels do not fill an image of 48 x 48"):
        cell_grid(CONFIG, 20)
    with pytest.raises(ValueError, match="cells of 12 pixels are smaller than the patches of branch 1, which have 24"):
        cell_grid(CONFIG, 12)
    with pytest.raises(ValueError, match=r"a share of 0\.9 masks all of the 4 cells"):
        masked_cells((2, 2), 0.9)
    with pytest.raises(ValueError, match="a share of 0 masks none of the 4 cells"):
        masked_cells((2, 2), 0.0)
    with pytest.raises(ValueError, match="5 x 5 cells do not fill images of 48 x 48 pixels"):
        pretraining.masked_images(jnp.zeros((1, 48, 48, 3)), jnp.zeros((1, 5, 5), bool))
    with pytest.raises(ValueError, match="5 x 5 cells do not fill images of 48 x 48 pixels"):
        torch_pretraining.masked_images(torch.zeros(1, 3, 48, 48), torch.zeros(1, 5, 5, dtype=bool))
    with pytest.raises(ValueError, match="needs a token for each patch"):
        torch_pretraining.MaskedCrossViT(CONFIG.replace(reduce_tokens="merge:1"))


def test_the_tokens_of_masked_patches_are_embeddings_that_do_not_decay():
    flax = nnx.eval_shape(lambda: pretraining.MaskedCrossViT(CONFIG, rngs=SameKey()))
    for twin in (flax, torch_pretraining.MaskedCrossViT(CONFIG)):
        assert {"mask_token_1", "body.pos_embed_0", "body.cls_token_1"} <= twin.no_weight_decay()
        assert twin.layer_of("mask_token_0") == twin.layer_of("body.patch_embed.0.proj.bias") == 0
        assert twin.layer_of("decoder.1.weight") == twin.layer_of("body.norm.1.weight") > 0
        assert twin.is_head("decoder.0.bias") and not twin.is_head("body.norm.0.bias")
        twin.set_grad_checkpointing()
        assert all(stage.grad_checkpointing for stage in twin.body.blocks)
