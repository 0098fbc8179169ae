"""The cost of a pattern or a model over a sequence before it runs: derived from the patterns, never measured."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator

import jax
from flax import nnx

from sparsejax.config import Config, ModelConfig, check_teacher
from sparsejax.errors import InputError, argument_path
from sparsejax.layers import INDEX_CACHES, Cache, Experts, Layer, attention_cost
from sparsejax.model import Functional, Model
from sparsejax.patterns import Pattern, plan_cache

TRAINING = 3  # FLOPs of forward and backward pass per FLOP of the forward pass (arXiv:2001.08361)
FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Account:
    """The cost of a part of a model over one sequence of `length` tokens; accounts add up."""

    length: int
    parameters: int = 0
    active_parameters: int = 0  # used by a token: all except those of experts that it did not select
    pairs: int = 0  # attended (query, key) pairs, all heads
    flops: float = 0.0  # forward, per token, averaged over the sequence
    cache_bytes: int = 0  # to decode the sequence, per sequence of a batch
    live_tiles: int = 0  # tiles of 128 x 128 that hold a pair, all heads
    tiles: int = 0  # all tiles, all heads
    loss_flops: float = 0.0  # of the losses of mixers, forward and backward, per token
    index_pairs: int = 0  # (query, group) pairs that are scored to choose keys, all index heads
    index_flops: float = 0.0  # of the choice, per token, which are part of flops
    index_bytes: int = 0  # of the caches that only the choice reads, which are part of cache_bytes

    @property
    def training_flops(self) -> float:
        """FLOPs of forward and backward pass per token, without rematerialization."""
        return TRAINING * self.flops + self.loss_flops

    @property
    def sequence_flops(self) -> float:
        """FLOPs of the forward pass over the sequence."""
        return self.length * self.flops

    @property
    def score_bytes(self) -> int:
        """Bytes of all scores in float32, for implementations that keep them."""
        return FLOAT32 * (self.pairs + self.index_pairs)

    def __add__(self, other: Account) -> Account:
        if other.length != self.length:
            raise InputError("length", f"accounts of {self.length} and {other.length} tokens cannot be added")
        names = [field.name for field in dataclasses.fields(self) if field.name != "length"]
        return Account(self.length, **{name: getattr(self, name) + getattr(other, name) for name in names})


def account_pattern(
    pattern: Pattern, length: int, *, heads: int = 1, kv_heads: int = 1, head_width: int = 64
) -> Account:
    """Returns the cost of attention under a pattern, without projections, with a cache in float32.

    Args:
      pattern: A pattern; a pattern with heads has `heads` of them.
      length: Number of tokens.
      heads: Number of query heads.
      kv_heads: Number of key and value heads.
      head_width: Number of features per head.
    """
    cost = attention_cost(pattern, length, heads=heads, score_width=head_width, value_width=head_width)
    slots = plan_cache(pattern, length).count
    live, tiles = cost.tiles
    return Account(
        length,
        pairs=cost.pairs,
        flops=cost.flops,
        cache_bytes=2 * FLOAT32 * slots * kv_heads * head_width,
        live_tiles=live,
        tiles=tiles,
    )


def account_model(config: ModelConfig, length: int) -> tuple[list[Account], Account]:
    """Returns the accounts of the layers in order, and that of embedding, last norm and head.

    The model is built as shapes, with one layer per name, so that any size takes seconds. Embedding and head count as
    active; some reports count neither, or not the embedding, of which a token reads one row.
    """
    names = tuple(dict.fromkeys(config.names))
    shallow = dataclasses.replace(config, schedule=" ".join(names), scan=False)
    model = nnx.eval_shape(lambda: Model(shallow, nnx.Rngs(0)))
    accounts = {name: _account_layer(layer, length) for name, layer in zip(names, model.before, strict=True)}
    outside = _count_parameters(model) - sum(account.parameters for account in accounts.values())
    ends = Account(length, parameters=outside, active_parameters=outside, flops=2.0 * config.width * config.vocab)
    return [accounts[name] for name in config.names], ends


@dataclasses.dataclass(frozen=True)
class TeacherAccount:
    """The cost of the teacher of a run.

    Attributes:
      parameters: Number of parameters.
      parameter_bytes: Their bytes, on all devices together if each of them is sharded.
      forward_flops: FLOPs of the teacher per training step.
      mixer_flops: FLOPs per training step of the model's mixers on the teacher's inputs, forward and backward.
      training_flops: FLOPs per training step of the model without a teacher.
    """

    parameters: int
    parameter_bytes: int
    forward_flops: float
    mixer_flops: float
    training_flops: float

    @property
    def added_flops(self) -> float:
        """FLOPs that the teacher adds to a training step."""
        return self.forward_flops + self.mixer_flops

    def __str__(self) -> str:
        mixers = f" and {self.mixer_flops:,.0f} of mixers on its inputs" if self.mixer_flops else ""
        return (
            f"{self.parameters:,} parameters, {self.parameter_bytes:,} bytes; {self.forward_flops:,.0f} FLOPs per step"
            f"{mixers}, beside {self.training_flops:,.0f} of the model"
        )


def account_teacher(config: Config, teacher: ModelConfig) -> TeacherAccount:
    """Returns the cost of the teacher of a run or a phase in which a weight of `train.teacher` is above 0.

    Args:
      config: The configuration.
      teacher: The model of the teacher. Its head counts if the loss `kl` reads its predictions.

    Raises:
      InputError: The teacher does not fit the configuration.
    """
    section, length = config.train.teacher, config.data.length
    assert section is not None
    with argument_path("train.teacher"):
        check_teacher(config.model, teacher, length)
        pairs = section.pair_mixers(config.model, teacher)
    tokens, shapes = config.train.batch * length, Functional(teacher).shapes_in(section.dtype or "float32")
    layers, ends = account_model(teacher, length)
    mixers = {
        name: layer if layer.mixer is None else dataclasses.replace(layer, mlp=None, side=None, parallel=False)
        for name, layer in config.model.layers.items()
    }
    alone, _ = account_model(dataclasses.replace(config.model, layers=mixers), length)
    return TeacherAccount(
        parameters=sum(layer.parameters for layer in layers) + ends.parameters,
        parameter_bytes=count_bytes(shapes),
        forward_flops=tokens * (sum(layer.flops for layer in layers) + (ends.flops if section.kl else 0)),
        mixer_flops=tokens * sum(alone[layer].training_flops for layer in pairs),
        training_flops=tokens * AccountCache()(config).training_flops,
    )


class AccountCache:
    """Accounts of whole models over a sequence of `data.length` tokens. Each model and teacher is counted once."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._teachers: dict[str, TeacherAccount] = {}

    def __call__(self, config: Config) -> Account:
        """Returns the account of a configuration's model."""
        key = repr((config.model, config.data.length))
        if key not in self._accounts:
            layers, ends = account_model(config.model, config.data.length)
            self._accounts[key] = functools.reduce(operator.add, layers, ends)
        return self._accounts[key]

    def training_flops(self, config: Config, steps: int, teacher: ModelConfig | None = None) -> float:
        """FLOPs of `steps` training steps, with those of the teacher if a loss depends on it."""
        per_step = config.train.batch * config.data.length * self(config).training_flops
        if teacher is not None and config.train.active_teacher:
            per_step += self._count_teacher(config, teacher).added_flops
        return float(steps) * per_step

    def _count_teacher(self, config: Config, teacher: ModelConfig) -> TeacherAccount:
        key = repr((config.model, teacher, config.train.teacher, config.train.batch, config.data.length))
        if key not in self._teachers:
            self._teachers[key] = account_teacher(config, teacher)
        return self._teachers[key]


def _account_layer(layer: Layer, length: int) -> Account:
    cost, parameters = layer.cost(length), _count_parameters(layer)
    idle = layer.mlp.parameters - layer.mlp.active_parameters if isinstance(layer.mlp, Experts) else 0
    # The bytes per sequence. The positions of the slots are the same for all sequences, and not counted.
    single, double = (jax.eval_shape(functools.partial(layer.init_cache, batch, length)) for batch in (1, 2))
    cache, index = (count(double) - count(single) for count in (count_bytes, _count_index_bytes))
    sizes = parameters, parameters - idle, cost.pairs, cost.flops, cache, *cost.tiles
    return Account(length, *sizes, cost.loss_flops, cost.index_pairs, cost.index_flops, index)


def _count_index_bytes(cache: Cache) -> int:
    """Bytes of the parts of a cache that only the choice of keys reads, at any depth."""
    parts = ((name, value) for name, value in cache.items() if isinstance(value, dict) or name in INDEX_CACHES)
    return sum(count_bytes(part) if name in INDEX_CACHES else _count_index_bytes(part) for name, part in parts)


def count_bytes(cache: Cache) -> int:
    """Number of bytes of the arrays of a cache, or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def _count_parameters(module: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
