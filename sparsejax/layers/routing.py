"""Routing attention: a query attends to tokens of its cluster of online k-means."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsejax import patterns
from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.caching import chunk_positions, write_slots
from sparsejax.layers.context import EMPTY, Context, Tokens
from sparsejax.layers.protocols import AttendingConfig, Auxiliary, Cache, Mixer, implementation_names
from sparsejax.layers.rotary import RopeConfig, rotate
from sparsejax.layers.stream import Cost, Linear, Stream, output_scale, parameter
from sparsejax.ops import AttentionCall, Selection, attend, attention_flops, choose, measure_selection, route
from sparsejax.ops.call import SelectedCall, selected_call
from sparsejax.ops.routing import (
    attend_balanced,
    balanced_members,
    commitment,
    normalize_vectors,
    prefer_others,
    sum_clusters,
    update_centroids,
)
from sparsejax.ops.selection import selection_of
from sparsejax.ops.selectors import nearest_centroid


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConfig(AttendingConfig):
    """Attention to the last `members` tokens of the cluster of a query, itself included.

    The cluster of a token is that of the centroid nearest to its key, before the rotation, by angle. Centroids are no
    weights: after every training step they move toward the mean of their members, as in the Routing Transformer
    (arXiv:2003.05997). The query heads of a key/value head share clusters.

    With `shared` the key of a token is its query, divided by its length, as in the paper for causal attention, so that
    queries that are alike share a cluster. A query attends to itself only if no other of the last `members` tokens of
    its cluster is left.

    With `balanced` each cluster has the `members` tokens nearest to its centroid, as in the paper. Their choice reads
    the whole sequence, so that this form is not causal.
    """

    heads: int  # number of query heads
    kv_heads: int  # number of key/value heads, which divides heads
    head_width: int  # width of queries, keys and values per head
    clusters: int  # clusters per key/value head
    members: int  # tokens that a query attends to
    rope: RopeConfig | None  # rotary positions; none for no rotation
    impl: str = dataclasses.field(default="auto", metadata={"resume": "rounding"})  # implementation of `ops.attend`
    rate: float = 1e-3  # share of the mean of a step in a centroid
    commitment: float = 1e-4  # weight of the mean squared distance of keys from their centroids
    shared: bool = False  # use queries as keys; requires kv_heads = heads
    balanced: bool = False  # give each cluster the tokens nearest to its centroid in the whole sequence
    causal: bool = True  # attend to no later token

    def __post_init__(self):
        require_at_least(self, 1, "heads", "kv_heads", "head_width", "clusters", "members")
        require_at_least(self, 0, "rate", "commitment")
        require_choice(self, "impl", implementation_names())
        if self.rate > 1:
            raise InputError("rate", f"{self.rate} is above 1")
        if self.heads % self.kv_heads:
            raise InputError("heads", f"{self.heads} is not divisible by kv_heads = {self.kv_heads}")
        if self.shared and self.heads != self.kv_heads:
            raise InputError("shared", f"true requires kv_heads = heads, not {self.kv_heads} and {self.heads}")
        if self.rope is not None:
            self.rope.width(self.head_width)
        if not self.causal and not self.balanced:
            raise InputError("causal", "false requires balanced: the last members of a cluster are causal")

    @property
    def summary(self) -> str:
        """Kind and sizes, in a few words."""
        form = "shared QK, " * self.shared + "balanced " * self.balanced
        sizes = f"{self.heads}/{self.kv_heads} x {self.head_width}"
        return f"routing {sizes}, {form}{self.clusters} clusters of {self.members}"

    @property
    def connectivity(self) -> patterns.Pattern:
        """The positions that a position can read from under some clusters."""
        return patterns.Causal() if self.causal else patterns.Full()

    @property
    def scale(self) -> float:
        """Factor on the product of a query and a key."""
        return 1.0 if self.shared else self.head_width**-0.5

    @property
    def selects(self) -> bool:
        """Clusters choose the keys."""
        return True

    @property
    def leaks(self) -> str:
        """Balanced clusters depend on later tokens."""
        return "later tokens change the members of balanced clusters" if self.balanced and self.causal else ""

    def update_state(self, parameters: dict[str, Any], statistics: dict[str, Array]) -> dict[str, Any]:
        """Moves the centroids."""
        moved = update_centroids(parameters["centroids"], statistics["sums"], self.rate)
        return parameters | {"centroids": moved}


class Routing(Mixer):
    """Routing attention."""

    def __init__(self, config: RoutingConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.pattern = config, patterns.Causal()
        m, d = stream.width, config.head_width

        def project(heads: int) -> Linear:
            return Linear(m, heads * d, ("width", "heads"), dtype=stream.dtype, rngs=rngs)

        self.query, self.value = project(config.heads), project(config.kv_heads)
        self.key = None if config.shared else project(config.kv_heads)
        self.out = Linear(
            config.heads * d, m, ("heads", "width"), dtype=stream.dtype, rngs=rngs, scale=output_scale(stream)
        )

        def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return normalize_vectors(jax.random.normal(key, shape, dtype))

        self.centroids = parameter(rngs, draw, (config.kv_heads, config.clusters, d), (None, None, None))

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> Float[Array, "b t m"]:
        """Mixes a whole sequence."""
        return self.mix(x, context)[0]

    def mix(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Auxiliary]:
        """Mixes a whole sequence; returns the loss "commitment" and the sums of the clusters.

        Raises:
          InputError: There are run-time globals, which routing attention does not support.
        """
        if context.extras.globals is not None:
            raise InputError("globals", "routing attention does not support run-time globals")
        config, tokens, (b, t, _) = self.config, context.tokens, x.shape
        routed, q, k, v = self._project(x, jnp.arange(t))
        segments, centroids = tokens.attend_segments, self.centroids[...]
        if config.balanced:
            options = {"causal": config.causal, "includes_self": not config.shared, "segments": segments}
            y = attend_balanced(q, k, v, routed, centroids, config.members, scale=config.scale, **options)
        else:
            options = {"scale": config.scale, "impl": config.impl, "segment_ids": segments}
            y = cast(Array, attend(q, k, v, self.pattern, selection=self._choose(routed, context), **options))
        losses = {}
        if config.commitment:
            distances = tokens.zero_padding(commitment(routed, centroids))
            losses["commitment"] = config.commitment * distances.sum() / jnp.maximum(tokens.count((b, t)).sum(), 1)
        sums = jax.lax.stop_gradient(sum_clusters(routed, centroids, tokens.mask))
        return self.out(y.reshape(b, t, -1)), Auxiliary(losses, statistics={"sums": sums})

    def selections(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Selection]:
        """Returns the members of clusters that each query attends to."""
        routed, *_ = self._project(x, jnp.arange(x.shape[1]))
        if not self.config.balanced:
            return {"": self._choose(routed, context)}
        config, segments = self.config, context.tokens.attend_segments
        options = {"causal": config.causal, "includes_self": not config.shared, "segments": segments}
        return {"": selection_of(balanced_members(routed, self.centroids[...], config.members, **options))}

    def measure(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> dict[str, Float[Array, ""]]:
        """Returns metrics of the selection; none for balanced clusters."""
        if self.config.balanced:
            return {}
        routed, q, k, _ = self._project(x, jnp.arange(x.shape[1]))
        pattern = self.pattern - patterns.Window(0) if self.config.shared else self.pattern
        options = {"scale": self.config.scale, "segments": context.tokens.attend_segments}
        return measure_selection(self._choose(routed, context), q, k, pattern, **options)._asdict()

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns empty caches: the last members of each cluster, and how many it had.

        With balanced clusters the inputs are kept.
        """
        config = self.config
        if config.balanced:
            return {"inputs": jnp.zeros((batch, length, self.out.weight.shape[1]), self.out.dtype)}
        slots = batch, config.kv_heads, config.clusters, min(config.members, length)
        cache: Cache = {name: jnp.zeros((*slots, config.head_width), self.value.dtype) for name in ("k", "v")}
        return cache | {"positions": jnp.full(slots, -1, jnp.int32), "counts": jnp.zeros(slots[:3], jnp.int32)}

    def extend(
        self, x: Float[Array, "b c m"], cache: Cache, positions: Int[Array, " b"], length: int, context: Context = EMPTY
    ) -> tuple[Float[Array, "b c m"], Cache]:
        """Mixes the next tokens, which attend to the cached members of their cluster and to the chunk."""
        if self.config.balanced:
            return self._extend_balanced(x, cache, positions, length, context)
        at = chunk_positions(positions, x.shape[1])
        routed, q, k, v = self._project(x, at)
        clusters = nearest_centroid(routed, self.centroids[...])
        exists = jnp.ones(at.shape, bool) if context.tokens.mask is None else context.tokens.mask
        b, c, g = *at.shape, self.config.kv_heads
        queries = jnp.moveaxis(q.reshape(b, c, g, -1, self.config.head_width), 2, 1)
        attend_heads = jax.vmap(jax.vmap(self._attend_members), in_axes=(0, 0))
        at_heads, exists_heads = (jnp.broadcast_to(y[:, None], (b, g, c)) for y in (at, exists))
        keys, values = (jnp.moveaxis(y, 2, 1) for y in (k, v))
        y, after = attend_heads(cache, (queries, keys, values, clusters, at_heads, exists_heads))
        return self.out(jnp.moveaxis(y, 1, 2).reshape(b, c, -1)), after

    def _attend_members(self, cache: Cache, chunk: tuple[Array, ...]) -> tuple[Float[Array, "c r d"], Cache]:
        """One head of one row: the output, and the members after the chunk."""
        q, k, v, clusters, at, exists = chunk
        count, slots = cache["positions"].shape
        labels = jnp.concatenate([jnp.repeat(jnp.arange(count), slots), jnp.where(exists, clusters, -1)])
        keys, values = (
            jnp.concatenate([cache[name].reshape(count * slots, -1), new.astype(cache[name].dtype)])
            for name, new in (("k", k), ("v", v))
        )
        keys_at = jnp.concatenate([cache["positions"].reshape(-1), jnp.where(exists, at, -1)])
        visible = (labels == clusters[:, None]) & (keys_at >= 0) & (keys_at <= at[:, None])
        latest = jnp.broadcast_to(keys_at.astype(jnp.float32), visible.shape)
        order = choose(latest, visible, self.config.members)
        mask, index = order >= 0, jnp.maximum(order, 0)
        mask = prefer_others(mask, keys_at[index] == at[:, None]) if self.config.shared else mask
        logits = jnp.einsum("crd,cwd->crw", q, keys[index], preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None], logits * self.config.scale, -jnp.inf)
        p = jnp.where(mask[:, None], jax.nn.softmax(scores, axis=-1), 0.0)  # a token is a member of its cluster
        y = jnp.einsum("crw,cwd->crd", p.astype(values.dtype), values[index])
        # Rank of each token in its cluster; of a cluster's tokens only the last `slots` are written.
        joins = jax.nn.one_hot(jnp.where(exists, clusters, count), count, dtype=jnp.int32)
        ranks = cache["counts"][clusters] + ((jnp.cumsum(joins, axis=0) - 1) * joins).sum(axis=-1)
        counts = cache["counts"] + joins.sum(axis=0)
        is_kept = exists & (ranks >= counts[clusters] - slots)
        target = jnp.where(is_kept, clusters, count), ranks % slots
        entries = {"k": k, "v": v, "positions": at}
        after = {
            name: cache[name].at[target].set(new.astype(cache[name].dtype), mode="drop")
            for name, new in entries.items()
        }
        return y, after | {"counts": counts}

    def _extend_balanced(
        self, x: Array, cache: Cache, positions: Array, length: int, context: Context
    ) -> tuple[Array, Cache]:
        """As the mixer over the tokens so far, which is not the whole sequence: balanced clusters are not causal."""
        at = chunk_positions(positions, x.shape[1])
        inputs = write_slots(cache["inputs"], x, at, context.tokens)
        exists = jnp.arange(length) < (positions + context.tokens.count(at.shape))[:, None]
        y = self(inputs, dataclasses.replace(context, tokens=Tokens(mask=exists)))
        return jnp.take_along_axis(y, jnp.minimum(at, length - 1)[..., None], axis=1), {"inputs": inputs}

    def attention_calls(
        self, x: Float[Array, "b t m"], context: Context = EMPTY
    ) -> dict[str, AttentionCall | SelectedCall]:
        """Returns the arguments of attention to the last members; none for balanced clusters."""
        if self.config.balanced:
            return {}
        routed, *arrays = self._project(x, jnp.arange(x.shape[1]))
        scale, segments = self.config.scale, context.tokens.attend_segments
        call = AttentionCall(*arrays, self.pattern, scale, None, None, segments, None)
        return {"": selected_call(call, self._choose(routed, context))}

    def cost(self, length: int) -> Cost:
        """Cost of the projections, of the products with the centroids, and of attention to `members` keys."""
        config, d = self.config, self.config.head_width
        linear = sum(projection.flops for projection in (self.query, self.key, self.value, self.out) if projection)
        kept = np.minimum(np.arange(length) + 1, config.members)
        kept = np.maximum(kept - 1, 1) if config.shared else kept
        pairs = config.heads * int(kept.sum())
        if config.balanced:
            size = min(config.members, length)
            pairs = config.heads * config.clusters * (size * (size + 1) // 2 if config.causal else size**2)
        routing = 2.0 * config.kv_heads * config.clusters * d
        scored = length * config.kv_heads * config.clusters
        flops = linear + routing + attention_flops(pairs, d) / max(length, 1)
        return Cost(pairs, flops, index_pairs=scored, index_flops=routing)

    def _choose(self, routed: Array, context: Context) -> Selection:
        segments = context.tokens.attend_segments
        ids = None if segments is None else segments[1]
        options = {"includes_self": not self.config.shared, "segments": ids}
        return route(routed, self.centroids[...], self.config.members, **options)

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array, Array]:
        """What is routed, queries, keys and values."""
        config = self.config

        def project(linear: Linear) -> Array:
            return linear(x).reshape(*x.shape[:2], -1, config.head_width)

        q, v = project(self.query), project(self.value)
        k = normalize_vectors(q).astype(q.dtype) if self.key is None else project(self.key)
        routed = k
        if config.rope is not None:
            q, k = (rotate(heads, positions, config.rope) for heads in (q, k))
        return routed, q, k, v
