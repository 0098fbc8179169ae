"""Table 1 of BigBird, and a row with global tiles."""

from sparsejax.sweep import align, product, seeds

ROWS = {"full": "full", "R": "random", "W": "window", "R+W": "random_window", "R+W+G": "random_window_global"}


def write_schedule(row, layers):
    """The schedule of a row in layers of configs/bigbird_mlm.py; layers with random tiles have one name per layer."""
    return " ".join(f"{row}{i}" for i in range(layers)) if "random" in row else f"{layers}x({row})"


def compare_rows(layers):
    schedules = [write_schedule(row, layers) for row in ROWS.values()]
    return product(seeds(3), align({"label": ROWS, "model.schedule": schedules}))


def mini():
    return compare_rows(layers=3)


def paper():
    return compare_rows(layers=12)
