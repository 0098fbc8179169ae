"""reference/api: the public names of the packages, which mkdocstrings documents."""

from __future__ import annotations

import importlib
import inspect
import types

from generators import markdown

# Page -> title and packages. The names of a package are those of its `__all__`.
PAGES = {
    "patterns": ("Patterns", ["sparsejax.patterns"]),
    "testing": ("Testing a pattern", ["sparsejax.patterns.testing"]),
    "ops": ("Ops", ["sparsejax.ops"]),
    "layers": ("Layers", ["sparsejax.layers"]),
    "model": ("Model and decoding", ["sparsejax.model", "sparsejax.decode"]),
    "config": ("Config and schedules", ["sparsejax.config", "sparsejax.schedule"]),
    "data": ("Data and probes", ["sparsejax.data", "sparsejax.data.probes"]),
    "train": ("Training", ["sparsejax.train"]),
    "sweep": ("Sweeps and searches", ["sparsejax.sweep", "sparsejax.sweep.search"]),
    "report": ("Reports", ["sparsejax.report"]),
    "account": ("Accounts of cost", ["sparsejax.account", "sparsejax.budget"]),
    "interop": ("Hugging Face checkpoints", ["sparsejax.interop.huggingface"]),
    "errors": ("Errors", ["sparsejax.errors"]),
}


def generate(name: str) -> str:
    """The page of a few packages."""
    title, packages = PAGES[name]
    return markdown.page(title, *(part for package in packages for part in _describe(package)))


def _describe(package: str) -> list[str]:
    module = importlib.import_module(package)
    names = [name for name in _public(module) if not isinstance(getattr(module, name), types.ModuleType)]
    return [
        f"`{package}`",
        inspect.getdoc(module) or "",
        *(f"::: {package}.{name}" for name in names),
    ]


def _public(module: types.ModuleType) -> list[str]:
    """The public names in the order of their definition or import."""
    if hasattr(module, "__all__"):
        return [name for name in vars(module) if name in module.__all__]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
