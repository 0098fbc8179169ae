"""Kernels for Hopper GPUs on a real one: first whether they are right, then how fast, beside cuDNN and FlexAttention.

    python scripts/gpu_bench.py --out benchmarks/NAME.json --table benchmarks/NAME.md
    python scripts/gpu_bench.py --rehearse --minutes 60     # the same on a CPU, tiny and interpreted

One call, within `--minutes` (9), without a network; jax 0.11 or newer with CUDA, and PyTorch for FlexAttention
(`--torch`: another Python that has it). The work is done by other processes, which are stopped when they do not answer
and started again with what comes next, so that a kernel that hangs costs one row. Rows are written as they come.

Times are medians of 21 samples, each of as many calls one after another as take 10 ms; the backward pass is timed
alone, from what the forward pass kept. FLOPs are those of whole live tiles: 4 d per pair forward, 10 d backward,
however often a backward pass computes its scores. Exits with 1 if a result is wrong, with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import operator
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sparsejax.patterns import And, Or, Random, parse, recipes  # noqa: E402
from tests.tolerances import TOLERANCE  # noqa: E402

TILE = 128
SAMPLES, SAMPLE_MS = 21, 10.0
PATIENCE = 60.0  # seconds for a row, compilation included
SHARES = {"check": 0.3, "time": 0.7, "flex": 1.0}  # of the minutes, by when each part has to end
FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
DENSE, CAUSAL, WINDOW = "full", "causal", "causal & window(1023)"
LONG_ROWS = "causal & window(5119)"  # 34.6 tiles a row at 16,384


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention to be measured: [1, t, heads, width], bfloat16 unless said otherwise."""

    pattern: str
    t: int = 16_384
    heads: tuple[int, int] = (16, 16)
    width: int = 128
    dtype: str = "bfloat16"
    options: bool = False  # softcap, sink logits, segments; for checks

    def __str__(self):
        heads = f"{self.heads[0]}" if self.heads[0] == self.heads[1] else f"{self.heads[0]}:{self.heads[1]}"
        dtype = "" if self.dtype == "bfloat16" else f", {self.dtype}"
        options = ", softcap, sink, segments" if self.options else ""
        return f"{self.pattern}, {self.t:,} x {heads} heads of {self.width}{dtype}{options}"


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
FLEX = tuple(case for case in TIMED if case.t <= 16_384)  # its block mask is made from the whole mask
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


def main() -> int:
    """All parts; the record and the table are written after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    parser.add_argument("--table", type=Path, help="write it as Markdown")
    parser.add_argument("--minutes", type=float, default=9.0, help="what is not done by then is left out")
    parser.add_argument("--only", default="", help="cases with this text in their pattern")
    parser.add_argument("--torch", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny and interpreted")
    parser.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)  # the work itself, in a process of its own
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return work(options)
    from rich.console import Console  # a Python that has PyTorch need not have it
    from rich.markdown import Markdown

    gpu = describe_gpu()
    if gpu is None and not options.rehearse:
        print("gpu_bench: nvidia-smi finds no GPU here; nothing was measured", file=sys.stderr)
        return 2
    started = time.monotonic()
    about = {"date": datetime.date.today().isoformat(), "rehearsal": options.rehearse, "versions": list_versions()}
    record = about | {"python": platform.python_version(), "gpu": {"before": gpu}} | {part: [] for part in SHARES}
    for part, share in SHARES.items():
        for row in run_part(part, options, started + 60 * options.minutes * share):
            record[part].append(row)
            print(f"{time.monotonic() - started:4.0f} s  {part}: {summarize(row)}", flush=True)
            save(record, options)
    record["gpu"]["after"] = describe_gpu()
    record["seconds"] = round(time.monotonic() - started)
    save(record, options)
    Console(width=150).print(Markdown(write_table(record)))
    return int(any(row["error"] for row in record["check"]))


def list_cases(part: str, options: argparse.Namespace) -> list[Case]:
    """Those of a part; in a rehearsal much smaller ones."""
    cases = {"check": CHECKED, "time": TIMED, "flex": FLEX}[part]
    cases = [case for case in cases if options.only in case.pattern]
    if not options.rehearse:
        return cases
    small = [dataclasses.replace(case, t=384, heads=(2, 1), width=min(case.width, 64)) for case in cases]
    small = [case for case in dict.fromkeys(small) if "per_head" not in case.pattern]
    return small if part == "flex" else [*small[:2], small[-1]]


def list_versions() -> dict[str, str]:
    """Of what is installed beside this script."""
    known = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    wanted = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch", "triton")
    return {name: known[name] for name in wanted if name in known}


def describe_gpu() -> dict[str, str] | None:
    """Name, driver, clocks, power and temperature now."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(FIELDS, found.splitlines()[0].split(", "), strict=True))


def save(record: dict, options: argparse.Namespace) -> None:
    """As far as it has come."""
    for path, text in ((options.out, json.dumps(record, indent=1) + "\n"), (options.table, write_table(record))):
        if path:
            path.write_text(text)


# Processes that work, and the one that watches them.


def run_part(part: str, options: argparse.Namespace, end: float) -> Iterator[dict]:
    """A row for each case; a process that fails or hangs is followed by one that begins with the next case."""
    cases, done = list_cases(part, options), 0
    while done < len(cases):
        for line in read_lines(part, options, done, end):
            yield describe(cases[done]) | line
            done += 1
            if line["error"]:
                break
        if time.monotonic() >= end:
            yield from (describe(case) | {"error": "not reached in time"} for case in cases[done:])
            return


def read_lines(part: str, options: argparse.Namespace, skip: int, end: float) -> Iterator[dict]:
    """What one process says; at last an error unless it did everything."""
    python = options.torch if part == "flex" else sys.executable
    command = [python, __file__, "--part", part, "--skip", str(skip), "--only", options.only]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if options.rehearse:
        command, environment = [*command, "--rehearse"], environment | {"JAX_PLATFORMS": "cpu", "NPROC": "8"}
    patience = PATIENCE * (10 if options.rehearse else 1)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said: queue.Queue[str] = queue.Queue()
    errors: list[str] = []
    readers = [threading.Thread(target=listen, args=(process.stdout, said))]
    readers.append(threading.Thread(target=lambda: errors.extend(process.stderr)))
    for reader in readers:
        reader.start()
    try:
        while True:
            line = said.get(timeout=max(min(patience, end - time.monotonic()), 0.1))
            if not line:
                break
            yield json.loads(line)
        code = process.wait()
        readers[1].join()  # all that it said
        if code:
            yield {"error": (errors or ["it ended without a word"])[-1].strip()[:300]}
    except queue.Empty:
        if time.monotonic() < end:
            yield {"error": f"no answer for {patience:.0f} s"}
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join()


def listen(stream: Iterable[str], said: queue.Queue[str]) -> None:
    """Passes lines on as they come, and an empty one after the last."""
    for line in stream:
        said.put(line)
    said.put("")


def work(options: argparse.Namespace) -> int:
    """One part, a line of JSON for each case; ends after an error, as a GPU may be of no use after one."""
    measure = {"check": check, "time": time_jax, "flex": time_flex}[options.part]
    for case in list_cases(options.part, options)[options.skip :]:
        try:
            found = measure(case, options.rehearse) | {"error": None}
        except Exception as error:  # whatever went wrong belongs into the record
            found = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(json.dumps(found))
        if found["error"]:
            return 0
    return 0


def describe(case: Case) -> dict:
    """The case, with what its layout says."""
    layout = parse(case.pattern).layout(case.t, tile=(TILE, TILE))
    tiles = [len(one.columns) for one in (layout if isinstance(layout, tuple) else (layout,))]
    rows = -(-case.t // TILE)
    mean = sum(tiles) / len(tiles)
    return dataclasses.asdict(case) | {"tiles_per_row": mean / rows, "density": mean / rows**2}


# What is measured.


def check(case: Case, rehearse: bool) -> dict:
    """The largest error of output, log-sum-exp and gradients, relative to the largest entry of each in float64."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sparsejax.ops import attend

    pattern, arrays = parse(case.pattern), draw(case)
    random = np.random.default_rng(1)
    sink, ids = random.normal(size=case.heads[0]), np.sort(random.integers(0, 3, (1, case.t)))
    d_out = jnp.asarray(random.normal(size=arrays[0].shape), case.dtype)
    d_lse = random.normal(size=arrays[0].shape[:3])

    def differentiate(impl: str, dtype: str, interpret: bool = False):
        def forward(q, k, v):
            more = {"softcap": 20.0, "sink_logits": jnp.asarray(sink, wide), "segment_ids": jnp.asarray(ids)}
            own = {"impl": impl, "interpret": interpret} | (more if case.options else {})
            return attend(q, k, v, pattern, **own, return_lse=True)

        @jax.jit
        def compute(q, k, v, d_out, d_lse):
            (out, lse), pull = jax.vjp(forward, q, k, v)
            return out, lse, *pull((d_out, d_lse))

        wide = jnp.promote_types(dtype, "float32")
        return compute(*(jnp.asarray(x, dtype) for x in (*arrays, d_out)), jnp.asarray(d_lse, wide))

    found = differentiate("gpu", case.dtype, rehearse)
    with jax.enable_x64(True):
        expected = differentiate("dense", "float64")
    errors = {}
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        finite = np.isfinite(theirs)
        if not (np.isfinite(ours) == finite).all():
            raise ArithmeticError(f"{name}: infinite or not a number where it should not be")
        errors[name] = float(abs(ours - theirs)[finite].max() / max(1.0, abs(theirs[finite]).max()))
    worst = max(errors, key=errors.get)
    if not errors[worst] <= TOLERANCE[case.dtype]:
        raise ArithmeticError(f"{worst} is wrong by {errors[worst]:.1e}")
    return {"errors": errors}


def draw(case: Case) -> list:
    """q, k and v of JAX."""
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(0)
    shapes = [(1, case.t, heads, case.width) for heads in (case.heads[0], *case.heads[1:] * 2)]
    return [jnp.asarray(random.standard_normal(shape, np.float32), case.dtype) for shape in shapes]


def time_jax(case: Case, rehearse: bool) -> dict:
    """Ours, and cuDNN where it has the mask."""
    from sparsejax.ops import ImplementationError, attend

    pattern, arrays, times = parse(case.pattern), draw(case), {}
    for impl in ("gpu", "cudnn"):
        try:
            own = {"impl": impl, "interpret": rehearse and impl == "gpu"}
            times[impl] = time_passes(lambda *x, own=own: attend(*x, pattern, **own), arrays)
        except ImplementationError:
            if impl == "gpu":
                raise
    return {"times": times}


def time_passes(function: Callable, arrays: list) -> dict[str, float]:
    """Milliseconds of a function of JAX, forward and backward."""
    import jax

    forward = jax.jit(function).lower(*arrays).compile()
    out, pull = jax.jit(lambda *x: jax.vjp(function, *x))(*arrays)
    backward = jax.jit(lambda pull, d_out: pull(d_out))
    jax.block_until_ready(backward(pull, out))
    return {
        "forward": sample(lambda: forward(*arrays), jax.block_until_ready),
        "backward": sample(lambda: backward(pull, out), jax.block_until_ready),
    }


def sample(call: Callable, wait: Callable) -> float:
    """The median of milliseconds of a call; one sample where calls take longer than a second."""

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


def time_flex(case: Case, rehearse: bool) -> dict:
    """FlexAttention of PyTorch under the same mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = "cpu" if rehearse else "cuda"
    torch._dynamo.reset()
    small, position = dataclasses.replace(case, t=384), torch.arange(384, device=device)
    same = write_mask(small, torch, device)(None, None, position[:, None], position)
    if (same.cpu().numpy() != parse(case.pattern).dense(384)).any():
        raise ArithmeticError("its mask is another one")
    allows = write_mask(case, torch, device)
    mask = create_block_mask(allows, None, None, case.t, case.t, device=device, BLOCK_SIZE=TILE)
    shapes = [(1, heads, case.t, case.width) for heads in (case.heads[0], *case.heads[1:] * 2)]
    dtype = torch.float32 if rehearse else torch.bfloat16
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=not rehearse) for shape in shapes)
    attend = torch.compile(flex_attention, dynamic=False)

    def forward():
        return attend(q, k, v, block_mask=mask, enable_gqa=case.heads[0] != case.heads[1])

    out = forward()

    def backward():
        return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    def wait(_):
        if not rehearse:
            torch.cuda.synchronize()

    d_out = torch.randn_like(out)
    with torch.no_grad():
        times = {"forward": sample(forward, wait)}
    if not rehearse:  # it has no backward pass on a CPU
        times["backward"] = sample(backward, wait)
    return {"times": {"flex": times}}


def write_mask(case: Case, torch, device: str) -> Callable:
    """The pattern as FlexAttention has it: the same formula, but a table of what is drawn at random."""
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


# What comes of it.


def find_times(record: dict, pattern: str, **case) -> dict[str, dict]:
    """The times of a case by contender; without what failed."""
    wanted = dataclasses.asdict(Case(pattern, **case))
    rows = [row for part in ("time", "flex") for row in record[part] if wanted.items() <= row.items()]
    return {name: times for row in rows for name, times in row.get("times", {}).items()}


def rate(row: dict, milliseconds: float, backward: bool) -> float:
    """TFLOP/s over live tiles."""
    pairs = row["tiles_per_row"] * math.ceil(row["t"] / TILE) * TILE**2 * row["heads"][0]
    return (10 if backward else 4) * row["width"] * pairs / milliseconds / 1e9


def judge(record: dict) -> Iterator[tuple[str, float | None, float, float]]:
    """What is aimed at: its name, what was found, the least and the wanted. None: not measured."""
    rows = {row["pattern"]: row for row in reversed(record["time"]) if Case(row["pattern"]).t == row["t"]}
    for pattern, what, goals in (
        (WINDOW, "window 1024", (450, 520, 370, 410)),
        (LONG_ROWS, "34 tiles", (580, 630, 430, 470)),
    ):
        times = find_times(record, pattern).get("gpu", {})
        for i, one in enumerate(("forward", "backward")):
            found = rate(rows[pattern], times[one], i == 1) if one in times else None
            yield f"{one}, {what} (TFLOP/s)", found, *goals[2 * i : 2 * i + 2]
    for one in ("forward", "backward"):
        yield f"{one}, FlexAttention / ours, least of all masks", least(record, "flex", one), 1.2, 1.4
    window, dense = find_times(record, WINDOW).get("gpu"), find_times(record, DENSE).get("cudnn")
    found = sum(dense.values()) / sum(window.values()) if window and dense else None
    yield "both passes, dense cuDNN / window 1024", found, 6.0, 9.0
    for one in ("forward", "backward"):
        yield f"{one}, dense cuDNN / ours, least of density <= 0.5", least(record, "cudnn", one), 1.0, 1.0


def least(record: dict, other: str, one: str) -> float | None:
    """The least ratio to our time of FlexAttention under the same mask, or of dense cuDNN where half is left out."""
    ratios = []
    for row in record["time"]:
        same = {name: row[name] for name in ("t", "heads", "width")}
        ours = row.get("times", {}).get("gpu", {}).get(one)
        pattern = DENSE if other == "cudnn" else row["pattern"]
        theirs = find_times(record, pattern, **same).get(other, {}).get(one)
        if ours and theirs and (other != "cudnn" or row["density"] <= 0.5):
            ratios.append(theirs / ours)
    return min(ratios, default=None)


def summarize(row: dict) -> str:
    """A row in a line."""
    case = Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})
    if row["error"]:
        return f"{case}: {row['error']}"
    if "errors" in row:
        return f"{case}: " + ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    times = "; ".join(
        f"{name} {' + '.join(f'{ms:.3f}' for ms in each.values())} ms" for name, each in row["times"].items()
    )
    return f"{case}: {times}"


def write_table(record: dict) -> str:
    """What was found, in Markdown."""
    gpu = (record["gpu"]["before"] or {}).get("name", "no GPU: a rehearsal, whose times mean nothing")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"{gpu}, {record['date']}; {versions}",
        "",
        "| goal | found | at least | wanted |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, found, low, high in judge(record):
        lines.append(f"| {name} | {'not measured' if found is None else f'{found:.3g}'} | {low} | {high} |")
    names = "gpu", "cudnn", "flex"
    lines += [
        "",
        f"| ms forward + backward | tiles a row | {' | '.join(names)} | ours, TFLOP/s |",
        "| --- " + "| ---: " * 5 + "|",
    ]
    for row in record["time"]:
        case = {field.name: row[field.name] for field in dataclasses.fields(Case)}
        times = find_times(record, **case)
        cells = [" + ".join(f"{ms:.3f}" for ms in times[name].values()) if name in times else "" for name in names]
        rates = [f"{rate(row, ms, one == 'backward'):.0f}" for one, ms in times.get("gpu", {}).items()]
        what = str(Case(**case)).replace("|", "\\|") + (f" ({row['error']})" if row["error"] else "")
        lines.append(f"| {what} | {row['tiles_per_row']:.1f} | {' | '.join(cells)} | {' + '.join(rates)} |")
    lines += ["", "| right? largest error | |", "| --- | --- |"]
    for row in record["check"]:
        case, found = summarize(row).rsplit(": ", 1)
        lines.append(f"| {case.replace('|', chr(92) + '|')} | {found} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
