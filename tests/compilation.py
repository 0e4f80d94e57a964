"""How XLA compiles for a CPU, as `compiler_options` of `jax.jit`."""

# What all tests do by default: a third of the time for what compiles, and for what runs up to a hundred times as much.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
AS_FOR_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}


def xla_flags(options: dict[str, bool | int] = QUICKLY, *, devices: int = 1) -> str:
    """The same for XLA_FLAGS, which they replace; with that many devices on a CPU."""
    options = options | {"xla_force_host_platform_device_count": devices}
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
