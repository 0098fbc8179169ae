"""Table 2 of Reformer: trained with full attention or rounds of hashing, evaluated with each of them."""

from sparsejax.sweep import align, product, seeds

ROWS = {"full": "full", **{f"LSH, {n} round{'s' * (n > 1)}": f"lsh{n}" for n in (4, 2, 1)}}


def sweep():
    return product(seeds(3), align({"label": ROWS, "model.schedule": ROWS.values()}))
