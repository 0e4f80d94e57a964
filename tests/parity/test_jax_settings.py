"""Settings of jax that users turn on to find mistakes of their own, images that are none, and programs that travel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import export

import crossvit_jax
import crossvit_torch
from convert.tree import nest
from tests.parity.reference import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
    channels_last,
    error,
    flax_gradients,
    flax_module,
    torch_gradients,
)
from tests.parity.reference import gradient_errors as errors_of
from tests.parity.reference import images as random_images
from tests.small_model import shrink, small_config
from tests.train.small_weights import small_timm_model
from tests.train.steps import classification, make_train_step
from train.config import TrainConfig
from train.optim.optimizer import make_optimizer
from train.optim.state import abstract_model, abstract_state

CLASSES = 5
RATES = {"drop_rate": 0.1, "pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}
CONFIG = small_config(CLASSES)


@pytest.fixture(scope="module")
def reference():
    return small_timm_model(CLASSES).double()


@pytest.fixture
def flax(reference):
    with jax.enable_x64(True):
        yield _flax_model(reference.state_dict(), jnp.float64)


def _flax_model(state_dict, param_dtype=jnp.float32):
    return flax_module(lambda rngs: crossvit_jax.CrossViT(CONFIG, param_dtype=param_dtype, rngs=rngs), state_dict)


def test_outputs_and_gradients_are_timms_where_jax_adds_no_axes_by_itself(flax, reference):
    x = random_images(48, batch=2)
    expected = torch_gradients(reference, [x], "float64")
    with jax.numpy_rank_promotion("raise"):
        result = flax_gradients(flax, [x], "float64")
    assert error(result.outputs[0], expected.outputs[0]) <= OUTPUT_BOUND["float64"]
    assert max(errors_of(result.parameters, expected.parameters).values()) <= GRADIENT_BOUND["float64"]


def test_outputs_are_timms_where_nothing_is_compiled(flax, reference):
    x = random_images(48, batch=1)
    with jax.disable_jit(), torch.no_grad():
        assert error(flax(jnp.asarray(channels_last(x))), reference(torch.tensor(x))) <= OUTPUT_BOUND["float64"]


@pytest.mark.parametrize(
    "settings",
    [RATES | {"fusion_depth": 2}, {"multi_conv": True, "global_pool": "avg", "crop_scale": True, "qkv_bias": False}],
    ids=str,
)
def test_no_setting_needs_axes_that_jax_adds(settings):
    def run(images):
        model = crossvit_jax.CrossViT(CONFIG.replace(**settings), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        logits = model(images, rngs=nnx.Rngs(dropout=0))
        model.eval()
        return logits, model.forward_intermediates(images, norm=True), model.attention_maps(images)

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(run, jnp.zeros((2, 60, 60, 3)))


@pytest.mark.parametrize(
    "settings",
    [
        {"grad_accum": 2, "loss": "bce", "lr_stepping": "step"},
        {"optimizer": "sgd", "clip_grad": 1.0, "ema_decay": 0.9, "layer_decay": 0.5},
    ],
    ids=str,
)
def test_no_training_step_needs_axes_that_jax_adds(monkeypatch, settings):
    shrink(monkeypatch.setitem)
    size = {"image_size": 48, "image_scale": (1.0, 2 / 3)}
    config = TrainConfig(epochs=2, warmup_epochs=0, batch_size=4, **size, **settings)
    with jax.numpy_rank_promotion("raise"):
        model = abstract_model(classification(config, CLASSES), config)
        optimizer = make_optimizer(config, steps_per_epoch=1, layer_of=model.layer_of)
        batch = {"image": jnp.zeros((4, 48, 48, 3)), "label": jnp.zeros(4, jnp.int32)}
        jax.eval_shape(make_train_step(model, optimizer, config), abstract_state(model, optimizer, config), batch)


def test_no_images_give_no_logits_in_both_twins_as_in_timm(reference):
    expected = reference(torch.zeros(0, 3, 48, 48, dtype=torch.float64)).shape
    twin = crossvit_torch.CrossViT(CONFIG).eval()
    assert twin(torch.zeros(0, 3, 48, 48)).shape == expected == (0, CLASSES)
    nothing = jnp.zeros((0, 48, 48, 3))
    graphdef, params = nnx.split(_flax_model(reference.state_dict()))

    def both(params):
        logits = nnx.merge(graphdef, params)(nothing)
        return logits.sum(), logits

    gradient, logits = jax.jit(jax.grad(both, has_aux=True))(params)
    assert logits.shape == expected
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))

    def features(params):
        model = nnx.merge(graphdef, params)
        return model.forward_features(nothing), model.forward_intermediates(nothing, intermediates_only=True)

    tokens, maps = jax.eval_shape(features, params)
    assert [x.shape for x in (*tokens, *maps)] == [(0, 17, 12), (0, 5, 24), (0, 4, 4, 12), (0, 2, 2, 24)]


def test_a_function_of_the_parameters_by_name_is_exported_and_read_again(reference):
    # by name: of a dict, jax writes no other keys than strings, and those of lists of layers are numbers
    graphdef = nnx.graphdef(_flax_model(reference.state_dict()))
    tensors = {name: jnp.asarray(tensor.numpy(), jnp.float32) for name, tensor in reference.state_dict().items()}
    x = random_images(48, batch=1)
    images = jnp.asarray(channels_last(x), jnp.float32)
    exported = export.export(jax.jit(lambda tensors, images: nnx.merge(graphdef, nest(tensors))(images)))
    logits = export.deserialize(exported(tensors, images).serialize()).call(tensors, images)
    with torch.no_grad():
        np.testing.assert_allclose(logits, reference(torch.tensor(x)), rtol=1e-4, atol=1e-4)
