"""reference/api: the public names of the packages, which mkdocstrings documents."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any

from generators import markdown

# Page -> title and packages. The names of a package are those of its `__all__`.
PAGES = {
    "patterns": (
        "Patterns",
        ["sparsejax.patterns", "sparsejax.patterns.receptive_field", "sparsejax.patterns.recipes"],
    ),
    "testing": ("Testing models, mixers and patterns", ["sparsejax.testing"]),
    "ops": ("Ops", ["sparsejax.ops"]),
    "layers": ("Layers", ["sparsejax.layers"]),
    "model": ("Model and inference", ["sparsejax.model", "sparsejax.inference"]),
    "config": ("Config and schedules", ["sparsejax.config", "sparsejax.schedule"]),
    "data": ("Data and probes", ["sparsejax.data", "sparsejax.data.probes"]),
    "train": ("Training", ["sparsejax.train", "sparsejax.runs"]),
    "init": ("Start from weights", [f"sparsejax.init.{name}" for name in ("plan", "rules", "weights", "configs")]),
    "sweep": ("Sweeps and searches", ["sparsejax.sweep", "sparsejax.sweep.search"]),
    "report": ("Reports", ["sparsejax.report"]),
    "analysis": ("Analysis", ["sparsejax.analysis"]),
    "account": ("Accounts of cost", ["sparsejax.account", "sparsejax.budget"]),
    "interop": ("Hugging Face checkpoints", ["sparsejax.interop.huggingface"]),
    "extensions": ("Extensions", ["sparsejax.extensions"]),
    "loading": ("Loading", ["sparsejax.loading"]),
    "errors": ("Errors", ["sparsejax.errors"]),
}
# Names with which the list of a package begins.
FIRST = ("parse", "register", "Pattern", "attend", "decode_attend", "Mixer", "MixerConfig", "Layer", "train", "sweep")


def generate(name: str) -> str:
    """The page of a few packages."""
    title, packages = PAGES[name]
    return markdown.page(title, *(part for package in packages for part in _describe(package)))


def _describe(package: str) -> list[str]:
    module = importlib.import_module(package)
    values = [value for value in _public(module) if inspect.isclass(value) or inspect.isfunction(value)]
    values.sort(key=lambda value: FIRST.index(value.__name__) if value.__name__ in FIRST else len(FIRST))
    # The path of the definition, since a package may have a function and a module of the same name.
    return [
        f"## {package}",
        inspect.getdoc(module) or "",
        *(f"::: {value.__module__}.{value.__qualname__}" for value in values),
    ]


def _public(module: types.ModuleType) -> list[Any]:
    """The public definitions in the order of their definition or import."""
    if hasattr(module, "__all__"):
        return [value for name, value in vars(module).items() if name in module.__all__]
    defined = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    return [value for value in defined if not value.__qualname__.startswith("_")]
