"""Softmax attention on TPUs by a kernel that keeps a head's scores in the chip's own memory, forward and backward.

All arrays have tokens on their last axis, which a TPU keeps in 128 columns: heads of 32 or 64 would leave most of them
empty. So the softmax is over rows, which takes sums and largest values of whole registers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from crossvit_jax.kernels.sharding import shape_of

_COLUMNS = 128  # of a tile
_SCORES = 2**21  # bytes of scores at a time, of which a kernel has about five arrays; it may take 16 MiB in all
_WINDOWS = 2**21  # bytes of what a program reads and writes; meanwhile, those of the next are read
_MOST_HEADS = 4  # of a program: its code is written out for each

Queries = Float[Array, "batch heads width queries"]  # and what belongs to each of them
Keys = Float[Array, "batch heads width keys"]
Bias = Float[Array, "batch 1 keys 1"]


class Plan(NamedTuple):
    """How a kernel goes about its work."""

    heads: int  # of one program
    queries: int  # at a time


def plan(shape: Sequence[int], keys: int, dtype: Any, *, biased: bool = False) -> Plan | None:
    """The plan for queries of a shape (batch, heads, width, queries) and so many keys, or None where the kernel is not
    for them."""
    _, heads, width, queries = shape
    row, itemsize = _padded(keys) * 4, jnp.dtype(dtype).itemsize
    scores = _SCORES * 4 // itemsize**2  # products of float32 are made of parts, which take memory too
    at_a_time = queries if row * _padded(queries) <= scores else scores // row // _COLUMNS * _COLUMNS
    # a backward pass reads q, k, v, what they came to and its gradient, and writes the gradients of q, k and v
    head = 4 * width * (_padded(queries) + _padded(keys)) * itemsize
    of_bias = 2 * biased * row * _COLUMNS  # it and its gradient: one number a row of tiles
    fits = [n for n in range(1, _MOST_HEADS + 1) if heads % n == 0 and n * head + of_bias <= _WINDOWS]
    known = dtype in (jnp.bfloat16, jnp.float32)
    return Plan(fits[-1], at_a_time) if known and at_a_time and fits else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q: Queries, k: Keys, v: Keys, bias: Bias | None, plan: Plan) -> Queries:
    """v softmax(kᵀ q / √width + bias) for every head; the softmax over keys, in float32."""
    return _forward(q, k, v, bias, plan)[0]


def _forward(q: Queries, k: Keys, v: Keys, bias: Bias | None, plan: Plan) -> tuple[Queries, tuple[Array | None, ...]]:
    given = (q, k, v) if bias is None else (q, k, v, bias)
    sums = shape_of((*q.shape[:2], 1, q.shape[3]), jnp.float32, q)
    out, log_total = _run(_forward_kernel, plan, given, (shape_of(q.shape, q.dtype, q), sums))
    return out, (q, k, v, bias, out, log_total)


def _backward(
    plan: Plan, residuals: tuple[Array | None, ...], d_out: Queries
) -> tuple[Queries, Keys, Keys, Bias | None]:
    q, k, v, bias, out, log_total = residuals
    given, results = [q, k, v, out, log_total, d_out], [shape_of(x.shape, x.dtype, x) for x in (q, k, v)]
    if bias is None:
        return *_run(_backward_kernel, plan, given, results), None
    results.append(shape_of((len(k), k.shape[1] // plan.heads, k.shape[3], 1), bias.dtype, bias))
    d_q, d_k, d_v, d_bias = _run(_backward_kernel, plan, [*given, bias], results)
    return d_q, d_k, d_v, d_bias.sum(1, keepdims=True)


attend.defvjp(_forward, _backward)


def _run(
    kernel: Callable[..., None], plan: Plan, given: Sequence[Array], results: Sequence[jax.ShapeDtypeStruct]
) -> Sequence[Array]:
    """Runs a kernel for some heads of an image at a time."""
    batch, heads = given[0].shape[:2]
    return pl.pallas_call(
        functools.partial(kernel, plan.queries),
        grid=(batch, heads // plan.heads),
        in_specs=[_window(x, heads // plan.heads) for x in given],
        out_specs=[_window(x, heads // plan.heads) for x in results],
        out_shape=results,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name=kernel.__name__.strip("_"),
    )(*given)


def _window(x: Any, groups: int) -> pl.BlockSpec:
    """What a program sees of an array: its group of an image's heads, or what is the same for all of them."""
    shared = x.shape[1] == 1
    return pl.BlockSpec(
        (1, 1 if shared else x.shape[1] // groups, *x.shape[2:]),
        lambda image, group: (image, 0 if shared else group, 0, 0),
    )


def _forward_kernel(at_a_time: int, q: Any, k: Any, v: Any, *rest: Any) -> None:
    *bias, out, log_total = rest
    for head in range(q.shape[1]):
        keys, values = k[0, head], v[0, head]

        def some(columns: Any, _: Any, head=head, keys=keys, values=values) -> None:
            scores = _scores(keys, q[0, head, :, columns], bias)
            largest = scores.max(0, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = weights.sum(0, keepdims=True)
            out[0, head, :, columns] = (_dot(values, weights.astype(values.dtype), 1, 0) / total).astype(out.dtype)
            log_total[0, head, :, columns] = largest + jnp.log(total)

        _over_queries(at_a_time, q.shape[3], some)


def _backward_kernel(at_a_time: int, q: Any, k: Any, v: Any, out: Any, log_total: Any, d_out: Any, *rest: Any) -> None:
    biased = len(rest) == 5
    bias, (d_q, d_k, d_v, *d_bias) = rest[:biased], rest[biased:]
    for head in range(q.shape[1]):
        keys, values = k[0, head], v[0, head]

        def some(columns: Any, sums: list[Array] | None, head=head, keys=keys, values=values) -> list[Array]:
            queries, d = q[0, head, :, columns], d_out[0, head, :, columns]
            weights = jnp.exp(_scores(keys, queries, bias) - log_total[0, head, :, columns])
            mean = (d.astype(jnp.float32) * out[0, head, :, columns].astype(jnp.float32)).sum(0, keepdims=True)
            d_scores = weights * (_dot(values, d, 0, 0) - mean)
            rounded = d_scores.astype(keys.dtype)
            d_q[0, head, :, columns] = (_dot(keys, rounded, 1, 0) * _scale(keys)).astype(d_q.dtype)
            own = [_dot(queries, rounded, 1, 1), _dot(d, weights.astype(keys.dtype), 1, 1)]
            own += [d_scores.sum(1, keepdims=True) for _ in d_bias]
            return own if sums is None else [x + y for x, y in zip(sums, own, strict=True)]

        sum_k, sum_v, *sum_bias = _over_queries(at_a_time, q.shape[3], some)
        d_k[0, head] = (sum_k * _scale(keys)).astype(d_k.dtype)
        d_v[0, head] = sum_v.astype(d_v.dtype)
        for array, own in zip(d_bias, sum_bias, strict=True):
            array[0, 0] = array[0, 0] + own if head else own


def _scores(keys: Array, queries: Array, bias: Sequence[Any]) -> Array:
    """(keys, queries), in float32."""
    scores = _dot(keys, queries, 0, 0) * _scale(keys)
    return scores + bias[0][0, 0] if bias else scores


def _scale(keys: Array) -> float:
    return keys.shape[0] ** -0.5


def _over_queries(at_a_time: int, queries: int, some: Callable[[Any, Any], Any]) -> Any:
    """some(columns, sums) for all queries, so many at a time; the last ones first, so that there are sums to go on
    with."""
    before = -(-queries // at_a_time) - 1
    sums = some(pl.ds(before * at_a_time, queries - before * at_a_time), None)

    def body(number: Any, sums: Any) -> Any:
        return some(pl.ds(pl.multiple_of(number * at_a_time, _COLUMNS), at_a_time), sums)

    return jax.lax.fori_loop(0, before, body, sums) if before else sums


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product over one axis of each, in float32."""
    # Mosaic knows two precisions, and the higher one for float32 alone
    default = a.dtype != jnp.float32 or jax.config.jax_default_matmul_precision in (None, "default", "fastest")
    precision = jax.lax.Precision.DEFAULT if default else jax.lax.Precision.HIGHEST
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _padded(number: int) -> int:
    """In whole tiles."""
    return -(-number // _COLUMNS) * _COLUMNS
