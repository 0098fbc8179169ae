"""An indexer: a small scorer that learns which keys an attention needs, as an option of attention mixers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.caching import add_to_blocks, write_slots
from sparsejax.layers.context import Context, Tokens
from sparsejax.layers.norm import NormConfig, make_norm, normalize
from sparsejax.layers.protocols import Auxiliary
from sparsejax.layers.rotary import RopeConfig, rotate
from sparsejax.layers.stream import Cost, Linear, Stream
from sparsejax.ops import (
    Index,
    Selection,
    attention_flops,
    indexer_divergence,
    measure_selection,
    select_indexed,
)
from sparsejax.ops.blocks import Blocks, make_blocks
from sparsejax.ops.selectors import block_means
from sparsejax.patterns import Pattern

LOSS = "indexer"  # name of the auxiliary loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """An indexer: a query attends only to the `top_k` keys, or blocks of keys, with the highest scores.

    The score of a key is the sum over index heads of weight · relu(query · key). Gradients do not flow through the
    selection, and the indexer reads the stream without a gradient: it learns from its loss alone. Of equal scores the
    lower position wins. Blocks are counted from the start of each document.

    The defaults are the lightning indexer of DeepSeek-V3.2-Exp (arXiv:2512.02556). Others:

    | | `weights` | `relu` | `block` | `scope` | `pool` | `local` |
    |---|---|---|---|---|---|---|
    | DeepSeek-V3.2-Exp | true | true | 1 | all | | |
    | MiniMax-M3 (MSA) | false | false | 128 | kv_head | scores | 1 |
    | Qwen4 (QSA) | false | true | 4 | all | keys | |
    """

    heads: int  # number of index query heads
    width: int  # width of an index query or key, whose first features are rotated
    top_k: int  # number of selected blocks per query
    block: int = 1  # keys per block
    # "all" heads share the selection; "kv_head": each index head selects for a key/value head
    scope: str = "all"
    # how a block is scored: by the largest of the "scores" of its keys, or by the mean of its "keys" before their norm;
    # with "keys" only whole blocks compete, and the last keys that fill none are selected besides
    pool: str = "scores"
    local: int = 0  # last blocks, with that of the query, that are always selected; they count among top_k
    weights: bool = True  # weigh the index heads by a linear map of the stream
    relu: bool = True  # count products below 0 as 0
    interleaved: bool = False  # rotate the pairs (2i, 2i + 1) instead of halves (GLM-5)
    norm_eps: float = 1e-6  # eps of the LayerNorm on keys
    norm: NormConfig | None = None  # norm of keys and queries instead of the LayerNorm on keys; none for the latter
    loss_weight: float = 0.0  # weight of the divergence of the scores from the attention; 0: the indexer does not learn
    dense: bool = False  # attend to all keys, which the loss then covers: the warm-up of the indexer
    # use the selection of the last indexer before this layer, with the same top_k and block, and no parameters (GLM-5)
    shared: bool = False

    def __post_init__(self):
        require_at_least(self, 1, "heads", "width", "top_k", "block")
        require_at_least(self, 0, "local", "loss_weight")
        require_choice(self, "scope", ("all", "kv_head"))
        require_choice(self, "pool", ("scores", "keys"))
        if self.pool == "keys" and self.block == 1:
            raise InputError("pool", "'keys' averages the keys of a block, but block = 1; use 'scores'")
        if self.pool == "keys" and self.local:
            raise InputError("local", f"{self.local} applies to pool = 'scores' only")
        if self.shared and self.loss_weight:
            raise InputError("loss_weight", "a shared selection has no indexer in this layer to train; set it to 0")
        if self.local > self.top_k:
            raise InputError("local", f"{self.local} is above top_k = {self.top_k}, among which they count")
        if self.scope == "kv_head" and self.weights:
            raise InputError("weights", "they add up the heads, which scope = 'kv_head' keeps apart; set false")

    @property
    def summary(self) -> str:
        """What is chosen, in a few words."""
        groups = "" if self.block == 1 else f" blocks of {self.block}"
        return f"top {self.top_k}{groups}" + ", shared" * self.shared + ", dense" * self.dense

    def attended(self, length: int) -> int:
        """Number of keys that the queries of a sequence attend to, an upper bound."""
        t = np.arange(length)
        if self.dense:
            return int((t + 1).sum())
        kept = self.top_k * self.block
        if self.local:  # the block of the query has fewer keys
            kept = (self.top_k - 1) * self.block + t % self.block + 1
        elif self.pool == "keys":
            kept = kept + (t + 1) % self.block
        return int(np.minimum(t + 1, kept).sum())

    def check(self, length: int, kv_heads: int) -> None:
        """Raises InputError if the indexer cannot run on `length` tokens of an attention with `kv_heads`."""
        if self.block > length:
            raise InputError("block", f"{self.block} is above the {length} tokens of a sequence")
        if self.loss_weight and self.top_k * self.block >= length:
            keys = f"top_k = {self.top_k}" + ("" if self.block == 1 else f" blocks of {self.block}")
            raise InputError(
                "loss_weight", f"{keys} leaves out none of {length} tokens, so that the loss has no use; lower top_k"
            )
        if self.scope == "kv_head" and self.heads != kv_heads:
            raise InputError("heads", f"{self.heads} differs from the {kv_heads} key/value heads of scope = 'kv_head'")


def indexed_cost(
    config: IndexerConfig,
    indexer: Indexer | None,
    dense: Cost,
    length: int,
    *,
    heads: int,
    score_width: int,
    value_width: int,
) -> Cost:
    """Cost of attention to the keys of an indexer, with that of the indexer, if the layer has it.

    Args:
      config: The indexer.
      indexer: Its module; None if its selection is shared.
      dense: Cost of attention to all keys, for its tiles.
      length: Number of tokens.
      heads: Query heads of the attention.
      score_width: Width of a query and a key of the attention.
      value_width: Width of a value of the attention.
    """
    pairs = heads * config.attended(length)
    cost = Cost(pairs, attention_flops(pairs, score_width, value_width) / max(length, 1), dense.tiles)
    return cost if indexer is None else cost + indexer.cost(length, heads=heads, score_width=score_width)


class Scorer(nnx.Module):
    """What indexers share: the loss and the metrics of a selection, from the attention that it serves."""

    config: Any  # with the fields `loss_weight` and `dense`

    def loss(
        self,
        index: Index,
        selection: Selection,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b s g d"],
        pattern: Pattern,
        tokens: Tokens,
        **options: Any,
    ) -> Float[Array, ""]:
        """The divergence of the scores from the attention, a mean over the tokens of the batch.

        It is over the selected keys, or over all keys if attention is dense. `options` are those of
        `ops.indexer_divergence`; the segments default to those of the tokens.
        """
        options = {"segments": tokens.attend_segments} | options
        chosen = None if self.config.dense else selection
        divergence = indexer_divergence(index, q, k, pattern, chosen, **options)
        return tokens.zero_padding(divergence).sum() / jnp.maximum(tokens.count(divergence.shape).sum(), 1)

    def auxiliary(self, *attention: Any, **options: Any) -> Auxiliary:
        """What a mixer returns besides its output; the arguments are those of `loss`."""
        if not self.config.loss_weight:
            return Auxiliary({})
        return Auxiliary({LOSS: self.config.loss_weight * self.loss(*attention, **options)})

    def measure(
        self,
        index: Index,
        selection: Selection,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b s g d"],
        pattern: Pattern,
        tokens: Tokens,
        *,
        scale: float,
        **options: Any,
    ) -> dict[str, Float[Array, ""]]:
        """Metrics of the selection, and the divergence; the arguments are those of `loss`."""
        compared = {name: options[name] for name in ("segments", "positions") if name in options}
        compared = {"segments": tokens.attend_segments, "scale": scale} | compared
        metrics = measure_selection(selection, q, k, pattern, **compared)._asdict()
        return metrics | {"kl": self.loss(index, selection, q, k, pattern, tokens, scale=scale, **options)}

    def _cost(self, length: int, linear: float, scored: int, compared: int, teacher: float) -> Cost:
        """The cost over `length` tokens.

        The loss has the scores of the attention, forward only, and those of the index that are compared with them.

        Args:
          length: Number of tokens.
          linear: FLOPs of the projections per token.
          scored: Pairs of a query and a key of the index that are scored for the selection, per index head.
          compared: Such pairs in the loss.
          teacher: FLOPs of the scores of the attention in the loss.
        """
        config, loss = self.config, 0.0
        pairs, tokens = config.heads * scored, max(length, 1)
        if config.loss_weight:
            loss = (teacher + 3 * attention_flops(config.heads * compared, config.width, 0)) / tokens
        if config.dense:  # only the loss needs the index
            return Cost(0, 0.0, loss_flops=loss + 3 * linear * bool(config.loss_weight))
        flops = linear + attention_flops(pairs, config.width, 0) / tokens
        return Cost(0, flops, loss_flops=loss, index_pairs=pairs, index_flops=flops)


class Indexer(Scorer):
    """The indexer of an attention mixer.

    Args:
      config: The indexer.
      rope: Rotary positions of index queries and keys; None for no rotation.
      rope_width: Number of features that are rotated.
      stream: The residual stream.
      rngs: Random keys.
      inputs: Width of the inputs of the queries; defaults to that of the stream.
    """

    def __init__(
        self,
        config: IndexerConfig,
        rope: RopeConfig | None,
        rope_width: int,
        stream: Stream,
        rngs: nnx.Rngs,
        inputs: int | None = None,
    ):
        self.config, self.rope_width = config, rope_width
        self.rope = None if rope is None else dataclasses.replace(rope, interleaved=config.interleaved, fraction=1.0)

        def linear(inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> Linear:
            return Linear(inputs, outputs, axes, dtype=stream.dtype, rngs=rngs)

        self.queries = linear(inputs or stream.width, config.heads * config.width, (None, "heads"))
        self.keys = linear(stream.width, config.width, ("width", None))
        norm = config.norm or NormConfig(kind="layer", eps=config.norm_eps)
        self.key_norm = make_norm(norm, config.width, rngs, axis=None)
        self.query_norm = make_norm(config.norm, config.width, rngs, axis=None)
        self.weights = linear(stream.width, config.heads, ("width", None)) if config.weights else None

    def choose(
        self, x: Float[Array, "b t m"], inputs: Float[Array, "b t r"], pattern: Pattern, tokens: Tokens
    ) -> tuple[Selection, Index]:
        """Selects keys for a whole sequence; returns the index too.

        Args:
          x: The stream.
          inputs: Inputs of the queries.
          pattern: The allowed keys.
          tokens: Facts about the tokens.
        """
        x, inputs = jax.lax.stop_gradient((x, inputs))
        positions, segments = jnp.arange(x.shape[1]), tokens.attend_segments
        blocks = make_blocks(x.shape[1], self.config.block, None if segments is None else segments[1])
        k, at = self.keys(x), positions
        if self.config.pool == "keys":
            k = block_means(k[:, :, None], blocks)[:, :, 0].astype(k.dtype)
            at = jnp.broadcast_to(blocks.starts, k.shape[:2])
        index = self._index(x, inputs, positions, self._encode_keys(k, at))
        return self._select(index, blocks, pattern, segments=segments), index

    def loss(self, index: Index, selection: Selection, *attention: Any, **options: Any) -> Float[Array, ""]:
        """The divergence of the scores from the attention, see `Scorer.loss`; of mean keys over whole blocks."""
        blocks = selection.blocks if self.config.pool == "keys" else None
        return super().loss(index, selection, *attention, blocks=blocks, **options)

    def auxiliary(self, index: Index, selection: Selection, *attention: Any, **options: Any) -> Auxiliary:
        """What a mixer returns besides its output, see `Scorer.auxiliary`; with the selection, unless it is dense."""
        auxiliary = super().auxiliary(index, selection, *attention, **options)
        return auxiliary._replace(selection=None if self.config.dense else selection)

    def init_cache(self, batch: int, slots: int) -> Float[Array, "b n width"]:
        """Returns an empty cache: a key per slot, or a float32 sum of keys per block."""
        if self.config.pool == "keys":
            return jnp.zeros((batch, -(-slots // self.config.block), self.config.width), jnp.float32)
        return jnp.zeros((batch, slots, self.config.width), self.keys.dtype)

    def extend(
        self,
        x: Float[Array, "b c m"],
        inputs: Float[Array, "b c r"],
        cache: Float[Array, "b n width"],
        positions: tuple[Int[Array, "b c"], Int[Array, "b s"]],
        length: int,
        pattern: Pattern,
        tokens: Tokens,
    ) -> tuple[Selection, Float[Array, "b n width"]]:
        """Selects keys for the next tokens; returns the cache after them too.

        Args:
          x: The stream of the chunk.
          inputs: Inputs of the queries.
          cache: The cache before the chunk.
          positions: Positions of the tokens, and of the keys in the cache of the attention, which are in order.
          length: Length of the sequence that the pattern describes.
          pattern: The allowed keys.
          tokens: Facts about the chunk.
        """
        (at, keys_at), k = positions, self.keys(x)
        blocks = make_blocks(keys_at.shape[1], self.config.block)
        if self.config.pool == "scores":
            cache = keys = write_slots(cache, self._encode_keys(k, at), at, tokens)
        else:
            cache = add_to_blocks(cache, k, at, self.config.block, tokens)
            means = (cache / self.config.block).astype(k.dtype)  # of whole blocks; the others are not read
            keys = self._encode_keys(means, jnp.broadcast_to(blocks.starts, means.shape[:2]))
        index = self._index(x, inputs, at, keys)
        return self._select(index, blocks, pattern, positions=positions, length=length), cache

    def cost(self, length: int, *, heads: int, score_width: int) -> Cost:
        """Cost of the projections and of scoring every earlier key or whole block, and of the loss.

        Args:
          length: Number of tokens.
          heads: Query heads of the attention.
          score_width: Width of a query and a key of the attention.
        """
        config, t = self.config, np.arange(length)
        linear = sum(projection.flops for projection in (self.queries, self.keys, self.weights) if projection)
        scored = (t + 1) // config.block if config.pool == "keys" else t + 1
        attended = compared = config.attended(length)
        if config.pool == "keys":
            compared = int((scored if config.dense else np.minimum(scored, config.top_k)).sum())
        teacher = attention_flops(heads * attended, score_width, 0)
        return self._cost(length, linear, int(scored.sum()), compared, teacher)

    def _select(self, index: Index, blocks: Blocks, pattern: Pattern, **options: Any) -> Selection:
        options |= {"blocks": blocks, "local": self.config.local, "has_block_keys": self.config.pool == "keys"}
        return select_indexed(index, self.config.top_k, pattern, **options)

    def _index(self, x: Array, inputs: Array, at: Array, k: Array) -> Index:
        q = self.queries(inputs).reshape(*x.shape[:2], self.config.heads, -1)
        weights = None if self.weights is None else self.weights(x) * self.config.heads**-0.5
        q = self._rotate(normalize(self.query_norm, q), at)
        return Index(q, k, weights, self.config.relu, self.config.scope == "kv_head")

    def _encode_keys(self, k: Array, positions: Array) -> Array:
        return self._rotate(normalize(self.key_norm, k)[:, :, None], positions)[:, :, 0]

    def _rotate(self, x: Array, positions: Array) -> Array:
        if self.rope is None:
            return x
        pe, nope = jnp.split(x, [self.rope_width], axis=-1)
        return jnp.concatenate([rotate(pe, positions, self.rope), nope], axis=-1)


def make_indexer(config: IndexerConfig | None, *arguments: Any, **options: Any) -> Indexer | None:
    """Builds an `Indexer`, unless there is none in this layer."""
    return None if config is None or config.shared else Indexer(config, *arguments, **options)


def reuse_selection(context: Context) -> Selection:
    """The selection of the last indexer before this layer.

    Raises:
      InputError: There is none.
    """
    if context.extras.selection is None:
        raise InputError("indexer.shared", "no layer before this one selects keys")
    return context.extras.selection
