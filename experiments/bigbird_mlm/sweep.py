"""BigBird's table 1, and the row with global tiles that it leaves out."""

from sparsejax.sweep import align, product, seeds

ROWS = {"full": "full", "R": "random", "W": "window", "R+W": "random_window", "R+W+G": "random_window_global"}


def write_schedule(row, layers):
    """In the layers of configs/bigbird_mlm.py: those with random tiles are told apart by their number."""
    return " ".join(f"{row}{i}" for i in range(layers)) if "random" in row else f"{layers}x({row})"


def compare_rows(layers):
    schedules = [write_schedule(row, layers) for row in ROWS.values()]
    return product(seeds(3), align({"label": ROWS, "model.schedule": schedules}))


def mini():
    return compare_rows(layers=3)


def paper():
    return compare_rows(layers=12)
