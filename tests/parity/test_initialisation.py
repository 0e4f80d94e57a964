"""Fresh models: every parameter is drawn from timm's distribution."""

import functools

import numpy as np
import pytest
import timm
import torch
from flax import nnx
from scipy.stats import ks_2samp

import crossvit_jax
import crossvit_torch
from convert.tree import flatten
from crossvit_jax.config import TIMM_NAMES
from tests.parity.reference import abstract

# of a Kolmogorov-Smirnov test on each of some 300 parameters: a false alarm would be a one in a million draw
P_VALUE = 1e-9


@functools.cache
def fresh_weights(framework: str, variant: str) -> dict[str, np.ndarray]:
    if framework == "flax":
        # not in one program, whose compilation would take longer than all the rest
        weights = nnx.state(crossvit_jax.create_model(variant, rngs=nnx.Rngs(0)), nnx.Param)
        return {name: np.asarray(x) for name, x in flatten(weights).items()}
    torch.manual_seed(1)
    return {name: x.numpy() for name, x in crossvit_torch.create_model(variant).state_dict().items()}


@pytest.mark.parametrize("framework", ["flax", "torch"])
@pytest.mark.parametrize("variant", ["9", "9-dagger"])
def test_every_parameter_has_timms_distribution(variant, framework):
    torch.manual_seed(0)
    reference = timm.create_model(TIMM_NAMES[variant]).state_dict()
    result = fresh_weights(framework, variant)
    assert result.keys() == reference.keys()
    for name, expected in reference.items():
        expected, drawn = expected.numpy().ravel(), result[name].ravel()
        assert drawn.dtype == np.float32 and drawn.shape == expected.shape
        if np.ptp(expected) == 0:  # biases and norms
            np.testing.assert_array_equal(drawn, expected, err_msg=name)
        else:
            assert ks_2samp(drawn, expected, method="asymp").pvalue > P_VALUE, name
            assert np.abs(drawn).max() < 1.5 * np.abs(expected).max(), name


def test_parameters_of_one_shape_differ():
    weights = fresh_weights("flax", "9")
    blocks = [x for name, x in weights.items() if name.endswith("attn.qkv.weight") and x.shape == (768, 256)]
    assert len(blocks) == 9
    assert all(not np.array_equal(a, b) for i, a in enumerate(blocks) for b in blocks[:i])


def test_a_new_classifier_is_drawn_as_a_fresh_models_head():
    model = abstract("9", image_size=120, num_classes=3)
    model.reset_classifier(2000, "avg", rngs=nnx.Rngs(1))
    twin = crossvit_torch.create_model("9", image_size=120, num_classes=3)
    twin.reset_classifier(2000, "avg")
    assert model.num_classes == twin.num_classes == 2000
    assert model.global_pool == twin.global_pool == "avg"
    for weights in (model.head[1].kernel[...], twin.head[1].weight.detach().numpy()):
        assert np.std(weights) == pytest.approx(0.02, rel=0.02)
    assert not model.head[1].bias[...].any() and not twin.head[1].bias.any()
