"""Prints how near each loaded model comes to what transformers computed: a table of the folders in tests/golden.

python scripts/tabulate_parity.py [FOLDER ...] > experiments/parity/table.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sparsejax.interop.huggingface import families, parity

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def measure(folder: Path) -> list[str]:
    """One row."""
    record = parity.read_record(folder)
    model, shown, inputs = record.load(), record.shown, record.inputs
    logits, loss, gradients = parity.measure(model, inputs["input_ids"], inputs["labels"], **record.masks)
    error = parity.largest_difference(logits[shown], record.outputs["logits"][shown])
    norms = record.notes.get("grad_norms")
    apart = f"{max(parity.compare_norms(gradients, norms).values()):.1e}" if norms else "-"
    noise = record.notes.get("fp32_vs_fp64_logits_max_abs")
    return [
        folder.name,
        model.config.schedule,
        f"{error:.1e}",
        f"{parity.TOLERANCES[model.source['model_type']]:.0e}",
        "-" if noise is None else f"{noise:.1e}",
        f"{parity.largest_difference(loss, record.outputs['loss']):.1e}",
        apart,
    ]


def main() -> None:
    """A table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "folders", nargs="*", type=Path, help="all of tests/golden that can be loaded, if none is named"
    )
    folders = parser.parse_args().folders or [
        path.parent
        for path in sorted(GOLDEN.glob("*/config.json"))
        if json.loads(path.read_text())["model_type"] in families.FAMILIES
    ]
    heads = ["model", "schedule", "logits", "allowed", "noise of the reference", "loss", "gradient norms, relative"]
    print("|", " | ".join(heads), "|")
    print("| --- | --- |" + " ---: |" * (len(heads) - 2))
    for folder in folders:
        print("|", " | ".join(measure(folder)), "|", flush=True)


if __name__ == "__main__":
    main()
