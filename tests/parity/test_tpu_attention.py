"""The attention kernel for TPUs: the numbers of plain attention, in interpretation; and where it is called."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from crossvit_jax.kernels import attention, tpu_attention
from crossvit_jax.kernels.attention import dot_product_attention
from tests.parity.reference import abstract, random_array
from tests.parity.test_dot_product_attention import plain

BOUND = {"float32": 2e-6, "bfloat16": 0.01}


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(attention, "_on_tpu", attention._tpu_kernel)
    with pltpu.force_tpu_interpret_mode():
        yield


def _given(dtype, queries, keys, heads, width, *, biased):
    shapes = [(2, queries, heads, width), *[(2, keys, heads, width)] * 2, (2, queries, heads, width)]
    *qkv, d_out = (jnp.asarray(random_array(seed, *shape), dtype) for seed, shape in enumerate(shapes))
    return [*qkv, jnp.asarray(random_array(5, 2, keys), jnp.float32) if biased else None], d_out


def _results(attend, given, d_out):
    @jax.jit
    def run(given, d_out):
        out, vjp = jax.vjp(attend, *given)
        return [out, *vjp(d_out.astype(out.dtype))]

    return [x for x in run(given, d_out) if x is not None]


def _error(result, reference):
    result, reference = (np.asarray(x, np.float64) for x in (result, reference))
    return np.abs(result - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize(("dtype", "biased"), [("float32", True), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width", "scores", "planned"),
    [
        (33, 33, 6, 8, 2**21, (3, 33)),  # two groups of three heads
        (33, 9, 2, 8, 2**21, (2, 33)),  # fewer keys, as where they are spatially reduced
        (300, 300, 5, 8, 2**18, (1, 128)),  # 128 queries at a time, and 44; one head at a time, as five have no divisor
        (256, 20, 1, 8, 2**16, (1, 128)),  # no rest
    ],
)
def test_outputs_and_gradients_equal_plain_attentions(
    interpreted, monkeypatch, dtype, queries, keys, heads, width, scores, planned, biased
):
    monkeypatch.setattr(tpu_attention, "_SCORES", scores * jnp.dtype(dtype).itemsize ** 2 // 4)
    assert tpu_attention.plan((2, heads, width, queries), keys, jnp.dtype(dtype), biased=biased) == planned
    given, d_out = _given(dtype, queries, keys, heads, width, biased=biased)
    kernel = _results(lambda q, k, v, bias: dot_product_attention(q, k, v, "tpu", bias), given, d_out)
    with jax.enable_x64():
        wide = [None if x is None else x.astype(jnp.float64) for x in given]
        reference = _results(plain, wide, d_out.astype(jnp.float64))
    assert [x.dtype for x in kernel] == [dtype] * 4 + ["float32"] * biased
    errors = [_error(result, expected) for result, expected in zip(kernel, reference, strict=True)]
    assert max(errors) <= BOUND[dtype], errors


def test_the_shapes_of_the_variants_are_computed_as_is_planned():
    def plan(tokens, heads, width, dtype="bfloat16", **bias):
        return tpu_attention.plan((1, heads, width, tokens), tokens, jnp.dtype(dtype), **bias)

    assert plan(401, 3, 32) == plan(197, 3, 64)._replace(queries=401) == (3, 401)  # Ti
    assert plan(401, 3, 32, "float32") == (3, 256)
    assert plan(1157, 12, 32) == (3, 384)  # B at 408 pixels
    assert plan(1157, 12, 32, "float32") is None
    assert plan(1157, 12, 32, biased=True) == (1, 384)
    assert plan(6401, 3, 32) is None  # a detector at 960 pixels
    assert plan(197, 3, 64, "float16") is None
    assert plan(197, 3, 64, "float64") is None


def _for_tpus(function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()


def test_every_self_attention_of_a_model_is_the_kernel_forwards_and_backwards():
    settings = {"image_size": 120, "stages": 1, "depth": (1, 2), "dtype": jnp.bfloat16}
    model = abstract("ti", **settings, reduce_tokens="merge:4")  # of which only the last has a bias
    model.eval()
    model.set_attention("tpu")
    graphdef, params = nnx.split(model)

    def loss(params, images):
        return nnx.merge(graphdef, params)(images).sum()

    program = _for_tpus(jax.grad(loss), params, jax.ShapeDtypeStruct((2, 120, 120, 3), jnp.float32))
    assert program.count('kernel_name = "forward_kernel"') == program.count('kernel_name = "backward_kernel"') == 3


@pytest.mark.parametrize("precision", ["high", "highest", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_precision_of_products_is_one_that_the_kernels_compiler_knows(dtype, precision):
    with jax.default_matmul_precision(precision):
        program = _for_tpus(
            partial(dot_product_attention, implementation="tpu"), *[jax.ShapeDtypeStruct((2, 19, 3, 8), dtype)] * 3
        )
    assert "tpu_custom_call" in program


def test_a_mesh_of_explicit_axes_has_xlas_attention():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    arrays = [jax.ShapeDtypeStruct((2, 19, 3, 8), jnp.float32)] * 3
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(attention._tpu_kernel)(*arrays, None)
    assert "pallas_call" not in str(program)


@pytest.mark.parametrize("tokens", [19, 5000])
def test_too_many_tokens_and_other_devices_have_xlas_attention(tokens):
    arrays = [jax.ShapeDtypeStruct((2, tokens, 3, 8), jnp.bfloat16)] * 3
    attend = partial(dot_product_attention, implementation="tpu")
    assert ("tpu_custom_call" in _for_tpus(attend, *arrays)) == (tokens == 19)
    elsewhere = jax.jit(attend).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.exponential" in elsewhere
    assert "custom_call" not in elsewhere
