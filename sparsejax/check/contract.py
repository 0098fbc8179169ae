"""The interface of mixers: types, shapes and variables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.check.certificate import Finding
from sparsejax.check.subject import Subject
from sparsejax.layers import Context, Cost, Mixer, MixerConfig, Stream, Tokens
from sparsejax.layers.mixers import make_mixer
from sparsejax.ops.blocks import make_blocks
from sparsejax.ops.selection import Selection

BATCH, CHUNK = 2, 3


def check_contract(subject: Subject) -> Iterator[Finding]:
    """Compares the types and shapes of each mixer with those of `layers.Mixer`, without compiling anything."""
    stream = Stream(subject.config.width, 1, jnp.dtype(subject.config.dtype))
    for name in dict.fromkeys(subject.config.names):
        config = subject.config.layers[name].mixer
        if config is not None:
            problem = next(_find_problems(config, stream, subject), "")
            detail = problem or "variables, outputs, caches and costs are of the types of layers.Mixer"
            yield Finding(f"mixer of {name}", not problem, detail)


def _find_problems(config: MixerConfig, stream: Stream, subject: Subject) -> Iterator[str]:
    if not (isinstance(config.summary, str) and config.summary):
        yield "config.summary is not a text"
    mixer: Mixer = nnx.eval_shape(lambda: make_mixer(config, stream, nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(mixer)):
        name = ".".join(map(str, path))
        if not isinstance(variable, nnx.Param):  # nothing else is trained, saved and sharded
            yield f"{name} is a {type(variable).__name__}, expected nnx.Param"
        if variable.dtype != jnp.float32:
            yield f"the parameter {name} is {variable.dtype}, expected float32"
    if not isinstance(mixer.cost(subject.length), Cost):
        yield "cost(length) is not a Cost"
    context = Context().with_extras(
        layer=jnp.asarray(0), selection=_shared_selection(config, subject.length, subject.length)
    )
    x = jax.ShapeDtypeStruct((BATCH, subject.length, stream.width), stream.dtype)
    y = nnx.eval_shape(lambda mixer, x: mixer(x, context), mixer, x)
    if _describe(y) != _describe(x):
        yield f"the output is {_describe(y)}, expected {_describe(x)}"
    if subject.config.causal:
        chunk = jax.ShapeDtypeStruct((BATCH, CHUNK, stream.width), stream.dtype)
        positions, mask = jnp.zeros(BATCH, jnp.int32), jnp.ones((BATCH, CHUNK), bool)
        context = Context(Tokens(mask=mask), context.extras)
        context = context.pass_on(_shared_selection(config, CHUNK, subject.length))

        def extend(mixer: Mixer, x: jax.Array) -> tuple[Any, Any, Any]:
            cache = mixer.init_cache(BATCH, subject.length)
            return cache, *mixer.extend(x, cache, positions, subject.length, context)

        before, y, after = nnx.eval_shape(extend, mixer, chunk)
        if _describe(y) != _describe(chunk):
            yield f"extend returns {_describe(y)}, expected {_describe(chunk)}"
        if _describe(before) != _describe(after):
            yield f"extend changes the cache from {_describe(before)} to {_describe(after)}"


def _shared_selection(config: MixerConfig, queries: int, keys: int) -> Selection | None:
    """A selection as that of an earlier layer, for a mixer that reuses it."""
    for indexer in config.indexers:
        if indexer.shared:
            groups = jnp.zeros((BATCH, 1, queries, min(indexer.top_k, keys)), jnp.int32)
            return Selection(groups, make_blocks(keys, indexer.block))
    return None


def _describe(tree: Any) -> Any:
    """Dtypes and shapes, as text."""
    return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)
