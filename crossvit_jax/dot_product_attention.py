"""Softmax attention that keeps no (tokens, tokens) matrix for its gradient.

The backward pass computes the weights again from the queries and keys, as fused kernels do. Memory for activations no
longer grows with the square of the tokens, and on a CPU that alone more than halves the time of a training step's
attention.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dot_product_attention(
    q: Float[Array, "batch tokens heads width"],
    k: Float[Array, "batch tokens heads width"],
    v: Float[Array, "batch tokens heads width"],
    implementation: Literal["xla", "cudnn"] = "xla",
) -> Float[Array, "batch tokens heads width"]:
    """softmax(q kᵀ / √width) v for every head, in the inputs' dtype; the softmax is in float32 or wider.

    Its gradient can be taken in reverse mode only; with "xla" to any order.

    Args:
        implementation: "xla" for any device and dtype; "cudnn" for NVIDIA's fused kernel: a GPU, half precision.

    Raises:
        ValueError, RuntimeError, NotImplementedError: "cudnn" for inputs or a device that it is not for, as jax says.
    """
    if implementation == "cudnn":
        return _cudnn(q, k, v)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return _attend(q, k, v).swapaxes(1, 2)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    tokens = q.shape[1]
    if tokens % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    # jax refuses the gradient for an odd number of tokens
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(q.shape[0], tokens, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :tokens]


Heads = Float[Array, "*heads tokens width"]
Tokens = Float[Array, "*heads tokens 1"]

_PIECES = 4
_MAX_PIECES = 16  # each is compiled on its own
_SMALLEST_PIECE, _LARGEST_PIECE = 2**19, 2**22  # bytes of scores


@jax.custom_vjp
def _attend(q: Heads, k: Heads, v: Heads) -> Heads:
    return _attend_forward(q, k, v)[0]


def _attend_forward(q: Heads, k: Heads, v: Heads) -> tuple[Heads, tuple[Array, ...]]:
    out, log_total = _by_platform(_forward, q, k, v, on_cpu=_forward)
    return out, (q, k, v, out, log_total)


def _attend_backward(residuals: tuple[Array, ...], d_out: Heads) -> tuple[Heads, Heads, Heads]:
    on_cpu = functools.partial(_backward, as_written=jax.lax.optimization_barrier)
    return _by_platform(_backward, *residuals, d_out, on_cpu=on_cpu)


_attend.defvjp(_attend_forward, _attend_backward)


def _by_platform(function: Callable, *arrays: Array, on_cpu: Callable) -> tuple[Array, ...]:
    """function(*arrays); on a CPU on_cpu(*arrays), in pieces."""
    if not isinstance(arrays[0].shape[0], int):  # a symbolic batch, under jax.export, cannot be cut
        return function(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=functools.partial(_in_pieces, on_cpu), default=function)


def _in_pieces(function: Callable, *arrays: Float[Array, "batch heads _ _"]) -> tuple:
    """The heads of all images cut into pieces.

    XLA runs the products of so small matrices on one core, one after the other, but pieces side by side; and the scores
    of a piece stay in the caches.
    """
    batch, heads, tokens, _ = arrays[0].shape
    scores = 4 * batch * heads * tokens**2
    pieces = max(min(_PIECES, scores // _SMALLEST_PIECE), min(_MAX_PIECES, scores // _LARGEST_PIECE), 1)
    size = -(-batch * heads // pieces)
    flat = [x.reshape(batch * heads, *x.shape[2:]) for x in arrays]
    parts = [function(*(x[start : start + size] for x in flat)) for start in range(0, batch * heads, size)]
    return tuple(jnp.concatenate(part).reshape(batch, heads, *part[0].shape[1:]) for part in zip(*parts, strict=True))


def _forward(q: Heads, k: Heads, v: Heads) -> tuple[Heads, Tokens]:
    """Attention, and the logarithm of each query's sum of exponentials."""
    scores = _matmul(q, _transposed(k))
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp((scores - largest) * _scale(q))  # scaled here, scores need not be written twice
    total = weights.sum(-1, keepdims=True)
    # dividing the (tokens, width) result is less work than dividing the (tokens, tokens) weights
    out = (_matmul(weights.astype(q.dtype), v) / total).astype(q.dtype)
    return out, largest * _scale(q) + jnp.log(total)


def _backward(
    q: Heads,
    k: Heads,
    v: Heads,
    out: Heads,
    log_total: Tokens,
    d_out: Heads,
    *,
    as_written: Callable[[Array], Array] = lambda x: x,
) -> tuple[Heads, Heads, Heads]:
    """The gradients of queries, keys and values. `as_written` keeps the compiler from changing what comes before it."""
    # (heads, keys, queries): so, no product below needs one of these large matrices transposed
    weights = jnp.exp(_matmul(k, _transposed(q)) * _scale(q) - _transposed(log_total))
    mean = (d_out.astype(weights.dtype) * out.astype(weights.dtype)).sum(-1)[..., None, :]
    d_scores = (weights * (_matmul(v, _transposed(d_out)) - mean)).astype(q.dtype)
    # else XLA moves both transpositions into the product, to the large matrix, and that takes longer on a CPU
    d_q = _transposed(as_written(_matmul(as_written(_transposed(k)), d_scores))) * _scale(q)
    d_k = _matmul(d_scores, q) * _scale(q)
    d_v = _matmul(weights.astype(q.dtype), d_out)
    return d_q.astype(q.dtype), d_k.astype(q.dtype), d_v.astype(q.dtype)


def _scale(q: Heads) -> float:
    # not of the queries themselves, which half precision would round once more
    return q.shape[-1] ** -0.5


def _transposed(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _matmul(a: Array, b: Array) -> Array:
    """a @ b, summed up and returned in float32 or wider."""
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
