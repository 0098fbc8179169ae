"""The text that training prints, besides its progress."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from sparsejax import patterns, sharding
from sparsejax.account import account_teacher, count_bytes
from sparsejax.data import Dataset
from sparsejax.inference import generate
from sparsejax.inference.evaluation import Evaluation, describe, summarize
from sparsejax.overrides import write_overrides
from sparsejax.runs.groups import find_frozen
from sparsejax.runs.state import TrainState
from sparsejax.train.runtime import Evaluator, PhaseRuntime

PROMPT_LENGTH = 64  # tokens of validation text


def print_lines(console: Console, *lines: str) -> None:
    """Prints lines as they are, neither wrapped nor highlighted."""
    console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


def print_plan(runtimes: Sequence[PhaseRuntime], evaluators: Sequence[Evaluator], mesh: Mesh, console: Console) -> None:
    """Prints the data, the model, the mesh, the phases and warnings about them."""
    model = runtimes[0].model
    lines = [
        *runtimes[0].dataset.describe(),
        f"model: {model.size:,} parameters, {len(model.config.names)} layers: {model.config.schedule}",
        *_describe_optimizer(runtimes[0]),
        f"mesh: {sharding.describe(mesh)} on {mesh.devices.flat[0].device_kind}",
    ]
    for runtime in runtimes:
        phase, config, prefix = runtime.phase, runtime.config, ""
        if phase.name is not None:
            overrides = ", ".join(write_overrides(phase.overrides)) or "no overrides"
            lines.append(f"phase {phase.name}: steps {phase.start + 1:,} to {phase.stop:,}: {overrides}")
            prefix = f"phase {phase.name}: "
        if runtime.distillation is not None:
            teacher = account_teacher(config, runtime.distillation.teacher.config)
            lines.append(f"{prefix}teacher {runtime.distillation.config.source}: {teacher}")
        warnings = patterns.lint_schedule(config.model.connectivity, config.data.length)
        lines += [f"warning: {prefix}{warning}" for warning in warnings]
    for evaluator in evaluators:
        overrides = ", ".join(write_overrides(evaluator.setting.overrides)) or "no overrides"
        lines.append(f"evaluation {evaluator.setting.name}: {overrides}")
    print_lines(console, *lines)


def _describe_optimizer(runtime: PhaseRuntime) -> list[str]:
    """Describes an optimizer that is not plain AdamW, with the parameters that it trains and the size of its state."""
    config, model = runtime.config.optimizer, runtime.model
    changed = config.freeze or config.groups or config.lora or config.ema or config.moments != "float32"
    if config.name == "adamw" and not changed and model.config.param_dtype == "float32":
        return []
    state = count_bytes(jax.eval_shape(runtime.optimizer.init, model.shapes))
    frozen = jax.tree.leaves(find_frozen(config, model.shapes))
    trained = sum(
        math.prod(leaf.shape) for leaf, keep in zip(jax.tree.leaves(model.shapes), frozen, strict=True) if not keep
    )
    line = f"optimizer: {config.name}, {trained:,} of {model.size:,} parameters are trained, {state:,} bytes of state"
    rounded = "" if model.config.param_dtype == "float32" else f", {count_bytes(model.shapes):,} bytes of parameters"
    return [line + rounded]


def format_losses(values: Mapping[str, float], dataset: Dataset) -> str:
    """Formats the loss of a step and the mean since the last row, in bits per byte if evaluations are, or per token."""
    scale = (dataset.tokens_per_byte or 1.0) / math.log(2)
    mean = "" if math.isnan(values["loss_mean"]) else f" (mean {values['loss_mean'] * scale:.4f})"
    return f"{values['loss'] * scale:.4f}{mean} bits/{'token' if dataset.tokens_per_byte is None else 'byte'}"


def print_evaluation(evaluation: Evaluation, dataset: Dataset, console: Console) -> None:
    """Prints the loss by position, the accuracy by distance and the main metrics of an evaluation."""
    scale = dataset.tokens_per_byte
    table = Table("position", "bits/token" if scale is None else "bits/byte", title="validation loss by position")
    for start, stop, bits in evaluation.position_bins():
        table.add_row(f"{start}-{stop - 1}", f"{bits * (scale or 1):.3f}")
    console.print(table)
    accuracy = evaluation.accuracy
    if accuracy is not None and accuracy.by_distance[:, 1:].any():
        table = Table("distance", "accuracy", title="accuracy by distance of the answer")
        for start, stop, fraction in accuracy.distance_bins():
            table.add_row(f"{start}-{stop - 1}", f"{fraction:.4f}")
        console.print(table)
    unit = "bytes" if dataset.config.tokenizer == "bytes" and dataset.tokenizer is not None else "tokens"
    summary = describe(summarize(evaluation, dataset))
    console.print(f"validation: {summary} over {evaluation.tokens:,} {unit}", highlight=False)
    for name, source in evaluation.sources.items():
        values = describe(summarize(source, dataset.sources[name]))
        console.print(f"validation of {name}: {values} over {source.tokens:,} {unit}", highlight=False)


def print_sample(runtime: PhaseRuntime, state: TrainState[Array], console: Console) -> None:
    """Prints a continuation of the first validation text, if the configuration asks for one and the data has text."""
    dataset, length = runtime.dataset, runtime.config.eval.sample
    if not length or dataset.prompt is None or dataset.tokenizer is None:
        return
    limit = runtime.config.model.embedding.max_length
    prompt_length = PROMPT_LENGTH if limit is None else min(PROMPT_LENGTH, limit + 1 - length)
    prompt = dataset.prompt[:prompt_length]
    seed = (runtime.config.train.seed + int(state.step)) % 2**32
    [tokens] = generate(runtime.model, runtime.parameters(state), [prompt], length, seeds=[seed])
    texts = [dataset.tokenizer.decode(np.asarray(ids)) for ids in (prompt, tokens)]
    print_lines(console, "sample, as PROMPT|CONTINUATION:", "|".join(texts))
