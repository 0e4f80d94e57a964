"""How much memory a step takes on each device, and what would help where that is too much."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from convert.errors import SettingsError
from crossvit_jax.config import Branch
from train.config import TrainConfig
from train.devices.host_memory import host_memory

BATCHES = 3  # on a device at the same time: the step's own, and the two that train.data.streams brings ahead

_GIB = 2**30
_FLOAT = 4  # bytes of a float32
# What libtpu lets a program use of the memory of a chip (which has 32, 16, 95 and 32 GB): the limit that the compiler
# names when it refuses a program, libtpu 0.0.42. Only for chips that are not there; those that are tell themselves.
_TPU_MEMORY = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}


class DoesNotFit(SettingsError):
    """A step needs more memory than a device has; the message says how much, and which flags would help.

    `needed` is the number of bytes on each device, if known.
    """

    def __init__(self, message: str, needed: float | None = None):
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class StepMemory:
    """Bytes on each device while a step runs, as XLA has planned them."""

    state: int  # parameters, optimiser state, moving average: the step writes the new ones over the old ones
    batches: int  # the step's own and those that wait
    activations: int  # with the gradients: everything that is gone after the step
    program: int  # the code itself, which on a TPU lies in the same memory

    @property
    def total(self) -> int:
        return self.state + self.batches + self.activations + self.program

    def describe(self, available: int | None, *, state: str = "parameters and optimiser") -> str:
        """One line for the user.

        Args:
            available: bytes that a device has; none: not known.
            state: what the state is, in words.
        """
        parts = {state: self.state, "batches": self.batches, "activations": self.activations}
        parts |= {"program": self.program} if self.program else {}
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        of = "" if available is None else f" of {format_bytes(available)}"
        return f"memory per device: {format_bytes(self.total)}{of} ({listed})"


def step_memory(compiled: jax.stages.Compiled, *, augmented: int = 0) -> StepMemory:
    """What a compiled training step (see `train.optim.step.jit_train_step`) takes on each device.

    Args:
        augmented: numbers in the images of a batch on a device, where they are augmented there: the batches that wait
            for that hold uint8 instead of float32.

    XLA's figures are of one device, with the padding of its layouts. On a CPU they leave out what the libraries of
    matrix products and convolutions take for themselves.
    """
    plan = compiled.memory_analysis()
    state = plan.alias_size_in_bytes  # the state is all that is donated, and comes back in the same place
    batch = plan.argument_size_in_bytes - state
    waiting = batch - (4 - 1) * augmented
    return StepMemory(
        state=state,
        batches=batch + (BATCHES - 1) * waiting,
        activations=plan.temp_size_in_bytes + plan.output_size_in_bytes - state,
        program=plan.generated_code_size_in_bytes,
    )


def forward_memory(compiled: jax.stages.Compiled, image_bytes: int) -> StepMemory:
    """What a compiled forward pass (parameters, images) -> logits takes on each device.

    Args:
        image_bytes: of the images of a batch on a device.
    """
    plan = compiled.memory_analysis()
    return StepMemory(
        state=plan.argument_size_in_bytes - image_bytes,
        batches=BATCHES * image_bytes,
        activations=plan.temp_size_in_bytes + plan.output_size_in_bytes,
        program=plan.generated_code_size_in_bytes,
    )


def available_memory(mesh: Mesh) -> int | None:
    """Bytes that a step may use on each device of a mesh; none: not known.

    A GPU or TPU says what its allocator will give. The devices of a CPU share the memory of the machine, or of the
    container.
    """
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    if device.platform == "cpu":
        return host_memory() // jax.local_device_count("cpu")
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # a device to compile for, that is not there
        known = _TPU_MEMORY.get(device.device_kind)
        return None if known is None else int(known * _GIB)
    return stats.get("bytes_limit")


def check_image_size(
    image_size: tuple[int, int],
    branches: Sequence[Branch],
    mesh: Mesh,
    *,
    images: int = 1,
    available: int | None,
    training: bool = False,
) -> None:
    """Raises DoesNotFit for images so large that what is certainly needed is more than the bytes that are available on
    a device (none: not known): by arithmetic, before a minute goes into tracing and compiling.

    Args:
        image_size: height, width.
        branches: of the model, where they are known already.
        images: that a device computes at the same time.
        training: gradients are taken, for which a CPU keeps the weights of attention, unless it is separable.
    """
    area, needed = math.prod(image_size), {}
    needed[f"{images} image{'s' * (images > 1)}"] = images * area * 3 * _FLOAT
    for place, branch in enumerate(branches):
        tokens = int(area * branch.image_scale**2) // branch.patch_size**2
        positions = tokens * branch.embed_dim * _FLOAT
        needed[f"the {tokens:,} tokens of branch {place} with their positions"] = (images + 1) * positions
        if training and branch.attention != "separable" and mesh.devices.flat[0].platform == "cpu":
            weights = branch.num_heads * tokens * (tokens // branch.sr_ratio**2)
            needed[f"{branch.num_heads} maps of attention of branch {place}"] = weights * _FLOAT
    total = sum(needed.values())
    if available is not None and total > available:
        most = max(needed, key=needed.__getitem__)
        of_most = f", of which {most} take {format_bytes(needed[most])}" if len(needed) > 1 else ""
        remedy = "a smaller --image-size" + " or a smaller --batch-size" * (images > 1)
        size = " x ".join(map(str, image_size))
        raise DoesNotFit(
            f"image_size {size} needs at least {_excess(total, available)}{of_most}: choose {remedy}",
            total,
        )


def check_fits(memory: StepMemory, available: int | None, config: TrainConfig, mesh: Mesh) -> None:
    """Raises DoesNotFit if a step needs more than the bytes that are available on a device (none: not known)."""
    if available is not None and memory.total > available:
        rest = memory.total - memory.activations
        raise _too_much_error(memory.total, available, config, mesh, rest=rest, state=memory.state)


def check_forward_fits(memory: StepMemory, available: int | None) -> None:
    """The same for a forward pass."""
    if available is not None and memory.total > available:
        raise DoesNotFit(
            f"a forward pass needs {_excess(memory.total, available)}; what would help: a smaller --batch-size",
            memory.total,
        )


@contextmanager
def memory_errors_explained(config: TrainConfig, mesh: Mesh) -> Iterator[None]:
    """Turns XLA's RESOURCE_EXHAUSTED inside the block into DoesNotFit.

    The TPU's compiler refuses a program that is too large; a GPU or CPU runs out of memory when the program is run, or
    later, when its results are fetched.
    """
    try:
        yield
    except RuntimeError as error:  # XLA's errors are RuntimeErrors
        text = str(error)
        # the small memories of a core, vmem and smem, are the compiler's business: no flag of ours would help
        if "RESOURCE_EXHAUSTED" not in text or re.search(r"memory space [vs]mem", text):
            raise
        refused = _REFUSED.search(text)
        if refused:
            needed, available = (_bytes(refused[i], refused[i + 1]) for i in (1, 3))
            raise _too_much_error(needed, available, config, mesh) from error
        asked = _FAILED_ALLOCATION.search(text)
        what = f" when {format_bytes(_bytes(asked[1], asked[2]))} more was asked for" if asked else ""
        raise DoesNotFit(
            f"a device ran out of memory{what}; what would help: {', '.join(_remedies(config, mesh))}"
        ) from error


def format_bytes(size: float) -> str:
    """A number of bytes in words: `412 MiB`, `1.2 GiB`."""
    if size < 0.9995 * 2**20:
        return f"{size / 2**10:.3g} KiB"
    return f"{size / 2**20:.3g} MiB" if size < 0.9995 * _GIB else f"{size / _GIB:.1f} GiB"


# "… HLO temporaries (26.86G) exceeds available HBM (15.75G)", and of older compilers "Used 21.95G of 15.48G hbm"
_REFUSED = re.compile(r"([\d.]+)([KMGT])\)? (?:exceeds available HBM \(|of )([\d.]+)([KMGT])(?:\)| hbm)")
# "… trying to allocate 285212672 bytes", "Failed to allocate request for 176.00MiB", "Out of memory allocating 9 bytes"
_FAILED_ALLOCATION = re.compile(r"(?:allocate|allocating|request for) ([\d.]+) ?([KMGT]?)(?:iB|B|bytes)")


def _bytes(number: str, unit: str) -> float:
    return float(number) * 2 ** (10 * " KMGT".index(unit or " "))


def _too_much_error(
    needed: float, available: float, config: TrainConfig, mesh: Mesh, *, rest: float = 0, state: float | None = None
) -> DoesNotFit:
    # how many times fewer activations would do
    factor = (needed - rest) / (available - rest) if available > rest else math.inf
    sharding_helps = state is None or state > needed / 10
    remedies = _remedies(config, mesh, factor=factor, sharding_helps=sharding_helps)
    return DoesNotFit(
        f"a step needs {_excess(needed, available)}; what would help: {', '.join(remedies)}",
        needed,
    )


def _excess(needed: float, available: float) -> str:
    return (
        f"{format_bytes(needed)} on each device, {format_bytes(needed - available)} more than the "
        f"{format_bytes(available)} that it has"
    )


def _remedies(config: TrainConfig, mesh: Mesh, *, factor: float = 2, sharding_helps: bool = True) -> list[str]:
    """The flags that save memory and are not used yet, those that cost least first."""
    images = config.batch_size // config.grad_accum // mesh.size  # on a device at a time
    parts = next((parts for parts in range(2, images + 1) if images % parts == 0 and parts >= factor), None)
    found = {
        "--precision bfloat16": config.precision == "float32" and mesh.devices.flat[0].platform != "cpu",
        f"--mesh fsdp={mesh.size}": mesh.size > 1 and mesh.shape["fsdp"] == 1 and sharding_helps,
        f"--grad-accum {config.grad_accum * (parts or 0)}": parts is not None,
        "--grad-checkpointing": not config.grad_checkpointing,
        "a smaller --batch-size": config.batch_size > mesh.size,
    }
    return [flag for flag, helps in found.items() if helps] or ["a smaller --variant or --image-size"]
