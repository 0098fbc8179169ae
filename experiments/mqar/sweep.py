"""Recall by distance with attention, windows, Mamba and hybrids, on configs/mqar.py."""

from sparsejax.sweep import chain, product, seeds

SCHEDULE, STATE, RATE = "model.schedule", "model.layers.ssm.mixer.state", "optimizer.learning_rate"
ATTENTION = [
    {"label": "full, full", SCHEDULE: "2x(full)"},
    {"label": "window(7), window(7)", SCHEDULE: "2x(local)"},
    {"label": "window(7), full", SCHEDULE: "local full"},
    {"label": "Mamba of state 4, full", SCHEDULE: "ssm full", STATE: 4},
]
MAMBA = [{"label": f"Mamba of state {n}, twice", SCHEDULE: "2x(ssm)", STATE: n} for n in (1, 2, 4, 16)]


def at_rate(rate, sweep):
    return product(sweep, [{RATE: rate, "optimizer.weight_decay": 0.0}])


def sweep():
    return product(seeds(3), chain(at_rate(3e-3, ATTENTION), at_rate(1e-2, MAMBA)))


def other_rates():
    """Each kind at the learning rate of the other, with one seed: they need different rates."""
    rows = chain(at_rate(1e-2, ATTENTION[:3]), at_rate(3e-3, MAMBA[3:]))
    return product(seeds(1), [row | {"label": f"{row['label']}, rate {row[RATE]}"} for row in rows])


def longer():
    """Mamba alone for twice as many steps: its runs learn abruptly, and some of them late."""
    rows = [row | {"label": f"{row['label']}, 4,000 steps", "train.steps": 4000} for row in MAMBA]
    return product(seeds(3), at_rate(1e-2, rows))
