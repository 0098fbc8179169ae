"""Tables of definitions by name: those of the package, of the user's modules and of installed packages."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sparsejax.errors import InputError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")
INSTALLED = {"site-packages", "dist-packages"}  # folders of distributions


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a class or a function is defined.

    Attributes:
      module: Name of the module.
      qualname: Name in the module.
      file: The absolute path of the module; None in an interactive session.
      digest: SHA-256 of the file when it was imported, in hexadecimal; None without a file.
    """

    module: str
    qualname: str
    file: str | None
    digest: str | None

    @classmethod
    def of(cls, definition: type | Callable[..., Any]) -> Origin:
        """The origin of a class or a function, whose module may still be executing."""
        path = Path(getattr(sys.modules.get(definition.__module__), "__file__", None) or "").resolve()
        file, digest = (str(path), file_digest(path)) if path.is_file() else (None, None)
        return cls(definition.__module__, definition.__qualname__, file, digest)

    def __str__(self) -> str:
        return f"{self.qualname} in {self.file or self.module}"

    def repeats(self, other: Origin) -> bool:
        """Whether both are the same definition in the same content of a file."""
        return self.digest is not None and (self.qualname, self.digest) == (other.qualname, other.digest)

    def supersedes(self, other: Origin) -> bool:
        """Whether `other` is an earlier version of this definition: an edited file, or a cell that is run again."""
        if self.file is None:
            return other.file is None and (self.module, self.qualname) == (other.module, other.qualname)
        return self.file == other.file and self.digest != other.digest


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_frozen_dataclass(definition: type) -> bool:
    """Whether a class itself, and not only a base of it, is a frozen dataclass."""
    return "__dataclass_fields__" in vars(definition) and getattr(definition, "__dataclass_params__").frozen  # noqa: B009


class Registry(Mapping[str, T], Generic[T]):
    """Definitions by name.

    Iteration lists every name, including those of entry points, which are imported only when they are looked up. The
    name of an entry point is the name that its module registers.

    Args:
      kind: What the table holds, as in "pattern"; the argument of its errors.
      group: Group of the entry points.
      builtin: The definitions of the package.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, T]):
        self.kind, self.group = kind, group
        self.members: dict[str, tuple[T, Origin | None]] = {name: (value, None) for name, value in builtin.items()}
        self._installed: dict[str, EntryPoint] | None = None
        REGISTRIES.append(self)

    def add(self, name: str, value: T, definition: type | Callable[..., Any]) -> T:
        """Registers `value`, which `definition` defines, and returns what `name` now stands for.

        That is the value registered first if the same file is run again, and the new value if the file has changed.

        Raises:
          InputError: Another definition has the name.
        """
        origin = Origin.of(definition)
        if name in self.members:
            present, other = self.members[name]
            if other is None:
                raise InputError(self.kind, f"{name!r}, {origin}, is the name of a built-in {self.kind}; rename it")
            if origin.repeats(other):
                return present
            if not origin.supersedes(other):
                raise InputError(self.kind, f"{name!r} is defined twice: {other} and {origin}; rename one of them")
        self.members[name] = value, origin
        return value

    @property
    def registered(self) -> dict[str, Origin]:
        """The origins of the definitions outside the package, by name."""
        return {name: origin for name, (_, origin) in self.members.items() if origin is not None}

    def distribution(self, name: str) -> str:
        """Name and version of the distribution that registered `name`, such as "my-mixers 1.0"; empty if none did."""
        origin, point = self.members[name][1], (self._installed or {}).get(name)
        if origin is None:
            return ""
        top, distribution = origin.module.partition(".")[0], None
        if point is not None and point.module.partition(".")[0] == top:
            distribution = point.dist
        elif origin.file is not None and INSTALLED & set(Path(origin.file).parts):
            import importlib.metadata

            names = importlib.metadata.packages_distributions().get(top)
            distribution = importlib.metadata.distribution(names[0]) if names else None
        return "" if distribution is None else f"{distribution.name} {distribution.version}"

    def __getitem__(self, name: str) -> T:
        if name not in self.members:
            if name not in self._entry_points:
                raise KeyError(name)
            self._load(name)
        return self.members[name][0]

    def __contains__(self, name: object) -> bool:
        return name in self.members or name in self._entry_points

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.members, *self._entry_points]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def _entry_points(self) -> dict[str, EntryPoint]:
        """The entry points of installed packages by name, none of which is imported yet."""
        if self._installed is None:
            from importlib.metadata import entry_points  # slow, and needed only for names outside the package

            points: dict[str, EntryPoint] = {}
            for point in entry_points(group=self.group):
                if point.name in self.members and self.members[point.name][1] is None:
                    raise InputError(self.group, f"{_describe(point)} has the name of a built-in {self.kind}")
                other = points.setdefault(point.name, point)
                if other.value != point.value:
                    raise InputError(self.group, f"{_describe(other)} and {_describe(point)} have the same name")
            self._installed = points
        return self._installed

    def _load(self, name: str) -> None:
        point = self._entry_points[name]
        try:
            point.load()
        except Exception as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(self.group, f"{_describe(point)} cannot be imported: {problem}") from error
        if name not in self.members:
            raise InputError(self.group, f"{_describe(point)} registers no {self.kind} {name!r}")


REGISTRIES: list[Registry[Any]] = []


def _describe(point: EntryPoint) -> str:
    """The entry point and its distribution."""
    distribution = "" if point.dist is None else f" of {point.dist.name} {point.dist.version}"
    return f"the entry point '{point.name} = {point.value}'{distribution}"
