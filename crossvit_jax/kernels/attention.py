"""Softmax attention with a gradient written by hand.

On GPUs and TPUs it computes the weights again from the queries and keys, as fused kernels do: memory for activations
does not grow with the square of the tokens. On a CPU, where time counts more, it keeps them.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from crossvit_jax.kernels.sharding import is_cut, vary_alike


def dot_product_attention(
    q: Float[Array, "batch queries heads width"],
    k: Float[Array, "batch keys heads width"],
    v: Float[Array, "batch keys heads width"],
    implementation: Literal["xla", "cudnn", "tpu"] = "xla",
    bias: Float[Array, "batch keys"] | None = None,
) -> Float[Array, "batch queries heads width"]:
    """softmax(q kᵀ / √width + bias) v for every head, in the inputs' dtype; the softmax is in float32 or wider.

    Its gradient can be taken in reverse mode only; with "xla" to any order, the last of them in forward mode too.

    Args:
        implementation: "xla" for any device and dtype; "cudnn" for NVIDIA's fused kernel: a GPU, half precision; "tpu"
            for a kernel of ours on TPUs, in bfloat16 and float32, which is "xla" elsewhere and for so many tokens that
            it is not for them. On several devices it has to know the mesh, whose axes must all cut the batch: by
            `jax.set_mesh` around what traces.
        bias: of each key, for all heads and queries alike, in float32 or wider; cuDNN rounds it to the inputs' dtype.
            None: 0, at no cost.

    Raises:
        ValueError, RuntimeError, NotImplementedError: "cudnn" for inputs or a device that it is not for, as jax says.
    """
    if bias is None:
        q, k, v = vary_alike(q, k, v)
    else:
        q, k, v, bias = vary_alike(q, k, v, bias[:, None, None])
    if implementation == "cudnn":
        return _cudnn(q, k, v, bias)
    if implementation == "tpu":
        return _on_tpu(q, k, v, bias)
    return _by_head(q, k, v, bias)


def project_by_head(
    x: Float[Array, "batch tokens dim"],
    kernel: Float[Array, "dim parts"],
    bias: Float[Array, " parts"] | None,
    num_heads: int,
) -> list[Float[Array, "batch tokens heads width"]]:
    """Queries, keys and values as a product each, which a TPU writes by head, with tokens last.

    It keeps the last two axes of an array in tiles of many rows and 128 columns: what one product returns, cut into
    three and heads, would be copied at several times its size.
    """
    kernels = jax.lax.split(kernel, (kernel.shape[1] // 3,) * 3, axis=1)
    # written as attention reads them
    parts = [jnp.einsum("bnc,chw->bhwn", x, part.reshape(len(part), num_heads, -1)) for part in kernels]
    if bias is not None:
        biases = bias.reshape(3, num_heads, -1, 1)
        parts = [part + own for part, own in zip(parts, biases, strict=True)]
    return [part.transpose(0, 3, 1, 2) for part in parts]


def fastest_implementation(devices: Iterable[Any], dtype: Any) -> Literal["xla", "cudnn", "tpu"]:
    """What self-attention should take on devices, which may be some to compile for: "cudnn" in half precision where all
    are NVIDIA GPUs of compute capability 8.0 or later, "tpu" where all are TPUs; see `CrossViT.set_attention`."""
    devices = list(devices)
    if devices and all(getattr(device, "platform", "") == "tpu" for device in devices):
        return "tpu"
    # other makers' GPUs tell something like "gfx90a", and other devices nothing
    found = [re.match(r"(\d+)\.", str(getattr(device, "compute_capability", ""))) for device in devices]
    fused = bool(found) and all(match is not None and int(match[1]) >= 8 for match in found)
    return "cudnn" if fused and jnp.dtype(dtype).itemsize == 2 else "xla"


def _on_tpu(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    """By TPUs' own kernel; elsewhere, and for shapes that it is not for, as `_attend` does."""
    if not isinstance(q.shape[0], int) or is_cut(q):
        return _by_head(q, k, v, bias)
    return jax.lax.platform_dependent(q, k, v, bias, tpu=_tpu_kernel, default=_by_head)


def _by_head(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return _attend(q, k, v, bias).swapaxes(1, 2)


def _tpu_kernel(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    from crossvit_jax.kernels import tpu_attention  # what it imports takes half a second, and only TPUs need it

    turned = [x.transpose(0, 2, 3, 1) for x in (q, k, v)]
    plan = tpu_attention.plan(turned[0].shape, k.shape[1], q.dtype, biased=bias is not None)
    # no compiler cuts a kernel up: on several devices it is told that each computes its part of the batch
    mesh = jax.sharding.get_abstract_mesh()
    kinds = {kind for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if mesh.shape[name] > 1}
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
    parts = math.prod(mesh.shape[name] for name in axes)
    if plan is None or AxisType.Explicit in kinds or len(q) % parts:
        return _by_head(q, k, v, bias)

    def attend(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        return tpu_attention.attend(q, k, v, bias, plan)

    if parts > 1:
        cut = PartitionSpec(axes)
        attend = jax.shard_map(attend, in_specs=cut, out_specs=cut, axis_names=set(axes))
    return attend(*turned, None if bias is None else bias.swapaxes(2, 3)).transpose(0, 3, 1, 2)


def _cudnn(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    if bias is not None:  # cuDNN wants one for each query
        bias = jnp.broadcast_to(bias.astype(q.dtype), (len(q), 1, q.shape[1], k.shape[1]))
    kernel = _cudnn_odd if q.shape[1] % 2 or k.shape[1] % 2 else _cudnn_kernel
    return kernel(q, k, v, bias)


_cudnn_kernel = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def _cudnn_even(q: Array, k: Array, v: Array, bias: Array | None, keys: int) -> Array:
    """The kernel for even numbers of queries and keys, of which the first so many keys count."""
    lengths = {"query_seq_lengths": q.shape[1], "key_value_seq_lengths": keys}
    lengths = {name: jnp.full((q.shape[0],), length, jnp.int32) for name, length in lengths.items()}
    return _cudnn_kernel(q, k, v, bias, **lengths)


def cudnn_with_one_more(
    q: Float[Array, "batch tokens heads width"],
    k: Float[Array, "batch tokens heads width"],
    v: Float[Array, "batch tokens heads width"],
) -> Float[Array, "batch tokens heads width"]:
    """NVIDIA's kernel for an odd number of tokens and one more, the last, to which no token attends: jax takes the
    gradient of even numbers. What is given of the last token gets none."""
    own = q.shape[1] - 1
    is_own = np.arange(q.shape[1])[None, :, None, None] < own
    # whatever the kernel leaves there in its gradients
    q, k, v = (jnp.where(is_own, x, jax.lax.stop_gradient(x)) for x in (q, k, v))
    return _cudnn_even(q, k, v, None, keys=own)


@jax.custom_vjp
def _cudnn_odd(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    """The kernel for an odd number of queries or keys, of which jax refuses the gradient: for that they are padded by
    one."""
    return _cudnn_kernel(q, k, v, bias)


def _cudnn_padded(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    queries, keys = q.shape[1], k.shape[1]
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, queries % 2), (0, keys % 2)))
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    return _cudnn_even(q, k, v, bias, keys)[:, :queries]


_cudnn_odd.defvjp(lambda q, k, v, bias: jax.vjp(_cudnn_padded, q, k, v, bias), lambda vjp, d_out: vjp(d_out))


Queries = Float[Array, "*heads queries width"]  # and what belongs to each of them
Keys = Float[Array, "*heads keys width"]
Sums = Float[Array, "*heads queries 1"]
Weights = Float[Array, "*heads queries keys"]
Bias = Float[Array, "*any 1 keys"]  # of each key; `any` is that of the heads, or the images and 1


def _attend(q: Queries, k: Keys, v: Keys, bias: Bias | None) -> Queries:
    # neither a symbolic batch, under jax.export, nor one that explicit axes of a mesh cut can be cut into pieces
    if not isinstance(q.shape[0], int) or is_cut(q):
        return _attend_and_recompute(q, k, v, bias)
    return jax.lax.platform_dependent(q, k, v, bias, cpu=_attend_in_pieces, default=_attend_and_recompute)


def _forward(q: Queries, k: Keys, v: Keys, bias: Bias | None) -> tuple[Queries, Weights, Sums, Sums]:
    """Attention, the exponentials that weigh the values, and each query's sum of them and largest scaled score."""
    scale = _scale(q)
    if q.dtype.itemsize >= 4:  # half precision would round the queries once more
        q, scale = q * scale, 1.0  # for the scores' scale, a CPU reads an array of their size
    scores = _matmul(q, _transposed(k))
    if bias is not None:
        scores, scale = scores * scale + bias, 1.0
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp((scores - largest) * scale)
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(q.dtype)
    # dividing the (tokens, width) result is less work than dividing the (tokens, tokens) weights
    out = (_matmul(weights, v) / total).astype(q.dtype)
    return out, weights, total, largest * scale


@jax.custom_vjp
def _attend_and_recompute(q: Queries, k: Keys, v: Keys, bias: Bias | None) -> Queries:
    """Attention whose gradient computes the weights again: nothing of (tokens, tokens) is kept for it."""
    return _forward(q, k, v, bias)[0]


def _recompute_forward(q: Queries, k: Keys, v: Keys, bias: Bias | None) -> tuple[Queries, tuple[Array | None, ...]]:
    out, _, total, largest = _forward(q, k, v, bias)
    return out, (q, k, v, bias, out, largest + jnp.log(total))


def _recompute_backward(residuals: tuple[Array | None, ...], d_out: Queries) -> tuple[Queries, Keys, Keys, Bias | None]:
    q, k, v, bias, out, log_total = residuals
    # (heads, keys, queries): so, no product below needs one of these large matrices transposed
    scores = _matmul(k, _transposed(q)) * _scale(q)
    if bias is not None:
        scores += _transposed(bias)
    weights = jnp.exp(scores - _transposed(log_total))
    mean = (d_out.astype(weights.dtype) * out.astype(weights.dtype)).sum(-1)[..., None, :]
    d_scores = weights * (_matmul(v, _transposed(d_out)) - mean)
    d_bias = None if bias is None else _transposed(d_scores.sum((1, 3), keepdims=True)).astype(bias.dtype)
    d_scores = d_scores.astype(q.dtype)
    d_q = _transposed(_matmul(_transposed(k), d_scores)) * _scale(q)
    d_k = _matmul(d_scores, q) * _scale(q)
    d_v = _matmul(weights.astype(q.dtype), d_out)
    return d_q.astype(q.dtype), d_k.astype(q.dtype), d_v.astype(q.dtype), d_bias


_attend_and_recompute.defvjp(_recompute_forward, _recompute_backward)

_PIECES = 4
_MAX_PIECES = 16  # each is compiled on its own
_SMALLEST_PIECE, _LARGEST_PIECE = 2**19, 2**22  # bytes of scores


@jax.custom_vjp
def _attend_in_pieces(q: Queries, k: Keys, v: Keys, bias: Bias | None) -> Queries:
    """Attention for CPUs, whose gradient keeps the weights: reading them takes less time than computing them again.

    XLA runs the products of so small matrices on one core, one after the other, but pieces side by side; and the scores
    of a piece stay in the caches.
    """
    return _pieces_forward(q, k, v, bias)[0]


def _pieces_forward(q: Queries, k: Keys, v: Keys, bias: Bias | None) -> tuple[Queries, tuple]:
    parts = [_forward(*piece) for piece in zip(*_cut((q, k, v), q, k), _cut_bias(bias, q, k), strict=True)]
    out, weights, total, _ = zip(*parts, strict=True)
    out = _joined(out, q.shape)
    return out, (q, k, v, bias, out, weights, total)


def _pieces_backward(residuals: tuple, d_out: Queries) -> tuple[Queries, Keys, Keys, Bias | None]:
    q, k, v, bias, out, weights, total = residuals
    parts = [_piece_backward(*piece) for piece in zip(*_cut((q, k, v, out, d_out), q, k), weights, total, strict=True)]
    d_q, d_k, d_v, d_keys = zip(*parts, strict=True)
    d_bias = None
    if bias is not None:
        d_bias = _joined(d_keys, (*q.shape[:2], 1, k.shape[2])).sum(1, keepdims=True).astype(bias.dtype)
    return _joined(d_q, q.shape), _joined(d_k, k.shape), _joined(d_v, k.shape), d_bias


_attend_in_pieces.defvjp(_pieces_forward, _pieces_backward)


def _piece_backward(
    q: Queries, k: Keys, v: Keys, out: Queries, d_out: Queries, weights: Weights, total: Sums
) -> tuple[Queries, Keys, Keys, Bias]:
    """The last is the gradient of a bias of each head."""
    d_out = d_out / total
    mean = (d_out * out).sum(-1, keepdims=True)
    d_out = d_out.astype(q.dtype)
    d_scores = weights * (_matmul(d_out, _transposed(v)) - mean)
    d_bias = d_scores.sum(-2, keepdims=True)
    d_scores = d_scores.astype(q.dtype)
    d_q = _matmul(d_scores, k) * _scale(q)
    d_k = _transposed_matmul(d_scores, q) * _scale(q)
    d_v = _transposed_matmul(weights, d_out)
    return d_q.astype(q.dtype), d_k.astype(q.dtype), d_v.astype(q.dtype), d_bias


def _transposed_matmul(a: Weights, b: Queries) -> Keys:
    """aᵀ b, in which b is transposed instead of the larger a; left alone, XLA would transpose a."""
    barrier = jax.lax.optimization_barrier
    return _transposed(barrier(_matmul(barrier(_transposed(b)), a)))


def _cut(xs: Sequence[Float[Array, "batch heads _ _"]], q: Queries, k: Keys) -> list[list[Float[Array, "piece _ _"]]]:
    """Each array's heads of all images, in as many pieces as suit the scores of these queries and keys; of an empty
    batch, in one empty piece."""
    batch, heads, queries, _ = q.shape
    scores = 4 * batch * heads * queries * k.shape[2]
    pieces = max(min(_PIECES, scores // _SMALLEST_PIECE), min(_MAX_PIECES, scores // _LARGEST_PIECE), 1)
    size = -(-batch * heads // pieces) or 1
    flat = [x.reshape(batch * heads, *x.shape[2:]) for x in xs]
    return [[x[start : start + size] for start in range(0, batch * heads or 1, size)] for x in flat]


def _cut_bias(bias: Bias | None, q: Queries, k: Keys) -> list[Float[Array, "piece 1 keys"]] | list[None]:
    """The bias of the heads of all images, in the pieces of their queries."""
    if bias is None:
        return [None] * len(_cut([q], q, k)[0])
    return _cut([jnp.broadcast_to(bias, (*q.shape[:2], *bias.shape[2:]))], q, k)[0]


def _joined(parts: tuple[Float[Array, "_ rows columns"], ...], shape: tuple[int, ...]) -> Array:
    return jnp.concatenate(parts).reshape(shape)


def _scale(q: Queries) -> float:
    return q.shape[-1] ** -0.5


def _transposed(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _matmul(a: Array, b: Array) -> Array:
    """a @ b, summed up and returned in float32 or wider."""
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
