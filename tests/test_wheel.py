"""The wheel: it has what a user needs, and runs where the repository is not."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sparsejax
from sparsejax.presets import list_presets
from sparsejax.workdir import Workdir, read_json

ROOT = Path(__file__).parents[1]
SMALL = {
    "data.length": 64,
    "train.steps": 3,
    "model.schedule": "ssm local full",
    "checkpoint.every": 3,
    "eval.every": 3,
    "eval.final": 1,
    "eval.batch": 4,
    "eval.batches": 1,
    "eval.sample": 4,
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the repository, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    build = [sys.executable, "-m", "pip", "wheel", str(copy_sources(folder / "sources")), *options]
    subprocess.run([*build, f"--wheel-dir={folder}"], check=True, capture_output=True, text=True)
    (file,) = folder.glob("*.whl")
    return file


def copy_sources(folder: Path) -> Path:
    """Copies what a wheel is built from, so that no build folder is left in the repository."""
    names = ["pyproject.toml", "README.md", "LICENSE", *(str(file.relative_to(ROOT)) for file in package_files())]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def package_files() -> list[Path]:
    """The files of the package in the repository."""
    files = (ROOT / "sparsejax").rglob("*")
    return [file for file in files if file.is_file() and "__pycache__" not in file.parts]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the installed wheel; its dependencies are those of this interpreter."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", f"--target={folder}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, capture_output=True)
    return folder


@pytest.fixture
def run(installed, tmp_path, monkeypatch):
    """Runs the installed command from an empty folder; returns what it prints."""
    workplace = tmp_path / "workplace"
    workplace.mkdir()

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(installed / "bin" / "sparsejax"), *arguments]
        done = subprocess.run(command, cwd=workplace, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {str(file.relative_to(ROOT)) for file in package_files()}
    for name in list_presets():
        assert f"sparsejax/presets/{name}.py" in names
    for name in ("py.typed", "report/page.html", "ops/verified.json"):
        assert f"sparsejax/{name}" in names


def test_the_repository_is_not_on_the_search_path(installed, tmp_path):
    program = "import sparsejax, sys; print(sparsejax.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True, capture_output=True
    )
    assert Path(done.stdout.strip()) == installed / "sparsejax" / "__init__.py"


def test_the_installed_command_describes_a_preset(run):
    assert run("--version") == f"sparsejax {sparsejax.__version__}\n"
    assert "4x(ssm ssm_experts ssm ssm_experts full ssm_experts ssm ssm_experts)" in run(
        "show", "--config=preset:jamba"
    )


def test_the_installed_command_trains_the_quickstart(run, tmp_path):
    options = [f"--config.{key}={value}" for key, value in SMALL.items()]
    run("train", "--config=preset:quickstart", "--workdir=w", *options)
    assert read_json(Workdir(tmp_path / "workplace" / "w").result)["step"] == 3
