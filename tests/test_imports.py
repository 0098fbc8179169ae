"""The packages of sparsejax import one another in one direction only."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsejax

pytestmark = pytest.mark.quick

PACKAGE = Path(sparsejax.__file__).parent

# Every package and the packages that it imports. All of them stand above it.
IMPORTS: dict[str, set[str]] = {
    "errors": set(),
    "signals": set(),
    "metrics": set(),
    "machine": set(),
    "overrides": {"errors"},
    "records": {"errors"},
    "workdir": {"errors", "records"},
    "paths": {"errors"},
    "buckets": {"errors", "paths", "workdir"},
    "palette": set(),
    "svg": {"palette"},
    "figures": {"errors", "workdir", "svg"},
    "registry": {"errors"},
    "extensions": {"errors", "paths", "registry", "workdir"},
    "patterns": {"errors", "palette", "svg", "registry"},
    "schedule": {"errors", "palette", "svg", "patterns"},
    "ops": {"errors", "paths", "patterns", "records"},
    "layers": {"errors", "registry", "patterns", "ops"},
    "data": {"errors", "paths", "signals", "workdir"},
    "presets": {"errors", "schedule"},
    "config": {
        "errors",
        "paths",
        "extensions",
        "overrides",
        "workdir",
        "patterns",
        "presets",
        "schedule",
        "layers",
        "data",
    },
    "sharding": {"errors", "ops", "config"},
    "embedding": {"errors", "layers", "config"},
    "model": {"errors", "schedule", "ops", "layers", "config", "embedding"},
    "inference": {"errors", "ops", "metrics", "data", "layers", "sharding", "model"},
    "loaded": {"errors", "metrics", "ops", "layers", "data", "config", "sharding", "model", "inference"},
    "account": {"errors", "patterns", "layers", "config", "model"},
    "traffic": {"ops", "config", "model"},
    "check": {"errors", "patterns", "ops", "layers", "config", "model", "account"},
    "interop": {
        "errors",
        "paths",
        "workdir",
        "patterns",
        "schedule",
        "layers",
        "data",
        "config",
        "sharding",
        "model",
        "loaded",
    },
    "runs": {"errors", "records", "overrides", "workdir", "data", "config", "sharding", "model"},
    "loading": {
        "errors",
        "metrics",
        "buckets",
        "extensions",
        "workdir",
        "data",
        "config",
        "sharding",
        "model",
        "loaded",
        "runs",
        "interop",
    },
    "init": {
        "errors",
        "paths",
        "extensions",
        "workdir",
        "layers",
        "data",
        "config",
        "sharding",
        "model",
        "loaded",
        "runs",
        "interop",
        "loading",
    },
    "train": {
        "errors",
        "paths",
        "registry",
        "buckets",
        "extensions",
        "signals",
        "metrics",
        "overrides",
        "workdir",
        "patterns",
        "ops",
        "layers",
        "data",
        "config",
        "sharding",
        "model",
        "loaded",
        "account",
        "check",
        "inference",
        "runs",
        "loading",
        "init",
    },
    "complexity": {"patterns", "ops"},
    "show": {"traffic", "errors", "patterns", "layers", "data", "config", "account", "runs", "loading", "complexity"},
    "plan": {
        "traffic",
        "errors",
        "layers",
        "overrides",
        "config",
        "sharding",
        "model",
        "runs",
        "loading",
        "train",
        "show",
    },
    "testing": {"patterns", "check"},
    "draw": {"errors", "paths", "figures", "palette", "patterns"},
    "doctor": {"patterns", "ops"},
    "harness": {"errors", "loaded", "loading"},
    "job": {"signals", "workdir"},
    "budget": {"errors", "overrides", "schedule", "config", "runs", "account", "loading"},
    "report": {
        "errors",
        "paths",
        "buckets",
        "extensions",
        "metrics",
        "overrides",
        "records",
        "workdir",
        "figures",
        "palette",
        "config",
        "runs",
        "account",
    },
    "analysis": {
        "errors",
        "workdir",
        "figures",
        "palette",
        "patterns",
        "ops",
        "layers",
        "data",
        "config",
        "model",
        "inference",
        "loaded",
        "report",
    },
    "placement": {
        "errors",
        "overrides",
        "workdir",
        "figures",
        "palette",
        "metrics",
        "patterns",
        "schedule",
        "layers",
        "data",
        "config",
        "model",
        "inference",
        "loaded",
        "loading",
        "account",
        "analysis",
    },
    "sweep": {
        "errors",
        "paths",
        "signals",
        "metrics",
        "machine",
        "overrides",
        "records",
        "workdir",
        "schedule",
        "config",
        "runs",
        "train",
        "account",
        "job",
        "budget",
        "report",
    },
    "cli": {
        "errors",
        "paths",
        "extensions",
        "signals",
        "overrides",
        "patterns",
        "presets",
        "ops",
        "data",
        "layers",
        "config",
        "sharding",
        "init",
        "train",
        "show",
        "plan",
        "draw",
        "doctor",
        "runs",
        "interop",
        "budget",
        "report",
        "sweep",
        "check",
        "analysis",
        "loaded",
        "loading",
        "metrics",
        "records",
        "workdir",
        "placement",
    },
    "__main__": {"cli"},
    # Imported when a name is first used.
    "__init__": {
        "errors",
        "patterns",
        "schedule",
        "ops",
        "layers",
        "data",
        "config",
        "model",
        "inference",
        "train",
        "interop",
        "loading",
        "report",
        "sweep",
    },
}


def imported(file: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, at its top level and in its functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_by_package() -> dict[str, list[Path]]:
    packages: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        packages.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
    return packages


def test_every_package_imports_what_is_declared():
    actual = {
        package: {name.split(".")[1] for file in files for name in imported(file) if name.startswith("sparsejax.")}
        - {package}
        for package, files in files_by_package().items()
    }
    assert actual == IMPORTS


def test_imports_point_in_one_direction():
    above: set[str] = set()
    for package, imports in IMPORTS.items():
        assert imports <= above, package
        above.add(package)


def test_patterns_import_numpy_and_the_standard_library_only():
    for file in files_by_package()["patterns"]:
        outside = {name.split(".")[0] for name in imported(file)} - {"sparsejax"}
        assert outside <= {*sys.stdlib_module_names, "numpy"}, file
