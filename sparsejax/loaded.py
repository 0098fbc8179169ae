"""A model with its parameters, as `sparsejax.load` returns it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax import metrics, sharding
from sparsejax.config import ModelConfig
from sparsejax.data import DataConfig, Dataset, load_dataset, ordered_batches
from sparsejax.data.rows import Windows
from sparsejax.data.tokenizers import Tokenizer
from sparsejax.errors import InputError, argument_path
from sparsejax.inference.evaluation import Evaluation, build_evaluation, evaluate_on, evaluate_sources, summarize
from sparsejax.inference.generation import BLOCK, NONE, Decoder, Plan, round_up
from sparsejax.inference.sampling import Sampling
from sparsejax.inference.scoring import score_continuations, token_scores
from sparsejax.inference.text import TextStream
from sparsejax.layers import Context, Extras, Tokens
from sparsejax.model import Functional, restack
from sparsejax.ops import Selection

if TYPE_CHECKING:
    from sparsejax.config import Config

T = TypeVar("T")
Parameters = dict[str, Any]
Prompt = str | Sequence[int] | np.ndarray

ROWS = 8  # per batch of an evaluation


@dataclasses.dataclass
class Source:
    """The files from which a model was loaded, and what they state besides the model.

    Attributes:
      kind: Description of the model in errors.
      masks: Names of the masks that the model takes.
      length: Tokens per sequence by default.
      step: Step of the checkpoint; None if it is not that of a run.
      run: Configuration of the last phase of the run, if any.
      data: The section `data` of the run or the defaults, as a dict.
      tokenizer_data: Content of the tokenizer's file; None if there is none.
    """

    kind: str = "this model"
    masks: Collection[str] = ("attention_mask",)
    length: int = 1024
    step: int | None = None
    run: Config | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer_data: bytes | None = None

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer; raises InputError if there is none."""
        raise InputError("tokenizer", f"{self.kind} has none; use token ids")

    def at_length(self, config: ModelConfig, length: int) -> tuple[ModelConfig, int]:
        """Returns the configuration for sequences of a length, and the multiple to which they are padded."""
        return config, 1

    @property
    def is_built_per_length(self) -> bool:
        """Whether `at_length` depends on the length."""
        return False

    @property
    def extras(self) -> Extras:
        """Inputs of particular modules."""
        return Extras()

    @property
    def padding(self) -> int:
        """Id of padding."""
        return 0

    def prefix(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids with which every text begins."""
        return ()

    def ends(self, tokenizer: Tokenizer | None) -> tuple[int, ...]:
        """Ids that end a text."""
        if tokenizer is None or tokenizer.separator is None:
            return ()
        end = tokenizer.separator
        return () if tokenizer.decode(np.array([end])) == " " else (end,)  # the space of text8 separates words


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    Attributes:
      tokens: Generated ids, integers [n].
      text: Their text, up to a stop string; None for a prompt of ids whose model has no tokenizer.
      reason: What ended it: "length", "end" (an end-of-sequence token) or "stop" (a stop string).
    """

    tokens: np.ndarray
    text: str | None
    reason: str

    def __str__(self) -> str:
        return str(self.tokens) if self.text is None else self.text


class Score(NamedTuple):
    """The likelihood of a continuation.

    Attributes:
      log_likelihood: Sum over its tokens, in nats.
      tokens: Log-likelihood of each token, float64 [n].
      is_greedy: Whether every token is the most likely one.
    """

    log_likelihood: float
    tokens: np.ndarray
    is_greedy: bool


class Assessment(NamedTuple):
    """An evaluation of a model on a data set.

    Attributes:
      evaluation: Loss, also by position, and accuracy.
      metrics: Metrics by name, as in `result.json`, and the perplexity.
      dataset: The data set.
    """

    evaluation: Evaluation
    metrics: dict[str, float]
    dataset: Dataset


class LoadedModel:
    """A trained model: `sparsejax.load(MODEL)`, where MODEL is a workdir or a Hugging Face folder.

    Attributes:
      config: The configuration of the model. It may be changed, unless it depends on the sequence length (BigBird,
        Reformer).
      parameters: Nested dicts of arrays, for `Functional(config)`. They may be replaced.
      source: The files: the step and the configuration of a run, or a Hugging Face checkpoint.
    """

    def __init__(self, config: ModelConfig, parameters: Parameters, source: Source | None = None):
        self.config, self.parameters = config, parameters
        self.source = Source() if source is None else source
        self._models: list[tuple[ModelConfig, Functional]] = []
        self._evaluations: dict[Any, Any] = {}
        self._unrolled: tuple[Any, Any, Functional, Parameters] | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: `encode(text: bytes)` returns ids, `decode(ids)` text.

        Raises:
          InputError: The model was trained without text, or its files do not hold the tokenizer.
        """
        tokenizer = self.source.load_tokenizer()
        if tokenizer.size > self.config.vocab:
            problem = f"{tokenizer.name} has {tokenizer.size:,} ids, the model has {self.config.vocab:,}"
            raise InputError("tokenizer", f"{problem}; it is that of another model")
        return tokenizer

    @property
    def schedule(self) -> str:
        """The layer schedule, such as `3x(ssm ssm local) full`."""
        return self.config.schedule

    @property
    def step(self) -> int | None:
        """Step of the checkpoint; None for a Hugging Face folder."""
        return self.source.step

    def encode(self, text: str) -> Int[np.ndarray, " t"]:
        """Encodes a text as a prompt: the ids of the text, after those with which the tokenizer begins every text."""
        tokens = self.tokenizer.encode(text.encode())
        return np.concatenate([np.asarray(self.source.prefix(self.tokenizer), np.int32), tokens.astype(np.int32)])

    def logits(
        self,
        inputs: str | Int[Array, "*b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        *,
        parameters: Parameters | None = None,
        **masks: Any,
    ) -> Float[Array, "*b t v"]:
        """Returns logits at every position, in float32; those of a causal model predict the next token.

        Args:
          inputs: A text, or token ids [t] or [b, t].
          attention_mask: 0 at padding, where logits are undefined.
          parameters: Other parameters, in which the result is differentiable.
          **masks: `global_attention_mask` (1 at tokens with symmetric global attention), for families that have it.

        Raises:
          InputError: Shapes or values are invalid, or the model does not have an argument.
        """
        tokens = self.encode(inputs) if isinstance(inputs, str) else np.asarray(inputs)
        model, batch, context = self._prepare(np.atleast_2d(tokens), attention_mask, masks)
        logits = _run_forward(model, self.parameters if parameters is None else parameters, batch, context)
        logits = logits[:, : tokens.shape[-1]]
        return logits[0] if tokens.ndim == 1 else logits

    def streams(
        self, input_ids: Int[Array, "b t"], attention_mask: Int[Array, "b t"] | None = None, **masks: Any
    ) -> list[Float[Array, "b t m"]]:
        """Returns the residual stream before the first layer, after each layer, and after the last norm."""
        model, tokens, context = self._prepare(np.asarray(input_ids), attention_mask, masks)
        return [x[:, : np.shape(input_ids)[1]] for x in _run_streams(model, self.parameters, tokens, context)]

    def selections(self, inputs: Prompt) -> list[dict[str, Selection]]:
        """Returns the keys that the queries of each layer select.

        Args:
          inputs: A text, or token ids [t] or [b, t].

        Returns:
          Per layer a `Selection` by section of the layer: `mixer`, a section in it, or `side` for a shared block. A
          layer that does not select has none. `Selection.mask` holds booleans [b, scopes, t, s].
        """
        tokens = self.encode(inputs) if isinstance(inputs, str) else np.asarray(inputs)
        model, batch, context = self._prepare(np.atleast_2d(tokens), None, {})
        return _run_selections(model, self.parameters, batch, context)

    def loss(
        self,
        inputs: str | Int[Array, " t"] | None = None,
        *,
        files: str | None = None,
        length: int | None = None,
        stride: int = 0,
        batch: int = ROWS,
    ) -> float:
        """Returns the mean loss of the next token, in nats, over windows of a text.

        Args:
          inputs: A text or token ids [t].
          files: Files of text instead, as in `data.files`.
          length: Tokens per window; defaults to that of the run, or to the positions of a Hugging Face model.
          stride: Tokens between the starts of windows, which score their last `stride` tokens; 0 stands for `length`.
            Every token but the first is scored once.
          batch: Windows per call of the model.

        Raises:
          InputError: The model is not causal, or an argument is invalid.
        """
        if (inputs is None) == (files is None):
            raise InputError("inputs", "expected either a text, ids or files")
        if files is not None:
            changes = {"files": files} | ({} if length is None else {"length": length})
            return self.evaluate(changes, stride=stride, batch=batch).evaluation.loss
        self._require_causal("loss", "has no next-token loss")
        tokens = self.encode(inputs) if isinstance(inputs, str) else np.asarray(inputs)
        if tokens.ndim != 1 or len(tokens) < 2:
            raise InputError("inputs", f"shape {list(tokens.shape)}: expected ids [t] of at least two tokens")
        self._check(tokens[None], {})
        length = min(self.source.length if length is None else length, len(tokens) - 1)
        windows = Windows(tokens.astype(np.int32), length, _check_stride(stride, length), drop_last=False)
        return self._evaluate(ordered_batches(windows, batch), length, scores_accuracy=False).loss

    def encode_pair(self, prompt: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a prompt and its continuation as one text, and splits the ids where those of the prompt end."""
        size = len(self.encode(prompt))
        tokens = self.encode(prompt + continuation)
        return tokens[:size], tokens[size:]

    def score(
        self,
        pairs: Sequence[tuple[Prompt, Prompt]],
        *,
        batch: int = ROWS,
        progress: Callable[[int, int], None] = lambda batch, batches: None,
    ) -> list[Score]:
        """Returns the likelihood of continuations, each given its prompt.

        Args:
          pairs: Prompts and continuations: pairs of texts, which are encoded by `encode_pair`, or of ids [t].
          batch: Rows per call of the model. Rows of similar lengths share a batch, padded to a bucket. A prompt of
            several continuations is one row: it is read once, and each continuation extends its caches.
          progress: Called before every batch with its index and the number of batches.

        Raises:
          InputError: The model is not causal, or a pair is empty, too long, or has ids outside of the vocabulary.
        """
        self._require_causal("score", "has no next-token likelihood")
        if batch < 1:
            raise InputError("batch", f"{batch} is below 1")
        rows = [self._join_pair(*pair) for pair in pairs]
        prompts: dict[bytes, list[int]] = {}
        for index, (tokens, count) in enumerate(rows):
            prompts.setdefault(tokens[:-count].astype(np.int32).tobytes(), []).append(index)
        shared = [group for group in prompts.values() if len(group) > 1] if self._can_decode else []
        single = sorted(set(range(len(rows))) - {index for group in shared for index in group})
        batches: list[tuple[Callable[..., dict[int, Score]], Any]]
        batches = [(self._score_forks, chunk) for chunk in _batch(shared, lambda group: len(rows[group[0]][0]), batch)]
        batches += [(self._score_rows, chunk) for chunk in _batch(single, lambda index: len(rows[index][0]), batch)]
        scores: dict[int, Score] = {}
        for number, (score, chunk) in enumerate(batches):
            progress(number, len(batches))
            scores |= score(rows, chunk, batch)
        return [scores[index] for index in range(len(rows))]

    @property
    def _can_decode(self) -> bool:
        """Whether decoding gives the logits of the forward pass."""
        leaks = any(layer.mixer is not None and layer.mixer.leaks for layer in self.config.layers.values())
        return self.config.causal and not self.source.is_built_per_length and not leaks

    def _join_pair(self, prompt: Prompt, continuation: Prompt) -> tuple[np.ndarray, int]:
        """Returns the ids of a prompt and its continuation, and the number of those of the continuation."""
        if isinstance(prompt, str) and isinstance(continuation, str):
            prompt, continuation = self.encode_pair(prompt, continuation)
        elif isinstance(prompt, str) or isinstance(continuation, str):
            raise InputError("pairs", "a text and ids: expected two texts, or ids [t] twice")
        for name, ids in (("prompt", prompt), ("continuation", continuation)):
            if not len(ids):
                raise InputError(name, "is empty; pass at least one token")
        tokens, limit = np.concatenate([prompt, continuation]), self.config.embedding.max_length
        self._check(tokens[None], {})
        if limit is not None and len(tokens) - 1 > limit:
            raise InputError("prompt", f"{len(tokens):,} tokens with its continuation exceed {limit:,} positions")
        return tokens, len(continuation)

    def _score_forks(
        self, rows: Sequence[tuple[np.ndarray, int]], groups: Sequence[Sequence[int]], batch: int
    ) -> dict[int, Score]:
        """Scores rows by index, in groups of equal prompts."""
        splits = [[np.split(rows[index][0], [-rows[index][1]]) for index in group] for group in groups]
        splits += [splits[0][:1]] * (batch - len(groups))  # rows that only complete the batch
        prompts, continuations = [group[0][0] for group in splits], [[ids for _, ids in group] for group in splits]
        results = score_continuations(self._build(self.config), self.parameters, prompts, continuations)
        return {
            index: _make_score(*scores)
            for group, row in zip(groups, results, strict=False)
            for index, scores in zip(group, row, strict=True)
        }

    def _score_rows(
        self, rows: Sequence[tuple[np.ndarray, int]], indices: Sequence[int], batch: int
    ) -> dict[int, Score]:
        """Scores rows by index, in one forward pass."""
        length = round_up(max(len(rows[index][0]) for index in indices) - 1, self.config.embedding.max_length)
        inputs, targets, mask = np.zeros((3, batch, length), np.int32)
        mask[len(indices) :] = 1  # rows that only complete the batch
        for row, index in enumerate(indices):
            tokens, size = rows[index][0], len(rows[index][0]) - 1
            inputs[row, :size], targets[row, :size], mask[row, :size] = tokens[:-1], tokens[1:], 1
        model, padded, context = self._prepare(inputs, mask if "attention_mask" in self.source.masks else None, {})
        targets = np.pad(targets, ((0, 0), (0, padded.shape[1] - length)))
        values, hits = map(np.asarray, _run_scores(model, self.parameters, padded, context, targets))
        scores = {}
        for row, index in enumerate(indices):
            tokens, count = rows[index]
            scored = slice(len(tokens) - 1 - count, len(tokens) - 1)
            scores[index] = _make_score(values[row, scored], hits[row, scored])
        return scores

    def load_data(self, data: Mapping[str, Any] | None = None, stride: int = 0) -> Dataset:
        """Loads the data of `evaluate`, which describes the arguments and the errors."""
        changes = dict(data or {})
        config = self._read_data(changes)
        _check_stride(stride, config.length)
        recorded = self.source.tokenizer_data if config.tokenizer == self.source.data.get("tokenizer") else None
        is_whole = not changes.keys().isdisjoint(("files", "validation"))
        dataset = load_dataset(config, stride, recorded=recorded, split=not is_whole)
        dataset.require_vocabulary(self.config.vocab)
        return dataset

    def evaluate(
        self,
        data: Mapping[str, Any] | None = None,
        *,
        stride: int | None = None,
        batch: int | None = None,
        limit: int = 0,
        progress: Callable[[int, int], None] = lambda batch, batches: None,
    ) -> Assessment:
        """Evaluates on the validation text of the run, or on another text, corpus or probe.

        Args:
          data: Keys of the section `data`, which change those of the run. All of `files` is evaluated, without a split.
          stride: Tokens between the starts of windows, which score their last `stride` tokens, so that every token is
            scored once; 0 stands for `data.length`. Defaults to that of the run.
          batch: Rows per call of the model; defaults to that of the run.
          limit: Largest number of batches, spread evenly; 0 is no limit.
          progress: Called before every batch with its index and the number of batches.

        Raises:
          InputError: A key, the text or the probe is invalid, or does not fit the model.
        """
        changes, run = dict(data or {}), self.source.run
        stride = (run.eval.stride if run and not changes else 0) if stride is None else stride
        batch = (run.eval.batch if run else ROWS) if batch is None else batch
        if batch < 1:
            raise InputError("batch", f"{batch} is below 1")
        dataset = self.load_data(changes, stride)
        counts = [-(-len(source.held_out) // batch) for source in dataset.sources.values() or [dataset]]
        batches = sum(min(count, limit) if limit else count for count in counts)
        counter = iter(range(batches))
        evaluation = evaluate_sources(
            dataset,
            lambda source: self._evaluate(
                source.validation_batches(batch, limit=limit),
                source.held_out.length,
                source.scores_accuracy,
                lambda: progress(next(counter), batches),
            ),
        )
        values = summarize(evaluation, dataset)
        return Assessment(evaluation, values | {metrics.PERPLEXITY: evaluation.perplexity}, dataset)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        ends: Sequence[int] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        on_plan: Callable[[Plan], None] = lambda plan: None,
    ) -> Any:
        """Continues prompts of any lengths, together.

        Args:
          prompts: A text or ids [t], or a list of them.
          tokens: Largest number of tokens to generate per prompt.
          temperature: See `inference.Sampling`, as for the next four.
          top_k: Keeps the most likely tokens.
          top_p: Keeps the most likely tokens up to this probability.
          min_p: Keeps tokens of at least this fraction of the largest probability.
          repetition_penalty: Makes tokens that are in the row already less likely.
          stop: Texts at which a continuation ends; they are not part of its text.
          seed: Seed of the first row, of which the next rows add 1, or a seed per row. A row depends on its own seed
            and prompt, not on the other rows.
          ends: Ids that end a continuation; defaults to the end-of-sequence tokens of the model.
          on_text: Called with the index of a prompt and its text as soon as it is known, in whole characters.
          on_plan: Called with the shapes that are compiled.

        Returns:
          A `Completion`, or a list of them for a list of prompts.

        Raises:
          InputError: An argument is invalid, or the model cannot generate.
        """
        rows, is_single = _split_prompts(prompts)
        seeds = list(range(seed, seed + len(rows))) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(rows) or not all(0 <= number < 2**32 for number in seeds):
            raise InputError("seed", f"{seed}: expected an integer from 0 to 2 ** 32 - {len(rows)}, or one per prompt")
        self._require_causal("generate", "is an encoder and cannot generate")
        if self.source.is_built_per_length:
            raise InputError("generate", f"{self.source.kind} is built for each length, and cannot decode")
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
        encoded = [self.encode(row) if isinstance(row, str) else np.asarray(row) for row in rows]
        for row in encoded:
            if row.ndim == 1 and not row.size:
                raise InputError("prompt", "is empty; start with at least one token")
        tokenizer = self._find_tokenizer(needed=bool(stop) or any(isinstance(row, str) for row in rows))
        decoder = Decoder(
            *self._decoding_model(),
            encoded,
            tokens,
            sampling=sampling,
            seeds=seeds,
            ends=self.source.ends(tokenizer) if ends is None else ends,
        )
        on_plan(decoder.plan)
        block = 1 if on_text else 8 if stop else BLOCK  # tokens between two looks at the text
        results = _continue(decoder, encoded, tokenizer, stop, on_text or (lambda row, text: None), block)
        return results[0] if is_single else results

    def _find_tokenizer(self, needed: bool) -> Tokenizer | None:
        try:
            return self.tokenizer
        except InputError:
            if needed:
                raise
            return None

    def require_positions(self, length: int, argument: str) -> None:
        """Raises InputError if the model has learned positions, and fewer than `length`."""
        longest = self.config.embedding.max_length
        if longest is not None and length > longest:
            raise InputError(argument, f"{length} tokens exceed the model's {longest} learned positions")

    def _require_causal(self, argument: str, problem: str) -> None:
        if not self.config.causal:
            raise InputError(argument, f"{self.source.kind} {problem}: config.causal is false")

    def _decoding_model(self) -> tuple[Functional, Parameters]:
        """Returns the model that decodes, whose layers are unrolled: a scan over layers copies weights and caches."""
        if not self.config.scan or not self.config.fold.repeats:
            return self._build(self.config), self.parameters
        if self._unrolled is None or self._unrolled[0] is not self.parameters or self._unrolled[1] != self.config:
            config = dataclasses.replace(self.config, scan=False)
            parameters = restack(self.parameters, self.config, config)
            self._unrolled = self.parameters, self.config, self._build(config), parameters
        return self._unrolled[2:]

    def _read_data(self, changes: Mapping[str, Any]) -> DataConfig:
        """Returns the section `data` of the run with changes, after checks against the model."""
        if {"files", "validation"} <= changes.keys():
            raise InputError("data.validation", "cannot be combined with data.files, all of which is evaluated")
        defaults = {"task": "text", "files": "", "length": self.source.length} | self.source.data
        section = ConfigDict({"data": configs.complete(defaults, DataConfig)})
        configs.override(section, {f"data.{key}": value for key, value in changes.items()})
        if not changes.keys().isdisjoint(("files", "validation", "tfds", "task")):
            section.data.sources, section.data.stream, section.data.readers = {}, False, 1
        if "validation" in changes:
            section.data.files = section.data.validation
        if not changes.keys().isdisjoint(("files", "validation")):
            section.data.validation = ""
            if section.data.task != "text":
                raise InputError("data.files", f"the task is the probe {section.data.task}; set data.task = 'text'")
        with argument_path("data"):
            config = configs.build(DataConfig, section.data.to_dict())
        if config.probe is not None and "length" not in changes:
            config = dataclasses.replace(config, length=config.probe.length)
        configs.check_data(self.source.at_length(self.config, config.length)[0], config)
        if config.task == "text" and self.source.run is None:
            if not (config.files or config.tfds):
                raise InputError("data.files", f"is empty; {self.source.kind} has no text, name a file")
            if "tokenizer" not in changes:
                self.tokenizer  # noqa: B018 (raises)
        return config

    def _evaluate(
        self, batches: Iterator[Any], length: int, scores_accuracy: bool, before: Callable[[], None] = lambda: None
    ) -> Evaluation:
        config, multiple = self.source.at_length(self.config, length)
        if length % multiple:
            raise InputError("data.length", f"{length} is not a multiple of {multiple}, as {self.source.kind} needs")
        mesh = sharding.mesh_of(self.parameters) or sharding.single_device_mesh()
        model = self._build(config)
        key = model, mesh, scores_accuracy
        if key not in self._evaluations:
            self._evaluations[key] = build_evaluation(*key, self.source.extras)
        return evaluate_on(mesh, self._evaluations[key], self.parameters, batches, before)

    def _prepare(
        self, input_ids: Any, attention_mask: Any, other_masks: dict[str, Any]
    ) -> tuple[Functional, Array, Context]:
        tokens, masks = self._check(input_ids, {"attention_mask": attention_mask} | other_masks)
        config, multiple = self.source.at_length(self.config, tokens.shape[1])
        tokens, masks = self._pad(tokens, masks, multiple)
        mask = masks.get("attention_mask")
        known = Tokens(mask=None if mask is None or mask.all() else jnp.asarray(mask, bool))
        extras = dataclasses.replace(self.source.extras, globals=_list_globals(masks))
        return self._build(config), jnp.asarray(tokens, jnp.int32), Context(known, extras)

    def _pad(
        self, tokens: np.ndarray, masks: dict[str, np.ndarray], multiple: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Pads sequences to a multiple that the model requires, and masks the padding."""
        gap = -tokens.shape[1] % multiple
        if not gap:
            return tokens, masks
        masks = {"attention_mask": np.ones_like(tokens)} | masks
        masks = {name: np.pad(mask, ((0, 0), (0, gap))) for name, mask in masks.items()}
        return np.pad(tokens, ((0, 0), (0, gap)), constant_values=self.source.padding), masks

    def _check(self, input_ids: Any, arguments: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the tokens, and the masks that are not None."""
        masks = {name: np.asarray(mask) for name, mask in arguments.items() if mask is not None}
        tokens = np.asarray(input_ids)
        if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError("input_ids", f"{tokens.dtype} {list(tokens.shape)}: expected integers [b, t]")
        for name, mask in masks.items():
            if name not in self.source.masks:
                known = ", ".join(["input_ids", *sorted(self.source.masks)])
                raise InputError(name, f"not an argument of {self.source.kind}; it has {known}")
            if mask.shape != tokens.shape:
                raise InputError(name, f"shape {list(mask.shape)} differs from {list(tokens.shape)} of input_ids")
            if not np.isin(mask, (0, 1)).all():
                raise InputError(name, "expected zeros and ones")
        if not 0 <= tokens.min() <= tokens.max() < self.config.vocab:
            raise InputError("input_ids", f"expected ids from 0 to {self.config.vocab - 1}")
        return tokens, masks

    def _build(self, config: ModelConfig) -> Functional:
        """Returns one object per configuration, so that it is compiled once."""
        for known, model in self._models:
            if known == config:
                return model
        self._models.append((config, Functional(config)))
        return self._models[-1][1]


def set_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
    """Returns a configuration that computes in a dtype, or as it is for None.

    Raises:
      InputError: The dtype is neither float32 nor bfloat16.
    """
    return config if dtype is None else dataclasses.replace(config, dtype=dtype)


def _check_stride(stride: int, length: int) -> int:
    if not 0 <= stride <= length:
        raise InputError("stride", f"{stride} is not in [0, {length}], the length of a window")
    return stride


def _batch(items: list[T], size: Callable[[T], int], batch: int) -> list[list[T]]:
    """Splits items into batches of similar sizes, the largest first."""
    ordered = sorted(items, key=lambda item: -size(item))
    return [ordered[start : start + batch] for start in range(0, len(ordered), batch)]


def _make_score(log_likelihoods: np.ndarray, hits: np.ndarray) -> Score:
    values = log_likelihoods.astype(np.float64)
    return Score(float(values.sum()), values, bool(hits.all()))


def _split_prompts(prompts: Any) -> tuple[list[Any], bool]:
    """Returns the prompts as a list, and whether they are a single one."""
    if isinstance(prompts, str):
        return [prompts], True
    if not len(prompts):
        raise InputError("prompt", "is empty; start with at least one token")
    is_single = np.ndim(prompts[0]) == 0 and not isinstance(prompts[0], str)
    return [prompts] if is_single else list(prompts), is_single


def _continue(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    tokenizer: Tokenizer | None,
    stop: Collection[str],
    on_text: Callable[[int, str], None],
    block: int,
) -> list[Completion]:
    """Runs a decoder to its end, and decodes the text of each row."""
    rows = [_Row(None if tokenizer is None else TextStream(tokenizer, stop, prompt)) for prompt in prompts]
    while decoder.active.any():
        for index, block_ids in enumerate(decoder.advance(block)):
            ids = block_ids[block_ids != NONE]
            if not len(ids):  # it has ended before
                continue
            text = rows[index].add(ids, decoder.ends, is_last=not decoder.active[index])
            if rows[index].reason == "stop":
                decoder.stop(index)
            if text:
                on_text(index, text)
    return [row.complete() for row in rows]


@dataclasses.dataclass
class _Row:
    """A row in progress; see `Completion`."""

    stream: TextStream | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    reason: str = "length"

    def add(self, ids: np.ndarray, ends: Collection[int], is_last: bool) -> str:
        """Adds tokens up to a stop string; returns the text that they release."""
        text = ""
        for token in ids.tolist():
            self.tokens.append(token)
            if token in ends:
                self.reason = "end"
            elif self.stream:
                text += self.stream.push([token])
                if self.stream.stopped:
                    self.reason = "stop"
                    return text
        return text + self.stream.finish() if self.stream and is_last else text

    def complete(self) -> Completion:
        text = None if self.stream is None else self.stream.text
        return Completion(np.array(self.tokens, np.int32), text, self.reason)


def _list_globals(masks: Mapping[str, np.ndarray]) -> Array | None:
    """Positions of the global tokens [b, n], padded with -1."""
    is_global, mask = masks.get("global_attention_mask"), masks.get("attention_mask")
    if is_global is None:
        return None
    is_global = is_global if mask is None else is_global * mask
    count = int(is_global.sum(axis=1).max())
    width = 1 << (count - 1).bit_length() if count else 0  # few distinct shapes, hence few compilations
    rows = [np.flatnonzero(row) for row in is_global]
    positions = np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows]).astype(np.int32)
    return jnp.asarray(positions) if positions.size else None


@functools.partial(jax.jit, static_argnums=0)
def _run_forward(model: Functional, parameters: Parameters, tokens: Array, context: Context) -> Array:
    return model.bind(parameters)(tokens, context)


@functools.partial(jax.jit, static_argnums=0)
def _run_scores(
    model: Functional, parameters: Parameters, tokens: Array, context: Context, targets: Array
) -> tuple[Array, Array]:
    return token_scores(model.bind(parameters)(tokens, context), targets)


@functools.partial(jax.jit, static_argnums=0)
def _run_selections(
    model: Functional, parameters: Parameters, tokens: Array, context: Context
) -> list[dict[str, Selection]]:
    return model.bind(parameters).selections(tokens, context)


@functools.partial(jax.jit, static_argnums=0)
def _run_streams(model: Functional, parameters: Parameters, tokens: Array, context: Context) -> list[Array]:
    return model.bind(parameters).streams(tokens, context)
