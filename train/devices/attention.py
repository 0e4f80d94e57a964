"""Which kernel computes self-attention on the devices of a mesh."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from convert.errors import SettingsError, one_line
from crossvit_jax.config import CrossViTConfig, Reduction
from crossvit_jax.kernels.attention import dot_product_attention, fastest_implementation

_MOST_ERROR = 0.05  # of the largest value: half precision comes to less than 0.01
_NAMES = {"cudnn": "cuDNN's", "tpu": "the kernel for TPUs"}
_IMAGES = 2  # enough to see whether a shape is supported: that does not depend on their number

Kernel = Literal["xla", "cudnn", "tpu"]


def choose_attention(
    wanted: Literal["auto"] | Kernel, model: CrossViTConfig, precision: str, mesh: Mesh, *, training: bool = True
) -> tuple[Kernel, list[str]]:
    """The kernel for a model on the devices of a mesh, and what the user should know of that.

    Before "cudnn" or, on TPUs, "tpu" is chosen, it is tried on a device with each of the model's shapes, and what it
    computes is compared with XLA's attention. On devices that are not there, which one compiles for, only jax's own
    checks can be made.

    Args:
        wanted: "auto" for cuDNN's where it can be had, and "tpu" on TPUs.
        precision: of the arithmetic: float32, bfloat16 or float16.
        training: whether gradients are taken, too.

    Raises SettingsError if "cudnn" or "tpu" is wanted and cannot be had.
    """
    devices = list(mesh.devices.flat)
    fastest = fastest_implementation(devices, precision)
    kernel = fastest if wanted == "auto" else wanted
    if kernel == "cudnn" and fastest != "cudnn":
        raise SettingsError(
            "attention_kernel cudnn needs NVIDIA GPUs of compute capability 8.0 or later and half precision; "
            f"this is {devices[0].device_kind} and {precision}: choose auto or xla"
        )
    if kernel != fastest or kernel == "xla":  # "tpu" is XLA's on other devices
        return kernel, []
    refusal = _refusal(kernel, model, precision, devices, training=training)
    if refusal is None:
        return kernel, []
    if wanted == "auto":
        return "xla", [f"self-attention is XLA's, which is slower, because {_NAMES[kernel]} failed: {refusal}"]
    raise SettingsError(f"attention_kernel {kernel} failed: {refusal}: choose auto or xla")


def _refusal(
    kernel: Kernel, model: CrossViTConfig, precision: str, devices: list[jax.Device], *, training: bool
) -> str | None:
    """Why a kernel cannot be had, in a line: alike in all processes, which run the same programs."""
    device = next(device for device in devices if device.process_index == jax.process_index())
    reason = None
    for shape, keys, biased in _shapes(model):
        try:
            _try(kernel, shape, keys, precision, device, training=training, biased=biased)
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


def _try(
    kernel: Kernel,
    shape: tuple[int, ...],
    keys: int,
    dtype: str,
    device: jax.Device,
    *,
    training: bool,
    biased: bool,
) -> None:
    """Compiles a kernel and its gradient for a device; if that is there, runs them and compares them with XLA's.

    Raises what they raise, and ValueError if they compute something else.

    Args:
        biased: with a bias of each key, as for tokens that stand for several patches.
    """
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((shape[0], count, *shape[2:])) for count in (shape[1], keys, keys)]
    arrays = [array.astype(jnp.dtype(dtype)) for array in arrays]
    bias = random.standard_normal((shape[0], keys)).astype(np.float32) if biased else None
    weights = random.standard_normal(shape).astype(np.float32)

    def attend(implementation: Kernel, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        rest = () if bias is None else (jnp.asarray(bias[: len(q)]),)
        return dot_product_attention(q, k, v, implementation, *rest)

    def total(implementation: Kernel, *qkv: jax.Array) -> jax.Array:
        out = attend(implementation, *qkv).astype(jnp.float32)
        return (out * weights[: len(out), :, : out.shape[2]]).sum()

    def run(function: Callable[..., Any], given: list[np.ndarray]) -> list[np.ndarray]:
        place = SingleDeviceSharding(device)
        lowered = jax.jit(function).lower(*(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in given))
        if not _is_here(device):
            return []
        results = lowered.compile()(*(jax.device_put(x, device) for x in given))
        return [np.asarray(x[:1, :, :1], np.float64) for x in jax.tree.leaves(results)]

    with jax.default_matmul_precision("float32" if dtype == "float32" else None):
        for function in (attend, jax.grad(total, (1, 2, 3))) if training else (attend,):
            results = run(partial(function, kernel), arrays)
            if results:  # one head of an image is enough, and XLA's attention takes much memory
                _compare(results, run(partial(function, "xla"), [x[:1, :, :1] for x in arrays]))


def _compare(results: list[np.ndarray], references: list[np.ndarray]) -> None:
    """Raises ValueError unless they are the same but for rounding."""
    for result, reference in zip(results, references, strict=True):
        error = np.abs(result - reference).max() / np.abs(reference).max()
        if not error <= _MOST_ERROR:
            raise ValueError(f"it computes something else: its largest error is {error:.2g} of the largest value")


def _is_here(device: jax.Device) -> bool:
    """Whether programs can be run on a device, which may be one to compile for."""
    try:
        device.memory_stats()
    except jax.errors.JaxRuntimeError:
        return False
    return True
