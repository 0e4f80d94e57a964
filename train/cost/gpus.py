"""NVIDIA GPUs that are not there, as devices to compile for, and what their arithmetic and memory can do."""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from convert.errors import MissingExtra, SettingsError
from crossvit_jax.extras import needs

_KIB, _MIB = 2**10, 2**20
_PROCESS_SHARE = 0.75  # of a card's memory that jax lets a process have (XLA_PYTHON_CLIENT_MEM_FRACTION)

# What a compiler for cards that are not there needs: wheels, and the file of each by which it is known.
_WHEELS = {
    "jax-cuda13-plugin": "jax_cuda13_plugin/_versions.so",
    "jax-cuda13-pjrt": "jax_plugins/xla_cuda13/xla_cuda_plugin.so",
    "nvidia-cuda-nvcc": "nvidia/cu13/bin/ptxas",
    "nvidia-nvvm": "nvidia/cu13/nvvm/libdevice/libdevice.10.bc",
    "nvidia-cudnn-cu13": "nvidia/cudnn/lib/libcudnn.so.9",  # jax asks for its version when it lowers fused attention
}

# The plugin looks for a driver and says so at length; without one, it crashes when it compares versions.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


@dataclass(frozen=True)
class Gpu:
    """A card: what its compiler has to know, and its peaks per second.

    Sources: NVIDIA's data sheets of the cards and white papers of the architectures (Turing, GA100, GA102, Ada, Hopper)
    for the clock when boosted, bandwidth, L2 and dense FLOPs of the tensor cores with float32 sums; the table
    "Technical specifications per compute capability" of the CUDA C++ programming guide for the rest. `memory` is what
    the driver lets programs have, a little less than what is sold.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    float32_units: int  # of a multiprocessor
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: float  # bytes per second
    l2: int  # bytes
    shared_memory: int  # bytes of a multiprocessor
    threads: int  # of a multiprocessor
    tensor_flops: float  # of products in bfloat16 (before sm_80: float16) per second

    @property
    def float32_flops(self) -> float:
        """Per second, without the tensor cores."""
        return 2 * self.multiprocessors * self.float32_units * self.clock * 1e9

    @property
    def available(self) -> int:
        """Bytes of memory that jax gives a process."""
        return int(_PROCESS_SHARE * self.memory)

    @property
    def compiler_options(self) -> dict[str, bool | int]:
        """Options of XLA to compile with for a card that is not there.

        Nothing is autotuned without a card, and what Triton then makes of products is either absurdly slow or fails:
        they are left to cuBLASLt. The other options save time and leave the optimised HLO as it is. XLA has its own
        estimates for the H100's capability only; for others it fails if it is asked for them.
        """
        return {
            "xla_gpu_enable_triton_gemm": False,
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
            "xla_gpu_disable_gpuasm_optimizations": True,
            "xla_gpu_collect_cost_model_stats": self.capability == (9, 0),
        }


GPUS = {
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 150_000_000_000, 4.8e12, 50 * _MIB, 228 * _KIB, 2048, 989e12),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 85_000_000_000, 3.35e12, 50 * _MIB, 228 * _KIB, 2048, 989e12
    ),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 85_000_000_000, 2.039e12, 40 * _MIB, 164 * _KIB, 2048, 312e12
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 2.52, 25_300_000_000, 1.008e12, 72 * _MIB, 100 * _KIB, 1536, 165e12
    ),
    "rtx3090": Gpu(
        "NVIDIA GeForce RTX 3090", (8, 6), 82, 128, 1.695, 25_300_000_000, 0.936e12, 6 * _MIB, 100 * _KIB, 1536, 71e12
    ),
    "a4000": Gpu(
        "NVIDIA RTX A4000", (8, 6), 48, 128, 1.56, 16_900_000_000, 0.448e12, 4 * _MIB, 100 * _KIB, 1536, 76.7e12
    ),
    "t4": Gpu("Tesla T4", (7, 5), 40, 64, 1.59, 15_800_000_000, 0.320e12, 4 * _MIB, 64 * _KIB, 1024, 65e12),
}


def find_gpu(topology: str) -> Gpu | None:
    """The card in a topology such as `h100` or `h100:8`; None: it names none of `GPUS`."""
    return GPUS.get(topology.partition(":")[0])


def prepare_environment() -> None:
    """Let jax compile for GPUs on a machine without one. To be called before jax is imported.

    What the environment says already stays. Raises MissingExtra if a wheel is missing that the compiler is in.
    """
    missing = [wheel for wheel, file in _WHEELS.items() if not _installed(file)]
    if missing:
        raise MissingExtra(needs("--topology of GPUs", missing, "gpu-compile"))
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def gpu_devices(topology: str) -> list:
    """The devices of a topology such as `h100`, or `h100:8` for eight of them in one machine.

    Raises SettingsError if it is written otherwise, or jax cannot compile for it.
    """
    import jax
    from jax.experimental.topologies import get_topology_desc

    gpu, count = find_gpu(topology), re.fullmatch(r"\w+(?::([1-9]\d{0,2}))?", topology, re.ASCII)
    if gpu is None or count is None:
        raise SettingsError(f"no GPUs {topology!r}, write them like h100 or h100:8; there are {', '.join(GPUS)}")
    try:
        shape = f"1x1x{count[1] or 1}"  # slices, hosts, devices of each
        return get_topology_desc(platform="cuda", topology=shape, target_config=_target_config(gpu)).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise SettingsError(f"jax cannot compile for {topology}: {str(error).splitlines()[0]}") from error


def _installed(file: str) -> bool:
    """Whether a file lies in a package, which may be spread over several folders."""
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    folders = () if spec is None else spec.submodule_search_locations or ()
    return any(Path(folder, rest).exists() for folder in folders)


def _target_config(gpu: Gpu) -> str:
    """What XLA has to know of a card: the text of a GpuTargetConfigProto.

    Without the compute capability, the threads of a warp and the limits of blocks XLA crashes; core count, clock,
    bandwidth, memory and registers change the program; the rest is for its estimates.
    """
    major, minor = gpu.capability
    # a multiprocessor has four tensor cores; a product takes a multiply and an add
    per_cycle = round(gpu.tensor_flops / (2 * 4 * gpu.multiprocessors * gpu.clock * 1e9))
    float16, float32, bfloat16 = 10, 11, 16  # numbers in xla_data.proto

    def rates(units: int, per_cycle: dict[int, int]) -> str:
        return " ".join(
            f"rate_infos {{ key: {dtype} value {{ clock_rate_ghz: {gpu.clock} units_per_core: {units} "
            f"ops_per_clock: {operations} }} }}"
            for dtype, operations in per_cycle.items()
        )

    scalar = rates(gpu.float32_units, {float16: 2, bfloat16: 2, float32: 1})
    matrix = rates(4, {float16: per_cycle, bfloat16: per_cycle, float32: max(1, per_cycle // 2)})
    features = "ACCELERATED_FEATURES" if gpu.capability == (9, 0) else "NONE"  # sm_90a
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {gpu.threads}
  shared_memory_per_block: {48 * _KIB}  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory - (_KIB if major >= 8 else 0)}
  core_count: {gpu.multiprocessors}  fpus_per_core: {gpu.float32_units}  clock_rate_ghz: {gpu.clock}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: {int(gpu.bandwidth)}  l2_cache_size: {gpu.l2}  device_memory_size: {gpu.memory}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  scalar_unit_description {{ {scalar} }}
  matrix_unit_description {{ {matrix} }}
  device_vendor: "NVIDIA Corporation"  name: "{gpu.name}"  device_address_bits: 64
  pcie_bandwidth: {32 << 30}
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.26.0"  cub_version: "3.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 26 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{gpu.name}"
"""
