"""How fast are the scans of `sparsejax.ops` on a CPU, forward and backward, compared with plain implementations?

Cases: `mamba`, 512 channels with a state of 16; `ssd`, 8 heads of width 64 with a state of 64; `ssd_128`, a state of
128; `lightning`, `ssd` with dt = 1 and B and C per head. Batch size 1, float32, two cores. The plain implementations
are one `jax.lax.scan` and one `jax.lax.associative_scan` over all positions. The parts of the benchmark are the cases,
`chunks` (sparsejax by chunk), `growth` (sparsejax by length) and `layers`: the loss of a model of four layers of width
256, and its gradient. TORCH_PYTHON is a Python interpreter with torch and transformers, which runs the models that
transformers has.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import (
    HEADS,
    QUICK_REPETITIONS,
    REPETITIONS,
    WIDTH,
    Contender,
    OtherProcess,
    Save,
    add_parts,
    alternate,
    fit_exponents,
    jax_contender,
    pin_cores,
    race,
    relative_error,
    run_parts,
    timed,
)
from sparsejax.config import ModelConfig, build
from sparsejax.model import Functional
from sparsejax.ops import selective_scan, ssd

LENGTH = 4096
GROWTH_LENGTHS = (1024, 2048, 4096, 8192, 16384)
CHUNKS = (16, 32, 64, 128)
CHANNELS, STATE = 512, 16
CASES = {"mamba": STATE, "ssd": 64, "ssd_128": 128, "lightning": 64}  # state size per channel or head
LAYERS, LAYER_WIDTH, VOCAB, LAYERS_LENGTH = 4, 256, 1024, 2048
RANGE = {"dt_min": 1e-3, "dt_max": 0.1}
MIXERS = {
    "mamba2": {"heads": 8, "head_width": 64, "state": 64, "groups": 1, "conv": 4, "norm_eps": 1e-5, "chunk": 128}
    | RANGE,
    "mamba": {"inner": 512, "state": 16, "conv": 4, "dt_rank": 16} | RANGE,
    "lightning": {"heads": 8, "head_width": 64},
    "delta": {"heads": 4, "key_heads": 4, "key_width": 64, "value_width": 128, "conv": 4, "norm_eps": 1e-6} | RANGE,
}
TORCH_FIELDS = {"vocab_size": VOCAB, "hidden_size": LAYER_WIDTH, "num_hidden_layers": LAYERS, "expand": 2}
TORCH_MODELS = {
    "mamba2": {"model_type": "mamba2", "num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1}
    | {"chunk_size": 128, "tie_word_embeddings": True},
}


def draw_inputs(case: str, length: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Draws x, dt, A, B, C and the initial state, and the cotangents of the output and the final state."""
    random = np.random.default_rng(0)
    n = CASES[case]

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    def step_sizes(*shape: int) -> np.ndarray:
        return np.exp(random.uniform(np.log(1e-3), np.log(1e-1), shape)).astype(np.float32)

    if case == "mamba":
        A = -np.broadcast_to(np.arange(1, n + 1, dtype=np.float32), (CHANNELS, n))
        inputs = [normal(1, length, CHANNELS), step_sizes(1, length, CHANNELS), A]
        inputs += [normal(1, length, n), normal(1, length, n), normal(1, CHANNELS, n)]
    else:
        lightning = case == "lightning"
        dt = np.ones((1, length, HEADS), np.float32) if lightning else step_sizes(1, length, HEADS)
        A = -(0.5 ** np.arange(1, HEADS + 1)) if lightning else -np.arange(1, HEADS + 1)
        weights = [normal(1, length, HEADS if lightning else 1, n) / n**0.5 for _ in range(2)]
        inputs = [normal(1, length, HEADS, WIDTH), dt, A.astype(np.float32), *weights, normal(1, HEADS, WIDTH, n)]
    cotangents = [normal(*inputs[0].shape), normal(*inputs[-1].shape)]
    return [jnp.asarray(a) for a in inputs], [jnp.asarray(a) for a in cotangents]


def discretise(x, dt, A, B):
    """Returns decays and inputs of the state, [b, t, ...state]: of Mamba for x [b, t, d], of SSD for x [b, t, h, p]."""
    if x.ndim == 3:
        return jnp.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None]
    B = jnp.repeat(B, x.shape[2] // B.shape[2], axis=2)
    return jnp.exp(dt * A)[..., None, None], (dt[..., None] * x)[..., None] * B[:, :, :, None]


def read_out(states, C):
    """Returns the outputs, [b, t, ...], of the states of all positions."""
    if states.ndim == 4:
        return jnp.einsum("btdn,btn->btd", states, C)
    return jnp.einsum("bthpn,bthn->bthp", states, jnp.repeat(C, states.shape[2] // C.shape[2], axis=2))


def associative(x, dt, A, B, C, state):
    """Scans with one `jax.lax.associative_scan`, which keeps all states."""
    decay, added = discretise(x, dt, A, B)
    added = added.at[:, 0].add(decay[:, 0] * state)

    def join(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    states = jax.lax.associative_scan(join, (decay, added), axis=1)[1]
    return read_out(states, C), states[:, -1]


def sequential(x, dt, A, B, C, state):
    """Scans position by position with `jax.lax.scan`."""

    def advance(state, position):
        x, dt, B, C = (a[:, None] for a in position)
        decay, added = discretise(x, dt, A, B)
        state = decay[:, 0] * state + added[:, 0]
        return state, read_out(state[:, None], C)[:, 0]

    state, y = jax.lax.scan(advance, state, [jnp.swapaxes(a, 0, 1) for a in (x, dt, B, C)])
    return jnp.swapaxes(y, 0, 1), state


def our_scan(case: str) -> Callable:
    """Returns the scan of `sparsejax.ops` for a case."""
    return selective_scan if case == "mamba" else ssd


def scan_contender(scan: Callable, case: str, length: int) -> Contender:
    """Compiles a scan together with its gradients."""
    inputs, cotangents = draw_inputs(case, length)
    return jax_contender(scan, inputs, tuple(cotangents))


def measure_case(case: str, length: int, quick: bool) -> dict:
    """Compares the scan of sparsejax with the two plain implementations."""
    scans = {"sparsejax": our_scan(case), "lax.scan": sequential, "associative_scan": associative}
    make = {name: functools.partial(scan_contender, scan, case, length) for name, scan in scans.items()}
    rows = race(make, relative_error, quick)
    ratios = {
        f"{name} / sparsejax, {field}": rows[name][field] / rows["sparsejax"][field]
        for name in ("lax.scan", "associative_scan")
        for field in ("seconds", "temporary_mib")
    }
    title = f"{case}, {length} positions"
    return {"title": title, "length": length, "contenders": rows, "ratios": ratios}


def measure_growth(case: str, lengths: Sequence[int], quick: bool) -> dict:
    """Measures the scan of sparsejax at growing lengths, and fits the exponents of time and memory."""
    scan = our_scan(case)
    rows = race({str(n): functools.partial(scan_contender, scan, case, n) for n in lengths}, None, quick)
    return {"title": f"{case} by length", "contenders": rows, "ratios": fit_exponents(rows)}


def measure_chunks(case: str, length: int, quick: bool) -> dict:
    """Measures the scan of sparsejax by chunk, and computes the size of the saved states, one per chunk."""
    scan = our_scan(case)
    chunked = {str(chunk): functools.partial(scan, chunk=chunk) for chunk in CHUNKS}
    make = {name: functools.partial(scan_contender, scan, case, length) for name, scan in chunked.items()}
    rows = race(make, relative_error, quick)
    state_mib = draw_inputs(case, 1)[0][-1].nbytes / 2**20
    for name, row in rows.items():
        row["states_mib"] = -(-length // int(name)) * state_mib
    best = min(rows, key=lambda name: rows[name]["seconds"])
    ratios = {"fastest chunk": int(best), "MiB of one state per position": length * state_mib}
    title = f"{case} by chunk, {length} positions"
    return {"title": title, "length": length, "contenders": rows, "ratios": ratios}


def build_model(kind: str) -> Functional:
    """Returns a model of four layers of a mixer, without feed-forward parts."""
    norm = {"kind": "rms", "eps": 1e-6}
    layer = {"mixer": {"kind": kind} | MIXERS[kind], "mlp": None, "norm": norm, "norm_position": "pre", "remat": "none"}
    section = {"vocab": VOCAB, "width": LAYER_WIDTH, "schedule": f"{LAYERS}x(mix)", "layers": {"mix": layer}}
    return Functional(build(ModelConfig, section | {"norm": norm, "tied": True, "dtype": "float32", "scan": False}))


def measure_layers(kind: str, length: int, quick: bool, torch: OtherProcess | None) -> dict:
    """Measures the loss of a model, and the loss with its gradient."""
    model = build_model(kind)
    parameters = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (1, length)), jnp.int32)

    def loss(parameters):
        bound = model.bind(parameters)
        log = jax.nn.log_softmax(bound.logits(bound.forward(tokens[:, :-1]).features))
        return -jnp.take_along_axis(log, tokens[:, 1:, None], axis=-1).mean()

    passes = {"forward": jax.jit(loss), "gradient": jax.jit(jax.value_and_grad(loss))}
    runs = {name: lambda run=run: timed(lambda: jax.block_until_ready(run(parameters))) for name, run in passes.items()}
    if torch is not None and kind in TORCH_MODELS:
        fields = TORCH_FIELDS | TORCH_MODELS[kind]
        runs["transformers, gradient"] = lambda: torch.request(do="step", config=fields, length=length)["seconds"]
    for run in runs.values():
        run()  # compiles
    rows = alternate(runs, QUICK_REPETITIONS if quick else REPETITIONS)
    seconds = {name: row["seconds"] for name, row in rows.items()}
    ratios = {"gradient / forward": seconds["gradient"] / seconds["forward"]}
    ratios |= {f"{name} / sparsejax": seconds[name] / seconds["gradient"] for name in seconds.keys() - passes.keys()}
    return {"title": f"four layers of {kind}, {length} tokens", "length": length, "contenders": rows, "ratios": ratios}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_parts(parser, (*CASES, "chunks", "growth", "layers"))
    parser.add_argument("--torch", metavar="TORCH_PYTHON", help="a Python interpreter with torch and transformers")
    parser.add_argument(
        "--length", type=int, default=LENGTH, help=f"positions of the scans, except in `growth`; defaults to {LENGTH}"
    )


def run(options: argparse.Namespace, save: Save) -> None:
    """Measures the parts."""
    pin_cores()
    length, lengths = (64, (64, 128)) if options.quick else (options.length, GROWTH_LENGTHS)
    measures = {case: lambda case=case: [measure_case(case, length, options.quick)] for case in CASES}
    measures["chunks"] = lambda: [measure_chunks(case, length, options.quick) for case in CASES]
    torch = OtherProcess(options.torch, "benchmarks.workers.torch") if options.torch else None
    facts = {"torch_side": torch.request(do="versions")} if torch else {}
    tokens = length if options.quick else LAYERS_LENGTH
    measures["layers"] = lambda: [measure_layers(kind, tokens, options.quick, torch) for kind in MIXERS]
    measures["growth"] = lambda: [measure_growth(case, lengths, options.quick) for case in CASES]
    run_parts(measures, options.only, lambda record: save(facts | record))
