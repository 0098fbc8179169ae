"""What the tests of `init` share."""

from pathlib import Path
from typing import Any

import numpy as np

from sparsejax import config as configs
from sparsejax.config import Config
from sparsejax.init.plan import Plan, plan
from sparsejax.model import Functional, locate_parameters
from sparsejax.sharding import single_device_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
MIXER = "model.layers.full.mixer"
PROBE = {
    "data.task": "mqar",
    "data.length": 32,
    "data.probe.length": 32,
    "data.probe.vocab": 64,
    "train.batch": 4,
    "train.steps": 1,
    "train.log_every": 1,
    "train.check": False,
    "eval.batch": 4,
    "eval.batches": 1,
    "eval.final": 1,
    "eval.sample": 0,
}  # of a run that fits the vocabulary of the golden folders


def read(source: str, overrides: dict[str, Any] | None = None) -> Config:
    """Returns the checked configuration of a run from a source."""
    return configs.check(configs.load(source, overrides))


def plan_for(config: Config) -> Plan:
    """Plans the parameters of a configuration."""
    return plan(config.init, Functional(config.model))


def load(config: Config) -> dict[str, np.ndarray]:
    """Loads the parameters of a configuration; returns them by path in the unrolled model."""
    planned = plan_for(config)
    return unroll(planned.model, planned.load(single_device_mesh(), config.train.seed))


def unroll(model: Functional, parameters: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns parameters by path in the unrolled model."""
    unrolled = {}
    for name, (path, repetition, _) in locate_parameters(model).items():
        leaf: Any = parameters
        for key in path:
            leaf = leaf[key]
        unrolled[name] = np.asarray(leaf if repetition is None else leaf[repetition])
    return unrolled
