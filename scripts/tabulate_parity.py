"""Prints a table of the differences between loaded models and transformers, for the folders of tests/golden.

python scripts/tabulate_parity.py [FOLDER ...] > experiments/parity/table.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sparsejax.interop.huggingface import families, parity

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def measure(folder: Path) -> list[str]:
    """Measures a row of the table."""
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
        f"{parity.TOLERANCES[model.hf_config['model_type']]:.0e}",
        "-" if noise is None else f"{noise:.1e}",
        f"{parity.max_difference(loss, record.outputs['loss']):.1e}",
        gradient_error,
    ]


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="defaults to the supported folders of tests/golden")
    folders = parser.parse_args().folders or [
        path.parent
        for path in sorted(GOLDEN.glob("*/config.json"))
        if json.loads(path.read_text())["model_type"] in families.FAMILIES
    ]
    columns = ["model", "schedule", "logits", "allowed", "noise of the reference", "loss", "gradient norms, relative"]
    print("|", " | ".join(columns), "|")
    print("| --- | --- |" + " ---: |" * (len(columns) - 2))
    for folder in folders:
        print("|", " | ".join(measure(folder)), "|", flush=True)


if __name__ == "__main__":
    main()
