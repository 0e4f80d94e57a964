"""Softmax attention that keeps no (tokens, tokens) matrix for its gradient.

The backward pass computes the weights again from the queries and keys, as fused kernels do. Memory for activations no
longer grows with the square of the tokens, and on a CPU that alone more than halves the time of a training step's
attention.
"""

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


Heads = Float[Array, "batch heads tokens width"]

_PIECE = 8 * 2**20
_MAX_PIECES = 8  # each is compiled on its own


@jax.custom_vjp
def _attend(q: Heads, k: Heads, v: Heads) -> Heads:
    if not isinstance(q.shape[0], int):  # a symbolic batch, under jax.export, cannot be cut
        return _forward(q, k, v)[0]
    return jax.lax.platform_dependent(q, k, v, cpu=_in_pieces, default=lambda q, k, v: _forward(q, k, v)[0])


def _in_pieces(q: Heads, k: Heads, v: Heads) -> Heads:
    """The batch cut so that a piece's scores have at most `_PIECE` bytes, in at most `_MAX_PIECES` pieces.

    XLA fuses all of attention on a CPU, and asks the system for the scores' memory every time: a large piece of it
    comes as fresh pages, and to fetch those takes longer than attention itself.
    """
    batch, heads, tokens, _ = q.shape
    images = max(_PIECE // (4 * heads * tokens**2), -(-batch // _MAX_PIECES), 1)
    pieces = [_forward(q[i : i + images], k[i : i + images], v[i : i + images])[0] for i in range(0, batch, images)]
    return jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def _forward(q: Heads, k: Heads, v: Heads) -> tuple[Heads, tuple[Array, ...]]:
    scores = _matmul(q, _transposed(k))
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp((scores - largest) * _scale(q))  # scaled here, scores need not be written twice
    total = weights.sum(-1, keepdims=True)
    # dividing the (tokens, width) result is less work than dividing the (tokens, tokens) weights
    out = (_matmul(weights.astype(q.dtype), v) / total).astype(q.dtype)
    return out, (q, k, v, out, largest * _scale(q) + jnp.log(total))


def _backward(residuals: tuple[Array, ...], d_out: Heads) -> tuple[Heads, Heads, Heads]:
    q, k, v, out, log_total = residuals
    # (batch, heads, keys, queries): so, no product below needs one of these large matrices transposed
    weights = jnp.exp(_matmul(k, _transposed(q)) * _scale(q) - _transposed(log_total))
    mean = (d_out.astype(weights.dtype) * out.astype(weights.dtype)).sum(-1)[..., None, :]
    d_scores = (weights * (_matmul(v, _transposed(d_out)) - mean)).astype(q.dtype)
    d_q = _transposed(_matmul(_transposed(k), d_scores)) * _scale(q)
    d_k = _matmul(d_scores, q) * _scale(q)
    d_v = _matmul(weights.astype(q.dtype), d_out)
    return d_q.astype(q.dtype), d_k.astype(q.dtype), d_v.astype(q.dtype)


_attend.defvjp(_forward, _backward)


def _scale(q: Heads) -> float:
    # not of the queries themselves, which half precision would round once more
    return q.shape[-1] ** -0.5


def _transposed(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _matmul(a: Array, b: Array) -> Array:
    """a @ b, summed up and returned in float32 or wider."""
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
