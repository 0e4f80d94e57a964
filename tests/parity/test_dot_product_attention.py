"""The attention whose gradient is written by hand: same numbers as the plain one, and on GPUs and TPUs nothing large is
kept for it."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from crossvit_jax.attention import Attention
from crossvit_jax.kernels import attention as attention
from crossvit_jax.kernels.attention import dot_product_attention
from tests.parity.reference import abstract, random_array

TOKENS = 19


def plain(q, k, v, bias=None):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if bias is not None:
        scores += bias[:, None, None]
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def heads(dtype, *, scale=1.0):
    return [scale * jnp.asarray(random_array(seed, 2, TOKENS, 3, 8), dtype) for seed in (1, 2, 3)]


def weighted_sum(attend):
    """A scalar whose gradient differs from place to place."""
    weights = jnp.asarray(random_array(4, 2, TOKENS, 3, 8))
    return lambda *qkv: (attend(*qkv).astype(jnp.float32) * weights).sum()


@pytest.mark.parametrize("scale", [1.0, 30.0])  # the second: scores in the thousands, whose exponential would overflow
def test_outputs_gradients_and_second_derivatives_equal_plain_attentions_in_float64(scale):
    with jax.enable_x64():
        qkv = heads(jnp.float64, scale=scale)

        def second(attend):
            first = jax.grad(lambda *x: attend(*x).sum())
            return jax.grad(lambda *x: (first(*x) ** 2).sum(), argnums=(0, 1, 2))

        @partial(jax.jit, static_argnums=0)
        def results(attend, *qkv):
            return attend(*qkv), jax.grad(weighted_sum(attend), (0, 1, 2))(*qkv), second(attend)(*qkv)

        for ours, expected in zip(results(dot_product_attention, *qkv), results(plain, *qkv), strict=True):
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("keys", [TOKENS, 6])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_bias_of_each_key_and_its_gradient_equal_plain_attentions(monkeypatch, in_pieces, platform, keys):
    monkeypatch.setattr(attention, "_SMALLEST_PIECE", 4 * TOKENS * keys if in_pieces else 2**19)
    kernel = attention._attend_in_pieces if platform == "cpu" else attention._attend_and_recompute
    monkeypatch.setattr(attention, "_attend", kernel)
    with jax.enable_x64():
        q, k, v = heads(jnp.float64)
        given = [q, k[:, :keys], v[:, :keys], jnp.asarray(random_array(5, 2, keys))]

        @partial(jax.jit, static_argnums=0)
        def results(attend, *given):
            return attend(*given), jax.grad(weighted_sum(attend), (0, 1, 2, 3))(*given)

        ours = results(lambda q, k, v, bias: dot_product_attention(q, k, v, "xla", bias), *given)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(results(plain, *given)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_a_bias_in_half_precision_is_as_near_to_float64_as_plain_attention_is(scale):
    rounded, bias = heads(jnp.bfloat16, scale=scale), jnp.asarray(random_array(5, 2, TOKENS), jnp.float32)
    with jax.enable_x64():
        exact = plain(*(x.astype(jnp.float64) for x in (*rounded, bias)))
        errors = [
            jnp.abs(out.astype(jnp.float64) - exact).max()
            for out in (dot_product_attention(*rounded, "xla", bias), plain(*rounded, bias))
        ]
    assert errors[0] <= 1.02 * errors[1]


def test_half_precision_is_as_near_to_float64_as_plain_attention_is():
    rounded = heads(jnp.bfloat16)
    with jax.enable_x64():
        exact = plain(*(x.astype(jnp.float64) for x in rounded))
        error = jnp.abs(dot_product_attention(*rounded).astype(jnp.float64) - exact).max()
        error_of_plain = jnp.abs(plain(*rounded).astype(jnp.float64) - exact).max()
    assert dot_product_attention(*rounded).dtype == jnp.bfloat16
    assert error <= 1.02 * error_of_plain


def _value_and_gradients(q, k, v, d_out):
    out, vjp = jax.vjp(dot_product_attention, q, k, v)
    return out, *vjp(d_out)


def _program(function, *arrays, platform):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def test_on_a_cpu_the_heads_are_attended_in_pieces_that_give_what_the_whole_gives(monkeypatch):
    arrays = [jnp.asarray(random_array(seed, 7, TOKENS, 3, 8)) for seed in (1, 2, 3, 4)]
    whole = jax.jit(_value_and_gradients)(*arrays)
    monkeypatch.setattr(attention, "_SMALLEST_PIECE", 4 * TOKENS**2)
    jax.clear_caches()
    pieces = jax.jit(lambda *arrays: _value_and_gradients(*arrays))(*arrays)
    for got, expected in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    program = _program(lambda *arrays: _value_and_gradients(*arrays), *arrays, platform="cpu")
    # 21 heads of 7 images in four pieces; scores in the forward pass, the gradient of the weights in the backward
    assert len(re.findall(rf"dot_general.*-> tensor<6x{TOKENS}x{TOKENS}xf32>", program)) == 2 * 3
    assert len(re.findall(rf"dot_general.*-> tensor<3x{TOKENS}x{TOKENS}xf32>", program)) == 2


@pytest.mark.parametrize(("smallest", "largest", "pieces"), [(2**30, 2**30, 1), (1, 2**30, 4), (2**30, 1, 16)])
def test_scores_are_cut_into_no_more_pieces_than_are_worth_compiling(monkeypatch, smallest, largest, pieces):
    monkeypatch.setattr(attention, "_SMALLEST_PIECE", smallest)
    monkeypatch.setattr(attention, "_LARGEST_PIECE", largest)
    jax.clear_caches()
    qkv = [jnp.zeros((16, TOKENS, 2, 8))] * 3
    program = _program(lambda *qkv: dot_product_attention(*qkv), *qkv, platform="cpu")
    assert len(re.findall(rf"dot_general.*{TOKENS}x{TOKENS}xf32>", program)) == 2 * pieces  # scores, weighted values


@pytest.mark.parametrize(
    ("platform", "exponentials", "largest"), [("cuda", 2, "2x3"), ("tpu", 2, "2x3"), ("cpu", 1, "6")]
)
def test_the_weights_are_kept_for_the_gradient_on_a_cpu_alone(platform, exponentials, largest):
    program = _program(_value_and_gradients, *heads(jnp.float32), jnp.ones((2, TOKENS, 3, 8)), platform=platform)
    weights = rf"exponential %\d+ : tensor<{largest}x{TOKENS}x{TOKENS}xf32>"
    assert len(re.findall(weights, program)) == program.count("stablehlo.exponential") == exponentials


def test_with_cudnn_every_self_attention_of_a_model_is_nvidias_kernel_forwards_and_backwards(monkeypatch):
    """For a GPU that is not here: of the program one can at least see what it would call."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    settings = {"image_size": 120, "stages": 1, "depth": (1, 2), "dtype": jnp.bfloat16}
    model = abstract("ti", **settings)
    model.set_attention("cudnn")
    images = jax.ShapeDtypeStruct((2, 120, 120, 3), jnp.float32)
    for trains in (False, True):
        model.train() if trains else model.eval()
        graphdef, params = nnx.split(model)

        def loss(params, images, graphdef=graphdef):
            return nnx.merge(graphdef, params)(images).sum()

        # 101 and 50 tokens: of an odd number jax takes no gradient by itself
        program = jax.jit(jax.grad(loss)).trace(params, images).lower(lowering_platforms=("cuda",)).as_text()
        assert program.count("@__cudnn$fmhaSoftmax(") == program.count("@__cudnn$fmhaSoftmaxBackward(") == 3
        # in training the norm before has written one token more already
        assert ("tensor<2x102x288xbf16>" in program, "tensor<2x101x288xbf16>" in program) == (trains, not trains)


def test_cudnn_pads_an_odd_number_of_tokens_for_the_gradient_only(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def attend(*qkv):
        return dot_product_attention(*qkv, "cudnn")

    def loss(*qkv):
        return attend(*qkv).astype(jnp.float32).sum()

    qkv = heads(jnp.bfloat16)
    assert TOKENS % 2 == 1
    assert "stablehlo.pad" not in _program(attend, *qkv, platform="cuda")
    assert _program(jax.grad(loss), *qkv, platform="cuda").count("stablehlo.pad") >= 3


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS + 1])
@pytest.mark.parametrize("trains", [True, False])
def test_around_cudnns_kernel_outputs_and_gradients_are_those_of_plain_attention(monkeypatch, tokens, trains):
    """In float64, with plain attention in the place of the kernel, which leaves NaN where a gradient does not count."""
    seen = []

    @jax.custom_vjp
    def spoilt(x):
        return x

    spoilt.defvjp(lambda x: (x, None), lambda _, d: (d.at[:, tokens:].set(jnp.nan),))

    def kernel(q, k, v, _, query_seq_lengths=(TOKENS + 1,), key_value_seq_lengths=(TOKENS + 1,)):
        seen.append((q.shape[1], k.shape[1], *set(np.asarray(query_seq_lengths).tolist())))
        left_out = jnp.arange(k.shape[1]) >= jnp.asarray(key_value_seq_lengths)[:, None]
        return plain(*map(spoilt, (q, k, v)), jnp.where(left_out, -jnp.inf, 0.0))

    monkeypatch.setattr(attention, "_cudnn_kernel", kernel)
    with jax.enable_x64():
        module = Attention(24, 3, dtype=None, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        module.train() if trains else module.eval()
        x, weights = (jnp.asarray(random_array(seed, 2, tokens, 24)) for seed in (1, 2))

        def results(implementation):
            module.implementation = implementation
            graphdef, params = nnx.split(module)
            out, vjp = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
            return jax.tree.leaves((out, vjp(weights)))

        for got, expected in zip(results("cudnn"), results("xla"), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-13 * float(jnp.abs(expected).max()), rtol=1e-12)
        assert set(seen) == {(TOKENS + 1,) * 3}


def test_cudnn_takes_a_bias_forwards_and_backwards(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def loss(*given):
        return dot_product_attention(*given[:3], "cudnn", given[3]).astype(jnp.float32).sum()

    # of odd numbers jax takes no gradient by itself
    for tokens, keys in ((TOKENS, TOKENS), (TOKENS + 1, TOKENS + 1), (TOKENS, 6), (TOKENS + 1, 5)):
        given = [jnp.zeros((2, count, 3, 8), jnp.bfloat16) for count in (tokens, keys, keys)]
        given.append(jnp.zeros((2, keys)))
        program = _program(jax.grad(loss, (0, 1, 2, 3)), *given, platform="cuda")
        assert program.count("@__cudnn$fmhaScaleBiasSoftmax(") == 1
        assert program.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs NVIDIA's kernel")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(401, 32), (197, 64), (100, 32)])
def test_cudnn_gives_what_plain_attention_gives_on_a_gpu(tokens, width, biased):
    bias = jnp.asarray(random_array(5, 2, tokens), jnp.float32) if biased else None
    qkv = [jnp.asarray(random_array(seed, 2, tokens, 3, width), jnp.bfloat16) for seed in (1, 2, 3)]
    d_out = jnp.asarray(random_array(4, 2, tokens, 3, width), jnp.bfloat16)
    for inference in (True, False):

        def results(implementation, inference=inference):
            out, vjp = jax.vjp(lambda *qkv: dot_product_attention(*qkv, implementation, bias), *qkv)
            return (dot_product_attention(*qkv, implementation, bias),) if inference else (out, *vjp(d_out))

        for got, expected in zip(results("cudnn"), results("xla"), strict=True):
            scale = float(jnp.abs(expected.astype(jnp.float32)).max())
            np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), atol=0.02 * scale)


def test_an_unknown_implementation_is_refused():
    model = abstract("ti", image_size=120)
    for implementation in ("flash", "auto"):  # the latter without devices
        with pytest.raises(
            ValueError, match=f"must be 'xla', 'cudnn', 'tpu', or 'auto' with devices; got '{implementation}'"
        ):
            model.set_attention(implementation)


def test_tpus_have_an_order_of_their_own():
    devices = [SimpleNamespace(platform="tpu", compute_capability=None)] * 2
    model = abstract("ti", image_size=120)  # of any precision
    model.set_attention("auto", devices)
    assert model.blocks[0].blocks[1][0].attn.implementation == "tpu"
    assert attention.fastest_implementation([*devices, SimpleNamespace(platform="cpu")], jnp.bfloat16) == "xla"


@pytest.mark.parametrize(
    ("capabilities", "dtype", "expected"),
    [
        (["9.0"], jnp.bfloat16, "cudnn"),
        (["8.0", "8.6"], jnp.float16, "cudnn"),
        (["12.0"], "bfloat16", "cudnn"),
        (["9.0"], jnp.float32, "xla"),
        (["7.5"], jnp.bfloat16, "xla"),
        (["8.0", "7.5"], jnp.bfloat16, "xla"),
        (["gfx90a"], jnp.bfloat16, "xla"),  # AMD
        ([None], jnp.bfloat16, "xla"),  # CPUs
        ([], jnp.bfloat16, "xla"),
    ],
)
def test_cudnn_is_fastest_on_ampere_and_later_in_half_precision(capabilities, dtype, expected):
    devices = [SimpleNamespace(**({} if c is None else {"compute_capability": c})) for c in capabilities]
    assert attention.fastest_implementation(devices, dtype) == expected
    if devices:
        model = abstract("ti", image_size=120, dtype=dtype)
        model.set_attention("auto", devices)
        assert model.blocks[0].blocks[1][0].attn.implementation == expected
