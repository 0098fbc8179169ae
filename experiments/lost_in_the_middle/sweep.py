"""A window with globals, a window alone, and full attention above a window, on configs/lost_in_the_middle.py."""

from sparsejax.sweep import align, product, seeds

SCHEDULES = {"full": "local full", "window, globals": "local globals", "window": "local local"}


def sweep():
    return product(seeds(3), align({"label": SCHEDULES, "model.schedule": list(SCHEDULES.values())}))
