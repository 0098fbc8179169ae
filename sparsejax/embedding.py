"""The two ends of a model: from tokens to the residual stream, and from the stream to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsejax.config import ModelConfig
from sparsejax.errors import InputError
from sparsejax.layers import ACTIVATIONS, Linear, Stream, make_norm, normalize, parameter


class Embedding(nnx.Module):
    """Scaled token embeddings plus type and learned positions, normalized; see `EmbeddingConfig`."""

    def __init__(self, config: ModelConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.dtype = config.embedding, stream.dtype
        init = jax.nn.initializers.normal(config.width**-0.5)

        def table(rows: int, axes: tuple[str | None, str] = (None, "width")) -> nnx.Param:
            return parameter(rngs, init, (rows, config.width), axes)

        self.tokens = table(config.vocab, ("vocab", "width"))
        self.types = table(self.config.types) if self.config.types else None
        self.positions = table(self.config.positions) if self.config.positions else None
        axial = self.config.axial
        sizes = zip(axial.shape, axial.widths, strict=True) if axial else ()
        self.axial = nnx.List([parameter(rngs, init, size, (None, None)) for size in sizes])
        self.norm = make_norm(self.config.norm, config.width, rngs)

    def __call__(self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"] | None = None) -> Float[Array, "b t m"]:
        """Returns the residual stream before the first layer.

        Args:
          tokens: Token ids.
          positions: Positions of the tokens in their documents; defaults to positions in the row.

        Raises:
          InputError: There are more tokens than learned positions, or a token id is outside the vocabulary.
        """
        self.check_tokens(tokens, tokens.shape[1])
        start = self.config.padding
        if positions is not None:
            return self._embed(tokens, positions if start is None else positions + start + 1)
        if start is None:
            return self._embed(tokens, jnp.arange(tokens.shape[1]))
        real = tokens != start
        return self._embed(tokens, start + jnp.cumsum(real, axis=1) * real)

    def check_tokens(self, tokens: Int[Array, " ..."], length: int) -> None:
        """Checks ids and a length, as far as their values are known: arrays that JAX traces have none.

        Raises:
          InputError: `length` tokens have no positions, or an id is outside the vocabulary.
        """
        limit, vocab = self.config.max_length, self.tokens.shape[0]
        if limit is not None and length > limit:
            raise InputError("tokens", f"{length} tokens exceed the model's {limit} positions")
        if isinstance(tokens, jax.core.Tracer) or not tokens.size:
            return
        ids = np.asarray(tokens)  # concrete under a trace, where operations of JAX are not
        if not 0 <= ids.min() <= ids.max() < vocab:
            raise InputError("tokens", f"ids from {ids.min()} to {ids.max()} are not in [0, {vocab})")

    def extend(self, tokens: Int[Array, "b c"], positions: Int[Array, " b"]) -> Float[Array, "b c m"]:
        """Returns the embedding of the next tokens, the first of which are at `positions`; none of them is padding."""
        at = positions[:, None] + jnp.arange(tokens.shape[1])
        return self._embed(tokens, at if self.config.padding is None else at + self.config.padding + 1)

    def _embed(self, tokens: Array, positions: Array) -> Array:
        x = self.tokens[...].astype(self.dtype)[tokens]
        x = x if self.config.scale == 1 else x * jnp.asarray(self.config.scale, self.dtype)
        if self.types is not None:
            x = x + self.types[...].astype(self.dtype)[0]
        if self.positions is not None:
            x = x + self.positions[...].astype(self.dtype)[positions]
        if self.config.axial is not None:
            indices = jnp.divmod(positions, self.config.axial.shape[1])
            parts = [table[...].astype(self.dtype)[index] for table, index in zip(self.axial, indices, strict=True)]
            x = x + jnp.concatenate(parts, axis=-1)
        return normalize(self.norm, x)


class Head(nnx.Module):
    """Logits from the output of the last norm; see `HeadConfig`."""

    def __init__(self, config: ModelConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.dtype = config.head, stream.dtype
        m, inputs = config.width, config.width * (2 if config.reversible else 1)

        def project() -> Linear:
            return Linear(m, m, ("width", None), dtype=stream.dtype, rngs=rngs, bias=self.config.linear_bias)

        self.linear = None if self.config.activation is None else project()
        self.norm = make_norm(self.config.norm, m, rngs)
        init, shape = jax.nn.initializers.normal(inputs**-0.5), (inputs, config.vocab)
        self.weight = None if config.tied else parameter(rngs, init, shape, ("width", "vocab"), decay=True)
        zeros = jax.nn.initializers.zeros
        self.bias = parameter(rngs, zeros, (config.vocab,), ("vocab",)) if self.config.bias else None

    def __call__(self, x: Float[Array, "*b m"], embedding: Float[Array, "v w"]) -> Float[Array, "*b v"]:
        """Returns logits in float32; `embedding` is the token table, which tied heads use transposed."""
        if self.linear is not None and self.config.activation is not None:
            x = ACTIVATIONS[self.config.activation](self.linear(x))
        x = normalize(self.norm, x)
        weight = embedding.T if self.weight is None else self.weight[...]
        # Multiplied in the dtype of the stream, but accumulated in float32: rounded logits would affect the loss.
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        logits = jnp.matmul(x, weight.astype(self.dtype), preferred_element_type=dtype)
        logits = logits if self.bias is None else logits + self.bias[...]
        logits = logits if self.config.scale == 1 else logits * self.config.scale
        softcap = self.config.softcap
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def mean_pool(x: Float[Array, "b t m"], mask: Bool[Array, "b t"] | None) -> Float[Array, "b t m"]:
    """Returns at every position the mean over all positions, or over those where `mask` is true, summed in float32."""
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
    total = jnp.where(mask[..., None], x.astype(jnp.float32), 0).sum(axis=1)
    mean = total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return jnp.broadcast_to(mean[:, None], x.shape).astype(x.dtype)
