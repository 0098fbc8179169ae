"""One-line faults, planted in the program: the check finds each of them."""

import importlib
import inspect
import sys
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import pytest

from sparsejax.check import check_model
from tests.check.models import BLOCK, EXPERTS, SIDE, build


class Mutant(NamedTuple):
    """A fault: in `target`, a function or `Class.method` of `module`, `old` becomes `new`."""

    module: str
    target: str
    old: str
    new: str
    mixer: str
    length: int = 40
    changes: Mapping[str, Any] = MappingProxyType({})


EXPERT = MappingProxyType({"layer": {"mlp": EXPERTS}})
SHARED = MappingProxyType({"layer": {"side": SIDE}, "shared": {"block": BLOCK}})
LEAKS = MappingProxyType({"allow_leaks": True})
MUTANTS = {
    # Embeddings.
    "learned positions of the row": Mutant(
        "embedding",
        "Embedding.__call__",
        "self._embed(tokens, positions if",
        "self._embed(tokens, jnp.arange(tokens.shape[1]) if",
        "window",
        changes=MappingProxyType({"embedding": {"positions": 64}}),
    ),
    # Patterns: what an implementation reads.
    "window off by one": Mutant(
        "ops.gather", "_apply_positions", "allows(q_positions,", "allows(q_positions + 1,", "window"
    ),
    "one key too few": Mutant(
        "ops.gather",
        "_apply_positions",
        "allows(q_positions, k",
        "allows(q_positions, k_positions * 1) & plan.pattern.allows(q_positions + 1, k",
        "window",
    ),
    "missing mask": Mutant("ops.gather", "_apply_positions", "if not masked:", "if True:", "causal"),
    "future of the own chunk": Mutant(
        "ops.gather", "_apply_positions", "allows(q_positions,", "allows(q_positions // 8 * 8 + 7,", "chunk"
    ),
    "bounds too narrow": Mutant(
        "patterns.library", "Window.bounds", "first - self.left, last", "first, last", "window", 150
    ),
    "bounds too wide as full": Mutant(
        "patterns.library", "Window.bounds", "(last - self.left, first", "(first - self.left, last", "wide", 300
    ),
    "causal bounds too narrow": Mutant("patterns.library", "Causal.bounds", "last + 1)", "first)", "causal", 150),
    "tiles in the wrong place": Mutant("ops.gather", "_take", "x[:, tiles]", "x[:, tiles - 1]", "causal", 150),
    "sink outside the denominator": Mutant(
        "ops.gather", "_average", "l = l if sink is None else l + jnp.exp(sink - m)", "l = l", "pinned"
    ),
    "sink in the wrong denominator": Mutant(
        "ops.gather", "_average", "l + jnp.exp(sink - m)", "l + jnp.exp(sink - m)[..., ::-1]", "pinned"
    ),
    "missing mask below k": Mutant("ops.selection", "choose", "jnp.where(visible, scores, -jnp.inf)", "scores", "moba"),
    "selection from the future": Mutant(
        "ops.selection",
        "over_queries",
        "pattern.allows(at[..., None], k_at[:, None], length, length)",
        "(at[..., None] >= 0)",
        "selected",
    ),
    # Documents and padding.
    "documents ignored by attention": Mutant(
        "ops.gather", "_apply_positions", "q_ids[:, :, None] == k_ids", "q_ids[:, :, None] >= k_ids", "causal"
    ),
    "padding attended to": Mutant(
        "layers.context", "Tokens.attend_segments", "jnp.where(self.mask, ids, -2)", "ids", "causal"
    ),
    "selection across documents": Mutant(
        "ops.selection",
        "over_queries",
        "(ids[..., None] == k_ids[:, None])",
        "(ids[..., None] >= k_ids[:, None])",
        "selected",
    ),
    "state across documents": Mutant("layers.mamba", "Mamba._scan", "starts=tokens.starts", "starts=None", "mamba"),
    "state across documents, in a chunk": Mutant(
        "ops.ssd", "decay_matrix", "connected = (triangle > 0) & ", "connected = (triangle > 0) | False & ", "mamba2"
    ),
    "state across documents, between chunks": Mutant(
        "ops.ssd", "_run_chunk", "* (document == 0)[..., None]", "* 1", "mamba2"
    ),
    "state across documents, delta rule": Mutant(
        "layers.delta", "Delta._scan", "starts=tokens.starts", "starts=None", "delta"
    ),
    "state across documents, linear scan": Mutant(
        "ops.linear_scan", "linear_scan", "jnp.where(starts[..., None], 0, decay)", "decay", "rglru"
    ),
    "convolution across documents": Mutant("layers.conv", "ShortConv.__call__", "tokens.starts", "None", "conv"),
    "state fed by padding": Mutant("layers.context", "Tokens.zero_padding", "self.mask is None", "True", "lightning"),
    # Recurrences.
    "convolution from the wrong side": Mutant(
        "ops.conv", "causal_conv", "((0, 0), (before, 0), (0, 0))", "((0, 0), (0, before), (0, 0))", "mamba"
    ),
    "chunks in reverse": Mutant(
        "ops.ssd",
        "decay_matrix",
        "triangle = jnp.tri(c, dtype=decay.dtype)",
        "triangle = jnp.tri(c, dtype=decay.dtype).T",
        "mamba2",
    ),
    "prefix in the wrong order": Mutant(
        "ops.linear_scan", "_compose", "second[0] * first[1] + second[1]", "first[0] * second[1] + first[1]", "rglru"
    ),
    "state of a chunk lost": Mutant(
        "ops.ssd", "_run_chunk", "y = y + multiply(from_state,", "y = y + 0 * multiply(from_state,", "lightning"
    ),
    "correction of the delta rule lost": Mutant("ops.delta", "_run_chunk", "(v - stored)", "v", "delta"),
    # Decoding.
    "positions after the wrap": Mutant(
        "patterns.kv_cache",
        "CachePlan.held",
        "newest - (newest - np.arange(ring)) % max(ring, 1)",
        "xp.where(newest >= np.arange(ring), np.arange(ring), -1)",
        "window",
    ),
    "rotation after the wrap": Mutant(
        "layers.attention", "Attention.advance", "self._project(x, at)", "self._project(x, at % 7)", "window"
    ),
    "empty slots attended to": Mutant("ops.cached", "attend_cached", " & (keys >= 0)", "", "causal"),
    "keys overwritten before they are read": Mutant(
        "layers.caching", "extend_keys", "if size == 1 or plan.pinned == plan.count:", "if True:", "window"
    ),
    "keys of padding written": Mutant("layers.caching", "write_slots", "if tokens.mask is None", "if True", "window"),
    "padding counted as tokens": Mutant(
        "layers.context", "Tokens.count", "self.mask.sum(axis=1)", "jnp.full(shape[0], shape[1])", "conv"
    ),
    "ring too short": Mutant("patterns.library", "Window.last_query", "k + self.left", "k + self.left - 1", "window"),
    "sink not pinned": Mutant("patterns.library", "Sink.last_query", "FOREVER", "k + 3", "pinned"),
    "ring over the pinned slots": Mutant(
        "patterns.kv_cache", "plan_cache", "count + rank % max(ring, 1)", "rank % max(ring, 1)", "pinned"
    ),
    "convolution cache shifted the wrong way": Mutant(
        "layers.conv", "ShortConv.extend", "inputs[:, x.shape[1] :] if", "inputs[:, :past] if", "mamba"
    ),
    "convolution cache of a chunk": Mutant(
        "layers.conv", "ShortConv.extend", "jnp.arange(past)\n", "jnp.arange(past) - 1\n", "mamba"
    ),
    "state not kept": Mutant("layers.mamba", "Mamba.extend", '"state": state}', '"state": cache["state"]}', "mamba"),
    "first token unknown": Mutant("layers.rglru", "RgLru.extend", "x.shape[1]) == 0", "x.shape[1]) < 0", "rglru"),
    "branch not scaled": Mutant("layers.mixers", "Parallel.advance", "branch.scale_in * x", "x", "parallel"),
    "learned positions off by one": Mutant(
        "embedding",
        "Embedding.extend",
        "self._embed(tokens, at if",
        "self._embed(tokens, at + 1 if",
        "conv",
        40,
        {"embedding": {"positions": 64}},
    ),
    "index of the layer in decoding": Mutant(
        "model", "Model.extend", "jnp.asarray(first + index)", "jnp.asarray(index)", "lightning"
    ),
    "index of the layer in the scan": Mutant(
        "model", "Model.forward", "jnp.asarray(first + index)", "jnp.asarray(index)", "lightning"
    ),
    "heads repeated in the wrong order": Mutant(
        "ops.gather",
        "_take",
        "plan.g, heads // plan.g, *width)\n",
        "heads // plan.g, plan.g, *width).swapaxes(2, 3)\n",
        "grouped",
        150,
    ),
    "heads repeated in the wrong order, decoding": Mutant(
        "ops.cached",
        "attend_cached",
        "q.reshape(b, t, g, h // g, d)",
        "q.reshape(b, t, h // g, g, d).swapaxes(2, 3)",
        "grouped",
    ),
    # Layers and the model.
    "norm over the sequence": Mutant("layers.norm", "standardize", "axis=-1", "axis=-2", "causal"),
    "layers scanned in reverse": Mutant(
        "model", "Model.forward", "self._period_starts, known", "self._period_starts[::-1], known", "lightning"
    ),
    "padding convolved": Mutant("layers.context", "Tokens.zero_padding", "self.mask is None", "True", "conv"),
    "residual from the next token": Mutant(
        "layers.layer", "Residual.post", "base = read if", "x = jnp.roll(x, -1, axis=1); base = read if", "conv"
    ),
    "tile layout of another length": Mutant(
        "ops.gather", "_run_pattern", "layout(t, s,", "layout(t - tile, s,", "window", 150
    ),
    "gradient in the wrong tile": Mutant(
        "ops.gather", "_add", "x.at[:, tiles].add", "x.at[:, tiles + 1].add", "causal", 150
    ),
    # Options of attention in decoding.
    "distance lost in decoding": Mutant("ops.cached", "attend_cached", "if slopes is not None:", "if False:", "alibi"),
    "bound lost in decoding": Mutant(
        "ops.cached", "attend_cached", "softmax.softcap(scores, softcap)", "scores", "softcap"
    ),
    "sink lost in decoding": Mutant("ops.cached", "attend_cached", "0.0 if sink is None else 1.0", "0.0", "pinned"),
    "relative positions of slots": Mutant(
        "layers.attention", "Attention.advance", "at, keys_at, heads=-3", "at, keys_at - 1, heads=-3", "relative"
    ),
    "last block of keys lost": Mutant(
        "ops.cached", "attend_cached", "k.shape[2] // KEYS, visit", "k.shape[2] // KEYS - 1, visit", "wide", 300
    ),
    "positions of the first row": Mutant(
        "layers.caching", "chunk_positions", "positions[:, None]", "0 * positions[:, None] + positions[0]", "window"
    ),
    "rotation from the start of the chunk": Mutant(
        "layers.latent", "Latent.advance", "self._compress(x, at)", "self._compress(x, at - at[:, :1])", "latent"
    ),
    "empty slots selected": Mutant("ops.selection", "over_queries", " & (k_at >= 0)[:, None]", "", "selected"),
    "gate from the next token": Mutant(
        "layers.attention", "Attention._project_out", "self.gate(x)", "self.gate(jnp.roll(x, -1, axis=1))", "gate"
    ),
    "ends of an edge swapped": Mutant(
        "ops.segment",
        "_run_pattern",
        "*call.pattern.edges(call.q.shape[1], call.k.shape[1])",
        "*call.pattern.edges(call.q.shape[1], call.k.shape[1])[::-1]",
        "edges",
    ),
    # Rows of a chunk that end before it.
    "padding of a chunk decays the state, delta rule": Mutant(
        "layers.delta", "Delta._scan", "tokens.zero_padding(decay)", "decay", "delta"
    ),
    "padding of a chunk decays the state, Mamba-2": Mutant(
        "layers.mamba2", "Mamba2._scan", "tokens.zero_padding(dt)", "dt", "mamba2"
    ),
    "padding of a chunk decays the state, RG-LRU": Mutant(
        "layers.rglru", "RgLru._scan", "*map(tokens.zero_padding, inputs)", "*inputs", "rglru"
    ),
    "padding of a chunk decays the state, lightning": Mutant(
        "layers.lightning", "Lightning._scan", "tokens.zero_padding(jnp.ones(", "(jnp.ones(", "lightning"
    ),
    # Experts.
    "experts balanced over the batch": Mutant(
        "ops.experts", "route", "top_k(choice, top_k)", "top_k(choice - choice.mean(axis=0), top_k)", "conv", 40, EXPERT
    ),
    "rows of other tokens": Mutant(
        "ops.experts", "combine", "layout.rows.reshape(-1)", "jnp.roll(layout.rows.reshape(-1), 2)", "conv", 40, EXPERT
    ),
    "bound of an expert's tokens": Mutant(
        "ops.experts",
        "combine",
        "weights.astype(y.dtype)",
        "(weights * (jnp.cumsum(jnp.ones_like(weights), axis=0) < 0.9 * len(weights))).astype(y.dtype)",
        "conv",
        40,
        EXPERT,
    ),
    # Shared blocks.
    "cache of a shared block lost": Mutant(
        "layers.shared", "Side.extend", "y, cache = self", "y, _ = self", "conv", 40, SHARED
    ),
    "adapters lost in decoding": Mutant(
        "layers.shared",
        "Side.extend",
        "self._adapt(context)",
        "(context.extras.shared or {})[self.config.shared]",
        "conv",
        40,
        SHARED,
    ),
    # LSH attention, whose leak is allowed.
    "later keys of a bucket": Mutant(
        "ops.lsh", "attend_hashed", "(k_positions <= positions[..., None]) if", "True if", "lsh", 40, LEAKS
    ),
    "documents share a bucket": Mutant(
        "ops.lsh", "attend_hashed", "(k_ids == q_ids[..., None]) & ", "", "lsh", 40, LEAKS
    ),
    # Account.
    "cache of two sequences": Mutant(
        "account", "_account_layer", "count(double) - count(single)", "count(double)", "causal"
    ),
    "layers counted with the ends": Mutant(
        "account", "account_model", "sum(account.parameters for account in accounts.values())", "0", "causal"
    ),
    "pairs of one head": Mutant("layers.stream", "attention_cost", "copies = heads if", "copies = 1 if", "window"),
}


def clear_caches() -> None:
    """Forgets the programs and the layouts that functions computed before they were changed."""
    jax.clear_caches()
    for module in [module for name, module in sys.modules.items() if name.startswith("sparsejax.patterns.")]:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def fresh():
    clear_caches()
    yield
    clear_caches()


def read_source(mutant: Mutant) -> tuple[Any, Any, str]:
    """The function, what it is an attribute of, and its source, which has the text to replace."""
    owner: Any = importlib.import_module(f"sparsejax.{mutant.module}")
    *path, name = mutant.target.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = inspect.getattr_static(owner, name)
    function = inspect.unwrap(original.fget if isinstance(original, property) else original)  # checks of shapes
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutant.old) >= 1, f"{mutant.target} has no {mutant.old!r}"
    return function, owner, source


def plant(monkeypatch, mutant: Mutant) -> None:
    """Replaces the function everywhere in the package by one compiled from the changed source."""
    function, owner, source = read_source(mutant)
    name = mutant.target.rpartition(".")[2]
    original = inspect.getattr_static(owner, name)
    namespace: dict[str, Any] = {}
    code = compile(source.replace(mutant.old, mutant.new), f"<{mutant.target}>", "exec", dont_inherit=True)
    exec(code, function.__globals__ | {"__annotations__": {}}, namespace)
    changed = namespace[name]  # a property if the original is one: the source has its decorators
    monkeypatch.setattr(owner, name, changed)
    if inspect.ismodule(owner):
        for module in [m for n, m in sys.modules.items() if n.startswith("sparsejax.")]:
            for key, value in list(vars(module).items()):
                if value is original and module is not owner:
                    monkeypatch.setattr(module, key, changed)


def find_failures(mutant: Mutant) -> list[str]:
    certificate = check_model(build(mutant.mixer, **mutant.changes), mutant.length)
    return [f"{finding.name}: {finding.detail}" for finding in certificate.failures]


QUICK = ("window off by one", "state across documents", "positions after the wrap", "convolution from the wrong side")


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_changes_existing_code(name):
    """Faults are planted nightly, but the code under them moves by day."""
    read_source(MUTANTS[name])


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.nightly) for n in MUTANTS])
def test_fault_is_found(fresh, monkeypatch, name):
    plant(monkeypatch, MUTANTS[name])
    assert find_failures(MUTANTS[name])
