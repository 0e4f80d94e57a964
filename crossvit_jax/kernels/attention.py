"""Softmax attention with a gradient written by hand.

On GPUs and TPUs it computes the weights again from the queries and keys, as fused kernels do: memory for activations
does not grow with the square of the tokens. On a CPU, where time counts more, it keeps them.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from crossvit_jax.kernels.sharding import is_cut, vary_alike


def dot_product_attention(
    q: Float[Array, "batch tokens heads width"],
    k: Float[Array, "batch tokens heads width"],
    v: Float[Array, "batch tokens heads width"],
    implementation: Literal["xla", "cudnn"] = "xla",
) -> Float[Array, "batch tokens heads width"]:
    """softmax(q kᵀ / √width) v for every head, in the inputs' dtype; the softmax is in float32 or wider.

    Its gradient can be taken in reverse mode only; with "xla" to any order, the last of them in forward mode too.

    Args:
        implementation: "xla" for any device and dtype; "cudnn" for NVIDIA's fused kernel: a GPU, half precision.

    Raises:
        ValueError, RuntimeError, NotImplementedError: "cudnn" for inputs or a device that it is not for, as jax says.
    """
    q, k, v = vary_alike(q, k, v)
    if implementation == "cudnn":
        return _cudnn(q, k, v)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return _attend(q, k, v).swapaxes(1, 2)


def fastest_implementation(devices: Iterable[Any], dtype: Any) -> Literal["xla", "cudnn"]:
    """What `dot_product_attention` should take on devices, which may be some to compile for: "cudnn" in half precision
    where all are NVIDIA GPUs of compute capability 8.0 or later."""
    # other makers' GPUs tell something like "gfx90a", and other devices nothing
    found = [re.match(r"(\d+)\.", str(getattr(device, "compute_capability", ""))) for device in devices]
    fused = bool(found) and all(match is not None and int(match[1]) >= 8 for match in found)
    return "cudnn" if fused and jnp.dtype(dtype).itemsize == 2 else "xla"


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    kernel = _cudnn_kernel if q.shape[1] % 2 == 0 else _cudnn_odd
    return kernel(q, k, v)


_cudnn_kernel = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


@jax.custom_vjp
def _cudnn_odd(q: Array, k: Array, v: Array) -> Array:
    """The kernel for an odd number of tokens, of which jax refuses the gradient: for that they are padded by one."""
    return _cudnn_kernel(q, k, v)


def _cudnn_padded(q: Array, k: Array, v: Array) -> Array:
    tokens = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(q.shape[0], tokens, jnp.int32)
    return _cudnn_kernel(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)[:, :tokens]


_cudnn_odd.defvjp(lambda q, k, v: jax.vjp(_cudnn_padded, q, k, v), lambda vjp, d_out: vjp(d_out))


Heads = Float[Array, "*heads tokens width"]
Tokens = Float[Array, "*heads tokens 1"]
Weights = Float[Array, "*heads queries keys"]


def _attend(q: Heads, k: Heads, v: Heads) -> Heads:
    # neither a symbolic batch, under jax.export, nor one that explicit axes of a mesh cut can be cut into pieces
    if not isinstance(q.shape[0], int) or is_cut(q):
        return _attend_and_recompute(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cpu=_attend_in_pieces, default=_attend_and_recompute)


def _forward(q: Heads, k: Heads, v: Heads) -> tuple[Heads, Weights, Tokens, Tokens]:
    """Attention, the exponentials that weigh the values, and each query's sum of them and largest scaled score."""
    scale = _scale(q)
    if q.dtype.itemsize >= 4:  # half precision would round the queries once more
        q, scale = q * scale, 1.0  # for the scores' scale, a CPU reads an array of their size
    scores = _matmul(q, _transposed(k))
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp((scores - largest) * scale)
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(q.dtype)
    # dividing the (tokens, width) result is less work than dividing the (tokens, tokens) weights
    out = (_matmul(weights, v) / total).astype(q.dtype)
    return out, weights, total, largest * scale


@jax.custom_vjp
def _attend_and_recompute(q: Heads, k: Heads, v: Heads) -> Heads:
    """Attention whose gradient computes the weights again: nothing of (tokens, tokens) is kept for it."""
    return _forward(q, k, v)[0]


def _recompute_forward(q: Heads, k: Heads, v: Heads) -> tuple[Heads, tuple[Array, ...]]:
    out, _, total, largest = _forward(q, k, v)
    return out, (q, k, v, out, largest + jnp.log(total))


def _recompute_backward(residuals: tuple[Array, ...], d_out: Heads) -> tuple[Heads, Heads, Heads]:
    q, k, v, out, log_total = residuals
    # (heads, keys, queries): so, no product below needs one of these large matrices transposed
    weights = jnp.exp(_matmul(k, _transposed(q)) * _scale(q) - _transposed(log_total))
    mean = (d_out.astype(weights.dtype) * out.astype(weights.dtype)).sum(-1)[..., None, :]
    d_scores = (weights * (_matmul(v, _transposed(d_out)) - mean)).astype(q.dtype)
    d_q = _transposed(_matmul(_transposed(k), d_scores)) * _scale(q)
    d_k = _matmul(d_scores, q) * _scale(q)
    d_v = _matmul(weights.astype(q.dtype), d_out)
    return d_q.astype(q.dtype), d_k.astype(q.dtype), d_v.astype(q.dtype)


_attend_and_recompute.defvjp(_recompute_forward, _recompute_backward)

_PIECES = 4
_MAX_PIECES = 16  # each is compiled on its own
_SMALLEST_PIECE, _LARGEST_PIECE = 2**19, 2**22  # bytes of scores


@jax.custom_vjp
def _attend_in_pieces(q: Heads, k: Heads, v: Heads) -> Heads:
    """Attention for CPUs, whose gradient keeps the weights: reading them takes less time than computing them again.

    XLA runs the products of so small matrices on one core, one after the other, but pieces side by side; and the scores
    of a piece stay in the caches.
    """
    return _pieces_forward(q, k, v)[0]


def _pieces_forward(q: Heads, k: Heads, v: Heads) -> tuple[Heads, tuple]:
    parts = [_forward(*piece) for piece in zip(*map(_cut, (q, k, v)), strict=True)]
    out, weights, total, _ = zip(*parts, strict=True)
    out = _joined(out, q.shape)
    return out, (q, k, v, out, weights, total)


def _pieces_backward(residuals: tuple, d_out: Heads) -> tuple[Heads, Heads, Heads]:
    q, k, v, out, weights, total = residuals
    parts = [_piece_backward(*piece) for piece in zip(*map(_cut, (q, k, v, out, d_out)), weights, total, strict=True)]
    d_q, d_k, d_v = zip(*parts, strict=True)
    return _joined(d_q, q.shape), _joined(d_k, q.shape), _joined(d_v, q.shape)


_attend_in_pieces.defvjp(_pieces_forward, _pieces_backward)


def _piece_backward(
    q: Heads, k: Heads, v: Heads, out: Heads, d_out: Heads, weights: Weights, total: Tokens
) -> tuple[Heads, Heads, Heads]:
    d_out = d_out / total
    mean = (d_out * out).sum(-1, keepdims=True)
    d_out = d_out.astype(q.dtype)
    d_scores = (weights * (_matmul(d_out, _transposed(v)) - mean)).astype(q.dtype)
    d_q = _matmul(d_scores, k) * _scale(q)
    d_k = _transposed_matmul(d_scores, q) * _scale(q)
    d_v = _transposed_matmul(weights, d_out)
    return d_q.astype(q.dtype), d_k.astype(q.dtype), d_v.astype(q.dtype)


def _transposed_matmul(a: Weights, b: Heads) -> Heads:
    """aᵀ b, in which b is transposed instead of the larger a; left alone, XLA would transpose a."""
    barrier = jax.lax.optimization_barrier
    return _transposed(barrier(_matmul(barrier(_transposed(b)), a)))


def _cut(x: Float[Array, "batch heads _ _"]) -> list[Float[Array, "piece _ _"]]:
    """The heads of all images, in pieces."""
    batch, heads, tokens, _ = x.shape
    scores = 4 * batch * heads * tokens**2
    pieces = max(min(_PIECES, scores // _SMALLEST_PIECE), min(_MAX_PIECES, scores // _LARGEST_PIECE), 1)
    size = -(-batch * heads // pieces) or 1
    flat = x.reshape(batch * heads, *x.shape[2:])
    return [
        flat[start : start + size] for start in range(0, batch * heads or 1, size)
    ]  # of an empty batch, one empty piece


def _joined(parts: tuple[Float[Array, "_ tokens width"], ...], shape: tuple[int, ...]) -> Heads:
    return jnp.concatenate(parts).reshape(shape)


def _scale(q: Heads) -> float:
    return q.shape[-1] ** -0.5


def _transposed(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _matmul(a: Array, b: Array) -> Array:
    """a @ b, summed up and returned in float32 or wider."""
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
