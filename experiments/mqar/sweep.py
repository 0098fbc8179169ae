"""Who can recall, and from how far? Attention, windows, Mamba and hybrids on configs/mqar.py."""

from sparsejax.sweep import chain, product, seeds

SCHEDULE, STATE = "model.schedule", "model.layers.ssm.mixer.state"


def sweep():
    attention = [
        {"label": "full, full", SCHEDULE: "2x(full)"},
        {"label": "window(7), window(7)", SCHEDULE: "2x(local)"},
        {"label": "window(7), full", SCHEDULE: "local full"},
    ]
    states = (4, 8, 16, 32)
    mamba = [{"label": f"Mamba of state {n}, twice", SCHEDULE: "2x(ssm)", STATE: n} for n in states]
    hybrid = [{"label": "Mamba of state 4, full", SCHEDULE: "ssm full", STATE: 4}]
    return product(seeds(3), chain(attention, mamba, hybrid))
