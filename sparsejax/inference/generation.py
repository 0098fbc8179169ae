"""Generation: prompts are prefilled in chunks, then continued token by token from caches of fixed size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sparsejax import sharding
from sparsejax.errors import InputError
from sparsejax.inference.sampling import Sampling, row_keys, sample
from sparsejax.model import Cache, Functional

CHUNK = 512  # tokens of a prompt per call of the model; bounds the memory of the prefill
BLOCK = 32  # tokens per call of the compiled decoding loop
LEAST = 16  # tokens of the smallest bucket
NONE = -1  # token of a row that has ended

Parameters = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shapes of a generation. Each pair of a chunk and a length is compiled once per number of rows.

    Attributes:
      rows: Number of prompts.
      chunks: Tokens per call of the prefill.
      length: Tokens for which the caches are built.
    """

    rows: int
    chunks: tuple[int, ...]
    length: int

    @classmethod
    def build(cls, prompts: Sequence[int], tokens: int, limit: int | None = None, chunk: int = CHUNK) -> Plan:
        """Rounds the lengths of a generation up to buckets, of which there are four per octave.

        Args:
          prompts: Number of tokens per prompt.
          tokens: Number of tokens to generate.
          limit: Number of learned positions.
          chunk: Largest chunk.

        Raises:
          InputError: The tokens exceed the learned positions.
        """
        longest = max(prompts)
        inputs = longest + tokens - 1  # the last token is not an input
        if limit is not None and inputs > limit:
            raise InputError(
                "prompt",
                f"{longest:,} tokens and {tokens:,} to generate exceed the model's {limit:,} positions; shorten it, or"
                " generate fewer",
            )
        length = round_up(inputs, limit)
        whole, remainder = divmod(longest, chunk)
        chunks = (chunk,) * whole + ((min(round_up(remainder), chunk, length),) if remainder else ())
        return cls(len(prompts), chunks, length)

    def __str__(self) -> str:
        sizes = " + ".join(f"{self.chunks.count(size)} x {size}" for size in dict.fromkeys(self.chunks))
        return f"{self.rows} rows, chunks of {sizes} tokens, caches for {self.length} tokens"


def round_up(count: int, limit: int | None = None) -> int:
    """Returns the bucket of a number of tokens: the least multiple of an eighth of an octave that is not below it.

    `limit` bounds the bucket.
    """
    step = max(LEAST, 1 << (count - 1).bit_length()) // 8 if count > LEAST else LEAST
    bucket = -(-count // step) * step
    return bucket if limit is None else min(bucket, limit)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """State of a generation between two calls.

    Attributes:
      cache: The caches of the model.
      positions: Number of tokens in the caches per row.
      token: Last token per row, which is not in the caches.
      present: Whether a token of the vocabulary is in the row.
    """

    cache: Cache
    positions: Int[Array, " b"]
    token: Int[Array, " b"]
    present: Bool[Array, "b v"]


class Decoder:
    """Continues prompts of any lengths, each row at its own position.

    Args:
      model: The model. Its caches hold the keys that its patterns can still attend to, see `patterns.plan_cache`.
      parameters: Its parameters; sharded parameters shard the caches.
      prompts: Token ids per row, at least one.
      tokens: Number of tokens to generate per row.
      sampling: Settings of the samples.
      seeds: Seed per row; by default 0, 1, ... A row depends on its own seed and prompt only.
      ends: Ids that end a row. They are part of the generated tokens.
      chunk: Tokens of a prompt per call of the model.

    Attributes:
      plan: The shapes that are compiled.
      active: Whether each row continues, bool [b].
      ends: Ids that end a row.

    Raises:
      InputError: An argument is invalid, or the model is not causal.
    """

    def __init__(
        self,
        model: Functional,
        parameters: Parameters,
        prompts: Sequence[Any],
        tokens: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        seeds: Sequence[int] | None = None,
        ends: Collection[int] = (),
        chunk: int = CHUNK,
    ):
        if not model.config.causal:
            raise InputError("model.causal", "is false: the model is an encoder and cannot generate")
        if tokens < 1:
            raise InputError("tokens", f"{tokens} is below 1")
        self._prompts = [_check_prompt(prompt, model.config.vocab) for prompt in prompts]
        if not self._prompts:
            raise InputError("prompt", "there is none")
        seeds = range(len(self._prompts)) if seeds is None else seeds
        if len(seeds) != len(self._prompts) or not all(0 <= seed < 2**32 for seed in seeds):
            raise InputError("seeds", f"expected {len(self._prompts)} integers from 0 to 2 ** 32 - 1")
        limit = model.config.embedding.max_length
        self.plan = Plan.build([len(prompt) for prompt in self._prompts], tokens, limit, chunk)
        self._model, self._parameters, self._mesh = model, parameters, sharding.mesh_of(parameters)
        self._settings, self._keys = sampling.as_arrays(), row_keys(list(seeds))
        self.ends = frozenset(ends)
        width = -(-max(1, len(ends)) // 4) * 4  # few distinct shapes
        self._ends = np.array([*self.ends, *[NONE] * (width - len(self.ends))], np.int32)
        self._remaining = np.full(len(self._prompts), tokens)
        self.active = np.ones(len(self._prompts), bool)
        self._state: State | None = None

    def advance(self, count: int = BLOCK) -> np.ndarray:
        """Generates at most `count` tokens per row: ids [b, n], -1 in rows that have ended, n = 0 if all have.

        The first call prefills the prompts, and returns one token.
        """
        if not self.active.any():
            return np.zeros((len(self.active), 0), np.int32)
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            if self._state is None:
                state, logits = prefill(self._model, self._parameters, self._prompts, self.plan)
                self._state = _draw(self._mesh, state, logits, self._keys, self._settings)
                tokens = np.asarray(self._state.token)[:, None]
            else:
                count = min(count, BLOCK, int(self._remaining[self.active].max()))
                self._state, block, made = _decode(
                    self._model,
                    self.plan.length,
                    self._mesh,
                    self._parameters,
                    self._state,
                    self._keys,
                    self._settings,
                    self._ends,
                    np.where(self.active, self._remaining, 0).astype(np.int32),
                    np.int32(count),
                )
                tokens = np.asarray(block)[:, : int(made)]
        generated = (tokens != NONE).sum(axis=1)
        self._remaining = self._remaining - generated
        self.active = self.active & (self._remaining > 0) & ~np.isin(tokens, self._ends[self._ends != NONE]).any(axis=1)
        return tokens

    def stop(self, row: int) -> None:
        """Ends a row."""
        self.active[row] = False


def prefill(
    model: Functional, parameters: Parameters, prompts: Sequence[np.ndarray], plan: Plan
) -> tuple[State, Float[Array, "b v"]]:
    """Reads prompts in chunks; returns the state after them, and the logits of the next token of each row."""
    counts = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(counts), sum(plan.chunks)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    state, logits = _start(model, plan.length, len(counts), parameters), None
    for start, stop in itertools.pairwise(np.cumsum([0, *plan.chunks])):
        inside = np.clip(counts - start, 0, stop - start).astype(np.int32)
        state, logits = _extend(model, plan.length, parameters, state, logits, tokens[:, start:stop], inside)
    assert logits is not None
    return state, logits


def generate(
    model: Functional, parameters: Parameters, prompts: Sequence[Any], tokens: int, **options: Any
) -> list[np.ndarray]:
    """Continues prompts, and returns the generated ids per row; see `Decoder` for the arguments."""
    decoder = Decoder(model, parameters, prompts, tokens, **options)
    blocks = list(iterate(decoder))
    return [row[row != NONE] for row in np.concatenate(blocks, axis=1)]


def iterate(decoder: Decoder, count: int = BLOCK) -> Iterator[np.ndarray]:
    """Iterates over the blocks of tokens of `Decoder.advance` until all rows have ended."""
    while decoder.active.any():
        yield decoder.advance(count)


def _check_prompt(prompt: Any, vocab: int) -> np.ndarray:
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or not tokens.size:
        raise InputError("prompt", f"shape {list(tokens.shape)}: expected at least one token per row")
    if not np.issubdtype(tokens.dtype, np.integer) or not 0 <= tokens.min() <= tokens.max() < vocab:
        raise InputError("prompt", f"ids from {tokens.min()} to {tokens.max()} are not integers in [0, {vocab})")
    return tokens.astype(np.int32)


def _replicate(mesh: Mesh | None, x: Array) -> Array:
    """Replicates an array that the host reads."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding.replicated(mesh))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(model: Functional, length: int, rows: int, parameters: Parameters) -> State:
    zeros = jnp.zeros(rows, jnp.int32)
    cache = model.bind(parameters).init_cache(rows, length)
    return State(cache, zeros, zeros, jnp.zeros((rows, model.config.vocab), bool))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _extend(
    model: Functional,
    length: int,
    parameters: Parameters,
    state: State,
    logits: Array | None,
    tokens: Array,
    counts: Array,
) -> tuple[State, Array]:
    """Reads a chunk of the prompts; the logits are those after the last token of each row."""
    read, cache = model.bind(parameters).extend(tokens, state.cache, state.positions, length, counts, last=True)
    logits = read if logits is None else jnp.where(counts[:, None] > 0, read, logits)
    rows = jnp.arange(len(counts))[:, None]
    is_token = jnp.arange(tokens.shape[1]) < counts[:, None]
    present = state.present.at[rows, tokens].max(is_token)
    return State(cache, state.positions + counts, state.token, present), logits


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _draw(mesh: Mesh | None, state: State, logits: Array, keys: Array, settings: dict[str, Any]) -> State:
    token = _replicate(mesh, sample(logits, keys, state.positions, state.present, settings))
    present = state.present.at[jnp.arange(len(token)), token].set(True)
    return dataclasses.replace(state, token=token, present=present)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(
    model: Functional,
    length: int,
    mesh: Mesh | None,
    parameters: Parameters,
    state: State,
    keys: Array,
    settings: dict[str, Any],
    ends: Array,
    remaining: Array,
    count: Array,
) -> tuple[State, Array, Array]:
    """Generates tokens until all rows have ended, at most `count`; returns them [b, BLOCK] and their number."""
    bound = model.bind(parameters)
    rows = jnp.arange(len(remaining))

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, remaining, block, step = carry
        active = remaining > 0
        logits, cache = bound.extend(
            state.token[:, None], state.cache, state.positions, length, active.astype(jnp.int32), last=True
        )
        positions = state.positions + active
        token = sample(logits, keys, positions, state.present, settings)
        token = jnp.where(active, token, state.token)
        block = block.at[:, step].set(jnp.where(active, token, NONE))
        is_end = (token[:, None] == ends).any(axis=1)
        state = State(cache, positions, token, state.present.at[rows, token].set(True))
        return state, jnp.where(is_end, 0, remaining - active), block, step + 1

    def proceeds(carry: tuple[Any, ...]) -> Array:
        _, remaining, _, step = carry
        return (step < count) & (remaining > 0).any()

    block = jnp.full((len(remaining), BLOCK), NONE, jnp.int32)
    state, _, block, step = jax.lax.while_loop(proceeds, advance, (state, remaining, block, jnp.int32(0)))
    return state, _replicate(mesh, block), _replicate(mesh, step)
