"""Copying with patterns whose receptive field covers the distance, and with patterns that miss it by one token."""

from sparsejax.sweep import chain, product, seeds

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
LONG = 2000  # steps, for runs that have learned only part of the task after the 600 of the config


def make_run(label):
    schedule, pattern = PATTERNS[label]
    return {"label": label, "model.schedule": schedule, "model.layers.local.mixer.pattern": pattern}


def sweep():
    longer = [
        make_run(label) | {"label": f"{label}, {LONG:,} steps", "train.steps": LONG}
        for label in ("window(64), twice", "window(63), twice")
    ]
    return product(seeds(3), chain(map(make_run, PATTERNS), longer))
