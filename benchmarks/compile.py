"""Do the kernels compile for TPUs and Hopper GPUs, and what do the compilers report? Needs no such device.

TPU: libtpu (installed into build/compile_check, not into the environment) compiles ahead of time: per generation the
forward pass, dq, dk and dv for short and long sequences, and one training step on 16 chips. It reports overflows of
vector and scalar memory and instructions that a generation lacks; it runs nothing. Speed is read from its schedule: a
core issues one bundle of instructions per cycle, so the bundles between two branches are the cycles of that section
without stalls on memory. The exit code is 1 if anything does not compile.

GPU: the CUDA assembler (installed likewise; needs jax 0.11) generates code for sm_90a, and a training step for 8 GPUs.
It reports the registers per thread and, per instruction, the cycles for which it occupies its warp: their sum over a
step is the time of the step without waiting for memory, products or other warps. The exit code is also 1 if registers
are spilled, if products are serialized, or if a kernel has no wgmma or TMA instruction.

`--only=scans` compiles the selective scan and its gradients instead, for either target: the form that the program
chooses there, and `jax.lax.associative_scan` over all positions.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import ROOT, Case, Save, write_markdown

LIBTPU = "libtpu==0.0.52"
CACHE = ROOT / "build" / "compile_check"  # one folder per set of versions
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SCHEDULED = ("v5e", "v6e", "tpu7x")  # generations whose schedule is read
SHORTEST_SECTION = 900  # bundles that any tile of 512 x 512 takes
SPLASH = {"v5e": 1323, "v6e": 1102, "tpu7x": 1183}  # bundles per 512 x 512 tile of JAX's splash attention


call = functools.partial(Case, heads=(8, 2))
WINDOWS = ", ".join(["causal & window(500)"] * 6 + ["causal & dilated(500, stride=3)"] * 2)
CASES = (
    call("causal & window(1023)", 8192),
    call("causal & window(1023)", 131_072),
    call("causal", 131_072, tile=128, heads=(2, 2)),  # 524,800 tiles: five launches
    call("causal", 8192, choice=(16, 64)),
    call("causal", 131_072, choice=(32, 64)),
)
# Variants of the code, compiled for one generation only.
VARIANTS = (
    call("window(256, 256) | globals(128)", 8192, options=True),
    call(f"per_head({WINDOWS})", 8192, width=64),
    call("causal & (window(255) | random(3, tile=64, seed=1))", 8192, width=96, dtype="float32"),
    call("causal & window(1023)", 8192, width=256, dtype="float32"),
    call("causal & (window(30) | strided(130))", 8192, tile=128, dtype="float16"),
    call("causal", 8192, tile=128, options=True, choice=(16, 64)),
    call("causal", 8192, heads=(8, 1), choice=(512, 1)),
)

# Installed with the plugins of the running version of jax.
CUDA = tuple(f"nvidia-{name}==13.5.37" for name in ("cuda-nvcc", "nvvm", "cuda-nvdisasm"))
SERIALIZED = re.compile(r"C7510|C7517")  # warnings of the assembler about serialized products
TENSOR_RATE = 4096  # FLOPs per cycle of the tensor cores of a multiprocessor
HEADS = "causal, causal & window(300), causal, causal, causal, causal, causal, causal & dilated(90, stride=3)"
GPU_CASES = (
    call("causal & window(1023)", 8192),
    call("causal & window(1023)", 8192, width=64),
    call("causal & window(1023)", 8192, width=256),
    call("window(256, 256) | globals(128)", 8192, options=True),
    call("window(256, 256) | globals(128)", 8192, width=64, options=True),
    call(f"per_head({HEADS})", 2048, width=96, dtype="float16"),
    call("causal", 131_072, heads=(2, 2)),
    call("causal & window(1023)", 8192, dtype="float32"),
    call("causal & window(1023)", 8192, width=256, dtype="float32"),
    call("window(256, 256) | globals(128)", 8192, dtype="float32", options=True),
    call(f"per_head({HEADS})", 2048, width=64, dtype="float32"),
    call("causal", 8192, choice=(16, 64)),
    call("causal", 8192, width=64, choice=(16, 64)),
    call("causal", 8192, width=256, choice=(16, 64)),
    call("causal", 8192, options=True, choice=(16, 64)),
    call("causal", 8192, heads=(8, 1), choice=(512, 1)),
    call("causal", 8192, width=256, dtype="float32", choice=(16, 64)),
)

# The selective scan: tokens, channels, numbers per state. The second is that of a layer of Jamba 1.5 with one sequence.
SCANS = (4096, 512, 16), (8192, 8192, 16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("target", choices=["tpu", "gpu"], help="compiler to use")
    parser.add_argument("--install", action="store_true", help="only install the compiler")
    parser.add_argument("--only", choices=["scans"], help="only compile the selective scan")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # run one part in this process


def run(options: argparse.Namespace, save: Save) -> int:
    """Runs all parts, or one of them in the process of its compiler."""
    if options.part:
        name, *arguments = options.part.split(":")
        print(json.dumps(PARTS[name](*arguments)))
        return 0
    packages = list_packages(options.target)
    install(compiler_folder(options.target), *packages)
    if options.install:
        return 0
    started = time.perf_counter()
    check = check_tpu if options.target == "tpu" else check_gpu
    if options.only == "scans":
        check = functools.partial(check_scans, options.target)
    results, table, failed = check(options.quick)
    print(table)
    print(f"{time.perf_counter() - started:.0f} s")
    save({"compilers": packages} | results, table)
    return int(failed)


def check_tpu(quick: bool) -> tuple[dict, str, bool]:
    """The results of all generations, the same as a table, and whether anything does not compile."""
    if quick:
        parts, scheduled = [run_part("compile", "v5e", "1")], SCHEDULED[:1]
    else:
        parts, scheduled = [*(run_part("compile", name) for name in TOPOLOGIES), run_part("train", "tpu")], SCHEDULED
    rows = [row for part in parts for row in part]
    schedules = [row for name in scheduled for row in run_part("schedule", name)]
    failed = any(row["error"] for row in rows)
    return {"compiled": rows, "scheduled": schedules}, write_table(rows, schedules), failed


def check_gpu(quick: bool) -> tuple[dict, str, bool]:
    """The same for an H100; fails also if registers are spilled or an instruction is missing."""
    cases = range(1 if quick else len(GPU_CASES))
    rows = [row for i in cases for row in run_part("hopper", str(i), target="gpu")]
    trained = [] if quick else run_part("train", "gpu", target="gpu")
    failed = any(row["error"] for row in rows + trained)
    failed |= any(row["spilled"] or row["serialized"] or not row["wgmma"] or not row["tma"] for row in rows)
    table = f"{write_gpu_table(rows)}\n{write_compiled_table(trained)}"
    return {"compiled": rows, "trained": trained}, table, failed


def check_scans(target: str, quick: bool) -> tuple[dict, str, bool]:
    """The results of the selective scan, the same as a table, and whether the form chosen there does not compile."""
    names = ["H100"] if target == "gpu" else list(TOPOLOGIES)
    parts = [(name, "auto", size) for name in names for size in range(len(SCANS))]
    parts.append((names[0], "associative_scan", 0))  # the larger would need 4 GiB per array of states
    rows = [
        row
        for name, form, size in parts[: 1 if quick else None]
        for row in run_part("scans", name, form, str(size), target=target)
    ]
    failed = any(row["error"] for row in rows if row["form"] == "auto")
    cells = [[row["machine"], row["case"], row["form"], row["error"] or f"{row['seconds']} s"] for row in rows]
    for row, cell in zip(rows, cells, strict=True):
        if not row["error"]:
            cell += [f"{row['temporary_mib']:,} MiB", ", ".join(map(str, row["bundles"])) or "-"]
    heading = "machine", "case", "form", "compiled in", "temporary memory", "bundles of the loops"
    return {"scans": rows}, write_markdown(heading, cells, 3), failed


def list_packages(target: str) -> tuple[str, ...]:
    """Packages of a compiler, pinned."""
    if target == "tpu":
        return (LIBTPU,)
    version = importlib.metadata.version("jax")
    return (*(f"jax-cuda13-{name}=={version}" for name in ("plugin", "pjrt")), *CUDA)


def compiler_folder(target: str) -> Path:
    """The folder of a compiler's packages."""
    return CACHE / "+".join(list_packages(target))


def install(folder: Path, *packages: str) -> None:
    """Installs packages without their dependencies into a folder, unless it exists."""
    if folder.is_dir():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", temporary, *packages]
        subprocess.run(command, check=True)
        Path(temporary).replace(folder)
        Path(temporary).mkdir()  # for TemporaryDirectory to remove


def run_part(*part: str, target: str = "tpu") -> list[dict]:
    """Runs a part in a new process, as a compiler reads its options only once."""
    paths = os.pathsep.join([str(ROOT), str(compiler_folder(target)), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as dump:
        if target == "tpu":
            options = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"}
            environment = {"JAX_PLATFORMS": "cpu"} | (
                options | {"DUMP": dump} if part[0] in ("schedule", "scans") else {}
            )
        else:
            environment = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": dump}
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks", "compile", target, "--part", ":".join(part)],
            env=os.environ | {"PYTHONPATH": paths} | environment,
            capture_output=True,
            text=True,
        )
    if run.returncode:
        raise SystemExit(f"compile: {' '.join(part)}: {run.stderr.strip()[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


# Parts: functions that run in the environment of the compiler.


def compile_cases(name: str, count: str = "") -> list[dict]:
    """Compiles the cases, or the first `count` of them, for one generation."""
    cases = CASES + (VARIANTS if name == "v6e" else ())
    return [compile_case(name, case) for case in cases[: int(count) if count else None]]


def compile_case(name: str, case: Case, backward: bool = True) -> dict:
    """Seconds and MiB of temporary memory, or the error of the compiler."""
    row = {"machine": name, "case": str(case), "error": None}
    started = time.perf_counter()
    try:
        compiled = compile_attention(absent_devices(TOPOLOGIES[name])[0], case, backward)
    except Exception as error:  # any error of the compiler is a result
        return row | {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return row | {"seconds": round(time.perf_counter() - started, 1), "temporary_mib": round(memory)}


def compile_attention(device, case: Case, backward: bool = True):
    """Compiles a call and its gradients for an absent device."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from sparsejax.ops.blocks import make_blocks
    from sparsejax.ops.call import AttentionCall
    from sparsejax.ops.kernels import gpu, tpu
    from sparsejax.ops.selection import Selection
    from sparsejax.patterns import parse

    sharding, (h, g), pattern = SingleDeviceSharding(device), case.heads, parse(case.pattern)
    kernels = gpu if "NVIDIA" in device.device_kind else tpu

    def forward(q, k, v, sink, ids, groups):
        options = (30.0, sink, (ids, ids)) if case.options else (None, None, None)
        selection = None
        if case.choice is not None:
            selection = Selection(groups, make_blocks(case.t, case.choice[1], ids if case.options else None))
        call = AttentionCall(q, k, v, pattern, case.width**-0.5, *options, False, selection=selection)
        if reason := kernels.unsupported_reason(call):
            raise NotImplementedError(reason)
        out, lse = kernels.run(call, case.tile and (case.tile, case.tile))
        return out.astype(jnp.float32).sum() + lse.sum()

    def shape(*sizes, dtype=case.dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    q, k = shape(1, case.t, h, case.width), shape(1, case.t, g, case.width)
    groups = shape(1, g, case.t, case.choice[0] if case.choice else 0, dtype=jnp.int32)
    arrays = q, k, k, shape(h, dtype=jnp.float32), shape(1, case.t, dtype=jnp.int32), groups
    with target_device(device):
        function = jax.grad(forward, (0, 1, 2, 3)) if backward else forward
        return jax.jit(function).lower(*arrays).compile()


def compile_scan(name: str, form: str, number: str) -> list[dict]:
    """Compiles the selective scan and its gradients."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from benchmarks.scans import associative
    from sparsejax.ops import selective_scan

    (t, d, n), device = SCANS[int(number)], absent_devices("h100:1" if name == "H100" else TOPOLOGIES[name])[0]
    scan = associative if form == "associative_scan" else selective_scan

    def loss(*arrays):
        return sum(jnp.square(x).sum() for x in scan(*arrays))

    shapes = (1, t, d), (1, t, d), (d, n), (1, t, n), (1, t, n), (1, d, n)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=SingleDeviceSharding(device)) for shape in shapes]
    row = {"machine": name, "case": f"{t:,} x {d:,} channels x {n}", "form": form, "error": None}
    started = time.perf_counter()
    try:
        with target_device(device):
            compiled = jax.jit(jax.grad(loss, range(6))).lower(*arrays).compile()
    except Exception as error:  # any error of the compiler is a result
        return [row | {"error": f"{type(error).__name__}: {str(error)[:400]}"}]
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    row |= {"seconds": round(time.perf_counter() - started, 1), "temporary_mib": round(memory)}
    return [row | {"bundles": read_scan_loops() if name in SCHEDULED and form == "auto" else []}]


def read_scan_loops() -> list[int]:
    """Bundles per eight positions of a block of channels: of the forward pass, the recomputation and the gradient."""
    loops = []
    for file in sorted(Path(os.environ["DUMP"]).glob("*selective_scan*packed-bundles-post-ra.txt")):
        if "schedule" not in file.name:
            backward = [(end, start) for start, end in read_branches(file) if end < start]
            loops += [start - end + 1 for end, start in backward[:-1]]  # the last is the loop over the grid
    return loops


def compile_for_hopper(number: str) -> list[dict]:
    """Compiles a case for an H100: the report of the assembler and the instructions of each kernel."""
    case = GPU_CASES[int(number)]
    device = absent_devices("h100:1")[0]
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


class Instruction(NamedTuple):
    """An instruction, and the cycles for which it occupies its warp."""

    cycles: int
    text: str


class Loop(NamedTuple):
    """The instructions from index `start` to index `end`."""

    start: int
    end: int
    instructions: list[Instruction]

    @property
    def body(self) -> list[Instruction]:
        return self.instructions[self.start : self.end + 1]

    @property
    def flops(self) -> int:
        shapes = (re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.text) for instruction in self.body)
        return sum(2 * math.prod(map(int, shape.groups())) for shape in shapes if shape)

    def describe(self) -> dict[str, int]:
        cycles = sum(instruction.cycles for instruction in self.body)
        return {"instructions": len(self.body), "cycles": cycles, "tensor_cycles": self.flops // TENSOR_RATE}


def read_steps(code: str) -> list[dict]:
    """The innermost loops with products: the step of a full tile and that of a partial tile, or one step for both.

    Returns:
      Per step: the instructions of a warp, the cycles for which they occupy it, and the cycles for which the products
      of its warpgroup occupy the tensor cores.
    """
    labels, instructions = {}, []
    for line in code.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        instruction = re.match(r"\s*\S+:\S+:\S+:\S+:(\d+)\s+/\*[0-9a-f]+\*/\s+(.*)", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(Instruction(int(instruction[1]), instruction[2]))
    loops = []
    for end, (_, text) in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if target and labels.get(target[1], end + 1) <= end:
            loops.append(Loop(labels[target[1]], end, instructions))
    loops = [loop for loop in loops if loop.flops]
    # The branch that repeats a wait comes from behind the loop and forms no loop.
    proper = [loop for loop in loops if not any(other.start < loop.start <= other.end < loop.end for other in loops)]
    inner = [loop for loop in proper if not any(loop.start <= other.start and other.end < loop.end for other in proper)]
    return [loop.describe() for loop in sorted(inner)]


def absent_devices(topology: str) -> list:
    """Absent devices of a topology."""
    from sparsejax.plan import Topology

    return Topology.parse(topology).devices()


def target_device(device):
    """Context in which kernels are lowered for `device`: they read its kind from the current mesh."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh

    cores = getattr(device, "num_cores", None) or getattr(device, "core_count", 1)
    fields = {"device_kind": device.device_kind, "num_cores": cores}
    fields["platform"] = "cuda" if "NVIDIA" in device.device_kind else "tpu"
    known = {name: value for name, value in fields.items() if name in AbstractDevice.__dataclass_fields__}
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(**known)))


def compile_training(target: str) -> list[dict]:
    """Compiles a training step of a windowed model on 16 chips or 8 GPUs, sharded over data, parameters and heads."""
    import jax

    from sparsejax import config as configs
    from sparsejax.plan import Topology
    from sparsejax.plan.compiled import compile_program
    from sparsejax.plan.training import describe_training
    from sparsejax.runs import plan_phases

    topology = Topology.parse("v5e:4x4" if target == "tpu" else "h100:8")
    settings = configs.load(f"{ROOT}/configs/layer_schedules.py:paper")
    settings.model.schedule, settings.train.batch = "12x(local full)", 32
    settings.sharding.update(data=2, fsdp=topology.count // 4, tensor=2)
    for layer in settings.model.layers.values():
        if layer.mixer.kind == "attention":
            layer.mixer.impl = target
    (phase,) = plan_phases(settings)
    mesh = topology.mesh(phase.config.sharding)
    training = describe_training(phase, phase.stop, mesh)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(training.state.parameters))
    name = f"training step, {size / 1e9:.2f}B parameters, {phase.config.train.batch} x {phase.config.data.length}"
    row = {"machine": f"{topology.count} x {topology.machine.kind}", "case": name, "error": None}
    started = time.perf_counter()
    try:
        compiled = compile_program(training.step, training.arguments, mesh)
    except Exception as error:
        return [row | {"error": f"{type(error).__name__}: {str(error)[:400]}"}]
    per_chip = (compiled.arguments + compiled.temporaries) / 2**20
    return [row | {"seconds": round(time.perf_counter() - started, 1), "temporary_mib": round(per_chip)}]


def read_schedule(name: str) -> list[dict]:
    """Bundles of the tiles of 512 x 512 in the forward pass, without and with a choice of blocks."""
    window, choice = Case("causal & window(1023)", 8192, (8, 8), tile=512), Case("causal", 8192, (8, 8), tile=512)
    full, partial = read_sections(name, window, 2)
    _, chosen, chosen_partial = read_sections(name, dataclasses.replace(choice, choice=(16, 64)), 3)
    sections = {"full": full, "partial": partial, "chosen": chosen, "chosen_partial": chosen_partial}
    return [{"machine": name, **sections, "splash": SPLASH[name]}]


def read_sections(name: str, case: Case, count: int) -> list[int]:
    """Bundles of the sections of a forward pass that visit a tile, in order."""
    known = set(Path(os.environ["DUMP"]).iterdir())
    row = compile_case(name, case, backward=False)
    if row["error"]:
        raise SystemExit(row["error"])
    dumps = set(Path(os.environ["DUMP"]).glob("*attend_forward*packed-bundles-post-ra.txt")) - known
    file = max((path for path in dumps if "schedule" not in path.name), key=lambda path: path.stat().st_size)
    branches = read_branches(file)
    # A branch skips the section of a tile, or a loop over sections.
    loops = {
        (start, end)
        for start, end in branches
        for first, last in branches
        if start <= first < last <= end and (start, end) != (first, last) and last - first > SHORTEST_SECTION
    }
    tiles = sorted({*branches} - loops, key=lambda branch: branch[0] - branch[1])[:count]
    return [end - start for start, end in sorted(tiles)]


def read_branches(file: Path) -> list[tuple[int, int]]:
    """The bundle of each branch of a program, and that of its target."""
    branches = []
    for line in file.read_text().splitlines():
        bundle = re.match(r"\s*(0x[0-9a-f]+|\d+)\s+(?:LH|LB|LE|PB|PF|CT)?\s*:", line)
        target = re.search(r"sbr\.rel.*target bundleno = (\d+)", line)
        if bundle and target:
            branches.append((int(bundle[1], 0), int(target[1])))
    return branches


PARTS = {
    "compile": compile_cases,
    "scans": compile_scan,
    "train": compile_training,
    "schedule": read_schedule,
    "hopper": compile_for_hopper,
}


def write_table(rows: list[dict], schedules: list[dict]) -> str:
    """The results for TPUs in Markdown."""
    kinds = "full", "partial", "chosen", "chosen_partial"
    heading = "bundles of a tile of 512 x 512, forward", "full", "partial", "chosen", "chosen, partial", "splash, full"
    cells = []
    for row in schedules:
        sections = (f"{row[kind]} ({row[kind] / row['full']:.2f})" for kind in kinds[1:])
        cells.append((row["machine"], str(row["full"]), *sections, str(row["splash"])))
    return f"{write_compiled_table(rows)}\n{write_markdown(heading, cells, 1)}"


def write_compiled_table(rows: list[dict]) -> str:
    """Time and memory of each case in Markdown."""
    cells = [
        (row["machine"], row["case"], row["error"])
        if row["error"]
        else (row["machine"], row["case"], f"{row['seconds']} s", f"{row['temporary_mib']:,} MiB")
        for row in rows
    ]
    return write_markdown(("machine", "case", "compiled in", "temporary memory"), cells, 2)


def write_gpu_table(rows: list[dict]) -> str:
    """The kernels of each case in Markdown."""
    names = "registers", "bytes spilled", "wgmma", "TMA", "cycles per step (full, partial)", "of tensor cores"
    cells = []
    for row in rows:
        cells.append([row["case"], row["error"] or row["kernel"]])
        if not row["error"]:
            cycles = (", ".join(f"{step[name]:,}" for step in row["steps"]) for name in ("cycles", "tensor_cycles"))
            cells[-1] += [*(f"{row[name]}" for name in ("registers", "spilled", "wgmma", "tma")), *cycles]
    return write_markdown(("case", "kernel", *names), cells, 2)
