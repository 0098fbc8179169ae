"""Mixture of experts: a feed-forward part of which a router selects a few experts per token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sparsejax.errors import InputError, require_at_least, require_choice
from sparsejax.layers.context import EMPTY, Context
from sparsejax.layers.mlp import ACTIVATIONS, Mlp, MlpConfig, activate, bound
from sparsejax.layers.protocols import Auxiliary
from sparsejax.layers.stream import Linear, Stream, output_scale, parameter
from sparsejax.ops import experts as ops
from sparsejax.ops.sequence import map_tokens

BALANCES = ("batch", "sequence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Experts of which every token uses the `top_k` with the highest scores, see `ops.experts.route`."""

    experts: int  # number of experts
    top_k: int  # experts per token
    width: int  # width of an expert's hidden layer
    activation: str  # activation of the hidden layer
    gated: bool = True  # whether experts are GLUs (arXiv:2002.05202)
    bias: bool = False  # whether the router and the experts have a bias (gpt-oss)
    router: str = "softmax"  # "softmax" over all experts, or "sigmoid" or "sqrtsoftplus" per expert
    # choose by a random table of token ids, which is not trained; scores are weights only (DeepSeek-V4)
    by_token: bool = False
    renormalize: bool = False  # scale the weights of the selected experts to a sum of 1
    scale: float = 1.0  # factor on the weights
    weigh_input: bool = False  # multiply the input of an expert by its weight instead of the output (Llama 4)
    selection_bias: bool = False  # add a bias to the scores of the selection only, without gradient (DeepSeek-V3)
    groups: int = 1  # number of groups of experts; a token selects from its best `top_groups`
    top_groups: int = 1  # groups per token
    shared_width: int = 0  # hidden width of an expert that every token uses; 0 for none
    shared_bias: bool = False  # whether the linear maps of that expert, and those from and to `latent`, have a bias
    shared_gate: bool = False  # multiply that expert's output by the sigmoid of a score (Qwen2-MoE)
    latent: int | None = None  # width of a projection on which experts work (Nemotron-H); none: on the stream
    limit: float | None = None  # bound of gates and values, also of the expert that every token uses; none for no bound
    limit_offset: float = 1.0  # added to bounded values; 1 in gpt-oss, 0 in DeepSeek-V4
    alpha: float = 1.0  # slope of "silu": x · sigmoid(alpha · x)
    bias_rate: float = 0.0  # step of the selection bias toward equal loads, per update (DeepSeek-V3); 0: constant
    balance_weight: float = 0.0  # weight of the load-balancing loss, see `ops.experts.balance_loss`
    # tokens that are balanced: those of a "batch" (Switch) or of each "sequence" (DeepSeek-V3)
    balance: str = "batch"
    router_z_weight: float = 0.0  # weight of the z loss of the router

    def __post_init__(self):
        require_at_least(self, 1, "experts", "top_k", "width", "groups", "top_groups", "latent")
        require_at_least(self, 0, "shared_width", "bias_rate", "balance_weight", "router_z_weight")
        require_choice(self, "activation", ACTIVATIONS)
        require_choice(self, "router", ops.SCORES)
        require_choice(self, "balance", BALANCES)
        if self.experts % self.groups:
            raise InputError("experts", f"{self.experts} is not divisible by groups = {self.groups}")
        if self.top_groups > self.groups:
            raise InputError("top_groups", f"{self.top_groups} is above groups = {self.groups}")
        if self.top_k > (choices := self.top_groups * self.experts // self.groups):
            raise InputError("top_k", f"{self.top_k} is above the {choices} experts of top_groups = {self.top_groups}")
        if self.limit is not None and self.limit <= 0:
            raise InputError("limit", f"{self.limit} is not positive")
        if self.limit is not None and not self.gated:
            raise InputError("limit", f"{self.limit} bounds the gate, but experts are not gated; set gated")
        if self.alpha != 1 and self.activation != "silu":
            raise InputError("alpha", f"{self.alpha} applies to silu, but activation = {self.activation!r}")
        if self.by_token and (self.selection_bias or self.groups > 1):
            raise InputError("by_token", "a table chooses the experts: selection_bias and groups have no effect")
        if self.bias_rate and not self.selection_bias:
            raise InputError("bias_rate", f"{self.bias_rate} has no bias to update; set selection_bias")
        if self.shared_gate and not self.shared_width:
            raise InputError("shared_gate", "there is no shared expert to gate; set shared_width")

    def update_state(self, parameters: dict[str, Any], choices: Int[Array, "*r e"]) -> dict[str, Any]:
        """Returns the parameters after a training step: moves the selection bias toward equal loads.

        Args:
          parameters: Parameters of the experts; those of scanned layers have a leading axis of repetitions.
          choices: Number of choices per expert in the step.
        """
        if not self.bias_rate:
            return parameters
        bias = ops.update_selection_bias(parameters["selection_bias"], choices, self.bias_rate)
        return parameters | {"selection_bias": bias}

    @property
    def shared(self) -> MlpConfig:
        """The expert that every token uses."""
        return MlpConfig(
            kind="gated" if self.gated else "plain",
            width=self.shared_width,
            activation=self.activation,
            bias=self.shared_bias,
            limit=self.limit,
            limit_offset=self.limit_offset,
            alpha=self.alpha,
        )


def _draw_table(experts: int) -> Callable[[Array, tuple[int, int], DTypeLike], Array]:
    """An initializer that draws different experts for each token id; float32 holds their numbers exactly."""

    def draw(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        return jax.lax.top_k(jax.random.uniform(key, (shape[0], experts)), shape[1])[1].astype(dtype)

    return draw


class Experts(nnx.Module):
    """Mixture of experts without capacity limits: no token is dropped."""

    def __init__(self, config: ExpertsConfig, stream: Stream, rngs: nnx.Rngs):
        self.config, self.dtype = config, stream.dtype
        m, e, f, scale = stream.width, config.experts, config.width, output_scale(stream)
        inner, zeros = config.latent or m, jax.nn.initializers.zeros

        def linear(inputs: int, outputs: int, dtype=stream.dtype, **options) -> Linear:
            return Linear(inputs, outputs, ("width", None), dtype=dtype, rngs=rngs, **options)

        def stack(inputs: int, outputs: int, axes: tuple[str, str], scale: float = 1.0) -> nnx.Param:
            init = jax.nn.initializers.normal(scale * inputs**-0.5)
            return parameter(rngs, init, (e, inputs, outputs), ("experts", *axes), decay=True)

        def bias(outputs: int, axis: str) -> nnx.Param | None:
            return parameter(rngs, zeros, (e, outputs), ("experts", axis)) if config.bias else None

        self.router = linear(m, e, jnp.promote_types(stream.dtype, jnp.float32), bias=config.bias)
        self.selection_bias = parameter(rngs, zeros, (e,), (None,)) if config.selection_bias else None
        rows = stream.vocab, config.top_k
        self.table = parameter(rngs, _draw_table(e), rows, (None, None)) if config.by_token else None
        self.gate = stack(inner, f, ("width", "ff")) if config.gated else None
        self.up = stack(inner, f, ("width", "ff"))
        self.down = stack(f, inner, ("ff", "width"), 1.0 if config.latent else scale)
        self.gate_bias = bias(f, "ff") if config.gated else None
        self.up_bias, self.down_bias = bias(f, "ff"), bias(inner, "width")
        self.enter = linear(m, inner, bias=config.shared_bias) if config.latent else None
        self.leave = linear(inner, m, scale=scale, bias=config.shared_bias) if config.latent else None
        self.shared = Mlp(config.shared, stream, rngs) if config.shared_width else None
        self.shared_gate = linear(m, 1) if config.shared_gate else None

    def __call__(self, x: Float[Array, "b t m"], context: Context = EMPTY) -> tuple[Float[Array, "b t m"], Auxiliary]:
        """Returns the output, the weighted losses "balance" and "router_z" if they have a weight, and the choices.

        Padding is routed like every token, but does not enter the losses and the choices.
        """
        x, config, mask = jnp.asarray(x), self.config, context.tokens.mask
        logits = self.router(x)
        bias = None if self.selection_bias is None else self.selection_bias[...]
        weights, experts, scores = map_tokens(self._route, (logits, self._look_up(context)), bias)
        y = self._run_experts(x, weights, experts)
        if self.shared is not None:
            shared, _ = self.shared(x)
            y = y + (shared if self.shared_gate is None else shared * jax.nn.sigmoid(self.shared_gate(x)))
        choices = ops.count_choices(experts, config.experts, mask)  # [b, e]
        losses = {}
        if config.balance_weight:
            losses["balance"] = config.balance_weight * self._balance(scores, choices, context)
        if config.router_z_weight:
            flat = logits.reshape(-1, logits.shape[-1])
            z_loss = ops.router_z_loss(flat, None if mask is None else mask.reshape(-1))
            losses["router_z"] = config.router_z_weight * z_loss
        return y, Auxiliary(losses, choices.sum(axis=0))

    def _route(
        self, tokens: tuple[Float[Array, "b t e"], Int[Array, "b t k"] | None], bias: Float[Array, " e"] | None
    ) -> tuple[Float[Array, "b t k"], Int[Array, "b t k"], Float[Array, "b t e"]]:
        """Weights, experts, and the scores of all experts."""
        (logits, experts), config = tokens, self.config
        routed = ops.route(
            logits.reshape(-1, config.experts),
            config.top_k,
            kind=config.router,
            renormalize=config.renormalize,
            scale=config.scale,
            selection_bias=bias,
            groups=config.groups,
            top_groups=config.top_groups,
            experts=None if experts is None else experts.reshape(-1, config.top_k),
        )
        return tuple(array.reshape(*logits.shape[:2], -1) for array in routed)  # type: ignore[return-value]

    def _look_up(self, context: Context) -> Array | None:
        """The experts of the tokens by their ids, if there is a table."""
        if self.table is None:
            return None
        if context.extras.ids is None:
            raise InputError("ids", "experts by token id need the token ids in the extras of the context")
        rows = jax.lax.stop_gradient(self.table[...])[context.extras.ids]
        return jnp.clip(jnp.rint(rows).astype(jnp.int32), 0, self.config.experts - 1)

    def _balance(self, scores: Array, choices: Array, context: Context) -> Array:
        """The balance loss from the scores [b, t, e] and the choices [b, e]."""
        mask = context.tokens.mask
        if self.config.balance == "sequence":
            losses = ops.balance_loss(scores, choices, mask)
            return losses.mean() if mask is None else (losses * mask.sum(axis=1)).sum() / jnp.maximum(mask.sum(), 1)
        choices = choices.sum(axis=0) if context.extras.choices is None else context.extras.choices
        tokens = scores.reshape(-1, scores.shape[-1])
        return ops.balance_loss(tokens, choices, None if mask is None else mask.reshape(-1))

    @property
    def flops(self) -> float:
        """Forward FLOPs per token, of the experts that it uses."""
        parts = (self.router, self.enter, self.leave, self.shared, self.shared_gate)
        return 2.0 * self.config.top_k * self._expert_weights + sum(part.flops for part in parts if part is not None)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))

    @property
    def active_parameters(self) -> int:
        """Number of parameters that a token uses."""
        biases = sum(bias.shape[1] for bias in (self.gate_bias, self.up_bias, self.down_bias) if bias is not None)
        return self.parameters - (self.config.experts - self.config.top_k) * (self._expert_weights + biases)

    @property
    def _expert_weights(self) -> int:
        """Number of weights of an expert."""
        return sum(math.prod(stack.shape[1:]) for stack in (self.gate, self.up, self.down) if stack is not None)

    def _run_experts(
        self, tokens: Float[Array, "b t m"], weights: Float[Array, "b t k"], experts: Int[Array, "b t k"]
    ) -> Float[Array, "b t m"]:
        """The weighted sum of the experts of each token. Every device sorts its own tokens."""
        x = tokens.astype(self.dtype) if self.enter is None else self.enter(tokens)
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        named |= {"gate_bias": self.gate_bias, "up_bias": self.up_bias, "down_bias": self.down_bias}
        stacks = {name: param[...].astype(self.dtype) for name, param in named.items() if param is not None}
        y = map_tokens(self._run_stacks, (x, weights, experts), stacks)
        return y if self.leave is None else self.leave(y)

    def _run_stacks(self, tokens: tuple[Array, Array, Array], stacks: dict[str, Array]) -> Float[Array, "b t m"]:
        """The weighted sum of the experts, given the matrices and biases of all."""
        shape, count = tokens[0].shape, self.config.experts
        x, weights, experts = (array.reshape(-1, array.shape[-1]) for array in tokens)
        groups = ops.sort_by_expert(experts, count, ops.choose_tile(experts.size, count))

        def apply(x: Array, name: str) -> Array:
            y, bias = ops.multiply(x, stacks[name], groups), stacks.get(f"{name}_bias")
            return y if bias is None else ops.add_bias(y, bias, groups)

        x = ops.dispatch(x, groups)
        if self.config.weigh_input:
            x, weights = x * ops.dispatch_weights(weights.astype(x.dtype), groups), jnp.ones_like(weights)
        up = apply(x, "up")
        hidden = self._multiply(apply(x, "gate"), up) if "gate" in stacks else self._activate(up)
        return ops.combine(apply(hidden, "down"), weights, groups).reshape(shape)

    def _multiply(self, gate: Array, up: Array) -> Array:
        """The product of gate and values."""
        gate, up = bound(gate, up, self.config.limit, self.config.limit_offset)
        return self._activate(gate) * up

    def _activate(self, x: Array) -> Array:
        return activate(self.config.activation, self.config.alpha, x)
