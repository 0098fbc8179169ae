"""Trains what an experiment on probes compares, for several seeds, and writes down what each run ends with.

    python scripts/measure_probes.py mqar --out experiments/mqar/result.json

Runs that the file has already are not repeated. Afterwards, and with --table alone, the table in Markdown is printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOCAL = "model.layers.local.mixer.pattern"
STATE = "model.layers.ssm.mixer.state"
MAMBA = {"model.schedule": "2x(ssm)", "optimizer.learning_rate": 1e-2}  # learns too slowly at the rate of attention
# By experiment, which is also the name of its config: what is compared, and the overrides that make it.
EXPERIMENTS = {
    "mqar": {
        "full, full": {},
        "window(7), window(7)": {"model.schedule": "2x(local)"},
        "window(7), full": {"model.schedule": "local full"},
        "Mamba of state 4, twice": MAMBA | {STATE: 4},
        "Mamba of state 8, twice": MAMBA | {STATE: 8},
        "Mamba of state 16, twice": MAMBA | {STATE: 16},
        "Mamba of state 32, twice": MAMBA | {STATE: 32},
        "Mamba of state 4, full": {"model.schedule": "ssm full", STATE: 4},
    },
    "duplication": {
        "full": {},
        "window(127)": {"model.schedule": "local"},
        "window(126)": {"model.schedule": "local", LOCAL: "causal & window(126)"},
        "window(3) | strided(127)": {"model.schedule": "local", LOCAL: "causal & (window(3) | strided(127))"},
        "window(3) | strided(126)": {"model.schedule": "local", LOCAL: "causal & (window(3) | strided(126))"},
        "window(15) | strided(16), twice": {
            "model.schedule": "2x(local)",
            LOCAL: "causal & (window(15) | strided(16))",
        },
        "window(64), twice": {"model.schedule": "2x(local)", LOCAL: "causal & window(64)"},
        "window(63), twice": {"model.schedule": "2x(local)", LOCAL: "causal & window(63)"},
    },
}


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, required=True, help="a file to write to, or to go on with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of what to train; all if left out")
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    about = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    found = json.loads(options.out.read_text()) if options.out.exists() else about | {"runs": {}}
    for seed in range(0 if options.table else options.seeds):
        for name in options.only or EXPERIMENTS[options.experiment]:
            runs = found["runs"].setdefault(name, {})
            if str(seed) not in runs:
                runs[str(seed)] = train(options.experiment, EXPERIMENTS[options.experiment][name], seed)
                options.out.write_text(json.dumps(found, indent=2) + "\n")
                print(f"{name}, seed {seed}: {runs[str(seed)]}", flush=True)
    print(tabulate(found["runs"]))


def train(experiment: str, overrides: dict[str, object], seed: int) -> dict[str, float]:
    """The last metrics of a run with these overrides, and its seconds."""
    with tempfile.TemporaryDirectory() as workdir:
        given = [f"--config.{key}={value}" for key, value in (overrides | {"train.seed": seed}).items()]
        command = ["-m", "sparsejax", "train", f"--config=configs/{experiment}.py", f"--workdir={workdir}", *given]
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        last = json.loads((Path(workdir) / "metrics.jsonl").read_text().splitlines()[-1])
    kept = {key.removeprefix("eval/"): round(value, 4) for key, value in last.items() if key.startswith("eval/acc")}
    return kept | {"steps": last["step"], "seconds": round(seconds)}


def tabulate(runs: dict[str, dict[str, dict[str, float]]]) -> str:
    """Accuracies of all seeds, in all and by distance, in Markdown; the slowest run in seconds."""
    kinds = sorted(
        {key for seeds in runs.values() for one in seeds.values() for key in one if "accuracy" in key}, key=_start
    )
    titles = ["in all" if _start(kind) < 0 else f"from {_start(kind)}" for kind in kinds]
    lines = [["", *titles, "s"], ["---"] + ["---:"] * (len(kinds) + 1)]
    for name, seeds in runs.items():
        cells = [" ".join(f"{one[kind]:.3f}" for one in seeds.values()) for kind in kinds]
        lines.append([name.replace("|", "\\|"), *cells, f"{max(one['seconds'] for one in seeds.values())}"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _start(kind: str) -> int:
    return int(kind.rpartition("_")[2]) if kind[-1].isdigit() else -1


if __name__ == "__main__":
    main()
