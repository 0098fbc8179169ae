"""Environments in which programs compile fastest, on any number of devices of the CPU."""

# Most of the time of a test is compilation. LLVM's optimizations and XLA's newer code generator, which jax 0.12 always
# uses, are half of it; splitting a program over threads pays only where cores are idle.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


def simulate(count: int) -> dict[str, str]:
    """Returns the variables of a process with `count` devices on the CPU."""
    flags = f"--xla_force_host_platform_device_count={count} {FAST_COMPILATION}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
