"""The model with which a run of a configuration starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from sparsejax import sharding
from sparsejax.config import Config
from sparsejax.data.tokenizers import HuggingFace, Tokenizer, load_tokenizer
from sparsejax.errors import InputError
from sparsejax.init.plan import plan
from sparsejax.loaded import LoadedModel, Source
from sparsejax.model import Functional


class ConfigSource(Source):
    """The configuration from which a model was built."""

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer of the configuration.

        Raises:
          InputError: It has no text, or its tokenizer is trained by a run or missing.
        """
        assert self.run is not None
        name = self.run.data.tokenizer
        if self.run.data.task != "text":
            raise InputError("data.task", f"the probe {self.run.data.task} has no tokenizer; use token ids")
        if name.startswith("bpe:"):
            raise InputError("data.tokenizer", f"{name} is trained by a run; name a run by run:WORKDIR")
        return load_tokenizer(name, (), "", Path())

    def prefix(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that the tokenizer of a Hugging Face folder writes before every text."""
        assert self.run is not None
        is_folder = (self.run.init.source or "").startswith("hf:")
        return tokenizer.find_prefix() if is_folder and isinstance(tokenizer, HuggingFace) else ()


def start_model(config: Config) -> LoadedModel:
    """Returns the model with which a run of a configuration starts: with the weights of `init.source`, or random ones.

    Raises:
      InputError: See `plan`.
    """
    model = Functional(config.model)
    if config.init.source is None:
        key, _ = jax.random.split(jax.random.key(config.train.seed))  # as in `runs.state`
        parameters = jax.jit(model.init)(key)
    else:
        parameters = plan(config.init, model).load(sharding.single_device_mesh(), config.train.seed)
    source = ConfigSource(length=config.data.length, run=config, data=dataclasses.asdict(config.data))
    return LoadedModel(config.model, parameters, source)
