"""Adapter for lm-evaluation-harness: `python -m sparsejax.harness run --model sparsejax --model_args path=MODEL ...`.

    lm_eval.simple_evaluate(harness.SparsejaxLM(sparsejax.load("runs/a")), tasks=["arc_easy"])

Importing this module registers the model under the name `sparsejax`. It needs the extra `eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sparsejax.errors import InputError
from sparsejax.loaded import LoadedModel
from sparsejax.loading import Step, load

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Request = tuple[Any, list[int], list[int]]  # key of the cache, context and continuation


@register_model("sparsejax")
class SparsejaxLM(TemplateLM):
    """A model of `sparsejax.load` as the harness calls it.

    Contexts are encoded as `LoadedModel.encode` does, with the tokens that begin every text. A context and its
    continuation that exceed `max_length` tokens lose their first tokens.

    Args:
      path: A workdir, a Hugging Face folder, or a LoadedModel.
      step: Step of the checkpoint, see `sparsejax.load`.
      tokenizer: Tokenizer of a Hugging Face folder, see `sparsejax.load`.
      max_length: Tokens per window; defaults to the trained length, or to the positions of a Hugging Face model.
      max_gen_toks: Tokens to generate unless the task sets their number.
      batch_size: Rows per call of the model.
      seed: Seed of sampled continuations.
      device: Unused: JAX selects the device, see `JAX_PLATFORMS`.
      max_batch_size: Unused: `batch_size` is fixed.

    Raises:
      InputError: The model cannot be loaded, is not causal or has no tokenizer, or an argument is invalid.
    """

    def __init__(
        self,
        path: str | LoadedModel,
        step: int | str | None = None,
        tokenizer: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 8,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.model: LoadedModel = (
            path if isinstance(path, LoadedModel) else load(path, step=cast(Step, step), tokenizer=tokenizer)
        )
        if not self.model.config.causal:
            raise InputError("path", f"{self.model.source.kind} is an encoder; the harness needs a causal model")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError("batch_size", f"{batch_size!r}: expected a positive integer")
        self.batch_size, self.max_gen_toks, self.seed = int(batch_size), int(max_gen_toks), seed
        limit = self.model.config.embedding.max_length
        self.max_length = int(max_length or self.model.source.length)
        if self.max_length < 1:
            raise InputError("max_length", f"{self.max_length} is below 1")
        if limit is not None and self.max_length > limit:
            raise InputError("max_length", f"{self.max_length} exceeds the {limit} positions of the model")
        self._ends = self.model.source.ends(self.model.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; that between documents for a tokenizer without one."""
        end = self._ends[0] if self._ends else self.model.tokenizer.separator
        if end is None:
            raise InputError("tokenizer", f"{self.model.tokenizer.name} has no token that ends a text")
        return end

    @property
    def prefix_token_id(self) -> int:
        """The context of an empty context: the last token of those that begin every text; by default `eot_token_id`."""
        prefix = self.model.source.prefix(self.model.tokenizer)
        return prefix[-1] if prefix else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Returns the ids of a text, by default after those that begin every text."""
        if add_special_tokens is False:
            return self.model.tokenizer.encode(string.encode()).tolist()
        return self.model.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                count = f"a continuation has {len(continuation):,} tokens"
                raise InputError("max_length", f"{self.max_length:,}: {count}, all of which must fit")
            kept = self.max_length + 1 - len(continuation)
            pairs.append((np.array(context[-kept:], np.int32), np.array(continuation, np.int32)))
        with tqdm(total=-(-len(pairs) // self.batch_size), desc="batches", disable=disable_tqdm) as bar:
            scores = self.model.score(
                pairs, batch=self.batch_size, progress=lambda batch, batches: bar.update(batch > 0)
            )
            bar.update(len(pairs) > 0)
        results = [(score.log_likelihood, score.is_greedy) for score in scores]
        for (key, _, _), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts, whose tokens are each predicted once, in windows."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows_of_text = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            disjoint = [(None, *make_disjoint_window(pair)) for pair in windows_of_text]
            windows += disjoint
            counts.append(len(disjoint))
        values = [value for value, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = [float(sum(part)) for part in np.split(np.array(values), np.cumsum(counts)[:-1])]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations up to a stop string; equal settings share batches, in the order of the requests."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="continuations", disable=disable_tqdm) as bar:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    settings = requests[batch[0]].args[1]
                    for index, text in zip(batch, self._continue(requests, batch, settings), strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return texts

    def _continue(self, requests: list[Instance], batch: list[int], settings: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        count, stop = options.pop("max_gen_toks"), [text for text in options.pop("until") if text]
        if not options.pop("do_sample"):
            options["temperature"] = 0.0
        unknown = next((name for name in options if name not in SAMPLING), None)
        if unknown is not None:
            raise InputError(f"generation_kwargs.{unknown}", f"not supported; known are {', '.join(SAMPLING)}")
        room = self.max_length - count
        if room < 1:
            problem = f"{count} leaves no room for a context in max_length = {self.max_length}"
            raise InputError("generation_kwargs.max_gen_toks", problem)
        contexts = [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in batch]
        prompts = [np.array(context[-room:], np.int32) for context in contexts]
        seeds = [self.seed + index for index in batch]
        completions = self.model.generate(prompts, count, stop=stop, seed=seeds, ends=self._ends, **options)
        return [completion.text for completion in completions]
