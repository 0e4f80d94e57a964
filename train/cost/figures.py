"""What a training step costs, told by its compiled program: for the devices here, or for TPUs that are not there."""

# jax is imported when a step is compiled: the environment is prepared first, and `--help` of the command is instant.
import dataclasses
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.config import TrainConfig

if TYPE_CHECKING:
    from train.cost.hlo import Traffic
    from train.devices.memory import StepMemory

_IMAGENET = 1_281_167  # training images, which decide the steps of an epoch; any number gives the same figures


@dataclass(frozen=True)
class Figures:
    """What a compiled step takes."""

    config: TrainConfig
    slice: str  # the topology, or "local"
    devices: int
    device_kind: str
    mesh: str
    flops: int  # of a step, over all devices, by `train.cost.flops`
    seconds: float  # that compiling took
    available: int | None  # bytes of memory of a device, if known
    needed: float | None  # bytes of memory on each device, if known
    memory: "StepMemory | None"  # what it is needed for; None where the compiler refused the program
    traffic: "dict[str, Traffic] | None"  # as above
    compiler_flops: float | None  # of a step, over all devices, by XLA; None also where it does not count loops
    cycles: int | None  # of a device without communication, as a TPU's compiler estimates them; None for others
    too_much: str | None  # why it does not fit


def compile_step(config: TrainConfig, num_classes: int, topology: str | None = None) -> Figures:
    """Compile the training step of some settings.

    Args:
        topology: a slice of TPUs (see `train.cost.slices`); none: the devices of this machine.

    Raises:
        SettingsError: there is no such slice, or the settings do not suit it.
    """
    from train.cost.flops import matrix_flops
    from train.cost.hlo import communication, estimated_cycles
    from train.cost.slices import slice_devices
    from train.devices.attention import choose_attention
    from train.devices.memory import DoesNotFit, available_memory, check_fits, memory_errors_explained
    from train.devices.mesh import check_divides, default_precision, make_mesh
    from train.optim.programs import Plan, Programs
    from train.tasks.classification import Classification

    mesh = make_mesh(config.mesh, None if topology is None else slice_devices(topology))
    check_divides(config, mesh)
    # on the device, augmentation is a program beside the step
    config = dataclasses.replace(config, precision=config.precision or default_precision(mesh), augment_on="host")
    model_config = config.model_config(num_classes)
    kernel, _ = choose_attention(config.attention_kernel, model_config, config.precision, mesh)
    config = dataclasses.replace(config, attention_kernel=kernel)
    task = Classification(config, model_config, tuple(map(str, range(num_classes))))

    available = available_memory(mesh)
    memory = needed = traffic = compiler_flops = cycles = too_much = None
    start = time.perf_counter()
    with closing(Programs(Plan(task, config, mesh, max(1, _IMAGENET // config.batch_size)))) as programs:
        try:
            with memory_errors_explained(config, mesh):
                compiled = programs.train_step
            seconds = time.perf_counter() - start
            memory, hlo = programs.memory, compiled.as_text()
            traffic, cycles = communication(hlo), estimated_cycles(hlo)
            needed = memory.total
            if config.grad_accum == 1:
                compiler_flops = compiled.cost_analysis()["flops"] * mesh.size  # XLA's are one device's, loops once
            check_fits(memory, available, config, mesh)
        except DoesNotFit as error:
            too_much, needed = str(error), error.needed
            seconds = time.perf_counter() - start if memory is None else seconds
        flops = matrix_flops(programs.traced.jaxpr)
    return Figures(
        config=dataclasses.replace(config, variant=model_config.name),
        slice=topology or "local",
        devices=mesh.size,
        device_kind=mesh.devices.flat[0].device_kind,
        mesh=",".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        flops=flops,
        seconds=seconds,
        available=available,
        needed=needed,
        memory=memory,
        traffic=traffic,
        compiler_flops=compiler_flops,
        cycles=cycles,
        too_much=too_much,
    )
