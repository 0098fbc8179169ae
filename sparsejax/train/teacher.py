"""Distillation from a frozen teacher: its activations and predictions, and the losses that compare a model with them.

`TeacherConfig` has the formulas.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.config import Config, ConfigError, ModelConfig, ModelSource, TeacherConfig, check_teacher
from sparsejax.errors import InputError
from sparsejax.inference.evaluation import DeviceBatch, read_context
from sparsejax.layers import EMPTY, Extras
from sparsejax.loaded import LoadedModel
from sparsejax.loading import load_source
from sparsejax.model import Functional, Losses, Model, Output, path_of
from sparsejax.runs.checkpoint import list_steps
from sparsejax.runs.phases import Phase
from sparsejax.workdir import Workdir, read_json

SECTION = "train.teacher"
EPS = 1e-6  # added to the mean square of an activation of the teacher


class TopLogits(NamedTuple):
    """The largest logits of every token, in descending order, and the sum of the others.

    Attributes:
      logits: The largest logits.
      indices: Their tokens.
      rest: Logarithm of the sum of the exponentials of the other logits.
    """

    logits: Float[Array, "b t k"]
    indices: Int[Array, "b t k"]
    rest: Float[Array, "b t"]


class Targets(NamedTuple):
    """What the losses of a batch read from the teacher.

    Attributes:
      features: Input of the teacher's head; None if no loss reads its logits.
      streams: Residual stream of the teacher by layer of the model that is compared with it.
      mixer_inputs: Input of the teacher's mixer, by layer of the model.
      mixer_outputs: Output of the teacher's mixer, by layer of the model.
    """

    features: Float[Array, "b t w"] | None
    streams: dict[int, Float[Array, "b t s"]]
    mixer_inputs: dict[int, Float[Array, "b t m"]]
    mixer_outputs: dict[int, Float[Array, "b t m"]]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The losses of a phase with a teacher.

    Attributes:
      config: Their weights.
      teacher: The teacher, for the sequences of the phase.
      extras: Inputs of particular modules of the teacher.
      hidden: Layer of the teacher by layer of the model whose streams are compared.
      attention: Layer of the teacher by layer of the model whose mixers are compared.
    """

    config: TeacherConfig
    teacher: Functional
    extras: Extras = EMPTY.extras
    hidden: Mapping[int, int] = dataclasses.field(default_factory=dict)
    attention: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def run_teacher(
        self, parameters: dict[str, Any], batch: DeviceBatch, constrain: Callable[[Array], Array] = lambda x: x
    ) -> Targets:
        """Runs the teacher, without dropout.

        Args:
          parameters: Parameters of the teacher.
          batch: A batch, or the rows of a microbatch.
          constrain: As for `Model.forward`.
        """
        extras = dataclasses.replace(self.extras, traced=bool(self.hidden or self.attention))
        context = dataclasses.replace(read_context(batch), extras=extras)
        output = self.teacher.bind(parameters).forward(batch["inputs"], context, constrain)
        mixers = {layer: output.traces[other] for layer, other in self.attention.items()}
        return Targets(
            output.features if self.config.kl else None,
            {layer: output.traces[other].stream for layer, other in self.hidden.items()},
            {layer: jnp.asarray(trace.mixer_input) for layer, trace in mixers.items()},
            {layer: jnp.asarray(trace.mixer_output) for layer, trace in mixers.items()},
        )

    def divergence(
        self, logits: Float[Array, "b t v"], teacher: Model, features: Float[Array, "b t w"]
    ) -> Float[Array, "b t"]:
        """Returns the weighted divergence of predictions from those of the teacher, per token.

        Args:
          logits: Logits of the model.
          teacher: The teacher.
          features: Inputs of its head.
        """
        config = self.config
        others = teacher.logits(features) / config.temperature
        is_full = config.top_k in (0, others.shape[-1])
        divergence = kl_divergence(logits, others if is_full else keep_top(others, config.top_k), config.temperature)
        return config.kl * config.temperature**2 * divergence

    def losses(
        self, model: Model, output: Output, targets: Targets, batch: DeviceBatch, scale: Float[Array, ""]
    ) -> Losses:
        """Returns the weighted losses of the activations by name, summed over tokens.

        Args:
          model: The model that is trained.
          output: Its output for the batch, with the activations if `hidden` is not empty.
          targets: Those of `run_teacher` for the batch.
          batch: The batch.
          scale: Scored tokens per token of the whole batch: the factor on sums over all tokens.
        """
        config, context, losses = self.config, read_context(batch), {}

        def add_up(outputs: Mapping[int, Array], others: Mapping[int, Array]) -> Array:
            errors = jnp.stack([relative_error(outputs[layer], others[layer]) for layer in others]).mean(axis=0)
            return scale * context.tokens.zero_padding(errors).sum()

        if targets.streams:
            streams = {layer: output.traces[layer].stream for layer in targets.streams}
            losses["hidden"] = config.hidden * add_up(streams, targets.streams)
        if targets.mixer_outputs:
            outputs = model.mix(targets.mixer_inputs, context)
            losses["attention_output"] = config.attention_output * add_up(outputs, targets.mixer_outputs)
        return losses


def keep_top(logits: Float[Array, "b t v"], count: int) -> TopLogits:
    """Keeps the `count` largest logits of every token and the sum of the others; `count` is below v."""
    top, indices = jax.lax.top_k(logits, count)
    return TopLogits(top, indices, _add_others(logits, indices))


def _add_others(logits: Float[Array, "b t v"], indices: Int[Array, "b t k"]) -> Float[Array, "b t"]:
    """The logarithm of the sum of the exponentials of the logits at all but these indices."""
    others = jnp.put_along_axis(logits, indices, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1)


@jax.checkpoint  # keeps the logits of both, and no distribution
def kl_divergence(
    logits: Float[Array, "b t v"], teacher: Float[Array, "b t v"] | TopLogits, temperature: float | Array = 1.0
) -> Float[Array, "b t"]:
    """Returns the divergence of the predictions from those of the teacher, in nats per token.

    Args:
      logits: Logits of the model.
      teacher: Logits of the teacher over the temperature. With `TopLogits` the other tokens are one outcome.
      temperature: The temperature.
    """
    logits = logits / temperature
    if isinstance(teacher, TopLogits):
        top = jnp.take_along_axis(logits, teacher.indices, axis=-1)
        logits = jnp.concatenate([top, _add_others(logits, teacher.indices)[..., None]], axis=-1)
        teacher = jnp.concatenate([teacher.logits, teacher.rest[..., None]], axis=-1)
    return optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher))


def relative_error(output: Float[Array, "b t *m"], target: Float[Array, "b t *m"]) -> Float[Array, "b t"]:
    """Returns the mean square of the difference over that of the target, per token in float32."""
    output, target = output.astype(jnp.float32), target.astype(jnp.float32)
    return jnp.square(output - target).mean(axis=-1) / (jnp.square(target).mean(axis=-1) + EPS)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The teacher of a run.

    Attributes:
      model: The model and its parameters on the mesh.
      record: Source, step, digest of the parameters and configuration of the model, with the types of JSON.
    """

    model: LoadedModel
    record: dict[str, Any]

    def distil(self, config: Config) -> Distillation:
        """Returns the losses of a phase in which a weight is above 0.

        Raises:
          ConfigError: The teacher does not fit the model or the length of the sequences, or a layer does not exist.
        """
        section, length = config.train.active_teacher, config.data.length
        assert section is not None
        try:
            model, multiple = self.model.source.at_length(self.model.config, length)
            check_teacher(config.model, model, length)
            if length % multiple:
                raise InputError(
                    "source", f"data.length = {length} is not a multiple of {multiple}, as the teacher needs"
                )
            return Distillation(
                section,
                Functional(model),
                self.model.source.extras,
                section.pair_streams(config.model, model),
                section.pair_mixers(config.model, model),
            )
        except InputError as error:
            raise ConfigError(f"{SECTION}.{error.argument}", error.problem) from error


def load_teacher(config: TeacherConfig, mesh: Mesh) -> Teacher:
    """Reads the teacher, whose parameters are sharded over the mesh.

    Raises:
      ConfigError: There is no such model.
      InputError: A file of the model is damaged.
    """
    try:
        model = load_source(ModelSource.parse(config.source), mesh=mesh, dtype=config.dtype)
    except InputError as error:
        if error.argument not in ("path", "source", "step"):
            raise
        raise ConfigError(f"{SECTION}.source", error.problem) from error
    record = {
        "source": config.source,
        "step": model.step,
        "digest": digest_parameters(model.parameters),
        "model": configs.to_section(model.config),
    }
    return Teacher(model, json.loads(json.dumps(record)))


def find_teacher(phases: Sequence[Phase], workdir: Workdir, mesh: Mesh) -> Teacher | None:
    """Reads the teacher of a run; None if no phase that remains has one.

    Raises:
      ConfigError, InputError: As `load_teacher`; or it is not the teacher with which the run of the workdir started.
    """
    steps = sharding.from_coordinator(list_steps(workdir.checkpoints))
    remaining = (phase.config.train.active_teacher for phase in phases if phase.stop > (steps[-1] if steps else 0))
    config = next(filter(None, remaining), None)
    if config is None:
        return None
    teacher = load_teacher(config, mesh)
    if problem := sharding.from_coordinator(_compare(workdir, teacher.record) if steps else None):
        raise ConfigError(f"{SECTION}.source", f"is not the teacher of the run in {workdir.path}: {problem}")
    return teacher


def _compare(workdir: Workdir, record: Mapping[str, Any]) -> str | None:
    """Describes how a teacher differs from the recorded one, if there is one."""
    if not workdir.teacher.exists():
        return None
    recorded = read_json(workdir.teacher, {"digest": str, "model": dict})
    if recorded["digest"] != record["digest"]:
        return f"the digest of its parameters is {record['digest'][:12]}, not {recorded['digest'][:12]}"
    return configs.difference(*(configs.complete(item["model"], ModelConfig) for item in (recorded, record)))


def digest_parameters(parameters: dict[str, Any]) -> str:
    """Returns a digest of parameters on a mesh, in hexadecimal: SHA-256 of a checksum of each of them.

    It depends on their values, shapes, dtypes and paths, and not on the mesh.
    """
    checksums = jax.device_get(jax.jit(lambda tree: jax.tree.map(_checksum, tree))(parameters))
    leaves = zip(jax.tree.leaves_with_path(parameters), jax.tree.leaves(checksums), strict=True)
    lines = [f"{path_of(path)} {leaf.dtype} {list(leaf.shape)} {checksum}" for (path, leaf), checksum in leaves]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _checksum(x: Array) -> Array:
    """The sum of the bits of all elements, each times an odd number that depends on its indices, modulo 2 ** 32."""
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    factors = jnp.uint32(1)
    for axis in range(x.ndim):
        indices = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        factors = (factors ^ indices) * jnp.uint32(0x9E3779B1)
    return (bits * (2 * factors + 1)).sum(dtype=jnp.uint32)
