"""The state of a run before its first step."""

import jax
from flax import nnx

from train.optim.state import _Keys


def test_keys_of_a_run_are_those_of_nnx():
    key = jax.random.key(3)
    ours, theirs = _Keys(key), nnx.Rngs(params=key)
    for _ in range(300):  # more than are made together
        assert (jax.random.key_data(ours.params()) == jax.random.key_data(theirs.params())).all()
