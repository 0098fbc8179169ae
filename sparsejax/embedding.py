"""The two ends of a model: from tokens to the stream, and from the stream to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsejax.config import ModelConfig
from sparsejax.layers import ACTIVATIONS, Linear, Norm, Stream, parameter


class Embedding(nnx.Module):
    """Token embeddings, scaled; plus type and learned positions; normalised: see `EmbeddingConfig`."""

    def __init__(self, config: ModelConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.dtype = config.embedding, stream.dtype
        init = jax.nn.initializers.normal(config.width**-0.5)

        def table(rows: int, axes: tuple[str | None, str]) -> nnx.Param | None:
            return parameter(rngs, init, (rows, config.width), axes) if rows else None

        self.tokens = table(config.vocab, ("vocab", "width"))
        self.types = table(self.config.types, (None, "width"))
        self.positions = table(self.config.positions, (None, "width"))
        axial = self.config.axial
        sizes = zip(axial.shape, axial.widths, strict=True) if axial else ()
        self.axial = nnx.List([parameter(rngs, init, size, (None, None)) for size in sizes])
        self.norm = None if self.config.norm is None else Norm(self.config.norm, config.width, rngs)

    def __call__(self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"] | None = None) -> Float[Array, "b t m"]:
        """The stream before the first layer.

        Args:
          tokens: token ids.
          positions: of the tokens in their documents; None: their places in the row.

        Raises:
          ValueError: more tokens than there are learned positions.
        """
        start, axial = self.config.padding, self.config.axial
        rows = self.config.positions if axial is None else axial.length
        if rows and tokens.shape[1] + (0 if start is None else start + 1) > rows:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the {rows} positions that the model has")
        if positions is not None:
            return self._embed(tokens, positions if start is None else positions + start + 1)
        if start is None:
            return self._embed(tokens, jnp.arange(tokens.shape[1]))
        real = tokens != start
        return self._embed(tokens, start + jnp.cumsum(real, axis=1) * real)

    def step(self, tokens: Int[Array, " b"], position: Int[Array, ""]) -> Float[Array, "b m"]:
        """The embedding of one token, at `position`; padding has no place in a step."""
        return self._embed(tokens, position if self.config.padding is None else position + self.config.padding + 1)

    def _embed(self, tokens: Array, positions: Array) -> Array:
        x = self.tokens[...].astype(self.dtype)[tokens]
        x = x if self.config.scale == 1 else x * jnp.asarray(self.config.scale, self.dtype)
        if self.types is not None:
            x = x + self.types[...].astype(self.dtype)[0]
        if self.positions is not None:
            x = x + self.positions[...].astype(self.dtype)[positions]
        if self.config.axial is not None:
            places = jnp.divmod(positions, self.config.axial.shape[1])
            parts = [table[...].astype(self.dtype)[at] for table, at in zip(self.axial, places, strict=True)]
            x = x + jnp.concatenate(parts, axis=-1)
        return x if self.norm is None else self.norm(x)


class Head(nnx.Module):
    """Logits from the last norm's output: see `HeadConfig`."""

    def __init__(self, config: ModelConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.dtype = config.head, stream.dtype
        m, inputs = config.width, config.width * (2 if config.reversible else 1)

        def project() -> Linear:
            return Linear(m, m, ("width", None), dtype=stream.dtype, rngs=rngs, bias=self.config.linear_bias)

        self.linear = None if self.config.activation is None else project()
        self.norm = None if self.config.norm is None else Norm(self.config.norm, m, rngs)
        init = jax.nn.initializers.normal(inputs**-0.5)
        self.weight = None if config.tied else parameter(rngs, init, (inputs, config.vocab), ("width", "vocab"))
        zeros = jax.nn.initializers.zeros
        self.bias = parameter(rngs, zeros, (config.vocab,), ("vocab",)) if self.config.bias else None

    def __call__(self, x: Float[Array, "*b m"], embedding: Float[Array, "v m"]) -> Float[Array, "*b v"]:
        """Logits in float32; `embedding` is the tokens' table, for heads that are tied to it."""
        if self.linear is not None:
            x = ACTIVATIONS[self.config.activation](self.linear(x))
        if self.norm is not None:
            x = self.norm(x)
        weight = embedding.T if self.weight is None else self.weight[...]
        # Multiplied in the stream's dtype, but summed and kept in float32: the loss would feel the rounding.
        logits = jnp.matmul(x, weight.astype(self.dtype), preferred_element_type=jnp.float32)
        logits = logits if self.bias is None else logits + self.bias[...]
        logits = logits if self.config.scale == 1 else logits * self.config.scale
        cap = self.config.softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def average(x: Float[Array, "b t m"], mask: Bool[Array, "b t"] | None) -> Float[Array, "b t m"]:
    """At every position the mean over all of them, or over those where `mask` is true; summed in float32."""
    weights = jnp.ones(x.shape[:2]) if mask is None else mask.astype(jnp.float32)
    total = jnp.einsum("btm,bt->bm", x.astype(jnp.float32), weights)
    mean = total / jnp.maximum(weights.sum(1, keepdims=True), 1)
    return jnp.broadcast_to(mean[:, None], x.shape).astype(x.dtype)
