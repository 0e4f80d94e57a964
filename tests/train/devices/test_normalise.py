"""Pixels that are normalised on the devices."""

import jax
import numpy as np

from crossvit_jax.preprocess import normalised
from train.devices.normalise import normalise_batch


def test_every_level_becomes_what_the_host_makes_of_it_and_other_values_stay():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    made = jax.jit(normalise_batch)({"image": levels, "mask": np.ones(1)})
    assert made["image"].dtype == np.float32
    # near the mean what is left of a level is small, and has the error of the whole
    np.testing.assert_allclose(made["image"], normalised(levels), rtol=3e-7, atol=3e-7)
    np.testing.assert_array_equal(made["mask"], np.ones(1))
    given = {"image": normalised(levels)}
    assert normalise_batch(given) is given
