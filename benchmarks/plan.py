"""Do models at released sizes fit accelerators at 32k, 128k and 512k tokens, by the account and by the compiler?

Every topology has its rows, and `--only` restricts them. The step has 4M tokens. A row is split over as many devices as
leave each 16,384 tokens; the other devices take rows, with as many microbatches as that needs. Every layer is
rematerialized, and attention runs in the kernels. Rows that `--out` holds already are not planned again, so that a
record can be continued with another compiler; without one a row has the account alone.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from ml_collections import ConfigDict

from benchmarks.harness import Save, write_markdown
from sparsejax import config as configs
from sparsejax.plan import Plan, Topology, make_plan
from sparsejax.sharding import MESH_AXES

GIB = 2**30
LENGTHS = 32_768, 131_072, 524_288
TOKENS, TOKENS_PER_DEVICE = 2**22, 16_384
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # preset and changes
    "Mistral 7B": ("mistral_7b", {}),
    "Jamba 1.5 Mini-like": ("jamba", {}),
    "MiniMax-01-like, 8 layers, 8 experts": (
        "minimax_text_01",
        {
            "model.schedule": "7x(lightning) full",
            "model.layers.lightning.mlp.experts": 8,
            "model.layers.full.mlp.experts": 8,
        },
    ),
}
SMALL = {"tpu": ("v5e:8x8", "v5p:4x4x2", "v6e:8x4", "tpu7x:4x2x2"), "gpu": ("h100:8", "h200:8")}
LARGE = {"tpu": ("v5e:16x16", "v5p:4x4x8", "v6e:16x8", "tpu7x:4x4x4"), "gpu": ("h100:64", "h200:64")}
SIZES = {"Mistral 7B": SMALL, "Jamba 1.5 Mini-like": LARGE, "MiniMax-01-like, 8 layers, 8 experts": LARGE}


def configure(model: str, topology: Topology, length: int, kernel: str) -> ConfigDict:
    """Returns the config of a run on a mesh for the length."""
    preset, changes = MODELS[model]
    sequence = min(max(1, length // TOKENS_PER_DEVICE), topology.count)
    rows, fsdp = TOKENS // length, topology.count // sequence
    fsdp = min(fsdp, rows)
    settings = configs.load(f"preset:{preset}", changes)
    for layer in settings.model.layers.values():
        if "impl" in layer.mixer:
            layer.mixer.impl = kernel
    settings.data.length = length
    settings.train.update(batch=rows, accumulate=rows // fsdp)
    settings.eval.batch = rows
    settings.sharding.update(data=topology.count // fsdp // sequence, fsdp=fsdp, sequence=sequence)
    return settings


def describe(plan: Plan, seconds: float) -> dict[str, Any]:
    """Returns the figures of a plan."""
    account, compiled = plan.account, plan.compiled
    received = None if compiled is None else compiled.received
    return {
        "mesh": dict(zip(MESH_AXES, plan.axes, strict=True)),
        "capacity GiB": round(plan.topology.capacity / GIB, 2),
        "arguments GiB": round(account.arguments / GIB, 3),
        "account GiB": round(account.peak / GIB, 3),
        "compiler GiB": None if compiled is None else round(compiled.peak / GIB, 3),
        "problem": plan.problem,
        "fits": plan.fits,
        "received GiB": {name: round(size / GIB, 3) for name, size in account.received.items()},
        "received GiB, compiler": received and {name: round(size / GIB, 3) for name, size in received.items()},
        "seconds per step at best": {name: round(s, 3) for name, s in account.seconds(plan.topology).items()},
        "planning seconds": round(seconds, 1),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--only", default="", metavar="TEXT", help="plan only rows whose name contains this")
    parser.add_argument("--devices", default="tpu", choices=("tpu", "gpu"), help="devices to plan for")
    parser.add_argument("--account-only", action="store_true", help="do not compile")


def run(options: argparse.Namespace, save: Save) -> None:
    """Plans every model at every length on every topology."""
    rows = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    lengths = LENGTHS[:1] if options.quick else LENGTHS
    for length in lengths:
        for model, sizes in SIZES.items():
            for text in sizes[options.devices]:
                name = f"{model}, {text}, {length // 1024}k"
                if options.only not in name or name in {row["name"] for row in rows}:
                    continue
                topology, start = Topology.parse(text), time.perf_counter()
                topology.stay_on_cpu()
                settings = configure(model, topology, length, options.devices)
                plan = make_plan(settings, topology, not options.account_only)
                row = {"name": name, "model": model, "on": text, "tokens": length}
                rows.append(row | describe(plan, time.perf_counter() - start))
                print(json.dumps(rows[-1]), flush=True)
                save({"rows": rows}, write_table(rows))


def write_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table of Markdown."""
    heading = ("model", "tokens", "on", "mesh", "account", "compiler", "capacity", "fits", "seconds at best")
    cells = []
    for row in sorted(rows, key=lambda row: (list(SIZES).index(row["model"]), row["tokens"])):
        mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        compiled = "" if row["compiler GiB"] is None else f"{row['compiler GiB']:.2f}"
        compiled = compiled or ("exceeds" if "memory" in row["problem"] or "Used" in row["problem"] else "-")
        figures = f"{row['account GiB']:.2f}", compiled, f"{row['capacity GiB']:.2f}", "yes" if row["fits"] else "no"
        seconds = f"{sum(row['seconds per step at best'].values()):.1f}"
        cells.append((row["model"], f"{row['tokens'] // 1024}k", row["on"], mesh, *figures, seconds))
    return write_markdown(heading, cells, 4)
