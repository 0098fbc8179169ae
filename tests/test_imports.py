"""The rooms of the package import one another one way only."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import sparsejax

PACKAGE = Path(sparsejax.__file__).parent

# Each room, and the rooms it needs. All of them stand above it.
NEEDS = {
    "patterns": set(),
    "ops": {"patterns"},
    "layers": {"patterns", "ops"},
    "schedule": set(),
    "data": set(),
    "config": {"patterns", "layers", "schedule", "data"},
    "sharding": {"config"},
    "embedding": {"layers", "config"},
    "model": {"layers", "config", "embedding"},
    "decode": {"model"},
    "account": {"patterns", "layers", "config", "model"},
    "complexity": {"patterns", "ops"},
    "show": {"patterns", "layers", "config", "data", "account", "complexity"},
    "draw": {"patterns", "config"},
    "train": {"patterns", "layers", "config", "sharding", "data", "model", "decode"},
    "job": set(),
    "sweep": {"schedule", "config", "account", "draw", "job", "train"},
    "report": {"config", "train", "sweep"},
    "interop": {"schedule", "config", "layers", "model", "patterns", "sharding"},
    "cli": (
        {"patterns", "ops", "schedule", "config", "data", "interop", "sharding", "show", "draw"}
        | {"train", "sweep", "report"}
    ),
    "__main__": {"cli"},
    "__init__": set(),  # so that one room can be imported without the others
}


def imported(file: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of_rooms() -> dict[str, list[Path]]:
    rooms = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        rooms.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
    return rooms


def test_every_room_imports_what_it_needs_and_nothing_else():
    found = {
        room: {name.split(".")[1] for file in files for name in imported(file) if name.startswith("sparsejax.")}
        - {room}
        for room, files in files_of_rooms().items()
    }
    assert found == NEEDS


def test_imports_point_one_way():
    above = set()
    for room, needs in NEEDS.items():
        assert needs <= above, room
        above.add(room)


def test_patterns_import_numpy_and_the_standard_library_only():
    for file in files_of_rooms()["patterns"]:
        outside = {name.split(".")[0] for name in imported(file)} - {"sparsejax"}
        assert outside <= {*sys.stdlib_module_names, "numpy"}, file
