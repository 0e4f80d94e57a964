"""The resize between the branches is torch's bicubic, to the rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import crossvit_jax.resize
import crossvit_torch.resize
from crossvit_jax.kernels import resize
from crossvit_jax.resize import bicubic_taps
from tests.parity.reference import OUTPUT_BOUND, channels_last, error, images

SIZES = [
    ((240, 240), (224, 224)),
    ((408, 408), (384, 384)),
    ((48, 72), (32, 48)),
    ((17, 30), (40, 23)),
    ((8, 8), (2, 2)),
]


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_scale_image_equals_torch_interpolate(before, after, precision):
    x = images(before).astype(precision)
    expected = torch.nn.functional.interpolate(torch.tensor(x), size=after, mode="bicubic", align_corners=False).numpy()
    with jax.enable_x64(precision == "float64"):
        result = crossvit_jax.resize.scale_image(jnp.asarray(channels_last(x)), after)
        # a few units of rounding: the sums of four products run in another order
        assert error(result, channels_last(expected)) <= {"float32": 1e-6, "float64": 1e-14}[precision]
    assert error(crossvit_torch.resize.scale_image(torch.tensor(x), after), expected) == 0


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_the_four_taps_that_gpus_take_give_what_torch_and_the_products_give(before, after, precision):
    x = images(before).astype(precision)
    expected = torch.nn.functional.interpolate(torch.tensor(x), size=after, mode="bicubic", align_corners=False).numpy()
    taps = [bicubic_taps(have, want, np.dtype(precision)) for have, want in zip(before, after, strict=True)]
    with jax.enable_x64(precision == "float64"):
        by_taps, by_products = (
            jax.jit(lambda x, f=f: f(x, *taps))(channels_last(x)) for f in (resize._by_taps, resize._by_products)
        )
        assert by_taps.dtype == precision
    assert error(by_taps, channels_last(expected)) <= {"float32": 1.1e-6, "float64": 1e-14}[precision]
    assert error(by_taps, np.asarray(by_products)) <= {"float32": 4.8e-7, "float64": 1e-15}[precision]


@pytest.mark.parametrize(("platform", "products", "gathers"), [("cpu", 2, False), ("tpu", 2, False), ("cuda", 0, True)])
def test_gpus_take_the_taps_and_other_devices_the_products(platform, products, gathers):
    scale = jax.jit(lambda x: crossvit_jax.resize.scale_image(x, (32, 32)))
    program = scale.trace(jnp.ones((1, 48, 48, 3))).lower(lowering_platforms=(platform,)).as_text()
    assert (program.count("stablehlo.dot_general"), "stablehlo.gather" in program) == (products, gathers)


def test_each_output_pixel_is_a_weighted_mean_of_four_neighbours():
    matrix = crossvit_jax.resize.bicubic_matrix(240, 224, np.dtype("float64"))
    assert ((matrix != 0).sum(axis=1) <= 4).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-14)


@pytest.mark.parametrize("crop_scale", [False, True])
@pytest.mark.parametrize(("before", "after"), [((61, 52), (48, 48)), ((48, 48), (61, 52)), ((48, 60), (52, 48))])
def test_scale_image_crops_and_resizes_when_timm_does(before, after, crop_scale):
    from timm.models.crossvit import scale_image

    x = images(before).astype(np.float32)
    expected = scale_image(torch.tensor(x), after, crop_scale).numpy()
    result = crossvit_jax.resize.scale_image(jnp.asarray(channels_last(x)), after, crop_scale)
    assert error(result, channels_last(expected)) <= OUTPUT_BOUND["float32"]
    assert error(crossvit_torch.resize.scale_image(torch.tensor(x), after, crop_scale), expected) == 0


def test_images_of_the_right_size_are_untouched():
    x = jnp.ones((1, 24, 24, 3))
    assert crossvit_jax.resize.scale_image(x, (24, 24)) is x


def test_half_precision_images_are_resized_in_float32():
    x = jnp.asarray(channels_last(images(48)), jnp.bfloat16)
    result = crossvit_jax.resize.scale_image(x, (32, 32))
    expected = crossvit_jax.resize.scale_image(x.astype(jnp.float32), (32, 32)).astype(jnp.bfloat16)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, expected)
