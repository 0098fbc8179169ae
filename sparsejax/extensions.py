"""The user's modules: how they are imported, and how a run records them.

A file is imported with its folder first in the search path. Modules of one folder never stand for modules of the same
name in another folder, and an unchanged module is imported once per process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from sparsejax.errors import InputError
from sparsejax.paths import local_path
from sparsejax.registry import INSTALLED, REGISTRIES, file_digest
from sparsejax.workdir import Workdir, read_json, write_json


@dataclasses.dataclass(frozen=True)
class Extension:
    """A module that registered patterns or mixers.

    Attributes:
      source: The absolute path of its file, or the name of the module if it belongs to a distribution; empty in an
        interactive session.
      digest: SHA-256 of the file when it was imported; empty in an interactive session.
      distribution: Name and version of the distribution, such as "my-mixers 1.0"; empty if there is none.
      names: The registered names by kind, "pattern" or "mixer".
    """

    source: str
    digest: str
    distribution: str
    names: dict[str, list[str]]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Kind and name of everything that the module registered."""
        return [(kind, name) for kind, names in self.names.items() for name in names]

    @property
    def version(self) -> str:
        """The distribution and the digest."""
        return f"{self.distribution} {self.digest}".strip()


RECORD = {"source": str, "digest": str, "distribution": str, "names": {...: [str]}}  # schema of a recorded extension


class MissingError(InputError):
    """A file or a module that does not exist."""


# The record of a run.


def loaded() -> list[Extension]:
    """The modules outside the package that registered patterns or mixers in this process."""
    extensions: dict[str, Extension] = {}
    for registry in REGISTRIES:
        for name, origin in registry.registered.items():
            distribution = registry.distribution(name)
            source = origin.module if distribution else origin.file or ""
            new = Extension(source, origin.digest or "", distribution, {})
            extensions.setdefault(source, new).names.setdefault(registry.kind, []).append(name)
    return list(extensions.values())


def describe_versions() -> dict[str, str]:
    """Distribution and digest of each of these modules, by source."""
    return {extension.source: extension.version for extension in loaded()}


def digest_sources() -> dict[str, str] | None:
    """SHA-256 of the imported files outside of distributions, by path, on which registered definitions may depend.

    Returns:
      Nothing if no module registered a definition; None if one was registered in an interactive session.
    """
    if not (extensions := loaded()):
        return {}
    if any(not extension.digest for extension in extensions):
        return None
    hidden = [module for folder in _folders.values() for module, _ in folder.modules.values()]
    files = {file for file in map(_file, [*sys.modules.values(), *hidden]) if file is not None and file.is_file()}
    others = {Path(sysconfig.get_path("stdlib")), Path(__file__).parent}
    files = {file for file in files if not INSTALLED & set(file.parts) and not others & set(file.parents)}
    return {str(file): file_digest(file) for file in sorted(files)} | describe_versions()


def record(workdir: Workdir) -> None:
    """Writes these modules to a workdir; no file if there are none."""
    if extensions := loaded():
        write_json(workdir.extensions, [dataclasses.asdict(extension) for extension in extensions])


def find_changes(workdir: Workdir) -> list[str]:
    """Returns the sources of the modules that have changed since a workdir recorded them."""
    before, now = ({key: part for part in parts for key in part.keys} for parts in (_read(workdir), loaded()))
    changed = [now[key].source for key in before.keys() & now.keys() if now[key].version != before[key].version]
    return sorted(set(changed))


def restore(workdir: Workdir) -> None:
    """Imports the modules that a workdir records, unless the same modules were imported before.

    A module that no longer exists is not needed if its names are registered already.

    Raises:
      InputError: A module is missing, raises an exception or does not register a name; or a name belongs to another
        module.
    """
    for extension in _read(workdir):
        names = ", ".join(f"{kind} {name!r}" for kind, name in extension.keys)
        if _digests(extension) == {extension.digest}:
            continue
        try:
            import_source(extension.source)
        except InputError as error:
            if None in _digests(extension) or not isinstance(error, MissingError):
                missing = isinstance(error, MissingError) and extension.source
                remedy = "; restore it, or correct its path" if missing else ""
                raise InputError(workdir.extensions, f"{names}: {error.problem}{remedy}") from error
        if None in _digests(extension):
            raise InputError(workdir.extensions, f"{names}: {extension.source} does not register all of them")


def _digests(extension: Extension) -> set[str | None]:
    """Digests of the files that define the names of an extension now; None for a name that is not registered."""
    registered = {registry.kind: registry.registered for registry in REGISTRIES}
    origins = [registered.get(kind, {}).get(name) for kind, name in extension.keys]
    return {None if origin is None else origin.digest or "" for origin in origins}


def _read(workdir: Workdir) -> list[Extension]:
    if not workdir.extensions.exists():
        return []
    return [Extension(**{name: fields[name] for name in RECORD}) for fields in read_json(workdir.extensions, [RECORD])]


# Imports.


def import_source(source: str) -> None:
    """Imports a file, `FILE.py`, or a module, `package.module`.

    Raises:
      MissingError: There is no such file or module.
      InputError: The module raises an exception.
    """
    if not source:
        raise MissingError("import", "defined in an interactive session; move it to a file and import that")
    is_file = source.endswith(".py")
    source = str(local_path(source, "import")) if is_file else source
    if is_file and not Path(source).is_file():
        raise MissingError("import", f"no file {source!r}")
    try:
        if is_file:
            _import_file(Path(source).resolve())
        else:
            importlib.import_module(source)
    except Exception as error:
        if not is_file and isinstance(error, ModuleNotFoundError) and f"{source}.".startswith(f"{error.name}."):
            raise MissingError("import", f"no module {source!r}; the path of a file ends in .py") from error
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError("import", f"{source}: {kind}{' '.join(str(error).split())}") from error


def run_file(path: str | Path) -> ModuleType:
    """Runs a Python file, which can import modules of its folder, and returns its module."""
    path = Path(path)
    name = f"sparsejax_file_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with importing_from(path.parent):
        spec.loader.exec_module(module)
    return module


def _import_file(path: Path) -> None:
    """Imports a file by its name in its folder, or as a module of the package that it belongs to."""
    folder, names = path.parent, [path.stem]
    while (folder / "__init__.py").is_file():
        folder, names = folder.parent, [folder.name, *names]
    if names[0].isidentifier() and names[0] not in sys.stdlib_module_names:
        with importing_from(folder):
            importlib.import_module(".".join(names))
    else:
        run_file(path)


@dataclasses.dataclass
class _Folder:
    """A folder from which modules are imported.

    Attributes:
      path: The folder.
      modules: What was imported from it, by name: module and digest of its file.
      outside: First parts of the names of modules that were imported before, from elsewhere.
    """

    path: Path
    modules: dict[str, tuple[ModuleType, str]] = dataclasses.field(default_factory=dict)
    outside: set[str] = dataclasses.field(default_factory=set)

    def record(self) -> None:
        """Records what was imported from the folder."""
        for name, module in list(sys.modules.items()):
            if _top(name) not in self.outside:
                stem, file = self.path.joinpath(*name.split(".")), _file(module)
                if file is not None and file in (stem.with_suffix(".py"), stem / "__init__.py"):
                    self.modules.setdefault(name, (module, file_digest(file)))

    def changed(self) -> bool:
        """Whether a file differs from its imported module."""
        files = ((_file(module), digest) for module, digest in self.modules.values())
        return any(file is None or not file.is_file() or file_digest(file) != digest for file, digest in files)

    def conflicts(self) -> set[str]:
        """Modules of the folder whose names stand for modules from elsewhere, apart from those of distributions."""
        local = {path.stem: path for path in self.path.glob("*.py")}
        local |= {path.parent.name: path for path in self.path.glob("*/__init__.py")}
        present = {name: _file(sys.modules[name]) for name in local.keys() & sys.modules.keys()}
        return {
            name
            for name, file in present.items()
            if file not in (None, local[name]) and name != "sparsejax" and not INSTALLED & set(file.parts)
        } - sys.stdlib_module_names


_folders: dict[Path, _Folder] = {}
_active: list[_Folder] = []


@contextlib.contextmanager
def importing_from(path: str | Path) -> Iterator[None]:
    """Puts a folder first in the search path, and hides the modules that were imported from other folders this way."""
    for active in _active:
        active.record()
    folder = _folders.setdefault(Path(path).resolve(), _Folder(Path(path).resolve()))
    conflicts = folder.conflicts()
    others = {name for other in _folders.values() if other is not folder for name in other.modules}
    hidden = _remove(lambda name: _top(name) in conflicts or name in others)
    _remove(lambda name: name in folder.modules)
    if folder.changed():
        folder.modules.clear()  # all of them, because they import one another
    folder.outside = {_top(name) for name in sys.modules}
    sys.modules.update({name: module for name, (module, _) in folder.modules.items()})
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder.path))
    _active.append(folder)
    try:
        yield
    finally:
        _active.pop()
        sys.path.remove(str(folder.path))
        folder.record()
        tops = {_top(name) for name in hidden}
        _remove(lambda name: _top(name) in tops)
        sys.modules.update(hidden)


def _remove(matches: Callable[[str], bool]) -> dict[str, ModuleType]:
    """Removes modules from `sys.modules` by name, and returns them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if matches(name)}


def _top(name: str) -> str:
    return name.partition(".")[0]


def _file(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).resolve()
