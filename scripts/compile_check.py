"""What the compilers of TPUs and of Hopper GPUs make of the kernels, on a machine that has neither.

    python scripts/compile_check.py tpu [--out FILE.json] [--table FILE.md]
    python scripts/compile_check.py gpu [--out FILE.json] [--table FILE.md]

libtpu (installed into build/compile_check, not into the environment) compiles ahead of time: forward, dq, dk and dv for
each generation, short and long, and one training step of 16 chips. It finds what does not fit into vector or scalar
memory and what a machine has no instruction for; it runs nothing. Speed is what can be read from its schedule: a core
issues one bundle of instructions per cycle, so that the bundles between two branches are the cycles of that stretch
without waiting for memory. Exits with 1 if anything does not compile.

For GPUs, CUDA's assembler (installed beside it; needs jax 0.11) makes code for sm_90a, and a training step for 8 of
them. It says how many registers a thread takes, and decides for each instruction how many cycles it keeps its warp: the
sum over a step is what it takes without waiting for memory, for products or for others. Also exits with 1 if registers
are spilled, if products are not computed in the background, or if a kernel has no wgmma or TMA instruction.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIBTPU = "libtpu==0.0.52"
PLACE = ROOT / "build" / "compile_check"  # a folder in it for each version
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
SCHEDULED = ("v5e", "v6e", "tpu7x")  # for which the speed is read
SPLASH = {"v5e": 1323, "v6e": 1102, "tpu7x": 1183}  # bundles of JAX's splash attention for a tile of 512 x 512


@dataclasses.dataclass(frozen=True)
class Case:
    """A call to be compiled, with its gradients."""

    pattern: str
    t: int
    heads: tuple[int, int] = (8, 2)
    width: int = 128
    tile: int | None = None
    dtype: str = "bfloat16"
    options: bool = False  # softcap, sink logits, segments

    def __str__(self):
        options = ", softcap, sink, segments" if self.options else ""
        tile = "" if self.tile is None else f", tile {self.tile}"
        shown = self.pattern if len(self.pattern) < 60 else f"{self.pattern[:57]}..."
        return f"{shown}: {self.t}, heads {self.heads[0]}:{self.heads[1]} of {self.width}, {self.dtype}{tile}{options}"


WINDOWS = ", ".join(["causal & window(500)"] * 6 + ["causal & dilated(500, stride=3)"] * 2)
CASES = (
    Case("causal & window(1023)", 8192),
    Case("causal & window(1023)", 131_072),
    Case("causal", 131_072, tile=128, heads=(2, 2)),  # 524,800 tiles: five calls
)
# On one generation: what is compiled differently, but not for each machine.
VARIANTS = (
    Case("window(256, 256) | globals(128)", 8192, options=True),
    Case(f"per_head({WINDOWS})", 8192, width=64),
    Case("causal & (window(255) | random(3, tile=64, seed=1))", 8192, width=96, dtype="float32"),
    Case("causal & window(1023)", 8192, width=256, dtype="float32"),
    Case("causal & (window(30) | strided(130))", 8192, tile=128, dtype="float16"),
)

# With JAX's plugins, of the version of jax.
CUDA = tuple(f"nvidia-{name}==13.5.37" for name in ("cuda-nvcc", "nvvm", "cuda-nvdisasm"))
SERIALIZED = re.compile(r"C7510|C7517")  # the assembler on products that it waits for before it should
TENSOR_RATE = 4096  # FLOPs of a multiprocessor's tensor cores in a cycle
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 28 patch: 1 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
HEADS = "causal, causal & window(300), causal, causal, causal, causal, causal, causal & dilated(90, stride=3)"
GPU_CASES = (
    Case("causal & window(1023)", 8192),
    Case("causal & window(1023)", 8192, width=64),
    Case("causal & window(1023)", 8192, width=256),
    Case("window(256, 256) | globals(128)", 8192, options=True),
    Case("window(256, 256) | globals(128)", 8192, width=64, options=True),
    Case(f"per_head({HEADS})", 2048, width=96, dtype="float16"),
    Case("causal", 131_072, heads=(2, 2)),
    Case("causal & window(1023)", 8192, dtype="float32"),
    Case("causal & window(1023)", 8192, width=256, dtype="float32"),
    Case("window(256, 256) | globals(128)", 8192, dtype="float32", options=True),
    Case(f"per_head({HEADS})", 2048, width=64, dtype="float32"),
)


def main() -> int:
    """Everything, or one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["tpu", "gpu"])
    parser.add_argument("--out", type=Path, help="write what was found as JSON")
    parser.add_argument("--table", type=Path, help="write it as a table")
    parser.add_argument("--install", action="store_true", help="only fetch the compiler")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one part of the work, in a process of its own
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part.split(":")[0]](*arguments.part.split(":")[1:])))
        return 0
    packages = list_packages(arguments.target)
    install(find_place(arguments.target), *packages)
    if arguments.install:
        return 0
    started = time.perf_counter()
    found, table, failed = check_tpu() if arguments.target == "tpu" else check_gpu()
    print(table)
    print(f"{time.perf_counter() - started:.0f} s")
    versions = {"jax": importlib.metadata.version("jax")} | dict(package.split("==") for package in packages)
    result = {"python": platform.python_version(), "versions": versions} | found
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.table:
        arguments.table.write_text(table)
    return int(failed)


def check_tpu() -> tuple[dict, str, bool]:
    """What was found of all generations, as rows and as a table; whether anything does not compile."""
    found = [*(run_part("compile", name) for name in TOPOLOGIES), run_part("train", "tpu")]
    rows = [row for rows in found for row in rows]
    speeds = [row for name in SCHEDULED for row in run_part("schedule", name)]
    failed = any(row["error"] for row in rows)
    return {"compiled": rows, "scheduled": speeds}, write_table(rows, speeds), failed


def check_gpu() -> tuple[dict, str, bool]:
    """The same of an H100; it fails too where registers are spilled, or an instruction is missing."""
    rows = [row for i in range(len(GPU_CASES)) for row in run_part("hopper", str(i), target="gpu")]
    trained = run_part("train", "gpu", target="gpu")
    failed = any(row["error"] for row in rows + trained)
    failed |= any(row["spilled"] or row["serialized"] or not row["wgmma"] or not row["tma"] for row in rows)
    table = f"{write_gpu_table(rows)}\n{write_compiled_table(trained)}"
    return {"compiled": rows, "trained": trained}, table, failed


def list_packages(target: str) -> tuple[str, ...]:
    """The compiler's, with JAX's own for GPUs in the version of jax."""
    if target == "tpu":
        return (LIBTPU,)
    version = importlib.metadata.version("jax")
    return (*(f"jax-cuda13-{name}=={version}" for name in ("plugin", "pjrt")), *CUDA)


def find_place(target: str) -> Path:
    """Where they are: a folder for each set of versions."""
    return PLACE / "+".join(list_packages(target))


def install(place: Path, *packages: str) -> None:
    """These packages alone, beside the environment that this runs in."""
    if place.is_dir():
        return
    PLACE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PLACE) as new:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", new, *packages]
        subprocess.run(command, check=True)
        Path(new).replace(place)
        Path(new).mkdir()  # to be removed


def run_part(*part: str, target: str = "tpu") -> list[dict]:
    """A part of the work in a process of its own, as the compiler reads its options once."""
    paths = os.pathsep.join([str(ROOT), str(find_place(target)), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as dump:
        if target == "tpu":
            options = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"}
            own = ENVIRONMENT | (options | {"DUMP": dump} if part[0] == "schedule" else {})
        else:
            own = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": dump}
        run = subprocess.run(
            [sys.executable, __file__, target, "--part", ":".join(part)],
            env=os.environ | {"PYTHONPATH": paths} | own,
            capture_output=True,
            text=True,
        )
    if run.returncode:
        raise SystemExit(f"compile_check: {' '.join(part)}: {run.stderr.strip()[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


# Parts: what runs under the compiler's environment.


def compile_cases(name: str, most: str = "") -> list[dict]:
    """The cases on one machine, or the first so many of them."""
    cases = CASES + (VARIANTS if name == "v6e" else ())
    return [compile_case(name, case) for case in cases[: int(most) if most else None]]


def compile_case(name: str, case: Case, backward: bool = True) -> dict:
    """Seconds and MiB, or the compiler's error."""
    row = {"machine": name, "case": str(case), "error": None}
    started = time.perf_counter()
    try:
        compiled = compile_attention(find_devices(name)[0], case, backward)
    except Exception as error:  # whatever the compiler says is what this is for
        return row | {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return row | {"seconds": round(time.perf_counter() - started, 1), "temporary_mib": round(memory)}


def compile_attention(device, case: Case, backward: bool = True):
    """A call and its gradients, for a device that is not here."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from sparsejax.ops.kernels import gpu, tpu
    from sparsejax.ops.call import AttentionCall
    from sparsejax.patterns import parse

    place, (h, g), pattern = SingleDeviceSharding(device), case.heads, parse(case.pattern)
    kernels = gpu if "NVIDIA" in device.device_kind else tpu

    def forward(q, k, v, sink, ids):
        more = (30.0, sink, (ids, ids)) if case.options else (None, None, None)
        call = AttentionCall(q, k, v, pattern, case.width**-0.5, *more, False)
        refusal = kernels.unsupported_reason(call)
        if refusal:
            raise ValueError(refusal)
        out, lse = kernels.run(call, case.tile and (case.tile, case.tile))
        return out.astype(jnp.float32).sum() + lse.sum()

    def shape(*sizes, dtype=case.dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    q, k = shape(1, case.t, h, case.width), shape(1, case.t, g, case.width)
    arrays = q, k, k, shape(h, dtype=jnp.float32), shape(1, case.t, dtype=jnp.int32)
    with use_machine(device):
        function = jax.grad(forward, (0, 1, 2, 3)) if backward else forward
        return jax.jit(function).lower(*arrays).compile()


def compile_on_hopper(number: str) -> list[dict]:
    """What the assembler says of each kernel of a case, and what instructions are in it."""
    case = GPU_CASES[int(number)]
    device = find_gpus("1x1x1")[0]
    row = {"machine": "H100", "case": str(case), "kernel": "", "error": None}
    try:
        compile_attention(device, case)
    except Exception as error:
        return [row | {"error": f"{type(error).__name__}: {str(error)[:400]}"}]
    rows = []
    for report in sorted(Path(os.environ["MOSAIC_GPU_DUMP_TO"]).glob("*.ptxas")):
        text, code = report.read_text(), report.with_suffix(".ptx").read_text()
        rows.append(
            row
            | {
                "kernel": re.sub(r"_\d+$", "", report.stem),
                "registers": int(re.search(r"Used (\d+) registers", text)[1]),
                "spilled": int(re.search(r"(\d+) bytes spill stores", text)[1]),
                "wgmma": len(re.findall(r"wgmma\.mma_async", code)),
                "tma": len(re.findall(r"cp\.async\.bulk", code)),
                "serialized": len(SERIALIZED.findall(text)),
                "steps": read_steps(report.with_suffix(".sass_ctrl").read_text()),
            }
        )
    return rows


class Loop(NamedTuple):
    """The instructions from `start` to `end`; of each, for how many cycles it keeps its warp, and its text."""

    start: int
    end: int
    instructions: list[tuple[int, str]]

    @property
    def body(self) -> list[tuple[int, str]]:
        return self.instructions[self.start : self.end + 1]

    @property
    def flops(self) -> int:
        shapes = (re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", text) for _, text in self.body)
        return sum(2 * math.prod(map(int, shape.groups())) for shape in shapes if shape)

    def describe(self) -> dict[str, int]:
        cycles = sum(cycles for cycles, _ in self.body)
        return {"instructions": len(self.body), "cycles": cycles, "tensor_cycles": self.flops // TENSOR_RATE}


def read_steps(code: str) -> list[dict]:
    """The innermost loops with products: a step with a full tile, then one with a partial tile, or one for both.

    In each, the instructions of a warp, for how many cycles they keep it, and the tensor cores' for its warpgroup.
    """
    labels, instructions = {}, []
    for line in code.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        found = re.match(r"\s*\S+:\S+:\S+:\S+:(\d+)\s+/\*[0-9a-f]+\*/\s+(.*)", line)
        if label:
            labels[label[1]] = len(instructions)
        elif found:
            instructions.append((int(found[1]), found[2]))
    loops = []
    for end, (_, text) in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if target and labels.get(target[1], end + 1) <= end:
            loops.append(Loop(labels[target[1]], end, instructions))
    loops = [loop for loop in loops if loop.flops]
    # Where a wait is repeated, the branch comes from after the loop: that is none.
    proper = [loop for loop in loops if not any(other.start < loop.start <= other.end < loop.end for other in loops)]
    inner = [loop for loop in proper if not any(loop.start <= other.start and other.end < loop.end for other in proper)]
    return [loop.describe() for loop in sorted(inner)]


def find_gpus(topology: str) -> list:
    """GPUs that are not here: slices x hosts x devices."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="cuda", target_config=HOPPER, topology=topology).devices


def find_devices(name: str, shape: str | None = None) -> list:
    """Of a machine that is not here."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=shape or TOPOLOGIES[name]).devices


def use_machine(device):
    """Lowering asks the mesh in use which machine it is for."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh

    cores = getattr(device, "num_cores", None) or getattr(device, "core_count", 1)
    fields = {"device_kind": device.device_kind, "num_cores": cores}
    fields["platform"] = "cuda" if "NVIDIA" in device.device_kind else "tpu"
    known = {name: value for name, value in fields.items() if name in AbstractDevice.__dataclass_fields__}
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(**known)))


def compile_training(target: str) -> list[dict]:
    """One step of a windowed model on 16 chips or 8 GPUs, parameters, sequences and heads spread over them."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType

    from sparsejax import config as configs
    from sparsejax import sharding
    from sparsejax.model import Functional
    from sparsejax.train.optimizer import build_optimizer, build_schedule
    from sparsejax.train.state import state_shapes
    from sparsejax.train.step import build_step

    settings = configs.load(f"{ROOT}/configs/layer_schedules.py:paper")
    settings.model.schedule, settings.train.batch = "12x(local full)", 32
    for layer in settings.model.layers.values():
        if layer.mixer.kind == "attention":
            layer.mixer.impl = target
    config = configs.check(settings)
    devices = find_devices("v5e", "v5e:4x4") if target == "tpu" else find_gpus("1x1x8")
    shape = 2, len(devices) // 4, 2
    mesh = jax.make_mesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    model, optimizer = Functional(config.model), build_optimizer(config.optimizer, config.train.steps)
    step = build_step(model, optimizer, build_schedule(config.optimizer, config.train.steps), config.train, mesh)

    def tokens(dtype):
        place = sharding.batch_sharding(mesh)
        return jax.ShapeDtypeStruct((config.train.batch, config.data.length), dtype, sharding=place)

    batch = {"inputs": tokens(jnp.int32), "targets": tokens(jnp.int32), "weights": tokens(jnp.float32)}
    state = state_shapes(model, optimizer, mesh)
    started = time.perf_counter()
    name = f"training step, {model.size / 1e9:.2f}B parameters, {config.train.batch} x {config.data.length}"
    row = {"machine": f"{len(devices)} x {devices[0].device_kind}", "case": name, "error": None}
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower(state, batch).compile()
    except Exception as error:
        return [row | {"error": f"{type(error).__name__}: {str(error)[:400]}"}]
    memory = compiled.memory_analysis()
    per_chip = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20
    return [row | {"seconds": round(time.perf_counter() - started, 1), "temporary_mib": round(per_chip)}]


def read_schedule(name: str) -> list[dict]:
    """Bundles of a full and of a partial tile of 512 x 512, forward, under causal & window(1023)."""
    row = compile_case(name, Case("causal & window(1023)", 8192, heads=(8, 8), tile=512), backward=False)
    if row["error"]:
        raise SystemExit(row["error"])
    dumps = Path(os.environ["DUMP"]).glob("*attend_forward*packed-bundles-post-ra.txt")
    file = max((path for path in dumps if "schedule" not in path.name), key=lambda path: path.stat().st_size)
    branches = []
    for line in file.read_text().splitlines():
        bundle = re.match(r"\s*(0x[0-9a-f]+|\d+)\s+(?:LH|LB|LE|PB|PF|CT)?\s*:", line)
        target = re.search(r"sbr\.rel.*target bundleno = (\d+)", line)
        if bundle and target:
            branches.append(int(target[1]) - int(bundle[1], 0))
    # A tile's stretch is skipped by a branch over it; the two longest but the loop itself are the tiles, in order.
    tiles = sorted(branches, reverse=True)[1:3]
    full, partial = (size for size in branches if size in tiles)
    return [{"machine": name, "full": full, "partial": partial, "splash": SPLASH[name]}]


PARTS = {"compile": compile_cases, "train": compile_training, "schedule": read_schedule, "hopper": compile_on_hopper}


def write_table(rows: list[dict], speeds: list[dict]) -> str:
    """Both tables in Markdown."""
    lines = [
        write_compiled_table(rows),
        "| bundles of a tile of 512 x 512, forward | full | partial | ratio | splash, full |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in speeds:
        ratio = row["partial"] / row["full"]
        lines.append(f"| {row['machine']} | {row['full']} | {row['partial']} | {ratio:.2f} | {row['splash']} |")
    return "\n".join(lines) + "\n"


def write_compiled_table(rows: list[dict]) -> str:
    """What was compiled, in Markdown."""
    lines = ["| machine | what | compiled in | temporary memory |", "| --- | --- | ---: | ---: |"]
    for row in rows:
        found = row["error"] or f"{row['seconds']} s | {row['temporary_mib']:,} MiB"
        lines.append(f"| {row['machine']} | {row['case'].replace('|', chr(92) + '|')} | {found} |")
    return "\n".join(lines) + "\n"


def write_gpu_table(rows: list[dict]) -> str:
    """The kernels of each case in Markdown."""
    names = "registers", "bytes spilled", "wgmma", "TMA", "cycles of a step (full, partial)", "of tensor cores"
    lines = [f"| what | kernel | {' | '.join(names)} |", "| --- | --- " + "| ---: " * len(names) + "|"]
    for row in rows:
        what = [row["case"].replace("|", chr(92) + "|"), row["error"] or row["kernel"]]
        if not row["error"]:
            cycles = (", ".join(f"{step[name]:,}" for step in row["steps"]) for name in ("cycles", "tensor_cycles"))
            what += [*(f"{row[name]}" for name in ("registers", "spilled", "wgmma", "tma")), *cycles]
        lines.append(f"| {' | '.join(what)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
