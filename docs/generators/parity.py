"""experiments/parity/table.md: differences between loaded models and transformers, for the folders of tests/golden."""

from __future__ import annotations

import json
from pathlib import Path

from generators import markdown
from sparsejax.interop.huggingface import families, parity

ROOT = Path(__file__).parents[2]
TABLE = Path("experiments/parity/table.md")
HEADING = ("model", "schedule", "logits", "allowed", "noise of the reference", "loss", "gradient norms, relative")


def measure() -> str:
    """Runs and differentiates every model; takes minutes."""
    configs = sorted((ROOT / "tests" / "golden").glob("*/config.json"))
    supported = [path.parent for path in configs if json.loads(path.read_text())["model_type"] in families.FAMILIES]
    return markdown.table(HEADING, [_measure(folder) for folder in supported], right=HEADING[2:]) + "\n"


def _measure(folder: Path) -> list[str]:
    record = parity.read_record(folder)
    model, valid, inputs = record.load(), record.valid, record.inputs
    logits, loss, gradients = parity.measure(model, inputs["input_ids"], inputs["labels"], **record.masks)
    error = parity.max_difference(logits[valid], record.outputs["logits"][valid])
    norms = record.meta.get("grad_norms")
    gradient_error = f"{max(parity.compare_norms(gradients, norms).values()):.1e}" if norms else "-"
    noise = record.meta.get("fp32_vs_fp64_logits_max_abs")
    return [
        folder.name,
        model.config.schedule,
        f"{error:.1e}",
        f"{parity.TOLERANCES[model.source.hf_config['model_type']]:.0e}",
        "-" if noise is None else f"{noise:.1e}",
        f"{parity.max_difference(loss, record.outputs['loss']):.1e}",
        gradient_error,
    ]
