"""Everything public says what it does, and what shape its arrays have."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import pytest

import sparsejax

ROOMS = [module.name for module in pkgutil.iter_modules(sparsejax.__path__) if module.name != "__main__"]
BARE_ARRAY = re.compile(r"(jax\.|np\.|numpy\.)?(Array|ndarray)( \| None)?")  # a whole annotation without a shape
SHAPE = re.compile(r"\[[^\]]*\]")  # as in "int32 [b, t]"


def public_names(room: str) -> Iterator[tuple[str, object]]:
    """A room's functions and classes, and the classes' own methods and properties, by full name."""
    module = importlib.import_module(f"sparsejax.{room}")
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            yield f"{room}.{name}", value
        if inspect.isclass(value):
            for method, member in inspect.getmembers(value):
                member = member.fget if isinstance(member, property) else member
                ours = inspect.unwrap(getattr(member, "__func__", member))
                if not method.startswith("_") and inspect.isfunction(ours) and ours.__module__.startswith("sparsejax."):
                    yield f"{room}.{name}.{method}", getattr(value, method)


def says_nothing(value: object) -> bool:
    if not inspect.isclass(value):
        return not inspect.getdoc(value)  # a method may inherit what it says
    return not value.__doc__ or value.__doc__.startswith(f"{value.__name__}(")  # written by @dataclass


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_have_docstrings(room):
    assert importlib.import_module(f"sparsejax.{room}").__doc__
    assert [name for name, value in public_names(room) if says_nothing(value)] == []


def shapeless_arrays(value: object) -> list[str]:
    """Arguments that are arrays of a shape that neither annotation nor docstring names; PRNG keys have none."""
    function = value.fget if isinstance(value, property) else value
    hints = getattr(function, "__annotations__", {})
    bare = [name for name, hint in hints.items() if BARE_ARRAY.fullmatch(str(hint)) and name != "key"]
    return [] if SHAPE.search(inspect.getdoc(value) or "") else bare


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_name_the_shapes_of_their_arrays(room):
    bare = {name: shapeless_arrays(value) for name, value in public_names(room)}
    assert {name: arguments for name, arguments in bare.items() if arguments} == {}
