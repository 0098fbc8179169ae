"""A mixture of experts: a feed-forward part of which each token uses a few, chosen by a router."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparsejax.layers.mlp import ACTIVATIONS, Mlp, MlpConfig
from sparsejax.layers.stream import EMPTY, Context, Linear, Stream, output_scale, parameter
from sparsejax.ops import experts as ops

ROUTERS = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Feed-forward parts of which each token takes the `top_k` with the best scores; see `ops.experts.route`."""

    experts: int
    top_k: int
    width: int  # hidden width of an expert
    activation: str
    gated: bool = True
    bias: bool = False  # on the router and the experts (gpt-oss)
    router: str = "softmax"  # over all experts; or "sigmoid" of each
    renormalize: bool = False  # the weights of the chosen sum to 1
    scale: float = 1.0  # factor on the weights
    selection_bias: bool = False  # a bias on the scores for the choice alone, not trained by gradient (DeepSeek-V3)
    groups: int = 1  # experts are split into groups, and a token's come from `top_groups` of them
    top_groups: int = 1
    shared_width: int = 0  # of an expert that serves every token; 0: none
    shared_bias: bool = False  # on the maps of that expert, and on those to and from `latent`
    shared_gate: bool = False  # that expert's output times sigmoid of a score (Qwen2-MoE)
    latent: int | None = None  # experts work on a projection to this width (Nemotron-H)
    limit: float | None = None  # gpt-oss: gates are at most this, values within it, and 1 is added to the values
    alpha: float = 1.0  # "silu" is x · sigmoid(alpha · x)
    balance_weight: float = 0.0  # of the load-balance loss, see `ops.experts.balance_loss`
    router_z_weight: float = 0.0  # of the router's z loss

    def __post_init__(self):
        if min(self.experts, self.top_k, self.width, self.groups, self.top_groups) < 1:
            raise ValueError("experts, top_k, width, groups and top_groups must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.router not in ROUTERS:
            raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {self.router!r}")
        if self.experts % self.groups or self.top_groups > self.groups:
            raise ValueError(f"top_groups = {self.top_groups} of groups = {self.groups} of experts = {self.experts}")
        if self.top_k > self.top_groups * self.experts // self.groups:
            raise ValueError(f"top_k = {self.top_k} of {self.top_groups * self.experts // self.groups} experts")
        if self.limit is not None and (self.limit <= 0 or not self.gated):
            raise ValueError(f"limit must be above 0 and is for gated experts, got {self.limit}")
        if self.alpha != 1 and self.activation != "silu":
            raise ValueError(f"alpha is of silu, activation is {self.activation!r}")
        if self.shared_width < 0 or (self.shared_gate and not self.shared_width):
            raise ValueError(f"shared_width = {self.shared_width} with shared_gate = {self.shared_gate}")
        if self.latent is not None and self.latent < 1:
            raise ValueError(f"latent must be at least 1, got {self.latent}")
        if min(self.balance_weight, self.router_z_weight) < 0:
            raise ValueError("balance_weight and router_z_weight must be at least 0")

    @property
    def shared(self) -> MlpConfig:
        """The expert that serves every token."""
        return MlpConfig("gated" if self.gated else "plain", self.shared_width, self.activation, self.shared_bias)


class Experts(nnx.Module):
    """Mixture of experts without capacities: every token is served by all experts that it chose."""

    def __init__(self, config: ExpertsConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.dtype = config, stream.dtype
        m, e, f, start = stream.width, config.experts, config.width, output_scale(stream)
        inner, zeros = config.latent or m, jax.nn.initializers.zeros

        def linear(inputs: int, outputs: int, dtype=stream.dtype, **options) -> Linear:
            return Linear(inputs, outputs, ("width", None), dtype=dtype, rngs=rngs, **options)

        def stack(inputs: int, outputs: int, axes: tuple[str, str], scale: float = 1.0) -> nnx.Param:
            init = jax.nn.initializers.normal(scale * inputs**-0.5)
            return parameter(rngs, init, (e, inputs, outputs), ("experts", *axes))

        def bias(outputs: int, axis: str) -> nnx.Param | None:
            return parameter(rngs, zeros, (e, outputs), ("experts", axis)) if config.bias else None

        self.router = linear(m, e, jnp.promote_types(stream.dtype, jnp.float32), bias=config.bias)
        self.selection_bias = parameter(rngs, zeros, (e,), (None,)) if config.selection_bias else None
        self.gate = stack(inner, f, ("width", "ff")) if config.gated else None
        self.up = stack(inner, f, ("width", "ff"))
        self.down = stack(f, inner, ("ff", "width"), 1.0 if config.latent else start)
        self.gate_bias = bias(f, "ff") if config.gated else None
        self.up_bias, self.down_bias = bias(f, "ff"), bias(inner, "width")
        wide = {"bias": config.shared_bias}
        self.enter = linear(m, inner, **wide) if config.latent else None
        self.leave = linear(inner, m, scale=start, **wide) if config.latent else None
        self.shared = Mlp(config.shared, stream, rngs) if config.shared_width else None
        self.shared_gate = linear(m, 1) if config.shared_gate else None

    def __call__(
        self, x: Float[Array, "b t m"], context: Context = EMPTY
    ) -> tuple[Float[Array, "b t m"], dict[str, Float[Array, ""]]]:
        """The output, and the losses that have a weight, weighted: "balance" and "router_z", of tokens not masked."""
        tokens, config = jnp.asarray(x).reshape(-1, x.shape[-1]), self.config
        logits = self.router(tokens)
        weights, experts, scores = ops.route(
            logits,
            config.top_k,
            kind=config.router,
            renormalize=config.renormalize,
            scale=config.scale,
            selection_bias=None if self.selection_bias is None else self.selection_bias[...],
            groups=config.groups,
            top_groups=config.top_groups,
        )
        y = self._serve(tokens, weights, experts)
        if self.shared is not None:
            always, _ = self.shared(tokens)
            y = y + (always if self.shared_gate is None else always * jax.nn.sigmoid(self.shared_gate(tokens)))
        mask, losses = None if context.mask is None else context.mask.reshape(-1), {}
        if config.balance_weight:
            losses["balance"] = config.balance_weight * ops.balance_loss(scores, experts, mask)
        if config.router_z_weight:
            losses["router_z"] = config.router_z_weight * ops.router_z_loss(logits, mask)
        return y.reshape(x.shape), losses

    @property
    def flops(self) -> float:
        """Forward FLOPs for each token, of the experts that serve it."""
        parts = (self.router, self.enter, self.leave, self.shared, self.shared_gate)
        return 2.0 * self.config.top_k * self._weights + sum(part.flops for part in parts if part is not None)

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))

    @property
    def active_parameters(self) -> int:
        """How many serve a token."""
        biases = sum(bias.shape[1] for bias in (self.gate_bias, self.up_bias, self.down_bias) if bias is not None)
        return self.parameters - (self.config.experts - self.config.top_k) * (self._weights + biases)

    @property
    def _weights(self) -> int:
        """Weights of one expert."""
        return sum(math.prod(stack.shape[1:]) for stack in (self.gate, self.up, self.down) if stack is not None)

    def _serve(self, tokens: Array, weights: Array, experts: Array) -> Array:
        count = self.config.experts
        groups = ops.group(experts, count, ops.choose_tile(experts.size, count))

        def apply(x: Array, stack: nnx.Param, bias: nnx.Param | None) -> Array:
            y = ops.multiply(x, stack[...].astype(self.dtype), groups)
            return y if bias is None else ops.add_bias(y, bias[...].astype(self.dtype), groups)

        x = ops.dispatch(tokens.astype(self.dtype) if self.enter is None else self.enter(tokens), groups)
        up = apply(x, self.up, self.up_bias)
        hidden = self._activate(up) if self.gate is None else self._open(apply(x, self.gate, self.gate_bias), up)
        y = ops.combine(apply(hidden, self.down, self.down_bias), weights, groups)
        return y if self.leave is None else self.leave(y)

    def _open(self, gate: Array, up: Array) -> Array:
        limit = self.config.limit
        if limit is None:
            return self._activate(gate) * up
        return self._activate(jnp.minimum(gate, limit)) * (jnp.clip(up, -limit, limit) + 1)

    def _activate(self, x: Array) -> Array:
        alpha = self.config.alpha
        return ACTIVATIONS[self.config.activation](x) if alpha == 1 else x * jax.nn.sigmoid(alpha * x)
