"""Tiny models with random parameters and the text of a small folder, for analyses."""

import dataclasses

import jax

from sparsejax import config as configs
from sparsejax.loaded import LoadedModel, Source
from sparsejax.model import Functional
from tests.train import runs

LENGTH = 24


def build(text, overrides=None, length=LENGTH, scale=2.0):
    """Returns a LoadedModel of the recipe with overrides of its section `model`."""
    settings = runs.load(text, {"data.length": length} | {f"model.{k}": v for k, v in (overrides or {}).items()})
    run = configs.check(settings)
    parameters = Functional(run.model).init(jax.random.key(0))
    parameters = jax.tree.map(lambda leaf: scale * leaf, parameters)
    source = Source(length=length, run=run, data=dataclasses.asdict(run.data))
    return LoadedModel(run.model, parameters, source)
