"""Table 4 of Longformer: window sizes over the layers, and dilation."""

from sparsejax.sweep import align, product, seeds

# Layers of configs/longformer_lm.py: wN has a window of 1/N of the widest one. strideN is dilated on some heads, with
# gaps of 0, 1, 2 and 3 keys from the bottom to the top, as in the appendix of the paper.
MINI = {
    "decreasing": "w1 w1 w2 w4 w8 w16",
    "fixed": "6x(fixed)",
    "increasing": "w16 w8 w4 w2 w1 w1",
    "increasing, dilated": "w16 w8 w4 w2_stride2 w1_stride3 w1_stride4",
}
PAPER = {
    "decreasing": "3x(w1) 3x(w2) 2x(w4) 2x(w8) 2x(w16)",
    "fixed": "12x(fixed)",
    "increasing": "2x(w16) 2x(w8) 2x(w4) 3x(w2) 3x(w1)",
    "increasing, dilated": "2x(w16) 2x(w8) 2x(w4) 2x(w2_stride2) w2_stride3 w1_stride3 2x(w1_stride4)",
}


def compare(schedules):
    return product(seeds(3), align({"label": schedules, "model.schedule": schedules.values()}))


def mini():
    return compare(MINI)


def long():
    """Two rows of `mini` for 2.5 times as many steps, in which they pass an n-gram."""
    longer = {"train.steps": 1500, "eval.every": 300, "checkpoint.every": 300}
    return [longer | row for row in compare({name: MINI[name] for name in ("fixed", "increasing")})]


def paper():
    return compare(PAPER)
