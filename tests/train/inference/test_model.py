"""Weights on the devices, and programs that use them."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.train.small_weights import save_small
from train.inference.model import load_classifier


def test_a_program_runs_where_nothing_may_be_compiled(small_variant, tmp_path):
    classifier = load_classifier(str(save_small(tmp_path / "weights.safetensors", "abc")))
    batch = {"image": jnp.ones((2, 4))}
    with jax.disable_jit():
        program = classifier.compile(lambda model, batch: batch["image"] * model.num_classes, batch)
        np.testing.assert_array_equal(program(batch), np.full((2, 4), 3))
