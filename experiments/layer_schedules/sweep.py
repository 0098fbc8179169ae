"""Kinds, counts and positions of layers, compared on text, recall and needles."""

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
FIRST = (1, 2, 4, 8)  # numbers of sink tokens
SINKS = {f"windows alone, sinks {n}": f"8x(sinks{n})" for n in FIRST}
# Probes need other settings than text: with a warm-up of 50 steps and beta2 = 0.95, seven Mamba layers and one
# attention layer recall nothing within 400 steps.
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
# A three-digit number after a name, to be repeated at the end. Eight layers with windows of 2 reach 16 tokens back.
NEEDLE = PROBE | {
    "data.task": "passkey",
    "data.probe.digits": 3,
    "data.probe.names": 16,
    "train.batch": 32,
    "optimizer.warmup": 100,
    WINDOW: "causal & window(2)",
}


def place_full(n):
    """Full layers among windows, `n` per full layer of the mini size; "1 full : 3 windows" spreads them evenly."""
    return {
        "full first": f"{2 * n}x(full) {6 * n}x(local)",
        "full last": f"{6 * n}x(local) {2 * n}x(full)",
        "full first and last": f"{n}x(full) {6 * n}x(local) {n}x(full)",
        "full first, middle, last": f"{n}x(full) {3 * n}x(local) {n}x(full) {2 * n}x(local) {n}x(full)",
    }


def make_runs(schedules, repeats=1):
    """Runs of schedules, each repeated `repeats` times."""
    texts = [text if repeats == 1 else f"{repeats}x({text})" for text in schedules.values()]
    return align({"label": schedules, "model.schedule": texts})


def widen(repeats, windows):
    """Windows alone, per width."""
    widths = [{WINDOW: f"causal & window({n})", "label": f"windows alone, {n} back"} for n in windows]
    return product(widths, [{"model.schedule": f"{8 * repeats}x(local)"}])


def compare(repeats=1, windows=(7, 127)):
    """Ratios, positional encodings, sinks and placements; windows alone also with other widths."""
    schedules = RATIOS, POSITIONS, SINKS, place_full(repeats)
    return product(seeds(3), chain(*(make_runs(labelled, repeats) for labelled in schedules), widen(repeats, windows)))


def text():
    return compare()


def recall():
    """Only attention among Mamba layers learns recall, so that other placements are left out."""
    return [RECALL | row for row in product(seeds(3), chain(*map(make_runs, (RATIOS, POSITIONS, AMONG_MAMBA))))]


def needle():
    schedules = RATIOS, POSITIONS, place_full(1), AMONG_MAMBA
    rows = chain(*map(make_runs, schedules), widen(1, (1, 3)))
    return [NEEDLE | row for row in product(seeds(3), rows)]


def ratios():
    return product(seeds(3), make_runs(RATIOS))


def paper():
    return compare(repeats=3, windows=(255, 4095))


def long():
    """The schedules of the papers on eight times the text of `text`, in which they pass an n-gram."""
    names = ("Mamba alone", "1 full : 7 Mamba", "full alone", "1 full : 7 windows", "windows alone")
    schedules = make_runs({name: RATIOS[name] for name in names})
    longer = {"train.steps": 3200, "eval.every": 400, "checkpoint.every": 400, "optimizer.warmup": 100}
    return [longer | row for row in product(seeds(3), schedules)]
