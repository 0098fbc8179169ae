"""Evaluation: loss in nats and in bits per byte, by position, and accuracy."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int, PyTree, Shaped

from sparsejax import metrics, sharding
from sparsejax.data import Batch, Dataset, Mixture
from sparsejax.data.dataset import Sharing
from sparsejax.layers import EMPTY, Context, Extras, Tokens
from sparsejax.model import Functional, Metrics, Model
from sparsejax.ops.chunks import scan_chunks
from sparsejax.ops.sequence import divides, map_shards

LOGITS_BYTES = 2**27  # of a chunk of tokens on a device, in float32


class DeviceBatch(TypedDict):
    """A `data.Batch` on the mesh."""

    inputs: Int[Array, "b t"]
    targets: Int[Array, "b t"]
    weights: Float[Array, "b t"]
    segments: NotRequired[Int[Array, "b t"]]
    positions: NotRequired[Int[Array, "b t"]]
    distance: NotRequired[Int[Array, "b t"]]


class AccuracySums(NamedTuple):
    """Sums over a batch for the accuracy.

    Attributes:
      correct: Weights of correct predictions by position, float32 [t].
      rows: Number of rows whose scored tokens are all correct, and of rows with scored tokens, [2].
      by_distance: Weights of correct and of scored tokens by distance of the answer, float32 [2, t + 1]; at 0 where the
        distance is unknown.
    """

    correct: Array
    rows: Array
    by_distance: Array


class EvaluationSums(NamedTuple):
    """Sums over a batch.

    Attributes:
      losses: Loss by position in the document, float32 [t].
      weights: Weights of the scored tokens by position, float32 [t].
      accuracy: None if accuracy is not scored.
    """

    losses: Array
    weights: Array
    accuracy: AccuracySums | None = None


def token_losses(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], weights: Float[Array, "b t"]
) -> Float[Array, "b t"]:
    """Returns the weighted negative log-likelihood of each target, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights


def score_tokens(
    score: Callable[..., PyTree[Shaped[Array, "b t ..."]]],
    models: tuple[Model | None, ...],
    arrays: PyTree[Shaped[Array, "b t ..."]],
    vocab: int,
    mesh: Mesh | AbstractMesh,
    chunk: int | None = None,
) -> PyTree[Shaped[Array, "b t ..."]]:
    """Applies a function of tokens and their logits to chunks of tokens, so that few logits are in memory at a time.

    Args:
      score: Maps `models` and `arrays` of a chunk [b, c, ...], such as the inputs of the head, to arrays [b, c, ...].
        The backward pass computes it once more, unless there is a single chunk.
      models: The models whose parameters it reads.
      arrays: Arrays of all tokens.
      vocab: Number of logits per token.
      mesh: The mesh over whose devices rows and logits are spread.
      chunk: Tokens of a row per chunk; defaults to as many as have `LOGITS_BYTES` of logits per device.
    """
    b, t = jax.tree.leaves(arrays)[0].shape[:2]
    if divides(t):  # chunks of the tokens of each shard
        graph, state = nnx.split(models)

        def score_shard(arrays: PyTree, state: PyTree) -> PyTree:
            return score_tokens(score, nnx.merge(graph, state), arrays, vocab, mesh, chunk)

        return map_shards(score_shard, arrays, state)
    if chunk is None:
        per_token = 4 * -(-b // sharding.batch_shards(mesh)) * -(-vocab // mesh.shape["tensor"])
        chunk = -(-t // -(-t * per_token // LOGITS_BYTES))
    if chunk >= t:
        return score(models, *arrays)
    return scan_chunks(lambda state, arrays: (state, score(models, *arrays)), (), arrays, chunk)[1]


def build_evaluation(
    model: Functional, mesh: Mesh, score_accuracy: bool = False, extras: Extras = EMPTY.extras
) -> Callable[[dict[str, Any], DeviceBatch], EvaluationSums]:
    """Compiles the evaluation of a batch, a function of parameters and batch; `extras` are inputs of modules."""
    constrain = sharding.constrain_batch(mesh)

    def evaluate(parameters: dict[str, Any], batch: DeviceBatch) -> EvaluationSums:
        context = dataclasses.replace(read_context(batch), extras=extras)
        bound = model.bind(parameters)
        features = bound.forward(batch["inputs"], context, constrain).features
        weights, length = batch["weights"], batch["weights"].shape[1]

        def score(models: tuple[Model], features: Array, targets: Array, weights: Array) -> tuple[Array, Array | None]:
            logits = models[0].logits(features)
            correct = weights * (logits.argmax(-1) == targets) if score_accuracy else None
            return token_losses(logits, targets, weights), correct

        arrays = features, batch["targets"], weights
        losses, correct = score_tokens(score, (bound,), arrays, model.config.vocab, mesh)

        def sum_by(indices: Array | None, x: Array, size: int) -> Array:
            return x.sum(0) if indices is None else jnp.zeros(size).at[indices].add(x)

        positions = batch.get("positions")
        sums = EvaluationSums(sum_by(positions, losses, length), sum_by(positions, weights, length))
        if not score_accuracy:
            return sums
        is_scored = weights.sum(1) > 0
        rows = jnp.stack([(is_scored & (correct.sum(1) == weights.sum(1))).sum(), is_scored.sum()])
        distance = batch.get("distance", jnp.zeros_like(batch["targets"]))
        by_distance = jnp.stack([sum_by(distance, x, length + 1) for x in (correct, weights)])
        return sums._replace(accuracy=AccuracySums(sum_by(positions, correct, length), rows, by_distance))

    return jax.jit(evaluate, out_shardings=sharding.replicated(mesh))


def build_measurement(model: Functional, mesh: Mesh) -> Callable[[dict[str, Any], DeviceBatch], Metrics]:
    """Compiles the metrics of the selections of a model, a function of parameters and batch."""
    constrain = sharding.constrain_batch(mesh)

    def measure(parameters: dict[str, Any], batch: DeviceBatch) -> Metrics:
        context = read_context(batch).with_extras(measured=True)
        return dict(model.bind(parameters).forward(batch["inputs"], context, constrain).metrics)

    return jax.jit(measure, out_shardings=sharding.replicated(mesh))


def read_context(batch: DeviceBatch) -> Context:
    """Returns the document and the position of each token of packed documents; EMPTY for other batches."""
    if "segments" not in batch:
        return EMPTY
    segments = batch["segments"]
    return Context(Tokens(segments=segments, mask=segments > 0, positions=batch["positions"]))


class Accuracy(NamedTuple):
    """How often a scored token is the first choice of the model.

    Attributes:
      tokens: Fraction of the scored tokens.
      exact_match: Fraction of the rows whose scored tokens are all correct.
      by_distance: Weights of correct and of scored tokens by distance of the answer [2, t + 1].
    """

    tokens: float
    exact_match: float
    by_distance: np.ndarray

    def distance_bins(self) -> list[tuple[int, int, float]]:
        """Returns the accuracy at distances `[start, stop)`, in bins that double, without empty bins."""
        correct, scored = self.by_distance
        bins = [
            (start, stop, correct[start:stop].sum(), scored[start:stop].sum())
            for start, stop in _double(len(correct), 1)
        ]
        return [(start, stop, float(hits / total)) for start, stop, hits, total in bins if total]


class Evaluation(NamedTuple):
    """Result of an evaluation.

    Attributes:
      loss: Mean over the scored tokens, in nats.
      by_position: Mean at each position of a document [t].
      tokens: Number of scored tokens.
      scored: Number of scored tokens at each position [t].
      accuracy: None if it was not scored.
      ema: Evaluation of the exponential moving average of the parameters, if the run has one.
      sources: Evaluations of the sources of a mixture by name; the others are then means over them by weight.
      selections: Metrics of the selections of the layers on the first batch, by name, see `ops.measure_selection`.
    """

    loss: float
    by_position: np.ndarray
    tokens: int
    scored: np.ndarray
    accuracy: Accuracy | None = None
    ema: Evaluation | None = None
    sources: Mapping[str, Evaluation] = MappingProxyType({})
    selections: Mapping[str, float] = MappingProxyType({})

    @property
    def bits(self) -> float:
        """Loss in bits per token."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        """Exponential of the loss, per token."""
        return math.exp(min(self.loss, 700.0))  # below the overflow of float64

    def position_bins(self) -> list[tuple[int, int, float]]:
        """Returns the bits per token at positions `[start, stop)`, in bins that double, without empty bins.

        The curve shows how much context the model uses.
        """
        bins = []
        for start, stop in _double(len(self.by_position)):
            values = self.by_position[start:stop][self.scored[start:stop] > 0]
            if len(values):
                bins.append((start, stop, float(values.mean()) / math.log(2)))
        return bins


def _double(stop: int, start: int = 0) -> list[tuple[int, int]]:
    """Returns bins from `start` to `stop` with edges 8, 16, 32, ..."""
    edges = [start, *(2**i for i in range(3, stop.bit_length())), stop]
    return list(itertools.pairwise(sorted({edge for edge in edges if edge <= stop})))


def evaluate(
    run: Callable[[dict[str, Any], DeviceBatch], EvaluationSums],
    parameters: dict[str, Any],
    batches: Iterable[DeviceBatch],
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Sums `run(parameters, batch)`, a function of `build_evaluation`, over the batches in float64.

    `before_batch` is called before each of them, and may raise to end the evaluation.
    """
    sums: EvaluationSums | None = None
    for batch in batches:
        before_batch()
        batch_sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), run(parameters, batch))
        sums = batch_sums if sums is None else jax.tree.map(np.add, sums, batch_sums)
    assert sums is not None, "no batches"
    total, accuracy = sums.weights.sum(), None
    if sums.accuracy is not None:
        correct, (exact, rows), by_distance = sums.accuracy
        accuracy = Accuracy(float(correct.sum() / total), float(exact / rows), np.asarray(by_distance))
    by_position, weights = np.asarray(sums.losses / np.maximum(sums.weights, 1)), np.asarray(sums.weights)
    return Evaluation(float(sums.losses.sum() / total), by_position, int(total), weights, accuracy)


def evaluate_sources(dataset: Dataset, run: Callable[[Dataset], Evaluation]) -> Evaluation:
    """Evaluates a data set with `run`; of a mixture, every source alone, and their mean by weight."""
    if not isinstance(dataset, Mixture):
        return run(dataset)
    sources = {name: run(source) for name, source in dataset.sources.items()}
    parts = [(share, sources[name]) for name, share in dataset.shares.items() if share]
    # At a position that a source does not score, the mean is that of the others.
    weights = np.stack([share * (part.scored > 0) for share, part in parts])
    sums = (weights * np.stack([part.by_position for _, part in parts])).sum(0)
    accuracies = [(share, part.accuracy) for share, part in parts if part.accuracy is not None]
    accuracy = Accuracy(
        tokens=sum(share * part.tokens for share, part in accuracies),
        exact_match=sum(share * part.exact_match for share, part in accuracies),
        by_distance=np.asarray(sum(part.by_distance for _, part in accuracies)),
    )
    return Evaluation(
        loss=sum(share * part.loss for share, part in parts),
        by_position=sums / np.where(weights.any(0), weights.sum(0), 1),
        tokens=sum(part.tokens for part in sources.values()),
        scored=np.sum([part.scored for part in sources.values()], axis=0),
        accuracy=accuracy if len(accuracies) == len(parts) else None,
        sources=sources,
    )


def evaluate_on(
    mesh: Mesh,
    run: Callable[[dict[str, Any], DeviceBatch], EvaluationSums],
    parameters: dict[str, Any],
    batches: Iterable[Batch],
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluates like `evaluate`, on batches that are sharded over a mesh."""
    with jax.set_mesh(mesh):  # kernels are sharded over it
        return evaluate(run, parameters, (shard_batch(batch, mesh) for batch in batches), before_batch)


def measure_on(
    mesh: Mesh,
    run: Callable[[dict[str, Any], DeviceBatch], Metrics],
    parameters: dict[str, Any],
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Runs a function of `build_measurement` on the first of the batches."""
    with jax.set_mesh(mesh):
        measured = run(parameters, shard_batch(next(iter(batches)), mesh))
    return {name: float(value) for name, value in jax.device_get(dict(measured)).items()}


def share_rows(mesh: Mesh, rows: int) -> Sharing:
    """Returns the share of this process in global batches of `rows` rows."""
    index, count = sharding.local_rows(mesh, rows)
    return Sharing(process_index=index, process_count=count)


def shard_batch(batch: Batch, mesh: Mesh) -> DeviceBatch:
    """Shards a global batch over the mesh, given this process's share of its rows."""
    placement = sharding.batch_sharding(mesh)
    tokens = sharding.local_tokens(mesh, batch["inputs"].shape[1])
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(placement, rows[:, tokens]), batch)


def summarize(evaluation: Evaluation, dataset: Dataset) -> dict[str, float]:
    """Returns the metrics of an evaluation by name.

    If every token of a text is predicted, bits are per byte, and also per character if tokens are not bytes: the bits
    of all tokens divided by the bytes or characters that decoding the tokens gives back. The fraction that it gives
    back is a metric too if it is below 1. Otherwise bits are per scored token, and do not compare between tokenizers.
    Of a mixture, the metrics of each source follow, with its name as a suffix.
    """
    summary = {metrics.EVAL_LOSS: evaluation.loss}
    scale = dataset.tokens_per_byte
    if scale is None:
        summary[metrics.BITS_PER_TOKEN] = evaluation.bits
    else:
        summary[metrics.BITS_PER_BYTE] = evaluation.bits * scale
        if dataset.config.tokenizer != "bytes" and dataset.tokens_per_character is not None:
            summary[metrics.BITS_PER_CHARACTER] = evaluation.bits * dataset.tokens_per_character
        if dataset.restored < 1:
            summary[metrics.RESTORED] = dataset.restored
    summary |= {f"{metrics.BITS_AT}{start}": bits * (scale or 1) for start, _, bits in evaluation.position_bins()}
    if evaluation.accuracy is not None:
        summary[metrics.ACCURACY] = evaluation.accuracy.tokens
        summary[metrics.EXACT_MATCH] = evaluation.accuracy.exact_match
        bins = evaluation.accuracy.distance_bins()
        summary |= {f"{metrics.ACCURACY_AT_DISTANCE}{start}": accuracy for start, _, accuracy in bins}
    summary |= {f"{metrics.EVAL}{name}": value for name, value in evaluation.selections.items()}
    if evaluation.ema is not None:
        average = summarize(evaluation.ema, dataset)
        summary |= {metrics.EMA + name.removeprefix(metrics.EVAL): value for name, value in average.items()}
    for name, source in evaluation.sources.items():
        summary |= {f"{metric}/{name}": value for metric, value in summarize(source, dataset.sources[name]).items()}
    return summary


def describe(summary: dict[str, float]) -> str:
    """Formats the main metrics of `summarize`."""
    if metrics.ACCURACY in summary:
        accuracy, exact_match = summary[metrics.ACCURACY], summary[metrics.EXACT_MATCH]
        bits = summary[metrics.BITS_PER_TOKEN]
        return f"accuracy {accuracy:.4f}, exact match {exact_match:.4f}, {bits:.4f} bits/token"
    names = {metrics.BITS_PER_BYTE: "bits/byte", metrics.BITS_PER_CHARACTER: "bits/character"}
    if not summary.keys() & names:  # tokens that are not those of a text
        names = {metrics.BITS_PER_TOKEN: "bits/token"}
    parts = [f"{summary[name]:.4f} {unit}" for name, unit in names.items() if name in summary]
    if metrics.RESTORED in summary:
        parts.append(f"of the {summary[metrics.RESTORED]:.2%} of the text that the tokenizer gives back")
    return ", ".join(parts)
