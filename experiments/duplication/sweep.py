"""Who can repeat? Patterns whose reach covers the distance, and the same that fall short by one token."""

from sparsejax.sweep import product, seeds

PATTERNS = {
    "full": ("full", "causal"),
    "window(127)": ("local", "causal & window(127)"),
    "window(126)": ("local", "causal & window(126)"),
    "window(3) | strided(127)": ("local", "causal & (window(3) | strided(127))"),
    "window(3) | strided(126)": ("local", "causal & (window(3) | strided(126))"),
    "window(15) | strided(16), twice": ("2x(local)", "causal & (window(15) | strided(16))"),
    "window(64), twice": ("2x(local)", "causal & window(64)"),
    "window(63), twice": ("2x(local)", "causal & window(63)"),
}


def sweep():
    rows = [
        {"label": label, "model.schedule": schedule, "model.layers.local.mixer.pattern": pattern}
        for label, (schedule, pattern) in PATTERNS.items()
    ]
    return product(seeds(3), rows)
