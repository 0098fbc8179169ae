"""Patterns and mixers of a user, from a folder outside the package and as an installed package."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsejax
from sparsejax import config as configs
from sparsejax import extensions, layers, patterns, testing
from sparsejax.errors import InputError
from sparsejax.layers.mixers import make_mixer
from sparsejax.patterns.testing import check_pattern
from sparsejax.workdir import Workdir
from tests.messages import rejects

pytestmark = pytest.mark.usefixtures("registries")

SOURCES = Path(__file__).with_name("extension")
COMMAND = [str(Path(sys.executable).with_name("sparsejax"))]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the user's files."""
    return Path(shutil.copytree(SOURCES, tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__")))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


RECIPE = "from sparsejax import patterns\n\n\n@patterns.register\ndef {name}():\n    return patterns.parse('{text}')\n"


# Registration.


def test_a_registered_pattern_is_checked_and_parsed(folder):
    extensions.import_source(str(folder / "older.py"))
    check_pattern(patterns.parse("older(3)"), [(20, 17)], [(4, 5)])
    assert patterns.parse("older_or_near(3, w=4)") == patterns.parse("causal & (older(3) | window(3))")
    with rejects(InputError, "older.share"):
        patterns.parse("older(0)")
    with rejects(InputError, "did you mean 'older'"):
        patterns.parse("oldr(3)")


def test_a_registered_mixer_is_built_from_a_config(folder):
    settings = configs.load(str(folder / "hybrid.py"), {"model.layers.ema.mixer.rate.spread": 2})
    mixer = configs.check(settings).model.layers["ema"].mixer
    assert (type(mixer).__name__, mixer.inner, mixer.rate.spread) == ("EmaConfig", 8, 2.0)
    assert mixer.summary == "ema inner 8"
    assert isinstance(make_mixer(mixer, layers.Stream(4, 1, jnp.float32), nnx.Rngs(0)), layers.Mixer)
    with rejects(InputError, "model.layers.ema.mixer.inner"):
        configs.check(configs.load(str(folder / "hybrid.py"), {"model.layers.ema.mixer.inner": 0}))


def test_names_of_the_package_are_taken(folder):
    with rejects(InputError, "'causal'"):
        extensions.import_source(str(write(folder, "taken.py", RECIPE.format(name="causal", text="full"))))
    edit(folder / "ema.py", '"ema"', '"mamba"')
    with rejects(InputError, "'mamba'"):
        extensions.import_source(str(folder / "ema.py"))


def test_two_files_with_one_name_are_an_error_that_names_both(tmp_path):
    first = write(tmp_path / "a", "near.py", RECIPE.format(name="near", text="window(1)"))
    second = write(tmp_path / "b", "near.py", RECIPE.format(name="near", text="window(2)"))
    extensions.import_source(str(first))
    with rejects(InputError, str(first)) as caught:
        extensions.import_source(str(second))
    assert str(second) in str(caught.value)
    assert patterns.parse("near") == patterns.parse("window(1)")


def test_an_unchanged_file_keeps_its_definitions_and_a_changed_one_replaces_them(folder):
    config = str(folder / "hybrid.py")
    before = configs.check(configs.load(config)).model.layers["ema"].mixer
    assert configs.check(configs.load(config)).model.layers["ema"].mixer == before
    # Another copy of the module, as of a file that is run as a script: the classes of the first stay.
    copy = extensions.run_file(folder / "ema.py")
    assert layers.MIXERS["ema"] == (type(before), copy.Ema)
    assert isinstance(make_mixer(copy.EmaConfig(inner=2), layers.Stream(4, 1, jnp.float32), nnx.Rngs(0)), copy.Ema)
    edit(folder / "ema.py", "inner: int", "inner: int = 4")
    edit(folder / "hybrid.py", ', "inner": 8', "")
    after = configs.check(configs.load(config)).model.layers["ema"].mixer
    assert after.inner == 4
    assert type(after) is not type(before)
    # A config of the replaced class still has its module.
    make_mixer(before, layers.Stream(4, 1, jnp.float32), nnx.Rngs(0))


def test_modules_of_one_folder_never_stand_for_those_of_another(tmp_path):
    for name, text in (("a", "window(1)"), ("b", "window(2)")):
        write(tmp_path / name, "helper.py", f"TEXT = {text!r}\n")
        write(
            tmp_path / name, "parts.py", f"import helper\n\n{RECIPE.format(name=f'near_{name}', text='{helper.TEXT}')}"
        )
        edit(tmp_path / name / "parts.py", "'{helper.TEXT}'", "helper.TEXT")
    for name in "aba":
        extensions.import_source(str(tmp_path / name / "parts.py"))
    assert str(patterns.parse("near_a | near_b")) == "window(1) | window(2)"
    write(tmp_path / "c", "parts.py", "import helper\n")
    with rejects(InputError, "No module named 'helper'"):
        extensions.import_source(str(tmp_path / "c" / "parts.py"))


def test_a_module_of_a_package_beside_the_config(tmp_path):
    write(tmp_path / "library", "__init__.py", "")
    write(tmp_path / "library", "texts.py", "TEXT = 'window(1)'\n")
    file = write(tmp_path / "library", "near.py", "from .texts import TEXT\n" + RECIPE.format(name="near", text="full"))
    extensions.import_source(str(file))
    assert [part.source for part in extensions.loaded()] == [str(file)]


@pytest.mark.parametrize(
    ("source", "argument"),
    [
        ("class Bare(patterns.Pattern):\n    name = 'bare'\n", "frozen dataclass"),
        ("@dataclasses.dataclass(frozen=True)\nclass Unnamed(patterns.Pattern):\n    pass\n", "None"),
        ("class Other:\n    pass\n", "Pattern"),
    ],
    ids=["no-dataclass", "no-name", "no-pattern"],
)
def test_what_is_no_pattern_is_rejected(source, argument, tmp_path):
    file = write(
        tmp_path, "wrong.py", f"import dataclasses\n\nfrom sparsejax import patterns\n\n\n@patterns.register\n{source}"
    )
    with rejects(InputError, argument):
        extensions.import_source(str(file))


def test_what_is_no_mixer_is_rejected(folder):
    edit(folder / "ema.py", "(layers.Mixer)", "(nnx.Module)")
    with rejects(InputError, "layers.Mixer"):
        extensions.import_source(str(folder / "ema.py"))
    edit(folder / "ema.py", "(nnx.Module)", "(layers.Mixer)")
    edit(folder / "ema.py", "frozen=True, kw_only=True)\nclass EmaConfig", "kw_only=True)\nclass EmaConfig")
    with rejects(InputError, "import"):
        extensions.import_source(str(folder / "ema.py"))


@pytest.mark.parametrize("source", ["absent.py", "absent_module", "broken.py"])
def test_a_module_that_cannot_be_imported(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "broken.py", "raise ValueError('on\\npurpose')\n")
    with rejects(InputError, source):
        extensions.import_source(source)


# Contract of mixers.


def test_a_correct_mixer_passes(folder):
    extensions.import_source(str(folder / "ema.py"))
    config, _ = layers.MIXERS["ema"]
    testing.check_mixer(config(inner=4), length=13, width=4)


FAULTS = {
    "future": ("* average), average", "* average[:, ::-1]), average", "causality: the logits at position 0"),
    "padding": ("tokens.zero_padding(self.input(x))", "self.input(x)", r"tokens in padding .* context\.tokens\.mask"),
    "documents": ("if starts is not None", "if False", r"tokens in document 1 .* context\.tokens\.segments"),
    "extend": ("keep[:, 0] * past", "0.5 * past", "decoding: differs from the forward pass"),
    "cache": ('{"average": average}', '{"average": average[0]}', "extend changes the cache"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_mixer_is_named(fault, folder):
    old, new, problem = FAULTS[fault]
    edit(folder / "ema.py", old, new)
    extensions.import_source(str(folder / "ema.py"))
    config, _ = layers.MIXERS["ema"]
    with pytest.raises(testing.CheckFailed, match=problem):
        testing.check_mixer(config(inner=4), length=13, width=4)


def test_defaults_describe_a_causal_mixer(folder):
    source = (folder / "ema.py").read_text()
    start, stop = source.index("    def init_cache"), source.index("    def run")
    (folder / "ema.py").write_text(source[:start] + source[stop:])
    extensions.import_source(str(folder / "ema.py"))
    config, _ = layers.MIXERS["ema"]
    testing.check_mixer(config(inner=4), length=13, width=4)
    mixer = make_mixer(config(inner=4), layers.Stream(6, 1, jnp.float32), nnx.Rngs(0))
    assert mixer.cost(100) == layers.Cost(0, 2.0 * 3 * 6 * 4)  # three matrices, one of them of flax.nnx


# Records of a workdir.


def record(folder: Path) -> Workdir:
    workdir = Workdir(folder)
    folder.mkdir()
    extensions.record(workdir)
    return workdir


def forget(monkeypatch) -> None:
    """As in a new process."""
    for registry in (patterns.REGISTRY, layers.MIXERS):
        monkeypatch.setattr(registry, "members", {n: m for n, m in registry.members.items() if m[1] is None})
    for name in [name for imported in extensions._folders.values() for name in imported.modules]:
        sys.modules.pop(name, None)
    extensions._folders.clear()


def test_a_workdir_records_and_restores_modules(folder, tmp_path, monkeypatch):
    configs.load(str(folder / "hybrid.py"))
    workdir = record(tmp_path / "w")
    recorded = {Path(part["source"]).name: part["names"] for part in json.loads(workdir.extensions.read_text())}
    assert recorded == {"older.py": {"pattern": ["older", "older_or_near"]}, "ema.py": {"mixer": ["ema"]}}
    assert extensions.find_changes(workdir) == []
    forget(monkeypatch)
    extensions.restore(workdir)
    assert {"older", "older_or_near"} <= set(patterns.REGISTRY)
    edit(folder / "older.py", "oldest part", "first part")
    configs.load(str(folder / "hybrid.py"))
    assert extensions.find_changes(workdir) == [str(folder / "older.py")]


def test_nothing_is_recorded_without_extensions(tmp_path):
    assert not record(tmp_path / "w").extensions.exists()


def test_a_missing_file_is_named_and_needed_only_for_unknown_names(folder, tmp_path, monkeypatch):
    extensions.import_source(str(folder / "older.py"))
    workdir = record(tmp_path / "w")
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    forget(monkeypatch)
    with rejects(InputError, str(folder / "older.py")):
        extensions.restore(workdir)
    extensions.import_source(str(moved / "older.py"))
    extensions.restore(workdir)


def test_a_name_that_belongs_to_another_file_is_an_error(tmp_path, monkeypatch):
    first, second = (write(tmp_path / n, "near.py", RECIPE.format(name="near", text=f"window({n})")) for n in "12")
    extensions.import_source(str(first))
    workdir = record(tmp_path / "w")
    forget(monkeypatch)
    extensions.import_source(str(second))
    with rejects(InputError, str(second)):
        extensions.restore(workdir)


def test_a_file_that_registers_less_than_before(folder, tmp_path, monkeypatch):
    extensions.import_source(str(folder / "older.py"))
    workdir = record(tmp_path / "w")
    edit(folder / "older.py", "def older_or_near", "def older_and_near")
    forget(monkeypatch)
    with rejects(InputError, "older_or_near"):
        extensions.restore(workdir)


def test_a_config_file_can_define_its_parts(folder, tmp_path, monkeypatch):
    source = (folder / "ema.py").read_text()
    edit(folder / "hybrid.py", "import ema  # noqa: F401\n", "")
    edit(folder / "hybrid.py", '"""A tiny hybrid', f'{source}\n\nTITLE = """A tiny hybrid')
    (folder / "ema.py").unlink()
    for _ in range(2):
        settings = configs.load(str(folder / "hybrid.py"))
        assert configs.check(settings).model.layers["ema"].mixer.inner == 8
    workdir = record(tmp_path / "w")
    forget(monkeypatch)
    extensions.restore(workdir)
    assert "ema" in layers.MIXERS.registered


def test_a_definition_of_a_session_is_replaced_and_cannot_be_restored(tmp_path, monkeypatch):
    session = types.ModuleType("session")
    monkeypatch.setitem(sys.modules, "session", session)
    for text in ("window(1)", "window(2)"):  # a cell that is edited and run again
        exec(RECIPE.format(name="near", text=text), session.__dict__)
        assert str(patterns.parse("near")) == text
    workdir = record(tmp_path / "w")
    forget(monkeypatch)
    with rejects(InputError, "session"):
        extensions.restore(workdir)


# Entry points.


def install(target: Path, points: dict[str, dict[str, str]], name: str = "my_parts", version: str = "1.0") -> Path:
    """Installs the user's modules as a package, as pip does, and returns the folder for the search path."""
    package = target / name
    if not package.exists():
        shutil.copytree(SOURCES, package, ignore=shutil.ignore_patterns("__pycache__", "hybrid.py"))
        (package / "__init__.py").write_text("")
    info = target / f"{name}-{version}.dist-info"
    write(info, "METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in points.items()]
    write(info, "entry_points.txt", "\n".join(lines))
    return target


POINTS = {
    "sparsejax.patterns": {"older": "my_parts.older:Older", "older_or_near": "my_parts.older"},
    "sparsejax.mixers": {"ema": "my_parts.ema"},
}


@pytest.fixture
def forget_modules(monkeypatch):
    """Removes the modules of packages that a test installs."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("my_")]:
        del sys.modules[name]


@pytest.mark.usefixtures("forget_modules")
def test_entry_points_are_imported_when_their_name_is_used(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, POINTS))
    assert patterns.parse("causal & window(3)")
    assert {"older", "older_or_near"} <= set(patterns.REGISTRY)
    assert "my_parts" not in sys.modules
    assert patterns.parse("older(3)").share == 3
    assert "my_parts.ema" not in sys.modules
    assert layers.MIXERS["ema"][1].__name__ == "Ema"
    assert {part.source: part.distribution for part in extensions.loaded()} == {
        "my_parts.older": "my-parts 1.0",
        "my_parts.ema": "my-parts 1.0",
    }


CONFLICTS = {
    "builtin": ({"sparsejax.patterns": {"causal": "my_parts.older"}}, "my-parts 1.0"),
    "missing": ({"sparsejax.patterns": {"older": "my_absent"}}, "my_absent"),
    "silent": ({"sparsejax.patterns": {"younger": "my_parts.older"}}, "younger"),
}


@pytest.mark.usefixtures("forget_modules")
@pytest.mark.parametrize("conflict", CONFLICTS)
def test_an_entry_point_that_does_not_work_is_named(conflict, tmp_path, monkeypatch):
    points, argument = CONFLICTS[conflict]
    monkeypatch.syspath_prepend(install(tmp_path, points))
    with rejects(InputError, argument):
        patterns.parse("younger(3)" if conflict == "silent" else "older(3)")


@pytest.mark.usefixtures("forget_modules")
def test_two_packages_with_one_name_are_both_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, POINTS))
    install(tmp_path, {"sparsejax.patterns": {"older": "my_others.older"}}, "my_others", "2.0")
    with rejects(InputError, "my-parts 1.0") as caught:
        patterns.parse("older(3)")
    assert "my-others 2.0" in str(caught.value)


# The command line.


def run(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = dict(os.environ) | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def succeed(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    done = run(*arguments, cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_draw_imports_a_file_and_finds_an_entry_point(folder, tmp_path):
    text = "causal & older(2)"
    drawn = succeed("draw", text, "--length=8", "--import=older.py", cwd=folder)
    assert drawn == succeed("draw", text, "--length=8", cwd=tmp_path, path=install(tmp_path / "site", POINTS))
    failed = run("draw", text, "--length=8", "--import=absent.py", cwd=folder)
    assert failed.returncode == 2
    assert failed.stderr.startswith("sparsejax: --import: no file")


def test_a_run_of_a_folder_is_resumed_reported_and_loaded(folder, tmp_path, monkeypatch):
    arguments = ("train", "--config=hybrid.py", "--workdir=../w")
    succeed(*arguments, cwd=folder)
    edit(folder / "ema.py", "gated moving", "moving")
    resumed = succeed(*arguments, cwd=folder)
    assert f"warning: {folder / 'ema.py'} has changed since the run last started" in resumed
    first, second = json.loads((tmp_path / "w" / "versions.json").read_text())
    assert first["extensions"].keys() == second["extensions"].keys()
    assert first["extensions"] != second["extensions"]
    assert "finished" in succeed("report", "w", cwd=tmp_path)
    model = sparsejax.load(tmp_path / "w")
    assert model.step == 4
    tokens = np.arange(12).reshape(2, 6) % 8
    assert model.logits(tokens).shape == (2, 6, 8)
    assert [len(row.tokens) for row in model.generate(tokens, 3, temperature=0)] == [3, 3]
    shutil.rmtree(folder)
    failed = run("report", "w", cwd=tmp_path)
    assert failed.returncode == 2
    assert str(folder / "older.py") in failed.stderr
    assert failed.stderr.count("\n") == 1


SPACE = "def space(trial):\n    return {'model.layers.ema.mixer.inner': trial.suggest_int('inner', 4, 8)}\n"


@pytest.mark.nightly
@pytest.mark.parametrize("installed", [False, True], ids=["folder", "package"])
def test_sweeps_and_searches_find_the_parts(installed, folder, tmp_path):
    site, imports = None, []
    write(folder, "space.py", SPACE)
    if installed:
        site = install(tmp_path / "site", POINTS)
        for name in ("older", "ema"):
            (folder / f"{name}.py").unlink()
            edit(folder / "hybrid.py", f"import {name}  # noqa: F401\n", "")
    else:  # the pattern comes from the command line, the mixer from the config
        edit(folder / "hybrid.py", "import older  # noqa: F401\n", "")
        imports = ["--import=older.py"]
    shared = ("--config=hybrid.py", *imports, "--jobs=1")
    succeed("sweep", *shared, "--sweep=seed=range(2)", "--workdir=../sweep", cwd=folder, path=site)
    succeed("search", *shared, "--space=space.py", "--trials=2", "--workdir=../search", cwd=folder, path=site)
    succeed("train", *shared[:-1], "--workdir=../w", cwd=folder, path=site)
    succeed("train", *shared[:-1], "--workdir=../w", cwd=folder, path=site)
    for name in ("sweep", "search", "w"):
        assert "finished" in succeed("report", name, cwd=tmp_path, path=site)
    recorded = json.loads((tmp_path / "w" / "extensions.json").read_text())
    assert {part["distribution"] for part in recorded} == {"my-parts 1.0" if installed else ""}


# Loading.


def test_what_cannot_be_loaded(tmp_path):
    for name, files in {
        "absent": None,
        "empty": {},
        "other": {"config.json": "{}"},
        "sweep": {"sweep.json": "{}"},
    }.items():
        for file, text in (files or {}).items():
            write(tmp_path / name, file, text)
        if files == {}:
            (tmp_path / name).mkdir()
        with rejects(InputError, name):
            sparsejax.load(tmp_path / name)


def test_a_workdir_without_a_checkpoint_cannot_be_loaded(tiny_config, tmp_path):
    write(tmp_path, "config.json", json.dumps(tiny_config.to_dict()))
    with rejects(InputError, "no checkpoint"):
        sparsejax.load(tmp_path)
    with rejects(InputError, "lsh_rotations"):
        sparsejax.load(tmp_path, lsh_rotations=None)


def test_top_level_names_are_imported_when_used():
    program = "import sparsejax, sys; dir(sparsejax); print(len([n for n in sys.modules if n.startswith('sparsejax')]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    for name in sparsejax.__all__:
        assert getattr(sparsejax, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="absent"):
        _ = sparsejax.absent
