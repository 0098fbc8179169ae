"""Are the kernels correct and fast on a Hopper GPU, next to cuDNN and FlexAttention?

A run takes at most `--minutes` (9) and no network. It needs jax 0.11 with CUDA, and PyTorch for FlexAttention
(`--torch`: a different Python that has it). Worker processes do the work. A worker that does not answer is stopped and
replaced by one that starts with the next case, so a kernel that hangs costs one row. Rows are written as they arrive.
`--quick` runs tiny cases on a CPU, interpreted (jax 0.12).

Times are medians of 21 samples; a sample is 10 ms of consecutive calls. The backward pass is timed alone, from the
residuals of the forward pass. FLOPs are those of whole live tiles: 4 d per pair forward, 10 d backward, however often a
backward pass computes its scores. The exit code is 1 if a result is wrong, and 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import operator
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from benchmarks.harness import ROOT, Case, Save, describe_machine, write_markdown
from sparsejax.patterns import And, Or, Random, parse, recipes

TILE = 128
SAMPLES, SAMPLE_MS = 21, 10.0
PATIENCE = 60.0  # seconds per row, including compilation
SHARES = {"check": 0.3, "time": 0.7, "flex": 1.0}  # fraction of the minutes after which each part ends
FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
DENSE, CAUSAL, WINDOW = "full", "causal", "causal & window(1023)"
PASSES = "forward", "backward"
LONG_ROWS = "causal & window(5119)"  # 34.6 tiles per row at 16,384 tokens


MASKS = (
    WINDOW,
    LONG_ROWS,
    "causal & window(511)",
    "causal & window(4095)",
    "causal & (window(1023) | sink(4))",
    "window(256, 256) | globals(128)",
    str(recipes.bigbird(64, 3, seed=0)),
    "causal & dilated(511, stride=2)",
    "causal & (window(255) | random(3, tile=64, seed=1))",
    CAUSAL,
    DENSE,
)
SHAPES = (
    *(Case(WINDOW, t) for t in (8192, 32_768, 65_536)),
    *(Case(pattern, heads=(32, 32), width=64) for pattern in (WINDOW, CAUSAL, DENSE)),
    *(Case(pattern, heads=(32, 8)) for pattern in (WINDOW, "window(256, 256) | globals(128)", DENSE)),
)
TIMED = (*(Case(pattern) for pattern in MASKS), *SHAPES)
FLEX = tuple(case for case in TIMED if case.t <= 16_384)  # its block mask is built from the dense mask
CHECKED = (
    Case(WINDOW, 2048, (4, 4)),
    Case(CAUSAL, 1000, (4, 2)),
    Case(WINDOW, 2048, (4, 4), 64),
    Case("window(256, 256) | globals(128)", 1500, (4, 1), 128, options=True),
    Case(MASKS[6], 2048, (4, 2)),
    Case(MASKS[8], 2000, (4, 2), 96, "float16"),
    Case("causal & dilated(90, stride=3)", 1024, (2, 1), 256),
    Case("per_head(causal, causal & window(300), globals([70]), causal & dilated(90, stride=3))", 1025, (4, 2)),
    Case("shift(window(9), 700)", 1024, (2, 1), 128),
    Case(CAUSAL, 513, (8, 2), 64, "float16", options=True),
    Case(WINDOW, 2048, (4, 2), 128, "float32"),
    Case("window(256, 256) | globals(128)", 1500, (4, 1), 64, "float32", options=True),
    Case(MASKS[6], 1025, (2, 1), 256, "float32"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit; later cases are skipped; defaults to 9")
    parser.add_argument("--only", default="", help="run only cases whose pattern contains this text")
    parser.add_argument("--torch", default=sys.executable, help="Python interpreter with PyTorch")
    parser.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)  # run as a worker
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)


def run(options: argparse.Namespace, save: Save) -> int:
    """Runs all parts; saves the record and the table after each row."""
    if options.part:
        return work(options)
    gpu = describe_gpu()
    if gpu is None and not options.quick:
        print("gpu: nvidia-smi reports no GPU; use --quick to run on the CPU", file=sys.stderr)
        return 2
    started = time.monotonic()
    record = describe_machine() | {"quick": options.quick, "gpu": {"before": gpu}} | {part: [] for part in SHARES}
    for part, share in SHARES.items():
        for row in run_part(part, options, started + 60 * options.minutes * share):
            record[part].append(row)
            print(f"{time.monotonic() - started:4.0f} s  {part}: {': '.join(summarize(row))}", flush=True)
            save(record, write_table(record))
    record["gpu"]["after"] = describe_gpu()
    record["seconds"] = round(time.monotonic() - started)
    table = write_table(record)
    save(record, table)
    print(table)
    return int(any(row["error"] for row in record["check"]))


def list_cases(part: str, options: argparse.Namespace) -> list[Case]:
    """Cases of a part; much smaller ones with `--quick`."""
    cases = {"check": CHECKED, "time": TIMED, "flex": FLEX}[part]
    cases = [case for case in cases if options.only in case.pattern]
    if not options.quick:
        return cases
    small = [dataclasses.replace(case, t=384, heads=(2, 1), width=min(case.width, 64)) for case in cases]
    small = [case for case in dict.fromkeys(small) if "per_head" not in case.pattern]
    return small if part == "flex" else [*small[:2], small[-1]]


def describe_gpu() -> dict[str, str] | None:
    """Current name, driver, clocks, power and temperature of the GPU; None if there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(FIELDS, output.splitlines()[0].split(", "), strict=True))


# Workers, and their supervisor.


def run_part(part: str, options: argparse.Namespace, end: float) -> Iterator[dict]:
    """One row per case. A worker that fails or hangs is followed by one that starts with the next case."""
    cases, done = list_cases(part, options), 0
    while done < len(cases):
        for line in read_lines(part, options, done, end):
            yield describe(cases[done]) | line
            done += 1
            if line["error"]:
                break
        if time.monotonic() >= end:
            yield from (describe(case) | {"error": "skipped: out of time"} for case in cases[done:])
            return


def read_lines(part: str, options: argparse.Namespace, skip: int, end: float) -> Iterator[dict]:
    """The rows of one worker, with an error at the end unless it finished."""
    python = options.torch if part == "flex" else sys.executable
    command = [python, "-m", "benchmarks", "gpu", "--part", part, "--skip", str(skip), "--only", options.only]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment |= {"PYTHONPATH": str(ROOT)}
    if options.quick:
        command, environment = [*command, "--quick"], environment | {"JAX_PLATFORMS": "cpu", "NPROC": "8"}
    patience = PATIENCE * (10 if options.quick else 1)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines: queue.Queue[str] = queue.Queue()
    errors: list[str] = []
    readers = [threading.Thread(target=listen, args=(process.stdout, lines))]
    readers.append(threading.Thread(target=lambda: errors.extend(process.stderr)))
    for reader in readers:
        reader.start()
    try:
        while True:
            line = lines.get(timeout=max(min(patience, end - time.monotonic()), 0.1))
            if not line:
                break
            yield json.loads(line)
        code = process.wait()
        readers[1].join()  # until all errors are read
        if code:
            yield {"error": (errors or [f"exit code {code} without a message"])[-1].strip()[:300]}
    except queue.Empty:
        if time.monotonic() < end:
            yield {"error": f"no answer for {patience:.0f} s"}
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join()


def listen(stream: Iterable[str], lines: queue.Queue[str]) -> None:
    """Forwards lines as they arrive, and an empty one after the last."""
    for line in stream:
        lines.put(line)
    lines.put("")


def work(options: argparse.Namespace) -> int:
    """Runs one part and prints one line of JSON per case. Stops after an error, which may leave the GPU unusable."""
    measure = {"check": check, "time": time_jax, "flex": time_flex}[options.part]
    for case in list_cases(options.part, options)[options.skip :]:
        try:
            row = measure(case, options.quick) | {"error": None}
        except Exception as error:  # any error belongs in the record
            row = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(json.dumps(row))
        if row["error"]:
            return 0
    return 0


def describe(case: Case) -> dict:
    """The fields of a case, with the size of its layout."""
    layout = parse(case.pattern).layout(case.t, tile=(TILE, TILE))
    tiles = [len(head.columns) for head in (layout if isinstance(layout, tuple) else (layout,))]
    rows = -(-case.t // TILE)
    mean = sum(tiles) / len(tiles)
    return dataclasses.asdict(case) | {"tiles_per_row": mean / rows, "density": mean / rows**2}


# Measurements.


def check(case: Case, quick: bool) -> dict:
    """Largest errors of output, log-sum-exp and gradients, relative to the largest entry of each in float64."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sparsejax.ops import attend
    from sparsejax.ops.reference import TOLERANCE

    pattern, arrays = parse(case.pattern), draw(case)
    random = np.random.default_rng(1)
    sink, ids = random.normal(size=case.heads[0]), np.sort(random.integers(0, 3, (1, case.t)))
    do = jnp.asarray(random.normal(size=arrays[0].shape), case.dtype)
    dlse = random.normal(size=arrays[0].shape[:3])

    def differentiate(impl: str, dtype: str, interpret: bool = False):
        def forward(q, k, v):
            extra = {"softcap": 20.0, "sink_logits": jnp.asarray(sink, wide), "segment_ids": jnp.asarray(ids)}
            options = {"impl": impl, "interpret": interpret} | (extra if case.options else {})
            return attend(q, k, v, pattern, **options, return_lse=True)

        @jax.jit
        def compute(q, k, v, do, dlse):
            (out, lse), pull = jax.vjp(forward, q, k, v)
            return out, lse, *pull((do, dlse))

        wide = jnp.promote_types(dtype, "float32")
        return compute(*(jnp.asarray(x, dtype) for x in (*arrays, do)), jnp.asarray(dlse, wide))

    results = differentiate("gpu", case.dtype, quick)
    with jax.enable_x64(True):
        expected = differentiate("dense", "float64")
    errors = {}
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), results, expected, strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        finite = np.isfinite(theirs)
        if not (np.isfinite(ours) == finite).all():
            raise ArithmeticError(f"{name}: not finite where float64 is finite, or the reverse")
        errors[name] = float(abs(ours - theirs)[finite].max() / max(1.0, abs(theirs[finite]).max()))
    worst = max(errors, key=errors.get)
    if not errors[worst] <= TOLERANCE[case.dtype]:
        raise ArithmeticError(f"{worst}: error {errors[worst]:.1e} exceeds {TOLERANCE[case.dtype]:.1e}")
    return {"errors": errors}


def draw(case: Case) -> list:
    """Draws q, k and v."""
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(0)
    shapes = [(1, case.t, heads, case.width) for heads in (case.heads[0], *case.heads[1:] * 2)]
    return [jnp.asarray(random.standard_normal(shape, np.float32), case.dtype) for shape in shapes]


def time_jax(case: Case, quick: bool) -> dict:
    """Times the kernels, and cuDNN if it supports the mask."""
    from sparsejax.ops import ImplementationError, attend

    pattern, arrays, times = parse(case.pattern), draw(case), {}
    for impl in ("gpu", "cudnn"):
        try:
            options = {"impl": impl, "interpret": quick and impl == "gpu"}
            times[impl] = time_passes(lambda *x, options=options: attend(*x, pattern, **options), arrays)
        except ImplementationError:
            if impl == "gpu":
                raise
    return {"times": times}


def time_passes(function: Callable, arrays: list) -> dict[str, float]:
    """Milliseconds of the forward and the backward pass of a JAX function."""
    import jax

    forward = jax.jit(function).lower(*arrays).compile()
    out, pull = jax.jit(lambda *x: jax.vjp(function, *x))(*arrays)
    backward = jax.jit(lambda pull, do: pull(do))
    jax.block_until_ready(backward(pull, out))
    return {
        "forward": sample(lambda: forward(*arrays), jax.block_until_ready),
        "backward": sample(lambda: backward(pull, out), jax.block_until_ready),
    }


def sample(call: Callable, wait: Callable) -> float:
    """Median milliseconds per call; a single sample if a call takes longer than a second."""

    def measure(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        return 1e3 * (time.perf_counter() - started) / calls

    first = min(measure(1), measure(1))
    if first > 1000:
        return first
    calls = max(1, round(SAMPLE_MS / first))
    return statistics.median(measure(calls) for _ in range(SAMPLES))


def time_flex(case: Case, quick: bool) -> dict:
    """Times FlexAttention of PyTorch under the same mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = "cpu" if quick else "cuda"
    torch._dynamo.reset()
    small, position = dataclasses.replace(case, t=384), torch.arange(384, device=device)
    same = write_mask(small, torch, device)(None, None, position[:, None], position)
    if (same.cpu().numpy() != parse(case.pattern).dense(384)).any():
        raise ArithmeticError("the mask of FlexAttention differs from the pattern")
    allows = write_mask(case, torch, device)
    mask = create_block_mask(allows, None, None, case.t, case.t, device=device, BLOCK_SIZE=TILE)
    shapes = [(1, heads, case.t, case.width) for heads in (case.heads[0], *case.heads[1:] * 2)]
    dtype = torch.float32 if quick else torch.bfloat16
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=not quick) for shape in shapes)
    attend = torch.compile(flex_attention, dynamic=False)

    def forward():
        return attend(q, k, v, block_mask=mask, enable_gqa=case.heads[0] != case.heads[1])

    out = forward()

    def backward():
        return torch.autograd.grad(out, (q, k, v), do, retain_graph=True)

    def wait(_):
        if not quick:
            torch.cuda.synchronize()

    do = torch.randn_like(out)
    with torch.no_grad():
        times = {"forward": sample(forward, wait)}
    if not quick:  # FlexAttention has no backward pass on a CPU
        times["backward"] = sample(backward, wait)
    return {"times": {"flex": times}}


def write_mask(case: Case, torch, device: str) -> Callable:
    """The pattern as a mask function of FlexAttention: its formula, with random tiles looked up in a table."""
    t = case.t

    def write(pattern):
        if isinstance(pattern, And | Or):
            terms, join = (
                [write(term) for term in pattern.terms],
                operator.and_ if type(pattern) is And else operator.or_,
            )
            return lambda q, k: functools.reduce(join, (term(q, k) for term in terms))
        if isinstance(pattern, Random):
            rows = pattern.dense(t)[:: pattern.tile, :: pattern.tile]
            table = torch.tensor(rows, device=device)
            return lambda q, k: table[q // pattern.tile, k // pattern.tile]
        return lambda q, k: pattern.allows(q, k, t, t)

    allows = write(parse(case.pattern))
    return lambda b, h, q, k: allows(q, k)


# Results.


def case_of(row: dict) -> Case:
    """The case of a row."""
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})


def find_times(record: dict, pattern: str, **case) -> dict[str, dict]:
    """The times of a case per contender, without those that failed."""
    fields = dataclasses.asdict(Case(pattern, **case))
    rows = [row for part in ("time", "flex") for row in record[part] if fields.items() <= row.items()]
    return {name: times for row in rows for name, times in row.get("times", {}).items()}


def rate(row: dict, milliseconds: float, backward: bool) -> float:
    """TFLOP/s of whole live tiles."""
    pairs = row["tiles_per_row"] * math.ceil(row["t"] / TILE) * TILE**2 * row["heads"][0]
    return (10 if backward else 4) * row["width"] * pairs / milliseconds / 1e9


def compare_with_goals(record: dict) -> Iterator[tuple[str, float | None, float, float]]:
    """Per goal: its name, the measured value or None, the minimum and the target."""
    rows = {row["pattern"]: row for row in reversed(record["time"]) if Case(row["pattern"]).t == row["t"]}
    for pattern, name, goals in (
        (WINDOW, "window 1024", (450, 520, 370, 410)),
        (LONG_ROWS, "34 tiles", (580, 630, 430, 470)),
    ):
        times = find_times(record, pattern).get("gpu", {})
        for i, direction in enumerate(PASSES):
            value = rate(rows[pattern], times[direction], i == 1) if direction in times else None
            yield f"{direction}, {name} (TFLOP/s)", value, *goals[2 * i : 2 * i + 2]
    for direction in PASSES:
        value = least_ratio(record, "flex", direction)
        yield f"{direction}, FlexAttention / sparsejax, minimum over masks", value, 1.2, 1.4
    window, dense = find_times(record, WINDOW).get("gpu"), find_times(record, DENSE).get("cudnn")
    value = sum(dense.values()) / sum(window.values()) if window and dense else None
    yield "both passes, dense cuDNN / window 1024", value, 6.0, 9.0
    for direction in PASSES:
        value = least_ratio(record, "cudnn", direction)
        yield f"{direction}, dense cuDNN / sparsejax, minimum over density <= 0.5", value, 1.0, 1.0


def least_ratio(record: dict, contender: str, direction: str) -> float | None:
    """The least ratio to our time: of FlexAttention under the same mask, or of dense cuDNN at density <= 0.5."""
    ratios = []
    for row in record["time"]:
        same = {name: row[name] for name in ("t", "heads", "width")}
        ours = row.get("times", {}).get("gpu", {}).get(direction)
        pattern = DENSE if contender == "cudnn" else row["pattern"]
        theirs = find_times(record, pattern, **same).get(contender, {}).get(direction)
        if ours and theirs and (contender != "cudnn" or row["density"] <= 0.5):
            ratios.append(theirs / ours)
    return min(ratios, default=None)


def summarize(row: dict) -> tuple[str, str]:
    """The case of a row and its result, each as text."""
    case = str(case_of(row))
    if row["error"]:
        return case, row["error"]
    if "errors" in row:
        return case, ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    times = (f"{name} {' + '.join(f'{ms:.3f}' for ms in passes.values())} ms" for name, passes in row["times"].items())
    return case, "; ".join(times)


def write_table(record: dict) -> str:
    """The record in Markdown."""
    gpu = (record["gpu"]["before"] or {}).get("name", "no GPU: the times are meaningless")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    goals = [
        (name, "not measured" if value is None else f"{value:.3g}", str(low), str(high))
        for name, value, low, high in compare_with_goals(record)
    ]
    contenders = "gpu", "cudnn", "flex"
    timed = []
    for row in record["time"]:
        case = case_of(row)
        times = find_times(record, **dataclasses.asdict(case))
        cells = [" + ".join(f"{ms:.3f}" for ms in times.get(name, {}).values()) for name in contenders]
        rates = [f"{rate(row, ms, direction == 'backward'):.0f}" for direction, ms in times.get("gpu", {}).items()]
        label = f"{case}" + (f" ({row['error']})" if row["error"] else "")
        timed.append((label, f"{row['tiles_per_row']:.1f}", *cells, " + ".join(rates)))
    tables = (
        write_markdown(("goal", "measured", "minimum", "target"), goals, 1),
        write_markdown(("ms forward + backward", "tiles per row", *contenders, "sparsejax, TFLOP/s"), timed, 1),
        write_markdown(("check", "largest error"), [summarize(row) for row in record["check"]], 2),
    )
    return "\n".join((f"{gpu}, {record['date']}; {versions}\n", *tables))
