"""The diagonal of Reformer's table 2: trained and evaluated with as many rounds of hashing."""

from sparsejax.sweep import align, product, seeds

ROWS = {"full": "full", **{f"LSH, {n} round{'s' * (n > 1)}": f"lsh{n}" for n in (1, 2, 4, 8)}}


def sweep():
    return product(seeds(3), align({"label": ROWS, "model.schedule": ROWS.values()}))
