"""Transforms of jax around the model: derivatives of higher order and in forward mode, several devices. In float64."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import crossvit_jax
from convert.tree import flatten, from_state_dict, nest
from tests.compilation import xla_flags
from tests.parity.reference import GRADIENT_BOUND, channels_last, flax_module, gradient_errors, images
from tests.small_model import small_config
from tests.train.small_weights import small_timm_model

CLASSES = 5
BOUND = GRADIENT_BOUND["float64"]
X = images(48, batch=4)


@pytest.fixture(scope="module")
def reference():
    return small_timm_model(CLASSES).double().eval()


@pytest.fixture
def model(reference):
    """Ours with the weights of timm's."""
    with jax.enable_x64(True):
        yield flax_module(
            lambda rngs: crossvit_jax.CrossViT(small_config(CLASSES), param_dtype=jnp.float64, rngs=rngs),
            reference.state_dict(),
        )


@pytest.fixture(scope="module")
def timm_gradient(reference):
    return dict(zip(_names(reference), _gradient(reference), strict=True))


@pytest.fixture(scope="module")
def direction(reference):
    """One for each parameter of timm's."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(x.shape, generator=generator).double() for name, x in reference.named_parameters()}


def _names(module):
    return [name for name, _ in module.named_parameters()]


def _gradient(module, **kwargs):
    loss = module(torch.tensor(X)).square().mean()
    return torch.autograd.grad(loss, list(module.parameters()), **kwargs)


def _loss_of(model):
    graphdef, params = nnx.split(model)
    x = jnp.asarray(channels_last(X))
    return lambda params: jnp.square(nnx.merge(graphdef, params)(x)).mean(), nnx.to_pure_dict(params)


def test_hessian_vector_products_in_forward_mode_over_reverse_are_timms(model, reference, direction):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one has no second derivative
        gradient = _gradient(reference, create_graph=True)
        expected = torch.autograd.grad(gradient, list(reference.parameters()), list(direction.values()))
    loss, params = _loss_of(model)
    tangent = nest({name: jnp.asarray(x) for name, x in from_state_dict(direction).items()})
    _, product = jax.jit(lambda params, tangent: jax.jvp(jax.grad(loss), (params,), (tangent,)))(params, tangent)
    expected = dict(zip(_names(reference), expected, strict=True))
    assert max(gradient_errors(flatten(product), expected).values()) <= BOUND


def _by_jvp(loss, params, tangent):
    return jax.jvp(loss, (params,), (tangent,))[1]


def _by_linearize(loss, params, tangent):
    return jax.linearize(loss, params)[1](tangent)


def _by_jacfwd(loss, params, tangent):  # whose tangents are a batch
    return jax.jacfwd(lambda step: loss(jax.tree.map(lambda x, d: x + step * d, params, tangent)))(0.0)


@pytest.mark.parametrize("derivative", [_by_jvp, _by_linearize, _by_jacfwd], ids=lambda f: f.__name__)
def test_in_forward_mode_derivatives_along_a_direction_are_timms(model, timm_gradient, direction, derivative):
    expected = sum(float((gradient * direction[name]).sum()) for name, gradient in timm_gradient.items())
    model.set_forward_mode()
    loss, params = _loss_of(model)
    tangent = nest({name: jnp.asarray(x) for name, x in from_state_dict(direction).items()})
    along = jax.jit(partial(derivative, loss))(params, tangent)
    assert float(along) == pytest.approx(expected, rel=BOUND)


def test_forward_mode_can_be_turned_off_again_and_leaves_nothing_behind(model):
    before = nnx.graphdef(model)
    model.set_forward_mode()
    assert nnx.graphdef(model) != before
    model.set_forward_mode(False)
    assert nnx.graphdef(model) == before


def test_no_tracer_leaks(model):
    loss, params = _loss_of(model)
    with jax.checking_leaks():
        jax.jit(jax.grad(loss)).trace(params)


_ON_DEVICES = """
import sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import crossvit_jax
from convert.tree import flatten, from_state_dict, nest
from tests.parity.reference import flax_module
from tests.small_model import small_config

jax.config.update("jax_enable_x64", True)
with np.load(sys.argv[1]) as arrays:
    x, tensors = arrays["x"], {name[1:]: arrays[name] for name in arrays if name[0] == "_"}
params = nest(from_state_dict(tensors))
model = nnx.eval_shape(lambda: crossvit_jax.CrossViT(small_config(5), param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
model.eval()
graphdef = nnx.graphdef(model)

def loss(params, x):
    return jnp.square(nnx.merge(graphdef, params)(x)).mean()

def save(name, gradients):
    np.savez(f"{sys.argv[2]}/{name}.npz", **flatten(jax.device_get(gradients)))

def put(mesh):
    return jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("data")))

explicit = jax.make_mesh((2,), ("data",))
assert explicit.axis_types == (AxisType.Explicit,)
with jax.set_mesh(explicit):
    save("explicit", jax.jit(jax.grad(loss))(*put(explicit)))

automatic = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
@jax.jit
@partial(jax.shard_map, mesh=automatic, in_specs=(P(), P("data")), out_specs=P())
def shard_map(params, x):
    return jax.grad(lambda params: jax.lax.pmean(loss(params, x), "data"))(params)
save("shard_map", shard_map(*put(automatic)))
"""


@pytest.fixture(scope="module")
def on_devices(reference, tmp_path_factory):
    """The folder with the gradients of ours on two devices."""
    folder = tmp_path_factory.mktemp("gradients")
    tensors = {f"_{name}": tensor.numpy() for name, tensor in reference.state_dict().items()}
    np.savez(folder / "inputs.npz", x=channels_last(X), **tensors)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=2)}
    command = [sys.executable, "-c", _ON_DEVICES, str(folder / "inputs.npz"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("transform", ["shard_map", "explicit"])
def test_gradients_on_two_devices_are_timms(on_devices, timm_gradient, transform):
    with np.load(on_devices / f"{transform}.npz") as arrays:
        result = dict(arrays)
    assert max(gradient_errors(result, timm_gradient).values()) <= BOUND


@pytest.mark.parametrize("settings", [{"multi_conv": True, "fusion_depth": 2}, {"global_pool": "avg"}], ids=str)
def test_every_setting_passes_the_types_of_meshes(settings):
    # on a mesh of one device the types are those of many
    model = crossvit_jax.CrossViT(small_config(CLASSES).replace(**settings), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    whole, cut = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    def loss(params, images):
        return nnx.merge(graphdef, params)(images).mean()

    mesh = jax.make_mesh((1,), ("data",))
    mapped = partial(jax.shard_map, mesh=mesh, in_specs=(whole, cut), out_specs=(whole, cut))

    @mapped
    def step(params, images):
        return jax.grad(lambda *args: jax.lax.pmean(loss(*args), "data"), argnums=(0, 1))(params, images)

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.zeros((2, 48, 48, 3)), jax.sharding.NamedSharding(mesh, cut))
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, whole))
        for gradient in (jax.grad(loss, argnums=(0, 1)), step):
            jax.jit(gradient).trace(params, x)
