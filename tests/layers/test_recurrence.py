"""Recurrent mixers compute the same function in chunks of any length and step by step."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.layers import Context, Tokens
from sparsejax.ops.linear_scan import CHUNK as LINEAR_CHUNK
from sparsejax.ops.scan import CHUNK as SCAN_CHUNK
from tests.layers.test_mixers import BATCH, MIXED, build, decode, make_x
from tests.tolerances import assert_close

CHUNK = 8
# Chunk lengths of mixers whose config has none.
FIXED = {"mamba": SCAN_CHUNK, "rglru": LINEAR_CHUNK, "conv": CHUNK}
RECURRENT = {
    name: (kind, dataclasses.replace(config, chunk=CHUNK) if hasattr(config, "chunk") else config)
    for kind in ("mamba", "mamba2", "lightning", "delta", "rglru", "conv")
    for name, config in MIXED[kind].items()
}
EVERY = pytest.mark.parametrize("name", RECURRENT)


def longest(kind: str) -> int:
    return 3 * FIXED.get(kind, CHUNK) + 7


@EVERY
def test_chunks_equal_the_steps_at_every_length(name):
    kind, config = RECURRENT[name]
    chunk, module, x = FIXED.get(kind, CHUNK), build(config), make_x(longest(kind))
    steps = jax.jit(lambda x: decode(module, x, x.shape[1]))(x)
    run = jax.jit(lambda x: module(x))
    for length in (1, chunk - 1, chunk, chunk + 1, 3 * chunk + 7):
        assert_close(f"{length} positions", run(x[:, :length]), steps[:, :length], "float32")


@pytest.mark.parametrize("name", [name for name, (_, config) in RECURRENT.items() if hasattr(config, "chunk")])
def test_the_length_of_a_chunk_does_not_matter(name):
    kind, config = RECURRENT[name]
    x = make_x(longest(kind))
    expected = jax.jit(build(config))(x)
    for chunk in (1, 5, 64):
        actual = jax.jit(build(dataclasses.replace(config, chunk=chunk)))(x)
        assert_close(f"chunks of {chunk}", actual, expected, "float32")


@EVERY
def test_documents_are_as_if_each_were_alone(name):
    kind, config = RECURRENT[name]
    module, x = build(config), make_x(longest(kind))
    length, chunk = x.shape[1], FIXED.get(kind, CHUNK)
    borders = [0, 1, chunk, chunk + 3, 2 * chunk + 1, length]  # documents of 1, chunk - 1, ... tokens
    segments = np.zeros((BATCH, length), np.int32)
    for border in borders[1:-1]:
        segments[:, border:] += 1
    packed = jax.jit(lambda x, segments: module(x, Context(Tokens(segments=segments))))(x, jnp.asarray(segments))
    steps = jax.jit(lambda x: decode(module, x, length))
    for start, stop in itertools.pairwise(borders):
        alone = steps(np.pad(x[:, start:stop], ((0, 0), (0, length - stop + start), (0, 0))))[:, : stop - start]
        assert_close(f"document of {stop - start}", packed[:, start:stop], alone, "float32")


@EVERY
def test_padding_on_the_left_changes_nothing(name):
    kind, config = RECURRENT[name]
    module, pad = build(config), 5
    x = make_x(FIXED.get(kind, CHUNK) + pad + 3)
    mask = jnp.broadcast_to(jnp.arange(x.shape[1]) >= pad, x.shape[:2])
    padded = jax.jit(lambda x: module(x, Context(Tokens(mask=mask))))(x)
    assert_close("tokens", padded[:, pad:], jax.jit(lambda x: module(x))(x[:, pad:]), "float32")
