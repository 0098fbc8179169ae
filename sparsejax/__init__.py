"""Sparse and hybrid sequence models in JAX.

The names below are imported when they are first used, so that `import sparsejax` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsejax import config, data, interop, layers, ops, patterns, report, schedule, sweep, train
    from sparsejax.errors import InputError
    from sparsejax.inference import generate
    from sparsejax.interop.huggingface import export
    from sparsejax.loading import load
    from sparsejax.model import Functional, Model
    from sparsejax.ops import attend

__version__ = "0.2.0"

__all__ = [
    "Functional",
    "InputError",
    "Model",
    "attend",
    "config",
    "data",
    "export",
    "generate",
    "interop",
    "layers",
    "load",
    "ops",
    "patterns",
    "report",
    "schedule",
    "sweep",
    "train",
]

# The module that defines a name, if the name is not a module of the package itself.
_MODULES = {
    "Functional": "model",
    "InputError": "errors",
    "Model": "model",
    "attend": "ops",
    "export": "interop.huggingface",
    "generate": "inference",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sparsejax' has no attribute {name!r}")
    if name not in _MODULES:
        return importlib.import_module(f"sparsejax.{name}")
    value = globals()[name] = getattr(importlib.import_module(f"sparsejax.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
