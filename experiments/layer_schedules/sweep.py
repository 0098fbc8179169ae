"""Which layers, how many of each, and where? On text, recall and needles, with the layers of the config."""

from sparsejax.sweep import align, chain, product, seeds

WINDOW = "model.layers.local.mixer.pattern"
RATIOS = {
    "Mamba alone": "8x(ssm)",
    "1 full : 7 Mamba": "7x(ssm) full",
    "1 full : 3 Mamba": "2x(3x(ssm) full)",
    "1 full : 1 Mamba": "4x(ssm full)",
    "full alone": "8x(full)",
    "1 full : 7 lightning": "7x(lightning) full",
    "1 full : 7 windows": "7x(local) full",
    "1 full : 3 windows": "2x(3x(local) full)",
    "1 full : 1 window": "4x(local full)",
    "windows alone": "8x(local)",
}
POSITIONS = {
    "1 full without positions : 3 windows": "2x(3x(local) nope)",
    "1 full without positions : 7 Mamba": "7x(ssm) nope",
}
AMONG_MAMBA = {"full first, then 7 Mamba": "full 7x(ssm)", "full among 7 Mamba": "3x(ssm) full 4x(ssm)"}
FIRST = (1, 2, 4, 8)  # tokens that are sinks
SINKS = {f"windows alone, sinks {n}": f"8x(sinks{n})" for n in FIRST}
# What serves text does not serve probes: with a warm-up of 50 steps and beta2 of 0.95, seven Mamba layers and one of
# attention recall nothing in 400 steps.
PROBE = {
    "data.length": 32,
    "data.probe.length": 32,
    "train.steps": 300,
    "eval.every": 100,
    "checkpoint.every": 100,
    "optimizer.schedule": "constant",
    "optimizer.beta2": 0.98,
    "optimizer.weight_decay": 0.0,
}
# The sizes of configs/mqar.py, and windows to match.
RECALL = PROBE | {
    "data.task": "mqar",
    "data.probe.pairs": 4,
    "data.probe.vocab": 64,
    "train.batch": 64,
    "optimizer.warmup": 200,
    WINDOW: "causal & window(7)",
    **{f"model.layers.sinks{n}.mixer.pattern": f"causal & (window(7) | sink({n}))" for n in FIRST},
}
# One number of three digits behind a name, to be said again at the end; eight windows of 2 see 16 tokens back.
NEEDLE = PROBE | {
    "data.task": "passkey",
    "data.probe.digits": 3,
    "data.probe.names": 16,
    "train.batch": 32,
    "optimizer.warmup": 100,
    WINDOW: "causal & window(2)",
}


def write_places(n):
    """Full layers among windows, `n` for each of the mini size; "1 full : 3 windows" has them spread evenly."""
    return {
        "full first": f"{2 * n}x(full) {6 * n}x(local)",
        "full last": f"{6 * n}x(local) {2 * n}x(full)",
        "full first and last": f"{n}x(full) {6 * n}x(local) {n}x(full)",
        "full first, middle, last": f"{n}x(full) {3 * n}x(local) {n}x(full) {2 * n}x(local) {n}x(full)",
    }


def name_runs(schedules, repeats=1):
    """Runs of these schedules, each said so many times."""
    texts = [text if repeats == 1 else f"{repeats}x({text})" for text in schedules.values()]
    return align({"label": schedules, "model.schedule": texts})


def widen(repeats, windows):
    """Windows alone, of each width."""
    widths = [{WINDOW: f"causal & window({n})", "label": f"windows alone, {n} back"} for n in windows]
    return product(widths, [{"model.schedule": f"{8 * repeats}x(local)"}])


def compare(repeats=1, windows=(7, 127)):
    """Ratios, positions, sinks and places; windows alone also at the given widths."""
    schedules = RATIOS, POSITIONS, SINKS, write_places(repeats)
    return product(seeds(3), chain(*(name_runs(one, repeats) for one in schedules), widen(repeats, windows)))


def text():
    return compare()


def recall():
    """Where only attention among Mamba learns, so that the other places of attention are not asked for."""
    return [RECALL | row for row in product(seeds(3), chain(*map(name_runs, (RATIOS, POSITIONS, AMONG_MAMBA))))]


def needle():
    schedules = RATIOS, POSITIONS, write_places(1), AMONG_MAMBA
    rows = chain(*map(name_runs, schedules), widen(1, (1, 3)))
    return [NEEDLE | row for row in product(seeds(3), rows)]


def ratios():
    return product(seeds(3), name_runs(RATIOS))


def paper():
    return compare(repeats=3, windows=(255, 4095))
