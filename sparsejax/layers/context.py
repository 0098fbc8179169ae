"""What a layer knows about a batch besides the residual stream."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from sparsejax.ops.selection import Selection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout (arXiv:1207.0580): zeroes an element with probability `rate`, else divides it by 1 - `rate`."""

    key: Key[Array, ""]
    rate: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "*b m"], *salts: int | Int[Array, ""]) -> Float[Array, "*b m"]:
        """Applies the mask that is determined by the key and the integers `salts`."""
        key = functools.reduce(jax.random.fold_in, salts, self.key)
        return jnp.where(jax.random.bernoulli(key, 1 - self.rate, x.shape), x / (1 - self.rate), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Facts about the tokens of a batch.

    Attributes:
      segments: Ids of the documents that are packed into a row. Tokens of different documents do not interact.
      positions: Positions of the tokens in their documents, for learned positions. Defaults to positions in the row.
      mask: False at padding. No query attends to padding, and padding leaves a recurrent state unchanged. In
        `Mixer.extend` padding follows the tokens of a row.
    """

    segments: Int[Array, "b t"] | None = None
    positions: Int[Array, "b t"] | None = None
    mask: Bool[Array, "b t"] | None = None

    @property
    def attend_segments(self) -> tuple[Int[Array, "b t"], Int[Array, "b t"]] | None:
        """Segment ids of queries and of keys, for `ops.attend`; the ids of padding equal no other id."""
        if self.mask is None:
            return None if self.segments is None else (self.segments, self.segments)
        ids = jnp.zeros(self.mask.shape, jnp.int32) if self.segments is None else self.segments
        return jnp.where(self.mask, ids, -1), jnp.where(self.mask, ids, -2)

    @property
    def starts(self) -> Bool[Array, "b t"] | None:
        """True where a document begins after the first position of a row: recurrent states are reset there."""
        if self.segments is None:
            return None
        changed = self.segments[:, 1:] != self.segments[:, :-1]
        return jnp.pad(changed, ((0, 0), (1, 0)))

    def count(self, shape: tuple[int, ...]) -> Int[Array, " b"]:
        """Number of tokens per row that are not padding, of an array of tokens of this shape."""
        return jnp.full(shape[0], shape[1]) if self.mask is None else self.mask.sum(axis=1)

    def zero_padding(self, x: Shaped[Array, "b t *features"]) -> Shaped[Array, "b t *features"]:
        """Sets `x` to zero at padding."""
        return x if self.mask is None else jnp.where(jnp.expand_dims(self.mask, range(2, x.ndim)), x, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Extras:
    """Inputs of particular modules; every other module ignores them.

    Attributes:
      globals: Positions of the global tokens of this batch, in any order, padded with -1. For `Attention`.
      rotations: Hash rotations instead of the ones that `Lsh` draws.
      layer: Index of the layer, from 0. For the decay rates of `Lightning`, and for dropout.
      embeddings: The residual stream before the first layer. For shared blocks.
      ids: Token ids. For experts by token id.
      shared: The `Shared` modules of the model, by name.
      dropout: Dropout of the current training step.
      choices: Number of choices per expert of this layer in the whole batch, of which the tokens are a microbatch.
        For the balance loss of `Experts`.
      selection: The keys that the last indexer before this layer selected. For mixers that reuse them.
      traced: Whether a layer returns its activations, see `Auxiliary`.
      measured: Whether a layer returns metrics of its selection, see `Auxiliary`.
    """

    globals: Int[Array, "b n"] | None = None
    rotations: Float[Array, "h d r n"] | None = None
    layer: Int[Array, ""] | None = None
    embeddings: Float[Array, "*b m"] | None = None
    ids: Int[Array, "b t"] | None = None
    shared: dict[str, Any] | None = None
    dropout: Dropout | None = None
    choices: Int[Array, " e"] | None = None
    selection: Selection | None = None
    traced: bool = dataclasses.field(default=False, metadata={"static": True})
    measured: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Facts about the tokens, and inputs of particular modules.

    They are separate because their contracts are. Every mixer must honor `tokens`: a mixer that ignores a mask or a
    document boundary is wrong. An entry of `extras` concerns only the module that documents it, so that a new entry
    leaves all other mixers correct.
    """

    tokens: Tokens = Tokens()
    extras: Extras = Extras()

    def with_extras(self, **extras: Any) -> Context:
        """Replaces the named fields of `extras`."""
        return dataclasses.replace(self, extras=dataclasses.replace(self.extras, **extras))

    def pass_on(self, selection: Selection | None) -> Context:
        """The context of the layers after one that selected these keys; unchanged if it selected none."""
        return self if selection is None else self.with_extras(selection=selection)

    def dropout(self, x: Float[Array, "*b m"], branch: int = 0) -> Float[Array, "*b m"]:
        """Applies dropout if there is any. The embedding and each branch of each layer have masks of their own."""
        if self.extras.dropout is None:
            return x
        return self.extras.dropout(x, 0 if self.extras.layer is None else self.extras.layer + 1, branch)


EMPTY = Context()
