"""What a program costs, told by its compiled form: for the devices here, or for TPUs and GPUs that are not there."""

# jax is imported when a program is compiled: the environment is prepared first, and `--help` of the command is instant.
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.errors import SettingsError
from train.config import TrainConfig
from train.cost import gpus, slices
from train.cost.gpus import GPUS, find_gpu

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from train.cost.hlo import Traffic
    from train.cost.roofline import Roofline
    from train.devices.memory import StepMemory
    from train.tasks.classification import Classification

_IMAGENET = 1_281_167  # training images, which decide the steps of an epoch; any number gives the same figures


@dataclass(frozen=True)
class Figures:
    """What a compiled training step, or forward pass, takes."""

    config: TrainConfig
    slice: str  # the topology, or "local"
    devices: int
    device_kind: str
    mesh: str
    flops: int  # over all devices, by `train.cost.flops`
    seconds: float  # that compiling took
    available: int | None  # bytes of memory of a device, if known
    needed: float | None  # bytes of memory on each device, if known
    memory: "StepMemory | None"  # what it is needed for; None where the compiler refused the program
    traffic: "dict[str, Traffic] | None"  # as above
    compiler_flops: float | None  # over all devices, by XLA; None for GPUs, and where it does not count loops
    # of a device without communication and our own kernels, as a TPU's compiler estimates them; None for others
    cycles: int | None
    too_much: str | None  # why it does not fit
    own_kernels: int = 0  # calls of them
    inference: bool = False  # the forward pass, not the training step
    roofline: "Roofline | None" = None  # of one device; None for all but GPUs that are not there
    early_reductions: tuple[int, int] | None = None  # of a GPU's, see `train.cost.hlo.early_reductions`
    estimate: slices.Estimate | None = None  # of the time on a slice of TPUs


@dataclass(frozen=True)
class _Target:
    """A model on devices."""

    config: TrainConfig  # nothing left open but for where images are augmented
    task: "Classification"
    mesh: "Mesh"
    compiler_options: dict[str, Any] | None
    augmented: int  # see `train.devices.memory.step_memory`


def prepare_environment(topologies: Sequence[str]) -> None:
    """Let jax compile for devices that are not there. To be called before jax is imported.

    Raises SettingsError if what has the compiler is not installed, or a topology is of no known kind.
    """
    for topology in topologies:
        if find_gpu(topology):
            gpus.prepare_environment()
        elif topology.startswith("v"):
            slices.prepare_environment()
        else:
            raise SettingsError(
                f"no topology {topology!r}: slices of TPUs are written like v5e:4x4, GPUs like h100 or h100:8; there "
                f"are {', '.join(GPUS)}"
            )


def compile_step(
    config: TrainConfig, num_classes: int, topology: str | None = None, *, inference: bool = False
) -> Figures:
    """Compile the training step of some settings, or the forward pass of their model.

    Args:
        topology: a slice of TPUs (see `train.cost.slices`) or GPUs (see `train.cost.gpus`); none: the devices of this
            machine.
        inference: the forward pass: logits of a batch of uint8 images; parameters are in the arithmetic's dtype.

    Raises:
        SettingsError: there is no such topology, or the settings do not suit it.
    """
    from train.cost.flops import matrix_flops
    from train.cost.hlo import communication, early_reductions, estimated_cycles, own_kernels
    from train.cost.kernels import kernels
    from train.cost.roofline import roofline
    from train.devices.memory import DoesNotFit, available_memory, check_image_size, memory_errors_explained

    gpu = None if topology is None else find_gpu(topology)
    target = _target(config, num_classes, topology, training=not inference)
    config, mesh = target.config, target.mesh
    available = gpu.available if gpu else available_memory(mesh)
    model = target.task.model_config
    check_image_size(model.image_size, model.branches, mesh, available=available, training=not inference)
    read: dict[str, Any] = dict.fromkeys(("memory", "traffic", "compiler_flops", "cycles"))
    needed = too_much = None
    start, seconds = time.perf_counter(), None
    with ExitStack() as stack:
        program = (_forward if inference else _step)(target, stack)
        try:
            with memory_errors_explained(config, mesh):
                compiled = program.compiled()
            seconds = time.perf_counter() - start
            memory, hlo = program.memory(compiled), compiled.as_text()
            needed = memory.total
            read |= {"memory": memory, "traffic": communication(hlo), "cycles": estimated_cycles(hlo)}
            read["own_kernels"] = own_kernels(hlo)
            read["estimate"] = slices.estimate(mesh.devices.flat[0].device_kind, read["cycles"], read["traffic"])
            cost = compiled.cost_analysis()
            if cost is not None and (inference or config.grad_accum == 1):
                read["compiler_flops"] = cost["flops"] * mesh.size  # XLA's are one device's, loops once
            if gpu:
                read |= {"roofline": roofline(kernels(hlo), gpu), "early_reductions": early_reductions(hlo)}
            program.check_fits(memory, available)
        except DoesNotFit as error:
            too_much, needed = str(error), error.needed
        seconds = seconds or time.perf_counter() - start
        flops = matrix_flops(program.traced.jaxpr)
    return Figures(
        config=dataclasses.replace(config, variant=target.task.model_config.name),
        slice=topology or "local",
        devices=mesh.size,
        device_kind=mesh.devices.flat[0].device_kind,
        mesh=",".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        flops=flops,
        seconds=seconds,
        available=available,
        needed=needed,
        too_much=too_much,
        inference=inference,
        **read,
    )


def check_case(config: TrainConfig, num_classes: int, topology: str | None = None) -> None:
    """Raises SettingsError as `compile_step` would, before minutes go into compiling."""
    _target(config, num_classes, topology)


def _target(config: TrainConfig, num_classes: int, topology: str | None, *, training: bool = True) -> _Target:
    from convert.metadata import describe_weights
    from train.devices.attention import choose_attention
    from train.devices.mesh import check_divides, default_mix_group, default_precision, make_mesh
    from train.images.rand_augment import device_can_augment
    from train.tasks.begin import make_teacher, read_teacher
    from train.tasks.classification import Classification

    gpu, devices = None, None
    if topology is not None:
        gpu = find_gpu(topology)
        devices = gpus.gpu_devices(topology) if gpu else slices.slice_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    check_divides(config, mesh)
    on_gpu = mesh.devices.flat[0].platform == "gpu" and device_can_augment(config)
    on_device = config.augment_on == "device" or (config.augment_on is None and on_gpu)
    # on the device, augmentation is a program beside the step
    config = dataclasses.replace(
        config,
        precision=config.precision or default_precision(mesh),
        augment_on="host",
        mix_group=config.mix_group or default_mix_group(config, mesh),
    )
    model_config = config.model_config(num_classes)
    # where it is XLA's for want of cuDNN, the count of fused calls tells
    kernel, _ = choose_attention(config.attention_kernel, model_config, config.precision, mesh, training=training)
    config = dataclasses.replace(config, attention_kernel=kernel)
    names = tuple(map(str, range(num_classes)))
    teacher = None
    if config.distill is not None and training:
        weights = read_teacher(config)
        of_teacher = weights.class_names if weights.config.num_classes == num_classes else None
        about = describe_weights(weights)
        teacher, *_ = make_teacher(config, model_config, of_teacher or names, mesh, about)
    task = Classification(config, model_config, names, teacher=teacher)
    images = task.batch_shapes(config.batch_size, training=True)["image"]
    options = gpu.compiler_options if gpu else None
    return _Target(config, task, mesh, options, images.size // mesh.size if on_device else 0)


@dataclass(frozen=True)
class _Program:
    """A program that is traced; compiling waits."""

    traced: "jax.stages.Traced"
    compiled: Callable[[], "jax.stages.Compiled"]
    memory: Callable[["jax.stages.Compiled"], "StepMemory"]
    check_fits: Callable[["StepMemory", int | None], None]


def _step(target: _Target, stack: ExitStack) -> _Program:
    from train.devices.memory import check_fits, step_memory
    from train.optim.programs import Plan, Programs

    config, mesh = target.config, target.mesh
    steps_per_epoch = max(1, _IMAGENET // config.batch_size)
    plan = Plan(target.task, config, mesh, steps_per_epoch, compiler_options=target.compiler_options)
    programs = stack.enter_context(closing(Programs(plan)))
    return _Program(
        programs.traced,
        lambda: programs.train_step,
        lambda compiled: step_memory(compiled, augmented=target.augmented),
        lambda memory, available: check_fits(memory, available, config, mesh),
    )


def _forward(target: _Target, stack: ExitStack) -> _Program:
    import jax
    from flax import nnx

    from train.devices.memory import check_forward_fits, forward_memory
    from train.devices.mesh import batch_sharding, replicated
    from train.devices.normalise import normalise
    from train.optim.state import abstract_model

    config, mesh = target.config, target.mesh
    model = abstract_model(target.task, config)
    model.eval()
    graphdef, params = nnx.split(model)
    images = target.task.batch_shapes(config.batch_size, training=False)["image"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.precision), nnx.to_pure_dict(params))

    def forward(params: Any, images: "jax.Array") -> "jax.Array":
        with jax.default_matmul_precision("float32" if config.precision == "float32" else None):
            return nnx.merge(graphdef, params)(normalise(images))

    cut = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        traced = jax.jit(forward, in_shardings=(replicated(mesh), cut), out_shardings=cut).trace(params, images)
    image_bytes = images.size * images.dtype.itemsize // mesh.size
    return _Program(
        traced,
        lambda: traced.lower().compile(target.compiler_options),
        lambda compiled: forward_memory(compiled, image_bytes),
        check_forward_fits,
    )
