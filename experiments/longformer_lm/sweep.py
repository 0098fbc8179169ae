"""Longformer's table 4: how windows change over twelve layers, and dilation. For either size of the config."""

from sparsejax.sweep import align, product, seeds

# In the layers of configs/longformer_lm.py: wN has a window of an N-th of the widest.
SCHEDULES = {
    "decreasing": "3x(w1) 3x(w2) 2x(w4) 2x(w8) 2x(w16)",
    "fixed": "12x(fixed)",
    "increasing": "2x(w16) 2x(w8) 2x(w4) 3x(w2) 3x(w1)",
    # As in the paper's appendix: two heads have gaps of 0, 1, 2, 3 from the bottom to the top.
    "increasing, dilated": "2x(w16) 2x(w8) 2x(w4) 2x(w2_stride2) w2_stride3 w1_stride3 2x(w1_stride4)",
}


def sweep():
    return product(seeds(3), align({"label": SCHEDULES, "model.schedule": SCHEDULES.values()}))
