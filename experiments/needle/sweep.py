"""Windows alone, with sinks, with one full layer, with Mamba, and full attention, on configs/needle.py."""

from sparsejax.sweep import align, product, seeds

SCHEDULES = {
    "windows": "4x(local)",
    "windows, sinks": "4x(sinks)",
    "full first": "full 3x(local)",
    "full last": "3x(local) full",
    "Mamba first": "ssm 3x(local)",
    "full": "4x(full)",
}


def sweep():
    return product(seeds(3), align({"label": SCHEDULES, "model.schedule": list(SCHEDULES.values())}))
