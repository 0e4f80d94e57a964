"""Which kernel computes self-attention on the devices of a mesh."""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from convert.errors import SettingsError, one_line
from crossvit_jax.config import CrossViTConfig, Reduction
from crossvit_jax.kernels.attention import dot_product_attention, fastest_implementation

_IMAGES = 2  # enough to see whether a shape is supported: that does not depend on their number

Kernel = Literal["xla", "cudnn", "tpu"]


def choose_attention(
    wanted: Literal["auto"] | Kernel, model: CrossViTConfig, precision: str, mesh: Mesh, *, training: bool = True
) -> tuple[Kernel, list[str]]:
    """The kernel for a model on the devices of a mesh, and what the user should know of that.

    Before "cudnn" is chosen, it is tried on a device with each of the model's shapes. On devices that are not there,
    which one compiles for, only jax's own checks can be made.

    Args:
        wanted: "auto" for cuDNN's where it can be had, and "tpu" on TPUs.
        precision: of the arithmetic: float32, bfloat16 or float16.
        training: whether gradients are taken, too.

    Raises SettingsError if "cudnn" is wanted and cannot be had.
    """
    if wanted in ("xla", "tpu"):
        return wanted, []
    devices = list(mesh.devices.flat)
    fastest = fastest_implementation(devices, precision)
    if fastest != "cudnn":
        if wanted == "auto":
            return fastest, []
        raise SettingsError(
            "attention_kernel cudnn needs NVIDIA GPUs of compute capability 8.0 or later and half precision; "
            f"this is {devices[0].device_kind} and {precision}: choose auto or xla"
        )
    refusal = _refusal(model, precision, devices, training=training)
    if refusal is None:
        return "cudnn", []
    if wanted == "auto":
        return "xla", [f"self-attention is XLA's, which is slower, because cuDNN's failed: {refusal}"]
    raise SettingsError(f"attention_kernel cudnn failed: {refusal}: choose auto or xla")


def _refusal(model: CrossViTConfig, precision: str, devices: list[jax.Device], *, training: bool) -> str | None:
    """Why cuDNN's attention cannot be had, in a line: alike in all processes, which run the same programs."""
    device = next(device for device in devices if device.process_index == jax.process_index())
    reason = None
    for shape, keys, biased in _shapes(model):
        try:
            _try_cudnn(shape, keys, precision, device, training=training, biased=biased)
        except Exception as error:  # jax, XLA and cuDNN refuse in many ways; none of them should end the run
            reason = f"{shape[1]} tokens, {shape[2]} heads of {shape[3]}: {one_line(error)}"
            break
    if jax.process_count() > 1 and np.any(multihost_utils.process_allgather(np.array(reason is not None))):
        return reason or "in another process"
    return reason


def _shapes(model: CrossViTConfig) -> Iterator[tuple[tuple[int, ...], int, bool]]:
    """What self-attention gets: (batch, tokens, heads, width), the number of keys, and whether these have a bias.

    They have one once tokens stand for several patches. Of the numbers of tokens that are left then, the first odd and
    the first even one are tried: that is what kernels tell apart.
    """
    reduction = None if model.reduce_tokens is None else Reduction.parse(model.reduce_tokens, model.branches)
    for place, (branch, (rows, columns)) in enumerate(zip(model.branches, model.grid_size, strict=True)):
        counts = [rows * columns]
        if reduction is not None:
            depth = sum(depths[place] for depths in model.stage_depths)
            between_stages = (model.stages - 1) * (reduction.kind == "fusion")
            for _ in range(sum(reduction.blocks(place, depth)) + between_stages):
                counts.append(reduction.left(place, counts[-1]))
        seen = set()
        if branch.attention == "separable":
            continue
        for number, patches in enumerate(counts):
            kind = (patches % 2, number > 0)
            if kind not in seen:
                seen.add(kind)
                keys = 1 + patches // branch.sr_ratio**2
                yield (_IMAGES, 1 + patches, branch.num_heads, branch.head_width), keys, number > 0


def _try_cudnn(
    shape: tuple[int, ...], keys: int, dtype: str, device: jax.Device, *, training: bool, biased: bool
) -> None:
    """Compiles cuDNN's attention and its gradient for a device; runs them if it is there. Raises what they raise.

    Args:
        biased: with a bias of each key, as for tokens that stand for several patches.
    """
    shapes = [shape, *[(shape[0], keys, *shape[2:])] * 2]
    bias = (jnp.zeros((shape[0], keys)),) if biased else ()

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dot_product_attention(q, k, v, "cudnn", *bias)

    def total(*qkv: jax.Array) -> jax.Array:
        return attend(*qkv).astype(jnp.float32).sum()

    qkv = [jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device)) for shape in shapes]
    for function in (attend, jax.grad(total, (0, 1, 2))) if training else (attend,):
        lowered = jax.jit(function).lower(*qkv)
        if _is_here(device):
            zeros = [jax.device_put(np.zeros(shape, jnp.dtype(dtype)), device) for shape in shapes]
            jax.block_until_ready(lowered.compile()(*zeros))


def _is_here(device: jax.Device) -> bool:
    """Whether programs can be run on a device, which may be one to compile for."""
    try:
        device.memory_stats()
    except jax.errors.JaxRuntimeError:
        return False
    return True
