"""Interpolation along both axes of images: two matrix products, or on GPUs sums of the few pixels that matter."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Taps = tuple[Int[np.ndarray, "taps _"], Float[np.ndarray, "taps _"]]  # for each output pixel: places and weights


def interpolate(
    x: Float[Array, "batch in_height in_width channels"], rows: Taps, columns: Taps
) -> Float[Array, "batch height width channels"]:
    """Each pixel as the weighted sum of those at its taps, in float32 or wider."""
    if not isinstance(x.shape[0], int):  # a symbolic batch, under jax.export: one program for all platforms
        return _by_products(x, rows, columns)
    by_taps, by_products = (lambda x, f=f: f(x, rows, columns) for f in (_by_taps, _by_products))
    return jax.lax.platform_dependent(x, cuda=by_taps, rocm=by_taps, default=by_products)


def _by_taps(x: Array, rows: Taps, columns: Taps) -> Array:
    """Products would multiply by weights that are 0, but for a few: on a GPU, in float32, they take far longer.

    Each of the four rows is taken and then interpolated, which XLA keeps in one kernel. With both axes one after the
    other a training step has the images between them in memory, in float32.
    """
    terms = (
        _along_columns(jnp.take(x, place, 1, mode="clip"), columns) * weight[None, :, None, None]
        for place, weight in zip(*rows, strict=True)
    )
    return sum(terms, start=jnp.zeros((), x.dtype))


def _along_columns(x: Array, taps: Taps) -> Array:
    terms = (
        jnp.take(x, place, 2, mode="clip") * weight[None, None, :, None] for place, weight in zip(*taps, strict=True)
    )
    return sum(terms, start=jnp.zeros((), x.dtype))


def _by_products(x: Array, rows: Taps, columns: Taps) -> Array:
    return apply_matrices(x, tap_matrix(*rows, x.shape[1]), tap_matrix(*columns, x.shape[2]))


def apply_matrices(
    x: Float[Array, "batch in_height in_width channels"],
    row_matrix: Float[np.ndarray, "height in_height"],
    column_matrix: Float[np.ndarray, "width in_width"],
) -> Float[Array, "batch height width channels"]:
    """A matrix along each axis of images; gradients are products as well."""
    # "highest": a matrix product in bfloat16 or TF32, the default on accelerators, would blur the interpolation
    x = jnp.einsum("pw,bhwc->bhpc", column_matrix, x, precision="highest")
    return jnp.einsum("oh,bhpc->bopc", row_matrix, x, precision="highest")


def tap_matrix(
    places: Int[np.ndarray, "taps out_size"], weights: Float[np.ndarray, "taps out_size"], in_size: int
) -> Float[np.ndarray, "out_size in_size"]:
    """The weights of every input pixel in every output pixel."""
    out_size = weights.shape[1]
    matrix = np.zeros((out_size, in_size), weights.dtype)
    for place, weight in zip(places, weights, strict=True):
        np.add.at(matrix, (np.arange(out_size), place), weight)
    return matrix
