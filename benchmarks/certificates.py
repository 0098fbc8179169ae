"""Does every model pass `sparsejax check`, and how long does it take on this machine?

The models are those of the golden files from Hugging Face, of the configs and the sweeps of the experiments, each once,
and the presets, both the tiny form and the released sizes, which are checked in a copy. Rows that `--out` holds already
are not measured again. The exit code is 1 if a model fails.
"""

from __future__ import annotations

import argparse
import inspect
import json
import runpy
import time
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.harness import ROOT, Save
from sparsejax import config as configs
from sparsejax.check import Certificate, check_model
from sparsejax.config import ModelConfig
from sparsejax.interop import huggingface
from sparsejax.presets import find_preset, list_presets

GOLDEN = ROOT / "tests" / "golden"
# Argument of the config and functions of the sweep, by experiment.
SWEEPS = {
    "bigbird_mlm": (":mini", ("mini",)),
    "duplication": ("", ("sweep",)),
    "layer_schedules": (":mini", ("text", "recall", "needle")),
    "longformer_lm": (":mini", ("mini",)),
    "lost_in_the_middle": ("", ("sweep",)),
    "mqar": ("", ("sweep",)),
    "needle": ("", ("sweep",)),
    "reformer_duplication": (":mini", ("sweep",)),
    "selection": (":recall", ("sweep",)),
}
RUN_KEYS = ("label", "train.seed")  # keys of a row of a sweep that are not about the model


def list_models() -> Iterator[tuple[str, ModelConfig, int | None]]:
    """Name, model and length of each model; a length of None crosses every edge of the patterns."""
    presets = {name: inspect.signature(find_preset(name).get_config).parameters for name in list_presets()}
    for name, parameters in presets.items():
        yield (source := f"preset:{name}:tiny" if parameters else f"preset:{name}"), *_read(source, {})
    for file in sorted(GOLDEN.glob("*/config.json")):
        yield f"golden {file.parent.name}", huggingface.describe(file)[0], None
    for name in [name for name, parameters in presets.items() if parameters]:
        yield f"preset:{name}", *_read(f"preset:{name}", {})
    known = set()
    for experiment, (argument, functions) in SWEEPS.items():
        path = f"{ROOT / 'configs' / experiment}.py"
        yield f"configs/{experiment}.py", *_read(path, {})
        sweep = runpy.run_path(str(ROOT / "experiments" / experiment / "sweep.py"))
        for function in functions:
            for row in sweep[function]():
                overrides = {key: value for key, value in row.items() if key not in RUN_KEYS}
                model, length = _read(f"{path}{argument}", overrides)
                if repr((model, length)) not in known:
                    known.add(repr((model, length)))
                    yield f"{experiment}, {function}: {row['label']}", model, length


def _read(source: str, overrides: dict[str, Any]) -> tuple[ModelConfig, int]:
    run = configs.check(configs.load(source, overrides))
    return run.model, run.data.length


def describe(name: str, certificate: Certificate, cpu_seconds: float) -> dict[str, Any]:
    """A row of the table."""
    count = sum(finding.passed is not None for finding in certificate.findings)
    causality = next((finding.detail for finding in certificate.findings if finding.name == "causality"), "")
    how = "float64" if "float64" in causality else "bitwise" if "bitwise" in causality else causality
    return {
        "model": name,
        "passed": certificate.passed,
        "findings": count,
        "failures": [f"{finding.name}: {finding.detail}" for finding in certificate.failures],
        "causality": how,
        "length": certificate.length,
        "reduced": certificate.reduced,
        "cpu_seconds": round(cpu_seconds, 1),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--only", default="", metavar="TEXT", help="check only the models whose name contains this")


def run(options: argparse.Namespace, save: Save) -> int:
    """Checks the models."""
    rows = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    for name, model, length in list_models():
        if name in {row["model"] for row in rows} or options.only not in name:
            continue
        start = time.process_time()
        rows.append(describe(name, check_model(model, length), time.process_time() - start))
        jax.clear_caches()
        print(f"{rows[-1]['cpu_seconds']:6.1f} s  {name}: {rows[-1]['failures'] or 'passed'}", flush=True)
        save({"rows": rows}, write_table(rows))
        if options.quick:
            break
    return int(not all(row["passed"] for row in rows))


def write_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| model | verdict | checks | causality | tokens | copy | CPU seconds |",
        "|---|---|---:|---|---:|---|---:|",
    ]
    for row in rows:
        verdict = "passed" if row["passed"] else "**failed**: " + "; ".join(row["failures"]).replace("|", "\\|")
        name, copy = row["model"].replace("|", "\\|"), row["reduced"].partition(";")[0].rpartition(",")[0]
        cells = (name, verdict, row["findings"], row["causality"], row["length"], copy, row["cpu_seconds"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
