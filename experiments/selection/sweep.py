"""Layers that differ in what a query attends to, each alone, and three of some kinds below every full layer."""

from sparsejax.sweep import align, product, seeds

ALONE = {
    "full": "full",
    "window": "window",
    "window, sinks": "sinks",
    "window, global tokens": "globals",
    "BigBird": "bigbird",
    "strided": "strided",
    "LSH": "lsh",
    "routing": "routing",
    "top-k": "tokens",
    "MoBA": "moba",
    "NSA": "nsa",
    "DSA": "dsa",
    "CSA, HCA": "csa hca",
    "MSA": "msa",
    "Mamba-2": "mamba2",
    "gated delta": "delta",
}
BELOW_FULL = ("window", "MoBA", "Mamba-2", "gated delta")  # kinds of which three layers are below each full layer


def compare(repeats=1):
    """Schedules of four layers, or of `repeats` times as many, after a short convolution."""
    schedules = {label: 4 // len(names.split()) * f"{names} " for label, names in ALONE.items()}
    schedules |= {f"3 {label} : 1 full": 3 * f"{ALONE[label]} " + "full" for label in BELOW_FULL}
    texts = [f"conv {repeats}x({text.strip()})" for text in schedules.values()]
    return product(seeds(3), align({"label": schedules, "model.schedule": texts}))


def sweep():
    return compare()


def paper():
    return compare(repeats=6)
