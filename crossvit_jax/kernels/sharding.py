"""What gradients written by hand must know of how arrays lie on several devices."""

from typing import Any

import jax
from jaxtyping import Array


def vary_alike(*operands: Array) -> tuple[Array, ...]:
    """The operands, of which under `jax.shard_map` those that are the same on all devices are taken as different ones.

    For a rule that jax derives it does so by itself, and sums their gradients over the devices where it undoes that.
    """
    varying = [_varying(x) for x in operands]
    axes = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(axes - own), to="varying") if axes - own else x
        for x, own in zip(operands, varying, strict=True)
    )


def _varying(x: Array) -> frozenset:
    """Axes of the mesh along which an array differs, inside `jax.shard_map`."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma  # the latter in older jax


def is_cut(x: Array) -> bool:
    """Whether an array lies in pieces along an explicit axis of a mesh."""
    return any(name is not None for name in jax.typeof(x).sharding.spec)


def shape_of(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """That of an array which differs, inside `jax.shard_map`, along the same axes of the mesh as another one."""
    kind = jax.typeof(like)
    name = "manual_axis_type" if hasattr(kind, "manual_axis_type") else "vma"  # the latter in older jax
    return jax.ShapeDtypeStruct(shape, dtype, **{name: getattr(kind, name)})
