"""Configuration: a ConfigDict from a file and overrides, checked once into frozen dataclasses.

Below this package nothing reads a ConfigDict. `load` fills in every default at once, so that overrides, records and
digests cover the whole configuration. A key without a default must be present.
"""

from sparsejax.config.build import ConfigError, build, complete, to_section
from sparsejax.config.diff import difference, digest
from sparsejax.config.load import load, resolve_source, run_file, split_source
from sparsejax.config.override import check, check_evaluation, check_phase, override
from sparsejax.config.resume import EFFECTS, Change, find_changes, resumable_keys
from sparsejax.config.schema import (
    BASE_PHASE,
    OPTIMIZERS,
    UNBOUNDED_SCHEDULES,
    AxialConfig,
    CheckpointConfig,
    Config,
    EmbeddingConfig,
    EvalConfig,
    GroupConfig,
    HeadConfig,
    InitConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    ShardingConfig,
    TrainConfig,
    check_data,
)
from sparsejax.config.source import ModelSource
from sparsejax.config.teacher import TeacherConfig, check_teacher

__all__ = [
    "BASE_PHASE",
    "EFFECTS",
    "OPTIMIZERS",
    "UNBOUNDED_SCHEDULES",
    "AxialConfig",
    "Change",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "EmbeddingConfig",
    "EvalConfig",
    "GroupConfig",
    "HeadConfig",
    "InitConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelSource",
    "OptimizerConfig",
    "PhaseConfig",
    "ShardingConfig",
    "TeacherConfig",
    "TrainConfig",
    "build",
    "check",
    "check_data",
    "check_evaluation",
    "check_phase",
    "check_teacher",
    "complete",
    "difference",
    "digest",
    "find_changes",
    "load",
    "override",
    "resolve_source",
    "resumable_keys",
    "run_file",
    "split_source",
    "to_section",
]
