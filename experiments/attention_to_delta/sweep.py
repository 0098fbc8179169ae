"""Ways from a dense model to the gated delta rule, and the same model from scratch, at equal tokens."""

from sparsejax.sweep import seeds

DENSE = "run:runs/attention_to_delta/dense-{}"  # by seed
ALIGNED, DISTILLED = 150, 450  # steps at which the phases end
FRESH = ", ".join(f"layers.*.mixer.{name}" for name in ("beta.*", "decay.*", "dt_bias", "log_decay", "gate.*"))
# One mixer at a time learns the outputs of attention on the inputs of attention.
ALIGN = {
    "train.phases.align.start": 0,
    "train.phases.align.set.train.teacher.attention_output": 1.0,
    "train.phases.align.set.train.teacher.loss": 0.0,
    "train.phases.align.set.optimizer.freeze": "embedding.*, norm.*, *.mlp.*, *_residual.*",
}


def distil(start):
    """The predictions and the residual streams of the teacher from a step on, then the text alone."""
    return {
        "train.phases.distil.start": start,
        "train.phases.distil.set.train.teacher.kl": 1.0,
        "train.phases.distil.set.train.teacher.hidden": 0.1,
        "train.phases.distil.set.train.teacher.loss": 0.5,
        "train.phases.plain.start": DISTILLED,
    }


def convert(seed, **losses):
    source = DENSE.format(seed["train.seed"])
    teacher = {"train.teacher.source": source} if losses else {}
    return {"init.source": source, "init.fresh": FRESH} | teacher | losses


def sweep():
    return [
        seed | {"label": label} | overrides
        for seed in seeds(3)
        for label, overrides in (
            ("aligned, distilled", convert(seed, **ALIGN, **distil(ALIGNED))),
            ("distilled", convert(seed, **distil(0))),
            ("projections copied", convert(seed)),
            ("from scratch", {}),
        )
    ]
